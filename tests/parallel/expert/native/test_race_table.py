"""Each ordering of the kernels matters, and ThreadSanitizer or the faulty network sees it missing."""

from pathlib import Path

import pytest

from parallel.expert.native import race_table

NAMES = [site.name for site in race_table.sites()]


def test_every_ordering_in_the_kernels_is_a_numbered_site() -> None:
    """No atomic outside the machines, no site that the kernels do not use, numbers without gaps."""
    kernels = "".join((race_table.SOURCES / f"{name}.h").read_text() for name in ("notify", "dispatch", "combine"))
    assert [site.number for site in race_table.sites()] == list(range(1, len(NAMES) + 1))
    for name in NAMES:
        uses = (f"<{name}>", f"<{name}, UNORDERED, false>", f", {name}, true>")
        assert any(use in kernels for use in uses), name
    assert "atomic" not in kernels and "fence" not in kernels


@pytest.mark.exhaustive
def test_a_seeded_network_loses_weak_signals(tmp_path: Path) -> None:
    """The quick half of the table: one site, and the sound kernels beside it."""
    for weaken, bad in ((0, False), (NAMES.index("DISPATCH_SEND_SIGNAL") + 1, True)):
        program = race_table.build(tmp_path / str(weaken), weaken=weaken, tsan=False)
        results = [race_table.run(program, arguments) for arguments in race_table.FAULT_RUNS]
        assert any(results) == bad, results


@pytest.mark.exhaustive
def test_table(capsys: pytest.CaptureFixture[str]) -> None:
    status = race_table.main([])
    print(capsys.readouterr().out)
    assert status == 0
