"""Surface sampling: what is kept, how it is shared, and that the Gaussians look like the surface they stand for."""

import mujoco
import numpy as np
import pytest
import torch
import trimesh
from jaxtyping import Float

from kinesplat.camera import Camera
from kinesplat.description import LinkMesh, load_description, robot_from_model
from kinesplat.errors import InputError
from kinesplat.gaussians import Parameters
from kinesplat.kinematics import KinematicTree
from kinesplat.rasterizer import rasterize
from kinesplat.rasterizer.projection import quats_to_rotations
from kinesplat.rasterizer.spherical_harmonics import sh_to_rgb
from kinesplat.surface import sampler
from kinesplat.surface.merging import merge_splats
from kinesplat.surface.meshes import sample_meshes
from kinesplat.surface.patches import headlight_shading, shading_polynomial, share_among_links
from kinesplat.surface.points import SurfacePoints
from kinesplat.surface.sampler import sample_surface
from kinesplat.surface.visibility import covered, seen_from_outside

RIGID = """<mujoco><worldbody><body name="a"><joint axis="0 0 1"/><geom size="0.1"/>
  <body name="b" pos="0 0 0.5"><joint axis="0 1 0" range="-90 90"/><geom size="0.1"/></body></body></worldbody>
  </mujoco>"""


@pytest.fixture(autouse=True)
def _few_points(monkeypatch: pytest.MonkeyPatch) -> None:
    """Surfaces this simple need fewer points to tell what is visible."""
    monkeypatch.setattr(sampler, "LEAST_POINTS", 20_000)


@pytest.fixture(scope="module")
def tree() -> KinematicTree:
    return robot_from_model(mujoco.MjModel.from_xml_string(RIGID), "rigid", "test", "none").tree


def link_mesh(mesh: trimesh.Trimesh, link: int = 0, rgba: tuple[float, ...] = (0.8, 0.5, 0.2, 1.0)) -> LinkMesh:
    normals = np.repeat(mesh.face_normals[:, None], 3, axis=1)
    vertices, faces = np.asarray(mesh.vertices), np.asarray(mesh.faces)
    return LinkMesh(link, vertices, faces, normals, None, None, np.array(rgba), None)


def ball(radius: float, **more: object) -> LinkMesh:
    return link_mesh(trimesh.creation.icosphere(subdivisions=4, radius=radius), **more)


def shell_of(points: SurfacePoints) -> Float[np.ndarray, " n"]:
    return np.linalg.norm(points.positions, axis=-1)


def test_points_are_uniform_in_area() -> None:
    box = link_mesh(trimesh.creation.box((0.4, 0.2, 0.1)))
    points = sample_meshes([box], 20_000, np.random.default_rng(0))
    half = np.array([0.2, 0.1, 0.05])
    assert np.isclose(points.area.sum(), 8 * (half[0] * half[1] + half[1] * half[2] + half[2] * half[0]))
    for axis in range(3):
        on_face = np.isclose(np.abs(points.positions[:, axis]), half[axis])
        share = 8 * np.prod(np.delete(half, axis)) / points.area.sum()
        assert abs(on_face.mean() - share) < 0.01
    assert np.allclose(np.abs(points.facing).max(axis=-1), 1.0)


def test_small_triangles_and_slivers_do_no_harm() -> None:
    vertices = np.array([[0.0, 0, 0], [1, 0, 0], [0, 1, 0], [0.5, 1e-12, 0]])
    faces = np.array([[0, 1, 2], [0, 1, 3], [1, 1, 2]])
    mesh = LinkMesh(0, vertices, faces, np.tile([0.0, 0, 1], (3, 3, 1)), None, None, np.ones(4), None)
    points = sample_meshes([mesh], 1000, np.random.default_rng(0))
    assert np.isfinite(points.positions).all()
    assert np.allclose(points.facing[:, 2], 1.0)


def test_texture_is_looked_up_at_texel_centres_and_repeats() -> None:
    texture = np.zeros((2, 2, 3), dtype=np.uint8)
    texture[0, 0], texture[0, 1], texture[1, 0] = (255, 0, 0), (0, 255, 0), (0, 0, 255)
    vertices = np.array([[0.0, 0, 0], [1, 0, 0], [1, 1, 0], [0, 1, 0]])
    faces = np.array([[0, 1, 2], [0, 2, 3]])
    uv = vertices[faces][..., :2] * 3.0
    mesh = LinkMesh(0, vertices, faces, np.tile([0.0, 0, 1], (2, 3, 1)), uv, texture, np.array([1, 0.5, 1, 1.0]), None)
    points = sample_meshes([mesh], 40_000, np.random.default_rng(0))
    place = (points.positions[:, :2] * 3.0) % 1.0
    for texel, colour in (((0.25, 0.25), (1, 0, 0)), ((0.75, 0.25), (0, 0.5, 0)), ((0.25, 0.75), (0, 0, 1))):
        near = np.abs(place - texel).max(axis=-1) < 0.02
        assert near.sum() > 20
        assert np.allclose(points.albedo[near], colour, atol=0.1)


def test_inside_of_a_closed_shell_is_dropped(tree: KinematicTree) -> None:
    meshes = [ball(0.20), ball(0.15), ball(0.12)]
    points = sample_meshes(meshes, 60_000, np.random.default_rng(0))
    seen = seen_from_outside(points, tree, np.random.default_rng(1))
    outer = shell_of(points) > 0.19
    assert seen[outer].mean() > 0.999
    assert seen[~outer].mean() < 0.005


def test_what_a_joint_uncovers_is_kept(tree: KinematicTree) -> None:
    """A plate of link a lies against a plate of link b in the canonical configuration; the joint opens them."""
    plate = trimesh.creation.box((0.3, 0.3, 0.02))
    lower, upper = plate.copy(), plate.copy()
    lower.apply_translation((0.0, 0.0, 0.48))
    upper.apply_translation((0.16, 0.0, 0.011))
    points = sample_meshes([link_mesh(lower, 0), link_mesh(upper, 1)], 40_000, np.random.default_rng(0))
    seen = seen_from_outside(points, tree, np.random.default_rng(0))
    facing_each_other = (points.link == 0) & (points.facing[:, 2] > 0.5) & (points.positions[:, 0] > 0.05)
    facing_each_other |= (points.link == 1) & (points.facing[:, 2] < -0.5)
    assert seen[facing_each_other].mean() > 0.95


def test_layer_below_a_cap_is_covered_and_curved_or_stepped_surfaces_are_not() -> None:
    rng = np.random.default_rng(0)
    body = sample_meshes([ball(0.1)], 20_000, rng)
    cap = trimesh.creation.icosphere(subdivisions=4, radius=0.101)
    cap.update_faces(cap.triangles_center[:, 2] > 0.05)
    cap_points = sample_meshes([link_mesh(cap)], 5_000, rng)
    both = SurfacePoints.concatenate([body, cap_points])
    hidden = covered(both)
    under = (shell_of(both) < 0.1005) & (both.positions[:, 2] > 0.056)
    clear = (shell_of(both) < 0.1005) & (both.positions[:, 2] < 0.04)
    assert hidden[under].mean() > 0.95
    assert hidden[clear].mean() == 0.0
    assert hidden[shell_of(both) > 0.1005].mean() == 0.0
    torus = sample_meshes([link_mesh(trimesh.creation.torus(0.1, 0.03))], 20_000, rng)
    assert covered(torus).mean() < 0.005


def test_shares_are_exact_and_leave_no_link_out() -> None:
    area = np.array([3.0, 0.0, 1e-6, 1.0, 2.0])
    for n in (4, 5, 17, 1000, 9_999):
        counts = share_among_links(area, n)
        assert counts.sum() == n
        assert (counts[area > 0] >= 1).all()
        assert counts[1] == 0
    assert abs(share_among_links(area, 10_000)[0] - 5000) < 3
    with pytest.raises(InputError, match="n is 3; expected at least one Gaussian for each of the 4"):
        share_among_links(area, 3)


def test_shading_is_the_headlight_of_the_visible_side() -> None:
    rng = np.random.default_rng(0)
    normals = rng.normal(size=(400, 3))
    normals /= np.linalg.norm(normals, axis=-1, keepdims=True)
    to_camera = rng.normal(size=(400, 3))
    to_camera /= np.linalg.norm(to_camera, axis=-1, keepdims=True)
    to_camera *= np.sign((normals * to_camera).sum(-1, keepdims=True))
    albedo = rng.random((400, 3))
    points = SurfacePoints(normals, normals, normals, albedo, np.ones(400), np.zeros(400, dtype=int))
    sh = torch.from_numpy(headlight_shading(points))
    sh[:, 0] -= 0.5 / 0.28209479177387814
    colour = sh_to_rgb(sh, torch.from_numpy(-to_camera)).numpy()
    t = (normals * to_camera).sum(-1, keepdims=True)
    a, b, c = shading_polynomial()
    assert np.allclose(colour, albedo * (a + b * t + c * t * t), atol=1e-12)
    assert np.abs(colour - albedo * (0.5 + 0.5 * t)).max() < 0.09
    assert np.abs(colour - albedo * (0.5 + 0.5 * t)).mean() < 0.02


def sphere_parameters(tree: KinematicTree, n: int) -> tuple[Parameters, torch.Tensor]:
    return sample_surface([ball(0.1)], tree, n, seed=0)


def test_discs_lie_on_the_surface_with_outward_normals(tree: KinematicTree) -> None:
    parameters, link = sphere_parameters(tree, 1500)
    gaussians = parameters.activate()
    assert len(parameters) == len(link) == 1500
    radial = gaussians.means / gaussians.means.norm(dim=-1, keepdim=True)
    assert (gaussians.means.norm(dim=-1) - 0.1).abs().max() < 2e-3
    axes = quats_to_rotations(gaussians.quats)
    assert ((axes[..., 2] * radial).sum(-1) > 0.97).all()
    assert (gaussians.scales[:, 2] < 0.35 * gaussians.scales[:, :2].amin(-1)).all()
    spacing = (4 * np.pi * 0.1**2 / 1500 / np.pi) ** 0.5
    assert ((gaussians.scales[:, :2] > 0.6 * spacing) & (gaussians.scales[:, :2] < 1.6 * spacing)).all()


def test_coverage_is_even(tree: KinematicTree) -> None:
    """Blue noise: no two centres close together, no hole; far from what random points give."""
    from scipy.spatial import KDTree

    parameters, _ = sphere_parameters(tree, 1500)
    nearest = KDTree(parameters.means.numpy()).query(parameters.means.numpy(), k=2)[0][:, 1]
    rng = np.random.default_rng(0)
    random = rng.normal(size=(1500, 3))
    random *= 0.1 / np.linalg.norm(random, axis=-1, keepdims=True)
    by_chance = KDTree(random).query(random, k=2)[0][:, 1]
    assert nearest.std() / nearest.mean() < 0.25 < 0.4 < by_chance.std() / by_chance.mean()
    assert nearest.min() > 0.3 * nearest.mean()


def test_rendered_sphere_in_closed_form(tree: KinematicTree) -> None:
    parameters, _ = sphere_parameters(tree, 3000)
    camera = Camera.look_at((0.0, -0.6, 0.0), (0.0, 0.0, 0.0), width=96, height=96)
    with torch.no_grad():
        out = rasterize(parameters.activate(), camera, eps2d=0.01)
    v, u = torch.meshgrid(torch.arange(96) + 0.5, torch.arange(96) + 0.5, indexing="ij")
    rays = torch.stack([u, v, torch.ones_like(u)], -1) @ torch.linalg.inv(camera.K).T
    centre = torch.tensor([0.0, 0.0, 0.6])
    a, b = rays.square().sum(-1), rays @ centre
    discriminant = b**2 - a * (0.36 - 0.01)
    hit = discriminant > 0
    depth = (b - discriminant.clamp(min=0).sqrt()) / a
    mask = out.alpha >= 0.5
    assert (mask & hit).sum() / (mask | hit).sum() > 0.985
    assert (out.depth - depth)[mask & hit].abs().median() < 0.1 * 2 / 3000**0.5  # a patch radius
    inner = discriminant > 0.003
    assert (out.alpha[inner] > 0.98).float().mean() > 0.98
    t = -((depth[..., None] * rays - centre) / 0.1 * rays / a.sqrt()[..., None]).sum(-1)
    colour = torch.tensor([0.8, 0.5, 0.2]) * (0.5 + 0.5 * t[..., None])
    assert (out.rgb - colour)[inner].abs().mean() < 0.03


def test_splats_of_a_box_hardly_stick_out(tree: KinematicTree) -> None:
    half = torch.tensor([0.2, 0.1, 0.05])
    parameters, _ = sample_surface([link_mesh(trimesh.creation.box((0.4, 0.2, 0.1)))], tree, 2000, seed=0)
    gaussians = parameters.activate()
    axes = quats_to_rotations(gaussians.quats) * gaussians.scales[:, None, :]
    reach = 1.17 * axes.norm(dim=-1)  # where a lone splat of full opacity is half transparent
    spacing = (0.28 / 2000 / np.pi) ** 0.5
    assert ((gaussians.means.abs() + reach) - half).amax(-1).clamp(min=0).mean() < 0.1 * spacing
    depth = -(gaussians.means.abs() - half).amax(-1)
    assert depth.quantile(0.9) < 0.3 * spacing
    assert depth.max() < spacing


def test_thin_plate_gets_splats_on_both_sides(tree: KinematicTree) -> None:
    plate = link_mesh(trimesh.creation.box((0.3, 0.3, 0.001)))
    parameters, _ = sample_surface([plate], tree, 1000, seed=0)
    normals = quats_to_rotations(parameters.quats)[..., 2]
    up, down = normals[:, 2] > 0.9, normals[:, 2] < -0.9
    assert 380 < up.sum() < 520
    assert 380 < down.sum() < 520
    assert (parameters.means[up][:, 2] > 0.0001).float().mean() > 0.9
    assert (parameters.means[down][:, 2] < -0.0001).float().mean() > 0.9


def test_inverted_mesh_is_seen_from_its_inner_side_only(tree: KinematicTree) -> None:
    """As in the ground truth, which culls back faces: of an inverted open bowl, outside cameras see the inside."""
    bowl = trimesh.creation.icosphere(subdivisions=4, radius=0.1)
    bowl.update_faces(bowl.triangles_center[:, 2] < 0.0)
    bowl.invert()
    points = sample_meshes([link_mesh(bowl)], 20_000, np.random.default_rng(0))
    assert seen_from_outside(points, tree, np.random.default_rng(0)).mean() > 0.9


def test_same_seed_same_splats(tree: KinematicTree) -> None:
    first, _ = sample_surface([ball(0.1)], tree, 300, seed=3)
    again, _ = sample_surface([ball(0.1)], tree, 300, seed=3)
    other, _ = sample_surface([ball(0.1)], tree, 300, seed=4)
    assert torch.equal(first.means, again.means)
    assert torch.equal(first.log_scales, again.log_scales)
    assert not torch.equal(first.means, other.means)


@pytest.mark.parametrize("n", [1, 2, 3, 7])
def test_very_few_splats(tree: KinematicTree, n: int) -> None:
    parameters, _ = sample_surface([ball(0.1)], tree, n, seed=0)
    assert len(parameters) == n
    for name in ("means", "quats", "log_scales", "logit_opacities", "sh"):
        assert torch.isfinite(getattr(parameters, name)).all()


def test_merging_keeps_the_look(tree: KinematicTree) -> None:
    parameters, link = sphere_parameters(tree, 4000)
    merged, merged_link = merge_splats(parameters, link, 2, 800)
    assert len(merged) == len(merged_link) == 800
    assert merged.means.dtype == torch.float32
    camera = Camera.look_at((0.3, -0.6, 0.2), (0.0, 0.0, 0.0), width=64, height=64)
    with torch.no_grad():
        fine, coarse = (rasterize(p.activate(), camera, eps2d=0.01) for p in (parameters, merged))
    assert (fine.alpha - coarse.alpha).abs().mean() < 0.015
    assert (fine.rgb - coarse.rgb).abs().mean() < 0.015
    ratio = merged.log_scales[:, :2].exp().median() / parameters.log_scales[:, :2].exp().median()
    assert abs(ratio / 5.0**0.5 - 1.0) < 0.2


def test_no_surface_is_refused(tree: KinematicTree) -> None:
    with pytest.raises(InputError, match="nothing to sample"):
        sample_surface([], tree, 100)


def test_kinearm_links_all_get_splats() -> None:
    robot = load_description("kinearm")
    _, link = sample_surface(robot.link_meshes, robot.tree, 500, seed=0)
    assert set(link.tolist()) == {mesh.link for mesh in robot.link_meshes}
