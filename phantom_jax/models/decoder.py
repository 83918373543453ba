"""One causal decoder for LLaMA/Vicuna, Qwen2, InternLM2 and Phi-3, with or without the phantom dimension."""

import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp
from flax import linen as nn

from phantom_jax import axes
from phantom_jax.models.layers import Dense, RMSNorm
from phantom_jax.models.phantom import PhantomConfig, PhantomDimension, SosStates, gather_sos
from phantom_jax.ops import rope as rotary
from phantom_jax.ops.attention import Structure, attention


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
        if self.num_heads % self.num_kv_heads:
            raise ValueError(f"{self.num_heads} query heads are no multiple of {self.num_kv_heads} key-value heads")


@functools.partial(
    jax.tree_util.register_dataclass,
    data_fields=["key", "value", "structure", "length", "sos"],
    meta_fields=[],
)
@dataclasses.dataclass(frozen=True)
class Cache:
    """Keys and values of the tokens so far, phantom halves included, so that no old token is ever computed again.

    Attributes:
      key: [layers, B, S, K, H or 2H].
      value: [layers, B, S, K, H or 2H].
      structure: [B, S]; segment 0 where nothing was written.
      length: int32 scalar, slots written; all rows write at the same slot, which is why prompts are left padded.
      sos: states of the sos tokens [layers, B, 1, heads, H]; None before the prompt and without a phantom dimension.
    """

    key: jax.Array
    value: jax.Array
    structure: Structure
    length: jax.Array
    sos: SosStates | None = None


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
    return nn.with_logical_constraint(x_BLD, (axes.ACTIVATION_BATCH, axes.ACTIVATION_LENGTH, axes.ACTIVATION_EMBED))


class Attention(nn.Module):
    """Grouped-query attention with rotation, cache and phantom dimension."""

    config: DecoderConfig
    dtype: Any
    backend: str

    @nn.compact
    def __call__(self, x_BLD, key_cache, value_cache, layer, sos, context: _Context):
        config = self.config

        def project(name, heads, axis):
            return Dense(
                (config.embed_dim,),
                (heads, config.head_dim),
                (axes.EMBED,),
                (axis, axes.HEAD_DIM),
                config.qkv_bias,
                self.dtype,
                name=name,
            )(x_BLD)

        query = rotary.rotate(project("query", config.num_heads, axes.HEADS), context.cosine, context.sine)
        key = rotary.rotate(project("key", config.num_kv_heads, axes.KV_HEADS), context.cosine, context.sine)
        value = project("value", config.num_kv_heads, axes.KV_HEADS)
        dimension = None
        if config.phantom is not None:
            dimension = PhantomDimension(config.phantom, config.head_dim, self.dtype, name="phantom")
            if sos is None:
                sos = gather_sos(query, key, value, context.sos_positions)
            query, key, value = dimension.expand(query, key, value, sos, context.sos_index)
        if key_cache is not None:
            index = (layer, 0, context.start, 0, 0)
            key_cache = jax.lax.dynamic_update_slice(key_cache, key[None].astype(key_cache.dtype), index)
            value_cache = jax.lax.dynamic_update_slice(value_cache, value[None].astype(value_cache.dtype), index)
            key = jax.lax.dynamic_index_in_dim(key_cache, layer, 0, keepdims=False).astype(self.dtype)
            value = jax.lax.dynamic_index_in_dim(value_cache, layer, 0, keepdims=False).astype(self.dtype)
        out = attention(
            query,
            key,
            value,
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
        return out, key_cache, value_cache, sos


class DecoderLayer(nn.Module):
    """Pre-norm layer: attention, then a SiLU-gated MLP. Scanned over the stacked layers."""

    config: DecoderConfig
    dtype: Any
    backend: str
    keep_input: bool

    @nn.compact
    def __call__(self, carry, scanned, context: _Context):
        config = self.config
        x_BLD, key_cache, value_cache = carry
        layer, sos = scanned
        kept = x_BLD if self.keep_input else None
        attend = Attention(config, self.dtype, self.backend, name="attention")
        y = RMSNorm(config.norm_epsilon, name="norm_1")(x_BLD)
        y, key_cache, value_cache, sos = attend(y, key_cache, value_cache, layer, sos, context)
        x_BLD = x_BLD + y

        def dense(name, size_in, size_out, axis_in, axis_out, gain=1.0):
            return Dense((size_in,), (size_out,), (axis_in,), (axis_out,), False, self.dtype, gain, name=name)

        y = RMSNorm(config.norm_epsilon, name="norm_2")(x_BLD)
        gate = dense("gate", config.embed_dim, config.mlp_dim, axes.EMBED, axes.MLP)(y)
        up = dense("up", config.embed_dim, config.mlp_dim, axes.EMBED, axes.MLP)(y)
        gain = (2 * config.num_layers) ** -0.5
        down = dense("down", config.mlp_dim, config.embed_dim, axes.MLP, axes.EMBED, gain)
        x_BLD = _constrain(x_BLD + down(jax.nn.silu(gate) * up))
        return (x_BLD, key_cache, value_cache), (sos if key_cache is not None else None, kept)


class Decoder(nn.Module):
    """Embeddings in, hidden states out; `embed` and `logits` are its two ends.

    Attributes:
      config: sizes.
      dtype: of the computation.
      attention_backend: see `ops.attention`.
      keep_layer_inputs: whether the output carries the input of every layer.
    """

    config: DecoderConfig
    dtype: Any = jnp.float32
    attention_backend: str = "xla"
    keep_layer_inputs: bool = False

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
        scanned = nn.scan(
            DecoderLayer,
            variable_axes={"params": 0},
            split_rngs={"params": True},
            in_axes=(0, nn.broadcast),
            length=config.num_layers,
            metadata_params={nn.PARTITION_NAME: axes.LAYERS},
        )
        self.layers = scanned(config, self.dtype, self.attention_backend, self.keep_layer_inputs)

    def embed(self, token_ids_BL: jax.Array) -> jax.Array:
        """[B, L, D] in the computation's dtype."""
        return jnp.take(self.embedding, token_ids_BL, axis=0).astype(self.dtype)

    def logits(self, hidden_BLD: jax.Array) -> jax.Array:
        """[B, L, V] float32."""
        if self.config.tie_embeddings:
            embedding = self.embedding.astype(self.dtype)
            return jnp.einsum("bld,vd->blv", hidden_BLD, embedding, preferred_element_type=jnp.float32)
        return self.head(hidden_BLD)

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
        key_structure, start, sos = structure, None, None
        if cache is not None:
            start, sos = cache.length, cache.sos
            key_structure = jax.tree.map(
                lambda old, new: jax.lax.dynamic_update_slice(old, new, (0, start)), cache.structure, structure
            )
        if config.phantom is not None and sos is None and sos_positions is None:
            sos_positions = jnp.argmax(structure.segment_ids > 0, axis=1)[:, None]
        context = _Context(cosine, sine, structure, key_structure, sos_positions, sos_index, start)
        carry = (x_BLD, None, None) if cache is None else (x_BLD, cache.key, cache.value)
        (x_BLD, key, value), (sos, kept) = self.layers(carry, (jnp.arange(config.num_layers), sos), context)
        if cache is not None:
            length = cache.length + structure.shape[1]
            cache = Cache(key, value, key_structure, length, sos)
        return DecoderOutput(self.final_norm(x_BLD), cache, kept)
