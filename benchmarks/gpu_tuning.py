"""The sections of benchmarks/gpu.py that ask what the backend's constants and options should be on this card."""

from collections.abc import Callable
from typing import Any

import torch
from gpu_sections import Report, device_of, median_ms, orbit, speed_scene, step
from torch import Tensor

from kinesplat import zoo

BATCHES = (1, 64, 1024)


def tiles(options: Any) -> Report:
    """Forward and backward of the speed test with other tiles and unrolling, for 1 and 16 images."""
    from kinesplat.rasterizer.cuda import function

    n, side, batches = (16, 8, (1,)) if options.dry_run else (10_000, 256, (1, 16))
    splats, links, Ts = speed_scene(n, device_of(options))
    before, rows = (function.TILE, function.UNROLL), []
    sizes, unrolls = (((8, 8),), (1,)) if options.dry_run else (((16, 8), (8, 8), (16, 16)), (4, 1, 2))
    for tile in sizes:
        for unroll in unrolls:
            function.TILE, function.UNROLL = tile, unroll
            for count in batches:
                cameras = orbit(count, side, splats.means.device)
                ms = median_ms(lambda c=cameras: step(splats, links, Ts, c), options)
                rows.append({"tile": f"{tile[0]}x{tile[1]}", "unroll": unroll, "batch": count, "f+b [ms]": ms})
    function.TILE, function.UNROLL = before
    return {"tiles": rows, "now": f"{before[0][0]}x{before[0][1]}, unroll {before[1]}"}


def graphs(options: Any) -> Report:
    """Kinematics, forward and backward, as launched one by one and as one CUDA graph.

    The rasteriser cannot be captured: how many (splat, tile) pairs there are decides the size of its lists.
    """
    rows = []
    for batch in BATCHES[:1] if options.dry_run else BATCHES:
        call, q = kinematics(batch, options)
        row: Report = {"batch": batch, "one by one [ms]": both_ways_ms(call, q, options)}
        if not options.dry_run:
            graphed = torch.cuda.make_graphed_callables(call, (q.detach().clone().requires_grad_(),))
            row["CUDA graph [ms]"] = both_ways_ms(graphed, q, options)
        rows.append(row)
    return {"kinematics": rows}


def compiled(options: Any) -> Report:
    """The same through torch.compile; in a dry run its tracing alone."""
    rows = []
    for batch in BATCHES[:1] if options.dry_run else BATCHES[1:]:
        call, q = kinematics(batch, options)
        row: Report = {"batch": batch, "one by one [ms]": both_ways_ms(call, q, options)}
        fast: Callable[[Tensor], Tensor] = torch.compile(call, backend="eager" if options.dry_run else "inductor")
        row["compiled [ms]"] = both_ways_ms(fast, q, options)
        rows.append(row)
    return {"kinematics": rows}


def kinematics(batch: int, options: Any) -> tuple[Callable[[Tensor], Tensor], Tensor]:
    """The Panda's forward kinematics without the check of its input, which waits for the card; and joint values."""
    tree, device = zoo.load("franka_emika_panda").tree, device_of(options)
    q = tree.q_canonical.float().to(device) + 0.1 * torch.randn(batch, tree.dof, device=device)
    tree.forward_kinematics(q)  # derives its constants once

    def call(joints: Tensor) -> Tensor:
        nodes, _, constants = tree._nodes(joints, None)
        return nodes.index_select(0, constants.link_node).transpose(0, 1)

    return call, q.requires_grad_()


def both_ways_ms(call: Callable[[Tensor], Tensor], q: Tensor, options: Any) -> float:
    """Milliseconds of forward and backward."""
    return median_ms(lambda: torch.autograd.grad(call(q).square().sum(), q), options)
