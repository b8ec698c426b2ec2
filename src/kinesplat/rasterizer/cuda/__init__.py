"""The CUDA backend: float32, forward and backward as Triton kernels of our own, all images of a batch at once.

Nothing is compiled with nvcc: Triton comes with PyTorch's CUDA wheels for Linux and compiles a kernel when it is first
used (seconds, kept on disk). TRITON_INTERPRET=1, set before the first import, runs the same kernels on CPU tensors in
Triton's interpreter: slow, and meant for tests.
"""

import os
from importlib import import_module
from importlib.util import find_spec
from typing import Any

import torch

from kinesplat.errors import BackendError, InputError
from kinesplat.rasterizer.render import Render, Scene


def interpreted() -> bool:
    """Whether the kernels run in Triton's interpreter, on CPU tensors."""
    return os.environ.get("TRITON_INTERPRET") == "1"


def available(device: torch.device) -> bool:
    """Whether tensors on `device` can be rendered: it is a GPU, or the kernels are interpreted."""
    return find_spec("triton") is not None and (device.type == "cuda" or interpreted())


def kernels(module: str, scene: Scene) -> Any:
    """A module of this package that needs Triton, once it is sure that it can serve `scene`.

    Raises:
        BackendError: Triton is missing.
        InputError: tensors not on a GPU or not float32.
    """
    if find_spec("triton") is None:
        raise BackendError(
            "backend 'cuda' needs Triton, which PyTorch's CUDA wheels for Linux bring along "
            "(pip install 'kinesplat[cuda]'); without it pass backend='gsplat' or 'reference'"
        )
    means = scene.gaussians.means
    if means.dtype != torch.float32 or not available(means.device):
        raise InputError(
            f"backend 'cuda' computes in float32 on a GPU; the gaussians are {means.dtype} on {means.device} "
            "(cast or move them, or pass backend='reference')"
        )
    return import_module(f"kinesplat.rasterizer.cuda.{module}")


def render(scene: Scene) -> Render:
    """Render with the Triton kernels.

    Raises:
        BackendError: Triton is missing.
        InputError: tensors not on a GPU or not float32, NaN or infinity, zero quaternions, unknown links.
    """
    return kernels("function", scene).render(scene)
