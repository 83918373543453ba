"""A training step of Phantom optimisation against one of supervised fine-tuning on the chosen answers.

Prompt and image are most of a row, and chosen and rejected answers share them: the step should cost little more than
that of the chosen answer alone. Beside it stands the same step with each answer in a row of its own, prompt and image
copied. One process, equal weights and images; the three take turns, so that a machine whose speed drifts slows all of
them. Image features are computed in every step, once for each image also where rows are of their own.

    python benchmarks/preference_step.py --size=small                   # minutes on a CPU
    python benchmarks/preference_step.py --size=0.5b --backend=chunked  # Phantom-0.5B as published, on a GPU

The target is 1.25 times the step of supervised fine-tuning at 1,792 image tokens.
"""

import argparse
import dataclasses
import functools
import statistics
import time
from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np
from flax.linen import meta

from phantom_jax import objectives
from phantom_jax.config import OPTIMIZER
from phantom_jax.data.conversation import Conversation, lay_out
from phantom_jax.data.rows import unfolded_index
from phantom_jax.errors import InputError
from phantom_jax.models import zoo
from phantom_jax.models.vlm import VisionLanguageModel
from phantom_jax.ops.backends import BACKENDS
from phantom_jax.training.optimizer import make_optimizer
from phantom_jax.training.state import split, start_phase
from phantom_jax.training.step import make_train_step


@dataclasses.dataclass(frozen=True)
class Size:
    """What is run: a model of the zoo with some fields changed, and its rows.

    Attributes:
      changes: fields of the decoder.
      tower: fields of the vision tower.
      tiles: of an image.
      answers: tokens of the chosen and of the rejected answer of each row, end marker included.
    """

    changes: dict
    tower: dict
    tiles: int = 7
    answers: tuple[tuple[int, int], ...] = ((96, 96),)


# Answers of 64 to 128 tokens. The small sizes keep the decoder's width; a narrow tower of one layer stands for the real
# one, whose work is the same in all three steps and would only bring the ratios closer to 1.
_NARROW = {"embed_dim": 64, "num_layers": 1, "num_heads": 2, "mlp_dim": 128}
SIZES = {
    "tiny": Size({"num_layers": 1, "vocab_size": 512, "mlp_dim": 512}, _NARROW, 1, ((24, 16),)),
    "small": Size({"num_layers": 2, "vocab_size": 8192}, _NARROW),
    "medium": Size({"num_layers": 6, "vocab_size": 32768}, _NARROW, 7, ((64, 128), (128, 64))),
    "0.5b": Size({}, {}, 7, ((64, 128), (128, 64), (96, 96), (80, 112))),
}
QUESTION = 40
"""Tokens of the prompt beside the image."""
STEPS = ("SFT", "PO, shared rows", "PO, rows of their own")


def make_model(size: Size, dtype: str, backend: str) -> VisionLanguageModel:
    config = zoo.get_config("phantom-0.5b", **size.changes)
    tower = dataclasses.replace(config.vision_tower, **size.tower)
    projector = dataclasses.replace(config.projector, vision_dim=tower.embed_dim)
    config = dataclasses.replace(config, vision_tower=tower, projector=projector)
    return VisionLanguageModel(config, jnp.dtype(dtype), backend)


def conversation(rng: np.random.Generator, prompt: np.ndarray, features: int, answer: int) -> Conversation:
    ids = np.concatenate([prompt, rng.integers(3, 500, answer)]).astype(np.int32)
    slots = np.full(len(ids), -1, np.int32)
    slots[3 : 3 + features] = np.arange(features)
    supervised = np.arange(len(ids)) >= len(prompt)
    return Conversation(ids, slots, supervised, answer_start=len(prompt), prefix_length=3 + features)


def make_batches(size: Size, tokens_per_tile: int, edge: int) -> dict[str, dict[str, np.ndarray]]:
    """The batch of each step, by its name."""
    rng = np.random.default_rng(0)
    features = size.tiles * tokens_per_tile
    rows = {name: [] for name in STEPS[:2]}
    for chosen, rejected in size.answers:
        prompt = rng.integers(3, 500, QUESTION + features)
        pair = [conversation(rng, prompt, features, answer) for answer in (chosen, rejected)]
        rows[STEPS[0]].append(lay_out([pair[:1]]))
        rows[STEPS[1]].append(lay_out([pair]))
    pixels = rng.normal(size=(len(size.answers), size.tiles, edge, edge, 3)).astype(np.float32)
    batches = {name: {**_stack(segments), "pixels": pixels} for name, segments in rows.items()}
    shared = batches[STEPS[1]]
    longest = features + QUESTION + max(map(max, size.answers)) - 1
    pairs = zip(shared["segment_ids"], shared["branch_ids"], strict=True)
    apart = np.stack([unfolded_index(segment_ids, branch_ids, (2, longest)) for segment_ids, branch_ids in pairs])
    return {**batches, STEPS[2]: {**shared, "unfolded": apart}}


def _stack(segments: list) -> dict[str, np.ndarray]:
    length = max(map(len, segments))
    fill = {"image_slots": -1, "targets": -100}
    rows = []
    for segment in segments:
        fields = {field.name: getattr(segment, field.name) for field in dataclasses.fields(segment)}
        fields["segment_ids"] = np.ones(len(segment), np.int32)
        rows.append(
            {
                name: np.pad(values, (0, length - len(segment)), constant_values=fill.get(name, 0))
                for name, values in fields.items()
            }
        )
    return {name: np.stack([row[name] for row in rows]) for name in rows[0]}


def make_steps(size: Size, dtype: str, backend: str) -> dict[str, tuple]:
    """For each step a function to call, and the tokens that its decoder runs over."""
    model = make_model(size, dtype, backend)
    edge = model.config.vision_tower.image_size
    batches = make_batches(size, model.config.tokens_per_tile, edge)
    length = 1 + max(int(batch["positions"].max()) for batch in batches.values())

    def score(params, batch):
        return model.apply({"params": params}, batch, rope_length=length, method="score")

    first = {name: values[:1] for name, values in batches[STEPS[0]].items()}
    init = jax.jit(lambda key: meta.unbox(model.init(key, first, rope_length=length, method="score")["params"]))
    params = init(jax.random.key(0))
    optimizer = make_optimizer(OPTIMIZER, split(params, ("**",))[0], steps=1000)
    kinds = dict(zip(STEPS, (objectives.sft(), *[objectives.phantom_optimization()] * 2), strict=True))
    state = [start_phase(params, patterns=("**",), init_optimizer=optimizer.init, compute_dtype=dtype)]
    del params
    steps = {}
    for name, batch in batches.items():
        compiled = jax.jit(make_train_step(score, kinds[name], optimizer), donate_argnums=0)
        tokens = batch.get("unfolded", batch["token_ids"]).size
        run = functools.partial(_run, compiled, state, jax.device_put(batch))
        steps[name] = run, tokens
    return steps


def _run(step: Callable, state: list, batch: dict[str, jax.Array]) -> None:
    # One state for all steps, since each gives up the one it is given.
    state[0], metrics = step(state[0], batch)
    jax.block_until_ready((state[0], metrics))


def measure(steps: dict[str, tuple], rounds: int) -> dict[str, float]:
    """Median milliseconds of each step."""
    times: dict[str, list[float]] = {name: [] for name in steps}
    for run, _ in steps.values():
        run()
        run()
    for _ in range(rounds):
        for name, (run, _) in steps.items():
            began = time.perf_counter()
            run()
            times[name].append(1e3 * (time.perf_counter() - began))
    return {name: statistics.median(values) for name, values in times.items()}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--size", choices=SIZES, default="small")
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--dtype", default="bfloat16" if jax.default_backend() != "cpu" else "float32")
    parser.add_argument("--backend", default="xla", choices=BACKENDS, help="of attention; one that knows branches")
    arguments = parser.parse_args()
    if arguments.rounds < 1:
        parser.error(f"--rounds is {arguments.rounds}: set it to 1 or more")
    size = SIZES[arguments.size]
    steps = make_steps(size, arguments.dtype, arguments.backend)
    times = measure(steps, arguments.rounds)
    baseline, (_, baseline_tokens) = times[STEPS[0]], steps[STEPS[0]]
    device = jax.devices()[0].device_kind
    print(f"{arguments.size}, {arguments.dtype}, {arguments.backend}, {len(size.answers)} rows, {device}")
    print("| step | decoder tokens | ratio to SFT | ms (median) | ratio to SFT |")
    print("|---|---|---|---|---|")
    for name, (_, tokens) in steps.items():
        cells = [name, f"{tokens:,}", f"{tokens / baseline_tokens:.2f}"]
        print(f"| {' | '.join(cells)} | {times[name]:.0f} | {times[name] / baseline:.2f} |")


if __name__ == "__main__":
    try:
        main()
    except InputError as error:
        raise SystemExit(f"error: {error}") from error
