"""How much memory some code takes, measured in a process of its own."""

import os
import pathlib
import subprocess
import sys

_REPOSITORY = pathlib.Path(__file__).parents[2]

_MEASURE = """
def resident(field):
    with open("/proc/self/status") as status:
        return next(int(line.split()[1]) / 1024 for line in status if line.startswith(field))

before = resident("VmRSS")
run()
print(resident("VmHWM") - before)
"""


def growth(code, *arguments):
    """MiB by which the resident memory grows at its peak while `run()` runs, which `code` defines and warms up."""
    command = [sys.executable, "-c", code + _MEASURE, *map(str, arguments)]
    environment = os.environ | {"MALLOC_ARENA_MAX": "2"}
    done = subprocess.run(command, capture_output=True, text=True, env=environment, cwd=_REPOSITORY)  # noqa: S603
    assert done.returncode == 0, done.stderr
    return float(done.stdout.splitlines()[-1])
