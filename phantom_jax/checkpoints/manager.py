"""Training checkpoints with Orbax: written in the background, the last few kept.

A checkpoint is a folder named by its global step with three items: `state` (arrays, nested dictionaries of them),
`data` (where the data iterator stands) and `meta` (progress and config), the latter two as JSON. It is either complete
or absent: Orbax writes to a temporary folder and renames it. Leftovers of a killed run go when the next one saves.
"""

import contextlib
import dataclasses
import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, TypeVar

import flax.serialization
import jax
import orbax.checkpoint as ocp

from phantom_jax.errors import InputError
from phantom_jax.ops.quantize import QuantizedTensor

State = TypeVar("State")


def _kernel_to_dict(kernel: QuantizedTensor) -> dict[str, Any]:
    arrays = {name: getattr(kernel, name) for name in ("codes", "scales", "block_codes", "block_mean")}
    return {name: array for name, array in arrays.items() if array is not None}


# What is no array, kind and sizes of a quantised kernel, follows from the config.
flax.serialization.register_serialization_state(
    QuantizedTensor, _kernel_to_dict, lambda kernel, arrays: dataclasses.replace(kernel, **arrays)
)


def open_manager(directory: str | Path, *, keep: int) -> ocp.CheckpointManager:
    """Opens, or makes, a folder of checkpoints. Close the manager: that waits for what is still being written.

    Args:
      directory: the folder.
      keep: how many of the latest checkpoints stay.
    """
    options = ocp.CheckpointManagerOptions(max_to_keep=keep, cleanup_tmp_directories=True)
    handlers = {
        "state": ocp.StandardCheckpointHandler(),
        "data": ocp.JsonCheckpointHandler(),
        "meta": ocp.JsonCheckpointHandler(),
    }
    return ocp.CheckpointManager(Path(directory).absolute(), options=options, item_handlers=handlers)


def save(manager: ocp.CheckpointManager, step: int, *, state: Any, data: Any, meta: Mapping[str, Any]) -> None:
    """Saves one checkpoint. Returns once the arrays are copied from the device; writing goes on in the background.

    Args:
      manager: from `open_manager`.
      step: global step. A step that is saved already stays as it is.
      state: a flax struct of arrays, nested dictionaries and tuples.
      data: JSON values, the data iterator's state.
      meta: JSON values.
    """
    if step in manager.all_steps():
        return
    items = ocp.args.Composite(
        state=ocp.args.StandardSave(flax.serialization.to_state_dict(state)),
        data=ocp.args.JsonSave({"iterator": data}),
        meta=ocp.args.JsonSave(dict(meta)),
    )
    manager.save(step, args=items, force=True)


def restore_meta(manager: ocp.CheckpointManager, step: int) -> tuple[Any, dict[str, Any]]:
    """The items `data` and `meta` of a checkpoint: enough to know which state to ask for."""
    items = ocp.args.Composite(data=ocp.args.JsonRestore(), meta=ocp.args.JsonRestore())
    with _readable(manager, step):
        restored = manager.restore(step, args=items)
        return restored["data"]["iterator"], restored["meta"]


def restore_state(manager: ocp.CheckpointManager, step: int, abstract_state: State) -> State:
    """The arrays of a checkpoint, read straight into their places.

    Args:
      manager: from `open_manager`.
      step: one of its steps.
      abstract_state: the state's structure with `jax.ShapeDtypeStruct` leaves that carry shardings.

    Raises:
      InputError: if arrays are missing, left over or of another shape or type; lists them.
    """
    wanted = flax.serialization.to_state_dict(abstract_state)
    with _readable(manager, step):
        _check(wanted, manager.item_metadata(step)["state"], manager.directory / str(step))
        items = ocp.args.Composite(state=ocp.args.StandardRestore(wanted))
        return flax.serialization.from_state_dict(abstract_state, manager.restore(step, args=items)["state"])


@contextlib.contextmanager
def _readable(manager: ocp.CheckpointManager, step: int) -> Iterator[None]:
    """Turns what Orbax and TensorStore raise about damaged files into one clear error."""
    try:
        yield
    except (InputError, MemoryError, jax.errors.JaxRuntimeError):
        # Too little memory says nothing about the files.
        raise
    # Orbax raises bare `Exception` where an array cannot be read.
    except Exception as error:
        folder = manager.directory / str(step)
        said = str(error).strip().splitlines() or [type(error).__name__]
        raise InputError(
            f"Checkpoint {folder} cannot be read, it may be damaged ({said[0][:200]}). If so, delete that folder to"
            " go on from the one before it."
        ) from error


def _check(wanted: Any, found: Any, where: Any) -> None:
    wanted, found = _signatures(wanted), _signatures(getattr(found, "tree", found))
    problems = [
        ("missing", [f"{path} {wanted[path]}" for path in wanted if path not in found]),
        ("not part of this state", [f"{path} {found[path]}" for path in found if path not in wanted]),
        (
            "of another shape or type",
            [
                f"{path} is {found[path]}, wanted {wanted[path]}"
                for path in wanted
                if path in found and found[path] != wanted[path]
            ],
        ),
    ]
    lines = []
    for what, entries in problems:
        if entries:
            lines.append(f"  {len(entries)} {what}: {', '.join(entries)}")
    if lines:
        raise InputError(
            f"Checkpoint {where} does not hold the state that this config trains:\n"
            + "\n".join(lines)
            + "\nTrain with the config and the version that wrote it, or in a new workdir."
        )


def _signatures(tree: Any) -> dict[str, str]:
    leaves = jax.tree_util.tree_flatten_with_path(tree, is_leaf=lambda node: hasattr(node, "shape"))[0]
    return {
        re.sub(r"/+", "/", jax.tree_util.keystr(path, simple=True, separator="/")): _signature(leaf)
        for path, leaf in leaves
        if hasattr(leaf, "shape")
    }


def _signature(leaf: Any) -> str:
    return f"{jax.numpy.dtype(leaf.dtype).name}[{','.join(map(str, leaf.shape))}]"
