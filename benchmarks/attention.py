"""Every attention backend of this device against `xla`: seconds and errors, forward and backward.

    python benchmarks/attention.py                                         # bfloat16, 4,096 tokens, Phantom's heads
    python benchmarks/attention.py --length=96 --heads=4 --kv_heads=2 --widths=16:32 --dtype=float32     # on a CPU

One row of one conversation with its last eighth padding, which every backend takes. Errors are root mean squares over
those of the reference, `xla` in float32 from the same inputs: of the output, and of the gradients of queries, keys and
values; `xla` has one in bfloat16, too. A ratio above 1 is faster than `xla` in the same dtype.
"""

import argparse
import time

import jax
import jax.numpy as jnp
import numpy as np

from phantom_jax.errors import InputError
from phantom_jax.ops.attention import attention
from phantom_jax.ops.backends import BACKENDS, check_backend
from phantom_jax.ops.structure import Structure


def make_inputs(arguments, head_dim, value_width):
    keys = jax.random.split(jax.random.key(0), 4)
    length, heads, kv_heads = arguments.length, arguments.heads, arguments.kv_heads
    sizes = (heads, head_dim), (kv_heads, head_dim), (kv_heads, value_width), (heads, value_width)
    made = [jax.random.normal(key, (1, length, *size)) for key, size in zip(keys, sizes, strict=True)]
    *inputs, weights = made
    return [x.astype(arguments.dtype) for x in inputs], weights


def make_structure(length):
    position = jnp.arange(length)[None]
    real = (position < length - length // 8).astype(jnp.int32)
    return Structure(position * real, real, jnp.zeros_like(real))


def functions(backend, structure, weights):
    """Forward, and gradients of a weighted sum; both compiled when they are first called."""

    def forward(*inputs):
        scale = inputs[0].shape[-1] ** -0.5
        return attention(*inputs, scale=scale, query_structure=structure, key_structure=structure, backend=backend)

    def loss(*inputs):
        return jnp.sum(forward(*inputs) * weights)

    return jax.jit(forward), jax.jit(jax.grad(loss, argnums=(0, 1, 2)))


def seconds(function, inputs, repeats):
    jax.block_until_ready(function(*inputs))
    times = []
    for _ in range(repeats):
        start = time.perf_counter()
        jax.block_until_ready(function(*inputs))
        times.append(time.perf_counter() - start)
    return float(np.median(times))


def error(ours, reference):
    ours, reference = (np.asarray(x, np.float32) for x in (ours, reference))
    return float(np.sqrt(np.mean((ours - reference) ** 2)) / np.sqrt(np.mean(reference**2)))


def measure(arguments, head_dim, value_width):
    inputs, weights = make_inputs(arguments, head_dim, value_width)
    structure = make_structure(arguments.length)
    exact = [x.astype(jnp.float32) for x in inputs]
    with jax.default_matmul_precision("highest"):
        forward, backward = functions("xla", structure, weights)
        reference = [forward(*exact), *backward(*exact)]
    base = None
    for backend in BACKENDS:
        try:
            check_backend(backend, inputs[0].dtype, head_dim)
        except InputError as refusal:
            print(f"| {head_dim}, {value_width} | {backend} | {str(refusal).split(':')[0]} |||||||")
            continue
        forward, backward = functions(backend, structure, weights)
        try:
            took = tuple(seconds(function, inputs, arguments.repeats) for function in (forward, backward))
        except jax.errors.JaxRuntimeError as failure:
            # A cuDNN older than its GPU says so here and not before.
            print(f"| {head_dim}, {value_width} | {backend} | {str(failure).splitlines()[0]} |||||||")
            continue
        base = base or took
        errors = map(error, [forward(*inputs), *backward(*inputs)], reference)
        columns = [
            f"{1e3 * took[0]:.2f}",
            f"{base[0] / took[0]:.2f}",
            f"{1e3 * took[1]:.2f}",
            f"{base[1] / took[1]:.2f}",
        ]
        columns += [f"{value:.1e}" for value in errors]
        print(f"| {head_dim}, {value_width} | {backend} | {' | '.join(columns)} |", flush=True)


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("--length", type=int, default=4096)
    parser.add_argument("--heads", type=int, default=32)
    parser.add_argument("--kv_heads", type=int, default=8)
    parser.add_argument("--widths", default="64:64,128:128,128:256,192:192,256:256", help="of keys and values")
    parser.add_argument("--dtype", default="bfloat16", choices=("bfloat16", "float16", "float32"))
    parser.add_argument("--repeats", type=int, default=10)
    arguments = parser.parse_args()
    device = jax.devices()[0]
    print(f"{device.device_kind}, {arguments.length} tokens, {arguments.dtype}, jax {jax.__version__}\n")
    print("| widths | backend | forward ms | ratio | backward ms | ratio | output | queries | keys | values |")
    print("|---|---|---|---|---|---|---|---|---|---|")
    for pair in arguments.widths.split(","):
        measure(arguments, *map(int, pair.split(":")))


if __name__ == "__main__":
    main()
