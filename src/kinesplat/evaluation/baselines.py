"""What a model has to beat: answers that need no model, or a model with a part taken away.

The paper names its baselines without defining them, so these are our readings of its Table 1:

random
    a training image drawn at random: how much two images of this data set have in common.
nearest
    the training image (of 1000) most like the truth. It looks at the answer, so it bounds from above what can be had
    by looking images up.
nearest by input ("prev")
    the training image (of the same 1000) whose configuration and camera come nearest, told by where the links stand in
    the camera's frame. This is the weaker variant, and the one that could be used.
no deform
    the model without its appearance field, its splats still carried by the links. At 27 to 30 dB the paper's row of
    this name cannot be splats that stay where they are.
never moves
    the splats of the canonical configuration, whatever the joints.
"""

from dataclasses import dataclass, replace

import torch
from jaxtyping import Float, Int
from torch import Tensor

from kinesplat.camera import Camera
from kinesplat.dataset.frames import Frames
from kinesplat.gaussians import Gaussians
from kinesplat.kinematics import KinematicTree
from kinesplat.rasterizer import Render
from kinesplat.self_model import SelfModel

LIBRARY_SIZE = 1000
_CHUNK = 32


@dataclass(frozen=True)
class Unmoved:
    """A model that stands in its canonical configuration whatever the joints.

    Attributes:
        model: which.
    """

    model: SelfModel

    def render(self, q: Float[Tensor, "*batch dof"], camera: Camera) -> Render:
        """Images of the canonical configuration; `q` (batch ``*batch``) only says how many."""
        return self.model.render(self.model.tree.q_canonical.to(q).expand_as(q), camera)

    def posed(self, q: Float[Tensor, "*batch dof"]) -> Gaussians:
        """The splats of the canonical configuration in the world, batch ``*batch``."""
        return self.model.posed(self.model.tree.q_canonical.to(q).expand_as(q))


def without_appearance(model: SelfModel) -> SelfModel | None:
    """The model with its appearance field switched off; None if it has none."""
    return None if model.appearance is None else replace(model, appearance=None)


def random_images(library: Frames, count: int, seed: int) -> Int[Tensor, " count"]:
    """Rows of the library, drawn independently."""
    return torch.randint(len(library), (count,), generator=torch.Generator().manual_seed(seed))


def nearest_images(library: Frames, queries: Frames) -> Int[Tensor, " n"]:
    """For each query the row of the library whose picture has the smallest squared error."""
    rows, pixels = [], _centred(library.rgb)
    squared = pixels.square().sum(dim=1)
    for first in range(0, len(queries), _CHUNK):
        wanted = _centred(queries.rgb[first : first + _CHUNK])
        rows.append((squared - 2.0 * wanted @ pixels.T).argmin(dim=1))
    return torch.cat(rows)


def nearest_inputs(library: Frames, queries: Frames, tree: KinematicTree) -> Int[Tensor, " n"]:
    """For each query the row of the library whose links stand most alike in the camera's frame."""
    distance = torch.cdist(_links_in_camera(queries, tree), _links_in_camera(library, tree))
    return distance.argmin(dim=1)


def _centred(rgb: Tensor) -> Float[Tensor, "n pixels"]:
    """Pixels as float32 rows, white at zero, so that products lose no digits."""
    return rgb.flatten(1).float() / 255.0 - 1.0


def _links_in_camera(frames: Frames, tree: KinematicTree) -> Float[Tensor, "n numbers"]:
    Ts = frames.camera.T_cam_world[:, None] @ tree.forward_kinematics(frames.q)
    return Ts[..., :3, 3].flatten(1)
