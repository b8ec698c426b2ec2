"""Launching kernels."""

from contextlib import nullcontext
from typing import Any

import torch
from torch import Tensor

BLOCK = 128  # splats of a program
MAX_BLOCKS = 65_535  # of a grid's second axis


def blocks_of(count: int) -> int:
    """Programs that cover `count` splats."""
    return -(-count // BLOCK)


def launch(kernel: Any, grid: tuple[int, ...], first: Tensor, *rest: Any, **options: Any) -> None:
    """Run `kernel` on the device of its first argument; an empty grid runs nothing."""
    with torch.cuda.device(first.device) if first.is_cuda else nullcontext():
        if all(grid):
            kernel[grid](first, *rest, **options)
