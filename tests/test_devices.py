"""Names of devices: an absent one is an error with a remedy, never a fall back."""

import inspect
from collections.abc import Callable
from types import SimpleNamespace

import pytest
import torch

from kinesplat import cli
from kinesplat.commands.common import Common
from kinesplat.dataset import tracer
from kinesplat.devices import resolve_device
from kinesplat.errors import BackendError, InputError


def test_names(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 3)
    assert [str(resolve_device(name)) for name in ("auto", "cpu", "cuda")] == ["cuda:3", "cpu", "cuda:3"]
    with pytest.raises(InputError, match=r"unknown device 'gpu'.*Valid: auto, cpu, cuda"):
        resolve_device("gpu")


@pytest.mark.parametrize(("built", "remedy"), [(None, "built without CUDA; install one of"), ("13.0", "nvidia-smi")])
def test_an_absent_gpu_is_an_error(monkeypatch: pytest.MonkeyPatch, built: str | None, remedy: str) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(torch.version, "cuda", built)
    assert resolve_device("auto") == resolve_device("cpu") == torch.device("cpu")
    with pytest.raises(BackendError, match=remedy):
        resolve_device("cuda")


@pytest.mark.parametrize("command", cli.COMMANDS)
def test_every_command_refuses_an_absent_gpu_before_it_does_anything(
    command: Callable[..., None], monkeypatch: pytest.MonkeyPatch, unchecked_types: None
) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(tracer, "_import_renderer", lambda: (SimpleNamespace(is_cuda_available=lambda: False), None))
    parameters = inspect.signature(command).parameters.values()
    needed = {p.name: "nowhere" for p in parameters if p.default is p.empty}
    with pytest.raises(BackendError, match="cuda"):
        command(**needed, common=Common(device="cuda"))
