import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from data.sampler import Sampler, SamplerError, permute, step_sample_ids

KEYS = st.integers(0, 2**64 - 1)


def permutation(size: int, key: int) -> np.ndarray:
    return permute(np.arange(size, dtype=np.uint64), size=size, keys_N=np.full(size, key, dtype=np.uint64))


@pytest.mark.parametrize("size", [1, 2, 3, 4, 5, 7, 8, 9, 10, 16, 17, 255, 256, 257, 1023, 5439])
def test_permutation_is_a_bijection(size):
    for key in (0, 1, 2**64 - 1):
        assert np.array_equal(np.sort(permutation(size, key)), np.arange(size))


@settings(max_examples=60, deadline=None)
@given(size=st.integers(1, 3000), key=KEYS)
def test_permutation_is_a_bijection_for_any_key(size, key):
    assert np.array_equal(np.sort(permutation(size, key)), np.arange(size))


def test_permutation_mixes():
    size, keys = 1000, np.arange(20_000, dtype=np.uint64)
    for index in (0, 1, 999):
        images = permute(np.full(len(keys), index, dtype=np.uint64), size=size, keys_N=keys)
        counts = np.bincount((images // 100).astype(int), minlength=10)
        assert abs(counts - 2000).max() < 5 * 2000**0.5  # consecutive keys send an index everywhere alike
    order = permutation(100_000, 7).astype(float)
    assert abs(np.corrcoef(order, np.arange(100_000))[0, 1]) < 0.02
    assert abs(np.corrcoef(order[:-1], order[1:])[0, 1]) < 0.02


@settings(max_examples=60, deadline=None)
@given(num_tokens=st.integers(2, 4000), sequence_length=st.integers(1, 300), seed=st.integers(-(2**70), 2**70))
def test_windows_fit_and_never_overlap_within_an_epoch(num_tokens, sequence_length, seed):
    if num_tokens < sequence_length + 1:
        with pytest.raises(SamplerError, match=f"{num_tokens} tokens are fewer"):
            Sampler(num_tokens, sequence_length, seed)
        return
    sampler = Sampler(num_tokens, sequence_length, seed)
    per_epoch = sampler.windows_per_epoch
    for epoch in range(3):
        starts = np.sort(sampler.starts(np.arange(epoch * per_epoch, (epoch + 1) * per_epoch)))
        assert starts[0] >= 0 and starts[-1] + sequence_length + 1 <= num_tokens
        assert np.array_equal(np.diff(starts), np.full(per_epoch - 1, sequence_length))
        unused = num_tokens - (per_epoch * sequence_length + 1)
        assert starts[0] < sequence_length and unused < 2 * sequence_length


def test_epochs_differ_in_order_and_cuts():
    sampler = Sampler(100_000, 128, seed=3)
    per_epoch = sampler.windows_per_epoch
    epochs = sampler.starts(np.arange(8 * per_epoch)).reshape(8, per_epoch)
    assert len({int(starts.min()) for starts in epochs}) > 4
    assert len({tuple(np.argsort(starts)) for starts in epochs}) == 8
    assert not np.array_equal(epochs[0], Sampler(100_000, 128, seed=4).starts(np.arange(per_epoch)))


def test_pure_function_of_the_sample_id():
    sampler = Sampler(50_000, 64, seed=11)
    ids = np.arange(3 * sampler.windows_per_epoch)
    starts = sampler.starts(ids)
    shuffled = np.random.default_rng(0).permutation(ids)
    assert np.array_equal(sampler.starts(shuffled), starts[shuffled])
    assert all(sampler.starts(np.array([i]))[0] == starts[i] for i in (0, 1, 779, 780, 2000))
    assert sampler.starts(np.array([], dtype=np.int64)).shape == (0,)


def test_order_is_pinned():
    """A change here changes the data of every run that resumes: it must be deliberate."""
    assert Sampler(1_000_000, 128, seed=42).starts(np.array([0, 1, 2, 7811, 10**12])).tolist() == GOLDEN


GOLDEN = [424458, 444810, 188170, 905068, 452176]


def test_report_size_needs_no_index():
    sampler = Sampler(14_800_000_000_000, 4096, seed=0)
    starts = sampler.starts(np.array([0, 1, sampler.windows_per_epoch - 1, 3 * sampler.windows_per_epoch]))
    assert len(set(starts.tolist())) == 4 and starts.min() >= 0 and starts.max() + 4097 <= sampler.num_tokens


def test_short_settings_are_refused():
    with pytest.raises(SamplerError, match="sequence_length is 0"):
        Sampler(10, 0)


@pytest.mark.parametrize("data_size", [1, 2, 4, 8])
@pytest.mark.parametrize("micro_batch_size", [1, 2])
def test_step_holds_the_same_samples_on_any_number_of_ranks(data_size, micro_batch_size):
    per_step, consumed = 32, 1000
    ids = [
        step_sample_ids(
            consumed=consumed,
            microbatch=microbatch,
            data_rank=rank,
            data_size=data_size,
            micro_batch_size=micro_batch_size,
        )
        for microbatch in range(per_step // (data_size * micro_batch_size))
        for rank in range(data_size)
    ]
    assert all(len(part) == micro_batch_size for part in ids)
    assert np.array_equal(np.concatenate(ids), np.arange(consumed, consumed + per_step))


def test_a_longer_context_with_another_seed_does_not_begin_where_pretraining_did():
    """Samples of a run that goes on at another length: as many tokens in common as chance gives, and other cuts."""
    total, first, longer = 1 << 24, 4096, 32768
    seen = np.zeros(total, dtype=bool)
    for start in Sampler(total, first, seed=0).starts(np.arange(800)):  # a fifth of an epoch
        seen[start : start + first] = True
    starts = Sampler(total, longer, seed=1).starts(np.arange(100))
    common = np.mean([seen[start : start + longer].mean() for start in starts])
    assert abs(common - seen.mean()) < 0.04 and 0.19 < seen.mean() < 0.21
    cuts = {int(start) % first for start in Sampler(total, first, seed=0).starts(np.arange(10))}
    assert not cuts & {int(start) % first for start in starts}
    # the same length and seed would be the same beginning, which the config check refuses
    assert np.array_equal(
        Sampler(total, first, seed=0).starts(np.arange(9)), Sampler(total, first).starts(np.arange(9))
    )
