"""What each attention backend can honour. What it cannot is refused, never left out in silence."""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from phantom_jax.errors import InputError


@dataclasses.dataclass(frozen=True)
class Supports:
    """Limits of a backend; the defaults are none.

    Attributes:
      platform: the only one it runs on, None for every one.
      segments: rows of several conversations, and rows padded in front.
      branches: branches that do not see one another.
      cache: keys other than those of the queries' own tokens.
      split_rows: tokens of one row on several devices.
      dtypes: of queries, keys and values; empty for every float.
    """

    platform: str | None = None
    segments: bool = True
    branches: bool = True
    cache: bool = True
    split_rows: bool = True
    dtypes: tuple[str, ...] = ()


SUPPORTS = {
    "xla": Supports(),
    "chunked": Supports(),
    "splash": Supports("tpu", branches=False, cache=False),
    "cudnn": Supports(
        "gpu", segments=False, branches=False, cache=False, split_rows=False, dtypes=("bfloat16", "float16")
    ),
}
BACKENDS = tuple(SUPPORTS)


def platform() -> str:
    """`cpu`, `gpu` or `tpu`: what is compiled for; that of the mesh that is set, if any, which may be elsewhere."""
    device = getattr(jax.sharding.get_abstract_mesh(), "abstract_device", None)
    return jax.default_backend() if device is None else device.platform


def check_backend(name: str, dtype: Any, head_dim: int | None = None) -> None:
    """Refuses a backend that does not exist, does not run here, or does not take such heads.

    Args:
      name: of the backend.
      dtype: of queries, keys and values.
      head_dim: of queries and keys, the phantom half included; None where it is not known yet.

    Raises:
      InputError: says what to set instead.
    """
    if name not in SUPPORTS:
        raise InputError(f"attention backend {name!r} does not exist here: use one of {', '.join(BACKENDS)}")
    supports, here = SUPPORTS[name], platform()
    if supports.platform not in (None, here):
        raise InputError(
            f"attention backend {name!r} runs on a {supports.platform.upper()}, and this is compiled for a "
            f"{here.upper()}: set attention_backend to 'xla' or 'chunked'"
        )
    dtype = jnp.dtype(dtype).name
    if supports.dtypes and dtype not in supports.dtypes:
        raise InputError(
            f"attention backend {name!r} takes {' or '.join(supports.dtypes)}, not {dtype}: set the model's dtype to "
            f"'{supports.dtypes[0]}', or attention_backend to 'xla' or 'chunked'"
        )
    if name == "cudnn" and head_dim is not None:
        check_cudnn_width(head_dim, jax.local_devices(backend="gpu")[0].compute_capability)


def check_cudnn_width(head_dim: int, capability: str) -> None:
    """Refuses heads that cuDNN's fused attention does not take on a GPU of this compute capability, `9.0` say."""
    most = 256 if int(capability.split(".")[0]) >= 9 else 128
    if head_dim > most or head_dim % 8:
        raise InputError(
            f"attention backend 'cudnn' takes heads of at most {most} channels, a multiple of 8, on a GPU of compute "
            f"capability {capability}, and queries and keys have {head_dim}, the phantom half included: set "
            "attention_backend to 'chunked', or model.phantom to {'query_key': False}, which halves them"
        )


def check_tokens(name: str, length: int, keys: int, split: int = 1) -> None:
    """Refuses tokens that lie as a backend does not take them: `length` queries, `keys` keys, on `split` devices."""
    if not SUPPORTS[name].cache and length != keys:
        raise InputError(
            f"attention backend {name!r} takes as many keys as queries, here {keys} and {length}: decode with a cache "
            "through 'xla' or 'chunked'"
        )
    if not SUPPORTS[name].split_rows and split > 1:
        raise InputError(
            f"attention backend {name!r} takes whole rows, and the mesh splits them over seq:{split}: set the mesh's "
            "seq to 1, or attention_backend to 'xla' or 'chunked'"
        )


def honoured(name: str, segment_ids_BL: Any, branch_ids_BL: Any) -> Any:
    """bool [B]: which rows a backend computes as they are meant. NumPy arrays for NumPy arrays."""
    rows = (segment_ids_BL >= 0).all(axis=1)  # all of them
    if not SUPPORTS[name].branches:
        rows &= (branch_ids_BL == 0).all(axis=1)
    if not SUPPORTS[name].segments:
        real = segment_ids_BL > 0
        in_front = (real[:, 1:] <= real[:, :-1]).all(axis=1)
        rows &= in_front & (~real | (segment_ids_BL == segment_ids_BL[:, :1])).all(axis=1)
    return rows


def check_rows(name: str, segment_ids_BL: Any, branch_ids_BL: Any) -> None:
    """Refuses rows that a backend cannot honour. Arrays must be concrete.

    Raises:
      InputError: says which rows, and what to set instead.
    """
    wrong = np.flatnonzero(~honoured(name, np.asarray(segment_ids_BL), np.asarray(branch_ids_BL)))
    if wrong.size:
        kinds = [kind for kind in ("segments", "branches") if not getattr(SUPPORTS[name], kind)]
        raise InputError(
            f"attention backend {name!r} cannot keep {' or '.join(kinds)} of a row apart, and row {wrong[0]} has some"
            " (padding belongs behind the tokens, too): put every conversation into a row of its own, or set"
            " attention_backend to 'chunked', which honours everything"
        )
