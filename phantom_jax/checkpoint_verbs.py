"""The verbs that rewrite checkpoints: `convert` and `merge`."""

import contextlib
import signal
from collections.abc import Iterator, Sequence
from typing import Any

from absl import flags

from phantom_jax.errors import InputError
from phantom_jax.layouts import LAYOUTS, MODEL_LAYOUTS, QUANTIZATIONS, STORED_DTYPES

_PICKLE = "Read pickled weights (.bin), by PyTorch's weights_only loader in a process of its own."


def define_convert(values: flags.FlagValues, argv: Sequence[str]) -> None:
    text = "Folder of a model or an adapter; its layout is recognised."
    flags.DEFINE_string("source", None, text, flag_values=values)
    flags.DEFINE_string("target", None, "Folder to write. It must not exist, or be empty.", flag_values=values)
    flags.DEFINE_enum("to", None, LAYOUTS, "Layout to write.", flag_values=values)
    text = (
        "Folder of a vision tower, InternViT or CLIP: for a new model with --llm, or for an original LLaVA that leaves "
        "its own out."
    )
    flags.DEFINE_string("vision", None, text, flag_values=values)
    text = "Folder of a language model: puts a new model together with --vision, instead of --source."
    flags.DEFINE_string("llm", None, text, flag_values=values)
    text = "File or folder of a projector for the new model; a fresh one when not given."
    flags.DEFINE_string("projector", None, text, flag_values=values)
    text = "Kind of a fresh projector of a LLaVA. Default: linear."
    flags.DEFINE_enum("projector_kind", None, ("linear", "mlp2x_gelu"), text, flag_values=values)
    flags.DEFINE_integer("seed", 0, "Of what is fresh in a new model.", flag_values=values)
    flags.DEFINE_string("base", None, "Folder of the model that an adapter was trained on.", flag_values=values)
    text = "Of all weights. As stored when not given."
    flags.DEFINE_enum("dtype", None, STORED_DTYPES, text, flag_values=values)
    text = "Bits of the language model's linear maps, for --to=ours."
    flags.DEFINE_enum("quantize", None, QUANTIZATIONS, text, flag_values=values)
    text = "Name of the conversation template to store. What the source remembers when not given."
    flags.DEFINE_string("template", None, text, flag_values=values)
    flags.DEFINE_boolean("allow_pickle", False, _PICKLE, flag_values=values)
    text = "Folder that `evaluate --output` wrote, or NAME=FOLDER: the model's result goes into the model card."
    flags.DEFINE_string("evaluation", None, text, flag_values=values)
    text = (
        "Read the target back: compare every tensor, logits with transformers where it loads the model, try a Phantom."
    )
    flags.DEFINE_boolean("verify", False, text, flag_values=values)


@contextlib.contextmanager
def _ended_in_order() -> Iterator[None]:
    """SIGTERM ends the work as Ctrl-C does: what is half written is removed."""

    def stop(number: int, frame: Any) -> None:
        raise SystemExit(128 + number)

    before = signal.signal(signal.SIGTERM, stop)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)


@_ended_in_order()
def convert(values: flags.FlagValues) -> None:
    if values.source is None and (values.llm is None or values.vision is None):
        raise InputError("convert needs --source, or --vision and --llm for a new model")
    if values.source is not None and values.llm is not None:
        raise InputError("--source is a model and --llm a part of a new one: give one of them")
    for flag in ("projector", "projector_kind", "seed"):
        if values.llm is None and values[flag].present:
            raise InputError(f"--{flag} is for a new model: give --vision and --llm with it")
    from phantom_jax import conversion

    source = values.source
    if source is None:
        source = conversion.Parents(values.vision, values.llm, values.projector, values.projector_kind, values.seed)
    lines = conversion.convert(
        source,
        values.target,
        layout=values.to,
        base=values.base,
        vision=None if values.source is None else values.vision,
        dtype=values.dtype,
        quantize=values.quantize,
        template=values.template,
        allow_pickle=values.allow_pickle,
        evaluation=values.evaluation,
        verify=values.verify,
    )
    print("\n".join(lines))


def define_merge(values: flags.FlagValues, argv: Sequence[str]) -> None:
    text = "Folder of the model that the adapter was trained on."
    flags.DEFINE_string("model", None, text, flag_values=values)
    flags.DEFINE_string("adapter", None, "Folder of the adapter, PEFT's, LLaVA's or ours.", flag_values=values)
    flags.DEFINE_string("target", None, "Folder to write. It must not exist, or be empty.", flag_values=values)
    text = "Layout to write. That of the model when not given."
    flags.DEFINE_enum("to", None, MODEL_LAYOUTS, text, flag_values=values)
    flags.DEFINE_boolean("allow_pickle", False, _PICKLE, flag_values=values)


@_ended_in_order()
def merge(values: flags.FlagValues) -> None:
    from phantom_jax.conversion import merge_adapter

    lines = merge_adapter(
        values.model, values.adapter, values.target, layout=values.to, allow_pickle=values.allow_pickle
    )
    print("\n".join(lines))
