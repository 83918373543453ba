"""Errors that a verb turns into an exit code; everything else is a crash (exit code 1)."""


class InputError(ValueError):
    """A config, input or checkpoint is wrong. Says what, the value seen and what to set instead. Exit code 2."""

    exit_code = 2


class Mismatch(RuntimeError):
    """What was written is not what was read. Exit code 1."""

    exit_code = 1


class Diverged(RuntimeError):
    """Too many steps in a row gave a loss or gradient that is not finite. Exit code 3."""

    exit_code = 3


class Preempted(RuntimeError):
    """The run was asked to stop, finished its step and saved. Restarting continues it. Exit code 42."""

    exit_code = 42
