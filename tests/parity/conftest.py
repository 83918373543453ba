"""These tests compare with PyTorch, bitsandbytes and PEFT, and compile for TPUs. `launch/test.sh --parity` installs
what they need; without PyTorch none is collected, and without one of the others those that need it are not."""

import importlib.util
import os
from pathlib import Path

NEEDED = {
    "*_test.py": "torch",
    "quantize_test.py": "bitsandbytes",
    "peft_test.py": "peft",
    "docs_checkpoints_test.py": "peft",
}

collect_ignore_glob = [tests for tests, package in NEEDED.items() if importlib.util.find_spec(package) is None]
if not Path(os.environ.get("TPU_LIBRARY_PATH", "")).is_file():
    collect_ignore_glob.append("splash_test.py")
