r"""Tokens that join punctuation with line breaks, split at random (DeepSeek-V3 report section 4.1).

Such a token (".\n\n") is what a text gets in its middle; a prompt that ends in "." gets another one, so a model that
has only seen the joined form is biased at the end of a prompt without a final line break. A share of the joined tokens
is therefore stored as two parts. The report gives no share: it is an option here, 0 unless asked for.
"""

import unicodedata
from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from data.draws import Purpose, draws, threshold

if TYPE_CHECKING:
    from tokenizers import Tokenizer


def is_joined(text: str) -> bool:
    """Whether a token's text is punctuation or symbols, blanks around them or not, and then line breaks.

    A token that is part of a character decodes to U+FFFD, itself a symbol to Unicode, and does not count.
    """
    head = text.rstrip("\r\n")
    core = head.strip()
    ordinary = core and len(head) < len(text) and "\ufffd" not in core
    return bool(ordinary) and all(unicodedata.category(character)[0] in "PS" for character in core)


@dataclass(frozen=True)
class Splits:
    """For each joined token its parts, as ids: parts[first[t] : first[t] + length[t]] for token t.

    length [vocab_size] is 0 for tokens that are not split.
    """

    length: np.ndarray
    first: np.ndarray
    parts: np.ndarray

    @property
    def num_joined(self) -> int:
        """How many tokens can be split."""
        return int(np.count_nonzero(self.length))

    def apply(self, ids: np.ndarray, name: int, *, rate: float, seed: int) -> np.ndarray:
        """The document `name`, ids [length], with a share `rate` of its joined tokens in parts: ids [length or more].

        The k-th joined token of a document depends on (seed, name, k) alone. What it decodes to does not change.
        """
        at = np.flatnonzero(self.length[ids])
        at = at[draws(seed, Purpose.SPLIT, name, len(at)) < np.uint64(min(threshold(rate), 2**64 - 1))]
        if not at.size:
            return ids
        repeats = np.ones(len(ids), dtype=np.int64)
        repeats[at] = self.length[ids[at]]
        out = np.repeat(ids, repeats)
        begins = np.cumsum(repeats) - repeats
        for position in at:
            token = ids[position]
            count, first = int(self.length[token]), int(self.first[token])
            out[begins[position] : begins[position] + count] = self.parts[first : first + count]
        return out


def joined_tokens(tokenizer: "Tokenizer") -> Mapping[int, tuple[str, str]]:
    """Every ordinary token of the vocabulary that joins the two, as id: (punctuation, line breaks)."""
    added = set(tokenizer.get_added_tokens_decoder())
    found = {}
    for token in sorted(set(tokenizer.get_vocab(with_added_tokens=False).values()) - added):
        text = tokenizer.decode([token], skip_special_tokens=False)
        if is_joined(text):
            head = text.rstrip("\r\n")
            found[token] = (head, text[len(head) :])
    return found


def find_splits(tokenizer: "Tokenizer") -> Splits:
    """The table for one tokenizer; a token whose parts would not decode to its own text is left whole."""
    size = max(tokenizer.get_vocab().values(), default=-1) + 1
    length, first, parts = np.zeros(size, dtype=np.int32), np.zeros(size, dtype=np.int32), []
    for token, halves in joined_tokens(tokenizer).items():
        ids = [part for half in halves for part in tokenizer.encode(half, add_special_tokens=False).ids]
        if len(ids) >= 2 and tokenizer.decode(ids, skip_special_tokens=False) == "".join(halves):
            length[token], first[token] = len(ids), len(parts)
            parts += ids
    return Splits(length, first, np.array(parts, dtype=np.int64))


def special_id(tokenizer: "Tokenizer", names: tuple[str, ...]) -> int | None:
    """Id of the first of `names` that is an added token of the tokenizer; None if it has none of them."""
    added = {token.content: number for number, token in tokenizer.get_added_tokens_decoder().items()}
    return next((added[name] for name in names if name in added), None)


def vocabulary_size(tokenizer: "Tokenizer") -> int:
    """One more than the largest id; not the number of tokens, as ids may have gaps."""
    return max(tokenizer.get_vocab().values(), default=-1) + 1
