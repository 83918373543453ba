"""`adapter_config.json`: what of PEFT's settings is supported, and which rank, alpha and modules they mean."""

import collections
import dataclasses
import functools
import re
import sys
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from phantom_jax.errors import InputError

CONFIG = "adapter_config.json"

_READ = (
    "r",
    "lora_alpha",
    "lora_dropout",
    "use_rslora",
    "target_modules",
    "exclude_modules",
    "modules_to_save",
    "layers_to_transform",
    "layers_pattern",
    "rank_pattern",
    "alpha_pattern",
    "base_model_name_or_path",
)
# What only matters while PEFT itself trains or loads.
_NEUTRAL = (
    "peft_type",
    "task_type",
    "auto_mapping",
    "peft_version",
    "revision",
    "inference_mode",
    "init_lora_weights",
    "bias",
    "megatron_core",
    "megatron_config",
    "loftq_config",
    "eva_config",
    "corda_config",
    "lora_ga_config",
    "runtime_config",
    "qalora_group_size",
    "ensure_weight_tying",
)
# Other ways to begin change the base itself, and the factors mean a change of that changed base.
_BEGINNINGS = (True, False, None, "gaussian", "eva", "orthogonal", "mica")


_LONGEST_PATTERN = 4096


def _positive(value: Any) -> bool:
    return _number(value) and 0 < value <= sys.float_info.max


def _number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)


def _text(value: Any) -> bool:
    return isinstance(value, str)


def _integer(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


def _list_of(fits: Callable[[Any], bool]) -> Callable[[Any], bool]:
    return lambda value: isinstance(value, list) and all(map(fits, value))


def _one_or_list_of(fits: Callable[[Any], bool]) -> Callable[[Any], bool]:
    return lambda value: fits(value) or _list_of(fits)(value)


def _numbers_by_pattern(value: Any) -> bool:
    return isinstance(value, dict) and all(map(_positive, value.values()))


_KINDS = {
    "rank_pattern": _numbers_by_pattern,
    "alpha_pattern": _numbers_by_pattern,
    "target_modules": _one_or_list_of(_text),
    "exclude_modules": _one_or_list_of(_text),
    "modules_to_save": _list_of(_text),
    "layers_to_transform": _one_or_list_of(_integer),
    "layers_pattern": _one_or_list_of(_text),
    "lora_dropout": lambda value: _number(value) and 0 <= value <= 1,
    "base_model_name_or_path": _text,
}


@dataclasses.dataclass(frozen=True)
class Module:
    """A linear map that has, or might have, an adapter.

    Attributes:
      name: PEFT's.
      rank: 0 where it has none.
      alpha: without meaning where it has none.
    """

    name: str
    rank: int = 0
    alpha: float = 0.0


def check(settings: Mapping[str, Any], where: str) -> None:
    """Refuses what is not LoRA as this package computes it.

    Raises:
      InputError: says which setting is not supported.
    """
    if settings.get("peft_type") != "LORA":
        raise InputError(f"{where} has peft_type={settings.get('peft_type')!r}: only LORA is supported")
    for key in ("r", "lora_alpha"):
        if not _positive(settings.get(key)):
            raise InputError(f"{where} has {key}={settings.get(key)!r:.100}: it must be a number above 0")
    for key, fits in _KINDS.items():
        if settings.get(key) is not None and not fits(settings[key]):
            raise InputError(f"{where} has {key}={settings[key]!r:.100}, which PEFT would not take either")
    for key in ("rank_pattern", "alpha_pattern", "modules_to_save", "layers_pattern"):
        for pattern in _texts(settings.get(key)):
            _compiled(pattern)
    for key in ("target_modules", "exclude_modules"):
        # In a list they are parts of names.
        if isinstance(settings.get(key), str):
            _compiled(settings[key])
    if settings.get("init_lora_weights") not in _BEGINNINGS:
        raise InputError(
            f"{where} has init_lora_weights={settings['init_lora_weights']!r}, which changes the base too: save it "
            "with PEFT's path_initial_model_for_weight_conversion"
        )
    for key, value in settings.items():
        if value and key not in (*_READ, *_NEUTRAL):
            raise InputError(f"{where} has {key}={value!r}: only plain LoRA and rsLoRA are supported")


def rank_and_alpha(settings: Mapping[str, Any], module: str) -> tuple[int, float]:
    """What PEFT gives a module that it adapts."""
    found = []
    for default, pattern in (("r", "rank_pattern"), ("lora_alpha", "alpha_pattern")):
        patterns = settings.get(pattern) or {}
        key = next((key for key in patterns if _compiled(key, r"(.*\.)?({})").fullmatch(module)), None)
        found.append(settings[default] if key is None else patterns[key])
    return found[0], found[1]


def targeted(settings: Mapping[str, Any], module: str) -> bool:
    """Whether PEFT adapts a linear map of this name."""
    targets, excluded = settings.get("target_modules"), settings.get("exclude_modules")
    if excluded and _named(excluded, module):
        return False
    if any(_compiled(whole, r"(.*\.)?{}(\..*)?").fullmatch(module) for whole in settings.get("modules_to_save") or ()):
        return False
    if targets == "all-linear":
        return module.rpartition(".")[2] not in ("lm_head", "output")
    if not _named(targets or [], module):
        return False
    layers = settings.get("layers_to_transform")
    if isinstance(targets, str) or module in targets or layers in (None, []):
        return True
    patterns = settings.get("layers_pattern") or [r"[^.]*"]
    for pattern in _texts(patterns):
        number = _compiled(pattern, r"(?:.*?\.)?(?:{})\.(?P<layer>\d+)\.").match(module)
        if number:
            return int(number["layer"]) in ([layers] if isinstance(layers, int) else layers)
    return False


def _named(targets: str | Sequence[str], module: str) -> bool:
    if isinstance(targets, str):
        return _compiled(targets).fullmatch(module) is not None
    return module in targets or any(module.endswith(f".{target}") for target in targets)


@functools.lru_cache
def _compiled(pattern: str, within: str = "{}") -> re.Pattern[str]:
    """A pattern of the file inside one of PEFT's.

    Raises:
      InputError: it is no regular expression by itself, or too long.
    """
    if len(pattern) > _LONGEST_PATTERN:
        raise InputError(
            f"{CONFIG} has a pattern of {len(pattern):,} characters: at most {_LONGEST_PATTERN:,} are read"
        )
    try:
        re.compile(pattern)
        return re.compile(within.format(pattern))
    except (re.error, OverflowError, RecursionError) as error:
        raise InputError(
            f"{CONFIG} has the pattern {pattern!r:.100}, which is no regular expression: {error}"
        ) from error


def _texts(value: Any) -> list[str]:
    """A text alone, several of them, or the keys of an object."""
    return [value] if isinstance(value, str) else list(value or ())


def saved_whole(settings: Mapping[str, Any], parameter: str) -> bool:
    """Whether PEFT keeps a parameter of this name whole beside the factors."""
    *modules, _ = parameter.split(".")
    paths = [".".join(modules[: count + 1]) for count in range(len(modules))]
    return any(path.endswith(whole) for path in paths for whole in settings.get("modules_to_save") or ())


def describes(settings: Mapping[str, Any], modules: Sequence[Module]) -> bool:
    """Whether the settings mean exactly these adapters, for all linear maps of a model."""
    for module in modules:
        if targeted(settings, module.name) != bool(module.rank):
            return False
        if module.rank and rank_and_alpha(settings, module.name) != (module.rank, module.alpha):
            return False
    return True


def settings_for(modules: Sequence[Module]) -> dict[str, Any]:
    """Ranks, alphas and targets for the adapted of all linear maps of a model.

    Patterns are given only where one rank and alpha do not serve all; then both patterns have the same keys, as some
    versions of PEFT look them up together.
    """
    adapted = [module for module in modules if module.rank]
    (rank, alpha), _ = collections.Counter((module.rank, module.alpha) for module in adapted).most_common(1)[0]
    settings = {
        "r": rank,
        "lora_alpha": _plain(alpha),
        "rank_pattern": {},
        "alpha_pattern": {},
        "target_modules": _targets(modules),
    }
    leaves = collections.defaultdict(set)
    for module in adapted:
        leaves[module.name.rpartition(".")[2]].add((module.rank, module.alpha))
    for module in adapted:
        leaf = module.name.rpartition(".")[2]
        if (module.rank, module.alpha) != (rank, alpha):
            key = leaf if len(leaves[leaf]) == 1 else module.name
            settings["rank_pattern"][key] = module.rank
            settings["alpha_pattern"][key] = _plain(module.alpha)
    return settings


def _plain(alpha: float) -> float:
    return int(alpha) if alpha == int(alpha) else alpha


def _targets(modules: Sequence[Module]) -> str | list[str]:
    """The shortest of: last parts of names; a regular expression of those in the decoder's layers; all names."""
    adapted = sorted(module.name for module in modules if module.rank)
    leaves = sorted({name.rpartition(".")[2] for name in adapted})
    start = re.match(r"(.*?layers)\.", adapted[0])
    choices: list[str | list[str]] = [leaves]
    if start:
        # Tools look for the names between one pair of brackets at the end.
        choices.append(re.escape(start[1]) + rf"\..*\.({'|'.join(leaves)})")
    for targets in choices:
        if all(targeted({"target_modules": targets}, module.name) == bool(module.rank) for module in modules):
            return targets
    return adapted
