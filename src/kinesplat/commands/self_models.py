"""Making self-models and looking into them: build, inspect, models."""

from pathlib import Path
from typing import Annotated

import tyro
from rich.table import Table

from kinesplat import zoo
from kinesplat.camera import Camera
from kinesplat.commands.common import (
    DEFAULTS,
    Common,
    CommonOptions,
    Output,
    cpu_of,
    load_model,
    out,
    packages_of,
    write_json,
)
from kinesplat.description import inspect as inspect_description
from kinesplat.description import inspection_text, load_description
from kinesplat.files import write_png
from kinesplat.self_model import SelfModel


def build(
    robot: Annotated[str, tyro.conf.Positional],
    output: Output,
    n: int = 10_000,
    package: tuple[str, ...] = (),
    *,
    common: CommonOptions = DEFAULTS,
) -> None:
    """Make a self-model from a robot's meshes, without training.

    Args:
        robot: path to a URDF, xacro or MJCF file, or a name (kinearm, a Menagerie or robot_descriptions name).
        output: the model file to write (.safetensors).
        n: number of Gaussians.
        package: NAME=FOLDER of ROS packages that package:// refers to.
    """
    cpu_of(common)
    model = SelfModel.from_description(load_description(robot, packages=packages_of(package)), n=n, seed=common.seed)
    model.save(output)
    out.print(
        f"wrote {output}: {len(model.parameters)} Gaussians on {len(model.tree.link_names)} links, dof {model.tree.dof}"
    )
    write_json(common.json, {"model": str(output), "gaussians": len(model.parameters), "dof": model.tree.dof})


def inspect(
    robot: Annotated[str, tyro.conf.Positional],
    output: Annotated[Path | None, tyro.conf.arg(aliases=["-o"])] = None,
    package: tuple[str, ...] = (),
    *,
    common: CommonOptions = DEFAULTS,
) -> None:
    """Show what a description contains: links, joints with limits, couplings, meshes, colours, warnings.

    Args:
        robot: path to a URDF, xacro or MJCF file, or a name (kinearm, a Menagerie or robot_descriptions name).
        output: also write a picture of the robot (.png).
        package: NAME=FOLDER of ROS packages that package:// refers to.
    """
    cpu_of(common)
    loaded = load_description(robot, packages=packages_of(package))
    out.print(inspection_text(loaded))
    if output is not None:
        model = SelfModel.from_description(loaded, n=20_000, seed=common.seed)
        q = model.tree.q_canonical.float()
        picture = model.render(q, Camera.framing(model.posed(q).means, width=768, height=768)).rgb
        assert picture is not None
        write_png(output, picture)
        out.print(f"wrote {output}")
    write_json(common.json, inspect_description(loaded))


def models(name: Annotated[str | None, tyro.conf.Positional] = None, *, common: CommonOptions = DEFAULTS) -> None:
    """List the packaged self-models, or the joints of one model.

    Args:
        name: packaged model or model file; default: list all packaged ones.
    """
    cpu_of(common)
    if name is not None:
        return describe(load_model(name), name, common)
    rows = [{"name": n, **zoo.card(n)} for n in zoo.names()]
    table = Table("name", "dof", "Gaussians", "licence of the description")
    for row in rows:
        table.add_row(row["name"], str(row["dof"]), str(row["gaussians"]), row["licence"].partition(":")[0])
    out.print(table)
    write_json(common.json, {"models": rows})


def describe(model: SelfModel, name: str, common: Common) -> None:
    """Print the joints of a model with their limits."""
    tree = model.tree
    table = Table("joint", "lower", "upper", "canonical", title=name)
    rows = list(
        zip(tree.joint_names, tree.q_lower.tolist(), tree.q_upper.tolist(), tree.q_canonical.tolist(), strict=True)
    )
    for joint, *values in rows:
        table.add_row(joint, *(f"{v:+.4f}" for v in values))
    out.print(table)
    keys = ("joint", "lower", "upper", "canonical")
    write_json(common.json, {"joints": [dict(zip(keys, row, strict=True)) for row in rows]})
