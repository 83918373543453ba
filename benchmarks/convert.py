"""Converts a randomly filled published Phantom both ways: memory, and time against `cp` of the same bytes.

    python benchmarks/convert.py [--size=phantom-1.8b] [--rounds=3]

The folder that is converted has the names, shapes, dtype and shards of the published model. Each round runs `cp` and
the two conversions one after the other, each in a process of its own and each until the bytes are on the disk (fsync);
the medians are compared. Memory is the peak resident set of the process, as the kernel counts it.
"""

import argparse
import math
import pathlib
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
import zlib

import ml_dtypes
import numpy as np

from phantom_jax.checkpoints import hf, hf_config
from phantom_jax.checkpoints.arrays import StoredArray
from phantom_jax.checkpoints.tensor_files import TensorFiles
from phantom_jax.models import zoo
from phantom_jax.trees import unflatten

SHARD_BYTES = 2_000_000_000


def random_checkpoint(config) -> hf.Checkpoint:
    """A model whose arrays are random bits of bfloat16 between 1 and 2: they do not compress, and none is NaN."""

    def array(path, shape):
        def read(box):
            rng = np.random.default_rng([zlib.crc32(path.encode()), *(part.start for part in box)])
            size = [part.stop - part.start for part in box]
            bits = np.frombuffer(rng.bytes(2 * math.prod(size)), np.uint16).reshape(size)
            return (bits & 0x007F | 0x3F80).view(ml_dtypes.bfloat16)

        return StoredArray(shape, ml_dtypes.bfloat16, read)

    trees = unflatten({path: array(path, shape) for path, shape in hf.shapes(config).items()})
    tokens = hf_config.TokenIds(image=config.language_model.vocab_size - 7, eos=(2,))
    return hf.Checkpoint(config, trees["params"], trees.get("unused", {}), hf_config.publish(config), tokens)


def timed(command: list[str]) -> tuple[float, float]:
    """Seconds, and the peak resident memory in MiB, of a process and its children."""
    start = time.perf_counter()
    code = (
        "import resource, subprocess, sys; code = subprocess.run(sys.argv[1:], stdout=subprocess.DEVNULL).returncode; "
        "print(resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss); sys.exit(code)"
    )
    done = subprocess.run([sys.executable, "-c", code, *command], check=True, capture_output=True, text=True)  # noqa: S603 - our own arguments
    return time.perf_counter() - start, int(done.stdout) / 1024


def convert(source: pathlib.Path, target: pathlib.Path, layout: str) -> list[str]:
    return [
        sys.executable,
        "-m",
        "phantom_jax",
        "convert",
        f"--source={source}",
        f"--target={target}",
        f"--to={layout}",
    ]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--size", default="phantom-1.8b", choices=sorted(zoo.MODELS))
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--folder", type=pathlib.Path, help="where the files go; a temporary folder when not given")
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory(dir=arguments.folder) as name:
        folder = pathlib.Path(name)
        source, ours, back = folder / "published", folder / "ours", folder / "back"
        source.mkdir()
        checkpoint = random_checkpoint(zoo.get_config(arguments.size))
        hf.save(checkpoint, source, shard_bytes=SHARD_BYTES)
        files = TensorFiles.of_folder(source)
        largest = max(math.prod(files.shape(tensor)) * files.dtype(tensor).itemsize for tensor in files.names())
        size = sum(path.stat().st_size for path in source.iterdir())
        layout = checkpoint.published.format
        shards = len(list(source.glob("*.safetensors")))
        print(f"{arguments.size}: {size / 1e9:.2f} GB, {len(files.names())} tensors, {shards} shards")
        limit = 1024 + 2 * largest / 2**20
        ways = {
            "cp": ["sh", "-c", 'cp -r "$1" "$2" && sync "$2"/*', "sh", str(source), str(folder / "copy")],
            f"{layout} to ours": convert(source, ours, "ours"),
            f"ours to {layout}": convert(ours, back, layout),
        }
        seconds = {way: [] for way in ways}
        memory = dict.fromkeys(ways, 0.0)
        for _ in range(arguments.rounds):
            for written in ("copy", "ours", "back"):
                shutil.rmtree(folder / written, ignore_errors=True)
            for way, command in ways.items():
                duration, peak = timed(command)
                seconds[way].append(duration)
                memory[way] = max(memory[way], peak)
        again = TensorFiles.of_folder(back)
        same = [name for name in files.names() if again.read(name).tobytes() == files.read(name).tobytes()]
        print(f"back again byte by byte: {len(same)} of {len(files.names())} tensors equal")
        print(f"\n| way | seconds (median of {arguments.rounds}) | ratio to cp | peak memory MiB | allowed MiB |")
        print("|---|---|---|---|---|")
        base = statistics.median(seconds["cp"])
        for way in ways:
            middle = statistics.median(seconds[way])
            allowed = f"{limit:.0f}" if way != "cp" else ""
            print(f"| {way} | {middle:.1f} | {middle / base:.2f} | {memory[way]:.0f} | {allowed} |")


if __name__ == "__main__":
    main()
