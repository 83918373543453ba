"""These tests compare with PyTorch. `launch/test.sh --parity` installs it; without it they are not collected."""

import importlib.util

collect_ignore_glob = [] if importlib.util.find_spec("torch") else ["*_test.py"]
