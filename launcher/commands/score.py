"""`expertpipe score`: the loss of given token sequences under a checkpoint, and its logits if wanted.

With --json one object on one line, whose keys are

    losses            nats a predicted token of each sequence (of an .npy file)
    mean              their mean; of a prepared set the mean over all of its predicted tokens
    bits_per_byte     the same loss in bits for each UTF-8 byte of the text that the predicted tokens stand for, by the
                      tokenizer in the checkpoint; special tokens stand for no text; null where note says why
    text_bytes, note  those bytes; why there are none, else null
    num_tokens        predicted tokens
    num_sequences, sequence_length, checkpoint, ema
"""

import json
import os
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from data.baselines import bits_per_byte
from data.stream import TokenStream
from data.token_bytes import token_bytes
from data.tokenizer_file import TokenizerError
from data.tokens import CHUNK, sha256_file, sibling
from launcher.checkpoint.state import TOKENIZER, Reader, find
from launcher.inference import default_device, heldout_nats, load_model, normed_states, token_losses
from model.config import ModelConfig
from model.transformer import Transformer

TOKENS_AT_ONCE = 4096  # of all sequences of one forward pass together


class ScoreError(ValueError):
    """The token ids cannot be scored; the message names the file, the place and what would work."""

    user_error = True


def score(
    *, checkpoint: Path, tokens: Path, logits: Path | None = None, as_json: bool = False, ema: bool = False
) -> int:
    """Print the mean loss of each sequence in nats per predicted token (S - 1 of them); the exit code.

    tokens: .npy of integer ids [num_sequences, S], or the PREFIX of a prepared set, all of which is scored in windows
    of the run's sequence length. logits: file to write the logits to, .npy FP32 [num_sequences, S, vocab]. as_json: one
    JSON object on one line, see above. The arithmetic is in the precision of the checkpoint's run. Raises ScoreError
    for ids that do not fit and CheckpointError for a bad checkpoint.
    """
    found = find(checkpoint)
    if any(sibling(tokens, ending).exists() for ending in (".json", ".idx")):  # shards have an .idx each
        return _score_set(found, tokens, logits=logits, as_json=as_json, ema=ema)
    ids_NS = read_ids(tokens)
    check_ids(ids_NS, Reader(found, verify=False).config.model, tokens)
    model = load_model(found, device=default_device(), ema=ema)
    losses_N = score_ids(model, ids_NS, logits)
    num_sequences, sequence_length = ids_NS.shape
    mean, num_tokens = float(losses_N.mean()), num_sequences * (sequence_length - 1)
    rows = max(1, CHUNK // sequence_length)
    text = _text_of(found, (ids_NS[first : first + rows, 1:] for first in range(0, num_sequences, rows)))
    if as_json:
        result = {"losses": losses_N.tolist(), "mean": mean} | text.fields(mean, num_tokens)
        result |= {"num_sequences": num_sequences, "sequence_length": sequence_length}
        print(json.dumps(result | {"checkpoint": str(found), "ema": ema}))
        return 0
    print(f"{found}: {num_sequences} sequences of {sequence_length} tokens\n")
    print("sequence  nats/token")
    for number, loss in enumerate(losses_N):
        print(f"{number:8d}  {loss:10.6f}")
    print(f"    mean  {mean:10.6f}   {text.line(mean, num_tokens)}")
    return 0


@dataclass(frozen=True)
class _Text:
    """UTF-8 bytes that the predicted tokens stand for; note: why that is not known."""

    text_bytes: int | None
    note: str | None = None

    def fields(self, nats: float, num_tokens: int) -> dict[str, Any]:
        """Of the JSON object."""
        size = self.text_bytes
        per_byte = None if size is None else bits_per_byte(nats, num_tokens=num_tokens, text_bytes=size)
        return {"bits_per_byte": per_byte, "text_bytes": size, "note": self.note, "num_tokens": num_tokens}

    def line(self, nats: float, num_tokens: int) -> str:
        """For people."""
        per_byte = self.fields(nats, num_tokens)["bits_per_byte"]
        return f"bits a byte: not known, {self.note}" if per_byte is None else f"{per_byte:.4f} bits a byte"


def _text_of(checkpoint: Path, parts: Iterable[np.ndarray]) -> _Text:
    """Of the predicted ids, given part by part."""
    path = checkpoint / TOKENIZER
    if not path.exists():
        return _Text(None, f"no {TOKENIZER} in the checkpoint")
    try:
        sizes = token_bytes(path)
    except TokenizerError as error:
        return _Text(None, str(error))
    total = 0
    for ids in parts:
        if ids.max() >= len(sizes):
            return _Text(None, f"id {ids.max()} is none of the {len(sizes)} of the checkpoint's tokenizer")
        total += int(sizes[ids].sum())
    return _Text(total) if total else _Text(None, "the predicted tokens stand for no text")


def _score_set(found: Path, prefix: Path, *, logits: Path | None, as_json: bool, ema: bool) -> int:
    """`score` of a prepared set: every token but the first is predicted once."""
    if logits is not None:
        raise ScoreError(f"--logits={logits}: logits of a whole prepared set are not written: give an .npy file")
    config = Reader(found, verify=False).config
    tokenizer, stream = found / TOKENIZER, TokenStream(prefix)
    known = stream.manifest if tokenizer.exists() else None
    if known and known.tokenizer_sha256 != sha256_file(tokenizer):
        raise ScoreError(f"{prefix}.json: another tokenizer than {tokenizer}: score text prepared with the run's own")
    length = config.data.sequence_length
    model = load_model(found, device=default_device(), ema=ema)
    nats, predicted = heldout_nats(model, prefix, length, max(1, TOKENS_AT_ONCE // length))
    text = _text_of(found, _all_but_the_first(stream))
    if as_json:
        result = {"mean": nats} | text.fields(nats, predicted) | {"sequence_length": length}
        print(json.dumps(result | {"num_sequences": -(-predicted // length), "checkpoint": str(found), "ema": ema}))
        return 0
    print(f"{found}: {predicted} tokens of {prefix}, windows of {length}\n")
    print(f"{nats:.6f} nats a token   {text.line(nats, predicted)}")
    return 0


def _all_but_the_first(stream: TokenStream) -> Iterator[np.ndarray]:
    """Its tokens, int64, in parts that do not grow with it."""
    for begin in range(1, stream.num_tokens, CHUNK):
        part = np.empty(min(CHUNK, stream.num_tokens - begin), dtype=np.int64)
        stream.copy(begin, part)
        yield part


def read_ids(path: Path) -> np.ndarray:
    """Integer array [num_sequences, S] of an .npy file; ScoreError for anything else. Nothing in it is executed."""
    try:
        ids = np.load(path, allow_pickle=False)
    except FileNotFoundError:
        raise
    except (OSError, EOFError, ValueError) as error:
        raise ScoreError(f"{path}: not an .npy file of integers ({error})") from None
    wanted = "score needs integer ids [num_sequences, S]"
    if not isinstance(ids, np.ndarray):
        raise ScoreError(f"{path}: holds several arrays (.npz); {wanted} in an .npy file")
    if ids.dtype.kind not in "iu":
        raise ScoreError(f"{path}: holds {ids.dtype}; {wanted}")
    if ids.ndim != 2:
        raise ScoreError(f"{path}: shape {list(ids.shape)}; {wanted}")
    return ids


def check_ids(ids_NS: np.ndarray, config: ModelConfig, path: Path) -> None:
    """Raise ScoreError unless the model can read the ids and there is something to predict."""
    num_sequences, length = ids_NS.shape
    limit = config.max_position_embeddings
    if num_sequences < 1 or length < 2:
        raise ScoreError(f"{path}: shape {list(ids_NS.shape)}; at least 1 sequence of at least 2 tokens can be scored")
    if length > limit:
        raise ScoreError(f"{path}: sequences of {length} tokens; the model's max_position_embeddings is {limit}")
    bad = np.argwhere((ids_NS < 0) | (ids_NS >= config.vocab_size))
    if len(bad):
        row, column = bad[0].tolist()
        raise ScoreError(
            f"{path}: id {ids_NS[row, column]} at sequence {row}, position {column}: ids must be at least 0 and below "
            f"the model's vocab_size {config.vocab_size} ({len(bad)} such ids)"
        )


def score_ids(model: Transformer, ids_NS: np.ndarray, logits: Path | None = None) -> np.ndarray:
    """Mean loss of each sequence, float64 [N], in nats per predicted token; see `score` for `logits`."""
    num_sequences, length = ids_NS.shape
    step = max(1, TOKENS_AT_ONCE // length)
    losses_N = np.empty(num_sequences)
    shape = (num_sequences, length, model.config.vocab_size)
    temporary = logits.with_name(f".{logits.name}.tmp") if logits else None
    # written through a memory map: the logits of all sequences may be larger than memory
    out = np.lib.format.open_memmap(temporary, mode="w+", dtype=np.float32, shape=shape) if temporary else None
    for first in range(0, num_sequences, step):
        part = slice(first, first + step)
        tokens_BS = torch.from_numpy(ids_NS[part].astype(np.int64))
        normed_BSD = normed_states(model, tokens_BS)
        losses_BS = token_losses(model, normed_BSD[:, :-1], tokens_BS[:, 1:])
        losses_N[part] = losses_BS.double().mean(1).cpu().numpy()
        if out is not None:
            assert model.lm_head is not None
            with torch.no_grad():
                out[part] = model.lm_head(normed_BSD).float().cpu().numpy()
    if out is not None and temporary is not None and logits is not None:
        out.flush()
        os.replace(temporary, logits)
    return losses_N
