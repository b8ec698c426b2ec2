"""benchmarks/tabletop.py goes on after a kill: episodes by folders, results by whole lines of the present model."""

import argparse
import importlib.util
import json
import sys
from pathlib import Path
from types import ModuleType

import pytest
import torch

pytest.importorskip("pyarrow")
SCRIPT = Path(__file__).parents[1] / "benchmarks" / "tabletop.py"


@pytest.fixture
def tabletop(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    monkeypatch.setattr(sys, "path", [str(SCRIPT.parent), *sys.path])
    spec = importlib.util.spec_from_file_location("tabletop", SCRIPT)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    monkeypatch.setitem(sys.modules, "tabletop", module)  # dataclasses look their module up
    spec.loader.exec_module(module)
    return module


def test_episodes_go_on_after_a_kill(tabletop: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[tuple[str, torch.Tensor]] = []

    def recording(world: object, pictures: object, scene: object, colour: str) -> tuple:
        if len(seen) == 3:
            seen.clear()
            raise KeyboardInterrupt
        seen.append((colour, scene.q_start))  # type: ignore[attr-defined]
        return torch.full((2, 4, 4, 3), len(seen) / 255.0), torch.zeros(2, 7), True

    monkeypatch.setattr(tabletop, "true_video", recording)
    monkeypatch.setattr(tabletop, "TabletopPictures", lambda world, size: None)
    monkeypatch.setattr(tabletop, "SHARD", 2)
    arguments = argparse.Namespace(out=tmp_path, episodes=5, seed=0)
    with pytest.raises(KeyboardInterrupt):
        tabletop.episodes(arguments)
    assert [p.name for p in (tmp_path / "episodes").iterdir()] == ["000000"]
    tabletop.episodes(arguments)  # episodes 2, 3 and 4
    assert [colour for colour, _ in seen] == ["blue", "red", "green"]
    assert torch.equal(seen[1][1], seen[2][1])  # of one scene
    assert not torch.equal(seen[0][1], seen[1][1])
    colours = [episode.instruction.split()[2] for episode in tabletop.recorded(arguments)]
    assert colours == ["red", "green", "blue", "red", "green"]


def test_results_are_of_the_present_model_and_half_a_line_is_none(tabletop: ModuleType, tmp_path: Path) -> None:
    weights = tmp_path / "unet" / "model.safetensors"
    assert tabletop.checksum(tmp_path) == ""
    weights.parent.mkdir()
    weights.write_bytes(b"old")
    old = tabletop.checksum(tmp_path)
    weights.write_bytes(b"new")
    new, path = tabletop.checksum(tmp_path), tmp_path / "generated.jsonl"
    assert tabletop.read_rows(path, new) == []
    rows = [{"scene": 0, "model": old}, {"scene": 0, "model": new}, {"scene": 1, "model": new}]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows) + '{"scene": 2, "mod')
    assert tabletop.read_rows(path, new) == rows[1:]
    assert [place.index for place in tabletop.unfinished(path, new)] == list(range(2, tabletop.SCENES))
    assert [json.loads(line) for line in path.read_text().splitlines()] == rows[1:]
    assert tabletop.read_rows(path, old) == []
