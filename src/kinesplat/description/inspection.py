"""What a description holds, as data and as text."""

from collections import Counter
from typing import Any

import numpy as np

from kinesplat.description.mujoco_tree import joint_name
from kinesplat.description.robot import Robot


def inspect(robot: Robot) -> dict[str, Any]:
    """Links, joints with limits and units, couplings, meshes, colours and warnings, ready for JSON."""
    tree = robot.tree
    links = [
        {"name": name, "parent": tree.link_names[parent] if parent >= 0 else None, **_surface(robot, index)}
        for index, (name, parent) in enumerate(zip(tree.link_names, tree.parents.tolist(), strict=True))
    ]
    return {
        "name": robot.name,
        "source": robot.source,
        "licence": robot.licence,
        "dof": tree.dof,
        "base": "free" if robot.base_qpos >= 0 else "fixed",
        "links": links,
        "joints": [_joint(robot, entry) for entry in range(tree.dof)],
        "couplings": _couplings(robot),
        "faces": sum(len(m.faces) for m in robot.link_meshes),
        "colours": _colours(robot),
        "warnings": list(robot.warnings),
    }


def inspection_text(robot: Robot) -> str:
    """The same for people: the tree of links, then tables."""
    data = inspect(robot)
    lines = [
        f"{data['name']}  ({data['source']})",
        f"licence: {data['licence']}",
        f"{data['dof']} joints in q, {len(data['links'])} links, {len(data['couplings'])} coupled, "
        f"{data['base']} base, {data['faces']:,} faces",
        "",
        *_tree_lines(data),
        "",
        f"{'joint':<32} {'type':<6} {'lower':>9} {'upper':>9} {'home':>9} unit",
        *(_joint_line(j) for j in data["joints"]),
    ]
    if data["couplings"]:
        lines += [
            "",
            "coupled joints",
            *(f"  {c['joint']} follows {c['driver']}: {c['rule']}" for c in data["couplings"]),
        ]
    lines += ["", "colours", *(f"  {c['hex']}  {c['meshes']} mesh(es)" for c in data["colours"])]
    if data["warnings"]:
        lines += ["", "warnings", *(f"  {w}" for w in data["warnings"])]
    return "\n".join(lines)


def _surface(robot: Robot, link: int) -> dict[str, int]:
    meshes = [m for m in robot.link_meshes if m.link == link]
    return {"meshes": len(meshes), "faces": sum(len(m.faces) for m in meshes)}


def _joint(robot: Robot, entry: int) -> dict[str, Any]:
    """One entry of q; the keys of numbers end in their unit."""
    tree = robot.tree
    unit = "m" if tree.joint_types[entry] == "slide" else "rad"
    numbers = {"lower": tree.q_lower, "upper": tree.q_upper, "home": tree.q_canonical}
    return {
        "name": tree.joint_names[entry],
        "type": tree.joint_types[entry],
        "limited": bool(tree.q_limited[entry]),
        **{f"{name}_{unit}": float(values[entry]) for name, values in numbers.items()},
    }


def _couplings(robot: Robot) -> list[dict[str, Any]]:
    couplings, found = robot.tree.couplings, []
    for row in range(len(couplings.dependent)):
        coefficients = couplings.coefficients[row]
        table = float(couplings.step[row]) > 0
        constant = not table and not bool(coefficients[0, 1:].any())
        segments = "table" if table else _polynomial(coefficients[0].tolist())
        found.append(
            {
                "joint": _coordinate_name(robot, int(couplings.dependent[row])),
                "driver": "nothing" if constant else _coordinate_name(robot, int(couplings.driver[row])),
                "rule": f"{segments} of {len(coefficients)} segments" if table else segments,
            }
        )
    return found


def _polynomial(coefficients: list[float]) -> str:
    powers = ["", " x", *(f" x^{p}" for p in range(2, len(coefficients)))]
    terms = [f"{c:g}{p}" for c, p in zip(coefficients, powers, strict=True) if c]
    return " + ".join(terms) or "0"


def _coordinate_name(robot: Robot, coordinate: int) -> str:
    model, address = robot.mj_model, robot.coordinate_qpos[coordinate]
    return joint_name(model, int(np.flatnonzero(model.jnt_qposadr <= address)[-1]))


def _colours(robot: Robot) -> list[dict[str, Any]]:
    counts = Counter("texture" if m.texture is not None else _hex(m.rgba) for m in robot.link_meshes)
    return [{"hex": colour, "meshes": count} for colour, count in counts.most_common()]


def _hex(rgba: np.ndarray) -> str:
    return "#" + "".join(f"{round(255 * float(v)):02x}" for v in rgba[:3])


def _tree_lines(data: dict[str, Any]) -> list[str]:
    children: dict[str | None, list[dict[str, Any]]] = {}
    for link in data["links"]:
        children.setdefault(link["parent"], []).append(link)
    lines, pending = [], [(link, 0) for link in reversed(children.get(None, []))]
    while pending:
        link, depth = pending.pop()
        lines.append(f"{'  ' * depth}{link['name']}" + (f"  [{link['faces']:,} faces]" if link["faces"] else ""))
        pending += [(child, depth + 1) for child in reversed(children.get(link["name"], []))]
    return lines


def _joint_line(joint: dict[str, Any]) -> str:
    unit = "m" if joint["type"] == "slide" else "rad"
    lower, upper, home = (joint[f"{name}_{unit}"] for name in ("lower", "upper", "home"))
    limits = f"{lower:>9.4f} {upper:>9.4f}" if joint["limited"] else f"{'none':>9} {'none':>9}"
    return f"{joint['name']:<32} {joint['type']:<6} {limits} {home:>9.4f} {unit}"
