"""Kinesplat: a robot's picture, differentiable with respect to its joints and the camera.

The names below are imported when first used, so that rendering a saved model needs neither MuJoCo nor meshes.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from kinesplat import errors, zoo
    from kinesplat.camera import Camera
    from kinesplat.description import Robot, load_description
    from kinesplat.gaussians import Gaussians, Parameters
    from kinesplat.imagination.imagine import Imagination, imagine
    from kinesplat.inverse import (
        CalibrationResult,
        FitResult,
        RetargetResult,
        TextResult,
        TrackResult,
        calibrate,
        reconstruct,
        retarget,
        text_to_q,
        track,
    )
    from kinesplat.kinematics import KinematicTree
    from kinesplat.rasterizer import Render, rasterize, rasterize_links
    from kinesplat.self_model import SelfModel
    from kinesplat.training.recipes import train

__version__ = "0.1.0"
__all__ = [
    "CalibrationResult",
    "Camera",
    "FitResult",
    "Gaussians",
    "Imagination",
    "KinematicTree",
    "Parameters",
    "Render",
    "RetargetResult",
    "Robot",
    "SelfModel",
    "TextResult",
    "TrackResult",
    "calibrate",
    "errors",
    "imagine",
    "load_description",
    "rasterize",
    "rasterize_links",
    "reconstruct",
    "retarget",
    "text_to_q",
    "track",
    "train",
    "zoo",
]

_HOME = {
    "CalibrationResult": "inverse",
    "Camera": "camera",
    "FitResult": "inverse",
    "Gaussians": "gaussians",
    "Imagination": "imagination.imagine",
    "KinematicTree": "kinematics",
    "Parameters": "gaussians",
    "Render": "rasterizer",
    "RetargetResult": "inverse",
    "Robot": "description",
    "SelfModel": "self_model",
    "TextResult": "inverse",
    "TrackResult": "inverse",
    "calibrate": "inverse",
    "imagine": "imagination.imagine",
    "train": "training.recipes",
    "load_description": "description",
    "rasterize": "rasterizer",
    "rasterize_links": "rasterizer",
    "reconstruct": "inverse",
    "retarget": "inverse",
    "text_to_q": "inverse",
    "track": "inverse",
}


def __getattr__(name: str) -> Any:
    if name in _HOME:
        return getattr(import_module(f"kinesplat.{_HOME[name]}"), name)
    if name in __all__:
        return import_module(f"kinesplat.{name}")
    raise AttributeError(f"module 'kinesplat' has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted(__all__)
