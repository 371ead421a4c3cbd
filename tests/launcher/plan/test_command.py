import json
import shutil
import subprocess
import sys
from dataclasses import replace

import pytest

from launcher.__main__ import main
from launcher.plan.inputs import config_of, hardware_of, of_config, problems, shipped
from launcher.show.timeline import FILLS
from parallel.plan.hardware import HardwareError
from parallel.plan.search import weigh
from parallel.plan.step import estimate

KEYS = {
    "parameters", "step_seconds", "phases_seconds", "tokens_per_second_per_gpu", "mfu_causal", "mfu_full",
    "memory_bytes_per_rank", "gpu_hours", "bound_by",
}  # fmt: skip
TINY = ["experiment=tiny", "--cluster", "h100"]


def test_json_of_a_run(capsys):
    assert main(["plan", *TINY, "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert set(found) >= KEYS and set(found["parameters"]) == {"main", "active", "mtp"}
    names = {"1F", "bubble", "1B", "1W", "1F1B", "optimizer", "exposed_communication"}
    assert set(found["phases_seconds"]) == names
    assert sum(found["phases_seconds"].values()) == pytest.approx(found["step_seconds"])
    assert len(found["memory_bytes_per_rank"]) == 2 and found["fits"]


def test_what_lies_in_host_memory_is_told(capsys):
    words = ["plan", *TINY, "optim.offload=true", "optim.ema_decay=0.999"]
    assert main([*words, "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    for kinds, host, total in zip(
        found["memory_by_kind"], found["host_by_kind"], found["host_bytes_per_rank"], strict=True
    ):
        assert kinds["masters"] == kinds["moments"] == 0 and "host" not in kinds
        assert all(host.values()) and set(host) == {"masters", "gradients", "moments", "ema"}
        assert sum(host.values()) == total
    assert main(words) == 0
    lines = capsys.readouterr().out.splitlines()
    assert any(line.startswith("host memory of pipeline rank") for line in lines) and max(map(len, lines)) <= 80
    assert main(["plan", *TINY]) == 0
    assert "host memory" not in capsys.readouterr().out


def test_table_fits_80_columns_and_pictures_are_written(capsys, tmp_path):
    html, trace = tmp_path / "plan.html", tmp_path / "plan.json"
    assert main(["plan", *TINY, "--html", str(html), "--perfetto", str(trace)]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert max(len(line) for line in lines if not line.startswith("wrote")) <= 80
    page = html.read_text()
    assert "<canvas" in page and "time, ms" in page and "Memory of pipeline rank 0, the fullest" in page
    assert page.count("<tr") == sum(line.startswith("  ") and "%" in line for line in lines if "less" not in line) + 2
    assert any(event["ph"] == "X" for event in json.loads(trace.read_text())["traceEvents"])


@pytest.mark.parametrize("threads", [1, 20])
def test_no_time_on_a_cpu_is_below_zero(capsys, tmp_path, threads):
    """A cluster as `expertpipe bench kernels` writes it, with fewer threads than a GPU's all-to-all takes SMs."""
    flops = {"bf16_flops": 1e11, "fp8_flops": 1e11}
    links = dict.fromkeys(("nvlink_bytes_per_second", "ib_bytes_per_second", "host_bytes_per_second"), 1e10)
    numbers = {
        "num_sms": threads, **flops, "hbm_bytes_per_second": 2e10, "memory_bytes": 1e11, **links, "gpus_per_node": 8,
        "dollars_per_gpu_hour": 0.0,
    }  # fmt: skip
    cluster, factors = tmp_path / "cpu.yaml", tmp_path / "kernels.json"
    lines = ["name: CPU", *(f"{key}: {{value: {value!r}, source: test}}" for key, value in numbers.items())]
    cluster.write_text("\n".join(lines))
    factors.write_text(json.dumps({"source": "test", "factors": {"grouped_gemm": 2.0, "linear_gemm": 1.5}}))
    words = ["plan", "experiment=tiny", "--cluster", str(cluster), "--calibration", str(factors), "--json"]
    assert main(words) == 0
    found = json.loads(capsys.readouterr().out)
    assert all(seconds >= 0 for seconds in found["phases_seconds"].values()), found["phases_seconds"]
    assert found["phases_seconds"]["1F1B"] > 0 and 0 < found["mfu_causal"] < 1
    assert main([*words, "--precision", "fp32"]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert "CPU has no fp32_flops: add to its file fp32_flops: {value: NUMBER" in line


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["experiment=tiny", "--cluster", "h80"], "did you mean h800?"),
        (["experiment=tiny", "--cluster", "missing.yaml"], "missing.yaml"),
        (["experiment=tiny", "--trace", "pyproject.toml"], "or leave --trace out"),
        (["experiment=tiny", "parallel.expert=3"], "parallel.expert=3 does not divide"),
        (["experiment=tiny", "parallel.data=6", "train.global_batch_size=48"],
         "12 GPUs are not whole nodes of 8 H800: use 8 or 16"),
        (["experiment=deepseek_v3_2048_h800", "parallel.expert=1", "--precision", "fp32"], "one layer takes"),
    ],
)  # fmt: skip
def test_bad_input_is_one_clear_line(capsys, words, said):
    assert main(["plan", *words]) == 2
    error = capsys.readouterr().err
    assert said in error and "Traceback" not in error


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["experiment=tiny", "--validate", "--cluster", "h100"], ["--validate does not take experiment=tiny, --cluster:"
                                                                 " leave them out"]),
        (["--validate", "--measured", "--trace", "x"], ["--measured does not take --trace: leave it out"]),
        (["--validate", "--precision", "bf16", "--price", "1"], ["--validate does not take --precision, --price: leave "
                                                                "them out"]),
        (["experiment=tiny", "--search", "--html", "x", "--perfetto", "y", "--price", "1"],
         ["--search does not take --html, --perfetto, --price: leave them out"]),
        (["experiment=tiny", "--simulate-cluster", "--html", "x", "--calibration", "none", "--gpus", "8"],
         ["--gpus goes with --search", "--simulate-cluster does not take --calibration, --html: leave them out"]),
        (["experiment=tiny", "--search", "--simulate-cluster"],
         ["--search and --simulate-cluster are two questions: ask one at a time"]),
        (["experiment=tiny", "--trace", "x", "--calibration", "none"], ["--trace and --calibration both give the "
                                                                       "kernels' factors: use one of them"]),
        (["experiment=tiny", "--as-published", "--precision", "bf16", "parallel.recompute=none"],
         ["--as-published plans the report's engine: leave parallel.recompute=none, --precision bf16 out"]),
        (["experiment=tiny", "--measured"], ["--measured goes with --validate"]),
    ],
)  # fmt: skip
def test_words_that_would_be_ignored_are_refused(capsys, words, said):
    assert main(["plan", *words]) == 2
    assert capsys.readouterr().err.splitlines() == [f"expertpipe: {line}" for line in said]


def test_everything_wrong_is_said_at_once(capsys):
    words = ["experiment=tiny", "train.stepps=3", "parallel.expert=3", "--cluster", "h80", "--price", "-1"]
    assert main(["plan", *words, "--calibration", "nowhere.json"]) == 2
    lines = capsys.readouterr().err.splitlines()
    said = ("train.stepps", "parallel.expert=3", "did you mean h800?", "--price -1", "nowhere.json: not a calibration")
    assert len(lines) == len(said) + 1  # expert=3 divides neither experts nor data ranks
    assert all(any(text in line for line in lines) for text in said), lines


def test_a_search_on_any_count_of_gpus(capsys):
    assert main(["plan", "experiment=tiny", "--cluster", "h100", "--search", "--gpus", "16", "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["layouts"] and all(row["pipeline"] * row["data"] == 16 for row in found["layouts"])
    assert {row["precision"] for row in found["layouts"]} == {"fp8", "bf16"}
    for words, said in (
        (["--search", "--gpus", "12"], "12 GPUs are not whole nodes of 8 H100: use 8 or 16"),
        (["--gpus", "8"], "--gpus goes with --search"),
    ):
        assert main(["plan", "experiment=tiny", "--cluster", "h100", *words]) == 2
        assert capsys.readouterr().err == f"expertpipe: {said}\n"


@pytest.mark.parametrize("gpus", [[], ["--gpus", "16"]])
def test_what_a_search_prints_gives_the_layout_that_it_ranked(capsys, gpus):
    """A split of the layers given by hand does not stay beside a layout that has its own."""
    run = ["experiment=tiny", "parallel.layers_per_stage=[2,4]"]
    assert main(["plan", *run, "--cluster", "h100", "--search", "--json", *gpus]) == 0
    rows = json.loads(capsys.readouterr().out)["layouts"]
    best = next(row for row in rows if not row["own"] and row["precision"] == "fp8" and row["pipeline"] > 1)
    assert sum(row["own"] for row in rows) == (not gpus)
    words = best["overrides"].split()
    assert "parallel.layers_per_stage=null" in words and "fp8.backend=transformer_engine" in words
    job = replace(of_config(config_of([*run, *words]), hardware_of("h100")), calibration=shipped())
    if best["step_seconds"] is None:
        assert weigh(job, job.short_schedule(), job.stages(job.short_schedule())) == best["weighed_seconds"]
    else:
        assert estimate(job)[0] == best["step_seconds"]


def test_a_search_as_text_fits_80_columns(capsys):
    assert main(["plan", "experiment=tiny", "--cluster", "h100", "--search", "parallel.layers_per_stage=[2,4]"]) == 0
    lines = capsys.readouterr().out.splitlines()
    table = lines[2 : lines.index("")]
    assert max(map(len, lines)) <= 80 and sum(line.endswith(" own") for line in table) == 1
    assert all(" ms" in line and " 0.00 ms" not in line for line in table)  # a step of milliseconds


def test_experts_over_more_nodes_than_the_gate_has_groups(capsys):
    """And one expert's rank that does not hold a layer: the nearest that works is named, and it does."""
    run = "experiment=deepseek_v3_2048_h800"
    assert main(["plan", run, "parallel.expert=128"]) == 2
    error = capsys.readouterr().err
    assert "parallel.expert=128: n_group=8: group 0 lies across nodes" in error
    assert error.endswith("or use parallel.expert=64\n")
    assert main(["plan", run, "parallel.expert=1", "--precision", "fp32"]) == 2
    error = capsys.readouterr().err
    assert error.count("\n") == 1 and "one layer takes" in error and error.endswith(": use parallel.expert=2\n")
    for expert, precision, works in ((128, "fp8", False), (64, "fp8", True), (1, "fp32", False), (2, "fp32", True)):
        words = [run, f"parallel.expert={expert}", f"train.precision={precision}"]
        assert (problems(config_of(words), hardware_of("h800"), memory=False) == []) == works


@pytest.mark.slow
def test_a_browser_draws_the_page_without_an_error(tmp_path):
    browser = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
    if browser is None:
        pytest.skip("no chromium: the page was not opened in a browser (apt-get install chromium)")
    from PIL import Image

    path, picture = tmp_path / "plan.html", tmp_path / "plan.png"
    assert main(["plan", *TINY, "--html", str(path)]) == 0
    command = [
        browser, "--headless", "--no-sandbox", "--disable-gpu", "--enable-logging=stderr", "--window-size=1280,900",
        f"--user-data-dir={tmp_path / 'profile'}", f"--screenshot={picture}", path.as_uri(),
    ]  # fmt: skip
    done = subprocess.run(command, capture_output=True, text=True, timeout=120)
    assert [line for line in done.stderr.splitlines() if "CONSOLE" in line] == []
    with Image.open(picture) as shot:
        colours = {colour for _, colour in shot.convert("RGB").getcolors(1 << 20) or ()}
    fills = {tuple(bytes.fromhex(fill[1:])) for way in FILLS for fill in way.values()}
    assert fills <= colours and (0x4F, 0x92, 0xD3) in colours  # every kind of box, and the tables' bars


def test_a_plan_needs_no_torch():
    code = "import sys; from launcher.__main__ import main; main(sys.argv[1:]); sys.exit('torch' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code, "plan", *TINY], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


def test_a_cluster_of_ones_own(tmp_path):
    path = tmp_path / "mine.yaml"
    path.write_text("name: mine\n")
    with pytest.raises(HardwareError, match="num_sms"):
        hardware_of(str(path))
