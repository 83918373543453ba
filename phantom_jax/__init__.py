"""Phantom and LLaVA vision-language models in JAX.

`load(path)` gives a handle with `.model`, `.params`, `.processor` and `.generate(...)`; `save(handle, path, format)`
writes it back. Both are looked up on first use, so that importing the package costs nothing.
"""

import importlib

from phantom_jax.version import __version__

__all__ = ["__version__", "load", "save"]

_LAZY = {"load": "phantom_jax.pretrained", "save": "phantom_jax.pretrained"}


def __getattr__(name: str):
    if name in _LAZY:
        return getattr(importlib.import_module(_LAZY[name]), name)
    raise AttributeError(f"module 'phantom_jax' has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted(__all__)
