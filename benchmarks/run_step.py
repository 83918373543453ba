"""Whole training steps of the trainer itself on random weights: tokens/s, MFU and peak memory of each method.

Rows of text with the tiles of one image, one batch again and again, through `phantom_jax.training.loop.train` with the
config keys that a run has: forward, backward, optimiser, metrics. Figures are medians over the steps after the first
three. The last column compares with the plain decoder, whose rows come from `--plain`.

    python benchmarks/run_step.py --model=phantom-0.5b --method=full --plain
    python benchmarks/run_step.py --model=phantom-7b --method=lora --method=qlora --backend=cudnn --remat=full
    python benchmarks/run_step.py --model=phantom-quickstart --length=128 --tiles=2 --steps=5 --plain    # tries it out
"""

import argparse
import dataclasses
import json
import statistics
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax
import numpy as np

from phantom_jax.batch import IGNORE, Batch
from phantom_jax.config import default_config, default_phase
from phantom_jax.errors import InputError
from phantom_jax.models import zoo
from phantom_jax.models.remat import PRESETS
from phantom_jax.models.vlm import VisionLanguageConfig
from phantom_jax.ops.backends import BACKENDS
from phantom_jax.training.loop import train
from phantom_jax.training.metrics import gibibytes, thousands
from phantom_jax.training.task import Task, model_task

METHODS = ("full", "lora", "qlora")
WARM_UP = 3


class Enough(Exception):
    """All batches were given. It ends the run without the checkpoint that a phase ends with."""


class Repeated:
    """The data iterator: one batch, so many times."""

    def __init__(self, batch: Batch, times: int):
        self._batch, self._left = batch, times

    def __next__(self) -> Batch:
        if not self._left:
            raise Enough
        self._left -= 1
        return self._batch

    def get_state(self) -> None:
        return None


def make_batch(model: VisionLanguageConfig, rows: int, length: int, tiles: int) -> Batch:
    """Rows of one conversation: a first token, the image, then text of which the second half is answer."""
    rng = np.random.default_rng(0)
    size, image = model.vision_tower.image_size, tiles * model.tokens_per_tile
    if image + 2 >= length:
        raise SystemExit(f"{tiles} tiles are {image} tokens, too many for rows of {length}: set --length or --tiles")
    token_ids = rng.integers(3, model.language_model.vocab_size, (rows, length)).astype(np.int32)
    token_ids[:, 0] = 1
    index = np.broadcast_to(np.arange(length, dtype=np.int32), (rows, length))
    answer = (index >= (1 + image + length) // 2) & (index < length - 1)
    is_image = (index >= 1) & (index <= image)
    return Batch(
        token_ids=token_ids,
        positions=index,
        segment_ids=np.ones_like(token_ids),
        branch_ids=np.zeros_like(token_ids),
        image_slots=np.where(is_image, index - 1, -1).astype(np.int32),
        targets=np.where(answer, np.roll(token_ids, -1, axis=1), IGNORE).astype(np.int32),
        sft_mask=answer,
        answer_slots=answer.astype(np.int32),
        pixels=rng.integers(0, 256, (rows, tiles, size, size, 3)).astype(np.uint8),
        row_ids=np.arange(rows, dtype=np.int32),
    )


def make_config(arguments: argparse.Namespace, method: str, plain: bool) -> Any:
    config = default_config()
    config.model.update(name=arguments.model, dtype=arguments.dtype, attention_backend=arguments.backend)
    config.model.remat = arguments.remat
    if plain:
        config.model.phantom = None
    config.mesh.fsdp = jax.device_count()
    config.processor.max_length = arguments.length
    adapter = {"rank": arguments.rank, "alpha": float(arguments.rank)} if method != "full" else {}
    config.phases = (
        default_phase(
            method,
            trainable=("**",) if method == "full" else ("projector/**",),
            batch_size=arguments.rows,
            accumulation=arguments.accumulation,
            steps=arguments.steps + WARM_UP + 1,
            lora=adapter,
            quantize={"kind": "nf4"} if method == "qlora" else {},
        ),
    )
    return config


def make_task(config: Any, model_config: VisionLanguageConfig, batch: Batch) -> Task:
    steps = config.phases[0].steps
    return dataclasses.replace(
        model_task(config, model_config),
        train_iterator=lambda index: Repeated(batch, steps - 1),
        validation_batches=lambda: (),
    )


def measure(arguments: argparse.Namespace, method: str, plain: bool) -> Mapping[str, float]:
    """Medians of the log's metrics over the steps after the warm-up."""
    config = make_config(arguments, method, plain)
    model = zoo.get_config(arguments.model, **({"phantom": None} if plain else {}))
    batch = make_batch(model, arguments.rows, arguments.length, arguments.tiles)
    with tempfile.TemporaryDirectory() as folder:
        try:
            train(config, Path(folder) / "run", task=make_task(config, model, batch), say=_say)
        except Enough:
            text = (Path(folder) / "run" / "metrics.jsonl").read_text(encoding="utf-8")
    records = [json.loads(line) for line in text.splitlines()][WARM_UP:]
    names = {name for record in records for name in record if name not in ("step", "phase")}
    return {name: statistics.median(r[name] for r in records if name in r) for name in names}


def _say(line: str) -> None:
    if line.startswith("compiled"):
        print(f"  {line}", flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", choices=zoo.MODELS, default="phantom-0.5b")
    parser.add_argument("--method", choices=METHODS, action="append")
    parser.add_argument("--plain", action="store_true", help="also without the phantom dimension")
    parser.add_argument("--rows", type=int, default=1)
    parser.add_argument("--accumulation", type=int, default=1)
    parser.add_argument("--length", type=int, default=4096)
    parser.add_argument("--tiles", type=int, default=7)
    parser.add_argument("--steps", type=int, default=10)
    parser.add_argument("--rank", type=int, default=64)
    parser.add_argument("--dtype", default="bfloat16")
    parser.add_argument("--backend", default="xla", choices=BACKENDS, help="model.attention_backend")
    parser.add_argument("--remat", default="none", choices=PRESETS, help="model.remat")
    arguments = parser.parse_args()
    device = jax.devices()[0]
    print(f"{jax.device_count()} x {device.device_kind}, {arguments.rows} rows of {arguments.length} tokens with")
    print(f"{arguments.tiles} tiles each, {arguments.dtype}, attention {arguments.backend}, remat {arguments.remat}")
    print("| model | method | tokens/s | step ms | TFLOP/s | MFU | of it tower | peak memory | step / plain |")
    print("|---|---|---|---|---|---|---|---|---|")
    for method in arguments.method or METHODS[:1]:
        seconds = {}
        for plain in (True, False) if arguments.plain else (False,):
            found = measure(arguments, method, plain)
            rate = found["train/tokens_per_second"]
            seconds[plain] = arguments.rows * arguments.length / rate
            mfu, memory = (found.get(f"train/{name}") for name in ("mfu", "device_memory_bytes"))
            cells = [
                arguments.model + " without phantom" * plain,
                method,
                thousands(rate),
                f"{1e3 * seconds[plain]:.0f}",
                f"{found['train/flops_per_second'] / 1e12:.3g}",
                "not measured" if mfu is None else f"{mfu:.1%}",
                f"{found['train/tower_share']:.0%}",
                # The most since the process began: only the first row of a process is its own.
                "not measured" if memory is None else gibibytes(memory),
                f"{seconds[False] / seconds[True]:.2f}" if len(seconds) == 2 else "",
            ]
            print(f"| {' | '.join(cells)} |", flush=True)


if __name__ == "__main__":
    try:
        main()
    except InputError as error:
        raise SystemExit(f"error: {error}") from error
