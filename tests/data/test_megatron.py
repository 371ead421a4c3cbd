"""The token files against megatron-core's own builder and reader, in an environment of its own.

That environment is a layer over the one that runs the tests (its torch is this one's), made in a temporary folder.
"""

import json
import random
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from data.adopt import adopt
from data.config import DataConfig
from data.index import TokenFile
from data.loader import Loader
from data.tokenizer_training import train_tokenizer
from data.tokens import TokenWriter

ROOT = Path(__file__).parents[2]
VERSION = "0.16.1"  # the newest for Python 3.11
PROGRAM = """
import json, sys, warnings
warnings.simplefilter("ignore")
import numpy, torch
from megatron.core.datasets.indexed_dataset import IndexedDataset, IndexedDatasetBuilder

task = json.load(open("task.json"))
for name, dtype, documents in task["write"]:
    builder = IndexedDatasetBuilder(f"{name}.bin", dtype=getattr(numpy, dtype))
    for sequences in documents:
        flat = [token for sequence in sequences for token in sequence]
        builder.add_document(torch.tensor(flat), [len(sequence) for sequence in sequences])
    builder.finalize(f"{name}.idx")
found = {}
for name in task["read"]:
    dataset = IndexedDataset(name)
    found[name] = {
        "sequences": [dataset[i].tolist() for i in range(len(dataset))],
        "documents": dataset.document_indices.tolist(),
        "dtype": numpy.dtype(dataset.index.dtype).name,
        "part": dataset.get(1, offset=1, length=2).tolist(),
    }
json.dump(found, open("found.json", "w"))
"""


@pytest.fixture(scope="module")
def megatron(tmp_path_factory) -> Path:
    """The interpreter of the layered environment."""
    root = tmp_path_factory.mktemp("megatron") / "venv"
    subprocess.run([sys.executable, "-m", "venv", str(root)], check=True)
    (library,) = root.glob("lib/python*/site-packages")
    (library / "below.pth").write_text("\n".join(part for part in sys.path if part.endswith("site-packages")) + "\n")
    python = root / "bin" / "python"
    install = [str(python), "-m", "pip", "install", "--quiet", "-c", str(ROOT / "constraints.txt")]
    done = subprocess.run([*install, f"megatron-core=={VERSION}"], capture_output=True, text=True)
    if done.returncode:
        pytest.skip(f"megatron-core {VERSION} cannot be installed here: {done.stderr.strip().splitlines()[-1]}")
    return python


def documents(seed: int, largest: int) -> list[list[list[int]]]:
    """Documents of one to three sequences of two or more tokens."""
    draw = random.Random(seed)

    def sequence() -> list[int]:
        return [draw.randint(0, largest) for _ in range(draw.randint(3, 30))]

    return [[sequence() for _ in range(draw.randint(1, 3))] for _ in range(50)]


def joined(document: list[list[int]]) -> list[int]:
    return [token for sequence in document for token in sequence]


@pytest.mark.slow
def test_what_megatron_wrote_is_adopted_and_read(megatron, tmp_path):
    """Its builder's files, some documents of several sequences, through the loader."""
    texts = [f"{number}: the router picks an expert" for number in range(50)]
    (tmp_path / "t.json").write_text(train_tokenizer(texts, vocab_size=280).to_str())
    kinds = {"uint16": documents(3, 279), "int32": documents(4, 279)}
    task = {"write": [(dtype, dtype, parts) for dtype, parts in kinds.items()], "read": []}
    (tmp_path / "task.json").write_text(json.dumps(task))
    subprocess.run([str(megatron), "-c", PROGRAM], cwd=tmp_path, check=True, capture_output=True)
    for dtype, parts in kinds.items():
        prefix = tmp_path / dtype
        manifest = adopt(prefix, tmp_path / "t.json").manifest
        assert (manifest.dtype, manifest.num_documents) == (dtype, len(parts))
        loader = Loader(DataConfig(str(prefix), sequence_length=16, document_mask=True))
        ids = np.arange(12)
        flat = np.array([token for document in parts for token in joined(document)])
        numbers = np.repeat(np.arange(len(parts)), [len(joined(document)) for document in parts])
        places = loader.locate(ids).start
        assert np.array_equal(loader.windows(ids), [flat[at : at + 17] for at in places])
        assert np.array_equal(loader.documents(ids), [numbers[at : at + 17] - numbers[at] for at in places])


@pytest.mark.slow
def test_either_reads_and_writes_what_the_other_does(megatron, tmp_path):
    kinds = {"uint16": 65535, "int32": 2**31 - 1}
    whole = {dtype: [[joined(document)] for document in documents(1, top)] for dtype, top in kinds.items()}
    split = {dtype: documents(2, top) for dtype, top in kinds.items()}
    for dtype, parts in whole.items():
        with TokenWriter(tmp_path / f"ours-{dtype}", dtype) as writer:
            for (sequence,) in parts:
                writer.add(np.array(sequence))
    task = {
        "write": [
            *((f"whole-{dtype}", dtype, parts) for dtype, parts in whole.items()),
            *((f"split-{dtype}", dtype, parts) for dtype, parts in split.items()),
        ],
        "read": [f"ours-{dtype}" for dtype in kinds],
    }
    (tmp_path / "task.json").write_text(json.dumps(task))
    subprocess.run([str(megatron), "-c", PROGRAM], cwd=tmp_path, check=True, capture_output=True)
    found = json.loads((tmp_path / "found.json").read_text())
    for dtype in kinds:
        flat = [sequence for (sequence,) in whole[dtype]]
        theirs = found[f"ours-{dtype}"]
        assert theirs["sequences"] == flat and theirs["documents"] == list(range(len(flat) + 1))
        assert theirs["dtype"] == dtype and theirs["part"] == flat[1][1:3]
        for ending in ("bin", "idx"):  # bit for bit
            ours = (tmp_path / f"ours-{dtype}.{ending}").read_bytes()
            assert ours == (tmp_path / f"whole-{dtype}.{ending}").read_bytes()
        read = TokenFile(tmp_path / f"split-{dtype}", scan=True)
        assert read.dtype == dtype and read.num_sequences > read.num_documents == len(split[dtype])
        assert [document.tolist() for document in read.documents()] == [joined(parts) for parts in split[dtype]]
