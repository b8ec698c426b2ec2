"""URDF files that tests write."""

from pathlib import Path

import pytest
import trimesh

from kinesplat.description import LinkMesh, Robot

CUBE = trimesh.creation.box((2.0, 4.0, 6.0))


@pytest.fixture(autouse=True)
def own_cache(tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch) -> None:
    """No cache and no ROS workspace of the user's; tests that import this get it unasked."""
    monkeypatch.setenv("KINESPLAT_CACHE", str(tmp_path_factory.mktemp("cache")))
    for name in ("ROS_PACKAGE_PATH", "AMENT_PREFIX_PATH", "CMAKE_PREFIX_PATH"):
        monkeypatch.delenv(name, raising=False)


def write_urdf(folder: Path, visual: str, name: str = "robot.urdf") -> Path:
    """A robot of one link with the given <visual> content."""
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / name
    path.write_text(f'<robot name="r"><link name="base"><visual>{visual}</visual></link></robot>')
    return path


def mesh_visual(name: str, extra: str = "", material: str = "") -> str:
    """The content of a <visual> that shows a mesh file."""
    return f'<geometry><mesh filename="{name}" {extra}/></geometry>{material}'


def only_mesh(robot: Robot) -> LinkMesh:
    """The one mesh of a robot that has one."""
    (mesh,) = robot.link_meshes
    return mesh
