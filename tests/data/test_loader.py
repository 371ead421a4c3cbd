import numpy as np
import pytest

from data.config import DataConfig
from data.loader import Loader
from data.sampler import SamplerError
from data.tokens import TokenFileError, TokenWriter


@pytest.fixture(params=["uint16", "int32"])
def prefix(request, tmp_path):
    with TokenWriter(tmp_path / "a", request.param) as writer:
        for begin in range(0, 5000, 500):
            writer.add(np.arange(begin, begin + 500))  # token t lies at offset t
    return str(tmp_path / "a")


def test_windows_are_slices_of_the_stream(prefix):
    loader = Loader(DataConfig(prefix, sequence_length=33, seed=5))
    ids = np.arange(2 * loader.sampler.windows_per_epoch)
    windows = loader.windows(ids)
    assert windows.dtype == np.int64 and windows.shape == (len(ids), 34)
    assert np.array_equal(windows, loader.sampler.starts(ids)[:, None] + np.arange(34))


def test_an_epoch_shows_every_token_once_as_target(prefix):
    loader = Loader(DataConfig(prefix, sequence_length=33))
    targets = loader.windows(np.arange(loader.sampler.windows_per_epoch))[:, 1:]
    assert len(np.unique(targets)) == targets.size >= 5000 - 2 * 33


def step(loader: Loader, *, consumed: int, data_size: int, micro_batch_size: int, per_step: int = 16) -> np.ndarray:
    return np.concatenate(
        [
            loader.microbatch(
                consumed=consumed,
                microbatch=microbatch,
                data_rank=rank,
                data_size=data_size,
                micro_batch_size=micro_batch_size,
            )
            for microbatch in range(per_step // (data_size * micro_batch_size))
            for rank in range(data_size)
        ]
    )


def test_same_tokens_on_any_number_of_ranks_restarted_anywhere(prefix):
    config = DataConfig(prefix, sequence_length=16, seed=1)
    straight = [
        step(Loader(config), consumed=consumed, data_size=1, micro_batch_size=1) for consumed in range(0, 640, 16)
    ]
    for number, data_size, micro_batch_size in ((0, 2, 1), (7, 4, 2), (19, 8, 2), (20, 1, 4), (39, 8, 1)):
        fresh = Loader(config)  # nothing but the count of consumed samples survives a restart
        again = step(fresh, consumed=16 * number, data_size=data_size, micro_batch_size=micro_batch_size)
        assert np.array_equal(again, straight[number])


def test_errors_are_named(prefix, tmp_path):
    with pytest.raises(SamplerError, match="fewer than one window"):
        Loader(DataConfig(prefix, sequence_length=5000))
    with pytest.raises(TokenFileError, match=r"b\.idx"):
        Loader(DataConfig(str(tmp_path / "b")))
