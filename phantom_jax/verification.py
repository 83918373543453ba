"""Whether a model that was written is the model that was read: bytes, logits of transformers, an answer."""

import hashlib
import importlib.util
import pathlib
from collections.abc import Mapping
from typing import Any

import numpy as np

from phantom_jax import pretrained
from phantom_jax.checkpoints import hf, hf_config, model_folder
from phantom_jax.checkpoints.arrays import contiguous
from phantom_jax.checkpoints.hf import Checkpoint
from phantom_jax.checkpoints.quantized import blocks, split_fields
from phantom_jax.checkpoints.tensor_files import INDEX, WEIGHTS
from phantom_jax.errors import Mismatch
from phantom_jax.json_files import read_json
from phantom_jax.processor import Processor

_BLOCK_BYTES = 1 << 26
# Of two logits computed in float32 in another order, as a share of the spread of all.
_TOLERANCE = 0.02


def verify(checkpoint: Checkpoint, target: pathlib.Path, *, source: str | None) -> list[str]:
    """Reads back what was written.

    Every array is compared, bit by bit. Where the target or the source is a `llava-hf`, transformers computes its
    logits too, in float32 as we do; where it is a Phantom, which transformers cannot load, an answer is printed for the
    eye.

    Args:
      checkpoint: what was to be written, as it is read from the source.
      target: folder that was written.
      source: folder that was read, if it was one.

    Returns:
      Lines that say what was found.

    Raises:
      Mismatch: an array or a logit differs.
    """
    written, processor = _read(target, checkpoint)
    differing = differences(checkpoint.flat(), written.flat())
    if written.config != checkpoint.config:
        differing.append(f"the config is {written.config} and not {checkpoint.config}")
    if differing:
        raise Mismatch(f"what was written reads back differently, so it was removed: {'; '.join(differing)}")
    arrays, _ = split_fields(written.flat())
    lines = [f"read back: {len(arrays)} arrays, {written.size:,} parameters, all equal; sha256 {digest(arrays)[:16]}"]
    if _in_transformers(target):
        lines.append(_against_transformers(target, target, judge=True))
    elif source is not None and _in_transformers(pathlib.Path(source)):
        # Fewer bits and other rows of tokens give other logits; by how much is worth knowing.
        same = all(entry.action != "transformed" for entry in checkpoint.entries)
        lines.append(_against_transformers(pathlib.Path(source), target, judge=same))
    if written.config.language_model.phantom is not None:
        if processor is None:
            lines.append("no answer: the folder has no tokenizer")
        else:
            model = pretrained.load(target)
            question = "What is in the image?"
            image = _image(model.processor.tile_size)
            lines.append(f"{question} {model.generate(question, images=[image], max_new_tokens=32)!r}")
    return lines


def _read(target: pathlib.Path, checkpoint: Checkpoint) -> tuple[Checkpoint, Processor | None]:
    if model_folder.is_ours(target) or checkpoint.published.tower_inside:
        return model_folder.read(target)
    # The folder leaves the tower out, which has nothing to be compared with.
    tower = {path: array for path, array in checkpoint.flat().items() if "/vision_tower/" in path}
    return hf.load(target, tower=(checkpoint.config.vision_tower, tower)), None


def differences(left: Mapping[str, Any], right: Mapping[str, Any]) -> list[str]:
    """Which of two sets of arrays by name differ in presence, shape, dtype or any bit; empty when none."""
    left, right = split_fields(left)[0], split_fields(right)[0]
    found = [f"{name} is on one side only" for name in sorted(left.keys() ^ right.keys())]
    alike = {}
    for name in sorted(left.keys() & right.keys()):
        first, second = left[name], right[name]
        if (first.shape, first.dtype) == (second.shape, second.dtype):
            alike[name] = first
        else:
            found.append(f"{name} is {first.dtype}{list(first.shape)} and {second.dtype}{list(second.shape)}")
    other: list[str] = []
    for name, box in blocks(alike, _BLOCK_BYTES):
        if name not in other and np.asarray(left[name][box]).tobytes() != np.asarray(right[name][box]).tobytes():
            other.append(name)
    return found + [f"{name} has other values" for name in other]


def digest(arrays: Mapping[str, Any]) -> str:
    """sha256 of names, shapes, dtypes and bytes, in the order of the names and of each array's layers."""
    total = hashlib.sha256()
    for name in sorted(arrays):
        array = arrays[name]
        total.update(f"{name} {list(array.shape)} {np.dtype(array.dtype)}\n".encode())
        if not array.ndim:
            total.update(np.asarray(array).tobytes())
            continue
        # Along the first axis, whatever order the array is stored in: the same numbers give the same digest.
        step = max(_BLOCK_BYTES * len(array) // max(array.nbytes, 1), 1)
        for start in range(0, len(array), step):
            total.update(contiguous(np.asarray(array[start : start + step])).tobytes())
    return total.hexdigest()


def _in_transformers(folder: pathlib.Path) -> bool:
    """Whether transformers can load a folder, without unpickling anything."""
    if not (folder / "config.json").is_file() or model_folder.is_ours(folder):
        return False
    held = any((folder / name).is_file() for name in (WEIGHTS, INDEX))
    return held and hf_config.detect_format(read_json(folder / "config.json")) == "llava-hf"


def _image(size: int) -> Any:
    from PIL import Image

    across, down = np.meshgrid(np.linspace(0, 255, size), np.linspace(0, 255, size))
    return Image.fromarray(np.stack([across, down, 255 - across], axis=-1).astype(np.uint8))


def _against_transformers(folder: pathlib.Path, target: pathlib.Path, *, judge: bool) -> str:
    """Compares logits of a prompt with an image: transformers' of `folder`, ours of `target`, all in float32.

    Raises:
      Mismatch: they differ by more than rounding does, and are to be judged.
    """
    if importlib.util.find_spec("torch") is None:
        return "logits not compared with transformers: PyTorch is not there, pip install torch"
    import jax.numpy as jnp
    import torch
    import transformers

    model = pretrained.load(target, dtype=jnp.float32)
    config = model.model.config
    transformers.utils.logging.disable_progress_bar()
    theirs = transformers.LlavaForConditionalGeneration.from_pretrained(
        folder, dtype=torch.float32, use_safetensors=True
    )
    count = config.tokens_per_tile
    image_id = theirs.config.image_token_index
    rng = np.random.default_rng(0)
    words = rng.integers(3, min(image_id, config.language_model.vocab_size) - 1, 24)
    ids = np.concatenate([words[:4], np.full(count, image_id), words[4:]])[None]
    size = config.vision_tower.image_size
    pixels = rng.standard_normal((1, size, size, 3)).astype(np.float32)
    with torch.no_grad():
        output = theirs(
            input_ids=torch.tensor(ids),
            pixel_values=torch.tensor(pixels.transpose(0, 3, 1, 2)),
        )
    length = ids.shape[1]
    slots = np.full(length, -1)
    slots[4 : 4 + count] = np.arange(count)
    batch = {
        "token_ids": jnp.asarray(np.where(slots >= 0, 0, ids[0])[None]),
        "positions": jnp.arange(length)[None],
        "segment_ids": jnp.ones((1, length), jnp.int32),
        "pixels": jnp.asarray(pixels)[None],
        "image_slots": jnp.asarray(slots)[None],
    }
    ours = model.model.apply({"params": model.params}, batch, rope_length=length)
    words_only = slots < 0
    ours = np.asarray(ours, np.float32)[0, words_only]
    reference = output.logits.numpy()[0, words_only, : ours.shape[-1]]
    ours = ours[:, : reference.shape[-1]]
    worst, same = np.abs(ours - reference).max(), int((ours.argmax(-1) == reference.argmax(-1)).sum())
    said = f"logits of {len(ours)} tokens against transformers: largest difference {worst:.2g}, {same} likeliest equal"
    if judge and not worst <= _TOLERANCE * float(reference.std()):
        raise Mismatch(f"{said}; that is more than rounding explains, so nothing was kept")
    return said
