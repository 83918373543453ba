"""Compiled programs, kept on disk between runs of the verbs."""

import importlib.util
import os
import pathlib

_MAX_BYTES = 2**32


def keep_compiled_programs() -> None:
    """Keeps what JAX compiles in ~/.cache/phantom_jax, 4 GiB at most: the next run of a verb begins at once.

    Where `JAX_COMPILATION_CACHE_DIR` or another JAX setting names a folder, that one is used. A folder that cannot be
    written costs nothing but the time to compile.
    """
    import jax

    # JAX asks for it where a cache has a size.
    bounded = importlib.util.find_spec("filelock") is not None
    if jax.config.jax_compilation_cache_dir is None:
        home = pathlib.Path(os.environ.get("XDG_CACHE_HOME") or pathlib.Path.home() / ".cache")
        jax.config.update("jax_compilation_cache_dir", str(home / "phantom_jax" / "programs"))
        if bounded:
            jax.config.update("jax_compilation_cache_max_size", _MAX_BYTES)
        jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.2)
