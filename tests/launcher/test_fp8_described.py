"""A run's first lines say what computes in FP8, and that an emulation is one."""

import pytest

from launcher.config import compose
from launcher.train import describe


@pytest.mark.parametrize(
    ("overrides", "last"),
    [
        ("", "fp8 (oracle_fast: emulated by BF16 products)"),
        ("train.device=cuda", "fp8 (oracle_fast: emulated by BF16 products)"),
        ("fp8.backend=oracle_exact", "fp8 (oracle_exact: emulated to the bit)"),
        ("fp8.backend=transformer_engine", "fp8 (transformer_engine)"),
        ("fp8.backend=transformer_engine fp8.grouped=deep_gemm", "fp8 (transformer_engine), experts by deep_gemm"),
        ("fp8.grouped=deep_gemm", "fp8 (oracle_fast: emulated by BF16 products), experts by deep_gemm"),
    ],
)
def test_the_back_end_is_named(overrides: str, last: str) -> None:
    lines = describe(compose(["experiment=tiny", "train.precision=fp8", *overrides.split()]))
    assert lines[-1] == last and len(last) <= 80
    assert lines[-2].endswith("micro-batches a pipeline")


def test_other_precisions_are_a_word() -> None:
    fp8, bf16 = (describe(compose(["experiment=tiny", f"train.precision={name}"])) for name in ("fp8", "bf16"))
    assert bf16 == [*fp8[:-2], f"{fp8[-2]}, bf16"]
