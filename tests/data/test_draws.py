import hashlib

import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from data.draws import Purpose, document_hash, document_id, draw, draws, threshold

WORDS = st.integers(0, 2**64 - 1)


@given(seed=st.integers(-(2**65), 2**65), name=WORDS, purpose=st.sampled_from(Purpose))
def test_vector_equals_one_by_one(seed, name, purpose):
    assert draws(seed, purpose, name, 5).tolist() == [draw(seed, purpose, name, number) for number in range(5)]


def test_draws_are_uniform_and_independent():
    """10,000 draws over 10 cells: each within 5 standard deviations; two purposes or neighbours do not correlate."""
    size = 10_000
    rows = {
        "names": [draw(0, Purpose.FIM, name) for name in range(size)],
        "numbers": draws(0, Purpose.FIM, 1, size).tolist(),
        "seeds": [draw(seed, Purpose.FIM, 1) for seed in range(size)],
        "purpose": [draw(0, Purpose.SPLIT, name) for name in range(size)],
    }
    values = {key: np.array(row, dtype=np.float64) / 2**64 for key, row in rows.items()}
    for row in values.values():
        counts = np.histogram(row, bins=10, range=(0, 1))[0]
        assert abs(counts - size / 10).max() < 5 * (size * 0.09) ** 0.5
        assert abs(np.corrcoef(row[:-1], row[1:])[0, 1]) < 0.05
    assert abs(np.corrcoef(values["names"], values["purpose"])[0, 1]) < 0.05


def test_ids_and_thresholds():
    digest = document_hash(b"text")
    assert digest == hashlib.sha256(b"text").digest()
    assert document_id(digest).to_bytes(8, "little") == digest[:8]
    assert threshold(0) == 0 and threshold(1) == 2**64 and threshold(0.5) == 2**63
    assert draw(0, Purpose.FIM, 1) == 11851837189861670986  # pinned: a change here changes prepared data
