"""A phase of a run without its data and weights: the shapes it works on, and its step to be traced.

Nothing is read, allocated or computed, so the largest model takes as long as the smallest. The state and the step are
those of the trainer, since both come from `Phase`.
"""

import dataclasses
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp

from phantom_jax.batch import Batch
from phantom_jax.sharding.mesh import make_mesh
from phantom_jax.training.division import divide
from phantom_jax.training.phase import Phase
from phantom_jax.training.places import Places
from phantom_jax.training.state import TrainState
from phantom_jax.training.task import check_tile_size, make_model_config, model_task, resolve_image_mode
from phantom_jax.trees import flatten


@dataclasses.dataclass(frozen=True)
class AbstractPhase:
    """A phase in shapes; arrays are `jax.ShapeDtypeStruct`.

    Attributes:
      state: before the first step.
      batch: the rows of a step, see `abstract_batch`.
      phase: the trainer's own.
      mesh: that the step is split over.
    """

    state: TrainState
    batch: Batch
    phase: Phase
    mesh: jax.sharding.Mesh

    def trace(self) -> jax.stages.Traced:
        """The step `(state, batch) -> (state, metrics)`: `out_info` has the shapes it gives, `lower()` the program."""
        with jax.set_mesh(self.mesh):
            return self.phase.trace_step(self.batch)


def abstract_phase(config: Mapping[str, Any], index: int, mesh: jax.sharding.Mesh | None = None) -> AbstractPhase:
    """A phase of a config.

    Args:
      config: a resolved config, see `phantom_jax.config.resolve`. Its `model.weights` and `data` are not read.
      index: of the phase.
      mesh: that the step is split over; None is one device, whatever the config says.

    Raises:
      InputError: the model does not exist, a pattern matches nothing, or tiles do not fit the tower.
    """
    model = make_model_config(config["model"])
    check_tile_size(config["processor"], model)
    task = model_task(config, model)
    shapes = jax.eval_shape(task.init_params, jax.random.key(0))
    mesh = mesh or make_mesh({})
    places = Places(mesh, config["mesh"]["strategy"], task.parameter_names)
    places.check(shapes)
    division = divide(config["phases"], list(flatten(shapes)))[index]
    phase = Phase(config, index, task, shapes, division, places, say=lambda line: None)
    return AbstractPhase(phase.abstract_state(), abstract_batch(config, index, model), phase, mesh)


def abstract_batch(config: Mapping[str, Any], index: int, model: Any) -> Batch:
    """The largest rows that the config allows: `processor.max_length` tokens, and tiles of one image.

    An image of several tiles has its thumbnail beside them.

    Args:
      config: a resolved config.
      index: of the phase.
      model: its `VisionLanguageConfig`.
    """
    phase, processor = config["phases"][index], config["processor"]
    rows, length, size = phase["batch_size"], processor["max_length"], model.vision_tower.image_size
    tiled = resolve_image_mode(phase["data"]["image_mode"], model) == "tiles"
    most = processor["max_tiles"] if tiled else 1
    tokens = jax.ShapeDtypeStruct((rows, length), jnp.int32)
    return Batch(
        token_ids=tokens,
        positions=tokens,
        segment_ids=tokens,
        branch_ids=tokens,
        image_slots=tokens,
        targets=tokens,
        sft_mask=jax.ShapeDtypeStruct((rows, length), jnp.bool),
        answer_slots=tokens,
        pixels=jax.ShapeDtypeStruct((rows, most + (most > 1), size, size, 3), jnp.uint8),
        row_ids=jax.ShapeDtypeStruct((rows,), jnp.int32),
    )
