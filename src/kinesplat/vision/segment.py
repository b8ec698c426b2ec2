"""Masks of photographs from points on the robot and beside it, by SAM 2 (Ravi et al. 2024; Apache-2.0)."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from kinesplat.errors import InputError
from kinesplat.vision.loading import library, pretrained

SAM_2 = "facebook/sam2.1-hiera-tiny"
MEAN, DEVIATION = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
PIXEL_CENTRE = 0.5
"""What transformers adds to points itself."""


@dataclass(frozen=True, eq=False)
class Segmenter:
    """SAM 2 for single pictures.

    Attributes:
        model: ``transformers.Sam2Model``.
    """

    model: Any

    @classmethod
    def from_pretrained(cls, source: str | Path = SAM_2, *, device: torch.device | str = "cpu") -> "Segmenter":
        """Load a SAM 2 model.

        Args:
            source: folder, or name on the Hugging Face hub, fetched before.
            device: where to compute.

        Raises:
            BackendError: transformers or the weights are absent; says how to get them.
            InputError: the folder holds no SAM 2.
        """
        return cls(pretrained(library("transformers").Sam2Model, source).to(device).eval())

    def logits(
        self, image: Float[Tensor, "height width 3"], points: Float[Tensor, "n 2"], on: Bool[Tensor, " n"]
    ) -> Float[Tensor, "height width"]:
        """How sure each pixel belongs to what the points are on, differentiable: positive where it does.

        One point can mean a part or the whole: of the proposals for it, the one that the model itself thinks best.
        Several points ask for one mask.

        Args:
            image: ``(height, width, 3)`` in [0, 1].
            points: ``(n, 2)`` pixels, x to the right and y down, pixel centres at +0.5.
            on: ``(n,)`` whether a point is on the object or beside it.

        Raises:
            InputError: no point on the object, or one outside the picture.
        """
        height, width = image.shape[:2]
        size = torch.tensor([width, height], dtype=torch.float32)
        if not on.any() or not ((points >= 0) & (points <= size)).all():
            raise InputError(f"{int(on.sum())} of {len(points)} points on the object; expected some inside the picture")
        side, device = int(self.model.config.prompt_encoder_config.image_size), self.model.device
        planes = (image.float() - torch.tensor(MEAN)) / torch.tensor(DEVIATION)
        planes = torch.nn.functional.interpolate(
            planes.movedim(-1, 0)[None], (side, side), mode="bilinear", antialias=True
        )
        out = self.model(
            pixel_values=planes.to(device),
            input_points=(points.float() / size * side - PIXEL_CENTRE)[None, None].to(device),
            input_labels=on.long()[None, None].to(device),
            multimask_output=len(points) == 1,
        )
        best = out.iou_scores[0, 0].argmax()
        masks = out.pred_masks[0, 0, best][None, None].float()
        return torch.nn.functional.interpolate(masks, (height, width), mode="bilinear")[0, 0].cpu()

    @torch.no_grad()
    def mask(
        self, image: Float[Tensor, "height width 3"], points: Float[Tensor, "n 2"], on: Bool[Tensor, " n"]
    ) -> Float[Tensor, "height width"]:
        """1 where a pixel belongs to what the points are on, else 0; arguments and errors are those of `logits`."""
        return (self.logits(image, points, on) > 0.0).float()
