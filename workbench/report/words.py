"""Numbers, shares and lists as prose writes them."""

from collections.abc import Sequence

import numpy as np


def number(value: float, sign: bool = False) -> str:
    """Write a number with three significant digits, a true minus sign and thousands separators.

    >>> number(-0.01234), number(12345.6), number(2.5, sign=True)
    ('−0.0123', '12,346', '+2.5')
    """
    if not np.isfinite(value):
        return "not a number" if np.isnan(value) else "infinite"
    sign = sign and value != 0
    digits = 0 if value == 0 else max(0, 2 - int(np.floor(np.log10(abs(value)))))
    text = f"{value:{'+' if sign else ''},.{min(digits, 9)}f}" if abs(value) >= 1e-6 or value == 0 else f"{value:.2e}"
    if "." in text and "e" not in text:
        text = text.rstrip("0").rstrip(".")
    return text.replace("-", "−")


def tenth(value: float) -> str:
    """Write a signed number with one decimal.

    >>> tenth(-9.091), tenth(0.0), tenth(18)
    ('−9.1', '0', '+18.0')
    """
    text = f"{value:+.1f}".replace("-", "−")
    return "0" if text[1:] == "0.0" else text


def percent(share: float) -> str:
    """Write a share as a whole percentage, or with one decimal where rounding would claim nothing or everything.

    >>> percent(0.361), percent(0.003), percent(1.0)
    ('36%', '0.3%', '100%')
    """
    rounded = round(share * 100)
    return f"{share * 100:.1f}%" if (rounded in (0, 100) and share not in (0.0, 1.0)) else f"{rounded}%"


def listed(parts: Sequence[str]) -> str:
    """Join words as prose does.

    >>> listed(["a", "b", "c"])
    'a, b and c'
    """
    return " and ".join([", ".join(parts[:-1]), parts[-1]] if len(parts) > 1 else parts)
