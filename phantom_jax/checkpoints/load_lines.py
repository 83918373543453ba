"""The lines that load what was exported, in this package and in others."""

import os
import shlex

from phantom_jax.checkpoints.native import CONFIG
from phantom_jax.layouts import MODEL_LAYOUTS, check_name

_BASE = "BASE"
_LLAVA = "LlavaForConditionalGeneration"


def load_lines(layout: str, path: str | os.PathLike[str]) -> list[str]:
    """Lines of Python after which `model` is the model, and `processor` its processor where that is separate.

    Args:
      layout: one of `layouts.MODEL_LAYOUTS`.
      path: the model's folder, or its name on the Hub.

    Raises:
      InputError: there is no such layout.
    """
    check_name("layout", layout, MODEL_LAYOUTS)
    path = repr(os.fspath(path))
    if layout == "llava-hf":
        return [
            f"from transformers import AutoProcessor, {_LLAVA}",
            f"model = {_LLAVA}.from_pretrained({path}, dtype='auto')",
            f"processor = AutoProcessor.from_pretrained({path})",
        ]
    lines = ["import phantom_jax", f"model = phantom_jax.load({path})"]
    if layout == "llava-original":
        lines += [
            "# or, with the original repository:",
            "# from llava.model.builder import load_pretrained_model",
            f"# tokenizer, model, image_processor, context = load_pretrained_model({path}, None, 'llava')",
        ]
    return lines


def adapter_lines(base_layout: str, path: str | os.PathLike[str], *, base: str | None = None) -> list[str]:
    """Lines of Python after which `model` is a model with an adapter; over a `llava-hf`, also those for PEFT.

    LLaVA's own code names a language model as the base of its adapters: unless the base is a folder of ours, the model
    is put together first.

    Args:
      base_layout: that of the model, one of `layouts.MODEL_LAYOUTS`.
      path: the adapter's folder.
      base: the model; None leaves the word BASE to fill in.

    Raises:
      InputError: there is no such layout.
    """
    check_name("layout", base_layout, MODEL_LAYOUTS)
    whole = base is not None and os.path.isfile(os.path.join(base, CONFIG))
    if base_layout == "llava-original" and not whole:
        command = f"phantom-jax convert --vision=CLIP --llm={shlex.quote(base or _BASE)} --target=MODEL --to=ours"
        return [
            "# where the base is a language model, put the model together first, with its folder and CLIP's:",
            f"# {command}",
            "import phantom_jax",
            f"model = phantom_jax.load('MODEL', adapter={os.fspath(path)!r})",
        ]
    path, base = repr(os.fspath(path)), repr(base or _BASE)
    lines = ["import phantom_jax", f"model = phantom_jax.load({base}, adapter={path})"]
    if base_layout == "llava-hf":
        lines += [
            "# or, with PEFT:",
            "from peft import PeftModel",
            f"from transformers import {_LLAVA}",
            f"model = PeftModel.from_pretrained({_LLAVA}.from_pretrained({base}, dtype='auto'), {path})",
        ]
    return lines


def serve_line(layout: str, path: str | os.PathLike[str]) -> str | None:
    """The shell command that serves the model with vLLM; None where vLLM has no such model.

    Raises:
      InputError: there is no such layout.
    """
    check_name("layout", layout, MODEL_LAYOUTS)
    return f"vllm serve {shlex.quote(os.fspath(path))}" if layout == "llava-hf" else None
