"""A run's config: defaults, variants, and what is wrong with it.

A config file is Python with `get_config(arg)` that starts from `default_config()` and returns one ConfigDict, a whole
run. `--config=configs/NAME.py:key=value,other` picks variants, which the file reads with `parse_arg`, and
`--config.a.b=c` changes single values: `--config.phases[0].steps=10` one of the first phase,
`--config.phases[0].trainable="('projector/**',)"` a tuple. Values that a config file computes from others are not
computed again when an override changes one of those: let the file read a variant for that.

`DEFAULTS`, `PHASE` and `OBJECTIVES` list every key there is; `validate` finds what is wrong before anything is loaded.
"""

import difflib
import math
import re
from collections.abc import Iterator, Mapping, Sequence
from types import SimpleNamespace
from typing import Any

from phantom_jax.errors import InputError

SCHEDULES = ("cosine", "linear", "constant")
DTYPES = ("float32", "bfloat16")
ATTENTION_BACKENDS = ("xla", "chunked", "splash", "cudnn")
REMAT = ("none", "dots", "names", "full")
STRATEGIES = ("zero3", "zero2", "tensor", "zero3_tensor", "zero2_tensor")
QUANTIZE = ("none", "int8", "nf4")
WRITERS = ("tensorboard", "wandb")
IMAGE_MODES = ("model", "tiles", "crop", "pad")
REFERENCES = ("adapter_off", "stored")

OBJECTIVES = {
    "sft": {},
    "phantom_optimization": {"beta": 2.0, "gamma": 0.5, "sft_weight": 1.0},
    "simpo": {"beta": 2.0, "gamma": 0.5},
    "dpo": {"beta": 0.1, "reference": "adapter_off"},
    "orpo": {"beta": 0.1},
}
"""Objectives by name, with their arguments; see `phantom_jax.objectives`."""

OPTIMIZER = {
    "learning_rate": 1e-5,
    "end_learning_rate": 0.0,
    "schedule": "cosine",
    "warmup_fraction": 0.0,
    "weight_decay": 0.0,
    "decay_vectors": False,
    "b1": 0.9,
    "b2": 0.999,
    "eps": 1e-8,
    "clip_norm": 1.0,
}
"""AdamW. `decay_vectors` decays biases and norm scales as well. A clip_norm of 0 does not clip."""

GROUP = {"patterns": (), "learning_rate": 0.0, "weight_decay": 0.0, "decay_vectors": False}
"""What a parameter group may hold. `patterns` is needed; what else it does not hold it has from the optimizer."""

LINEARS = ("language_model/layers/**",)
"""The linear maps of the decoder's layers: seven in each, and neither embeddings nor head."""

PHASE = {
    "name": "",
    "trainable": ("**",),
    "objective": {"name": "sft"},
    "data": {
        "sources": {},
        "split": "train",
        "template": "",
        "image_mode": "model",
        "questions_per_image": 1,
        "images_per_row": 1,
        "kind_weights": {},
        "max_digits": 0,
        "threads": 1,
    },
    "batch_size": 1,
    "accumulation": 1,
    "steps": 0,
    "optimizer": OPTIMIZER,
    "groups": (),
    "lora": {"rank": 0, "alpha": 16.0, "dropout": 0.0, "patterns": LINEARS},
    "quantize": {"kind": "none", "patterns": LINEARS},
}
"""One phase. `trainable` are globs over parameter paths, see `phantom_jax.patterns`. `batch_size` counts the rows
of a step, over all micro-batches and devices. A `max_digits` of 0 takes images of any number of digits. `data.sources`
are weights by the name of a data set; none is all of the run's `data.name`. `data.template` is the phase's own, "" the
processor's. `data.image_mode` is how an image becomes tiles; `model` is `tiles` for a Phantom and `crop` for a LLaVA.
Validation and exported models take both from the last phase. A `lora.rank` of 0 is no adapter. The patterns of `lora`
and `quantize` are globs over the kernels of linear maps: those that are adapted, and those whose frozen values are kept
in few bits."""

DEFAULTS = {
    "seed": 0,
    "model": {"name": "", "weights": "", "dtype": "float32", "attention_backend": "xla", "remat": "none"},
    "mesh": {"strategy": "zero3", "data": 1, "fsdp": 1, "tensor": 1, "seq": 1},
    "data": {"name": "handwritten_numbers", "data_dir": ""},
    "processor": {"template": "qwen2", "tile_size": 448, "max_tiles": 6, "max_length": 2048},
    "phases": (),
    "validation": {"every": 0, "split": "validation", "batch_size": 16, "images": 0},
    "checkpoint": {"every": 500, "keep": 3},
    "log_every": 1,
    "writers": (),
    "profile": {"first_step": 0, "num_steps": 0},
    "max_skipped_in_a_row": 10,
}
"""A whole run. `model` also takes overrides of that model, which the model checks. `model.weights` is the folder of a
model to begin with, ours or a published one; without it parameters are drawn at random. One axis of the mesh may be -1,
which takes the devices that the others leave. `profile` traces `num_steps` steps from that one on, counted over all
phases. `every` counts steps over all phases, 0 is never (phases always end with a checkpoint, and with validation where
it is on). `images` 0 is all of the split. `max_skipped_in_a_row` steps skipped one after another, since loss or
gradient was not finite, end the run."""

_OPEN = {"model", "phases[].data.kind_weights", "phases[].data.sources"}
"""Sections with keys of their own, checked by who reads them."""

_DECIDES_NOTHING = (
    "data.data_dir",
    "log_every",
    "writers",
    "profile.first_step",
    "profile.num_steps",
    "checkpoint.every",
    "checkpoint.keep",
    "validation.batch_size",
    "phases[].data.threads",
)
"""Keys that may change between a run and its continuation."""

_CHOICES = {
    "schedule": SCHEDULES,
    "attention_backend": ATTENTION_BACKENDS,
    "dtype": DTYPES,
    "remat": REMAT,
    "strategy": STRATEGIES,
    "kind": QUANTIZE,
    "image_mode": IMAGE_MODES,
    "reference": REFERENCES,
}
"""Words that a key may have, wherever it stands."""

_NOT_NEGATIVE = (
    "end_learning_rate",
    "weight_decay",
    "clip_norm",
    "eps",
    "every",
    "max_digits",
    "images",
    "seed",
    "beta",
    "gamma",
    "sft_weight",
    "first_step",
    "num_steps",
    "rank",
)
_POSITIVE = (
    "learning_rate",
    "alpha",
    "batch_size",
    "accumulation",
    "steps",
    "keep",
    "log_every",
    "max_skipped_in_a_row",
    "tile_size",
    "max_tiles",
    "max_length",
    "questions_per_image",
    "images_per_row",
    "threads",
)


def default_config() -> Any:
    """A new ConfigDict of `DEFAULTS`, to be changed. It has no phases and no model yet."""
    from ml_collections import ConfigDict

    return ConfigDict(_copy(DEFAULTS))


def default_phase(name: str, **values: Any) -> Any:
    """A new ConfigDict of `PHASE`.

    Args:
      name: of the phase, shown in logs; exported models are named for it.
      **values: changed keys; those of a section as a mapping, `optimizer={"learning_rate": 1e-3}` for instance. A new
        `objective` brings its own arguments.

    Raises:
      InputError: for a key that does not exist.
    """
    from ml_collections import ConfigDict

    phase = _copy(PHASE)
    for key, value in {"name": name, **values}.items():
        if key == "objective":
            objective = dict(value)
            phase[key] = {**OBJECTIVES.get(objective.get("name"), {}), **objective}
        elif key in phase and isinstance(phase[key], dict) and isinstance(value, Mapping):
            unknown = [inner for inner in value if inner not in phase[key]]
            if unknown:
                raise InputError(_unknown(f"phase {name!r}: {key}.", unknown[0], phase[key]))
            phase[key] |= value
        elif key in phase:
            phase[key] = value
        else:
            raise InputError(_unknown(f"phase {name!r}: ", key, phase))
    phase["groups"] = tuple(ConfigDict(dict(group)) for group in phase["groups"])
    return ConfigDict(phase)


def parse_arg(arg: str | None, **defaults: bool | int | float | str) -> SimpleNamespace:
    """Reads the part of `--config=FILE:arg` after the colon, as typed variants.

    `parse_arg("smoke,steps=10", smoke=False, steps=100)` gives `smoke=True` and `steps=10`. A bare key means true.

    Args:
      arg: `key=value,key=value`, or None.
      **defaults: every variant there is, with its default; a value is read as that default's type.

    Raises:
      InputError: for a variant that does not exist, or a value of another type.
    """
    values = dict(defaults)
    for item in filter(None, (arg or "").split(",")):
        key, given, text = (part.strip() for part in item.partition("="))
        if key not in defaults:
            raise InputError(_unknown("Variant ", key, defaults, what="variants"))
        kind = type(defaults[key])
        if not given:
            if kind is not bool:
                raise InputError(f"Variant {key!r} needs a value: {key}={defaults[key]}, say.")
            text = "true"
        try:
            values[key] = _READ_BOOL[text.lower()] if kind is bool else kind(text)
        except (KeyError, ValueError) as error:
            raise InputError(f"Variant {key}={text!r} is not a value of type {kind.__name__}.") from error
    return SimpleNamespace(**values)


_READ_BOOL = {"true": True, "1": True, "yes": True, "false": False, "0": False, "no": False}


def plain(config: Any) -> Any:
    """A config as dictionaries, lists and scalars, as JSON has them."""
    if hasattr(config, "items"):
        return {key: plain(value) for key, value in sorted(config.items())}
    if isinstance(config, (list, tuple)):
        return [plain(value) for value in config]
    return config


def resolve(config: Any) -> dict[str, Any]:
    """The config as `plain` gives it, if nothing is wrong with it.

    Raises:
      InputError: listing everything that is wrong.
    """
    config = plain(config)
    for phase in config["phases"] if isinstance(config.get("phases"), list) else ():
        if isinstance(phase, Mapping) and isinstance(phase.get("objective"), Mapping):
            phase["objective"] = _settled(phase["objective"])
    problems = validate(config)
    if problems:
        count = "1 thing is" if len(problems) == 1 else f"{len(problems)} things are"
        raise InputError(f"{count} wrong with the config:\n" + "\n".join(f"  {problem}" for problem in problems))
    return config


def _settled(objective: Mapping[str, Any]) -> dict[str, Any]:
    """An objective whose name a flag changed: what the old one left at its defaults gives way to the new one's."""
    own = OBJECTIVES.get(objective.get("name"))
    if own is None or set(objective) - {"name"} == set(own):
        return dict(objective)
    others = OBJECTIVES.values()
    chosen = {k: v for k, v in objective.items() if not any(k in other and other[k] == v for other in others)}
    return {**own, **chosen}


def validate(config: Any) -> list[str]:
    """Everything that is wrong with a config, one sentence each, with the value seen and what to set instead."""
    values = plain(config)
    problems = list(_check_section(values, DEFAULTS, ""))
    if problems:
        # Rules that look at several values may rely on their types.
        return problems
    problems += _check_run(values)
    for index, phase in enumerate(values["phases"]):
        problems += _check_phase(phase, f"phases[{index}].")
    return problems


def config_difference(first: Any, second: Any) -> list[str]:
    """One line for each value that differs: `phases[0].steps: 10 -> 20`; a missing one is `(none)`."""
    first, second = dict(_leaves(plain(first))), dict(_leaves(plain(second)))
    return [
        f"{path}: {_show(first, path)} -> {_show(second, path)}"
        for path in sorted(first.keys() | second.keys())
        if _show(first, path) != _show(second, path)
    ]


def decides_nothing(difference: str) -> bool:
    """Whether a line of `config_difference` is about a key that no loss, row or weight depends on."""
    path = re.sub(r"\[\d+\]", "[]", difference.split(":")[0])
    return path in _DECIDES_NOTHING


def _check_section(values: Mapping, known: Mapping, prefix: str) -> Iterator[str]:
    generic = prefix.rstrip(".")
    for key, value in values.items():
        path = f"{prefix}{key}"
        if key not in known:
            if generic not in _OPEN:
                yield _unknown(prefix, key, known)
        elif key == "phases":
            yield from _check_items(value, path, PHASE)
        elif key == "groups":
            yield from _check_items(value, path, GROUP, partial=True)
        elif key == "objective":
            yield from _check_objective(value, path)
        elif isinstance(known[key], Mapping):
            if not isinstance(value, Mapping):
                yield f"{path} is {value!r}; it must be a section with the keys {', '.join(known[key]) or 'you name'}."
            elif _generic(path) not in _OPEN or known[key]:
                yield from _check_section(value, known[key], f"{path}.")
        else:
            yield from _check_value(path, key, value, known[key])
    yield from (f"{prefix}{key} is missing; its default is {known[key]!r}." for key in known if key not in values)


def _check_items(value: Any, path: str, known: Mapping, *, partial: bool = False) -> Iterator[str]:
    if not isinstance(value, list) or not all(isinstance(item, Mapping) for item in value):
        yield f"{path} is {value!r}; it must be a tuple of sections with the keys {', '.join(known)}."
        return
    for index, item in enumerate(value):
        needed = {key: known[key] for key in known if not partial or key in item or key == "patterns"}
        for key in item:
            if key not in known:
                yield _unknown(f"{path}[{index}].", key, known)
        yield from _check_section({key: item[key] for key in item if key in known}, needed, f"{path}[{index}].")


def _check_objective(value: Any, path: str) -> Iterator[str]:
    name = value.get("name") if isinstance(value, Mapping) else None
    if name not in OBJECTIVES:
        near = difflib.get_close_matches(str(name), OBJECTIVES, n=1)
        hint = f" Did you mean {near[0]!r}?" if near else ""
        yield f"{path}.name is {name!r}; it must be one of {', '.join(OBJECTIVES)}.{hint}"
        return
    yield from _check_section(value, {"name": "", **OBJECTIVES[name]}, f"{path}.")


def _check_value(path: str, key: str, value: Any, default: Any) -> Iterator[str]:
    kind = type(default)
    if kind is tuple:
        if not isinstance(value, list) or not all(isinstance(item, str) for item in value):
            yield f"{path} is {value!r}; it must be a tuple of strings."
        elif key == "writers":
            yield from (
                f"{path} holds {one!r}; it may hold {', '.join(WRITERS)}." for one in value if one not in WRITERS
            )
        elif not value and key != "trainable":
            yield f"{path} is empty; it must hold at least one pattern: '**' is everything."
        return
    right = isinstance(value, (int, float) if kind is float else kind) and isinstance(value, bool) == (kind is bool)
    if not right:
        yield f"{path} is {value!r}; it must be of type {kind.__name__}, {default!r} for instance."
    elif kind is float and not math.isfinite(value):
        yield f"{path} is {value!r}; it must be finite."
    elif key in _POSITIVE and value <= 0:
        yield f"{path} is {value!r}; it must be larger than 0."
    elif key in _NOT_NEGATIVE and value < 0:
        yield f"{path} is {value!r}; it must be 0 or larger."
    elif path.startswith("mesh.") and kind is int and value < 1 and value != -1:
        yield f"{path} is {value!r}; it must be 1 or larger, or -1 for the devices that the other axes leave."
    elif key in ("b1", "b2", "warmup_fraction", "dropout") and not 0 <= value < 1:
        yield f"{path} is {value!r}; it must be at least 0 and less than 1."
    elif value not in _CHOICES.get(key, (value,)):
        near = difflib.get_close_matches(str(value), _CHOICES[key], n=1)
        hint = f" Did you mean {near[0]!r}?" if near else ""
        yield f"{path} is {value!r}; it must be one of {', '.join(_CHOICES[key])}.{hint}"


def _check_run(values: Mapping) -> Iterator[str]:
    model = values["model"]
    if not model["name"] and not model["weights"]:
        yield "model.name is empty; set it to a model of phantom_jax.models.zoo, 'phantom-0.5b' for instance."
    overrides = sorted(set(model) - set(DEFAULTS["model"]))
    if not model["name"] and model["weights"] and overrides:
        yield (
            f"model.{overrides[0]} is set, but not model.name: the folder in model.weights decides what the model is;"
            f" leave model.{overrides[0]} out."
        )
    rest = [axis for axis, size in values["mesh"].items() if size == -1]
    if len(rest) > 1:
        yield f"mesh.{rest[0]} and mesh.{rest[1]} are both -1; one axis at most takes the devices that are left."
    if not values["phases"]:
        yield "phases is empty; a run needs at least one, see default_phase."
    names = [phase["name"] for phase in values["phases"]]
    for index, name in enumerate(names):
        if name in names[:index]:
            yield f"phases[{index}].name is {name!r}, as an earlier phase's; give each its own."


def _check_phase(phase: Mapping, prefix: str) -> Iterator[str]:
    if not phase["name"] or not phase["name"].replace("_", "").replace("-", "").isalnum():
        yield f"{prefix}name is {phase['name']!r}; it must be letters, digits, - and _ (a folder is named for it)."
    rows, parts = phase["batch_size"], phase["accumulation"]
    if rows % parts:
        yield (
            f"{prefix}batch_size is {rows}, which {prefix}accumulation, {parts}, does not divide; set batch_size to a"
            f" multiple, {parts * -(-rows // parts)} for instance."
        )
    if not phase["trainable"] and not phase["lora"]["rank"]:
        yield f"{prefix}trainable is empty and {prefix}lora.rank is 0, so nothing trains; '**' is everything."
    yield from _check_reference(phase, prefix)
    optimizer = phase["optimizer"]
    if optimizer["schedule"] != "constant" and optimizer["end_learning_rate"] > optimizer["learning_rate"]:
        yield (
            f"{prefix}optimizer.end_learning_rate is {optimizer['end_learning_rate']}, more than the learning_rate of"
            f" {optimizer['learning_rate']} that it decays from; set it lower."
        )


def _check_reference(phase: Mapping, prefix: str) -> Iterator[str]:
    if phase["objective"].get("reference") != "adapter_off":
        return
    what = f"{prefix}objective.reference is 'adapter_off', the model without its adapter, but"
    remedy = f"Set {prefix}objective to {{'name': 'dpo', 'reference': 'stored'}}: the model that the phase begins with."
    if not phase["lora"]["rank"]:
        yield f"{what} {prefix}lora.rank is 0, so there is none. {remedy}"
    elif phase["trainable"]:
        yield (
            f"{what} {prefix}trainable is {tuple(phase['trainable'])!r}: what trains beside the adapter would move the"
            f" reference with it. {remedy} Or set {prefix}trainable to ()."
        )


def _generic(path: str) -> str:
    return "".join(part.split("[")[0] + "[]" * ("[" in part) + "." for part in path.split(".")).rstrip(".")


def _unknown(prefix: str, key: str, known: Mapping | Sequence, *, what: str = "keys") -> str:
    near = difflib.get_close_matches(key, list(known), n=1)
    hint = f" Did you mean {near[0]!r}?" if near else ""
    return f"{prefix}{key} does not exist.{hint} The {what} there are: {', '.join(known) or 'none'}."


def _leaves(value: Any, path: str = "") -> Iterator[tuple[str, Any]]:
    if isinstance(value, Mapping) and value:
        for key, item in value.items():
            yield from _leaves(item, f"{path}.{key}" if path else key)
    elif isinstance(value, list) and any(isinstance(item, (Mapping, list)) for item in value):
        for index, item in enumerate(value):
            yield from _leaves(item, f"{path}[{index}]")
    else:
        yield path, value


def _show(leaves: Mapping[str, Any], path: str) -> str:
    return repr(leaves[path]) if path in leaves else "(none)"


def _copy(value: Any) -> Any:
    return {key: _copy(item) for key, item in value.items()} if isinstance(value, Mapping) else value
