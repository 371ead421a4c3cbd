"""The report: one file, every part of a run in it, honest when thinned, drawn by a real browser without an error."""

import json
import math
import random
import re
import shutil
import subprocess
from dataclasses import replace
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest

from launcher.__main__ import main
from launcher.commands.report import report
from launcher.config import RunConfig, compose, to_yaml
from launcher.record.clock import PHASES
from launcher.record.events import EventLog, RankEvent, StepEvent, rank_log_path
from launcher.record.norms import GROUPS
from launcher.report.heat import DIVERGING, HeatMap, image, palette, png
from launcher.report.schedule import Recorded, recorded
from launcher.report.thin import thin
from parallel.pipeline.schedules import build
from parallel.pipeline.simulate import Costs
from tests.launcher.record.test_measured import write as write_actions

LAYERS, EXPERTS, RANKS = 6, 8, 4
SECTIONS = ["Loss", "Recipe", "Norms", "Speed", "Experts", "Schedule", "Faults", "FP8", "Configuration"]
SPIKE = 4321


def tiny(folder: Path, *overrides: str) -> RunConfig:
    return compose(["experiment=tiny", f"run_dir={folder}", *overrides])


def step_event(step: int, rng: random.Random, *, every: int) -> StepEvent:
    counts = tuple(tuple(rng.randrange(200, 1800) for _ in range(EXPERTS)) for _ in range(LAYERS))
    loads = tuple(max(row) * EXPERTS / sum(row) for row in counts)
    loss = 4 + 4 * math.exp(-step / 900) + rng.gauss(0, 0.05) + (9 if step == SPIKE else 0)
    norms = {group: rng.uniform(0.1, 1) for group in GROUPS}
    fp8 = (("layers.1.mlp.experts.down_proj", "weight", 3.0, 0.0, 0.1, 0.027),) if step % 100 == 0 else ()
    return StepEvent(
        step, step * 8192, loss, loss + 0.1, 1e-3, rng.uniform(0.5, 2), 4500.0, 1.8, max(loads), loads, 0.3, 0,
        counts if step % every == 0 else (), fp8, 1e-3, tuple(0.05 * i for i in range(LAYERS)),
        ((2, 5),) if step == 3 else (), 0.31, 0.34, 0.3, 1e-3, 32, norms, norms, ("a spike",) if step == SPIKE else (),
    )  # fmt: skip


def write_run(folder: Path, *, steps: int, planned: int | None = None, every: int = 10) -> None:
    config, rng = tiny(folder), random.Random(0)
    folder.mkdir(parents=True, exist_ok=True)
    config = replace(config, train=replace(config.train, steps=planned or steps))
    (folder / "config.yaml").write_text(to_yaml(config))
    facts = {"name": "tiny", "torch": "2.13.0", "device": "CPU", "peak_flops": 1e11, "peak_source": "measured: here"}
    with EventLog(folder / "events.jsonl", facts=facts) as log:
        for step in range(1, steps + 1):
            log.append(step_event(step, rng, every=every))
    for rank in range(RANKS):
        with EventLog(rank_log_path(folder, rank), kind=RankEvent) as log:
            for step in range(1, steps + 1):
                phases = dict.fromkeys(PHASES, 0.0) | {"forward": 0.5 + rank, "backward": 1.0}
                log.append(RankEvent(step, 1, sum(phases.values()), phases, 2048, 600 << 20))
    fault = {"time": 1.7e9, "step": 3, "what": "spike in step 3: <loss> & norm"}
    (folder / "faults.jsonl").write_text(json.dumps(fault) + "\n")
    schedule = build("dualpipe", num_ranks=2, num_microbatches=8)
    write_actions(folder, schedule, Costs(3.0, 2.0, 1.0), steps=2)


class Page(HTMLParser):
    """What a page refers to, what it says, and whether its tags close."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.references: list[str] = []
        self.headings: list[str] = []
        self.tags: list[str] = []
        self.text = ""
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        self.references += [value or "" for name, value in attrs if name in ("href", "src", "xlink:href")]

    def handle_data(self, data: str) -> None:
        self.text += data
        if self.tags and self.tags[-1] == "h2":
            self.headings.append(data)
            self.tags.append("")


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("report") / "tiny"
    write_run(folder, steps=400)
    return folder


def test_every_part_is_there_and_nothing_is_fetched(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["report", str(run)]) == 0
    assert "400 steps" in capsys.readouterr().out
    text = (run / "report.html").read_text()
    page = Page(text)
    assert page.headings == SECTIONS
    assert all(reference.startswith(("data:image/png;base64,", "#")) for reference in page.references)
    assert not re.search(r"https?://(?!www\.w3\.org/2000/svg)|@import|url\(", text)
    for said in (
        "finished", "Against 0.1 TFLOP/s of all ranks together (measured: here)", "mean over 4 of 4 ranks",
        "dualpipe, 2 pipeline ranks, 8 micro-batches, step 1", "spike in step 3: <loss> & norm",
        "40 logged steps. 1 expert had a step without a token, none in the last step.", "layer 1", "MTP 0",
        "layers.1.mlp.experts.down_proj", "initializer_range", "Balance loss", "Weight of multi-token prediction",
    ):  # fmt: skip
        assert said in page.text, said
    assert text.count('class="chart wide') == 6  # loss, balance loss, time, load by layer, schedule, FP8
    assert "<loss>" not in text  # what a run says is text, never a tag
    assert page.tags.count("figure") == text.count("</figure>") >= 19


def test_the_balance_loss_and_the_weight_of_mtp_are_drawn_as_logged(tmp_path: Path) -> None:
    write_run(tmp_path / "run", steps=3)
    drawn = {
        series["name"]: series["y"]
        for data in re.findall(r'<script type="application/json">(.*?)</script>', report(tmp_path / "run"))
        for series in json.loads(data)["series"]
    }
    assert [float(y) for y in drawn["balance loss"]] == [1e-3] * 3
    assert [float(y) for y in drawn["MTP weight"]] == [0.3] * 3


def test_an_unfinished_run_and_torn_files(run: Path, tmp_path: Path) -> None:
    folder = tmp_path / "cut"
    shutil.copytree(run, folder)
    config = tiny(folder)
    (folder / "config.yaml").write_text(to_yaml(replace(config, train=replace(config.train, steps=1000))))
    for name in ("events.jsonl", "ranks/rank1.events.jsonl", "faults.jsonl"):
        with open(folder / name, "a") as file:
            file.write('{"step": 401, "tok')
    text = Page(report(folder)).text
    assert "unfinished: 40% of its steps" in text and "spike in step 3" in text


def test_a_run_that_has_just_begun_and_an_old_one(tmp_path: Path) -> None:
    write_run(tmp_path / "one", steps=1, planned=10)
    for extra in ("faults.jsonl", "actions-0.jsonl", "actions-1.jsonl", "config.yaml"):
        (tmp_path / "one" / extra).unlink()
    shutil.rmtree(tmp_path / "one" / "ranks")
    text = Page(report(tmp_path / "one")).text
    assert not re.search(r"\b1 (logged )?(steps|ranks|experts|checkpoints)\b", text)
    for said in (
        "No step was recorded; train with train.record_actions_every", "Nothing out of the ordinary was recorded",
        "No rank's time was logged; train.rank_events_every=1", "were not logged; train.expert_counts_every=10",
    ):  # fmt: skip
        assert said in text
    # version 1 had neither norms nor MFU
    old = tmp_path / "old"
    old.mkdir()
    known = ("step", "tokens", "loss", "mtp_loss", "lr", "grad_norm", "tokens_per_second", "step_seconds")
    first = {name: 1 for name in known} | {"expert_load_max_over_mean": 1.2, "expert_load": [1.2, 1.1]}
    header = {"schema": "expertpipe-events", "version": 1}
    (old / "events.jsonl").write_text("\n".join(map(json.dumps, (header, first, first | {"step": 2}))) + "\n")
    text = Page(report(old)).text
    assert "Balance loss" not in text and "Weight of multi-token prediction" not in text  # it has neither
    assert "This log holds no MFU" in text and "Norms by group were not logged" in text and "MoE 1" in text


BAD = [
    ("missing", lambda folder: shutil.rmtree(folder), "no such run; give the folder"),
    ("empty", lambda folder: (folder / "events.jsonl").unlink(), "no events.jsonl in it; give the folder"),
    ("header alone", lambda folder: keep_lines(folder / "events.jsonl", 1), "events.jsonl: no step yet"),
    ("broken line", lambda folder: spoil(folder / "events.jsonl", 3), "events.jsonl: line 3 is not a JSON object"),
    ("other file", lambda folder: keep_lines(folder / "events.jsonl", 3, skip=1), "line 1 is not the header"),
    ("rank", lambda folder: spoil(folder / "ranks/rank2.events.jsonl", 2), "rank2.events.jsonl: line 2 is not a JSON"),
    (
        "faults",
        lambda folder: (folder / "faults.jsonl").write_text("{}\nx\n{}\n"),
        "faults.jsonl: line 2 is not a JSON",
    ),
    ("config", lambda folder: (folder / "config.yaml").write_text("a: [1\n"), "config.yaml: not readable"),
]


def keep_lines(path: Path, number: int, skip: int = 0) -> None:
    path.write_text("".join(path.read_text().splitlines(keepends=True)[skip : skip + number]))


def spoil(path: Path, number: int) -> None:
    lines = path.read_text().splitlines(keepends=True)
    path.write_text("".join([*lines[: number - 1], "{broken\n", *lines[number:]]))


@pytest.mark.parametrize(("name", "damage", "message"), BAD, ids=[case[0] for case in BAD])
def test_bad_input_is_one_line(
    name: str, damage: Any, message: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = tmp_path / "run"
    write_run(folder, steps=5)
    damage(folder)
    assert main(["report", str(folder)]) == 2
    error = capsys.readouterr().err
    assert message in error and error.count("\n") == 1 and not (folder / "report.html").exists()


@pytest.mark.slow
def test_a_long_run_stays_small_and_hides_no_spike(tmp_path: Path) -> None:
    write_run(tmp_path / "run", steps=10_000)
    text = report(tmp_path / "run")
    assert len(text.encode()) < 2_000_000
    assert "A point is the mean of 21 steps, the band their least and most." in text
    values = [4.0] * 10_000
    values[SPIKE] = 13.0
    found = thin([float(i) for i in range(10_000)], values)
    assert len(found.x) <= 480 and max(found.high) == 13.0 and min(found.low) == 4.0
    assert max(found.mean) == pytest.approx(4 + 9 / found.size)
    assert found.x[SPIKE // found.size] == pytest.approx(SPIKE, abs=found.size)


def test_thinning_leaves_out_what_is_not_finite() -> None:
    found = thin([1.0, 2.0, 3.0, 4.0], [1.0, math.nan, None, math.inf], limit=2)
    assert (found.size, found.x, found.mean[0], found.low[0], found.high[0]) == (2, [1.5, 3.5], 1.0, 1.0, 1.0)
    assert math.isnan(found.mean[1]) and math.isnan(found.high[1])


@pytest.mark.parametrize("width", [1, 2, 7, 240])
def test_images_are_read_by_others(tmp_path: Path, width: int) -> None:
    from PIL import Image

    colours = palette(HeatMap("", [], (0, 1), [], 0.25, 4, diverging=True))
    rows = [[(x * y) % len(colours) for x in range(width)] for y in range(5)]
    (tmp_path / "a.png").write_bytes(png(rows, colours))
    with Image.open(tmp_path / "a.png") as opened:
        seen = opened.convert("RGB")
        assert seen.size == (width, 5)
        for y in range(5):
            for x in range(width):
                assert "#{:02x}{:02x}{:02x}".format(*seen.getpixel((x, y))) == colours[rows[y][x]]  # type: ignore[misc]


def test_a_dead_expert_is_black_and_an_even_one_neutral(tmp_path: Path) -> None:
    from PIL import Image

    heat = HeatMap("", [[0.0, 1.0, 4.0, 0.25, None]], (0, 1), [], 0.25, 4.0, diverging=True)
    (tmp_path / "a.png").write_bytes(image(heat))
    with Image.open(tmp_path / "a.png") as opened:
        seen = opened.convert("RGB")
        colours = ["#{:02x}{:02x}{:02x}".format(*seen.getpixel((x, 0))) for x in range(5)]  # type: ignore[misc]
    assert colours == ["#111418", DIVERGING[5], DIVERGING[-1], DIVERGING[0], "#9aa3af"]


def test_the_schedule_is_the_last_whole_step(run: Path, tmp_path: Path) -> None:
    from launcher.config import to_dict

    config = to_dict(tiny(run))
    found = recorded(run, config)
    assert isinstance(found, Recorded)
    assert found.step == 1 and found.run_ms == pytest.approx(found.plan_ms)
    one_stage = config | {"parallel": config["parallel"] | {"schedule": "1f1b"}}
    assert "No recorded step has every action" in str(recorded(run, one_stage))
    assert "No step was recorded" in str(recorded(tmp_path, config))
    (tmp_path / "actions_rank0.jsonl").write_text("nonsense\n")
    assert "actions_rank0.jsonl line 1" in str(recorded(tmp_path, config))


@pytest.mark.slow
def test_a_browser_draws_it_without_an_error(run: Path, tmp_path: Path) -> None:
    browser = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
    if browser is None:
        pytest.skip("no chromium: the page was not opened in a browser (apt-get install chromium)")
    from PIL import Image

    path = tmp_path / "page.html"
    path.write_text(report(run))
    common = [
        browser, "--headless", "--no-sandbox", "--disable-gpu", "--hide-scrollbars", "--enable-logging=stderr",
        f"--user-data-dir={tmp_path / 'profile'}", "--window-size=1280,3000",
    ]  # fmt: skip

    def opened(page: Path, *options: str) -> tuple[str, list[str]]:
        done = subprocess.run([*common, *options, page.as_uri()], capture_output=True, text=True, timeout=120)
        return done.stdout, [line for line in done.stderr.splitlines() if "CONSOLE" in line]

    dom, said = opened(path, "--dump-dom")
    assert said == []
    assert dom.count('class="tip"') == dom.count('class="plot"') >= 10  # the script has reached every plot
    # the check itself sees a script that fails
    broken = tmp_path / "broken.html"
    broken.write_text(path.read_text().replace('"use strict";', '"use strict"; missing();'))
    dom, said = opened(broken, "--dump-dom")
    assert len(said) == 1 and "missing is not defined" in said[0] and 'class="tip"' not in dom

    grounds = []
    for name, options in (("light", []), ("dark", ["--blink-settings=preferredColorScheme=0"])):
        picture = tmp_path / f"{name}.png"
        opened(path, *options, f"--screenshot={picture}")
        with Image.open(picture) as shot:
            assert shot.size == (1280, 3000)
            colours = shot.convert("RGB").getcolors(1 << 20)
            assert colours is not None and len(colours) > 200  # text, curves, maps
            grounds.append(shot.convert("RGB").getpixel((3, 3)))
    assert grounds == [(0xFB, 0xFB, 0xFA), (0x14, 0x17, 0x1C)]
