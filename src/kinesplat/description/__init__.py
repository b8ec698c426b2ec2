"""Robot descriptions: MJCF files, names and compiled models become a KinematicTree and LinkMeshes."""

from kinesplat.description.loading import load_description, names
from kinesplat.description.model import mujoco_qpos, robot_from_model
from kinesplat.description.robot import LinkMesh, Robot

__all__ = ["LinkMesh", "Robot", "load_description", "mujoco_qpos", "names", "robot_from_model"]
