"""Poses of all nodes of a kinematic tree, and the twists that move them: the numerical part of `kinematics`."""

from dataclasses import dataclass

import torch
from jaxtyping import Bool, Float, Int64
from torch import Tensor

from kinesplat.couplings import Couplings
from kinesplat.rotation_vectors import right_jacobian, rotation_matrix

JUMP_LIMIT = 192
"""Up to this many transforms in a batch, pointer jumping (few calls) beats going level by level (few products)."""


@dataclass(frozen=True, eq=False)
class NodeConstants:
    """Arrays derived from a tree for one dtype and device; nodes sorted by depth."""

    couplings: Couplings
    basis: Float[Tensor, "nodes 4 16"]  # of 1, sin, 1 - cos and the coordinate itself: a node's transform
    coordinate: Int64[Tensor, " nodes"]
    balls: Int64[Tensor, " k"]
    ball_coordinates: Int64[Tensor, "k 3"]
    anchors: Float[Tensor, "k 3"]
    screws: Float[Tensor, "coordinates 6"]
    screw_node: Int64[Tensor, " coordinates"]
    levels: tuple[tuple[int, int, Tensor], ...]
    jumps: tuple[Tensor, ...]
    below: Float[Tensor, "nodes nodes"]  # 1 where the column's node is the row's or hangs on it
    moves: Float[Tensor, "links coordinates"]
    link_node: Int64[Tensor, " links"]
    T_world_base: Float[Tensor, "4 4"]
    identity: Float[Tensor, "4 4"]
    base_rows: slice  # what hangs on the base directly
    on_base: Bool[Tensor, " nodes"]
    all_on_base: bool


class _NodeTransforms(torch.autograd.Function):
    """`_node_transforms`, with a backward that needs no graph.

    The gradient of every node's pose is a wrench about the world's origin; wrenches add up towards the root, and a
    joint's gradient is its twist times the wrench of all that hangs on it.
    """

    generate_vmap_rule = True

    @staticmethod
    def forward(theta: Tensor, T_world_base: Tensor, c: NodeConstants) -> Tensor:
        """Poses of all nodes."""
        return _node_transforms(theta, T_world_base, c)

    @staticmethod
    def setup_context(ctx, inputs: tuple[Tensor, Tensor, NodeConstants], output: Tensor) -> None:
        """Coordinates and poses are all that the way back needs."""
        ctx.save_for_backward(inputs[0], output)
        ctx.constants = inputs[2]

    @staticmethod
    def backward(ctx, gradient: Tensor) -> tuple[Tensor, None, None]:
        """Gradient by the coordinates, from that by the poses."""
        theta, T = ctx.saved_tensors
        c: NodeConstants = ctx.constants
        M = T[..., :3, :] @ gradient[..., :3, :].mT
        moment = torch.stack(
            [M[..., 1, 2] - M[..., 2, 1], M[..., 2, 0] - M[..., 0, 2], M[..., 0, 1] - M[..., 1, 0]], -1
        )
        wrench = torch.cat([gradient[..., :3, 3], moment], dim=-1)
        carried = (c.below @ wrench.flatten(1)).view_as(wrench)
        return (twists(T, theta, c) * carried.index_select(0, c.screw_node)).sum(-1).T, None, None


def posed_nodes(
    theta: Float[Tensor, "batch coordinates"], T_world_base: Float[Tensor, "*#batch 4 4"], c: NodeConstants
) -> Float[Tensor, "nodes batch 4 4"]:
    """Pose of every node in the world; differentiable with respect to theta, not to `T_world_base`."""
    if not theta.requires_grad:
        return _node_transforms(theta, T_world_base, c)
    nodes: Tensor = _NodeTransforms.apply(theta, T_world_base, c)  # pyright: ignore[reportAssignmentType]
    return nodes


def _node_transforms(theta: Tensor, T_world_base: Tensor, c: NodeConstants) -> Tensor:
    """``theta (batch, coordinates)`` to ``(nodes, batch, 4, 4)`` poses of all nodes in the world."""
    local = _local_transforms(theta, c)
    if T_world_base is not c.identity:
        local[c.base_rows] = T_world_base @ local[c.base_rows]
    if local.shape[0] * local.shape[1] <= JUMP_LIMIT:
        for jump in c.jumps:
            local = local.index_select(0, jump) @ local
        return local
    levels = [local[:1]]
    for start, end, above in c.levels:
        levels.append(levels[-1].index_select(0, above) @ local[start:end])
    return torch.cat(levels)


def _local_transforms(theta: Tensor, c: NodeConstants) -> Tensor:
    """``(nodes, batch, 4, 4)`` of every node in its parent."""
    padded = theta if theta.shape[-1] else theta.new_zeros(len(theta), 1)
    x = padded.T.index_select(0, c.coordinate)
    local = (torch.stack([torch.ones_like(x), x.sin(), 1 - x.cos(), x], dim=-1) @ c.basis).unflatten(-1, (4, 4))
    if len(c.balls):
        R = rotation_matrix(theta.T[c.ball_coordinates].permute(0, 2, 1))
        E = torch.zeros_like(local[c.balls])
        E[..., :3, :3], E[..., 3, 3] = R, 1
        E[..., :3, 3] = (c.anchors[:, None, :, None] - R @ c.anchors[:, None, :, None])[..., 0]
        local = local.index_copy(0, c.balls, local[c.balls] @ E)
    return local


def twists(
    T: Float[Tensor, "nodes batch 4 4"], theta: Float[Tensor, "batch coordinates"], c: NodeConstants
) -> Float[Tensor, "coordinates batch 6"]:
    """Twist [v; w] of a unit velocity of each coordinate, in the frame that T maps to."""
    screws = c.screws[:, None].expand(-1, T.shape[1], -1)
    if len(c.balls):
        J = right_jacobian(theta.T[c.ball_coordinates].permute(0, 2, 1))
        v = torch.linalg.cross(c.anchors[:, None, :, None].expand_as(J), J, dim=-2)
        columns = torch.cat([v, J], dim=-2).permute(0, 3, 1, 2)
        screws = screws.index_copy(0, c.ball_coordinates.flatten(), columns.flatten(0, 1))
    frames = T.index_select(0, c.screw_node)
    turned = frames[..., :3, :3] @ screws.unflatten(-1, (2, 3)).mT
    v, w = turned.unbind(-1)
    return torch.cat([v + torch.linalg.cross(frames[..., :3, 3], w), w], dim=-1)
