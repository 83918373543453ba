"""The process that reads pickled weights: PyTorch files in, safetensors out. `pickled.py` runs this file as a script.

    python pickled_reader.py TARGET FILE...

It imports nothing but PyTorch and the standard library, and writes `TARGET/STEM.safetensors` for each file, tensor by
tensor. On standard output it says one JSON object a line: `{"done": FILE}` for each file, or `{"error": TEXT}` for the
first that it refuses.
"""

import ctypes
import json
import mmap
import os
import re
import shutil
import sys

_OLDEST = (2, 6)  # CVE-2025-32434: before it, a file could get past `weights_only`
_DTYPES = {
    "float64": "F64",
    "float32": "F32",
    "float16": "F16",
    "bfloat16": "BF16",
    "int64": "I64",
    "int32": "I32",
    "int16": "I16",
    "int8": "I8",
    "uint8": "U8",
    "bool": "BOOL",
}
_ZIP, _PICKLE = b"PK\x03\x04", b"\x80"
# Weights need none of this. `weights_only` already refuses it; the process refuses it a second time.
_FORBIDDEN = (
    "ctypes.dlopen",
    "os.chflags",
    "os.chmod",
    "os.chown",
    "os.exec",
    "os.fork",
    "os.link",
    "os.mkdir",
    "os.posix_spawn",
    "os.remove",  # also os.removexattr
    "os.rename",
    "os.rmdir",
    "os.setxattr",
    "os.spawn",
    "os.symlink",
    "os.system",
    "os.truncate",
    "os.utime",
    "pty.",
    "shutil.",
    "socket.",
    "sqlite3.",
    "subprocess.",
)
_WRITES = os.O_WRONLY | os.O_RDWR | os.O_CREAT | os.O_TRUNC | os.O_APPEND
# Never loses what is in a page, unlike MADV_DONTNEED.
_MADV_PAGEOUT = 21
_MADVISE = ctypes.CDLL(None).madvise if sys.platform == "linux" else None
if _MADVISE is not None:
    _MADVISE.argtypes = (ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int)


class Refused(Exception):
    """Says why a file is not read."""


def import_torch():
    try:
        import torch
    except ModuleNotFoundError as error:
        if error.name != "torch":
            raise Refused(f"PyTorch, which reads pickled weights, cannot be imported: {error}") from None
        raise Refused(
            "PyTorch, which reads pickled weights, is not installed: pip install 'torch>=2.6', or convert the file to "
            "safetensors where it is"
        ) from None
    except (ImportError, OSError) as error:
        raise Refused(f"PyTorch, which reads pickled weights, cannot be imported: {error}") from None
    version = re.match(r"(\d+)\.(\d+)", torch.__version__)
    if version is None or tuple(map(int, version.groups())) < _OLDEST:
        raise Refused(
            f"PyTorch is {torch.__version__}, and files can get past its weights_only loader before 2.6: pip install "
            "'torch>=2.6'"
        )
    return torch


def forbid_the_rest(outputs):
    """From now on Python starts no other process here, opens no connection and changes no file but the outputs.

    Compiled code that does so by itself raises no audit event and is not seen.
    """

    def hook(event, arguments):
        writes = event == "open" and arguments[2] & _WRITES and arguments[0] not in outputs
        if writes or event.startswith(_FORBIDDEN):
            raise PermissionError(f"it attempted {event} with {arguments!r:.200}, which reading weights does not need")

    sys.addaudithook(hook)


def read(torch, path):
    """Tensors by name, mapped from the file where its format allows."""
    with open(path, "rb") as file:
        start = file.read(32)
    if not start:
        raise Refused("it is empty: download or copy it again")
    if not start.startswith((_ZIP, _PICKLE)):
        hint = " (a Git LFS pointer: run git lfs pull)" if start.startswith(b"version https://git-lfs") else ""
        raise Refused(f"it is no PyTorch file, it begins with {start!r}{hint}: download it again")
    try:
        return torch.load(path, map_location="cpu", weights_only=True, mmap=start.startswith(_ZIP))
    except MemoryError:
        raise Refused("there is not enough memory to read it") from None
    except PermissionError:
        raise
    # Damaged files raise whatever the place where they are damaged leads to.
    except Exception as error:
        said = str(error).split("\n\nCheck the documentation")[0].strip().splitlines() or [type(error).__name__]
        wanted = re.search(r"GLOBAL (\S+)", str(error))
        if wanted:
            raise Refused(
                f"the file asks for GLOBAL {wanted[1]}, which is code and no weights. It was refused, and nothing of "
                "the file was run: if you trust its author, ask for safetensors"
            ) from None
        reason = said[-1].split(". In PyTorch")[0][:160]
        raise Refused(f"PyTorch cannot read it, it may be damaged ({reason}): download it again") from None


def check(torch, tensors):
    """Raises unless it is a dictionary of plain tensors by name."""
    if not isinstance(tensors, dict):
        raise Refused(f"it holds {type(tensors).__name__}, not a dictionary of tensors by name")
    for key, value in tensors.items():
        if isinstance(key, str) and key in ("state_dict", "module", "model") and isinstance(value, dict):
            raise Refused(
                f"its weights are one level down, under {key!r}, as in a checkpoint of training: save that dictionary "
                "alone and give its file"
            )
        if not isinstance(key, str) or key == "__metadata__":
            raise Refused(f"its entry {key!r} is no name of a tensor")
        if not isinstance(value, torch.Tensor):
            raise Refused(f"its entry {key!r} is {type(value).__name__}, not a tensor: weights alone are read")
        if value.layout != torch.strided or value.is_quantized or value.device.type != "cpu":
            kind = "quantised" if value.is_quantized else f"{value.layout} on {value.device}"
            raise Refused(f"its tensor {key!r} is {kind}: plain dense tensors are read")
        if dtype_name(value) not in _DTYPES:
            raise Refused(f"its tensor {key!r} is {dtype_name(value)}: use one of {', '.join(_DTYPES)}")
    if not tensors:
        raise Refused("it holds no tensor")


def dtype_name(tensor):
    return str(tensor.dtype).removeprefix("torch.")


def as_bytes(torch, tensor):
    return tensor.detach().resolve_neg().contiguous().reshape(-1).view(torch.uint8).numpy()


def give_back(tensor):
    """Lets the kernel take the pages that a tensor was read from; they come back from the file when read again.

    Where the kernel has no such call, they stay until memory runs short.
    """
    storage = tensor.untyped_storage()
    start = -(-storage.data_ptr() // mmap.PAGESIZE) * mmap.PAGESIZE
    length = storage.data_ptr() + storage.nbytes() - start
    if length > 0 and sys.platform == "linux":
        _MADVISE(start, length, _MADV_PAGEOUT)


def write(torch, tensors, target):
    """Writes safetensors: the header's length, the header, then the bytes of each tensor, one tensor at a time."""
    # The widest first, so that each stands at a multiple of its width.
    names = sorted(tensors, key=lambda name: (-tensors[name].element_size(), name))
    header, end = {"__metadata__": {"format": "pt"}}, 0
    for name in names:
        tensor = tensors[name]
        start, end = end, end + tensor.numel() * tensor.element_size()
        header[name] = {
            "dtype": _DTYPES[dtype_name(tensor)],
            "shape": list(tensor.shape),
            "data_offsets": [start, end],
        }
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    free = shutil.disk_usage(os.path.dirname(target)).free
    # A few bytes can describe a tensor of any size.
    if end > free:
        raise Refused(f"its tensors take {end:,} bytes and {os.path.dirname(target)} has {free:,} left: make room")
    try:
        with open(target, "xb") as file:
            file.write(len(text).to_bytes(8, "little") + text)
            for name in names:
                file.write(as_bytes(torch, tensors[name]))
                give_back(tensors[name])
    except OSError as error:
        raise Refused(f"{target} cannot be written: {error.strerror}") from None


def main(target, paths):
    outputs = [os.path.join(target, os.path.splitext(os.path.basename(path))[0] + ".safetensors") for path in paths]
    path = paths[0]
    try:
        torch = import_torch()
        forbid_the_rest(frozenset(outputs))
        for path, output in zip(paths, outputs, strict=True):
            tensors = read(torch, path)
            check(torch, tensors)
            write(torch, tensors, output)
            print(json.dumps({"done": path}), flush=True)
    except (Refused, OSError) as error:
        print(json.dumps({"error": f"{path}: {error}"}), flush=True)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1], sys.argv[2:]))
