"""What every test runs under: the CPU seen as eight devices, and no silent rank promotion."""

import os
from pathlib import Path

# JAX reads these once, when it is first imported.
os.environ["JAX_PLATFORMS"] = "cpu"
# Small programs run once or twice: compiling them well costs several times what it saves.
_FLAGS = "--xla_force_host_platform_device_count=8 --xla_backend_optimization_level=0"
os.environ["XLA_FLAGS"] = f"{_FLAGS} {os.environ.get('XLA_FLAGS', '')}".strip()  # the later flag wins
# The processes of a run, and the runs of a day, share what they compile.
os.environ["JAX_COMPILATION_CACHE_DIR"] = str(Path(__file__).resolve().parent.parent / ".pytest_cache" / "programs")
os.environ["JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS"] = "0.2"
os.environ["JAX_NUMPY_RANK_PROMOTION"] = "raise"
# A test that needs the network is not a test of this project.
os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["TRANSFORMERS_OFFLINE"] = "1"

import sys  # noqa: E402

import pytest  # noqa: E402

ROOT = Path(__file__).resolve().parent.parent


@pytest.fixture(scope="module", autouse=True)
def programs_go_with_their_module():
    """A process that keeps every program it ever compiled runs out of memory maps, and JAX crashes."""
    yield
    if "jax" in sys.modules:
        sys.modules["jax"].clear_caches()


@pytest.fixture(scope="session")
def golden() -> Path:
    """The small published models that stand in the repository, as material for tests.

    The tests that compare with reference numbers take their folder from `PHANTOM_JAX_GOLDEN` instead.
    """
    return ROOT / "tests" / "golden"


@pytest.fixture(scope="session")
def repository() -> Path:
    """The folder that holds phantom_jax/, configs/, launch/ and docs/."""
    return ROOT
