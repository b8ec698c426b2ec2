"""Forward kinematics of a robot as flat arrays: batched, differentiable, without a physics engine."""

import json
from dataclasses import dataclass
from functools import cached_property

import torch
from jaxtyping import Bool, Float, Int64, Num
from torch import Tensor

from kinesplat.couplings import Couplings
from kinesplat.errors import InputError, ModelFileError
from kinesplat.product_of_exponentials import NodeConstants, posed_nodes, twists
from kinesplat.rotation_vectors import cross_matrix

JOINT_TYPES = ("fixed", "hinge", "slide", "ball")
FIXED, HINGE, SLIDE, BALL = range(4)


@dataclass(frozen=True, eq=False)
class KinematicTree:
    """A robot's kinematics: nodes are joints (or fixed steps) in a tree, links sit on nodes.

    Node i maps to its parent by ``node_transform[i] @ exp(joint)``: a hinge turns by its coordinate about
    `node_axis` through `node_anchor`, a slide moves along `node_axis`, a ball turns by a rotation vector (three
    coordinates) about `node_anchor`; all in the node's own frame. Node 0 is the root and stays put.
    Arrays are float64 whatever the dtype of q.

    Attributes:
        link_names: names of the links in tree order.
        joint_names: names of the entries of q; a ball joint has three, with ``.x``, ``.y``, ``.z`` appended.
        joint_types: "hinge" [rad], "slide" [m] or "ball" [rad] for every entry of q.
        parents: ``(links,)`` parent link, -1 for a link that hangs on the world.
        q_lower: ``(dof,)`` lower limits [rad or m]; -pi (or -1 m) where there is none.
        q_upper: ``(dof,)`` upper limits [rad or m]; pi (or 1 m) where there is none.
        q_limited: ``(dof,)`` whether the joint has limits.
        q_canonical: ``(dof,)`` the description's home configuration, within limits.
        T_world_base: ``(4, 4)`` where the base is unless a call says otherwise.
        base_node: node that a free base moves; 0 when the base is fixed, then everything moves with `T_world_base`.
        node_parent: ``(nodes,)`` parent node, smaller than the node itself; 0 for the root.
        node_type: ``(nodes,)`` index into `JOINT_TYPES`.
        node_coordinate: ``(nodes,)`` (first) coordinate of the node, -1 for fixed ones.
        node_transform: ``(nodes, 4, 4)`` node in its parent when its coordinates are zero [m].
        node_axis: ``(nodes, 3)`` unit axis of a hinge or slide.
        node_anchor: ``(nodes, 3)`` point that a hinge or ball leaves in place [m].
        link_node: ``(links,)`` node that carries the link; the link's frame is the node's.
        couplings: how coordinates follow from q.
    """

    link_names: tuple[str, ...]
    joint_names: tuple[str, ...]
    joint_types: tuple[str, ...]
    parents: Int64[Tensor, " links"]
    q_lower: Float[Tensor, " dof"]
    q_upper: Float[Tensor, " dof"]
    q_limited: Bool[Tensor, " dof"]
    q_canonical: Float[Tensor, " dof"]
    T_world_base: Float[Tensor, "4 4"]
    base_node: int
    node_parent: Int64[Tensor, " nodes"]
    node_type: Int64[Tensor, " nodes"]
    node_coordinate: Int64[Tensor, " nodes"]
    node_transform: Float[Tensor, "nodes 4 4"]
    node_axis: Float[Tensor, "nodes 3"]
    node_anchor: Float[Tensor, "nodes 3"]
    link_node: Int64[Tensor, " links"]
    couplings: Couplings

    @property
    def dof(self) -> int:
        """Number of independent scalar joints."""
        return len(self.joint_names)

    def forward_kinematics(
        self, q: Num[Tensor, "*#batch dof"], T_world_base: Float[Tensor, "*#batch 4 4"] | None = None
    ) -> Float[Tensor, "*b links 4 4"]:
        """Pose of every link in the world, ``Ts_world_link (*batch, links, 4, 4)`` [m], in q's dtype.

        Product of exponentials (Murray, Li, Sastry 1994, section 3.2), one exponential a joint.

        Args:
            q: ``(*batch, dof)`` joint values [rad or m].
            T_world_base: ``(*batch, 4, 4)`` where the base is; the description's own place by default.

        Raises:
            InputError: q has another number of joints, is not floating point, or is not finite.
        """
        q, T_world_base = self._checked(q, T_world_base)
        nodes, _, c = self._nodes(q, T_world_base)
        Ts = nodes.index_select(0, c.link_node).transpose(0, 1)
        return Ts.reshape(*q.shape[:-1], *Ts.shape[1:])

    def link_jacobian(
        self, q: Num[Tensor, "*#batch dof"], T_world_base: Float[Tensor, "*#batch 4 4"] | None = None
    ) -> Float[Tensor, "*b links 6 dof"]:
        """Spatial twist ``[v; w]`` of every link in the world for a unit of each joint's velocity, in closed form.

        ``d T_world_link / dq_j = hat(J[..., link, :, j]) @ T_world_link`` (Murray, Li, Sastry 1994, eq. 3.51).

        Returns:
            ``(*batch, links, 6, dof)``: v [m/rad or 1] of the point at the world's origin, w [1 or 1/m].
        """
        q, T_world_base = self._checked(q, T_world_base)
        nodes, theta, c = self._nodes(q, T_world_base)
        J = twists(nodes, theta, c).permute(1, 2, 0)[:, None] * c.moves[:, None]
        J = J.reshape(*q.shape[:-1], *J.shape[1:])
        if len(self.couplings.dependent):
            return J @ c.couplings.jacobian(q)[..., None, :, :]
        return J

    def clamp(self, q: Float[Tensor, "*batch dof"]) -> Float[Tensor, "*batch dof"]:
        """q moved into the joint limits; joints without limits stay as they are."""
        lower, upper, limited = (t.to(q.device) for t in (self.q_lower, self.q_upper, self.q_limited))
        clamped = torch.where(limited, torch.minimum(torch.maximum(q, lower.to(q)), upper.to(q)), q)
        for first in self._limited_balls:
            before, ball, after = clamped.tensor_split((first, first + 3), dim=-1)
            scale = (upper[first].to(q) / ball.norm(dim=-1, keepdim=True).clamp(min=1e-12)).clamp(max=1.0)
            clamped = torch.cat([before, ball * scale, after], dim=-1)
        return clamped

    def coordinates(self, q: Num[Tensor, "*batch dof"]) -> Float[Tensor, "*batch coordinates"]:
        """Value of every joint coordinate, coupled ones included, in node order [rad or m]."""
        q, _ = self._checked(q, None)
        return self._constants(q).couplings.coordinates_of(q)

    def to_tensors(self) -> dict[str, Tensor]:
        """Everything as named tensors (text as UTF-8 bytes), for a model file."""
        header = {name: getattr(self, name) for name in ("link_names", "joint_names", "joint_types", "base_node")}
        text = json.dumps({**header, "coordinates": self.couplings.coordinates})
        tensors = {name: getattr(self, name) for name in _TENSORS}
        coupled = {f"couplings.{name}": getattr(self.couplings, name) for name in _COUPLING_TENSORS}
        return {"header": torch.tensor(list(text.encode()), dtype=torch.uint8), **tensors, **coupled}

    @classmethod
    def from_tensors(cls, tensors: dict[str, Tensor]) -> "KinematicTree":
        """The tree that `to_tensors` wrote.

        Raises:
            ModelFileError: an array is missing, or they contradict each other.
        """
        try:
            header = json.loads(bytes(tensors["header"].tolist()))
            coupled = {name: tensors[f"couplings.{name}"] for name in _COUPLING_TENSORS}
            tree = cls(
                link_names=tuple(header["link_names"]),
                joint_names=tuple(header["joint_names"]),
                joint_types=tuple(header["joint_types"]),
                base_node=header["base_node"],
                couplings=Couplings(header["coordinates"], **coupled),
                **{name: tensors[name] for name in _TENSORS},
            )
        except KeyError as error:
            raise ModelFileError(f"kinematic tree: array {error} is missing") from error
        except (ValueError, TypeError) as error:
            raise ModelFileError(f"kinematic tree: {error}") from error
        tree._validate()
        return tree

    def _validate(self) -> None:
        nodes, links = len(self.node_parent), len(self.link_names)
        coordinates, c = self.couplings.coordinates, self.couplings
        rows = torch.arange(nodes)
        checks = {
            "node_parent": nodes > 0 and bool(((self.node_parent < rows) | (rows == 0)).all()),
            "node_type": _within(self.node_type, 0, len(JOINT_TYPES)),
            "node_coordinate": _within(self.node_coordinate, -1, coordinates),
            "node_transform": self.node_transform.shape == (nodes, 4, 4),
            "node_axis": self.node_axis.shape == self.node_anchor.shape == (nodes, 3),
            "link_node": len(self.link_node) == links and _within(self.link_node, 0, nodes),
            "parents": len(self.parents) == links and _within(self.parents, -1, links),
            "base_node": 0 <= self.base_node < nodes,
            "q_lower": all(len(t) == self.dof for t in (self.q_lower, self.q_upper, self.q_limited, self.q_canonical)),
            "couplings": len(c.independent) == self.dof
            and all(_within(t, 0, coordinates) for t in (c.independent, c.dependent, c.driver)),
        }
        wrong = [name for name, good in checks.items() if not good]
        if wrong:
            raise ModelFileError(f"kinematic tree: inconsistent {', '.join(wrong)}")

    def _checked(self, q: Tensor, T_world_base: Tensor | None) -> tuple[Tensor, Tensor | None]:
        for name, value in (("q", q), ("T_world_base", T_world_base)):
            if value is not None and not isinstance(value, Tensor):
                raise InputError(f"{name} is a {type(value).__name__}; expected a torch tensor")
        if q.shape[-1:] != (self.dof,):
            names = ", ".join(self.joint_names)
            raise InputError(f"q has shape {tuple(q.shape)}; its last axis must hold the {self.dof} joints ({names})")
        if not q.is_floating_point():
            raise InputError(f"q is {q.dtype}; expected floating point")
        if not bool(torch.isfinite(q).all()):
            bad = torch.nonzero(~torch.isfinite(q))[0].tolist()
            raise InputError(f"q of joint {self.joint_names[bad[-1]]!r} is {q[tuple(bad)].item()} at index {bad}")
        if T_world_base is None:
            return q, None
        if T_world_base.shape[-2:] != (4, 4):
            raise InputError(f"T_world_base has shape {tuple(T_world_base.shape)}; expected (*batch, 4, 4)")
        T_world_base = T_world_base.to(q)
        try:
            batch = torch.broadcast_shapes(q.shape[:-1], T_world_base.shape[:-2])
        except RuntimeError as error:
            shapes = f"q {tuple(q.shape)} and T_world_base {tuple(T_world_base.shape)}"
            raise InputError(f"the batches of {shapes} do not broadcast") from error
        return q.expand(*batch, self.dof), T_world_base.expand(*batch, 4, 4).reshape(-1, 4, 4)

    def _nodes(self, q: Tensor, T_world_base: Tensor | None) -> tuple[Tensor, Tensor, NodeConstants]:
        """Poses ``(nodes, batch, 4, 4)`` of all nodes in the world, and the coordinates, the batch flattened."""
        c = self._constants(q)
        theta = c.couplings.coordinates_of(q).reshape(q.shape[:-1].numel(), self.couplings.coordinates)
        T_inside = c.T_world_base if T_world_base is None else T_world_base
        if not T_inside.requires_grad:
            return posed_nodes(theta, T_inside, c), theta, c
        nodes = posed_nodes(theta, c.identity, c)
        moved = T_inside @ nodes
        return moved if c.all_on_base else torch.where(c.on_base[:, None, None, None], moved, nodes), theta, c

    def _constants(self, q: Tensor) -> NodeConstants:
        key = (q.device, q.dtype)
        if key not in self._cache:
            self._cache[key] = _constants_of(self, *key)
        return self._cache[key]

    @cached_property
    def _cache(self) -> dict[tuple[torch.device, torch.dtype], NodeConstants]:
        return {}

    @cached_property
    def _limited_balls(self) -> list[int]:
        entry_of = {coordinate: entry for entry, coordinate in enumerate(self.couplings.independent.tolist())}
        firsts = self.node_coordinate[self.node_type == BALL].tolist()
        entries = [entry_of[first] for first in firsts if first in entry_of]
        return [entry for entry in entries if self.q_limited[entry]]


_TENSORS = [name for name, kind in KinematicTree.__annotations__.items() if "Tensor" in str(kind)]
_COUPLING_TENSORS = [name for name, kind in Couplings.__annotations__.items() if "Tensor" in str(kind)]


def _constants_of(tree: KinematicTree, device: torch.device, dtype: torch.dtype) -> NodeConstants:
    """Derive, for one dtype and device, what the products of exponentials need."""
    parents = tree.node_parent.tolist()
    depth = [0] * len(parents)
    for node in range(1, len(parents)):
        depth[node] = depth[parents[node]] + 1
    order = sorted(range(len(parents)), key=depth.__getitem__)
    place = torch.tensor(order).argsort()
    parent = place[tree.node_parent[order]]
    below = torch.eye(len(order), dtype=torch.float64)
    for node in range(len(order) - 1, 0, -1):
        below[parent[node]] += below[node]
    balls = (tree.node_type[order] == BALL).nonzero()[:, 0]
    (screws, screw_node), link_node = _screws(tree, place), place[tree.link_node]
    base, identity = int(place[tree.base_node]), torch.eye(4, dtype=dtype, device=device)
    on_base = below[base] > 0
    return NodeConstants(
        couplings=tree.couplings.to(device, dtype),
        basis=_basis(tree)[order].to(device, dtype),
        coordinate=tree.node_coordinate[order].clamp(min=0).to(device),
        balls=balls.to(device),
        ball_coordinates=(tree.node_coordinate[order][balls, None] + torch.arange(3)).to(device),
        anchors=tree.node_anchor[order][balls].to(device, dtype),
        screws=screws.to(device, dtype),
        screw_node=screw_node.to(device),
        below=below.to(device, dtype),
        moves=below[screw_node][:, link_node].T.to(device, dtype).contiguous(),
        link_node=link_node.to(device),
        T_world_base=tree.T_world_base.to(device, dtype) if base else identity,
        on_base=on_base.to(device),
        levels=_levels([depth[node] for node in order], parent, device),
        jumps=_jumps(parent, max(depth), device),
        identity=identity,
        base_rows=slice(base, base + 1) if base else slice(1, sum(d == 1 for d in depth) + 1),
        all_on_base=bool(on_base[link_node].all()),
    )


def _basis(tree: KinematicTree) -> Tensor:
    """A node's transform is ``basis[0] + sin x basis[1] + (1 - cos x) basis[2] + x basis[3]`` of its coordinate x."""
    hinge, slide = ((tree.node_type == kind).double()[:, None, None] for kind in (HINGE, SLIDE))
    K = cross_matrix(tree.node_axis) * hinge
    generator = torch.zeros_like(tree.node_transform)
    generator[:, :3, :3] = K
    generator[:, :3, 3] = -(K @ tree.node_anchor[..., None])[..., 0]
    squared = generator @ generator
    shift = torch.zeros_like(generator)
    shift[:, :3, 3] = tree.node_axis * slide[..., 0]
    parts = [torch.eye(4, dtype=generator.dtype).expand_as(generator), generator, squared, shift]
    return torch.stack([tree.node_transform @ part for part in parts], dim=1).flatten(2)


def _screws(tree: KinematicTree, place: Tensor) -> tuple[Tensor, Tensor]:
    """Twist [v; w] of every coordinate in its node's frame (zero for balls, they depend on q), and its node."""
    screws = torch.zeros(tree.couplings.coordinates, 6, dtype=torch.float64)
    screw_node = torch.zeros(tree.couplings.coordinates, dtype=torch.int64)
    for node, (kind, first) in enumerate(zip(tree.node_type.tolist(), tree.node_coordinate.tolist(), strict=True)):
        axis = tree.node_axis[node]
        if kind == HINGE:
            screws[first] = torch.cat([torch.linalg.cross(tree.node_anchor[node], axis), axis])
        if kind == SLIDE:
            screws[first, :3] = axis
        if kind != FIXED:
            screw_node[first : first + (3 if kind == BALL else 1)] = place[node]
    return screws, screw_node


def _levels(depth: list[int], parent: Tensor, device: torch.device) -> tuple[tuple[int, int, Tensor], ...]:
    """First and last row of every level, and the place of its parents in the level above."""
    bounds = [depth.index(level) for level in range(max(depth) + 1)] + [len(depth)]
    above = zip(bounds, bounds[1:], bounds[2:], strict=False)
    return tuple((start, end, (parent[start:end] - first).to(device)) for first, start, end in above)


def _jumps(parent: Tensor, depth: int, device: torch.device) -> tuple[Tensor, ...]:
    """Ancestors 1, 2, 4, ... steps up; the product over them is the whole chain."""
    jumps = []
    for _ in range(depth.bit_length()):
        jumps.append(parent.to(device))
        parent = parent[parent]
    return tuple(jumps)


def _within(index: Tensor, low: int, high: int) -> bool:
    return bool(((index >= low) & (index < high)).all())
