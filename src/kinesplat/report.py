"""Pictures and pages that show a fit to a person."""

import base64
import html
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from kinesplat.camera import Camera
from kinesplat.files import side_by_side, write_gif, write_png, written_whole
from kinesplat.inverse import FitResult
from kinesplat.self_model import SelfModel

OUTLINE_RGB = (0.9, 0.0, 0.55)
FILM_FRAMES = 60
FILM_SECONDS = 4.0
FILM_PX = 512

Picture = Float[Tensor, "height width 3"]


def outline(alpha: Float[Tensor, "height width"]) -> Float[Tensor, "height width"]:
    """1 on the pixels just inside the border of ``alpha > 0.5``, 0 elsewhere."""
    inside = (alpha > 0.5).float()
    eroded = -torch.nn.functional.max_pool2d(-inside[None], 3, stride=1, padding=1)[0]
    return inside - eroded


def overlay(image: Picture, rgb: Picture, alpha: Float[Tensor, "height width"]) -> Picture:
    """The photograph with the rendered robot laid over it, half transparent, and its outline in magenta."""
    blended = image + 0.5 * alpha[..., None] * (rgb - image)
    edge = outline(alpha)[..., None]
    return blended * (1.0 - edge) + edge * torch.tensor(OUTLINE_RGB)


def difference(image: Picture, rgb: Picture) -> Picture:
    """Absolute difference, mean over channels, times four: black is no error, white a difference of 0.25 or more."""
    return ((image - rgb).abs().mean(dim=-1, keepdim=True) * 4.0).clamp(0.0, 1.0).expand(-1, -1, 3)


def write_fit_pictures(
    model: SelfModel, image: Picture, fit: FitResult, folder: Path, stem: str, view: int = 0
) -> dict[str, Path]:
    """Target, start, fit, overlay and error of one view, and a film of the optimisation, of at most 512 px.

    Returns:
        Paths by kind: ``target``, ``start``, ``fit``, ``overlay``, ``error``, ``film``.
    """
    camera = _view(fit.camera, view)
    start, final = model.render(fit.q_history[0], camera), model.render(fit.q, camera)
    assert start.rgb is not None
    assert final.rgb is not None
    assert final.alpha is not None
    pictures = {
        "target": image,
        "start": start.rgb,
        "fit": final.rgb,
        "overlay": overlay(image, final.rgb, final.alpha),
        "error": difference(image, final.rgb),
    }
    paths = {kind: write_png(folder / f"{stem}_{kind}.png", pixels) for kind, pixels in pictures.items()}
    return {**paths, "film": _write_film(model, image, camera, fit, folder / f"{stem}_film.gif")}


def write_page(path: Path, title: str, lead: str, sections: Sequence[dict[str, Any]]) -> Path:
    """One self-contained HTML page.

    Args:
        title: heading.
        lead: paragraph below it.
        sections: each with ``heading``, ``facts`` (a dictionary that becomes a table) and ``pictures``
            (caption to image path).
    """
    body = "\n".join(_section(s) for s in sections)
    style = (
        "body{font:16px/1.5 system-ui,sans-serif;max-width:76rem;margin:2rem auto;padding:0 1rem;color:#222}"
        "figure{display:inline-block;margin:0 .6rem .6rem 0}figcaption{color:#666;font-size:.85rem}"
        "img{border:1px solid #ddd;width:256px;height:auto}table{border-collapse:collapse;margin:.4rem 0 1rem}"
        "td,th{border-bottom:1px solid #ddd;padding:.15rem .8rem .15rem 0;text-align:left}"
    )
    page = (
        f'<!doctype html><html lang="en"><head><meta charset="utf-8"><title>{html.escape(title)}</title>'
        f"<style>{style}</style></head><body><h1>{html.escape(title)}</h1><p>{html.escape(lead)}</p>\n{body}"
        "</body></html>\n"
    )
    with written_whole(path) as temporary:
        temporary.write_text(page)
    return path


def _section(section: dict[str, Any]) -> str:
    rows = "".join(
        f"<tr><th>{html.escape(str(key))}</th><td>{html.escape(str(value))}</td></tr>"
        for key, value in section["facts"].items()
    )
    figures = "".join(
        f'<figure><img src="{_data_url(path)}" alt="{html.escape(caption)}">'
        f"<figcaption>{html.escape(caption)}</figcaption></figure>"
        for caption, path in section["pictures"].items()
    )
    return f"<h2>{html.escape(section['heading'])}</h2><table>{rows}</table><div>{figures}</div>"


def _data_url(path: Path) -> str:
    kind = path.suffix.lstrip(".")
    return f"data:image/{kind};base64,{base64.b64encode(path.read_bytes()).decode()}"


def _write_film(model: SelfModel, image: Picture, camera: Camera, fit: FitResult, path: Path) -> Path:
    count = len(fit.q_history)
    picked = torch.linspace(0, count - 1, min(FILM_FRAMES, count)).round().long()
    shrink = min(1.0, FILM_PX / max(camera.width, camera.height))
    camera = camera.resized(max(1, round(shrink * camera.width)), max(1, round(shrink * camera.height)))
    pixels = image.permute(2, 0, 1)[None]
    small = torch.nn.functional.adaptive_avg_pool2d(pixels, (camera.height, camera.width))[0].permute(1, 2, 0)
    return write_gif(path, [_film_frame(model, small, camera, q) for q in fit.q_history[picked]], FILM_SECONDS)


def _film_frame(
    model: SelfModel, image: Picture, camera: Camera, q: Float[Tensor, " dof"]
) -> Float[Tensor, "height both 3"]:
    out = model.render(q, camera)
    assert out.rgb is not None
    assert out.alpha is not None
    return side_by_side([overlay(image, out.rgb, out.alpha), out.rgb])


def _view(camera: Camera, view: int) -> Camera:
    if not camera.batch_shape:
        return camera
    K, T = camera.K.expand(*camera.batch_shape, 3, 3), camera.T_cam_world.expand(*camera.batch_shape, 4, 4)
    return Camera(K[view], T[view], camera.width, camera.height)
