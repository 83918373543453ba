"""`generation_config.json` of an exported model: settings that do not contradict each other.

Vicuna's file sets a temperature while sampling is off. Other libraries refuse to save a model with such a file, hours
into a run (haotian-liu/LLaVA #1144, #1252, #1635).
"""

import math
from collections.abc import Mapping
from typing import Any

from phantom_jax.checkpoints.hf_config import TokenIds

_COUNTS = ("max_new_tokens", "min_new_tokens", "max_length", "min_length", "no_repeat_ngram_size")
_SAMPLING = ("temperature", "top_k", "top_p", "min_p", "typical_p", "epsilon_cutoff", "eta_cutoff")


def generation_config(tokens: TokenIds, *, source: Mapping[str, Any] | None = None) -> dict[str, Any]:
    """The content of `generation_config.json`; greedy where the source says nothing else.

    Args:
      tokens: end and padding, whatever the source says of them.
      source: the file of the model that this one came from. Lengths, repetition, beams and sampling are kept as far as
        they apply: what concerns sampling only where it samples, what concerns beams only where there are some.
        Anything else is left behind.
    """
    source = source or {}
    out: dict[str, Any] = {"do_sample": source.get("do_sample") is True}
    ids = {
        "bos_token_id": source.get("bos_token_id"),
        "eos_token_id": tokens.eos[0] if len(tokens.eos) == 1 else list(tokens.eos),
        # Old LLaMA files say -1 for "there is none".
        "pad_token_id": tokens.pad if tokens.pad >= 0 else None,
    }
    out |= {name: value for name, value in ids.items() if value is not None}
    out |= {name: source[name] for name in _COUNTS if _whole(source.get(name), 1)}
    if "max_new_tokens" in out:
        out.pop("max_length", None)
    if _number(source.get("repetition_penalty")) and source["repetition_penalty"] > 0:
        out["repetition_penalty"] = source["repetition_penalty"]
    if _whole(source.get("num_beams"), 2):
        out["num_beams"] = source["num_beams"]
        if _number(source.get("length_penalty")):
            out["length_penalty"] = source["length_penalty"]
        if source.get("early_stopping") in (True, False, "never"):
            out["early_stopping"] = source["early_stopping"]
    if out["do_sample"]:
        out |= {name: source[name] for name in _SAMPLING if _number(source.get(name))}
    return out


def _number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)


def _whole(value: Any, least: int) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value >= least
