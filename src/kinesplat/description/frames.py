"""MuJoCo's positions and quaternions as transforms."""

import numpy as np
from jaxtyping import Float
from scipy.spatial.transform import Rotation


def rotation_of(quaternion: Float[np.ndarray, "4"]) -> Rotation:
    """Rotation of a wxyz quaternion; of none at all for a zero one, as in MuJoCo."""
    return Rotation.from_quat(quaternion, scalar_first=True) if np.any(quaternion) else Rotation.identity()


def transform(position: Float[np.ndarray, "3"], quaternion: Float[np.ndarray, "4"]) -> Float[np.ndarray, "4 4"]:
    """``(4, 4)`` from a position [m] and a wxyz quaternion."""
    T = np.eye(4)
    T[:3, :3] = rotation_of(quaternion).as_matrix()
    T[:3, 3] = position
    return T
