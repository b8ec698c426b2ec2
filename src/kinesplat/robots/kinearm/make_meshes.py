"""Write the meshes of kinearm into ``assets/`` beside this file. Run it again after changing a number here."""

from pathlib import Path

import numpy as np
import trimesh

ASSETS = Path(__file__).parent / "assets"
SEGMENTS = 32


def lathe(profile: list[tuple[float, float]]) -> trimesh.Trimesh:
    """Closed solid of revolution about z through points (radius, height) [m], from bottom to top."""
    return trimesh.creation.revolve(np.array(profile), sections=SEGMENTS)


def bone(length: float, lower: tuple[float, float], upper: tuple[float, float], bevel: float) -> trimesh.Trimesh:
    """Link between two joints a distance `length` along z, both about y: a bevelled hull of two discs.

    `lower` and `upper` are (radius, half width along y) of the discs [m].
    """
    angle = np.linspace(0.0, 2.0 * np.pi, SEGMENTS, endpoint=False)
    points = []
    for height, (radius, half_width) in ((0.0, lower), (length, upper)):
        for y, r in ((half_width, radius - bevel), (half_width - bevel, radius)):
            ring = np.stack([r * np.cos(angle), np.full(SEGMENTS, y), height + r * np.sin(angle)], axis=-1)
            points += [ring, ring * [1.0, -1.0, 1.0]]
    return trimesh.convex.convex_hull(np.concatenate(points))


def wedge(bottom: tuple[float, float], top: tuple[float, float], height: float, bevel: float) -> trimesh.Trimesh:
    """Bevelled frustum along z with half edges `bottom` and `top` [m]."""
    points = []
    for z, sizes in ((0.0, bottom), (height, top)):
        inset = np.sign(z - 0.5 * height) * bevel
        for x, y, level in ((0, bevel, z - inset), (bevel, 0, z - inset), (bevel, bevel, z)):
            for sx, sy in ((1, 1), (1, -1), (-1, 1), (-1, -1)):
                points.append((sx * (sizes[0] - x), sy * (sizes[1] - y), level))
    return trimesh.convex.convex_hull(np.array(points))


MESHES = {
    "base": lathe([(0, 0), (0.085, 0), (0.09, 0.006), (0.088, 0.02), (0.062, 0.045), (0.055, 0.075), (0, 0.075)]),
    "upper_arm": bone(0.23, (0.047, 0.026), (0.036, 0.022), 0.006),
    "forearm": bone(0.10, (0.031, 0.018), (0.03, 0.028), 0.005),
    "palm": wedge((0.026, 0.03), (0.02, 0.058), 0.04, 0.006),
    "finger": wedge((0.013, 0.009), (0.008, 0.005), 0.075, 0.003),
}

if __name__ == "__main__":
    ASSETS.mkdir(exist_ok=True)
    for name, mesh in MESHES.items():
        (ASSETS / f"{name}.obj").write_text(
            "# kinearm, made by make_meshes.py, Apache-2.0\n"
            + trimesh.exchange.obj.export_obj(mesh, header=None, digits=5, include_normals=False)
        )
