"""Numbers with their units, as people read them; a number and its unit stay on one line (no-break spaces)."""

import math

_GAP = "\N{NO-BREAK SPACE}"
_SUPERSCRIPT = str.maketrans("-0123456789", "⁻⁰¹²³⁴⁵⁶⁷⁸⁹")


def count(value: float) -> str:
    """``1234567`` -> ``1.23 M``; below 10,000 every digit is shown."""
    size = abs(value)
    if size < 10_000:
        return f"{value:,.0f}" if float(value).is_integer() else f"{value:.3g}"
    for unit, name in ((1e12, "T"), (1e9, "B"), (1e6, "M"), (1e3, "k")):
        if size >= unit * 0.9995:
            return f"{value / unit:.3g}{_GAP}{name}"
    raise AssertionError("unreachable: size >= 10,000")


def tick(value: float) -> str:
    """A short axis label: ``20000`` -> ``20k``, ``0.001`` -> ``10⁻³``, ``1e18`` -> ``10¹⁸``."""
    if value == 0:
        return "0"
    if abs(value) < 0.01 or abs(value) >= 1e15:
        return power(value, digits=0 if float(f"{value:.0e}") == float(f"{value:.2e}") else 1)
    if abs(value) < 1000:
        return f"{value:g}"
    return count(value).replace(_GAP, "") if abs(value) >= 10_000 else f"{value / 1000:g}k"


def power(value: float, digits: int = 1) -> str:
    """``0.00000123`` -> ``1.2 × 10⁻⁶``; exactly 0 -> ``0``."""
    if value == 0:
        return "0"
    mantissa, exponent = f"{value:.{digits}e}".split("e")
    scale = "10" + str(int(exponent)).translate(_SUPERSCRIPT)
    return scale if float(mantissa) == 1 and digits == 0 else f"{mantissa}{_GAP}×{_GAP}{scale}"


def loss(value: float) -> str:
    """Nats per token, four decimals."""
    return f"{value:.4f}" if math.isfinite(value) else "not finite"


def small(value: float) -> str:
    """A difference: plain decimals where they are readable, else a power of ten."""
    return "0" if value == 0 else f"{value:.4f}" if 0.001 <= abs(value) < 1000 else power(value)


def duration(seconds: float) -> str:
    """``0.4 s``, ``12 s``, ``3 min 20 s``, ``1 h 05 min``."""
    whole = round(seconds)
    if seconds < 9.95:
        text = f"{seconds:.1f} s"
    elif whole < 60:
        text = f"{whole} s"
    elif whole < 3600:
        text = f"{whole // 60} min {whole % 60:02d} s"
    else:
        minutes = round(seconds / 60)
        text = f"{minutes // 60} h {minutes % 60:02d} min"
    return text.replace(" ", _GAP)


def gigabytes(value: float) -> str:
    """``value`` in units of 10^9 bytes."""
    return f"{value:.2f}{_GAP}GB" if value < 10 else f"{value:.1f}{_GAP}GB"


def percent(share: float) -> str:
    """A difference: ``0.0123`` -> ``+1.2%``."""
    return f"{100 * share:+.1f}%".replace("-", "−")
