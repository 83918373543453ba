"""The names of what a model's folder can be: its layout, and the dtype or the bits of its weights."""

from collections.abc import Sequence

from phantom_jax.errors import InputError

PUBLISHED_LAYOUTS = ("phantom", "llava-hf", "llava-original")
MODEL_LAYOUTS = ("ours", *PUBLISHED_LAYOUTS)
ADAPTER_LAYOUTS = ("ours", "peft")
LAYOUTS = (*MODEL_LAYOUTS, "peft")
STORED_DTYPES = ("float32", "bfloat16", "float16")
QUANTIZATIONS = ("int8", "nf4")


def check_name(kind: str, name: str, known: Sequence[str]) -> None:
    """Raises an `InputError` unless a name of this kind is known; the error lists those that are."""
    if name not in known:
        raise InputError(f"{kind} {name!r} does not exist: use one of {', '.join(known)}")
