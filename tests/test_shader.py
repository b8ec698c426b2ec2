"""The shader of a light that is fixed in the world: cosine, shadows, files, training."""

import math
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import Tensor

from kinesplat.appearance.shader import Shader, lit, split_headlight
from kinesplat.camera import Camera
from kinesplat.dataset.frames import Frames
from kinesplat.dataset.lights import WORLD_LIGHT, draw_lights
from kinesplat.dataset.sampling import random_cameras, random_configurations
from kinesplat.errors import InputError
from kinesplat.gaussians import Gaussians
from kinesplat.rasterizer import rasterize
from kinesplat.rasterizer.projection import quats_to_rotations
from kinesplat.rasterizer.spherical_harmonics import SH_C0, sh_basis
from kinesplat.self_model import SelfModel
from kinesplat.surface.patches import headlight_shading
from kinesplat.surface.points import SurfacePoints
from kinesplat.training.default import DefaultSettings, fit_splats, prepared, validate
from kinesplat.training.loop import Budget

LIGHT = torch.tensor(WORLD_LIGHT)


def plates(*heights: float, side: int = 21, size: float = 0.4) -> Gaussians:
    """Square plates of splats, facing up; the first `side^2` splats are the first plate."""
    x, y = torch.meshgrid(*[torch.linspace(-0.5 * size, 0.5 * size, side)] * 2, indexing="ij")
    means = torch.cat([torch.stack([x, y, torch.full_like(x, h)], -1).reshape(-1, 3) for h in heights])
    means[: side**2, :2] *= 2.0  # the first is larger
    n, step = len(means), size / (side - 1)
    scales = torch.tensor([step, step, 0.05 * step]).repeat(n, 1)
    scales[: side**2, :2] *= 2.0
    quats = torch.tensor([1.0, 0.0, 0.0, 0.0]).repeat(n, 1)
    return Gaussians(means, quats, scales, torch.full((n,), 0.99), torch.zeros(n, 9, 3), "axis")


def constant(n: int) -> Tensor:
    return torch.nn.functional.pad(torch.full((n, 1, 3), 1.0 / SH_C0), (0, 0, 0, 8))


def test_a_plate_above_shadows_the_plate_below() -> None:
    splats = plates(0.0, 0.5)
    shader = Shader(torch.tensor([0.0, 0.0, -1.0]), constant(len(splats)), reach=0.01)
    index, T = torch.zeros(len(splats), dtype=torch.long), torch.eye(4)[None]
    visible = shader.visibility(splats, index, T)
    below, above = visible[: 21**2].reshape(21, 21), visible[21**2 :]
    assert above.min() > 0.9
    assert below[6:15, 6:15].max() < 0.1
    assert below[:4].min() > 0.9
    assert below[-4:].min() > 0.9


def test_shadows_follow_the_links_and_the_light() -> None:
    splats = plates(0.0, 0.5)
    index = (torch.arange(len(splats)) >= 21**2).long()
    T = torch.eye(4).repeat(2, 2, 1, 1)
    T[1, 1, 0, 3] = 10.0  # in the second configuration the upper plate is elsewhere
    shader = Shader(torch.tensor([0.0, 0.0, -1.0]), constant(len(splats)), reach=0.02)
    visible = shader.visibility(splats, index, T)[:, : 21**2].reshape(2, 21, 21)
    assert visible[0, 10, 10] < 0.1
    aslant = Shader(torch.tensor([1.0, 0.0, -1.0]), constant(len(splats)), reach=0.08)
    shifted = aslant.visibility(splats, index, T[0])[: 21**2].reshape(21, 21)
    assert shifted[10, 10] > 0.8
    moved = shader.visibility(splats, torch.zeros_like(index), torch.eye(4)[None])
    assert torch.allclose(visible[0].reshape(-1), moved[: 21**2], atol=1e-4)


def test_what_the_light_adds_turns_with_the_link() -> None:
    """Turning link and light together changes nothing; turning the link alone sees another side of the response."""
    splats = plates(0.0)
    n = len(splats)
    response = torch.rand(n, 9, 3) * 0.1 + constant(n)
    direction = torch.nn.functional.normalize(torch.tensor([0.3, -0.2, -1.0]), dim=0)
    shader, T = Shader(direction, response, reach=0.2), torch.eye(4)[None]
    added = shader(splats, torch.zeros(n, dtype=torch.long), T)
    expected = (sh_basis(direction, 2)[:, None] * response).sum(-2)
    assert torch.allclose(added, expected, atol=6e-2)
    turn = torch.eye(4)
    turn[:3, :3] = quats_to_rotations(torch.tensor([0.9, 0.1, -0.3, 0.2]))
    turned = Shader(turn[:3, :3] @ direction, response, reach=0.2)
    assert torch.allclose(turned(splats, torch.zeros(n, dtype=torch.long), turn[None]), added, atol=2e-2)


def test_lit_adds_to_the_colours_from_every_side() -> None:
    splats = replace(plates(0.0), sh=torch.zeros(21**2, 4, 3))
    added = torch.rand(2, 1, len(splats), 3) * 0.4
    camera = Camera.look_at((0.1, 0.2, 2.0), (0.0, 0.0, 0.0), width=32, height=32)
    bright = lit(splats, added)
    assert bright.batch_shape == (2, 1)
    assert bright.sh_direction == "axis"
    plain = replace(splats, sh=(added[1, 0] / SH_C0)[:, None])
    one, two = rasterize(bright, camera).rgb, rasterize(plain, camera).rgb
    assert one is not None
    assert two is not None
    assert torch.allclose(one[1, 0], two, atol=1e-5)


def test_a_headlight_is_split_into_camera_light_and_world_light() -> None:
    """Towards the light and the camera, albedo times ambient + diffuse + headlight; away from the light without it."""
    normals = torch.nn.functional.normalize(torch.randn(200, 3), dim=-1)
    albedo = torch.rand(200, 3)
    at, ones, links = normals.numpy(), torch.ones(200).numpy(), torch.zeros(200, dtype=torch.int64).numpy()
    sh = torch.from_numpy(headlight_shading(SurfacePoints(at, at, at, albedo.numpy(), ones, links))).float()
    sh[:, 0] -= 0.5 / SH_C0
    camera, world = split_headlight(sh, normals, LIGHT, 0.5, 0.5)
    facing = sh_basis(-normals, 2)[..., None]
    seen = 0.5 + (facing * camera).sum(-2)
    added = (facing * world).sum(-2)
    ambient, diffuse, headlight = LIGHT[3:6].tolist()
    assert torch.allclose(seen, (ambient + headlight) * albedo, atol=0.07)
    assert torch.allclose(added, diffuse * albedo, atol=0.07)
    beside = torch.linalg.cross(normals, torch.nn.functional.normalize(torch.randn(200, 3), dim=-1))
    edge = (sh_basis(torch.nn.functional.normalize(beside, dim=-1), 2)[..., None] * world).sum(-2)
    assert edge.abs().max() < 0.1


@pytest.fixture(scope="module")
def world_lit(kinearm: SelfModel) -> SelfModel:
    return prepared(kinearm.subsample(2000), DefaultSettings(), LIGHT)


def test_render_and_posed_agree(world_lit: SelfModel) -> None:
    q = world_lit.tree.q_canonical.float().repeat(2, 1)
    q[1] += 0.2
    camera = Camera.framing(world_lit.posed(q[0]).means, width=64, height=64)
    one = world_lit.render(q, camera).rgb
    two = rasterize(world_lit.posed(q), camera, eps2d=world_lit.eps2d).rgb
    assert one is not None
    assert two is not None
    assert one.shape == (2, 64, 64, 3)
    assert (one - two).abs().mean() < 1e-3


def test_a_model_file_keeps_the_light(world_lit: SelfModel, tmp_path: Path) -> None:
    q = world_lit.tree.q_canonical.float()
    camera = Camera.framing(world_lit.posed(q).means, width=48, height=48)
    before = world_lit.render(q, camera).rgb
    for half, tolerance in ((False, 1e-6), (True, 2e-2)):
        world_lit.save(tmp_path / "m.safetensors", half=half)
        again = SelfModel.load(tmp_path / "m.safetensors")
        assert again.shader is not None
        after = again.render(q, camera).rgb
        assert before is not None
        assert after is not None
        assert (after - before).abs().max() < tolerance


def test_a_coarser_model_is_lit_alike(world_lit: SelfModel) -> None:
    q = world_lit.tree.q_canonical.float()
    camera = Camera.framing(world_lit.posed(q).means, width=48, height=48)
    coarse = world_lit.subsample(800)
    assert coarse.shader is not None
    assert len(coarse.shader.sh) == len(coarse.parameters)
    one, two = world_lit.render(q, camera).rgb, coarse.render(q, camera).rgb
    assert one is not None
    assert two is not None
    assert -10.0 * math.log10((one - two).square().mean().item()) > 22.0


def test_relit_is_the_model_made_for_that_light(kinearm: SelfModel) -> None:
    """From the world's light to another and back; and what `prepared` makes for the other light."""
    start = kinearm.subsample(1500)
    other = torch.tensor([0.0, 0.6, -0.8, 0.4, 0.25, 0.35, 1.0])
    here, there = (prepared(start, DefaultSettings(), light) for light in (LIGHT, other))
    relit = here.relit(other)
    q = here.tree.q_canonical.float()
    camera = Camera.framing(here.posed(q).means, width=48, height=48)
    with torch.no_grad():
        one, two, back = (m.render(q, camera).rgb for m in (relit, there, relit.relit(LIGHT)))
        first = here.render(q, camera).rgb
    assert one is not None
    assert two is not None
    assert back is not None
    assert (one - two).abs().max() < 1e-4
    assert (back - first).abs().max() < 1e-4
    assert (one - first).abs().mean() > 5e-3


def test_relit_refuses_what_it_cannot_know(kinearm: SelfModel, world_lit: SelfModel) -> None:
    with pytest.raises(InputError, match="knows its headlight only"):
        kinearm.relit(LIGHT)
    unknown = replace(world_lit, shader=Shader(LIGHT[:3].float(), world_lit.shader.sh.detach()))
    with pytest.raises(InputError, match="if the light it was made for is known"):
        unknown.relit(LIGHT)


def test_pictures_of_many_lights_teach_one_model(kinearm: SelfModel) -> None:
    """Pictures of a relit model are the truth; colours that were spoilt come back, for lights not seen in training."""
    truth, generator = prepared(kinearm.subsample(300), DefaultSettings(), LIGHT), torch.Generator().manual_seed(0)
    lights = draw_lights("random", 12, generator).float()
    q = random_configurations(kinearm.tree, 12, generator)
    camera = random_cameras(kinearm.posed(q.float()).means.double(), generator, size=32)
    rows = []
    with torch.no_grad():
        for i, light in enumerate(lights):
            one = Camera(camera.K[i].float(), camera.T_cam_world[i].float(), 32, 32)
            rows.append(truth.relit(light).render(q[i].float(), one).rgb)
    rgb = (255.0 * torch.stack(rows)).round().clamp(0, 255).to(torch.uint8)
    frames = Frames(q, camera, rgb, torch.zeros_like(rgb[..., 0]), light=lights)
    spoilt = replace(truth, parameters=replace(truth.parameters, sh=truth.parameters.sh * 0.5))
    settings = replace(DefaultSettings(), rounds=0, validate_every=100, patience=100)
    before = validate(spoilt, frames.select(slice(8, 12)))
    fitted = fit_splats(spoilt, frames.select(slice(0, 8)), frames.select(slice(8, 12)), Budget(steps=50), settings)
    assert validate(truth, frames) > 35.0
    assert validate(fitted, frames.select(slice(8, 12))) > before + 3.0
