"""Imports point downward only: every module of the package belongs to a level and imports lower levels alone."""

import ast
from pathlib import Path

import pytest

import kinesplat

PACKAGE = Path(kinesplat.__file__).parent
LEVELS = [
    ["errors", "robots"],
    [
        "couplings",
        "product_of_exponentials",
        "rotation_vectors",
        "kinematics",
        "twists",
        "camera",
        "gaussians",
        "quaternions",
        "fourier_mlp",
        "files",
        "video",
        "devices",
    ],
    ["description", "rasterizer"],
    ["appearance", "surface", "skinning", "model_file", "vision"],
    ["self_model", "dataset"],
    ["inverse", "training"],
    ["evaluation", "imagination"],
    ["zoo", "demo", "benchmark", "report", "commands", "cli"],
]
LEVEL_OF = {name: level for level, names in enumerate(LEVELS) for name in names}
HEAVY = {"viser", "gsplat", "transformers", "diffusers", "ray", "accelerate", "peft", "pyarrow", "mujoco_warp", "warp"}
MODULES = sorted(path for path in PACKAGE.rglob("*.py") if path != PACKAGE / "__init__.py")


def unit_of(path: Path) -> str:
    return path.relative_to(PACKAGE).parts[0].removesuffix(".py")


def imported_names(path: Path, top_level_only: bool = False) -> list[str]:
    tree = ast.parse(path.read_text())
    nodes = tree.body if top_level_only else list(ast.walk(tree))
    names = []
    for node in nodes:
        if isinstance(node, ast.Import):
            names += [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom) and node.level == 0:
            names += [f"{node.module}.{alias.name}" for alias in node.names]
    return names


@pytest.mark.parametrize("path", MODULES, ids=lambda p: str(p.relative_to(PACKAGE)))
def test_imports_point_downward(path: Path) -> None:
    unit = unit_of(path)
    assert unit in LEVEL_OF, f"{unit} has no level; add it to LEVELS"
    for name in imported_names(path):
        parts = name.split(".")
        if parts[0] != "kinesplat" or len(parts) < 2 or parts[1] == unit or parts[1].startswith("__"):
            continue
        assert parts[1] in LEVEL_OF, f"{path.name} imports {name} through the package, not from its module"
        siblings_allowed = LEVEL_OF[unit] in (1, len(LEVELS) - 1)
        lower = LEVEL_OF[parts[1]] < LEVEL_OF[unit] or (siblings_allowed and LEVEL_OF[parts[1]] == LEVEL_OF[unit])
        assert lower, f"{unit} (level {LEVEL_OF[unit]}) imports {name} (level {LEVEL_OF[parts[1]]})"


@pytest.mark.parametrize("path", MODULES, ids=lambda p: str(p.relative_to(PACKAGE)))
def test_heavy_packages_are_not_imported_with_the_module(path: Path) -> None:
    heavy = HEAVY & {name.split(".")[0] for name in imported_names(path, top_level_only=True)}
    assert not heavy, f"{path.name} imports {heavy} at module level"


def test_no_relative_imports() -> None:
    for path in MODULES:
        relative = [n for n in ast.walk(ast.parse(path.read_text())) if isinstance(n, ast.ImportFrom) and n.level > 0]
        assert not relative, f"{path}: relative import"
