"""The library in three lines: `load(path)`, `handle.generate(...)`, `save(handle, path, format=...)`."""

import dataclasses
import os
import pathlib
import shutil
import tempfile
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from phantom_jax.checkpoints import hf, native
from phantom_jax.checkpoints.hf import Checkpoint
from phantom_jax.checkpoints.hf_config import FORMATS, publish
from phantom_jax.checkpoints.hf_processor import load_processor
from phantom_jax.errors import InputError
from phantom_jax.generation.decode import greedy
from phantom_jax.models.vlm import VisionLanguageModel
from phantom_jax.ops.image import normalize_pixels
from phantom_jax.ops.rope import canonical_length
from phantom_jax.processor import Processor, pad_prompts

# Prompts are padded to a multiple, so that prompts of similar length share one compiled program.
_LENGTH_BUCKET = 64
_NEW_TOKENS = 64


@dataclasses.dataclass
class VisionLanguage:
    """A model with its weights and everything around it.

    Attributes:
      model: the Linen module, in its compute dtype.
      params: nested dict of arrays.
      processor: tokenizer, template and tiles; None where the folder holds none.
      checkpoint: the same weights with what `save` needs besides them.
    """

    model: VisionLanguageModel
    processor: Processor | None
    checkpoint: Checkpoint

    @property
    def params(self) -> Any:
        return self.checkpoint.params

    def generate(
        self, prompt: str | Sequence[str], *, images: Sequence[Any] = (), max_new_tokens: int | None = None
    ) -> str | list[str]:
        """Answers one question, or several at once; greedy.

        Args:
          prompt: a question, or a list of them. `<image>` says where an image stands; without it, images come first.
          images: paths, encoded bytes or open images; for a list of questions, a list of such lists.
          max_new_tokens: longest answer in tokens, its end marker included; by default 64, or what the context leaves.

        Returns:
          The answer, or one for each question.

        Raises:
          InputError: an image cannot be read, marks and images do not fit, or the prompt leaves no room in the context.
        """
        if isinstance(images, str | bytes | os.PathLike):
            raise InputError("images is one image: give a list of them, images=[path] for instance")
        if isinstance(prompt, str):
            return self.generate([prompt], images=[images], max_new_tokens=max_new_tokens)[0]
        if not isinstance(prompt, list | tuple):
            raise InputError(f"prompt is {type(prompt).__name__}: give a question, or a list of questions")
        if not prompt:
            return []
        processor = self._processor()
        if len(images) not in (0, len(prompt)):
            raise InputError(f"{len(prompt)} prompts need as many lists of images, got {len(images)}")
        prompts = [
            processor.encode_prompt(text, paths)
            for text, paths in zip(prompt, images or [()] * len(prompt), strict=True)
        ]
        longest = max(len(item.token_ids) for item in prompts)
        room = processor.max_length - longest
        if room < (max_new_tokens or 1):
            raise InputError(
                f"a prompt of {longest} tokens leaves {room} of the context's {processor.max_length} for the answer: "
                f"shorten the prompt" + (f", or set max_new_tokens={max_new_tokens} to at most {room}" if room else "")
            )
        max_new_tokens = max_new_tokens or min(_NEW_TOKENS, room)
        length = min(-(-longest // _LENGTH_BUCKET) * _LENGTH_BUCKET, processor.max_length)
        batch = dict(pad_prompts(prompts, pad_id=processor.pad_id, length=length))
        pixels = batch.pop("pixels")
        if pixels.shape[1]:
            batch["pixels"] = normalize_pixels(jax.device_put(pixels), processor.mean, processor.std)
        tokens = greedy(
            self.model,
            self.params,
            batch,
            max_new_tokens=max_new_tokens,
            eos_ids=tuple(sorted({*self.checkpoint.tokens.eos, processor.end_id})),
            pad_id=processor.pad_id,
            rope_length=canonical_length(self.checkpoint.config.language_model.rope, longest + max_new_tokens),
        )
        return [processor.decode(row) for row in np.asarray(tokens)]

    def _processor(self) -> Processor:
        if self.processor is None:
            raise InputError("the model has no tokenizer: load a folder with processor_config.json and tokenizer files")
        return self.processor


def load(path: str | os.PathLike[str], *, dtype: Any = None, template: str | None = None) -> VisionLanguage:
    """Loads a model folder, ours or a Hugging Face one; the layout is recognised by its content.

    Args:
      path: the folder.
      dtype: of the computation; by default that of the embedding as stored, bfloat16 for float16.
      template: name of the conversation template; by default the one that was saved with the model, for a published
        Phantom that of its language model, for a published LLaVA `vicuna_v1`.

    Raises:
      InputError: there is no model in the folder, it is not complete, or there is no such template.
    """
    directory = pathlib.Path(path)
    if not directory.is_dir():
        raise InputError(f"there is no model folder {str(path)!r}: give one with {native.CONFIG} or config.json")
    if (directory / native.CONFIG).is_file():
        checkpoint = native.load(directory)
    elif (directory / "config.json").is_file() and "phases" in hf.read_json(directory / "config.json"):
        raise InputError(
            f"{directory} is the workdir of a training run, it is no model folder: take {directory / 'model'}, which "
            f"appears when all phases are done, or one of {directory / 'models'}"
        )
    elif (directory / "config.json").is_file():
        checkpoint = hf.load(directory)
        checkpoint.params = jax.tree.map(jax.device_put, checkpoint.params)
    else:
        raise InputError(f"{directory} holds neither {native.CONFIG} nor config.json: it is no model folder")
    processor = load_processor(directory, checkpoint.config, checkpoint.published, checkpoint.tokens, template=template)
    if dtype is None:
        stored = checkpoint.params["language_model"]["embedding"].dtype
        # float16 overflows where these models were trained in bfloat16.
        dtype = jnp.bfloat16 if stored == jnp.float16 else stored
    return VisionLanguage(VisionLanguageModel(checkpoint.config, dtype), processor, checkpoint)


def save(handle: VisionLanguage, path: str | os.PathLike[str], *, format: str = "ours") -> None:
    """Writes a model folder; it appears complete or not at all.

    Args:
      handle: what to write.
      path: a new or empty folder.
      format: `ours`, `phantom`, `llava-hf` or `llava-original`.

    Raises:
      InputError: the folder holds something, or the format cannot express the model.
    """
    target = pathlib.Path(path)
    if target.exists() and (not target.is_dir() or any(target.iterdir())):
        raise InputError(f"{str(path)!r} exists and is not an empty folder: nothing was written, choose a new one")
    if format != "ours" and format not in FORMATS:
        raise InputError(f"format {format!r} does not exist: use ours, {', '.join(FORMATS)}")
    target.parent.mkdir(parents=True, exist_ok=True)
    scratch = pathlib.Path(tempfile.mkdtemp(prefix=f".{target.name}.", dir=target.parent))
    try:
        if format == "ours":
            native.save(handle.checkpoint, scratch)
        else:
            hf.save(_as_format(handle.checkpoint, format), scratch)
        if handle.processor is not None:
            handle.processor.save(scratch)
        if target.exists():
            target.rmdir()
        scratch.chmod(0o755)
        scratch.rename(target)
    except BaseException:
        shutil.rmtree(scratch, ignore_errors=True)
        raise


def _as_format(checkpoint: Checkpoint, layout: str) -> Checkpoint:
    """The checkpoint under a layout's names; what another layout's config said besides is left behind."""
    if checkpoint.published.format == layout:
        return checkpoint
    return dataclasses.replace(checkpoint, published=publish(checkpoint.config, layout))
