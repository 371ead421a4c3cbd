"""The event log: round trip, torn tail, resume."""

import json
import math
from dataclasses import replace

import pytest

from launcher.record.events import SCHEMA, VERSION, EventLog, StepEvent, read, read_header


def event(step: int, **changes) -> StepEvent:
    plain = StepEvent(
        step=step, tokens=step * 4096, loss=4.5, mtp_loss=4.9, lr=2.8e-3, grad_norm=0.83, tokens_per_second=8412.0,
        step_seconds=0.5, expert_load_max_over_mean=1.31, expert_load=(1.31, 1.2), router_bias_range=0.004,
    )  # fmt: skip
    return replace(plain, **changes)


def write(path, steps, **options):
    with EventLog(path, **options) as log:
        for step in steps:
            log.append(event(step))


def steps(path):
    return [item.step for item in read(path)]


def test_round_trip(tmp_path):
    path = tmp_path / "run" / "events.jsonl"
    written = [
        event(1, expert_counts=((3, 5), (4, 4))),
        event(2, mtp_loss=None, expert_load=()),
        event(3, loss=math.inf, dropped_tokens=0),
    ]
    with EventLog(path, facts={"world_size": 4, "schedule": "dualpipe"}) as log:
        for item in written:
            log.append(item)
            assert read(path)[-1] == item  # on disk at once, not at close
    assert read(path) == written
    assert read_header(path) == {"world_size": 4, "schedule": "dualpipe", "schema": SCHEMA, "version": VERSION}


def test_not_a_number_stays_valid_json(tmp_path):
    with EventLog(tmp_path / "e") as log:
        log.append(event(1, loss=math.nan, expert_load=(math.inf,)))

    def refuse(name):
        raise AssertionError(name)

    for line in (tmp_path / "e").read_text().splitlines():
        json.loads(line, parse_constant=refuse)
    (back,) = read(tmp_path / "e")
    assert math.isnan(back.loss)
    assert back.expert_load == (math.inf,)


def test_a_torn_last_line_is_passed_over_at_every_byte(tmp_path):
    path = tmp_path / "e"
    write(path, [1, 2, 3])
    whole = path.read_bytes()
    last = whole.rindex(b"\n", 0, -1) + 1
    for cut in range(last, len(whole)):
        path.write_bytes(whole[:cut])
        assert steps(path) == [1, 2]


def test_damage_before_the_end_is_an_error(tmp_path):
    path = tmp_path / "e"
    write(path, [1, 2, 3])
    lines = path.read_bytes().splitlines(keepends=True)
    for broken in (b"{nonsense\n", b"[1]\n", b'{"step": 2}\n'):
        path.write_bytes(b"".join([lines[0], lines[1], broken, lines[3]]))
        with pytest.raises(ValueError, match="line 3"):
            read(path)


def test_other_files_and_versions_are_refused(tmp_path):
    path = tmp_path / "e"
    path.write_text('{"step": 1}\n')
    for call in (read, read_header, lambda p: EventLog(p, resume_step=1)):
        with pytest.raises(ValueError, match="not the header"):
            call(path)
    path.write_text(json.dumps({"schema": SCHEMA, "version": 99}) + "\n")
    with pytest.raises(ValueError, match="version 99"):
        read(path)
    with pytest.raises(FileNotFoundError):
        read(tmp_path / "missing")


@pytest.mark.parametrize(("resume", "kept"), [(0, []), (3, [1, 2, 3]), (5, [1, 2, 3, 4, 5]), (9, [1, 2, 3, 4, 5])])
def test_resume_cuts_what_will_be_done_again(tmp_path, resume, kept):
    path = tmp_path / "e"
    write(path, [1, 2, 3, 4, 5], facts={"name": "demo"})
    with open(path, "ab") as file:
        file.write(b'{"step": 6, "tok')
    write(path, [resume + 1], resume_step=resume)
    assert steps(path) == [*kept, resume + 1]
    assert read_header(path)["name"] == "demo"


def test_resume_without_a_usable_log_begins_one(tmp_path):
    path = tmp_path / "e"
    for content in (None, b"", b'{"schema": "expertp'):
        if content is not None:
            path.write_bytes(content)
        write(path, [4], resume_step=3, facts={"name": "demo"})
        assert steps(path) == [4]
        assert read_header(path)["name"] == "demo"
        path.unlink()


def test_a_new_log_keeps_the_old_one_beside_it(tmp_path):
    path = tmp_path / "e.jsonl"
    write(path, [1, 2])
    write(path, [1])
    assert steps(path) == [1]
    assert steps(tmp_path / "e.jsonl.previous") == [1, 2]


def test_fields_of_a_later_program_are_passed_over(tmp_path):
    path = tmp_path / "e"
    write(path, [1])
    path.write_text(path.read_text().replace('{"step": 1', '{"news": [1], "step": 1'))
    assert read(path) == [event(1)]
