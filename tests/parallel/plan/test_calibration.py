"""The committed calibration against the code that predicts and against the trace that it is from."""

import json
from pathlib import Path

import pytest

from parallel.pipeline.actions import Pair
from parallel.pipeline.schedules import build
from parallel.plan import calibration
from parallel.plan.hardware import HardwareError
from parallel.plan.kernels import CLASSES
from parallel.plan.published import ISCA
from tests.parallel.plan.jobs import CLUSTERS, V3, h800, v3

FILE = CLUSTERS / "calibration" / "h800_overlap_trace.json"
TRACE = Path(__file__).parents[4] / "shared" / "data" / "h800_overlap_trace.json"


@pytest.fixture(scope="module")
def tree():
    return json.loads(FILE.read_text())


def shape():
    return calibration.trace_shape(V3, tokens=4096, expert=64, ranks_per_node=8)


def test_factors_are_measured_over_predicted_seconds(tree):
    """The file alone: whoever changes a prediction measures nothing anew, but writes the factors anew."""
    predicted = calibration.predicted_classes(shape(), h800(), layers=4)
    assert set(tree["factors"]) == set(CLASSES)
    for kind, factor in tree["factors"].items():
        assert factor == pytest.approx(tree["class_seconds"][kind] / predicted[kind], rel=2e-4), kind


def test_the_factor_of_training_is_the_published_pair_over_the_traces(tree):
    schedule = build("dualpipe", num_ranks=16, num_microbatches=120)
    pairs = sum(isinstance(step, Pair) for steps in schedule.ranks for step in steps) / 16
    assert tree["training"] == pytest.approx(ISCA["1F1B"] / pairs / tree["pair_seconds"], abs=5e-4)
    assert f"{pairs:.1f} a rank" in tree["training_source"] and "Spent on this: the row 1F1B" in tree["training_source"]


def test_the_published_run_has_the_traces_layer():
    assert calibration.shape_in_trace(v3()) == shape()


def trace() -> Path:
    if not TRACE.exists():
        pytest.skip(f"{TRACE} is not here: the committed calibration was not held against the trace that it is from")
    return TRACE


def test_the_file_is_what_the_trace_gives(tree):
    found = calibration.from_trace(trace(), shape(), h800())
    assert found.measured.layers == 4 and not found.measured.unknown
    made = calibration.to_tree(
        found.calibration, found.measured, training=tree["training"], training_source=tree["training_source"]
    )
    assert {**made, "source": tree["source"]} == tree


def test_a_trace_of_other_layers_is_refused():
    with pytest.raises(HardwareError, match="4 layers by the backwards of attention in it, not 3"):
        calibration.of_trace(trace(), shape(), h800(), layers=3)
    other = calibration.trace_shape(V3, tokens=4096, expert=32, ranks_per_node=8)
    with pytest.raises(HardwareError, match="60 kernels of weight gradients are not as many in each of 4 layers with"):
        calibration.of_trace(trace(), other, h800())
