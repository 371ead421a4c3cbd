"""`expertpipe bench SUBJECT`: which file measures what. The file is imported when its subject is asked for."""

from importlib import import_module

SUBJECTS = {
    "step": ("launcher.bench.step", "bench_step_command", "a whole training step of one process"),
    "pipeline": ("launcher.bench.pipeline", "bench_pipeline", "the executor beside its simulated ideal and torch's"),
    "alltoall": ("launcher.bench.alltoall", "bench_alltoall", "dispatch and combine of every back end"),
    "checkpoint": ("launcher.bench.checkpoint", "bench_checkpoint", "save and load beside raw writes and torch DCP"),
    "kernels": ("launcher.bench.kernels", "bench_kernels", "kernel classes, for expertpipe plan --calibration"),
    "data": ("launcher.bench.data", "bench_data", "readers of token files side by side"),
}
USER_ERROR = 2


def bench(argv: list[str]) -> int:
    """Runs one subject with the rest of the line; its exit code, or 2 with the list of subjects."""
    if argv[:1] and argv[0] in SUBJECTS:
        module, function, _ = SUBJECTS[argv[0]]
        return getattr(import_module(module), function)(argv[1:])
    asked = argv[:1] in (["-h"], ["--help"])
    lines = [f"  {name:<12}{what}" for name, (_, _, what) in SUBJECTS.items()]
    print("\n".join(["usage: expertpipe bench SUBJECT [--json] ...", "", *lines]))
    if argv and not asked:
        print(f"\nexpertpipe: {argv[0]}: no such subject; use {', '.join(SUBJECTS)}")
    return 0 if asked else USER_ERROR
