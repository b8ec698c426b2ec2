"""How splats follow the links: bound to one (`links`), or blended by a field of weights (`field`)."""

from kinesplat.skinning.field import SkinningField, blend_gaussians, blend_points, link_motions
from kinesplat.skinning.links import pose_gaussians, sh_rotation

__all__ = ["SkinningField", "blend_gaussians", "blend_points", "link_motions", "pose_gaussians", "sh_rotation"]
