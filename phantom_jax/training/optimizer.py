"""AdamW with one optax chain per group of parameters, and the schedules of both papers.

A group is a subtree of the trainable parameters with its own learning rate and weight decay. Groups are disjoint
subtrees by construction, and each chain sees its own subtree only.
"""

import math
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from phantom_jax.axes import LAYERS
from phantom_jax.config import SCHEDULES
from phantom_jax.errors import InputError
from phantom_jax.patterns import match
from phantom_jax.trees import Params, flatten, unflatten


class Optimizer(NamedTuple):
    """A gradient transformation over all groups.

    Attributes:
      init: `trainable -> state`.
      update: `(gradients, state, trainable, step) -> (updates, state, stats)`. `step` is the int32 scalar that the
        schedule reads; `stats` holds the float32 scalars `grad_norm`, before clipping, and `learning_rate`, that of
        the parameters outside all groups.
    """

    init: Callable[[Params], Any]
    update: Callable[[Params, Any, Params, jax.Array], tuple[Params, Any, dict[str, jax.Array]]]


def learning_rate_schedule(
    peak: float, *, steps: int, kind: str, end: float = 0.0, warmup_fraction: float = 0.0
) -> optax.Schedule:
    """The learning rate by step: linear warm-up from 0, then `kind` from the peak to the end value.

    Step 0 is the first one: with warm-up its learning rate is 0, and the end value would be that of step `steps`. Both
    are as in the libraries that the papers used. Schedules read the step, never a clock, so a restart is exact.

    Phantom: cosine from 1e-5 to 1e-6 without warm-up. The LLaVA scaling study: linear to 0 with 3 % warm-up in stage 1;
    LLaVA's public scripts: cosine to 0 with 3 % warm-up.

    Args:
      peak: the largest learning rate.
      steps: length of the phase.
      kind: "cosine", "linear" or "constant" (which ignores `end`).
      end: value that the decay ends with.
      warmup_fraction: share of the steps, rounded up to whole steps.
    """
    warmup = math.ceil(warmup_fraction * steps)
    decay_steps = max(steps - warmup, 1)
    if kind == "cosine":
        decay = optax.cosine_decay_schedule(peak, decay_steps, alpha=end / peak)
    elif kind == "linear":
        decay = optax.linear_schedule(peak, end, decay_steps)
    elif kind == "constant":
        decay = optax.constant_schedule(peak)
    else:
        raise InputError(f"Schedule {kind!r} does not exist; take one of {', '.join(SCHEDULES)}.")
    if not warmup:
        return decay
    return optax.join_schedules([optax.linear_schedule(0.0, peak, warmup), decay], [warmup])


def scale_by_schedule(schedule: optax.Schedule) -> optax.GradientTransformationExtraArgs:
    """Multiplies updates by minus the learning rate of the `step` that `update` is given.

    Unlike optax's own, it keeps no count: a skipped step leaves the optimiser untouched, and the schedule still ends
    with the phase.
    """

    def update(updates, state, params=None, *, step, **extra):
        del params, extra
        return jax.tree.map(lambda leaf: -schedule(step) * leaf, updates), state

    return optax.GradientTransformationExtraArgs(lambda params: optax.EmptyState(), update)


def is_decayed(path: str, ndim: int) -> bool:
    """Whether weight decay applies to a parameter by default: matrices yes, biases, norm scales and gains no.

    The leading axis of scanned layers does not count, so that stacked vectors stay vectors. A bias stays one in
    whatever shape it is stored, [heads, head_dim] for instance.
    """
    *parents, name = path.split("/")
    if name in ("bias", "scale"):
        return False
    return ndim - (LAYERS in parents) >= 2


def make_optimizer(
    config: Mapping[str, Any], trainable: Params, *, groups=(), steps: int, what: str = "groups"
) -> Optimizer:
    """AdamW with global-norm clipping over all groups.

    Args:
      config: learning_rate, end_learning_rate, schedule, warmup_fraction, weight_decay, decay_vectors, b1, b2, eps and
        clip_norm. `decay_vectors` decays biases and norm scales as well (see `is_decayed`); a clip_norm of 0 does
        not clip.
      trainable: the trainable parameters, or their shapes.
      groups: each a mapping of `patterns` and of overrides of learning_rate, weight_decay and decay_vectors. The
        schedule keeps its shape: the end value scales with the group's learning rate.
      steps: length of the phase.

    Raises:
      InputError: if a pattern matches no trainable parameter, or two groups hold the same one.
    """
    shapes = flatten(trainable)
    group_of = _assign_groups(groups, shapes, what)
    chains, members = {}, {}
    settings = {"base": config} | {f"group_{index}": {**config, **group} for index, group in enumerate(groups)}
    for group, setting in settings.items():
        chosen = [path for path in shapes if group_of[path] == group]
        decayed = {path for path in chosen if setting["decay_vectors"] or is_decayed(path, shapes[path].ndim)}
        scale = setting["learning_rate"] / config["learning_rate"]
        schedule = learning_rate_schedule(
            setting["learning_rate"],
            steps=steps,
            kind=config["schedule"],
            end=config["end_learning_rate"] * scale,
            warmup_fraction=config["warmup_fraction"],
        )
        for name, weight_decay, paths in (
            (f"{group}_decayed", setting["weight_decay"], [path for path in chosen if path in decayed]),
            (f"{group}_undecayed", 0.0, [path for path in chosen if path not in decayed]),
        ):
            if paths:
                members[name] = paths
                chains[name] = optax.chain(
                    optax.scale_by_adam(b1=config["b1"], b2=config["b2"], eps=config["eps"]),
                    optax.add_decayed_weights(weight_decay) if weight_decay else optax.identity(),
                    scale_by_schedule(schedule),
                )
        if group == "base":
            base_schedule = schedule

    def subtrees(tree):
        flat = flatten(tree)
        return {name: unflatten({path: flat[path] for path in paths}) for name, paths in members.items()}

    def init(params):
        parts = subtrees(params)
        return {name: chain.init(parts[name]) for name, chain in chains.items()}

    def update(gradients, state, params, step):
        grad_norm = optax.tree.norm(gradients)
        if config["clip_norm"]:
            # A maximum, not a condition: the norm of zero gradients divides nothing.
            factor = config["clip_norm"] / jnp.maximum(grad_norm, config["clip_norm"])
            gradients = jax.tree.map(lambda leaf: leaf * factor, gradients)
        gradient_parts, param_parts = subtrees(gradients), subtrees(params)
        updates, new_state = {}, {}
        for name, chain in chains.items():
            part, new_state[name] = chain.update(gradient_parts[name], state[name], param_parts[name], step=step)
            updates |= flatten(part)
        stats = {"grad_norm": grad_norm, "learning_rate": jnp.asarray(base_schedule(step), jnp.float32)}
        return unflatten(updates), new_state, stats

    return Optimizer(init, update)


def _assign_groups(groups, paths, what) -> dict[str, str]:
    group_of = dict.fromkeys(paths, "base")
    for index, group in enumerate(groups):
        for path in sorted(match(group["patterns"], paths, what=f"{what}[{index}] (of the trainable parameters)")):
            if group_of[path] != "base":
                raise InputError(
                    f"Parameter {path!r} belongs to two groups, {what}[{group_of[path].removeprefix('group_')}] and"
                    f" {what}[{index}]. Give the groups patterns that do not overlap."
                )
            group_of[path] = f"group_{index}"
    return group_of
