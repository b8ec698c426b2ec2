"""The native backend."""

from kinesplat.errors import BackendError
from kinesplat.rasterizer.render import Render, Scene


def render(scene: Scene) -> Render:
    """Render with the native kernel.

    Raises:
        BackendError: the native module was not built.
    """
    raise BackendError("the native rasteriser is not built; run 'pip install -e .' in the repository")
