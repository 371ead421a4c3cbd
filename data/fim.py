"""Fill in the middle at document level, and its undoing where a lower rate is asked for.

Preparation turns a document's text into prefix, middle and suffix at two characters of its own and stores

    <fim_begin> prefix <fim_hole> suffix <fim_end> middle <end of sentence>

(prefix, suffix, middle: PSM; DeepSeek-V3 report section 4.1, rate 0.1, before packing). The parts are tokenised one by
one, so a cut may fall inside what would otherwise be a token, as it does where an editor's cursor stands. A document is
turned if its draw is below the rate, so the documents turned at 0.05 are half of those turned at 0.1.

That makes the rate a schedule at no cost: data is prepared at the highest rate of a run, and a reader that wants less
puts the documents between the two rates back in order, `plain`. Three end-of-sentence tokens take the place of the
markers there, so that every other token keeps its offset and sample(i) needs no index.
"""

from dataclasses import dataclass

import numpy as np

from data.draws import Purpose, draw, threshold

NUM_MARKERS = 3


@dataclass(frozen=True)
class FimTokens:
    """Ids of the three markers and of the end of sentence in one tokenizer."""

    begin: int
    hole: int
    end: int
    end_of_sentence: int


def is_turned(name: int, *, rate: float, seed: int) -> bool:
    """Whether document `name` is turned at a rate; whoever is turned at a lower one is turned at this one too."""
    return draw(seed, Purpose.FIM, name) < threshold(rate)


def cuts(length: int, name: int, *, seed: int) -> tuple[int, int]:
    """Where the middle of a text of `length` characters begins and ends: uniform over all pairs of positions."""
    first, second = (draw(seed, Purpose.FIM_CUTS, name, number) * (length + 1) >> 64 for number in (0, 1))
    return min(first, second), max(first, second)


def turned(prefix: list[int], middle: list[int], suffix: list[int], tokens: FimTokens) -> list[int]:
    """One stored document from the ids of its three parts."""
    return [tokens.begin, *prefix, tokens.hole, *suffix, tokens.end, *middle, tokens.end_of_sentence]


@dataclass(frozen=True)
class Parts:
    """Ids of the parts of a turned document: views [length] of what was stored."""

    prefix: np.ndarray
    middle: np.ndarray
    suffix: np.ndarray


def parts(document: np.ndarray, tokens: FimTokens) -> Parts | None:
    """The parts of a stored document, ids [length]; None if it is not a turned one.

    Text cannot hold a marker: preparation encodes a text that quotes one as ordinary tokens.
    """
    if len(document) <= NUM_MARKERS or document[0] != tokens.begin or document[-1] != tokens.end_of_sentence:
        return None
    holes, ends = (np.flatnonzero(document == marker) for marker in (tokens.hole, tokens.end))
    if len(holes) != 1 or len(ends) != 1 or ends[0] < holes[0]:
        return None
    hole, end = int(holes[0]), int(ends[0])
    return Parts(document[1:hole], document[end + 1 : -1], document[hole + 1 : end])


def plain(document: np.ndarray, tokens: FimTokens) -> np.ndarray:
    """A turned document in reading order, the markers' places filled with ends of sentence; others as they are."""
    found = parts(document, tokens)
    if found is None:
        return document
    filler = np.full(NUM_MARKERS + 1, tokens.end_of_sentence, dtype=document.dtype)
    return np.concatenate([found.prefix, found.middle, found.suffix, filler])
