"""From joint values to a picture: render."""

from dataclasses import replace
from pathlib import Path

import torch

from kinesplat.camera import Camera
from kinesplat.commands.common import DEFAULTS, CommonOptions, Model, Output, device_of, load_model, out, write_json
from kinesplat.errors import InputError
from kinesplat.files import colours_of, write_png


def render(
    model: Model,
    output: Output,
    q: tuple[float, ...] | None = None,
    camera: Path | None = None,
    size: int = 512,
    background: tuple[float, float, float] = (1.0, 1.0, 1.0),
    mask: bool = False,
    depth: bool = False,
    link_id: bool = False,
    *,
    common: CommonOptions = DEFAULTS,
) -> None:
    """Render a self-model to a PNG.

    Args:
        model: model file, or the name of a packaged model.
        output: the picture to write (.png); masks and the like stand beside it as NAME_mask.png, ...
        q: joint values [rad]/[m] in the order of `kinesplat models NAME`; default: the canonical configuration.
        camera: JSON file with K, T_cam_world, width, height; default: a camera that frames the robot.
        size: image size [px] of the default camera.
        background: RGB in [0, 1].
        mask: also write the alpha channel.
        depth: also write the depth in millimetres, 16 bit.
        link_id: also write the link ids as colours.
    """
    device = device_of(common)
    loaded = load_model(model)
    joints = loaded.tree.q_canonical.float() if q is None else torch.tensor(q)
    view = (
        Camera.framing(loaded.posed(joints).means, width=size, height=size)
        if camera is None
        else Camera.from_json(camera)
    )
    if view.batch_shape:
        raise InputError(f"{camera} holds a batch of cameras {view.batch_shape}; render takes one")
    loaded.check_camera(joints, view)
    outputs = ("rgb", "alpha", "depth", "link_id")
    image = loaded.to(device).render(joints.to(device), view.to(device), background, outputs=outputs)
    image = replace(image, **{name: getattr(image, name).cpu() for name in outputs})
    assert image.rgb is not None
    written = [write_png(output, image.rgb)]
    if mask and image.alpha is not None:
        written.append(write_png(output.with_name(f"{output.stem}_mask.png"), image.alpha))
    if depth and image.depth is not None:
        millimetres = (image.depth * 1000.0).round().clamp(0, 65535).to(torch.int32)
        written.append(write_png(output.with_name(f"{output.stem}_depth.png"), millimetres))
    if link_id and image.link_id is not None:
        written.append(write_png(output.with_name(f"{output.stem}_link_id.png"), colours_of(image.link_id)))
    for path in written:
        out.print(f"wrote {path}")
    write_json(common.json, {"q": joints.tolist(), "camera": view.to_json(), "files": [str(p) for p in written]})
