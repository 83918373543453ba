"""Runs commands in children of one process that has imported all there is to import: what a child needs is a fork.

`run` starts that process. Each of its tasks is a dictionary: `arguments` of the command; `limit`, of bytes in one
file; `signal`, to be sent `delay` seconds after the folder `waits` appeared, in a process whose disk is slow; `and`, a
second task at the same time. For each, a dictionary comes back: `code`, as `subprocess` has it, `error` and `output`.
"""

import json
import os
import pathlib
import resource
import subprocess
import sys
import tempfile
import time


def run(tasks, environment=None):
    """A process that does the tasks one after the other; `answers` waits for it."""
    command = [sys.executable, "-W", "ignore", __file__]
    root = str(pathlib.Path(__file__).parents[2])
    child = subprocess.Popen(
        command,
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
        cwd=root,
        env={**os.environ, "PYTHONPATH": root, **(environment or {})},
    )
    child.stdin.write(json.dumps(tasks))
    child.stdin.close()
    return child


def answers(child):
    with child:
        found = [json.loads(line) for line in child.stdout]
    assert child.returncode == 0
    return found


def _start(task):
    said = {name: tempfile.TemporaryFile() for name in ("output", "error")}  # noqa: SIM115 - `_finish` closes them
    pid = os.fork()
    if pid:
        return pid, said
    os.setpgid(0, 0)
    for descriptor, file in zip((1, 2), said.values(), strict=True):
        os.dup2(file.fileno(), descriptor)
    if "limit" in task:
        resource.setrlimit(resource.RLIMIT_FSIZE, (task["limit"], task["limit"]))
    if "signal" in task:
        # However fast the machine is, the process is at work when the signal comes.
        os.fsync = lambda descriptor, fsync=os.fsync: (time.sleep(0.1), fsync(descriptor))

    code = 1
    try:
        code = cli.main(task["arguments"])
    except SystemExit as stop:
        code = stop.code
    except BaseException:
        import traceback

        traceback.print_exc()
    finally:
        sys.stderr.flush()
        os._exit(code)


def _finish(pid, said):
    code = os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
    texts = {}
    for name, file in said.items():
        file.seek(0)
        texts[name] = file.read().decode()
        file.close()
    return {"code": code, **texts}


def _do(task):
    pid, said = _start(task)
    second = None
    if "signal" in task:
        waits = pathlib.Path(task["waits"])
        limit = time.monotonic() + 60
        while (
            not waits.exists()
            and time.monotonic() < limit
            and not os.waitid(os.P_PID, pid, os.WEXITED | os.WNOHANG | os.WNOWAIT)
        ):
            time.sleep(0.001)
        time.sleep(task["delay"])
        os.kill(pid, task["signal"])
    elif "and" in task:
        second = _start(task["and"])
    answer = _finish(pid, said)
    return {**answer, "and": _finish(*second)} if second else answer


if __name__ == "__main__":
    from phantom_jax import cli, conversion  # noqa: F401 - importing takes seconds

    for task in json.load(sys.stdin):
        print(json.dumps(_do(task)), flush=True)
