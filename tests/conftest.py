"""What every test runs under: the CPU seen as eight devices, and no silent rank promotion."""

import os
from pathlib import Path

# JAX reads these once, when it is first imported.
os.environ["JAX_PLATFORMS"] = "cpu"
os.environ["XLA_FLAGS"] = f"{os.environ.get('XLA_FLAGS', '')} --xla_force_host_platform_device_count=8".strip()
os.environ["JAX_NUMPY_RANK_PROMOTION"] = "raise"
# A test that needs the network is not a test of this project.
os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["TRANSFORMERS_OFFLINE"] = "1"

import pytest  # noqa: E402

ROOT = Path(__file__).resolve().parent.parent


@pytest.fixture(scope="session")
def golden() -> Path:
    """The folder of reference numbers; `PHANTOM_JAX_GOLDEN` names another one of the same form."""
    folder = Path(os.environ.get("PHANTOM_JAX_GOLDEN") or ROOT / "tests" / "golden")
    if not folder.is_dir():
        pytest.fail(f"there is no folder of golden numbers at {folder}; set PHANTOM_JAX_GOLDEN to one")
    return folder


@pytest.fixture(scope="session")
def repository() -> Path:
    """The folder that holds phantom_jax/, configs/, launch/ and docs/."""
    return ROOT
