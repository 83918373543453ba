"""These tests compare with PyTorch, bitsandbytes and PEFT. `launch/test.sh --parity` installs them; without PyTorch
none is collected, and without one of the others those that need it are not."""

import importlib.util

NEEDED = {"torch": "*_test.py", "bitsandbytes": "quantize_test.py", "peft": "peft_test.py"}

collect_ignore_glob = [tests for package, tests in NEEDED.items() if importlib.util.find_spec(package) is None]
