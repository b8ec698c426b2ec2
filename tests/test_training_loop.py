"""Laws of the training loop: budgets, order of images, checkpoints, logs, stopping."""

import math
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from kinesplat import zoo
from kinesplat.errors import InputError, ModelFileError, TrainingError
from kinesplat.training import loop
from kinesplat.training.checkpoint import read_checkpoint, write_checkpoint


@pytest.mark.parametrize(
    ("budget", "words"),
    [
        ({}, "steps or of minutes"),
        ({"steps": 0}, "steps is 0"),
        ({"minutes": -1.0}, "minutes is -1"),
        ({"minutes": math.nan}, "nan"),
    ],
)
def test_a_budget_without_end_is_refused(budget: dict, words: str) -> None:
    with pytest.raises(InputError, match=words):
        loop.Budget(**budget)


def test_run_makes_the_steps_asked_for_and_counts_those_before() -> None:
    seen = []

    def step(number: int, share: float) -> dict[str, float]:
        seen.append((number, share))
        return {"loss": 1.0}

    ticks = list(loop.run(step, loop.Budget(steps=10), done=4, seconds=7.0))
    assert seen == [(n, n / 10) for n in range(4, 10)]
    assert [t.step for t in ticks] == list(range(5, 11))
    assert [t.share >= 1.0 for t in ticks] == [False] * 5 + [True]
    assert all(t.seconds >= 7.0 for t in ticks)
    assert [t.step for t in ticks if t.due(4)] == [8, 10]


def test_run_ends_by_the_clock() -> None:
    ticks = list(loop.run(lambda number, share: {"loss": 0.0}, loop.Budget(minutes=0.002, steps=10**9)))
    assert ticks[-1].share == 1.0
    assert 0.12 <= ticks[-1].seconds < 5.0
    assert not list(loop.run(lambda number, share: {"loss": 0.0}, loop.Budget(minutes=0.002), seconds=1.0))


@pytest.mark.parametrize("value", [math.nan, math.inf, torch.tensor(-math.inf)])
def test_a_loss_that_is_no_number_stops_with_the_step_named(value: float | torch.Tensor) -> None:
    steps = loop.run(lambda number, share: {"loss": value if number == 3 else 1.0}, loop.Budget(steps=9))
    with pytest.raises(TrainingError, match="step 3: loss is"):
        list(steps)


def test_input_that_the_rasteriser_refuses_stops_with_the_step_named() -> None:
    def step(number: int, share: float) -> dict[str, float]:
        raise InputError("gaussians.means contains NaN or infinity")

    with pytest.raises(TrainingError, match=r"step 2: gaussians\.means contains NaN"):
        list(loop.run(step, loop.Budget(steps=9), done=2))


def test_every_image_comes_once_per_epoch_in_an_order_of_seed_and_epoch() -> None:
    rows = torch.cat([loop.batch_rows(7, 3, step, seed=1) for step in range(14)])
    epochs = rows.reshape(6, 7)
    assert torch.equal(epochs.sort(dim=1).values, torch.arange(7).expand(6, 7))
    assert len({tuple(e) for e in epochs.tolist()}) > 1
    assert torch.equal(loop.batch_rows(7, 3, 11, seed=1), rows[33:36])
    assert not torch.equal(rows[:7], torch.cat([loop.batch_rows(7, 7, 0, seed=2)]))
    with pytest.raises(InputError, match="no image"):
        loop.batch_rows(0, 1, 0, seed=0)


def test_early_stop_waits_for_its_patience() -> None:
    stop = loop.EarlyStop(patience=2, least=0.01)
    assert [stop.improved(x) for x in (1.0, 0.5, 0.499, 0.4)] == [True, True, False, True]
    assert not stop.stop
    assert [stop.improved(x) for x in (0.4, 0.6)] == [False, False]
    assert stop.stop
    assert stop.best == 0.4


def test_rates_decay_from_first_to_last() -> None:
    assert loop.decayed(1.0, 0.01, 0.0) == 1.0
    assert loop.decayed(1.0, 0.01, 0.5) == pytest.approx(0.1)
    assert loop.decayed(1.0, 0.01, 1.0) == pytest.approx(0.01)
    assert loop.decayed(1.0, 0.01, 0.0, warm_up=0.1) < 0.02


def sample_state() -> dict:
    parameter = torch.nn.Parameter(torch.randn(5, 3))
    optimizer = torch.optim.Adam([{"params": [parameter], "lr": 0.1, "name": "means"}])
    parameter.square().sum().backward()
    optimizer.step()
    return {"step": 3, "nested": {"means": parameter, "names": ["a", None]}, "optimizer": optimizer.state_dict()}


def test_a_checkpoint_gives_back_what_was_written(tmp_path: Path) -> None:
    state = sample_state()
    write_checkpoint(tmp_path / "c.safetensors", state)
    read = read_checkpoint(tmp_path / "c.safetensors")
    assert read["step"] == 3
    assert read["nested"]["names"] == ["a", None]
    assert torch.equal(read["nested"]["means"], state["nested"]["means"])
    fresh = torch.optim.Adam([{"params": [torch.nn.Parameter(torch.zeros(5, 3))], "lr": 0.5, "name": "means"}])
    fresh.load_state_dict(read["optimizer"])
    assert fresh.param_groups[0]["lr"] == 0.1
    assert torch.equal(fresh.state_dict()["state"][0]["exp_avg"], state["optimizer"]["state"][0]["exp_avg"])


def test_a_checkpoint_with_nan_is_not_written_and_the_former_stays(tmp_path: Path) -> None:
    path = tmp_path / "c.safetensors"
    write_checkpoint(path, {"a": {"means": torch.ones(2)}})
    with pytest.raises(TrainingError, match=r"a\.means holds NaN"):
        write_checkpoint(path, {"a": {"means": torch.tensor([1.0, math.nan])}})
    assert torch.equal(read_checkpoint(path)["a"]["means"], torch.ones(2))
    assert [p.name for p in tmp_path.iterdir()] == ["c.safetensors"]


def test_a_self_model_is_no_checkpoint(tmp_path: Path) -> None:
    with pytest.raises(ModelFileError, match="not a checkpoint"):
        read_checkpoint(zoo.FOLDER / "kinearm.safetensors")
    path = tmp_path / "c.safetensors"
    write_checkpoint(path, {"a": torch.ones(100)})
    path.write_bytes(path.read_bytes()[:-7])
    with pytest.raises(ModelFileError, match="cut short"):
        read_checkpoint(path)


def test_a_resumed_log_drops_the_rows_after_its_step(tmp_path: Path) -> None:
    with loop.Log(tmp_path) as log:
        for step in (10, 20, 30):
            log.write(step, {"loss": 1.0 / step})
    with loop.Log(tmp_path, step=20) as log:
        log.write(25, {"loss": 7.0})
        assert [(int(s), n) for s, n, _ in log.rows()] == [(10, "loss"), (20, "loss"), (25, "loss")]


def test_the_log_writes_tensorboard_events_where_it_is_installed(tmp_path: Path) -> None:
    pytest.importorskip("tensorboard")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    with loop.Log(tmp_path) as log:
        log.write(5, {"psnr_db": 30.0})
    events = EventAccumulator(str(tmp_path))
    events.Reload()
    assert [(e.step, e.value) for e in events.Scalars("psnr_db")] == [(5, 30.0)]


def test_without_tensorboard_the_csv_is_still_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard", None)
    with loop.Log(tmp_path) as log:
        log.write(5, {"psnr_db": 30.0})
        assert log.rows() == [["5", "psnr_db", "30"]]
    assert [p.name for p in tmp_path.iterdir()] == ["log.csv"]
    with loop.Log(None) as log:
        log.write(5, {"psnr_db": 30.0})
        assert log.rows() == []


def test_a_run_killed_while_it_writes_leaves_a_whole_checkpoint(tmp_path: Path) -> None:
    script = (
        "import sys, torch\n"
        "from kinesplat.training.checkpoint import write_checkpoint\n"
        "step = 0\n"
        "while True:\n"
        "    step += 1\n"
        "    write_checkpoint(sys.argv[1], {'step': step, 'means': torch.full((200_000,), float(step))})\n"
        "    print(step, flush=True)\n"
    )
    path = tmp_path / "c.safetensors"
    with subprocess.Popen([sys.executable, "-c", script, str(path)], stdout=subprocess.PIPE) as process:
        assert process.stdout is not None
        for _ in range(3):
            process.stdout.readline()
        process.kill()
    state = read_checkpoint(path)
    assert state["step"] >= 3
    assert torch.equal(state["means"], torch.full((200_000,), float(state["step"])))


def test_psnr_of_a_known_error() -> None:
    truth = torch.rand(2, 4, 5, 3) * 0.5
    assert torch.allclose(loop.psnr(truth + 0.1, truth), torch.full((2,), 20.0), atol=1e-3)
