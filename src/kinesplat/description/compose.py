"""Several robots in one scene, a tool on a robot, or a part of a robot: done on MuJoCo specifications."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import mujoco
import numpy as np
from jaxtyping import Float
from scipy.spatial.transform import Rotation

from kinesplat.description.mujoco_tree import tree_of
from kinesplat.description.sources import Loaded
from kinesplat.description.visuals import HIDDEN_GROUP, VISUAL_GROUP, visual_geoms
from kinesplat.errors import DescriptionError, unknown


@dataclass(frozen=True)
class Part:
    """One description in a combination.

    Attributes:
        source: what `load_description` takes.
        attach_to: link of an earlier part (with its prefix) that carries this one; "" stands in the world.
        T_parent_part: ``(4, 4)`` where the part's world frame sits on that link, or in the world [m].
        prefix: put before the part's names as ``prefix/``; by default "" for the first part, then the part's name.
        subtree: only this link of the part and what hangs on it, see `subtree_of`.
    """

    source: str | Path | mujoco.MjSpec
    attach_to: str = ""
    T_parent_part: Float[np.ndarray, "4 4"] | None = None
    prefix: str | None = None
    subtree: str | None = None


@dataclass(frozen=True)
class Combined:
    """A specification and the home configuration of its joints by name [rad or m]."""

    loaded: Loaded
    canonical: Mapping[str, float]


def subtree_of(loaded: Loaded, link: str) -> Combined:
    """The link and everything below it, standing at the origin of the world; the joints above it are gone.

    Raises:
        DescriptionError: there is no such link.
    """
    canonical = _canonical(loaded)
    spec = loaded.spec
    body = _body(spec, link, loaded.source)
    joints = {j.name for b in [body, *body.find_all(mujoco.mjtObj.mjOBJ_BODY)] for j in b.joints}
    joints -= {j.name for j in body.joints}
    bodies = {body.name, *(b.name for b in body.find_all(mujoco.mjtObj.mjOBJ_BODY))}
    _drop_loose_ends(spec, joints, bodies)
    part = mujoco.MjSpec()
    part.modelname = loaded.name
    _same_options(part, spec)
    for joint in list(body.joints):
        spec.delete(joint)
    kept = part.worldbody.add_frame().attach_body(body, "", "")
    kept.pos, kept.quat = np.zeros(3), np.array([1.0, 0.0, 0.0, 0.0])
    name = f"{loaded.name}:{link}"
    return Combined(
        Loaded(part, name, f"{loaded.source}:{link}", loaded.licence, loaded.warnings),
        {joint: value for joint, value in canonical.items() if joint in joints},
    )


def combined(parts: Sequence[tuple[Part, Loaded]]) -> Combined:
    """All parts in one specification.

    Raises:
        DescriptionError: a link to attach to does not exist, or a free-floating part is to be attached.
    """
    spec = mujoco.MjSpec()
    spec.modelname = "+".join(loaded.name for _, loaded in parts)
    canonical: dict[str, float] = {}
    used: set[str] = set()
    for part, loaded in parts:
        if part.subtree is not None:
            reduced = subtree_of(loaded, part.subtree)
            loaded, own = reduced.loaded, reduced.canonical
        else:
            own = _canonical(loaded)
        prefix = _prefix(part, loaded.name, used)
        _mark_visuals(loaded)
        for key in list(loaded.spec.keys):
            loaded.spec.delete(key)
        _same_options(loaded.spec, spec)
        T = np.eye(4) if part.T_parent_part is None else part.T_parent_part
        quat = Rotation.from_matrix(T[:3, :3]).as_quat(scalar_first=True)
        parent = _body(spec, part.attach_to, spec.modelname) if part.attach_to else spec.worldbody
        if part.attach_to:
            _hold_base(loaded.spec)
        spec.attach(loaded.spec, frame=parent.add_frame(pos=T[:3, 3], quat=quat), prefix=prefix)
        canonical |= {prefix + joint: value for joint, value in own.items()}
    licence = " | ".join(dict.fromkeys(loaded.licence for _, loaded in parts))
    source = " + ".join(loaded.source for _, loaded in parts)
    warnings = tuple(w for _, loaded in parts for w in loaded.warnings)
    return Combined(Loaded(spec, spec.modelname, source, licence, warnings), canonical)


def _canonical(loaded: Loaded) -> dict[str, float]:
    tree = tree_of(loaded.compile()).tree
    return dict(zip(tree.joint_names, tree.q_canonical.tolist(), strict=True))


def _body(spec: mujoco.MjSpec, name: str, source: str) -> mujoco.MjsBody:
    body = spec.body(name)
    if body is None:
        links = [b.name for b in spec.bodies if b.name != "world"]
        raise DescriptionError(f"{source}: {unknown('link', name, links)}")
    return body


def _prefix(part: Part, name: str, used: set[str]) -> str:
    wanted = part.prefix if part.prefix is not None else ("" if not used else name.replace("/", "_"))
    prefix, number = f"{wanted}/" if wanted else "", 2
    while prefix in used:
        prefix, number = f"{wanted or name}_{number}/", number + 1
    used.add(prefix)
    return prefix


def _mark_visuals(loaded: Loaded) -> None:
    """Each part chooses its visible geoms by its own conventions; then all use group 2."""
    visible = set(visual_geoms(loaded.compile()))
    for geom in loaded.spec.geoms:
        geom.group = VISUAL_GROUP if geom.id in visible else HIDDEN_GROUP


def _hold_base(spec: mujoco.MjSpec) -> None:
    """Take a free base's joint away, so that the part can be attached."""
    for joint in list(spec.joints):
        if joint.type == mujoco.mjtJoint.mjJNT_FREE:
            spec.delete(joint)


def _same_options(part: mujoco.MjSpec, whole: mujoco.MjSpec) -> None:
    """Physics options mean nothing here, but MuJoCo complains where those of parts differ."""
    for name in ("integrator", "cone", "impratio", "timestep", "solver", "jacobian", "disableflags", "enableflags"):
        setattr(part.option, name, getattr(whole.option, name))


def _drop_loose_ends(spec: mujoco.MjSpec, joints: set[str], bodies: set[str]) -> None:
    """Remove what refers to joints or bodies that are going away."""
    tendons = {t.name for t in spec.tendons if not {w.target.name for w in t.path if w.target} <= joints}
    for actuator in list(spec.actuators):
        if actuator.target not in joints or actuator.target in tendons:
            spec.delete(actuator)
    for equality in list(spec.equalities):
        ends = {equality.name1, equality.name2} - {""}
        if not (ends <= joints or ends <= bodies):
            spec.delete(equality)
    for element in [*spec.keys, *spec.sensors, *spec.tendons, *spec.excludes, *spec.pairs, *spec.tuples]:
        spec.delete(element)
