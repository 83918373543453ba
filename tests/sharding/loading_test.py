"""Published folders go straight onto a mesh: each slice into its sharding, each process reading its own bytes alone."""

import dataclasses
import json
import socket
import subprocess
import sys

import jax
import numpy as np
import pytest
from safetensors.numpy import load_file

from phantom_jax import pretrained
from phantom_jax.checkpoints import hf, hf_config, model_folder
from phantom_jax.models import zoo
from phantom_jax.models.phantom import PhantomConfig
from phantom_jax.trees import flatten
from tests.models import small

LAYOUTS = {"internlm2": False, "phi3": False, "qwen2": True}


def folder(path, language_model, seed=0):
    """A random Phantom in a published layout, whose heads and widths divide by eight."""
    decoder = dataclasses.replace(
        small.DECODER,
        vocab_size=64,
        num_heads=16,
        num_kv_heads=8,
        mlp_dim=64,
        qkv_bias=LAYOUTS[language_model],
        phantom=PhantomConfig(),
    )
    config = dataclasses.replace(
        zoo.get_config("phantom-quickstart"),
        projector=dataclasses.replace(zoo.get_config("phantom-quickstart").projector, embed_dim=decoder.embed_dim),
        language_model=decoder,
    )
    rng = np.random.default_rng(seed)
    arrays = {path: rng.standard_normal(shape).astype(np.float32) for path, shape in hf.shapes(config).items()}
    checkpoint = hf.Checkpoint(config, {}, {}, hf_config.Published("phantom", language_model), small_tokens())
    model_folder.write(checkpoint.with_flat(arrays), None, path, format="phantom")
    return path


def small_tokens():
    return hf_config.TokenIds(image=60, eos=(2,))


@pytest.mark.parametrize("language_model", LAYOUTS)
@pytest.mark.parametrize("layout", ["phantom", "ours"])
def test_every_slice_is_in_its_place(tmp_path, language_model, layout):
    source = folder(tmp_path / "published", language_model)
    if layout == "ours":
        model_folder.write(*model_folder.read(source), tmp_path / "ours")
        source = tmp_path / "ours"
    one, eight = pretrained.load(source), pretrained.load(source, mesh={"tensor": 8})
    split = 0
    for path, array in flatten(eight.params).items():
        whole = np.asarray(flatten(one.params)[path])
        assert np.array_equal(np.asarray(array), whole), path
        assert len(array.sharding.device_set) == 8
        for shard in array.addressable_shards:
            assert np.array_equal(np.asarray(shard.data), whole[shard.index]), path
        split += array.addressable_shards[0].data.size < array.size
    assert split >= 7 * small.DECODER.num_layers, "kernels of queries, keys, values, out, gate, up and down"


@pytest.mark.parametrize("kind", ["int8", "nf4"])
def test_quantised_folders_go_onto_a_mesh(tmp_path, kind):
    source = folder(tmp_path / "published", "internlm2")
    checkpoint, _ = model_folder.read(source)
    from phantom_jax.checkpoints.quantized import quantized

    model_folder.write(checkpoint.with_flat(quantized(checkpoint.flat(), kind)), None, tmp_path / "few_bits")
    at_once = pretrained.load(source, quantize=kind)
    stored = pretrained.load(tmp_path / "few_bits")
    eight = pretrained.load(tmp_path / "few_bits", mesh={"tensor": 8})
    jax.tree.map(np.testing.assert_array_equal, stored.params, at_once.params)
    jax.tree.map(np.testing.assert_array_equal, eight.params, at_once.params)
    codes = eight.params["language_model"]["layers_0"]["gate"]["kernel"].codes
    assert codes.addressable_shards[0].data.size * 8 == codes.size


_CHILD = """
import json, os, pathlib, sys
rank, port, source, report = int(sys.argv[1]), sys.argv[2], sys.argv[3], sys.argv[4]
os.environ["JAX_PLATFORMS"] = "cpu"
os.environ["XLA_FLAGS"] = "--xla_force_host_platform_device_count=4"
import jax
jax.config.update("jax_cpu_collectives_implementation", "gloo")
jax.distributed.initialize(f"localhost:{port}", num_processes=2, process_id=rank)
from phantom_jax import pretrained
from phantom_jax.trees import flatten
import numpy as np

ranges, preadv = [], os.preadv
def recorded(descriptor, buffers, offset, *rest):
    count = preadv(descriptor, buffers, offset, *rest)
    ranges.append((pathlib.Path(os.readlink(f"/proc/self/fd/{descriptor}")).name, offset, count))
    return count
os.preadv = recorded
vlm = pretrained.load(source, mesh={"tensor": 8})
os.preadv = preadv
held = 0
for path, array in flatten(vlm.params).items():
    parts = {str(shard.index): shard for shard in array.addressable_shards}
    held += sum(shard.data.nbytes for shard in parts.values())
    np.savez(f"{report}.{rank}.{path.replace('/', '-')}.npz", *[np.asarray(s.data) for s in parts.values()],
             index=json.dumps([[[i.start, i.stop] for i in s.index] for s in parts.values()]))
pathlib.Path(f"{report}.{rank}.json").write_text(json.dumps({"ranges": ranges, "held": held}))
"""


@pytest.fixture(scope="module")
def two_processes(tmp_path_factory, repository):
    """What each of two processes read of a folder onto one mesh, and what it then held."""
    path = tmp_path_factory.mktemp("two")
    source = folder(path / "published", "internlm2")
    with socket.socket() as free:
        free.bind(("localhost", 0))
        port = str(free.getsockname()[1])
    children = [
        subprocess.Popen(
            [sys.executable, "-c", _CHILD, str(rank), port, str(source), str(path / "report")],
            cwd=repository,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
        )
        for rank in (0, 1)
    ]
    said = [child.communicate(timeout=300)[0] for child in children]
    assert [child.returncode for child in children] == [0, 0], said
    reports = [json.loads((path / f"report.{rank}.json").read_text()) for rank in (0, 1)]
    return source, path, reports


def test_each_of_two_processes_reads_the_bytes_that_it_holds(two_processes):
    source, _, reports = two_processes
    size = (source / "model.safetensors").stat().st_size
    covered = [np.zeros(size, np.int64) for _ in reports]
    for counts, report in zip(covered, reports, strict=True):
        for name, offset, count in report["ranges"]:
            assert name == "model.safetensors"
            counts[offset : offset + count] += 1
        assert counts.max() == 1, "no byte is read twice"
        assert counts.sum() == report["held"], "nor one that none of its devices holds"
    header = 8 + int.from_bytes((source / "model.safetensors").read_bytes()[:8], "little")
    assert np.all((covered[0] + covered[1])[header:] >= 1), "together they read all of it"
    alone = [int((mine & ~other).sum()) for mine, other in ((c > 0, o > 0) for c, o in (covered, covered[::-1]))]
    assert min(alone) > 0.2 * size, "what is split is read by one of them"


def test_two_processes_hold_the_parts_of_the_whole(two_processes):
    source, path, _ = two_processes
    whole = flatten(pretrained.load(source).params)
    for rank in (0, 1):
        for name, array in whole.items():
            with np.load(path / f"report.{rank}.{name.replace('/', '-')}.npz") as parts:
                for number, index in enumerate(json.loads(str(parts["index"]))):
                    expected = np.asarray(array)[tuple(slice(*ends) for ends in index)]
                    assert np.array_equal(parts[f"arr_{number}"], expected), name


def test_the_folder_is_what_the_library_of_the_format_reads(two_processes):
    source, _, _ = two_processes
    tensors = load_file(source / "model.safetensors")
    embedding = hf.load(source).params["language_model"]["embedding"]
    assert np.array_equal(tensors["language_model.model.tok_embeddings.weight"], np.asarray(embedding))
