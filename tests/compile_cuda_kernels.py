"""Compile every kernel of the CUDA backend to machine code for a GPU that need not be there; print what was compiled.

Triton's interpreter takes Python that its compiler refuses (a variable that changes its type in a loop, say). Run as
``python compile_cuda_kernels.py 90`` with the compute capability times ten, without TRITON_INTERPRET.
"""

import sys
from typing import Any

import torch
import triton
from triton.backends.compiler import GPUTarget

f, i32, i64 = torch.float32, torch.int32, torch.int64
TILE = {"TILE_X": 16, "TILE_Y": 8}


class AbsentGpu:
    """What Triton asks of its driver before it compiles."""

    def __init__(self, capability: int) -> None:
        self.capability = capability

    def get_current_target(self) -> GPUTarget:
        return GPUTarget("cuda", self.capability, 32)

    def get_current_device(self) -> int:
        return 0

    def get_current_stream(self, device: int) -> int:
        return 0


def compiled(kernel: Any, *arguments: Any, **options: Any) -> None:
    """Compile one kernel; pointers are given as dtypes."""
    result = kernel.warmup(*arguments, grid=(1,), **options)
    result = result.result() if hasattr(result, "result") else result
    sys.stdout.write(f"{kernel.fn.__name__} {len(result.asm['cubin'])} bytes\n")


def main(capability: int) -> None:
    """Every kernel, at usual sizes and, as Triton makes constants of ones, at sizes of one."""
    triton.runtime.driver.set_active(AbsentGpu(capability))
    from kinesplat.rasterizer.cuda import blend, normal, project, tiles

    every = dict.fromkeys(("RGB", "ALPHA", "DEPTH", "MEDIAN", "WEIGHTS", "KEEP"), True)
    wanted = dict.fromkeys(("MEANS", "SHAPES", "OPACITIES", "SH", "POSES", "INTRINSICS"), True)
    plain = {"M": 1, "WEIGHTED": False, "COEFFICIENTS": 9, "AXIS": False, "BLOCK": 128}
    skinned = plain | {"M": 2, "WEIGHTED": True, "COEFFICIENTS": 4, "AXIS": True}
    for n, links, size, tiles_x in ((10_000, 10, 256, 16), (1, 1, 1, 1)):
        counts = (tiles_x, tiles_x * tiles_x, size, size)
        for splats, weights in ((plain, i32), (skinned, f)):
            compiled(
                project.project_forward, f, f, f, f, f, i32, weights, f, f, f, i32, f, i32, i32, i32,
                n, links, size, size, 0.3, **splats, **TILE,
            )  # fmt: skip
        compiled(tiles.expand, f, i32, i64, i32, i64, i32, n, n, tiles_x, tiles_x, RECORD=12, BLOCK=128)
        compiled(tiles.sum_slots, f, i64, i32, f, n, COLUMNS=10, BLOCK=128)
        compiled(blend.blend_forward, f, i64, i32, i64, f, f, f, f, i32, f, f, i64, *counts,
                 **every, **TILE, UNROLL=4, num_warps=1)  # fmt: skip
        flags = {name: every[name] for name in ("RGB", "ALPHA", "DEPTH")}
        compiled(
            blend.blend_backward, f, i64, i32, i64, f, f, f, f, f, f, f, i64, f, *counts, **flags, **TILE, num_warps=1
        )
        compiled(
            normal.jacobian_blocks, f, f, i32, i64, i32, i64, i64, f, f, f, f, i64, f, f, n, *counts,
            AXIS=n == 1, TILE_X=8, TILE_Y=8, num_warps=2,
        )  # fmt: skip
        slopes = {name: plain[name] for name in ("COEFFICIENTS", "AXIS", "BLOCK")}
        compiled(normal.twist_slopes, f, f, f, f, i32, f, f, i32, f, n, links, size, size, **slopes)
    compiled(normal.block_products, f, i64, i64, f, COLUMNS=256, STEP=64)
    for splats, weights in ((plain, i32), (skinned, f)):
        compiled(
            project.project_backward, f, f, f, f, i32, weights, f, f, i32, f, f, f, f, f, f, f, f,
            10_000, 10, 256, 256, **splats, **wanted,
        )  # fmt: skip


if __name__ == "__main__":
    main(int(sys.argv[1]))
