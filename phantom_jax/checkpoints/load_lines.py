"""The lines that load an exported model, in this package and in others."""

import os
import shlex

from phantom_jax.checkpoints.hf_config import FORMATS
from phantom_jax.errors import InputError

LAYOUTS = ("ours", *FORMATS, "peft")

_BASE = "BASE"
# What vLLM can be told; by default it takes adapters up to the second.
_VLLM_RANKS = (8, 16, 32, 64, 128, 256, 320, 512)


def load_lines(layout: str, path: str | os.PathLike[str], *, base: str | None = None) -> list[str]:
    """Lines of Python after which `model` is the model, and `processor` its processor where that is separate.

    Args:
      layout: one of `LAYOUTS`.
      path: the model's folder, or its name on the Hub.
      base: of an adapter, the model that it was trained over, a `llava-hf`; None leaves the word BASE to fill in.

    Raises:
      InputError: there is no such layout.
    """
    _check(layout)
    path = repr(os.fspath(path))
    model = "LlavaForConditionalGeneration"
    if layout == "llava-hf":
        return [
            f"from transformers import AutoProcessor, {model}",
            f"model = {model}.from_pretrained({path}, dtype='auto')",
            f"processor = AutoProcessor.from_pretrained({path})",
        ]
    if layout == "peft":
        under = repr(base or _BASE)
        return [
            "from peft import PeftModel",
            f"from transformers import AutoProcessor, {model}",
            f"base = {model}.from_pretrained({under}, dtype='auto')",
            f"model = PeftModel.from_pretrained(base, {path})",
            f"processor = AutoProcessor.from_pretrained({under})",
        ]
    lines = ["import phantom_jax", f"model = phantom_jax.load({path})"]
    if layout == "llava-original":
        lines += [
            "# or, with the original repository:",
            "# from llava.model.builder import load_pretrained_model",
            f"# tokenizer, model, image_processor, context = load_pretrained_model({path}, None, 'llava')",
        ]
    return lines


def serve_line(
    layout: str, path: str | os.PathLike[str], *, base: str | None = None, rank: int | None = None
) -> str | None:
    """The shell command that serves the model with vLLM; None where vLLM has no such model.

    Args:
      layout, path, base: as of `load_lines`.
      rank: of an adapter; vLLM must be told where it is above 16.

    Raises:
      InputError: there is no such layout.
    """
    _check(layout)
    path = os.fspath(path)
    if layout == "llava-hf":
        return f"vllm serve {shlex.quote(path)}"
    if layout != "peft":
        return None
    name = os.path.basename(os.path.normpath(path)).replace("=", "-")
    line = f"vllm serve {shlex.quote(base or _BASE)} --enable-lora --lora-modules {shlex.quote(f'{name}={path}')}"
    if rank is not None and rank > 16:
        line += f" --max-lora-rank {next((size for size in _VLLM_RANKS if size >= rank), rank)}"
    return line


def _check(layout: str) -> None:
    if layout not in LAYOUTS:
        raise InputError(f"layout {layout!r} does not exist: use one of {', '.join(LAYOUTS)}")
