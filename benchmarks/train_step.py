"""Loss and gradients of a decoder: ours, ours with the phantom dimension, and transformers' Qwen2 in PyTorch.

One process, float32, CPU, equal sizes and tokens; the three take turns, so that a machine whose speed drifts slows all
of them. Prints medians and the ratios to the peer.

    python benchmarks/train_step.py            # needs torch and transformers: launch/test.sh --parity installs them
    python benchmarks/train_step.py --size=small --rounds=3
"""

import argparse
import os
import statistics
import time

os.environ.setdefault("JAX_PLATFORMS", "cpu")

import jax
import jax.numpy as jnp
import numpy as np
from flax.linen import meta

from phantom_jax.models.decoder import Decoder, DecoderConfig
from phantom_jax.models.phantom import PhantomConfig
from phantom_jax.ops.attention import Structure
from phantom_jax.ops.rope import RopeConfig

# (rows, tokens a row, decoder sizes): the quickstart's decoder, a mid-size one, and one layer in four of Phantom-0.5B.
SIZES = {
    "small": (24, 80, {"embed_dim": 128, "num_layers": 3, "num_heads": 4, "head_dim": 32, "mlp_dim": 384}),
    "medium": (4, 512, {"embed_dim": 512, "num_layers": 6, "num_heads": 8, "head_dim": 64, "mlp_dim": 1536}),
    "wide": (1, 512, {"embed_dim": 896, "num_layers": 6, "num_heads": 14, "head_dim": 64, "mlp_dim": 4864}),
}
VOCABULARY = 4096


def ours(rows: int, length: int, sizes: dict, ids: np.ndarray, phantom: PhantomConfig | None):
    """A function that computes loss and gradients once, and waits for them."""
    rope = RopeConfig(max_length=length)
    config = DecoderConfig(VOCABULARY, num_kv_heads=2, qkv_bias=True, rope=rope, phantom=phantom, **sizes)
    model = Decoder(config)
    zeros = jnp.zeros((rows, length), jnp.int32)
    structure = Structure(zeros + jnp.arange(length)[None], zeros + 1, zeros)

    def logits(decoder, ids):
        return decoder.logits(decoder(decoder.embed(ids), structure, rope_length=length).hidden)

    params = meta.unbox(model.init(jax.random.key(0), ids, method=logits))

    @jax.jit
    def step(params, ids):
        def loss(params):
            predictions = jax.nn.log_softmax(model.apply(params, ids, method=logits)[:, :-1])
            return -jnp.take_along_axis(predictions, ids[:, 1:, None], axis=-1).mean()

        return jax.value_and_grad(loss)(params)

    ids = jnp.asarray(ids, jnp.int32)
    return lambda: jax.block_until_ready(step(params, ids))


def peer(rows: int, length: int, sizes: dict, ids: np.ndarray):
    """The same of transformers' Qwen2, with PyTorch's fused attention."""
    import torch
    import transformers

    config = transformers.Qwen2Config(
        vocab_size=VOCABULARY,
        hidden_size=sizes["embed_dim"],
        intermediate_size=sizes["mlp_dim"],
        num_hidden_layers=sizes["num_layers"],
        num_attention_heads=sizes["num_heads"],
        num_key_value_heads=2,
        max_position_embeddings=length,
        attn_implementation="sdpa",
    )
    model = transformers.Qwen2ForCausalLM(config).train()
    ids = torch.as_tensor(ids)

    def step():
        model.zero_grad(set_to_none=True)
        model(input_ids=ids, labels=ids, use_cache=False).loss.backward()

    return step


def measure(size: str, rounds: int) -> dict[str, float]:
    """Median milliseconds of each."""
    rows, length, sizes = SIZES[size]
    ids = np.random.default_rng(0).integers(3, VOCABULARY, (rows, length))
    steps = {
        "ours": ours(rows, length, sizes, ids, None),
        "ours, phantom": ours(rows, length, sizes, ids, PhantomConfig()),
        "transformers": peer(rows, length, sizes, ids),
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
    arguments = parser.parse_args()
    print("| size | tokens | ours ms | ours, phantom ms | transformers ms | transformers / ours | phantom / plain |")
    print("|---|---|---|---|---|---|---|")
    for size in arguments.size or SIZES:
        rows, length, _ = SIZES[size]
        times = measure(size, arguments.rounds)
        plain, phantom, theirs = times.values()
        cells = [size, f"{rows} x {length}", f"{plain:.0f}", f"{phantom:.0f}", f"{theirs:.0f}"]
        print(f"| {' | '.join(cells)} | {theirs / plain:.2f} | {phantom / plain:.2f} |", flush=True)


if __name__ == "__main__":
    main()
