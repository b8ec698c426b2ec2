"""From words to joint values: text."""

import sys
from pathlib import Path
from typing import Annotated

import torch
import tyro
from PIL import Image, ImageDraw

from kinesplat.camera import Camera
from kinesplat.commands.common import (
    DEFAULTS,
    EXIT_FAILED,
    CommonOptions,
    Model,
    Output,
    device_of,
    err,
    load_model,
    make_folder,
    out,
    write_json,
)
from kinesplat.errors import InputError
from kinesplat.files import side_by_side, write_gif, write_png
from kinesplat.inverse.augmentation import Augmentation
from kinesplat.inverse.text import text_to_q
from kinesplat.inverse.text_result import TextResult
from kinesplat.self_model import SelfModel
from kinesplat.vision.clip import DEFAULT

TILE_PX = 224
SHEET_ROWS = 6
CAPTION_PX = 18
FILM_FRAMES = 60
FILM_SECONDS = 4.0


def text(
    model: Model,
    prompt: Annotated[tuple[str, ...], tyro.conf.Positional],
    camera: Path | None = None,
    encoder: str = DEFAULT,
    negative: tuple[str, ...] = (),
    q_init: tuple[float, ...] | None = None,
    starts: int = 16,
    iterations: int = 150,
    copies: int = 2,
    self_collision: float = 0.01,
    output: Output = Path("text"),
    *,
    common: CommonOptions = DEFAULTS,
) -> None:
    """Find joint values whose pictures look like a sentence, to a vision-language model.

    Needs the extra kinesplat[models], and the encoder's weights: hf download openai/clip-vit-base-patch32. Writes
    fit.json, answers.png (a row for each of the best distinct answers, a column for each view) and film.gif (the way of
    the best one) into the output folder. Exits with 1 when no answer is more like the words than a random start.

    Args:
        model: model file, or the name of a packaged model.
        prompt: one sentence, which is put into several templates; or several sentences, taken as they are.
        camera: JSON file with K, T_cam_world, width, height, or a list of such; default: four views from all round.
        encoder: name of a CLIP, SigLIP or SigLIP 2 model of the Hugging Face hub, or a folder with one.
        negative: sentences that the pictures must look less like.
        q_init: joint values around which the starts lie; default: anywhere within the limits.
        starts: number of random starts, which climb together.
        iterations: steps of every start.
        copies: random variations of every picture at every step; 0: plain pictures alone.
        self_collision: cost of links that pass 1 cm through each other; 0: allowed.
        output: folder for the results; created if needed.
    """
    device = device_of(common)
    loaded = load_model(model)
    if not prompt:
        raise InputError('no prompt given: kinesplat text MODEL "thumbs up"')
    make_folder(output)
    fit = text_to_q(
        loaded.to(device),
        prompt[0] if len(prompt) == 1 else prompt,
        None if camera is None else Camera.from_json(camera),
        encoder=encoder,
        negatives=negative,
        q_init=None if q_init is None else torch.tensor(q_init),
        starts=starts,
        iterations=iterations,
        augmentation=Augmentation(copies=copies) if copies else None,
        self_collision=self_collision,
        seed=common.seed,
        progress=err.is_terminal,
    )
    write_png(output / "answers.png", contact_sheet(loaded, fit))
    write_gif(output / "film.gif", film(loaded, fit), FILM_SECONDS)
    write_json(output / "fit.json", fit.to_json())
    out.print(fit.report())
    out.print(f"wrote {output / 'fit.json'}, {output / 'answers.png'} and {output / 'film.gif'}")
    write_json(common.json, fit.to_json())
    if fit.verdict == "failed":
        sys.exit(EXIT_FAILED)


def contact_sheet(model: SelfModel, fit: TextResult) -> torch.Tensor:
    """The best distinct answers from all views, each row under its loss ``(height, width, 3)``."""
    camera, rows = tile(fit.camera), []
    for rank, answer in enumerate(fit.hypotheses[:SHEET_ROWS], start=1):
        pictures = strip(model, answer.q, camera)
        rows += [caption(f"{rank}   loss {answer.loss:.3f}", pictures.shape[1]), pictures]
    return torch.cat(rows)


def film(model: SelfModel, fit: TextResult) -> list[torch.Tensor]:
    """Pictures of the way of the best start, from all views."""
    count, camera = len(fit.q_history), tile(fit.camera)
    picked = torch.linspace(0, count - 1, min(FILM_FRAMES, count)).round().long()
    return [strip(model, q, camera) for q in fit.q_history[picked]]


def strip(model: SelfModel, q: torch.Tensor, camera: Camera) -> torch.Tensor:
    """All views of one configuration in a row ``(height, width, 3)``."""
    rgb = model.render(q[None], camera).rgb
    assert rgb is not None
    return side_by_side(list(rgb))


def tile(camera: Camera) -> Camera:
    """The same views, no larger than a tile of a sheet."""
    shrink = min(1.0, TILE_PX / max(camera.width, camera.height))
    return camera.resized(max(1, round(shrink * camera.width)), max(1, round(shrink * camera.height)))


def caption(words: str, width: int) -> torch.Tensor:
    """Black on white ``(height, width, 3)``."""
    image = Image.new("L", (width, CAPTION_PX), 255)
    ImageDraw.Draw(image).text((4, 3), words, fill=0)
    grey = torch.tensor(list(image.tobytes())).reshape(CAPTION_PX, width, 1) / 255.0
    return grey.expand(-1, -1, 3)
