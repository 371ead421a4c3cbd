"""`expertpipe report RUN`: everything that a run's folder tells, as one self-contained HTML page."""

from argparse import ArgumentParser
from pathlib import Path


def report_command(argv: list[str]) -> int:
    """Write the page; the exit code."""
    parser = ArgumentParser(
        prog="expertpipe report",
        description="Draws a run, finished or not: losses, recipe, norms, speed and its split, experts, schedule, "
        "faults, FP8 and configuration, as one HTML file that needs no network.",
        allow_abbrev=False,
    )
    parser.add_argument("run", type=Path, metavar="RUN", help="the run's folder (run_dir)")
    parser.add_argument("--out", type=Path, metavar="FILE", help="default: report.html in the run's folder")
    args = parser.parse_args(argv)
    from launcher.report.charts import counted
    from launcher.report.read import read_run

    record = read_run(args.run)
    path = args.out or record.folder / "report.html"
    text = report(args.run)
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text, encoding="utf-8")
    print(f"{counted(record.last.step, 'step')}, {len(text.encode()) / 1024:.0f} kB: {path}")
    return 0


def report(run: Path) -> str:
    """The page of a run; EventError, ReportError or FileNotFoundError with one line for what cannot be reported."""
    from launcher.commands.fp8_report import Sample
    from launcher.report import sections
    from launcher.report.page import page
    from launcher.report.read import read_run
    from launcher.report.schedule import recorded

    record = read_run(run)
    parts = {
        "Loss": sections.losses(record),
        "Recipe": sections.recipe(record),
        "Norms": sections.gradients(record),
        "Speed": sections.speed(record),
        "Experts": sections.experts(record),
        "Schedule": sections.schedule(recorded(record.folder, record.config)),
        "Faults": sections.faults(record),
    }
    samples = [Sample(event.step, *row) for event in record.events for row in event.fp8]  # type: ignore[arg-type]
    if samples:
        parts["FP8"] = sections.fp8(samples)
    return page(record, parts)
