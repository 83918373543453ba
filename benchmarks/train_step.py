"""Loss and gradients of a decoder: ours, ours with the phantom dimension, and transformers' Qwen2 in PyTorch.

One process, equal sizes, tokens and dtype, on the GPU if there is one, and then with the peer compiled by
`torch.compile`; the three take turns, so that a machine whose speed drifts slows all of them. Prints medians, the
ratios to the peer, and of ours with the phantom dimension also tokens/s and, where the chip's peak is known, MFU.
Whole training steps with images, optimiser and adapters: `run_step.py`.

    python benchmarks/train_step.py            # needs torch and transformers: launch/test.sh --parity installs them
    python benchmarks/train_step.py --size=small --rounds=3
    python benchmarks/train_step.py --size=0.5b --dtype=bfloat16 --backend=cudnn        # on a GPU
"""

import argparse
import dataclasses
import os
import statistics
import time

# PyTorch needs room beside.
os.environ.setdefault("XLA_PYTHON_CLIENT_PREALLOCATE", "false")

import jax
import jax.numpy as jnp
import numpy as np
from flax.linen import meta

from phantom_jax import accounting
from phantom_jax.batch import IGNORE
from phantom_jax.errors import InputError
from phantom_jax.models import zoo
from phantom_jax.models.decoder import Decoder, DecoderConfig
from phantom_jax.models.phantom import PhantomConfig
from phantom_jax.models.projector import ProjectorConfig
from phantom_jax.models.vision_tower import VisionTowerConfig
from phantom_jax.models.vlm import VisionLanguageConfig
from phantom_jax.ops.backends import BACKENDS
from phantom_jax.ops.rope import RopeConfig
from phantom_jax.ops.structure import Structure
from phantom_jax.training.metrics import thousands

VOCABULARY = 4096


def _small(embed_dim: int, num_layers: int, num_heads: int, head_dim: int, mlp_dim: int) -> DecoderConfig:
    return DecoderConfig(VOCABULARY, embed_dim, num_layers, num_heads, 2, head_dim, mlp_dim, 1e-6, qkv_bias=True)


def _published(name: str) -> DecoderConfig:
    return dataclasses.replace(zoo.get_config(name).language_model, qkv_bias=True)


# (rows, tokens a row, decoder): the quickstart's decoder, a mid-size one, one layer in four of Phantom-0.5B, and two
# whole ones for a GPU, the larger with Qwen2's biases so that the peer is the same.
SIZES = {
    "small": (24, 80, _small(128, 3, 4, 32, 384)),
    "medium": (4, 512, _small(512, 6, 8, 64, 1536)),
    "wide": (1, 512, _small(896, 6, 14, 64, 4864)),
    "0.5b": (1, 4096, _published("phantom-0.5b")),
    "7b": (1, 4096, _published("phantom-7b")),
}
CPU_SIZES = ("small", "medium", "wide")


def ours(rows: int, length: int, sizes: DecoderConfig, ids: np.ndarray, phantom: PhantomConfig | None, dtype, backend):
    """A function that computes loss and gradients once, and waits for them."""
    config = dataclasses.replace(sizes, rope=RopeConfig(max_length=length), phantom=phantom)
    model = Decoder(config, jnp.dtype(dtype), backend)
    zeros = jnp.zeros((rows, length), jnp.int32)
    structure = Structure(zeros + jnp.arange(length)[None], zeros + 1, zeros)

    def log_probs(decoder, ids, targets):
        hidden = decoder(decoder.embed(ids), structure, rope_length=length).hidden
        return decoder.target_scores(hidden, targets)[0]

    ids = jnp.asarray(ids, jnp.int32)
    targets = jnp.pad(ids[:, 1:], ((0, 0), (0, 1)), constant_values=IGNORE)
    # Parameters in the computation's dtype, as the peer has them.
    init = jax.jit(
        lambda key: jax.tree.map(lambda x: x.astype(dtype), meta.unbox(model.init(key, ids, targets, method=log_probs)))
    )
    params = init(jax.random.key(0))

    @jax.jit
    def step(params, ids, targets):
        def loss(params):
            return -model.apply(params, ids, targets, method=log_probs).sum() / (rows * (length - 1))

        return jax.value_and_grad(loss)(params)

    return lambda: jax.block_until_ready(step(params, ids, targets))


def peer(rows: int, length: int, sizes: DecoderConfig, ids: np.ndarray, dtype: str):
    """The same of transformers' Qwen2, with PyTorch's fused attention; compiled where it runs on a GPU."""
    import torch
    import transformers

    config = transformers.Qwen2Config(
        vocab_size=sizes.vocab_size,
        hidden_size=sizes.embed_dim,
        intermediate_size=sizes.mlp_dim,
        num_hidden_layers=sizes.num_layers,
        num_attention_heads=sizes.num_heads,
        num_key_value_heads=sizes.num_kv_heads,
        max_position_embeddings=length,
        attn_implementation="sdpa",
    )
    device = "cuda" if jax.default_backend() == "gpu" else "cpu"
    with torch.device(device):
        model = transformers.Qwen2ForCausalLM._from_config(config, dtype=getattr(torch, dtype)).train()
    ids = torch.as_tensor(ids, device=device)
    forward = torch.compile(model) if device == "cuda" else model

    def step():
        model.zero_grad(set_to_none=True)
        forward(input_ids=ids, labels=ids, use_cache=False).loss.backward()
        if device == "cuda":
            torch.cuda.synchronize()

    return step


def flops(rows: int, length: int, sizes: DecoderConfig) -> float:
    """Of loss and gradients with the phantom dimension, without any image."""
    tower = VisionTowerConfig(num_layers=1)
    decoder = dataclasses.replace(sizes, phantom=PhantomConfig())
    config = VisionLanguageConfig(tower, ProjectorConfig("linear", tower.embed_dim, sizes.embed_dim), decoder)
    decoder_alone = {"language_model": accounting.parameter_shapes(config)["language_model"]}
    work = accounting.Work(rows * length, rows * length * (length + 1) / 2, rows * (length - 1), 0)
    return accounting.step_flops(config, decoder_alone)(work).total


def measure(size: str, rounds: int, dtype: str, backend: str) -> dict[str, float]:
    """Median milliseconds of each."""
    rows, length, sizes = SIZES[size]
    ids = np.random.default_rng(0).integers(3, sizes.vocab_size, (rows, length))
    steps = {
        "ours": ours(rows, length, sizes, ids, None, dtype, backend),
        "ours, phantom": ours(rows, length, sizes, ids, PhantomConfig(), dtype, backend),
        "transformers": peer(rows, length, sizes, ids, dtype),
    }
    times: dict[str, list[float]] = {name: [] for name in steps}
    for step in steps.values():
        step()
        step()
    for _ in range(rounds):
        for name, step in steps.items():
            began = time.perf_counter()
            step()
            times[name].append(1e3 * (time.perf_counter() - began))
    return {name: statistics.median(values) for name, values in times.items()}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--size", choices=SIZES, action="append")
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--dtype", choices=("float32", "bfloat16"), default="float32")
    parser.add_argument("--backend", default="xla", choices=BACKENDS, help="attention backend of ours")
    arguments = parser.parse_args()
    if arguments.rounds < 1:
        parser.error(f"--rounds is {arguments.rounds}: set it to 1 or more")
    device = jax.devices()[0]
    print(f"{device.device_kind}, {arguments.dtype}, attention {arguments.backend}, {arguments.rounds} rounds")
    print(
        "| size | tokens | ours ms | ours, phantom ms | transformers ms | transformers / ours | phantom / plain"
        " | phantom tokens/s | MFU |"
    )
    print("|---|---|---|---|---|---|---|---|---|")
    for size in arguments.size or CPU_SIZES:
        rows, length, sizes = SIZES[size]
        times = measure(size, arguments.rounds, arguments.dtype, arguments.backend)
        plain, phantom, theirs = times.values()
        share = accounting.mfu(flops(rows, length, sizes), phantom / 1e3, 1, device.device_kind)
        cells = [
            *(size, f"{rows} x {length}", f"{plain:.0f}", f"{phantom:.0f}", f"{theirs:.0f}"),
            *(f"{theirs / plain:.2f}", f"{phantom / plain:.2f}", thousands(1e3 * rows * length / phantom)),
            "not measured" if share is None else f"{share:.1%}",
        ]
        print(f"| {' | '.join(cells)} |", flush=True)


if __name__ == "__main__":
    try:
        main()
    except InputError as error:
        raise SystemExit(f"error: {error}") from error
