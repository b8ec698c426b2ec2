"""load_description: from a path, a name, a MuJoCo object, or several of them, to a Robot."""

from collections.abc import Mapping, Sequence
from pathlib import Path

import mujoco

from kinesplat.description.compose import Part, combined, subtree_of
from kinesplat.description.model import robot_from_model
from kinesplat.description.robot import Robot
from kinesplat.description.sources import Loaded, Options, loaded, quiet_mujoco
from kinesplat.errors import DescriptionError

Source = str | Path | mujoco.MjModel | mujoco.MjSpec


def load_description(
    source: Source | Part | Sequence[Source | Part],
    *,
    subtree: str | None = None,
    packages: Mapping[str, str | Path] | None = None,
    xacro_args: Mapping[str, str] | None = None,
) -> Robot:
    """Load a robot. Nothing is written beside the description; meshes that had to be converted are cached.

    Args:
        source: a path to ``.urdf``, ``.xacro``, ``.xml`` or ``.mjcf``; the name of a packaged robot ("kinearm"), of a
            MuJoCo Menagerie robot ("franka_emika_panda", another file of the same robot as
            "franka_emika_panda/hand"; from ``MENAGERIE_ROOT`` when it is set) or of a robot_descriptions robot
            ("panda_description", "panda_mj_description"); a compiled ``mujoco.MjModel``, or a ``mujoco.MjSpec``.
            A sequence of these, or of `Part`, is one robot made of several: two arms, or an arm and its tool.
        subtree: load only this link and what hangs on it, standing at the world's origin.
        packages: folders of ROS packages by name, for ``package://`` and ``$(find ...)``.
        xacro_args: arguments of a xacro file.

    Raises:
        DescriptionError: the file or name does not exist, or the description is broken; one line says where.
    """
    options = Options(packages or {}, xacro_args or {})
    if isinstance(source, mujoco.MjModel):
        if subtree is not None:
            raise DescriptionError("a compiled MjModel cannot be taken apart; pass its MjSpec or file")
        return robot_from_model(source, _model_name(source), "<MjModel>", "unknown")
    if isinstance(source, Sequence) and not isinstance(source, str):
        if subtree is not None or not source:
            raise DescriptionError("several descriptions: expected at least one, and `subtree` in a Part")
        with quiet_mujoco():
            whole = combined([_loaded_part(part, options) for part in source])
    elif isinstance(source, Part):
        with quiet_mujoco():
            whole = combined([_loaded_part(source, options)])
    elif subtree is not None:
        with quiet_mujoco():
            whole = subtree_of(loaded(source, options), subtree)
    else:
        found = loaded(source, options)
        return _robot(found, None)
    return _robot(whole.loaded, whole.canonical)


def _robot(found: Loaded, canonical: Mapping[str, float] | None) -> Robot:
    model = found.compile()
    try:
        return robot_from_model(model, found.name, found.source, found.licence, found.warnings, canonical)
    except DescriptionError as error:
        raise DescriptionError(f"{found.source}: {error}") from error


def _loaded_part(source: Source | Part, options: Options) -> tuple[Part, Loaded]:
    part = source if isinstance(source, Part) else Part(_with_spec(source))
    return part, loaded(part.source, options)


def _with_spec(source: Source) -> str | Path | mujoco.MjSpec:
    if isinstance(source, mujoco.MjModel):
        raise DescriptionError("a compiled MjModel cannot be combined with others; pass its MjSpec or file")
    return source


def _model_name(model: mujoco.MjModel) -> str:
    return model.names[: model.names.index(b"\0")].decode() or "robot"
