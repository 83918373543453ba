"""Low-rank adapters in training: their factors, the model with them, and what they become (arXiv 2106.09685).

The factors of the kernel `.../query/kernel` are parameters of their own, `.../query/lora_a` and `.../query/lora_b`.
"""

import dataclasses
import functools
import math
import zlib
from typing import Any

import jax
import jax.numpy as jnp

from phantom_jax.models.linears import layer_axes, linear_inputs
from phantom_jax.ops.linear import LowRankKernel, low_rank_product
from phantom_jax.trees import Params, flatten, unflatten

_A, _B = "lora_a", "lora_b"


def factor_paths(kernel: str) -> tuple[str, str]:
    """The paths of A and B of the kernel at a path."""
    parent = kernel.rpartition("/")[0]
    return f"{parent}/{_A}", f"{parent}/{_B}"


@dataclasses.dataclass(frozen=True)
class Lora:
    """An adapter.

    Attributes:
      kernels: paths of the kernels that it changes.
      rank: of every change; above the smaller side of a kernel it is allowed, as by PEFT, and of no use.
      alpha: changes are scaled by alpha / rank.
      dropout: on the inputs of A.
    """

    kernels: tuple[str, ...] = ()
    rank: int = 0
    alpha: float = 1.0
    dropout: float = 0.0

    @property
    def scaling(self) -> float:
        return self.alpha / self.rank

    def init(self, params: Params, key: jax.Array) -> dict[str, Any]:
        """Factors that change nothing yet, as PEFT begins them: A uniform within 1 / sqrt(inputs), B zero.

        Args:
          params: hold the kernels, or their shapes.
          key: a kernel's factors depend on it and on their path, not on what else is adapted.

        Returns:
          float32 A [layers, *inputs, r] and B [layers, r, *outputs], without the first axis outside the layers.
        """
        flat, factors = flatten(params), {}
        for path in self.kernels:
            shape, layers = tuple(flat[path].shape), layer_axes(path)
            cut = layers + linear_inputs(path)
            bound = math.prod(shape[layers:cut]) ** -0.5
            a_path, b_path = factor_paths(path)
            factors[a_path] = jax.random.uniform(
                _path_key(key, path), (*shape[:cut], self.rank), jnp.float32, -bound, bound
            )
            factors[b_path] = jnp.zeros((*shape[:layers], self.rank, *shape[cut:]), jnp.float32)
        return unflatten(factors)

    def attach(self, params: Params, key: jax.Array | None = None) -> dict[str, Any]:
        """Parameters that the model takes: each kernel with its factors as one `LowRankKernel`.

        Args:
          params: kernels and factors.
          key: of the dropout of one forward pass; None for none.
        """
        flat = flatten(params)
        for path in self.kernels:
            a, b = (flat.pop(factor) for factor in factor_paths(path))
            keys = None
            if key is not None and self.dropout:
                keys = _path_key(key, path)
                keys = jax.random.split(keys, a.shape[0]) if layer_axes(path) else keys
            flat[path] = LowRankKernel(flat[path], a, b, keys, self.scaling, self.dropout)
        return unflatten(flat)

    def detach(self, params: Params) -> dict[str, Any]:
        """Parameters of the model without the adapter."""
        factors = {factor for path in self.kernels for factor in factor_paths(path)}
        return unflatten({path: leaf for path, leaf in flatten(params).items() if path not in factors})

    def merge(self, params: Params) -> dict[str, Any]:
        """Parameters with the changes worked into their float kernels, which become float32; nothing is rounded."""
        flat = flatten(params)
        for path in self.kernels:
            a, b = (flat.pop(factor) for factor in factor_paths(path))
            flat[path] = _merged(flat[path], a, b, self.scaling, layer_axes(path))
        return unflatten(flat)


NO_LORA = Lora()


@functools.partial(jax.jit, static_argnames=("scaling", "layers"))
def _merged(kernel, a, b, scaling, layers):
    return kernel.astype(jnp.float32) + scaling * low_rank_product(a, b, layers)


def _path_key(key, path):
    return jax.random.fold_in(key, zlib.crc32(path.encode()))
