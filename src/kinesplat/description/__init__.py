"""Robot descriptions: MJCF files, names and compiled models become a KinematicTree and LinkMeshes."""

from kinesplat.description.compose import Part
from kinesplat.description.inspection import inspect, inspection_text
from kinesplat.description.loading import load_description
from kinesplat.description.model import mujoco_qpos, robot_from_model
from kinesplat.description.robot import LinkMesh, Robot
from kinesplat.description.sources import names

__all__ = [
    "LinkMesh",
    "Part",
    "Robot",
    "inspect",
    "inspection_text",
    "load_description",
    "mujoco_qpos",
    "names",
    "robot_from_model",
]
