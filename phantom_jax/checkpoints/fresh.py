"""Parameters that no published file holds, as training would begin with them: the modules' own initialisation."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax.linen import meta

from phantom_jax.checkpoints.arrays import StoredArray, once
from phantom_jax.models.decoder import DecoderConfig
from phantom_jax.models.phantom import PhantomDimension, SosStates
from phantom_jax.models.projector import Projector, ProjectorConfig
from phantom_jax.trees import flatten


def phantom_dimension(config: DecoderConfig, seed: int) -> dict[str, StoredArray]:
    """The phantom dimension of all layers, float32, by path, layers stacked; nothing else of the decoder is made."""
    module = PhantomDimension(config.phantom, config.head_dim)
    query, key = (jnp.zeros((1, 1, heads, config.head_dim)) for heads in (config.num_heads, config.num_kv_heads))
    # What attention would return: both halves of every head.
    out = jnp.concatenate([query, query], axis=-1)

    def run(module, query, key, value, out):
        return module.expand(query, key, value, module.fold(SosStates(query, key, value))), module.mix(out)

    def init(rng):
        return meta.unbox(module.init(rng, query, key, key, out, method=run)["params"])

    layers = jax.random.split(jax.random.key(seed), config.num_layers)
    return _when_asked_for("params/language_model/layers/attention/phantom/", jax.vmap(init), layers)


def projector(config: ProjectorConfig, seed: int) -> dict[str, StoredArray]:
    """A projector, float32, by path."""
    patches = jnp.zeros((1, config.shuffle**2, config.vision_dim))
    # Not the key of the phantom dimension.
    rng = jax.random.fold_in(jax.random.key(seed), 1)
    return _when_asked_for(
        "params/projector/", lambda rng: meta.unbox(Projector(config).init(rng, patches)["params"]), rng
    )


def _when_asked_for(prefix: str, init: Callable[[jax.Array], Any], rng: jax.Array) -> dict[str, StoredArray]:
    """The parameters by path; all are made when one of them is first read."""

    @once
    def values() -> dict[str, np.ndarray]:
        return {path: np.asarray(leaf) for path, leaf in flatten(jax.jit(init)(rng)).items()}

    return {
        prefix + path: StoredArray(leaf.shape, leaf.dtype, lambda box, path=path: values()[path][box])
        for path, leaf in flatten(jax.eval_shape(init, rng)).items()
    }
