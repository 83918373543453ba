"""What the numbers of a model can be. They come from anyone's files, and are checked before anything is made of them.

The bounds are some ten times what any published model has: a wrong number is named, and not a lack of memory or an hour
of tracing later.
"""

import numbers
from typing import Any

from phantom_jax.errors import InputError

MOST_LAYERS = 1000
MOST_PIXELS = 1 << 14
_MOST = 1 << 24


def check_size(where: str, name: str, value: Any, most: int = _MOST) -> int:
    """Gives a size back, or raises an `InputError` where it is no whole number from 1 to `most`."""
    if isinstance(value, bool) or not isinstance(value, numbers.Integral) or not 1 <= value <= most:
        raise InputError(f"{where} has {name}={value!r:.100}: it must be a whole number from 1 to {most:,}")
    return value


def check_positive(where: str, name: str, value: Any, most: float = 1e12) -> float:
    """Gives a number back, or raises an `InputError` where it is none, not above 0, or above `most`."""
    if isinstance(value, bool) or not isinstance(value, numbers.Real) or not 0 < value <= most:
        raise InputError(f"{where} has {name}={value!r:.100}: it must be a number above 0, and at most {most:g}")
    return value
