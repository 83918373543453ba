"""The weights of a folder, or one file of them, in safetensors or pickled."""

import pathlib
from collections.abc import Callable

from phantom_jax.checkpoints import pickled
from phantom_jax.checkpoints.tensor_files import INDEX, WEIGHTS, TensorFiles
from phantom_jax.errors import InputError

OpenTensors = Callable[[pathlib.Path], TensorFiles]
"""Opens the weights of a folder, or one file of them."""


def open_tensors(path: pathlib.Path, scratch: pathlib.Path | None = None) -> TensorFiles:
    """Opens the weights of a folder, or one file of them; pickled ones go to `scratch` as safetensors first.

    Raises:
      InputError: there are none, they are damaged, or they are pickled and there is no scratch folder.
    """
    if path.is_dir():
        pickles = pickled.weight_files(path)
        if (path / WEIGHTS).is_file() or (path / INDEX).is_file() or not pickles:
            return TensorFiles.of_folder(path)
    elif path.suffix == ".safetensors":
        return TensorFiles([path])
    elif path.suffix in (".bin", ".pt", ".pth"):
        pickles = [path]
    else:
        raise InputError(f"{path} is no folder, no .safetensors file and no .bin file")
    if scratch is None:
        raise InputError(f"{path}: {pickled.NOT_ALLOWED}")
    place = scratch / str(len(list(scratch.iterdir())))
    place.mkdir()
    return TensorFiles(pickled.to_safetensors(pickles, place))
