"""The vision-language model: vision tower, projector and decoder behind one batch."""

import dataclasses
import functools
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
from flax import linen as nn

from phantom_jax import axes
from phantom_jax.models.cache import Cache
from phantom_jax.models.decoder import Decoder, DecoderConfig, DecoderOutput
from phantom_jax.models.partitioning import constrain
from phantom_jax.models.projector import Projector, ProjectorConfig
from phantom_jax.models.unfold import fold, unfold
from phantom_jax.models.vision_tower import VisionTower, VisionTowerConfig
from phantom_jax.ops.structure import Structure


@dataclasses.dataclass(frozen=True)
class VisionLanguageConfig:
    """The three parts; the projector joins the other two.

    Attributes:
      vision_tower, projector, language_model: the parts.
    """

    vision_tower: VisionTowerConfig
    projector: ProjectorConfig
    language_model: DecoderConfig

    def __post_init__(self):
        vision, projector, decoder = self.vision_tower, self.projector, self.language_model
        if (projector.vision_dim, projector.embed_dim) != (vision.embed_dim, decoder.embed_dim):
            raise ValueError(
                f"the projector maps {projector.vision_dim} to {projector.embed_dim}, but the vision tower is "
                f"{vision.embed_dim} and the decoder {decoder.embed_dim} wide"
            )
        if projector.kind == "pixel_shuffle" and vision.grid % projector.shuffle:
            raise ValueError(
                f"{vision.grid} x {vision.grid} patches of an image do not divide by {projector.shuffle} x "
                f"{projector.shuffle}, which the projector joins"
            )

    @property
    def tokens_per_tile(self) -> int:
        """Image tokens that one tile of the tower's own size becomes."""
        return (self.vision_tower.grid // self.projector.shuffle) ** 2


@functools.partial(jax.tree_util.register_dataclass, data_fields=["log_probs", "correct"], meta_fields=[])
@dataclasses.dataclass(frozen=True)
class TokenScores:
    """How the model sees each target of a batch.

    Attributes:
      log_probs: [B, L] float32 log-probability of the target, 0 where there is none.
      correct: [B, L] bool, whether the target is the most likely token; True where there is none.
    """

    log_probs: jax.Array
    correct: jax.Array


class VisionLanguageModel(nn.Module):
    """Reads the fields of `phantom_jax.batch.Batch`; pixels are float and normalised here.

    Attributes:
      config: the three parts.
      dtype: of the computation; parameters keep their own.
      attention_backend: of tower and decoder, see `ops.attention`.
      keep_layer_inputs: whether `hidden_states` also returns the input of every decoder layer.
      scan_layers: of the decoder; only False has a cache.
      remat: of tower and scanned decoder, see `models.remat`.
    """

    config: VisionLanguageConfig
    dtype: Any = jnp.float32
    attention_backend: str = "xla"
    keep_layer_inputs: bool = False
    scan_layers: bool = True
    remat: str = "none"

    def setup(self):
        config = self.config
        self.vision_tower = VisionTower(config.vision_tower, self.dtype, self.attention_backend, self.remat)
        self.projector = Projector(config.projector, self.dtype)
        self.language_model = Decoder(
            config.language_model,
            self.dtype,
            self.attention_backend,
            self.keep_layer_inputs,
            self.scan_layers,
            self.remat,
        )

    def image_features(self, pixels_BIHWC: jax.Array) -> jax.Array:
        """Image tokens [B, I * P, D] of the tiles [B, I, H, W, 3] of each row."""
        batch, tiles, *image = pixels_BIHWC.shape
        features = self.vision_tower(pixels_BIHWC.reshape(batch * tiles, *image))
        features = self.projector(features[:, 1:])
        features = features.reshape(batch, -1, features.shape[-1])
        # Any token of a row may be any image token of it.
        return constrain(features, (axes.ACTIVATION_BATCH, None, axes.ACTIVATION_EMBED))

    def hidden_states(
        self,
        batch: Mapping[str, jax.Array],
        *,
        rope_length: int,
        cache: Cache | None = None,
        features: jax.Array | None = None,
    ) -> DecoderOutput:
        """Runs the decoder over a batch.

        Args:
          batch: `token_ids`, `positions`, `segment_ids`; with images also `pixels` and `image_slots`; `branch_ids`
            where there are branches, and `unfolded` where attention shall not see them.
          rope_length: longest single conversation, static.
          cache: of the tokens before these, for decoding.
          features: [B, F, D], what `image_features` gave for the pixels, where it was called before.

        Returns:
          `DecoderOutput`.
        """
        token_ids = batch["token_ids"]
        branch_ids = batch.get("branch_ids")
        if branch_ids is None:
            branch_ids = jnp.zeros_like(token_ids)
        x_BLD = self.language_model.embed(token_ids)
        if "pixels" in batch:
            features = self.image_features(batch["pixels"])
        if features is not None:
            slots = batch["image_slots"][:, :, None]
            x_BLD = jnp.where(slots >= 0, jnp.take_along_axis(features, jnp.maximum(slots, 0), axis=1), x_BLD)
        structure = Structure(batch["positions"], batch["segment_ids"], branch_ids)
        if "unfolded" in batch:
            if cache is not None:
                raise ValueError("unfolded rows have no cache: a cache holds rows as they are")
            x, structure = unfold(x_BLD, structure, batch["unfolded"])
            output = self.language_model(x, structure, rope_length=rope_length)
            back = functools.partial(fold, index_BCU=batch["unfolded"], length=x_BLD.shape[1])
            return DecoderOutput(back(output.hidden), None, jax.tree.map(jax.vmap(back), output.layer_inputs))
        return self.language_model(x_BLD, structure, rope_length=rope_length, cache=cache)

    def logits(self, hidden_BLD: jax.Array) -> jax.Array:
        """[B, L, V] float32."""
        return self.language_model.logits(hidden_BLD)

    def __call__(self, batch: Mapping[str, jax.Array], *, rope_length: int) -> jax.Array:
        """Logits [B, L, V] float32 of a whole batch."""
        return self.logits(self.hidden_states(batch, rope_length=rope_length).hidden)

    def score(self, batch: Mapping[str, jax.Array], *, rope_length: int) -> TokenScores:
        """Log-probability and correctness of every target of the batch."""
        hidden_BLD = self.hidden_states(batch, rope_length=rope_length).hidden
        return TokenScores(*self.language_model.target_scores(hidden_BLD, batch["targets"]))


# Initialisation takes a third of a second to trace, and many ask.
@functools.lru_cache(maxsize=64)
def abstract_parameters(model: VisionLanguageModel) -> Any:
    """Shapes (float32) and logical axis names of all parameters, `nn.Partitioned` boxes; nothing is allocated."""
    size = model.config.vision_tower.image_size
    names = ("token_ids", "positions", "segment_ids", "image_slots", "targets")
    batch = {name: jax.ShapeDtypeStruct((1, 1), jnp.int32) for name in names}
    batch["pixels"] = jax.ShapeDtypeStruct((1, 1, size, size, 3), jnp.float32)
    init = functools.partial(model.init, rope_length=1, method="score")
    return jax.eval_shape(init, jax.random.key(0), batch)["params"]
