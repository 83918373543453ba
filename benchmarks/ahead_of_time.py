"""Whether TPUs take a decoder with splash attention, forward and backward: compiled ahead of time, without a TPU.

    pip install --no-deps --target=libtpu libtpu==0.0.42
    TPU_LIBRARY_PATH=libtpu/libtpu/libtpu.so python benchmarks/ahead_of_time.py --topology=v5e:2x2,v5p:2x2x1,v6e:2x2

Nothing runs: libtpu compiles for slices that are not there. Rows go over half of the devices, heads over pairs of them.
For each slice and model: seconds to compile, how many kernels the program calls, and temporary memory of a device
beside what the compiler places on the chip itself. Parameters are replicated, their gradients float32.
"""

import argparse
import dataclasses
import os
import time

os.environ.setdefault("JAX_PLATFORMS", "cpu")
# Without it libtpu asks a server of Google's cloud what machine this is, and waits.
os.environ.setdefault("TPU_SKIP_MDS_QUERY", "1")

import jax
import jax.numpy as jnp
import numpy as np
from flax import linen as nn
from flax.linen import meta
from jax.experimental import topologies
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from phantom_jax.models import zoo
from phantom_jax.models.decoder import Decoder
from phantom_jax.ops.structure import Structure
from phantom_jax.sharding.mesh import AXES
from phantom_jax.sharding.rules import STRATEGIES


def compile_decoder(name: str, devices, layers: int, length: int, remat: str):
    """The compiled gradient of a zoo model's decoder with fewer layers, one row on each pair of devices."""
    config = dataclasses.replace(zoo.get_config(name).language_model, num_layers=layers, vocab_size=128)
    model = Decoder(config, jnp.bfloat16, "splash", remat=remat)
    mesh = Mesh(np.array(devices).reshape(1, -1, 2, 1), AXES)
    rows = NamedSharding(mesh, PartitionSpec("fsdp"))
    shape = (len(devices) // 2, length)
    x = jax.ShapeDtypeStruct((*shape, config.embed_dim), jnp.bfloat16, sharding=rows)
    structure = Structure(*[jax.ShapeDtypeStruct(shape, jnp.int32, sharding=rows)] * 3)
    key = jax.random.key(0)

    def init(x, structure):
        return meta.unbox(model.init(key, x, structure, rope_length=length)["params"])

    def loss(params, x, structure):
        hidden = model.apply({"params": params}, x, structure, rope_length=length).hidden
        return hidden.astype(jnp.float32).mean()

    with jax.set_mesh(mesh), nn.logical_axis_rules(STRATEGIES["zero3_tensor"].computation):
        everywhere = NamedSharding(mesh, PartitionSpec())
        params = jax.tree.map(
            lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=everywhere),
            jax.eval_shape(init, x, structure),
        )
        return jax.jit(jax.grad(loss)).lower(params, x, structure).compile()


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("--topology", default="v5e:2x2", help="slices, by commas")
    parser.add_argument("--models", default="phantom-0.5b,phantom-7b", help="of the zoo, by commas")
    parser.add_argument("--layers", type=int, default=2)
    parser.add_argument("--length", type=int, default=4096)
    parser.add_argument("--remat", default="names")
    arguments = parser.parse_args()
    if not os.path.isfile(os.environ.get("TPU_LIBRARY_PATH", "")):
        parser.error("TPU_LIBRARY_PATH names no file: set it to the libtpu.so of the package libtpu, see above")
    print("| slice | model | heads, values | compiled in s | kernels | temporary MiB |\n|---|---|---|---|---|---|")
    for topology in arguments.topology.split(","):
        devices = topologies.get_topology_desc(topology, "tpu").devices
        for name in arguments.models.split(","):
            start = time.perf_counter()
            program = compile_decoder(name, devices, arguments.layers, arguments.length, arguments.remat)
            seconds = time.perf_counter() - start
            config = zoo.get_config(name).language_model
            values = config.head_dim * (1 + bool(config.phantom and config.phantom.value))
            keys = config.head_dim * (1 + bool(config.phantom and config.phantom.query_key))
            kernels = program.as_text().count('custom_call_target="tpu_custom_call"')
            memory = program.memory_analysis().temp_size_in_bytes / 2**20
            print(f"| {topology} | {name} | {keys}, {values} | {seconds:.0f} | {kernels} | {memory:.0f} |", flush=True)


if __name__ == "__main__":
    main()
