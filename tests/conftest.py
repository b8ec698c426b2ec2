"""Fixtures shared by the tests."""

import os
from collections.abc import Iterator
from pathlib import Path

import jaxtyping
import pytest
import torch

from kinesplat import zoo
from kinesplat.self_model import SelfModel

if not torch.cuda.is_available():
    os.environ["TRITON_INTERPRET"] = "1"  # before anything imports Triton: its kernels run on the CPU then

SHARED = Path(os.environ.get("KINESPLAT_SHARED", Path(__file__).parents[2] / "shared"))


@pytest.fixture(autouse=True)
def _seeded() -> None:
    torch.manual_seed(0)


@pytest.fixture(scope="session")
def shared() -> Path:
    """Folder with robots, URDFs and photographs that are not part of the project."""
    if not SHARED.is_dir():
        pytest.skip(f"needs the shared test inputs at {SHARED} (set KINESPLAT_SHARED)")
    return SHARED


@pytest.fixture
def unchecked_types() -> Iterator[None]:
    """Shape checks off, so that a test of bad input meets the library's own errors as a user would."""
    jaxtyping.config.update("jaxtyping_disable", True)
    yield
    jaxtyping.config.update("jaxtyping_disable", False)


@pytest.fixture
def no_hub(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """An empty cache of the Hugging Face hub, whatever this machine's holds."""
    for name in ("HF_HUB_CACHE", "HF_HOME"):
        monkeypatch.setenv(name, str(tmp_path))
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))


@pytest.fixture(scope="session")
def kinearm() -> SelfModel:
    """The packaged self-model of the project's own arm."""
    return zoo.load("kinearm")
