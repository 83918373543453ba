"""The model folder that a run begins with, `model.weights`."""

import dataclasses
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from phantom_jax.checkpoints import adapter_folder, model_folder
from phantom_jax.checkpoints.hf import Checkpoint
from phantom_jax.config import DEFAULTS
from phantom_jax.data.conversation import describe_template, template_names
from phantom_jax.errors import InputError
from phantom_jax.models import zoo
from phantom_jax.models.vlm import VisionLanguageConfig
from phantom_jax.ops.quantize import QuantizedTensor
from phantom_jax.processor import CONFIG as PROCESSOR
from phantom_jax.processor import Processor
from phantom_jax.sharding.parameters import place_parameters
from phantom_jax.trees import flatten


@dataclasses.dataclass(frozen=True)
class Beginning:
    """A model folder, open; its arrays are read when parameters are loaded.

    Attributes:
      folder: as it was given.
      checkpoint: the model.
      processor: its tokenizer, template and tiles; None where the folder has no tokenizer.
    """

    folder: str
    checkpoint: Checkpoint
    processor: Processor | None

    def load_params(
        self,
        dtype: Callable[[str], Any],
        quantize: Callable[[str, Any], Any],
        sharding: Callable[[str, Any], Any] | None = None,
    ) -> dict[str, Any]:
        """All parameters on devices, one array after another; see `sharding.parameters.place_parameters`."""
        return place_parameters(self.checkpoint.params, sharding, dtype=dtype, quantize=quantize)


def open_weights(settings: Mapping[str, Any], template: str) -> Beginning:
    """Opens the folder that the model section of a config names.

    Where that section also names a model, the folder must hold that one; the number of tokens is the folder's.

    Args:
      settings: `model` of a resolved config.
      template: name of the run's conversation template.

    Raises:
      InputError: there is no model in the folder or another one, it is quantised, or it has another template.
    """
    folder = settings["weights"]
    if adapter_folder.is_adapter(folder):
        raise InputError(
            f"model.weights is {folder!r}, which holds an adapter: merge it with its model (phantom-jax merge), and set"
            " model.weights to what that writes"
        )
    if not Path(folder).is_dir():
        raise InputError(
            f"model.weights is {folder!r}, which is no folder: set it to a model's, or make one there of its parents,"
            f" phantom-jax convert --vision=FOLDER --llm=FOLDER --target={folder} --to=ours"
        )
    remembers = (Path(folder) / PROCESSOR).is_file()
    checkpoint, processor = model_folder.read(folder, template=None if remembers else template)
    if remembers and template not in template_names(processor.template):
        raise InputError(
            f"processor.template is {template!r}, and the model in model.weights, {folder!r}, was trained with"
            f" {describe_template(processor.template)}: set processor.template to that"
        )
    kind = next((leaf.kind for leaf in checkpoint.flat().values() if isinstance(leaf, QuantizedTensor)), None)
    if kind is not None:
        raise InputError(
            f"model.weights is {folder!r}, which is quantised to {kind}: set it to the float model that it was made"
            f" from, and phases[].quantize.kind to {kind}"
        )
    if settings["name"]:
        overrides = {key: value for key, value in settings.items() if key not in DEFAULTS["model"]}
        tokens = checkpoint.config.language_model.vocab_size
        wanted = zoo.get_config(settings["name"], **{**overrides, "vocab_size": tokens})
        _check_same(checkpoint.config, wanted, folder, settings["name"])
    return Beginning(folder, checkpoint, processor)


def _check_same(found: VisionLanguageConfig, wanted: VisionLanguageConfig, folder: str, name: str) -> None:
    if {found.language_model.rope.kind, wanted.language_model.rope.kind} <= {"su", "longrope"}:
        # Two names of one rotation, and its factors come with a checkpoint alone.
        language_model = dataclasses.replace(wanted.language_model, rope=found.language_model.rope)
        wanted = dataclasses.replace(wanted, language_model=language_model)
    theirs, ours = (flatten(dataclasses.asdict(config)) for config in (found, wanted))
    lines = [
        f"  {path.replace('/', '.')} is {theirs.get(path)!r} in the folder and {ours.get(path)!r} in the config"
        for path in sorted(theirs.keys() | ours.keys())
        if theirs.get(path) != ours.get(path)
    ]
    if not lines:
        return
    remedy = "Leave model.name out to take the folder's model, or set model.weights to a folder of that model."
    if found.language_model.phantom is None and wanted.language_model.phantom is not None:
        remedy = (
            "The folder has no phantom dimension: put the model together first, phantom-jax convert --vision=FOLDER"
            " --llm=FOLDER --target=FOLDER, and set model.weights to what that writes."
        )
    raise InputError(
        f"model.weights is {str(Path(folder))!r}, which holds another model than {name!r}:\n"
        + "\n".join(lines)
        + f"\n{remedy}"
    )
