"""Closed linkages (`connect`, `weld`): tables of the passive joints over the joint that drives them.

A loop closes where two bodies of the tree are pinned together. Of the joints in a loop, as many stay independent as
the loop leaves free, actuated ones first; the others settle where MuJoCo lets them settle: on the closed loop, within
their limits, at the least energy of their springs.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property

import mujoco
import numpy as np
import torch
from jaxtyping import Bool, Float, Int64
from scipy.interpolate import CubicSpline
from scipy.spatial.transform import Rotation

from kinesplat.description.equalities import Follow
from kinesplat.description.frames import transform
from kinesplat.kinematics import KinematicTree

SEGMENTS = 96
CLOSED = 1e-6
"""A loop counts as closed below this gap [m or rad]."""

_RANK_TOLERANCE = 1e-5
_ANCHOR_WEIGHT = 1e-6  # pull towards the last solution, for what neither the loop nor a spring decides
_MAX_STEP = 0.3


@dataclass(frozen=True)
class Pin:
    """Two bodies held together: at a point, or (with `fixed`) in their whole relative pose; link -1 is the world."""

    name: str
    links: tuple[int, int]
    T_links_pin: tuple[Float[np.ndarray, "4 4"], Float[np.ndarray, "4 4"]]
    fixed: bool


@dataclass(frozen=True)
class Passive:
    """What decides where joints settle, one entry for every entry of the tree's q."""

    stiffness: Float[np.ndarray, " dof"]
    rest: Float[np.ndarray, " dof"]
    actuated: Bool[np.ndarray, " dof"]
    ball: Bool[np.ndarray, " dof"]


@dataclass(frozen=True)
class Solved:
    """Rows for `Couplings`, narrower limits of drivers by q entry, and what could not be solved."""

    rows: Mapping[int, Follow]
    limits: Mapping[int, tuple[float, float]]
    warnings: list[str]


def pins_of(model: mujoco.MjModel) -> list[Pin]:
    """Active `connect` and `weld` equalities between bodies of the robot; those with a mocap body are left out."""
    pins = []
    for equality in np.flatnonzero(model.eq_active0):
        kind = int(model.eq_type[equality])
        if kind not in (int(mujoco.mjtEq.mjEQ_CONNECT), int(mujoco.mjtEq.mjEQ_WELD)):
            continue
        ids = int(model.eq_obj1id[equality]), int(model.eq_obj2id[equality])
        by_site = int(model.eq_objtype[equality]) == int(mujoco.mjtObj.mjOBJ_SITE)
        bodies = tuple(int(model.site_bodyid[i]) for i in ids) if by_site else ids
        if any(model.body_mocapid[b] >= 0 for b in bodies):
            continue
        fixed = kind == int(mujoco.mjtEq.mjEQ_WELD)
        if by_site:
            frames = tuple(transform(model.site_pos[i], model.site_quat[i]) for i in ids)
        else:
            frames = _pin_frames(model.eq_data[equality], fixed)
        name = model.equality(int(equality)).name or " and ".join(model.body(b).name for b in bodies)
        pins.append(Pin(name, (bodies[0] - 1, bodies[1] - 1), (frames[0], frames[1]), fixed))
    return pins


def solve_linkages(tree: KinematicTree, pins: list[Pin], passive: Passive, start: Float[np.ndarray, " dof"]) -> Solved:
    """Tables for every closed linkage of `tree`, whose couplings hold the joint equalities alone.

    Args:
        start: ``(dof,)`` configuration at which the loops are closed, or nearly [rad or m].
    """
    rows: dict[int, Follow] = {}
    limits: dict[int, tuple[float, float]] = {}
    warnings: list[str] = []
    for members, loop in _loops(tree, pins, start):
        linkage = _Linkage(tree, loop, members, passive, start.copy())
        names = ", ".join(pin.name for pin in loop)
        drivers = linkage.drivers()
        if len(drivers) > 1:
            joints = ", ".join(tree.joint_names[i] for i in drivers)
            warnings.append(f"linkage {names} has {len(drivers)} free joints ({joints}); its loop is left open")
        elif not drivers:
            warnings.append(f"linkage {names} leaves no joint free; its joints are left open")
        elif (table := linkage.table(drivers[0])) is None:
            warnings.append(f"linkage {names} cannot be closed; its loop is left open")
        else:
            rows.update(table.rows)
            limits[drivers[0]] = table.limits
    return Solved(rows, limits, warnings)


def _pin_frames(data: np.ndarray, fixed: bool) -> tuple[np.ndarray, np.ndarray]:
    """Frames of the pin in both bodies from MuJoCo's ``eq_data``."""
    identity = np.array([1.0, 0.0, 0.0, 0.0])
    if not fixed:
        return transform(data[:3], identity), transform(data[3:6], identity)
    return transform(data[3:6], data[6:10]), np.eye(4)


def _loops(
    tree: KinematicTree, pins: list[Pin], start: Float[np.ndarray, " dof"]
) -> list[tuple[Int64[np.ndarray, " k"], list[Pin]]]:
    """Pins that share joints, together with the entries of q that move them."""
    rng = np.random.default_rng(0)
    q = start + 0.1 * rng.normal(size=tree.dof)
    groups: list[tuple[set[int], list[Pin]]] = []
    for pin in pins:
        _, J = _gap(tree, [pin], q)
        moving = set(np.flatnonzero(np.abs(J).max(axis=0) > 1e-9).tolist())
        if not moving:
            continue
        touching = [g for g in groups if g[0] & moving]
        groups = [g for g in groups if not g[0] & moving]
        groups.append((moving.union(*(g[0] for g in touching)), [*(p for g in touching for p in g[1]), pin]))
    return [(np.array(sorted(members)), loop) for members, loop in groups]


def _gap(
    tree: KinematicTree, pins: list[Pin], q: Float[np.ndarray, " dof"]
) -> tuple[Float[np.ndarray, " rows"], Float[np.ndarray, "rows dof"]]:
    """How far the pins are from closed [m, rad], seen from their first body, and the derivative by q."""
    q_tensor = torch.from_numpy(q)
    Ts = np.concatenate([tree.forward_kinematics(q_tensor).numpy(), np.eye(4)[None]])
    Js = np.concatenate([tree.link_jacobian(q_tensor).numpy(), np.zeros((1, 6, tree.dof))])
    gaps, jacobians = [], []
    for pin in pins:
        T = [Ts[link] @ frame for link, frame in zip(pin.links, pin.T_links_pin, strict=True)]
        J = [Js[link] for link in pin.links]
        velocity = [j[:3] - np.cross(t[:3, 3], j[3:], axisb=0, axisc=0) for j, t in zip(J, T, strict=True)]
        R, apart = T[0][:3, :3].T, T[0][:3, 3] - T[1][:3, 3]
        gaps.append(R @ apart)
        jacobians.append(R @ (velocity[0] - velocity[1] - np.cross(J[0][3:], apart, axisa=0, axisc=0)))
        if pin.fixed:
            gaps.append(R @ Rotation.from_matrix(R.T @ T[1][:3, :3].T).as_rotvec())
            jacobians.append(R @ (J[0][3:] - J[1][3:]))
    return np.concatenate(gaps), np.concatenate(jacobians)


@dataclass(frozen=True)
class _Table:
    rows: dict[int, Follow]
    limits: tuple[float, float]


@dataclass(frozen=True)
class _Linkage:
    """One group of pins and the entries `members` of q that move them; `q` is where solutions start from."""

    tree: KinematicTree
    pins: list[Pin]
    members: Int64[np.ndarray, " k"]
    passive: Passive
    q: Float[np.ndarray, " dof"]

    def drivers(self) -> list[int]:
        """Entries of q that stay independent: actuated joints, then, where nothing else decides, others.

        Of these, joints that already drive others come first; sprung joints and balls settle by themselves.
        """
        leading = set(self.tree.couplings.driver.tolist())
        coordinates = self.tree.couplings.independent.tolist()
        actuated, own_rest = self.passive.actuated, (self.passive.stiffness > 0) | self.passive.ball
        candidates = [i for i in self.members.tolist() if actuated[i] or not own_rest[i]]
        candidates.sort(key=lambda i: (not actuated[i], coordinates[i] not in leading, i))
        J = self._typical_jacobian()
        rank = _rank(J[:, self.members])
        chosen: list[int] = []
        for entry in candidates:
            rest = [i for i in self.members if i not in (*chosen, entry)]
            decided = np.concatenate([J[:, [*rest, entry]], np.diag(own_rest[[*rest, entry]].astype(float))])
            if chosen and not actuated[entry] and _rank(decided) == len(rest) + 1:
                break
            if _rank(J[:, rest]) == rank:
                chosen.append(entry)
        return chosen

    def settle(self, q: Float[np.ndarray, " dof"], held: list[int]) -> Float[np.ndarray, " dof"] | None:
        """Closed configuration of least spring energy near q with the entries `held` in place; None if there is none.

        Sequential quadratic programming with an active set for the limits (Nocedal and Wright 2006, chapters 16, 18).
        """
        free = np.array([i for i in self.members if i not in held])
        lower, upper = self._bounds
        q = q.copy()
        q[free] = np.clip(q[free], lower[free], upper[free])
        stuck: set[int] = set()
        for _ in range(200):
            gap, J = _gap(self.tree, self.pins, q)
            movable = np.array([i for i in free if i not in stuck], dtype=int)
            step = self._step(q, gap, J[:, movable], movable)
            step *= min(1.0, _MAX_STEP / max(np.abs(step).max(initial=0.0), 1e-12))
            share, blocked = self._first_limit(q, step, movable, J)
            q[movable] += share * step
            if blocked is not None:
                stuck.add(blocked)
            elif np.abs(step).max(initial=0.0) < 1e-11:
                released = self._pulled_off(q, movable, J, stuck)
                if released is None:
                    break
                stuck.remove(released)
        gap, _ = _gap(self.tree, self.pins, q)
        return q if np.abs(gap).max() < CLOSED else None

    def table(self, driver: int) -> _Table | None:
        """Every other member as cubic segments of the driver, over as much of its range as the linkage reaches."""
        lower, upper = (float(t[driver]) for t in (self.tree.q_lower, self.tree.q_upper))
        start = self.settle(self.q, [driver])
        if start is None or not lower - 1e-9 <= start[driver] <= upper + 1e-9:
            start = self._nearest_closed(driver, lower, upper)
        if start is None:
            return None
        below = self._march(start, driver, np.linspace(start[driver], lower, SEGMENTS // 2 + 1)[1:])
        above = self._march(start, driver, np.linspace(start[driver], upper, SEGMENTS // 2 + 1)[1:])
        path = np.array([*reversed(below), start, *above])
        distinct = np.concatenate([[True], np.diff(path[:, driver]) > 1e-9])
        path = path[distinct]
        if len(path) < 4:
            return None
        reach = float(path[0, driver]), float(path[-1, driver])
        grid = np.linspace(*reach, SEGMENTS + 1)
        coordinates = self.tree.couplings.independent.numpy()
        followers = [i for i in self.members if i != driver]
        splines = CubicSpline(path[:, driver], path[:, followers])
        values, slopes = splines(grid), splines(grid, 1)
        rows = {
            int(coordinates[f]): _hermite_row(int(coordinates[driver]), grid, values[:, k], slopes[:, k])
            for k, f in enumerate(followers)
        }
        return _Table(rows, reach)

    def _nearest_closed(self, driver: int, lower: float, upper: float) -> Float[np.ndarray, " dof"] | None:
        for value in np.linspace(lower, upper, 17):
            q = self.q.copy()
            q[driver] = value
            if (closed := self.settle(q, [driver])) is not None:
                return closed
        return None

    def _march(self, q: Float[np.ndarray, " dof"], driver: int, values: np.ndarray) -> list[np.ndarray]:
        """Closed configurations along `values` of the driver, until the linkage cannot follow."""
        path: list[np.ndarray] = []
        before = q
        for value in values:
            guess = q + (q - before)
            guess[driver] = value
            closed = self.settle(guess, [driver])
            if closed is None or np.abs(closed - q).max() > 10 * _MAX_STEP:
                break
            before, q = q, closed
            path.append(q)
        return path

    def _step(self, q: np.ndarray, gap: np.ndarray, J: np.ndarray, movable: np.ndarray) -> np.ndarray:
        """Newton step of: least spring energy (and least motion) on the linearised loop."""
        if not len(movable):
            return np.zeros(0)
        spring = self._weight(movable)
        weight, force = spring + _ANCHOR_WEIGHT, spring * (self.passive.rest - q)[movable]
        U, s, Vt = np.linalg.svd(J, full_matrices=True)
        rank = int((s > _RANK_TOLERANCE * max(s.max(), 1e-12)).sum())
        step = Vt[:rank].T @ (-(U[:, :rank].T @ gap) / s[:rank])
        null = Vt[rank:]
        if len(null):
            reduced = null @ (weight[:, None] * null.T)
            step = step + null.T @ np.linalg.solve(reduced, null @ (force - weight * step))
        return step

    @cached_property
    def _bounds(self) -> tuple[np.ndarray, np.ndarray]:
        limited = self.tree.q_limited.numpy()
        lower, upper = self.tree.q_lower.numpy(), self.tree.q_upper.numpy()
        return np.where(limited, lower, -np.inf), np.where(limited, upper, np.inf)

    def _weight(self, entries: np.ndarray) -> np.ndarray:
        stiffness = self.passive.stiffness[entries]
        return stiffness / max(self.passive.stiffness[self.members].max(), 1e-12)

    def _first_limit(
        self, q: np.ndarray, step: np.ndarray, movable: np.ndarray, J: np.ndarray
    ) -> tuple[float, int | None]:
        """Share of the step up to the first limit that a joint can stop at with the loop still able to close."""
        lower, upper = self._bounds
        room = np.where(step > 0, upper[movable] - q[movable], q[movable] - lower[movable])
        shares = np.maximum(room, 0.0) / np.maximum(np.abs(step), 1e-300)
        rank = _rank(J[:, movable]) if len(movable) else 0
        for index in np.argsort(shares):
            if shares[index] >= 1.0:
                break
            rest = np.delete(movable, index)
            if len(rest) and _rank(J[:, rest]) == rank:
                return float(shares[index]), int(movable[index])
        return 1.0, None

    def _pulled_off(self, q: np.ndarray, movable: np.ndarray, J: np.ndarray, stuck: set[int]) -> int | None:
        """The joint at its limit that the springs pull away from it the most."""
        lower, _ = self._bounds
        gradient = np.zeros(len(q))
        gradient[self.members] = self._weight(self.members) * (q - self.passive.rest)[self.members]
        multipliers = np.linalg.lstsq(J[:, movable].T, -gradient[movable], rcond=_RANK_TOLERANCE)[0]
        reduced = gradient + J.T @ multipliers
        inward = {i: -reduced[i] if q[i] - lower[i] < 1e-9 else reduced[i] for i in stuck}
        worst = max(inward, key=inward.__getitem__, default=None)
        return worst if worst is not None and inward[worst] > 1e-9 else None

    def _typical_jacobian(self) -> np.ndarray:
        """Derivative of the gap at a closed configuration away from singular places."""
        rng = np.random.default_rng(1)
        tried = []
        for _ in range(5):
            moved = self.q.copy()
            moved[self.members] += 0.1 * rng.normal(size=len(self.members))
            tried.append(_gap(self.tree, self.pins, self._projected(moved))[1])
        return max(tried, key=lambda J: (_rank(J), np.linalg.svd(J, compute_uv=False)[_rank(J) - 1]))

    def _projected(self, q: np.ndarray) -> np.ndarray:
        """Close the loop from q by Gauss-Newton, all members moving."""
        for _ in range(20):
            gap, J = _gap(self.tree, self.pins, q)
            q = q.copy()
            q[self.members] -= np.linalg.lstsq(J[:, self.members], gap, rcond=_RANK_TOLERANCE)[0]
        return q


def _rank(J: np.ndarray) -> int:
    s = np.linalg.svd(J, compute_uv=False)
    return int((s > _RANK_TOLERANCE * max(s.max(initial=0.0), 1e-9)).sum())


def _hermite_row(driver: int, grid: np.ndarray, values: np.ndarray, slopes: np.ndarray) -> Follow:
    """Cubic segments between the grid's points, and a straight one beyond either end."""
    h = grid[1] - grid[0]
    rise = np.diff(values)
    cubic = np.stack(
        [
            values[:-1],
            slopes[:-1],
            (3 * rise / h - 2 * slopes[:-1] - slopes[1:]) / h,
            (slopes[:-1] + slopes[1:] - 2 * rise / h) / h**2,
        ],
        axis=-1,
    )
    first = [values[0] - h * slopes[0], slopes[0], 0.0, 0.0]
    last = [values[-1], slopes[-1], 0.0, 0.0]
    return Follow(driver, np.array([first, *cubic, last]), float(grid[0] - h), float(h))
