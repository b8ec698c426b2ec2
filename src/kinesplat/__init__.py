"""Kinesplat: a robot's picture, differentiable with respect to its joints and the camera."""

from kinesplat import errors
from kinesplat.camera import Camera
from kinesplat.gaussians import Gaussians, Parameters

__all__ = ["Camera", "Gaussians", "Parameters", "errors"]
__version__ = "0.1.0"
