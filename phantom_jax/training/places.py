"""Where everything of a run lies on its mesh: derived once, from shapes and logical names.

Initialisation, step, restore, weights that are read and batches all take their shardings from here.
"""

import functools
import math
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import jax
from flax import linen as nn
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from phantom_jax import axes
from phantom_jax.batch import Batch
from phantom_jax.errors import InputError
from phantom_jax.models.partitioning import Names, Rules, partition, scoped_rules
from phantom_jax.sharding.rules import HEADS_AND_WIDTHS, STRATEGIES, leaf_sharding
from phantom_jax.training.state import TrainState
from phantom_jax.trees import Params, flatten, unflatten


class Places:
    """The places of one run.

    Args:
      mesh: of the run.
      strategy: one of `sharding.rules.STRATEGIES`.
      names: logical axis names of the model's parameters by path; a parameter without names lies whole on every device.
    """

    def __init__(self, mesh: Mesh, strategy: str, names: Mapping[str, Names]):
        self.mesh, self.strategy, self._names = mesh, STRATEGIES[strategy], names
        self.whole = NamedSharding(mesh, PartitionSpec())

    def traced(self, function: Callable) -> Callable:
        """A function whose trace knows the rules of the computation. The mesh must be set around the tracing."""
        rules = scoped_rules(self.strategy.computation, self.strategy.states)

        @functools.wraps(function)
        def under_rules(*args):
            with nn.logical_axis_rules(rules):
                return function(*args)

        return under_rules

    def parameter(self, path: str, leaf: Any) -> Any:
        """The sharding of one parameter; a `QuantizedTensor` of them for one.

        Args:
          path: of the parameter in the model's tree.
          leaf: the parameter, or anything with its shape.
        """
        return leaf_sharding(path, leaf, self._names, self.mesh, self.strategy.parameters)

    def parameters(self, params: Params) -> Params:
        """The shardings of a tree of parameters, or of a part of one."""
        return unflatten({path: self.parameter(path, leaf) for path, leaf in flatten(params).items()})

    def state(self, state: TrainState) -> TrainState:
        """The shardings of a training state, from its shapes: what the optimiser keeps lies beside its parameter."""
        trainable = flatten(state.trainable)

        def beside(path, leaf):
            keys = [str(getattr(key, "key", "")) for key in path]
            for first in range(len(keys)):
                name = "/".join(keys[first:])
                if name in trainable and trainable[name].shape == leaf.shape:
                    return self._state_sharding(name, leaf)
            return self.whole

        return jax.tree.map(lambda _: self.whole, state).replace(
            trainable=self.parameters(state.trainable),
            frozen=self.parameters(state.frozen),
            optimizer_state=jax.tree_util.tree_map_with_path(beside, state.optimizer_state),
        )

    def constrain_gradients(self, gradients: Params) -> Params:
        """Gradients in traced code, put where the optimiser's state of their parameters lies."""
        flat = flatten(gradients)
        places = {path: self._state_sharding(path, leaf) for path, leaf in flat.items()}
        return jax.lax.with_sharding_constraint(gradients, unflatten(places))

    def batch(self, batch: Batch) -> Batch:
        """A batch on the devices, rows over `data` and `fsdp`, tokens over `seq`."""
        tokens = batch["token_ids"].shape

        def sharding(array):
            second = axes.ACTIVATION_LENGTH if array.shape == tokens else None
            names = (axes.ACTIVATION_BATCH, second, *[None] * array.ndim)[: array.ndim]
            return NamedSharding(self.mesh, partition(names, array.shape, self.mesh, self.strategy.computation))

        return jax.device_put(dict(batch), {name: sharding(array) for name, array in batch.items()})

    def _state_sharding(self, path: str, leaf: Any) -> Any:
        return leaf_sharding(path, leaf, self._names, self.mesh, self.strategy.states)

    def remarks(self, params: Params) -> Iterator[str]:
        """Lines for a user: what `tensor` could split if its sizes were other ones, and does not.

        Args:
          params: all parameters, or their shapes.
        """
        tensor = self.mesh.shape["tensor"]
        splittable = {name for name, target in HEADS_AND_WIDTHS if tensor > 1}
        whole = {}
        for path, leaf in flatten(params).items():
            names = self._names.get(path, ())
            if splittable & set(names) and "tensor" not in self.parameter(path, leaf).spec:
                whole[path] = math.prod(leaf.shape)
        if whole:
            largest = max(whole, key=whole.get)
            yield (
                f"{sum(whole.values()):,} parameters are computed whole on each of the {tensor} devices of mesh.tensor,"
                f" which does not divide their widths: {largest}"
                + (f" and {len(whole) - 1} more" if len(whole) > 1 else "")
            )

    def check(self, params: Params) -> None:
        """Refuses a mesh that could not split the model.

        Args:
          params: all parameters, or their shapes.

        Raises:
          InputError: says which axis, and what would do.
        """
        flat = {path: leaf for path, leaf in flatten(params).items() if path in self._names}
        tensor, fsdp = self.mesh.shape["tensor"], self.mesh.shape["fsdp"]
        for path, leaf in flat.items():
            names = self._names[path]
            heads = leaf.shape[names.index(axes.HEADS)] if axes.HEADS in names else tensor
            if heads % tensor:
                raise InputError(
                    f"mesh.tensor is {tensor}, which does not divide the {heads} heads of {path}: set it to a divisor"
                    f" of {heads}."
                )
        places = [self._state_sharding(path, leaf) for path, leaf in flat.items()]
        if places and fsdp > 1 and not any("fsdp" in place.spec for place in places):
            raise InputError(
                f"mesh.fsdp is {fsdp}, which divides no axis of any parameter: set it to a number that divides the"
                " model's width, or set mesh.data instead."
            )


def check_mesh(config: Mapping[str, Any], mesh: Mesh) -> None:
    """Refuses a config whose rows or tokens the mesh does not divide, or whose strategy leaves an axis idle.

    Args:
      config: resolved.
      mesh: that it asks for.

    Raises:
      InputError: says which key, and what would do.
    """
    size, name = mesh.shape, config["mesh"]["strategy"]
    strategy = STRATEGIES[name]
    for axis, rules in (("tensor", strategy.parameters), ("fsdp", strategy.states)):
        if size[axis] > 1 and not _splits(rules, axis):
            able = [other for other, one in STRATEGIES.items() if _splits(one.states, axis)]
            able = [other for other in able if size["tensor"] == 1 or _splits(STRATEGIES[other].parameters, "tensor")]
            raise InputError(
                f"mesh.{axis} is {size[axis]}, but mesh.strategy {name!r} splits no parameter over it: set mesh.{axis}"
                f" to 1, or mesh.strategy to {' or '.join(map(repr, able))}."
            )
    ways = size["data"] * size["fsdp"]
    shown = f"mesh.data x mesh.fsdp, {size['data']} x {size['fsdp']}"
    for index, phase in enumerate(config["phases"]):
        rows, parts = phase["batch_size"], phase["accumulation"]
        if rows // parts % ways:
            fewer = [part for part in range(parts - 1, 0, -1) if not rows % part and not rows // part % ways]
            least = parts * ways
            raise InputError(
                f"phases[{index}].batch_size / accumulation is {rows} / {parts}, {rows // parts} rows, which"
                f" {shown}, does not divide: set "
                + (
                    f"accumulation to {fewer[0]}, which takes more memory and changes no result."
                    if fewer
                    else f"batch_size to a multiple of {least}, {least * -(-rows // least)} for instance."
                )
            )
    validation = config["validation"]
    if validation["every"] and validation["batch_size"] % ways:
        raise InputError(
            f"validation.batch_size is {validation['batch_size']}, which {shown}, does not divide: set it to a"
            f" multiple of {ways}, {ways * -(-validation['batch_size'] // ways)} for instance."
        )
    length = config["processor"]["max_length"]
    if length % size["seq"]:
        raise InputError(
            f"processor.max_length is {length}, which mesh.seq, {size['seq']}, does not divide: set it to"
            f" {size['seq'] * -(-length // size['seq'])} for instance."
        )


def _splits(rules: Rules, axis: str) -> bool:
    return any(target == axis for _, target in rules)
