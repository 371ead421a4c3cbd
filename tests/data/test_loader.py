import numpy as np
import pytest

from data.config import DataConfig, DataPhase, SourceConfig
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


@pytest.fixture
def three(tmp_path):
    """Sources whose tokens say where they are from: source k at offset t holds 10,000 k + t."""
    for k, name in enumerate("abc"):
        with TokenWriter(tmp_path / name, "int32") as writer:
            for begin in range(0, 3000, 100):
                writer.add(np.arange(begin, begin + 100) + 10_000 * k)
    return tmp_path


def blended(folder, **changes) -> DataConfig:
    blend = (SourceConfig(str(folder / "b"), 0.3), SourceConfig(str(folder / "c"), 0.2))
    return DataConfig(str(folder / "a"), sequence_length=16, seed=2, weight=0.5, blend=blend, **changes)


PHASES = (DataPhase(16 * 96, weights=(0.1, 0.1, 0.8)), DataPhase(16 * 160, sequence_length=64))


def test_one_stream_through_ramp_ranks_phases_and_restarts(three):
    """Batch sizes 16, 32, 48, 64, each on another number of ranks and in a fresh loader: the stream of one loop."""
    config = blended(three, phases=PHASES)
    straight = Loader(config)
    consumed = 0
    for batch, data_size, micro in ((16, 8, 1), (32, 4, 2), (48, 2, 4), (64, 1, 8), (64, 8, 8), (32, 2, 1)):
        got = step(Loader(config), consumed=consumed, data_size=data_size, micro_batch_size=micro, per_step=batch)
        one_by_one = [straight.windows(np.array([sample]))[0] for sample in range(consumed, consumed + batch)]
        assert np.array_equal(got, np.stack(one_by_one))
        consumed += batch
    assert got.shape == (32, 65)


@pytest.mark.parametrize("direction", [1, -1])
def test_looking_ahead_changes_nothing(three, direction):
    """Any order of calls, also the two directions of a pipeline at once, gives what single samples give."""
    loader, straight = Loader(blended(three, phases=PHASES)), Loader(blended(three, phases=PHASES))
    for consumed in range(0, 256, 16):
        for microbatch in [0, 4, 1, 5, 2, 6, 3, 7][::direction]:
            got = loader.microbatch(
                consumed=consumed, microbatch=microbatch, data_rank=1, data_size=2, micro_batch_size=1
            )
            assert np.array_equal(got, straight.windows(np.array([consumed + 2 * microbatch + 1])))
    assert len(loader._ahead) < 1000


def test_proportions_and_sources(three):
    loader = Loader(blended(three))
    sources = loader.windows(np.arange(2000))[:, 0] // 10_000
    for begin in range(0, 1900, 37):
        for k, share in enumerate((0.5, 0.3, 0.2)):
            assert abs(np.count_nonzero(sources[begin : begin + 100] == k) - 100 * share) < 4


def test_sources_visit_their_windows_in_unrelated_orders(three):
    loader = Loader(blended(three))
    windows = loader.windows(np.arange(600))
    orders = [windows[windows[:, 0] // 10_000 == k, 0] % 10_000 for k in range(3)]
    size = min(map(len, orders))
    assert abs(np.corrcoef(orders[0][:size], orders[1][:size])[0, 1]) < 0.35
    assert not np.array_equal(orders[1][:size], orders[2][:size])


def test_documents_of_every_window(three):
    config = blended(three, document_mask=True, phases=(DataPhase(1600, sequence_length=250),))
    loader = Loader(config)
    for consumed in (0, 100):
        batch = loader.batch(consumed=consumed, microbatch=0, data_rank=0, data_size=1, micro_batch_size=16)
        assert batch.documents is not None and batch.documents.shape == batch.tokens.shape
        expected = batch.tokens // 100 - batch.tokens[:, :1] // 100  # documents of 100 tokens
        assert np.array_equal(batch.documents, expected)
        assert batch.documents.max() >= (consumed and 2)
    with pytest.raises(SamplerError, match="takes tokens alone"):
        loader.microbatch(consumed=0, microbatch=0, data_rank=0, data_size=1, micro_batch_size=1)
    unmasked = Loader(blended(three)).batch(consumed=0, microbatch=0, data_rank=0, data_size=1, micro_batch_size=1)
    assert unmasked.documents is None


def test_a_rate_by_tokens_seen(three):
    asked = []

    def rate(tokens: int) -> float:
        asked.append(tokens)
        return 0.0

    Loader(blended(three, phases=PHASES), fim_rate=rate).windows(np.array([0, 5, 100]))
    assert asked == [0, 80, 1600]
    with pytest.raises(TokenFileError, match="lower but not raise to"):
        Loader(blended(three), fim_rate=lambda tokens: 0.1).windows(np.array([0]))


def test_all_sources_problems_are_named(three):
    config = blended(three)
    (three / "b.bin").write_bytes(b"")
    (three / "c.idx").unlink()
    with pytest.raises(TokenFileError) as caught:
        Loader(config)
    assert "b.bin: byte 0: truncated" in str(caught.value) and "c.idx: No such file" in str(caught.value)


def test_places_are_computed_for_many_micro_batches_at_once(prefix, monkeypatch):
    loader, calls = Loader(DataConfig(prefix, sequence_length=16)), []
    resolve = loader._resolve
    monkeypatch.setattr(loader, "_resolve", lambda ids: calls.append(len(ids)) or resolve(ids))
    for consumed in range(0, 8000, 16):
        for microbatch in range(4):
            loader.microbatch(consumed=consumed, microbatch=microbatch, data_rank=1, data_size=2, micro_batch_size=2)
    assert len(calls) <= 16 and sum(calls) < 2 * 4000 + 2 * 256
