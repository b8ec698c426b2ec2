"""Forward kinematics, its gradient and the link Jacobian: time per call by batch size.

Usage: python benchmarks/kinematics.py [ROBOT ...]      (default: kinearm and, where they can be had, larger robots)
"""

import sys
import time
from collections.abc import Callable

import torch

from kinesplat.description import load_description

BATCHES = (1, 16, 256, 4096)


def microseconds(call: Callable[[], object], seconds: float = 0.5) -> float:
    """Median time of a call after a warm-up."""
    for _ in range(5):
        call()
    times, end = [], time.perf_counter() + seconds
    while len(times) < 5 or time.perf_counter() < end:
        start = time.perf_counter()
        call()
        times.append(time.perf_counter() - start)
    return 1e6 * sorted(times)[len(times) // 2]


def measure(name: str) -> None:
    tree = load_description(name).tree
    print(f"{name}: dof {tree.dof}, {len(tree.link_names)} links, {torch.get_num_threads()} thread(s), float32, us")
    print(f"  {'batch':>6} {'forward':>9} {'forward+backward':>17} {'link_jacobian':>14}")
    for batch in BATCHES:
        span = (tree.q_upper - tree.q_lower).float()
        q = (tree.q_lower.float() + span * torch.rand(batch, tree.dof)).requires_grad_()
        weight = torch.randn(batch, len(tree.link_names), 4, 4)

        def backward(q: torch.Tensor = q, weight: torch.Tensor = weight) -> None:
            torch.autograd.grad(tree.forward_kinematics(q), q, weight)

        with torch.no_grad():
            forward = microseconds(lambda q=q: tree.forward_kinematics(q))
            jacobian = microseconds(lambda q=q: tree.link_jacobian(q))
        print(f"  {batch:>6} {forward:>9.0f} {microseconds(backward):>17.0f} {jacobian:>14.0f}")


if __name__ == "__main__":
    torch.manual_seed(0)
    for robot in sys.argv[1:] or ["kinearm", "franka_emika_panda", "shadow_hand", "unitree_g1"]:
        measure(robot)
