"""A tokenizer of one's own for text that is on this machine: byte-level BPE with DeepSeek's names of special tokens."""

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING

from data.draws import keyed_hash

if TYPE_CHECKING:
    from tokenizers import Tokenizer

# DeepSeek-V3's names, in which the bar and the gap are no ASCII; the position in this list is the id
_BAR, _GAP = "\uff5c", "\u2581"
SPECIAL_TOKENS = tuple(
    f"<{_BAR}{name.replace(' ', _GAP)}{_BAR}>"
    for name in ("begin of sentence", "end of sentence", " pad ", "fim begin", "fim hole", "fim end")
)
END_OF_SENTENCE = 1
MIN_VOCAB_SIZE = len(SPECIAL_TOKENS) + 256  # every byte must have a token, or a text may not survive the round trip
TOKENIZER_SAMPLE_BYTES = 4_000_000
_SAMPLE_KEY = b"expertpipe tokenizer sample 1"


def _silent(message: str) -> None:
    del message


def train_tokenizer(
    training_texts: Sequence[str], *, vocab_size: int, progress: Callable[[str], None] = _silent
) -> "Tokenizer":
    """Byte-level BPE without normaliser, so that decoding gives back every text exactly; SPECIAL_TOKENS come first.

    Trained on at most TOKENIZER_SAMPLE_BYTES, taken in an order that depends on the texts' content alone: more text
    changes the merges little and costs time in proportion.
    """
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

    sample, total = [], 0
    for text in sorted(training_texts, key=_sample_order):
        size = len(text.encode("utf-8"))
        if not sample or total + size <= TOKENIZER_SAMPLE_BYTES:
            sample.append(text)
            total += size
    progress(f"training a tokenizer of {vocab_size} tokens on {len(sample)} documents, {total / 1e6:.2f} MB")
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)  # pyright: ignore[reportAttributeAccessIssue]
    tokenizer.decoder = decoders.ByteLevel()  # pyright: ignore[reportAttributeAccessIssue]
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=list(SPECIAL_TOKENS),
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(sample, trainer)
    assert [tokenizer.token_to_id(token) for token in SPECIAL_TOKENS] == list(range(len(SPECIAL_TOKENS)))
    tokenizer.encode_special_tokens = True
    return tokenizer


def _sample_order(text: str) -> int:
    return keyed_hash(text.encode("utf-8"), _SAMPLE_KEY)
