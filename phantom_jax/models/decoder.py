"""One causal decoder for LLaMA/Vicuna, Qwen2, InternLM2 and Phi-3, with or without the phantom dimension."""

import dataclasses
import functools
import operator
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
from flax import linen as nn
from jax.ad_checkpoint import checkpoint_name

from phantom_jax import axes
from phantom_jax.models.cache import Cache, LayerCache
from phantom_jax.models.layers import Dense, RMSNorm
from phantom_jax.models.partitioning import (
    constrain,
    gather,
    gather_kernel,
    gathered_again,
    look_up,
    split_of,
)
from phantom_jax.models.phantom import PhantomConfig, PhantomDimension, gather_sos
from phantom_jax.models.remat import KEY, MIXED, QUERY, VALUE, rematerialized
from phantom_jax.ops import cross_entropy
from phantom_jax.ops import rope as rotary
from phantom_jax.ops.attention import attention
from phantom_jax.ops.linear import linear
from phantom_jax.ops.structure import Structure
from phantom_jax.sizes import MOST_LAYERS, check_positive, check_size
from phantom_jax.trees import flatten, unflatten

_LONGEST = 2**31 - 1  # positions are int32


@dataclasses.dataclass(frozen=True)
class DecoderConfig:
    """A decoder.

    Attributes:
      vocab_size, embed_dim, num_layers, num_heads, num_kv_heads, head_dim, mlp_dim: sizes.
      norm_epsilon: of every RMSNorm.
      qkv_bias: biases on query, key and value (Qwen2).
      tie_embeddings: the head is the embedding, transposed.
      rope: the rotation.
      phantom: the phantom dimension; None is the plain language model.
    """

    vocab_size: int
    embed_dim: int
    num_layers: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    mlp_dim: int
    norm_epsilon: float = 1e-5
    qkv_bias: bool = False
    tie_embeddings: bool = False
    rope: rotary.RopeConfig = rotary.RopeConfig()
    phantom: PhantomConfig | None = None

    def __post_init__(self):
        where, rope = "the decoder", self.rope
        for name in ("vocab_size", "embed_dim", "num_heads", "num_kv_heads", "head_dim", "mlp_dim"):
            check_size(where, name, getattr(self, name))
        check_size(where, "num_layers", self.num_layers, MOST_LAYERS)
        check_positive(where, "norm_epsilon", self.norm_epsilon, 1)
        check_size(where, "rope.max_length", rope.max_length, _LONGEST)
        for name in ("theta", "factor"):
            check_positive(where, f"rope.{name}", getattr(rope, name))
        if self.head_dim % 2:
            raise ValueError(f"heads of {self.head_dim} channels can not be rotated: head_dim must be even")
        if rope.original_max_length is not None:
            check_size(where, "rope.original_max_length", rope.original_max_length, _LONGEST)
            counts = {len(rope.short_factor), len(rope.long_factor)}
            if rope.kind in ("su", "longrope") and counts != {self.head_dim // 2}:
                raise ValueError(
                    f"rope kind {rope.kind!r} has {len(rope.short_factor)} short and {len(rope.long_factor)} long "
                    f"factors: heads of {self.head_dim} channels need {self.head_dim // 2} of each"
                )
        if self.num_heads % self.num_kv_heads:
            raise ValueError(f"{self.num_heads} query heads are no multiple of {self.num_kv_heads} key-value heads")


@functools.partial(jax.tree_util.register_dataclass, data_fields=["hidden", "cache", "layer_inputs"], meta_fields=[])
@dataclasses.dataclass(frozen=True)
class DecoderOutput:
    """What a decoder returns.

    Attributes:
      hidden: [B, L, D] after the final norm.
      cache: with the new tokens, where one was given.
      layer_inputs: [layers, B, L, D] where asked for.
    """

    hidden: jax.Array
    cache: Cache | None = None
    layer_inputs: jax.Array | None = None


@functools.partial(
    jax.tree_util.register_dataclass,
    data_fields=["cosine", "sine", "structure", "key_structure", "sos_positions", "sos_index", "start"],
    meta_fields=[],
)
@dataclasses.dataclass(frozen=True)
class _Context:
    """What every layer needs of the tokens; the same for all layers."""

    cosine: jax.Array
    sine: jax.Array
    structure: Structure
    key_structure: Structure
    sos_positions: jax.Array | None
    sos_index: jax.Array | None
    start: jax.Array | None


def _constrain(x_BLD):
    return constrain(x_BLD, (axes.ACTIVATION_BATCH, axes.ACTIVATION_LENGTH, axes.ACTIVATION_EMBED))


class Attention(nn.Module):
    """Grouped-query attention with rotation, cache and phantom dimension."""

    config: DecoderConfig
    dtype: Any
    backend: str

    @nn.compact
    def __call__(self, x_BLD: jax.Array, cache: LayerCache | None, context: _Context):
        config = self.config

        def project(name, heads, axis):
            projected = Dense(
                (config.embed_dim,),
                (heads, config.head_dim),
                (axes.EMBED,),
                (axis, axes.HEAD_DIM),
                config.qkv_bias,
                self.dtype,
                name=name,
            )(x_BLD)
            return checkpoint_name(projected, name)

        query = rotary.rotate(project(QUERY, config.num_heads, axes.HEADS), context.cosine, context.sine)
        key = rotary.rotate(project(KEY, config.num_kv_heads, axes.KV_HEADS), context.cosine, context.sine)
        value = project(VALUE, config.num_kv_heads, axes.KV_HEADS)
        dimension = None
        if config.phantom is not None:
            dimension = PhantomDimension(config.phantom, config.head_dim, self.dtype, name="phantom")
            states = None if cache is None else cache.phantom
            if states is None:
                sos = gather_sos(query, key, value, context.sos_positions)
                # Every head attends to all heads of the sos token, wherever they were computed.
                sos = jax.tree.map(lambda x: constrain(x, (axes.ACTIVATION_BATCH, None, None, None)), sos)
                states = dimension.fold(sos)
            query, key, value = dimension.expand(query, key, value, states, context.sos_index)
            if cache is not None:
                cache = dataclasses.replace(cache, phantom=states)
        if cache is not None:
            cache = cache.write(key, value, context.start)
            key, value = cache.read(self.dtype)
        out = attention(
            query,
            key,
            value,
            split=split_of((axes.ACTIVATION_BATCH, axes.ACTIVATION_LENGTH, axes.HEADS), query.shape[:3]),
            # The head dim before concatenation, as released; the paper's lambda = sqrt(2) says the same.
            scale=config.head_dim**-0.5,
            query_structure=context.structure,
            key_structure=context.key_structure,
            backend=self.backend,
        )
        if dimension is not None:
            out = dimension.mix(out)
        out = Dense(
            (config.num_heads, config.head_dim),
            (config.embed_dim,),
            (axes.HEADS, axes.HEAD_DIM),
            (axes.EMBED,),
            False,
            self.dtype,
            (2 * config.num_layers) ** -0.5,
            name="out",
        )(out.astype(self.dtype))
        return checkpoint_name(out, MIXED), cache


class DecoderLayer(nn.Module):
    """Pre-norm layer: attention, then a SiLU-gated MLP."""

    config: DecoderConfig
    dtype: Any
    backend: str
    keep_input: bool

    @nn.compact
    def __call__(self, x_BLD: jax.Array, cache: LayerCache | None, context: _Context):
        config = self.config
        kept = x_BLD if self.keep_input else None
        attend = Attention(config, self.dtype, self.backend, name="attention")
        y, cache = attend(RMSNorm(config.norm_epsilon, name="norm_1")(x_BLD), cache, context)
        x_BLD = x_BLD + y

        def dense(name, size_in, size_out, axis_in, axis_out, gain=1.0):
            return Dense((size_in,), (size_out,), (axis_in,), (axis_out,), False, self.dtype, gain, name=name)

        y = RMSNorm(config.norm_epsilon, name="norm_2")(x_BLD)
        gate = dense("gate", config.embed_dim, config.mlp_dim, axes.EMBED, axes.MLP)(y)
        up = dense("up", config.embed_dim, config.mlp_dim, axes.EMBED, axes.MLP)(y)
        gain = (2 * config.num_layers) ** -0.5
        down = dense("down", config.mlp_dim, config.embed_dim, axes.MLP, axes.EMBED, gain)
        x_BLD = _constrain(x_BLD + down(jax.nn.silu(gate) * up))
        return x_BLD, (cache, kept)


class Decoder(nn.Module):
    """Embeddings in, hidden states out; `embed` and `logits` are its two ends.

    Attributes:
      config: sizes.
      dtype: of the computation.
      attention_backend: see `ops.attention`.
      keep_layer_inputs: whether the output carries the input of every layer.
      scan_layers: whether the parameters of all layers are stacked, `layers/...` [layers, ...], and one compiled layer
        runs over them (training: compiles fast, and is sharded and rematerialised layer by layer). Otherwise each
        layer has parameters of its own, `layers_0/...`, and only then there is a cache: a product of one token with
        weights is bound by memory, and taking a layer out of a stack copies it first. See `unstack_layers`.
      remat: what scanned layers keep for the backward pass, see `models.remat`.
    """

    config: DecoderConfig
    dtype: Any = jnp.float32
    attention_backend: str = "xla"
    keep_layer_inputs: bool = False
    scan_layers: bool = True
    remat: str = "none"

    def setup(self):
        config = self.config
        shape = (config.vocab_size, config.embed_dim)
        init = nn.with_logical_partitioning(nn.initializers.normal(0.1), (axes.VOCAB, axes.EMBED))
        self.embedding = self.param("embedding", init, shape, jnp.float32)
        if not config.tie_embeddings:
            self.head = Dense(
                (config.embed_dim,),
                (config.vocab_size,),
                (axes.EMBED,),
                (axes.VOCAB,),
                dtype=self.dtype,
                output_dtype=jnp.float32,
            )
        self.final_norm = RMSNorm(config.norm_epsilon)
        layer = functools.partial(DecoderLayer, config, self.dtype, self.attention_backend, self.keep_layer_inputs)
        if self.scan_layers:
            scanned = nn.scan(
                rematerialized(DecoderLayer, self.remat),
                variable_axes={"params": 0},
                split_rngs={"params": True},
                in_axes=nn.broadcast,
                length=config.num_layers,
                metadata_params={nn.PARTITION_NAME: axes.LAYERS},
            )
            self.layers = scanned(*layer.args)
        else:
            self.layers = [layer() for _ in range(config.num_layers)]

    def embed(self, token_ids_BL: jax.Array) -> jax.Array:
        """[B, L, D] in the computation's dtype."""
        return _constrain(look_up(self.embedding, token_ids_BL).astype(self.dtype))

    def logits(self, hidden_BLD: jax.Array) -> jax.Array:
        """[B, L, V] float32."""

        def tied(hidden_BLD, embedding):
            return self._tied_logits(gather(embedding.astype(self.dtype), (axes.VOCAB, axes.EMBED)), hidden_BLD)

        tie = self.config.tie_embeddings
        logits = gathered_again(tied)(hidden_BLD, self.embedding) if tie else self.head(hidden_BLD)
        return constrain(logits, (axes.ACTIVATION_BATCH, axes.ACTIVATION_LENGTH, axes.VOCAB))

    @nn.nowrap
    def _tied_logits(self, embedding_VD, hidden_BLD):
        embedding_VD = embedding_VD.astype(self.dtype)
        return jnp.einsum("bld,vd->blv", hidden_BLD, embedding_VD, preferred_element_type=jnp.float32)

    def target_scores(self, hidden_BLD: jax.Array, targets_BL: jax.Array) -> tuple[jax.Array, jax.Array]:
        """Log-probability and correctness of each target, without the logits of all: see `ops.cross_entropy`."""
        if self.is_initializing():
            self.logits(hidden_BLD[:, :1])
        if self.config.tie_embeddings:
            kept, logits = self.embedding, self._tied_logits
            weights = gather(kept.astype(self.dtype), (axes.VOCAB, axes.EMBED))
        else:
            kept = nn.meta.unbox(self.head.get_variable("params", "kernel"))
            weights = gather_kernel(kept, (axes.EMBED,), (axes.VOCAB,), self.dtype)

            def logits(kernel, hidden_BLD):
                return linear(hidden_BLD, kernel, 1, self.dtype, jnp.float32)

        # Gathered once for all chunks. Of what trains, which is kept in float32, gradients are summed so.
        weights = jax.tree.map(lambda x, old: x.astype(old.dtype) if old.dtype == jnp.float32 else x, weights, kept)
        split = split_of((axes.ACTIVATION_BATCH, axes.ACTIVATION_LENGTH), targets_BL.shape)
        return cross_entropy.target_scores(
            logits, weights, hidden_BLD, targets_BL, vocabulary=self.config.vocab_size, split=split
        )

    def __call__(
        self,
        x_BLD: jax.Array,
        structure: Structure,
        *,
        rope_length: int,
        cache: Cache | None = None,
        sos_positions: jax.Array | None = None,
        sos_index: jax.Array | None = None,
    ) -> DecoderOutput:
        """Runs all layers.

        Args:
          x_BLD: embeddings, image features in place.
          structure: [B, L] of these tokens.
          rope_length: longest single conversation, see `ops.rope.frequencies`.
          cache: where the tokens go and what they see besides themselves; None for a plain forward pass.
          sos_positions: [B, S] row indices of the sos tokens; None takes the first real token of each row. In a
            packed row whose conversations all start with one token, that one serves the whole row: attention is
            causal, so all their sos states are equal.
          sos_index: [B, L] which of the S sos tokens serves each token; needed where S > 1.
        """
        config = self.config
        inverse, factor = rotary.frequencies(config.rope, config.head_dim, rope_length)
        cosine, sine = rotary.angles(structure.positions, inverse, factor)
        key_structure, start = structure, None
        if cache is not None:
            start = cache.length
            key_structure = jax.tree.map(
                lambda old, new: jax.lax.dynamic_update_slice(old, new, (0, start)), cache.structure, structure
            )
        if config.phantom is not None and sos_positions is None:
            sos_positions = jnp.argmax(structure.segment_ids > 0, axis=1)[:, None]
        context = _Context(cosine, sine, structure, key_structure, sos_positions, sos_index, start)
        if self.scan_layers:
            if cache is not None:
                raise ValueError("scanned layers have no cache: set scan_layers=False and unstack the parameters")
            x_BLD, (_, kept) = self.layers(x_BLD, None, context)
            return DecoderOutput(self.final_norm(x_BLD), None, kept)
        caches, inputs = [], []
        for index, layer in enumerate(self.layers):
            x_BLD, (written, kept) = layer(x_BLD, None if cache is None else cache.layers[index], context)
            caches.append(written)
            inputs.append(kept)
        if cache is not None:
            cache = Cache(tuple(caches), key_structure, cache.length + structure.shape[1])
        return DecoderOutput(self.final_norm(x_BLD), cache, jnp.stack(inputs) if self.keep_layer_inputs else None)


def unstack_layers(params: Mapping[str, Any], take: Callable[[Any, int], Any] = operator.getitem) -> dict[str, Any]:
    """A decoder's parameters with layers of their own, from those of scanned layers: `layers` to `layers_0`, ...

    Arrays are cut one by one, so that no more than the tree and one of its arrays is held.

    Args:
      params: with `layers`, stacked on the first axis.
      take: gives one entry of the first axis of an array.
    """
    params = dict(params)
    layers: dict[str, dict[str, Any]] = {}
    for path, array in flatten(params.pop("layers")).items():
        for index in range(jax.tree.leaves(array)[0].shape[0]):
            layer = layers.setdefault(f"layers_{index}", {})
            layer[path] = jax.tree.map(lambda leaf, index=index: take(leaf, index), array)
    return params | {name: unflatten(leaves) for name, leaves in layers.items()}
