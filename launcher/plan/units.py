"""Seconds, bytes and counts in words, each in the unit that fits its size."""

_BYTES = ((2**30, "GiB"), (2**20, "MiB"), (2**10, "KiB"))
_COUNTS = ((1e12, "T"), (1e9, "B"), (1e6, "M"), (1e3, "K"))


def seconds(value: float, *, like: float | None = None) -> str:
    """Four figures or so, in seconds, ms or us; like: in the unit of that many seconds."""
    measure = value if like is None else like
    if measure >= 1:
        return f"{value:.3f} s"
    return f"{1e3 * value:.2f} ms" if measure >= 1e-3 else f"{1e6 * value:.1f} us"


def size(num_bytes: float) -> str:
    """In GiB, MiB or KiB."""
    unit, name = next((entry for entry in _BYTES if num_bytes >= 0.1 * entry[0]), _BYTES[-1])
    return f"{num_bytes / unit:.2f} {name}"


def count(value: float) -> str:
    """Three figures with K, M, B or T."""
    unit, name = next((entry for entry in _COUNTS if abs(value) >= entry[0]), (1, ""))
    return f"{value / unit:.3g}{name}" if abs(value) < 100 * unit else f"{value / unit:.0f}{name}"


def dollars(value: float) -> str:
    """In millions where there are any."""
    return f"${value / 1e6:,.2f}M" if value >= 1e5 else f"${value:,.2f}"


def days(value: float) -> str:
    """In days, hours, minutes or seconds."""
    if value >= 1:
        return f"{value:.1f} days"
    for unit, name in ((1 / 24, "hours"), (1 / 1440, "minutes")):
        if value >= unit:
            return f"{value / unit:.1f} {name}"
    return f"{value * 86400:.1f} seconds"


def gpu_hours(value: float) -> str:
    """With K where there are many."""
    return f"{value / 1e3:,.0f}K" if value >= 1e4 else f"{value:,.3g}"
