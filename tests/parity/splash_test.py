"""A decoder layer with splash attention, forward and backward, through the compiler of TPUs."""

import os
import re
import subprocess
import sys


def test_a_tpu_takes_a_layer_of_phantom(repository):
    script = repository / "benchmarks" / "ahead_of_time.py"
    arguments = ["--topology=v5e:2x2", "--models=phantom-0.5b", "--layers=1", "--length=1000"]
    command = [sys.executable, str(script), *arguments]
    environment = {**os.environ, "PYTHONPATH": str(repository)}
    done = subprocess.run(command, capture_output=True, text=True, cwd=repository, env=environment, timeout=1200)
    assert done.returncode == 0, done.stderr[-2000:]
    [(found, kernels)] = re.findall(
        r"^\| v5e:2x2 \| \S+ \| (\d+, \d+) \| \d+ \| (\d+) \|", done.stdout, flags=re.MULTILINE
    )
    # Forward, gradient of the queries, gradient of keys and values: the output is kept and not computed again.
    assert (found, kernels) == ("128, 128", "3")
