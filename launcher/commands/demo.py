"""`expertpipe demo`: real text to trained model in minutes, and what came of it in figures and pictures."""

import json
from argparse import ArgumentParser
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from launcher.commands.prepare import VOCAB_SIZE
from launcher.config import RunConfig, compose

PROMPT = "def main():\n"
RECORDED = ("train.record_actions_every=35",)  # a few steps as they really ran, for the page


def demo(argv: Sequence[str]) -> int:
    """Prepare the corpus, train experiment=tiny on local processes, evaluate, draw; the exit code.

    Every part is skipped or resumed where an earlier call has done it.
    """
    parser = ArgumentParser(prog="expertpipe demo", description=demo.__doc__)
    parser.add_argument("--corpus", choices=["stdlib", "full"], default="stdlib")
    parser.add_argument("overrides", nargs="*", metavar="OVERRIDE", help="such as train.steps=50")
    arguments = parser.parse_intermixed_args(argv)
    overrides = run_of(arguments.corpus, arguments.overrides)
    config = compose(overrides)

    from data.prepare import prepare

    _say("1/3  text and tokenizer")
    folder = Path(config.data.prefix).parent
    vocab_size = config.model.vocab_size
    prepared = prepare(corpus=arguments.corpus, out_dir=folder, vocab_size=vocab_size, progress=_indented)
    _say("2/3  training")
    from launcher.start import start

    code = start(overrides)
    if code:
        return code
    _say("3/3  held-out text")
    summary = evaluate(config, Path(prepared.heldout_prefix))
    _report(config, summary)
    return 0


def run_of(corpus: str, given: Sequence[str]) -> list[str]:
    """The overrides of the demonstration on one corpus, those `given` by the user among them.

    Its data lies apart from what other runs expect under the corpus' name unless it is the same: runs/data/stdlib holds
    a vocabulary of VOCAB_SIZE, another corpus or vocabulary gets a folder that says so, such as runs/data/full-4096.
    """
    name = "demo" if corpus == "stdlib" else f"demo-{corpus}"
    overrides = ["experiment=tiny", f"data={corpus}", f"name={name}", *RECORDED, *given]
    config, usual = compose(overrides), compose([f"data={corpus}"]).data.prefix
    vocab_size = config.model.vocab_size
    if config.data.prefix != usual or (corpus, vocab_size) == ("stdlib", VOCAB_SIZE):
        return overrides
    folder, last = Path(usual).parent, Path(usual).name
    return [*overrides, f"data.prefix={folder}-{vocab_size}/{last}"]


def _say(text: str) -> None:
    print(f"\n{text}", flush=True)


def _indented(text: str) -> None:
    print(f"     {text}", flush=True)


def evaluate(config: RunConfig, heldout: Path) -> dict[str, Any]:
    """Held-out loss beside its baselines, pictures and `summary.json` in the run's folder; gives the summary."""
    from data.baselines import bits_per_byte, unigram_bits_per_byte, unigram_nats_per_token, xz_bits_per_byte
    from data.prepare import texts
    from data.tokenizer_file import load_tokenizer
    from data.tokens import Manifest, TokenFile
    from launcher.checkpoint.state import TOKENIZER, find
    from launcher.commands.generate import sample
    from launcher.commands.report import report
    from launcher.inference import heldout_nats, load_model
    from launcher.record.events import read
    from launcher.show.pictures import loss_curve
    from launcher.show.schedule_picture import draw
    from parallel.pipeline.simulate import Costs

    run_dir = Path(config.run_dir)
    checkpoint = find(run_dir)
    model = load_model(checkpoint)
    manifest, tokens = Manifest.read(heldout), TokenFile(heldout)
    nats, predicted = heldout_nats(model, str(heldout), config.data.sequence_length, 16)
    events = read(run_dir / "events.jsonl")
    recent = sorted(event.tokens_per_second for event in events)
    unigram = unigram_nats_per_token(tokens)
    text = sample(model, load_tokenizer(checkpoint / TOKENIZER), PROMPT, max_new_tokens=100, temperature=0.7, seed=0)
    loss_curve(
        events, run_dir / "loss.png", unigram_nats=unigram, heldout_nats=nats, title=f"{config.name}: loss on real text"
    )
    draw(
        config.parallel.schedule,
        run_dir / "schedule.png",
        num_ranks=config.parallel.pipeline,
        num_microbatches=config.num_microbatches,
        costs=Costs(),
    )
    summary = {
        "steps": events[-1].step,
        "tokens": events[-1].tokens,
        "loss_first": events[0].loss,
        "loss_last": events[-1].loss,
        "mtp_loss_last": events[-1].mtp_loss,
        "heldout_nats_per_token": nats,
        "heldout_bits_per_byte": bits_per_byte(nats, num_tokens=predicted, text_bytes=manifest.text_bytes),
        "unigram_bits_per_byte": unigram_bits_per_byte(tokens, manifest),
        "xz_bits_per_byte": xz_bits_per_byte(texts(heldout)),
        "expert_load_max_over_mean": events[-1].expert_load_max_over_mean,
        "world_size": config.parallel.world_size,
        "schedule": config.parallel.schedule,
        "layout": asdict(config.parallel),
        "precision": config.train.precision,
        "tokens_per_second": recent[len(recent) // 2],
        "training_seconds": sum(event.step_seconds for event in events),
        "checkpoint": str(checkpoint),
        "sample": PROMPT + text,
    }
    (run_dir / "summary.json").write_text(json.dumps(summary, indent=1) + "\n")
    (run_dir / "report.html").write_text(report(run_dir), encoding="utf-8")
    return summary


def _report(config: RunConfig, summary: dict[str, Any]) -> None:
    """The end of the demo in at most 80 columns."""
    rows = [
        ("this model", summary["heldout_bits_per_byte"]),
        ("xz -9 of the same text", summary["xz_bits_per_byte"]),
        ("unigram entropy of its tokens", summary["unigram_bits_per_byte"]),
    ]
    widest = max(value for _, value in rows)
    print("     bits per byte of text the model has not seen (less is better)\n")
    for label, value in rows:
        print(f"     {label:<31}{value:6.3f}  {'#' * round(34 * value / widest)}")
    print("\n     a sample, after the prompt `def main():`\n")
    for line in summary["sample"].splitlines()[:14]:
        print(f"     | {line[:71]}")
    speed, seconds = summary["tokens_per_second"], summary["training_seconds"]
    print(f"\n     {summary['tokens']:,} tokens in {seconds:.0f} s of steps, {speed:,.0f} tokens/s (median)")
    for name, what in (
        ("report.html", "all of it on one page, for a browser"),
        ("loss.png", "loss curve, learning rate, gradient norm, expert load"),
        ("schedule.png", "the schedule that ran, from its action lists"),
        ("summary.json", "these figures"),
        ("checkpoints/", "call again to resume; expertpipe generate --checkpoint"),
    ):
        print(f"     {config.run_dir + '/' + name:<28}{what}")
