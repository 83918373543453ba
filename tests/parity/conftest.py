"""These tests compare with PyTorch and bitsandbytes. `launch/test.sh --parity` installs both; without PyTorch none is
collected, and without bitsandbytes those of quantised weights are not."""

import importlib.util

if importlib.util.find_spec("torch") is None:
    collect_ignore_glob = ["*_test.py"]
elif importlib.util.find_spec("bitsandbytes") is None:
    collect_ignore_glob = ["quantize_test.py"]
