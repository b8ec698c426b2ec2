"""The parts of a URDF that matter here, checked: links, joints, materials, visuals."""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, replace
from xml.etree.ElementTree import Element

import numpy as np
from jaxtyping import Float
from scipy.spatial.transform import Rotation

from kinesplat.errors import DescriptionError, unknown

JOINT_TYPES = ("revolute", "continuous", "prismatic", "fixed", "floating", "planar")
SHAPES = ("mesh", "box", "cylinder", "sphere", "capsule")
MAX_METRES = 1000.0
MAX_LINKS = 5000
MAX_DEPTH = 1000


@dataclass(frozen=True)
class Material:
    """Colour ``rgba (4,)`` in [0, 1] and texture file name; None where the URDF gives none."""

    rgba: Float[np.ndarray, "4"] | None
    texture: str | None


@dataclass(frozen=True)
class Visual:
    """One visible shape of a link: `sizes` [m] is the box's edges, (radius, length), the radius, or a mesh's scale."""

    T_link_visual: Float[np.ndarray, "4 4"]
    shape: str
    sizes: Float[np.ndarray, " k"]
    file: str
    material: Material
    element: str


@dataclass(frozen=True)
class Joint:
    """One joint: where its child sits at zero, how it moves; `mimic` is (driver, multiplier, offset)."""

    name: str
    kind: str
    parent: str
    child: str
    T_parent_child: Float[np.ndarray, "4 4"]
    axis: Float[np.ndarray, "3"]
    limits: tuple[float, float] | None
    mimic: tuple[str, float, float] | None


@dataclass(frozen=True)
class Urdf:
    """A whole URDF: links in document order with their visuals, joints, and the root link."""

    name: str
    root: str
    links: Mapping[str, tuple[Visual, ...]]
    joints: tuple[Joint, ...]
    warnings: list[str] = field(default_factory=list)


def urdf_elements(robot: Element, source: str) -> Urdf:
    """Read and check the element tree of a URDF.

    Raises:
        DescriptionError: something is missing, doubled, malformed, or the joints do not form one tree; the message
            names the file and the element.
    """
    reader = _Reader(source)
    materials = {reader.name(m, "material"): reader.material(m, {}) for m in robot.findall("material")}
    links: dict[str, tuple[Visual, ...]] = {}
    kind = "visual" if robot.find("link/visual") is not None else "collision"
    for element in robot.findall("link"):
        name = reader.unique(element, "link", links)
        shapes = enumerate(element.findall(kind))
        links[name] = tuple(reader.visual(shape, name, f"{kind} {i}", materials) for i, shape in shapes)
    if kind == "collision" and any(links.values()):
        reader.warnings.append("no link has a <visual>; the <collision> shapes are drawn instead")
    if not links:
        raise DescriptionError(f"{source}: the robot has no <link>")
    if len(links) > MAX_LINKS:
        raise DescriptionError(f"{source}: {len(links)} links; at most {MAX_LINKS}")
    joints: dict[str, Joint] = {}
    for element in (e for e in robot.findall("joint") if e.find("parent") is not None or "type" in e.attrib):
        name = reader.unique(element, "joint", joints)
        joints[name] = reader.joint(element, name, links)
    reader.check_mimics(joints)
    root = reader.root(links, joints.values())
    return Urdf(robot.get("name", "").strip() or "robot", root, links, tuple(joints.values()), reader.warnings)


class _Reader:
    """Turns elements into values; every complaint names the file and the element."""

    def __init__(self, source: str) -> None:
        self.source = source
        self.warnings: list[str] = []

    def fail(self, element: str, problem: str) -> DescriptionError:
        """The error to raise about an element."""
        return DescriptionError(f"{self.source}: {element}: {problem}")

    def name(self, element: Element, kind: str) -> str:
        """Its name, which it must have."""
        name = element.get("name", "").strip()
        if not name:
            raise self.fail(f"<{kind}>", "has no name")
        return name

    def unique(self, element: Element, kind: str, known: Mapping[str, object]) -> str:
        """Its name, which none of the `known` may have."""
        name = self.name(element, kind)
        if name in known:
            raise self.fail(f"{kind} {name!r}", "is defined twice")
        return name

    def numbers(self, text: str | None, where: str, count: int | tuple[int, ...]) -> Float[np.ndarray, " k"]:
        """`count` finite numbers, blank-separated."""
        counts = (count,) if isinstance(count, int) else count
        try:
            values = np.array([float(word) for word in (text or "").replace(",", " ").split()])
        except ValueError as error:
            raise self.fail(where, f"{text!r} is not a list of numbers") from error
        if len(values) not in counts:
            expected = " or ".join(str(c) for c in counts)
            raise self.fail(where, f"{text!r} holds {len(values)} number(s); expected {expected}")
        if not np.isfinite(values).all():
            raise self.fail(where, f"{text!r} is not finite")
        return values

    def metres(self, text: str | None, where: str, count: int, positive: bool = False) -> Float[np.ndarray, " k"]:
        """`count` lengths or places [m], none of them as large as only another unit makes them."""
        values = self.numbers(text, where, count)
        if np.abs(values).max() > MAX_METRES:
            raise self.fail(where, f"{text!r} is more than {MAX_METRES:g} m; is the unit metres?")
        if positive and values.min() <= 0:
            raise self.fail(where, f"{text!r} must be greater than 0")
        return values

    def origin(self, element: Element, where: str) -> Float[np.ndarray, "4 4"]:
        """``<origin xyz rpy>``; roll, pitch, yaw about fixed axes."""
        T, origin = np.eye(4), element.find("origin")
        if origin is not None:
            T[:3, 3] = self.metres(origin.get("xyz", "0 0 0"), f"{where} <origin xyz>", 3)
            rpy = self.numbers(origin.get("rpy", "0 0 0"), f"{where} <origin rpy>", 3)
            T[:3, :3] = Rotation.from_euler("xyz", rpy).as_matrix()
        return T

    def material(self, element: Element | None, known: Mapping[str, Material]) -> Material:
        """Colour and texture of a <material>: its own, or those of the `known` one that it names."""
        if element is None:
            return Material(None, None)
        name = element.get("name", "").strip()
        where, colour, texture = f"material {name!r}", element.find("color"), element.find("texture")
        if colour is None and texture is None:
            return known.get(name, Material(None, None))
        rgba = None
        if colour is not None:
            rgba = self.numbers(colour.get("rgba"), f"{where} <color rgba>", (3, 4))
            rgba = np.clip(np.append(rgba, 1.0)[:4], 0.0, 1.0)
        return Material(rgba, None if texture is None else texture.get("filename"))

    def visual(self, element: Element, link: str, which: str, materials: Mapping[str, Material]) -> Visual:
        """One <visual> of a link; `which` tells it from the others in messages.

        Raises:
            DescriptionError: no single known shape, a size that is none, or an unknown material.
        """
        where = f"link {link!r} {which}"
        shapes = list(element.findall("geometry/*"))
        if len(shapes) != 1:
            raise self.fail(where, f"<geometry> holds {len(shapes)} shapes; expected one of {', '.join(SHAPES)}")
        shape, kind = shapes[0], shapes[0].tag
        if kind not in SHAPES:
            raise self.fail(where, unknown("shape", kind, SHAPES))
        file, where_shape = "", f"{where} <{kind}>"
        if kind == "mesh":
            file = shape.get("filename", "").strip()
            if not file:
                raise self.fail(where_shape, "has no filename")
            sizes = self.numbers(shape.get("scale", "1 1 1"), f"{where_shape} scale", (1, 3))
            sizes = np.broadcast_to(sizes, 3).copy()
            if np.abs(sizes).min() == 0 or np.abs(sizes).max() > 1e6:
                raise self.fail(where_shape, f"scale {shape.get('scale')!r} is zero or absurdly large")
        elif kind == "box":
            sizes = self.metres(shape.get("size"), f"{where_shape} size", 3, positive=True)
        else:
            names = ("radius",) if kind == "sphere" else ("radius", "length")
            parts = [self.metres(shape.get(n), f"{where_shape} {n}", 1, positive=True) for n in names]
            sizes = np.concatenate(parts)
        material = self.material(element.find("material"), materials)
        return Visual(self.origin(element, where), kind, sizes, file, material, where)

    def joint(self, element: Element, name: str, links: Mapping[str, object]) -> Joint:
        """One <joint> between two of the `links`; its axis is made a unit vector.

        Raises:
            DescriptionError: an unknown type or link, an axis without direction, or reversed limits.
        """
        where, kind = f"joint {name!r}", element.get("type", "")
        if kind not in JOINT_TYPES:
            raise self.fail(where, unknown("joint type", kind, JOINT_TYPES))
        parent, child = (self.end(element, end, where, links) for end in ("parent", "child"))
        axis = np.array([1.0, 0.0, 0.0])
        if (found := element.find("axis")) is not None and kind in ("revolute", "continuous", "prismatic", "planar"):
            axis = self.numbers(found.get("xyz"), f"{where} <axis xyz>", 3)
            if np.linalg.norm(axis) < 1e-9:
                raise self.fail(where, "axis has no direction (0 0 0)")
        T = self.origin(element, where)
        limits = self.limits(element, where, kind)
        return Joint(name, kind, parent, child, T, axis / np.linalg.norm(axis), limits, self.mimic(element, where))

    def end(self, element: Element, end: str, where: str, links: Mapping[str, object]) -> str:
        """The link at the joint's ``<parent>`` or ``<child>``."""
        found = element.find(end)
        link = "" if found is None else found.get("link", "")
        if link not in links:
            raise self.fail(where, unknown(f"{end} link", link, links))
        return link

    def limits(self, element: Element, where: str, kind: str) -> tuple[float, float] | None:
        """Lower and upper limit [rad]/[m]; None, with a warning where the file should give them, if there are none.

        Raises:
            DescriptionError: the lower one is above the upper one.
        """
        if kind not in ("revolute", "prismatic"):
            return None
        limit = element.find("limit")
        if limit is None or not {"lower", "upper"} & set(limit.attrib):
            self.warnings.append(f"{where} has no limits; it is taken to have none")
            return None
        bounds = [float(self.numbers(limit.get(n, "0"), f"{where} <limit {n}>", 1)[0]) for n in ("lower", "upper")]
        if bounds[0] > bounds[1]:
            raise self.fail(where, f"limits are reversed: lower {bounds[0]:g} is above upper {bounds[1]:g}")
        if bounds[0] == bounds[1]:
            self.warnings.append(f"{where} has a single value as its range; it is taken to have no limits")
            return None
        widest = 1e3 if kind == "revolute" else MAX_METRES
        if max(abs(b) for b in bounds) > widest:
            self.warnings.append(f"{where} has limits beyond {widest:g}; it is taken to have none")
            return None
        return bounds[0], bounds[1]

    def mimic(self, element: Element, where: str) -> tuple[str, float, float] | None:
        """Mimicked joint, multiplier and offset; None without a <mimic>."""
        mimic = element.find("mimic")
        if mimic is None:
            return None
        multiplier, offset = (
            float(self.numbers(mimic.get(name, default), f"{where} <mimic {name}>", 1)[0])
            for name, default in (("multiplier", "1"), ("offset", "0"))
        )
        return mimic.get("joint", ""), multiplier, offset

    def check_mimics(self, joints: dict[str, Joint]) -> None:
        """Drop the <mimic> of joints that do not move; refuse unknown joints and circles.

        Raises:
            DescriptionError: a joint mimics one that does not exist or does not move, or, in the end, itself.
        """
        moving = {n: j for n, j in joints.items() if j.kind in ("revolute", "continuous", "prismatic")}
        for name, joint in list(joints.items()):
            if joint.mimic is None:
                continue
            if name not in moving:
                self.warnings.append(f"joint {name!r} is {joint.kind}; its <mimic> means nothing")
                joints[name] = replace(joint, mimic=None)
                continue
            if joint.mimic[0] not in moving:
                raise self.fail(f"joint {name!r}", unknown("mimicked joint", joint.mimic[0], moving))
        for name in joints:
            chain = [name]
            while (mimic := joints[chain[-1]].mimic) is not None:
                if mimic[0] in chain:
                    raise self.fail(f"joint {name!r}", f"mimics itself: {' -> '.join([*chain, mimic[0]])}")
                chain.append(mimic[0])

    def root(self, links: Mapping[str, object], joints: Iterable[Joint]) -> str:
        """The only link without a parent, once all joints form one tree."""
        parent: dict[str, Joint] = {}
        for joint in joints:
            if joint.child in parent:
                both = f"joints {parent[joint.child].name!r} and {joint.name!r}"
                raise self.fail(f"link {joint.child!r}", f"has two parents ({both}); a URDF is a tree")
            parent[joint.child] = joint
        roots = [name for name in links if name not in parent]
        reached, level = set(roots), roots
        children: dict[str, list[str]] = {}
        for joint in parent.values():
            children.setdefault(joint.parent, []).append(joint.child)
        for _ in range(MAX_DEPTH):
            level = [child for link in level for child in children.get(link, [])]
            reached |= set(level)
        if level:
            raise self.fail(f"link {level[0]!r}", f"hangs more than {MAX_DEPTH} joints away from the root")
        if circle := [name for name in links if name not in reached]:
            raise self.fail(f"link {circle[0]!r}", "hangs in a circle of joints; a URDF is a tree")
        if len(roots) > 1:
            raise self.fail("links " + ", ".join(repr(r) for r in roots[:5]), "have no parent; a URDF has one root")
        return roots[0]
