"""A picture of an evaluation: truth, the rows' images, and the error of the first, side by side."""

from pathlib import Path

import numpy as np
import torch
from jaxtyping import Float
from PIL import Image, ImageDraw, ImageFont
from torch import Tensor

from kinesplat.evaluation.table import Evaluation
from kinesplat.files import write_png

TITLE_PX = 34
ERROR_GAIN = 4.0
MAX_COLUMNS = 8
_TITLE_LINE = 40


def figure(evaluation: Evaluation) -> Float[Tensor, "height width 3"]:
    """One line per picture: truth, every row (training images last), and four times the error of the first row."""
    truth, rows = evaluation.truth, evaluation.rows[: MAX_COLUMNS - 2]
    error = [_error(a, b) for a, b in zip(rows[0].pictures, truth, strict=True)]
    columns = [("truth", truth), *((row.name, row.pictures) for row in rows), (f"error x {ERROR_GAIN:g}", error)]
    return torch.cat([torch.cat([_title(name, images[0].shape[1]), *images]) for name, images in columns], dim=1)


def write_figure(path: Path, evaluation: Evaluation) -> Path:
    """Write `figure` as a PNG."""
    return write_png(path, figure(evaluation))


def _error(rendered: Float[Tensor, "h w 3"], truth: Float[Tensor, "h w 3"]) -> Float[Tensor, "h w 3"]:
    """Absolute difference, mean over channels; white is none, black 1 / `ERROR_GAIN` or more."""
    difference = (rendered - truth).abs().mean(dim=-1, keepdim=True)
    return (1.0 - ERROR_GAIN * difference).clamp(0.0, 1.0).expand(-1, -1, 3)


def _title(text: str, width: int) -> Float[Tensor, "h w 3"]:
    image = Image.new("RGB", (width, TITLE_PX), "white")
    words, lines = text.split(), [""]
    for word in words:
        if len(lines[-1]) + len(word) > _TITLE_LINE * width // 256 and lines[-1]:
            lines.append("")
        lines[-1] = f"{lines[-1]} {word}".strip()
    ImageDraw.Draw(image).multiline_text((4, 4), "\n".join(lines[:2]), fill="black", font=ImageFont.load_default(12))
    return torch.from_numpy(np.array(image, dtype=np.float32) / 255.0)
