"""Numbers, shares and lists as prose writes them."""

from collections.abc import Sequence
from typing import SupportsFloat

import numpy as np


def number(value: SupportsFloat, sign: bool = False) -> str:
    """Write a number with three significant digits, a true minus sign and thousands separators.

    >>> number(-0.01234), number(12345.6), number(2.5, sign=True)
    ('−0.0123', '12,346', '+2.5')
    """
    value = float(value)
    if not np.isfinite(value):
        return "not a number" if np.isnan(value) else "infinite"
    mark = "+" if sign and value != 0 else ""
    if value != 0 and not 1e-6 <= abs(value) < 1e12:
        return f"{value:{mark}.2e}".replace("-", "−")
    digits = 0 if value == 0 else max(0, 2 - int(np.floor(np.log10(abs(value)))))
    text = f"{value:{mark},.{digits}f}"
    return (text.rstrip("0").rstrip(".") if "." in text else text).replace("-", "−")


def tenth(value: SupportsFloat) -> str:
    """Write a signed number with one decimal.

    >>> tenth(-9.091), tenth(0.0), tenth(18)
    ('−9.1', '0', '+18.0')
    """
    text = f"{float(value):+.1f}".replace("-", "−")
    return "0" if text[1:] == "0.0" else text


def percent(share: SupportsFloat) -> str:
    """Write a share as a whole percentage, or with one decimal where rounding would claim nothing or everything.

    >>> percent(0.361), percent(0.003), percent(1.0)
    ('36%', '0.3%', '100%')
    """
    points = float(share) * 100
    edge = round(points) in (0, 100) and points not in (0, 100)
    return f"{points:.1f}%" if edge else f"{round(points)}%"


def listed(parts: Sequence[str]) -> str:
    """Join words as prose does.

    >>> listed(["a", "b", "c"])
    'a, b and c'
    """
    return " and ".join([", ".join(parts[:-1]), parts[-1]] if len(parts) > 1 else parts)


def capital(text: str) -> str:
    """A text with its first letter in upper case, as at the start of a sentence."""
    return text[:1].upper() + text[1:]
