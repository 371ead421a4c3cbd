"""How many bytes of text each token stands for: what turns a loss a token into bits a byte."""

import json
from pathlib import Path

import numpy as np

from data.tokenizer_file import TokenizerError


def token_bytes(path: str | Path) -> np.ndarray:
    """UTF-8 bytes of every id of a byte-level tokenizers file: int64 [vocabulary]; 0 for added tokens, no text's.

    Their sum over a prepared set is its manifest's text_bytes. Raises TokenizerError for another kind of tokenizer,
    whose tokens stand for no fixed number of bytes.
    """
    try:
        described = json.loads(Path(path).read_text(encoding="utf-8"))
        vocabulary, added = described["model"]["vocab"], described.get("added_tokens") or []
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise TokenizerError(f"{path}: no tokenizers file ({error}); give a tokenizer.json") from error
    normalizer = described.get("normalizer")
    changes_text = bool(normalizer) and normalizer != {"type": "Sequence", "normalizers": []}
    if changes_text or "ByteLevel" not in json.dumps(described.get("decoder")):
        raise TokenizerError(f"{path}: not a byte-level tokenizer: its tokens stand for no fixed number of bytes")
    special = {token["id"]: 0 for token in added}
    sizes = {number: len(token) for token, number in dict(vocabulary).items()} | special
    found = np.zeros(max(sizes) + 1, dtype=np.int64)
    found[list(sizes)] = list(sizes.values())
    return found
