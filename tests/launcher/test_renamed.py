"""Old names of keys: stored configurations are read under the new ones, overrides are told them."""

import json
from pathlib import Path
from typing import Any

import pytest

from launcher.__main__ import main
from launcher.checkpoint.files import CheckpointError, signed
from launcher.checkpoint.reader import Reader
from launcher.config import ConfigError, compose, from_dict, known_keys, to_dict
from launcher.renamed import RENAMED
from model.transformer import Transformer
from tests.launcher.checkpoint.states import VOCAB, write_checkpoint


def stored(*overrides: str, **data: Any) -> dict[str, Any]:
    """A configuration as an earlier version wrote it: `data` in place of today's document_mask."""
    tree = to_dict(compose(list(overrides)))
    del tree["data"]["document_mask"]
    tree["data"] |= data
    return tree


@pytest.mark.parametrize(("packing", "mask"), [("unmasked", False), ("masked", True)])
def test_an_old_name_is_read_as_the_new_one(packing: str, mask: bool) -> None:
    tree = stored(packing=packing)
    before = json.dumps(tree)
    assert from_dict(tree) == compose([f"data.document_mask={str(mask).lower()}"])
    assert json.dumps(tree) == before  # the caller's is left as it was


@pytest.mark.parametrize(
    ("data", "said"),
    [
        ({"packing": "tight"}, "data.packing=tight: expected unmasked or masked"),
        ({"packing": "masked", "document_mask": False}, "data.packing: given beside data.document_mask"),
        ({"packed": "masked"}, "data.packed: no such key"),
    ],
)
def test_what_cannot_be_read_is_one_line(data: dict[str, Any], said: str) -> None:
    with pytest.raises(ConfigError) as caught:
        from_dict(stored(**data))
    (line,) = caught.value.errors
    assert line.startswith(said)


def test_an_override_is_told_the_new_name(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["recipe", "experiment=tiny", "data.packing=masked"]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert "data.packing: it is called data.document_mask now (false for unmasked, true for masked)" in line


def test_the_table_is_of_keys_that_were_and_keys_that_are() -> None:
    for entry in RENAMED:
        assert entry.new in known_keys() and entry.old not in known_keys()
        assert entry.new.rpartition(".")[0] == entry.old.rpartition(".")[0]


def with_config(checkpoint: Path, config: dict[str, Any]) -> None:
    """The manifest as if a version with these keys had written it, its digest in order."""
    manifest = json.loads((checkpoint / "manifest.json").read_text())
    (checkpoint / "manifest.json").write_text(json.dumps(signed(manifest | {"config": config})))


def test_a_checkpoint_of_an_earlier_version_is_read(tmp_path: Path) -> None:
    checkpoint = write_checkpoint(Transformer(VOCAB), tmp_path / "run")
    today = Reader(checkpoint).config
    tree = to_dict(today)
    tree["data"] = {"packing": "unmasked", **{k: v for k, v in tree["data"].items() if k != "document_mask"}}
    with_config(checkpoint, tree)
    assert Reader(checkpoint).config == today
    tree["data"]["packing"] = "tight"
    tree["model"] = {**tree["model"], "hidden_sizes": 1}
    with_config(checkpoint, tree)
    with pytest.raises(CheckpointError) as caught:
        Reader(checkpoint)
    said = str(caught.value)
    assert "its configuration is not of this version: data.packing=tight" in said and "\n" not in said
    assert "model.hidden_sizes: no such key; did you mean model.hidden_size?" in said
