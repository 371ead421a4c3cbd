"""What a model must beat: two numbers that need no training, on the same held-out text as the model's own loss.

Both are in bits per UTF-8 byte, the unit that does not depend on the tokenizer. They are yardsticks, not rivals of the
same kind: the unigram knows the held-out frequencies in advance (no context-free predictor can do better), and xz knows
nothing but the held-out text it has seen so far, while a model has seen the training set.
"""

import lzma
import math
from collections.abc import Iterable

import numpy as np

from data.tokens import Manifest, TokenFile

_CHUNK = 1 << 24


def bits_per_byte(nats_per_token: float, *, num_tokens: int, text_bytes: int) -> float:
    """A mean loss in nats per token as bits per UTF-8 byte of the text that the tokens stand for."""
    assert num_tokens >= 1 and text_bytes >= 1
    return nats_per_token * num_tokens / (math.log(2) * text_bytes)


def unigram_nats_per_token(token_file: TokenFile) -> float:
    """Entropy of the tokens under their own frequencies, end-of-sentence ids included; 0 for an empty file."""
    counts = np.zeros(0, dtype=np.int64)
    for begin in range(0, token_file.num_tokens, _CHUNK):
        # counted in chunks: bincount widens its input to int64
        more = np.bincount(token_file.tokens[begin : begin + _CHUNK])
        short, long = sorted((counts, more), key=len)
        counts = long.astype(np.int64)
        counts[: len(short)] += short
    counts = counts[counts > 0]
    if not counts.size:
        return 0.0
    # log N - sum(c log c) / N: exact counts until the last step
    return float(math.log(token_file.num_tokens) - (counts * np.log(counts)).sum() / token_file.num_tokens)


def unigram_bits_per_byte(token_file: TokenFile, manifest: Manifest) -> float:
    """The unigram entropy spread over the bytes of the text; compare with a model's loss through `bits_per_byte`."""
    nats = unigram_nats_per_token(token_file)
    return bits_per_byte(nats, num_tokens=token_file.num_tokens, text_bytes=manifest.text_bytes)


def xz_bits_per_byte(texts: Iterable[str]) -> float:
    """Size of the texts, joined, compressed as by `xz -9`, in bits per byte; `data.prepare.texts(prefix)` gives them.

    Raises ValueError if there is no text.
    """
    compressor = lzma.LZMACompressor(preset=9)
    text_bytes = compressed_bytes = 0
    for text in texts:
        raw = text.encode("utf-8")
        text_bytes += len(raw)
        compressed_bytes += len(compressor.compress(raw))
    compressed_bytes += len(compressor.flush())
    if not text_bytes:
        raise ValueError("xz baseline: there is no text; check the held-out set")
    return 8 * compressed_bytes / text_bytes
