"""These tests compare with PyTorch, bitsandbytes and PEFT. `launch/test.sh --parity` installs them; without PyTorch
none is collected, and without one of the others those that need it are not."""

import importlib.util

NEEDED = {
    "*_test.py": "torch",
    "quantize_test.py": "bitsandbytes",
    "peft_test.py": "peft",
    "docs_checkpoints_test.py": "peft",
}

collect_ignore_glob = [tests for tests, package in NEEDED.items() if importlib.util.find_spec(package) is None]
