"""Lights of data sets. A light is one row of seven numbers, grey, applied to a surface of colour c and normal n:

    c * (ambient + diffuse * visible * max(0, -n . direction) + headlight * max(0, -n . view axis))

0-2  direction: unit vector in which the light travels, in the world; it is infinitely far away
3    ambient
4    diffuse: of the light that is fixed in the world
5    headlight: diffuse part of a light that travels along the camera's view axis and casts no shadow
6    shadows: 1 where the light of the world casts (black) shadows, 0 where it casts none
"""

import math
from typing import Literal, get_args

import torch
from jaxtyping import Float
from torch import Tensor

from kinesplat.errors import InputError, unknown

LightSetting = Literal["headlight", "world", "random"]
HEADLIGHT_AMBIENT = 0.5
HEADLIGHT_DIFFUSE = 0.5
_DIRECTION = torch.nn.functional.normalize(torch.tensor([-0.5, 0.4, -1.0], dtype=torch.float64), dim=0).tolist()
WORLD_LIGHT = (*_DIRECTION, 0.3, 0.5, 0.2, 1.0)
"""The light of `--light world`: from above, to one side; with shadows, beside a weak headlight."""


def draw_lights(setting: str, count: int, generator: torch.Generator) -> Float[Tensor, "count 7"] | None:
    """Light rows of `count` images; None for the headlight, which needs none.

    A random light comes from anywhere above the horizon (elevation at least 20 deg); its parts are uniform, ambient in
    0.2 to 0.5 and the world light in 0.3 to 0.8 of what is left, so that no white surface saturates.

    Raises:
        InputError: an unknown setting.
    """
    if setting not in get_args(LightSetting):
        raise InputError(unknown("light", setting, get_args(LightSetting)))
    if setting == "headlight":
        return None
    if setting == "world":
        return torch.tensor(WORLD_LIGHT, dtype=torch.float64).repeat(count, 1)
    z, azimuth, ambient, share = torch.rand(4, count, generator=generator, dtype=torch.float64)
    z = math.sin(math.radians(20.0)) * (1.0 - z) + z
    rho, azimuth = torch.sqrt(1.0 - z.square()), 2.0 * math.pi * azimuth
    ambient = 0.2 + 0.3 * ambient
    diffuse = (0.3 + 0.5 * share) * (1.0 - ambient)
    parts = [-rho * azimuth.cos(), -rho * azimuth.sin(), -z, ambient, diffuse, 1.0 - ambient - diffuse]
    return torch.stack([*parts, torch.ones(count, dtype=torch.float64)], dim=-1)
