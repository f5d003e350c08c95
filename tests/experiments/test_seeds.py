"""The record of several runs says what the runs say."""

import json
from pathlib import Path

import pytest
import torch

import train
from tests.experiments import seeds
from tests.strategies import pictures
from train import load_checkpoint

pytestmark = pytest.mark.slow


def test_histories_are_those_of_the_runs(tiny_run, tmp_path):
    """A finished run is taken over, to six digits; an unfinished one is left out."""
    state = torch.load(tiny_run / "model.pt", weights_only=True)
    state["config"]["epochs"] = 2
    torch.save(state, tmp_path / "model.pt")
    runs = seeds.collect([tiny_run, tmp_path])
    history = load_checkpoint(tiny_run / "model.pt").history
    assert len(runs) == 1 and runs[0]["seed"] == 0
    assert runs[0]["held_out"] == pytest.approx(history["held_out"], rel=1e-5)
    assert runs[0]["seconds"] == pytest.approx(history["seconds"], rel=1e-5)


def test_runs_of_other_seeds_are_kept():
    """The new run of a seed replaces the old one, and no other. A run that is read once more,
    perhaps by a process with another number of threads, changes nothing.
    """
    old = [{"seed": 2, "seconds": [1], "threads": 2}, {"seed": 0, "seconds": [2], "threads": 2}]
    new = [{"seed": 0, "seconds": [3], "threads": 1}]
    assert seeds.merged(old, new) == [*new, old[0]]
    assert seeds.merged(old, [{"seed": 0, "seconds": [2], "threads": 1}]) == old[::-1]


def test_start_evaluates_until_the_loss_is_below(tmp_path):
    """With a limit that any network meets, it evaluates once, the average after that step, and
    stops; with one that none meets, it goes on to the end. What it measures there is what a run
    without it measures, so it does not disturb the run.
    """
    images = pictures(48, 8), pictures(8, 8)
    options = {"dataset": "mnist", "device": "cpu", "batch_size": 8, "epochs": 1}
    config = train.Config(**options, out=str(tmp_path / "a"))
    record = seeds.start(config, 9.0, every=2, images=images)
    checkpoint = load_checkpoint(tmp_path / "a" / "model.pt")
    assert len(checkpoint.history["step_loss"]) == 2
    loss = train.evaluate(checkpoint.model, checkpoint.schedule, images[1])
    assert record == {"steps": [2], "held_out": [loss], "epoch": 6}

    config = train.Config(**options, out=str(tmp_path / "b"))
    record = seeds.start(config, 0.0, every=2, images=images)
    undisturbed = train.train(train.Config(**options, out=str(tmp_path / "c")), images=images)
    assert record["steps"] == [2, 4, 6]
    assert record["held_out"][-1] == undisturbed["held_out"][0]
    assert load_checkpoint(tmp_path / "b" / "model.pt").history["held_out"] == [
        record["held_out"][-1]]


def test_table_has_mean_and_standard_deviation():
    """Of 0.02 and 0.04 they are 0.03 and 0.02/√2."""
    text = seeds.table([{"seed": 0, "held_out": [0.02], "seconds": [60], "threads": 2},
                        {"seed": 1, "held_out": [0.04], "seconds": [180], "threads": 1}])
    assert text.splitlines()[2:] == [
        "| 0 | 0.0200 | 1 (2 threads) |", "| 1 | 0.0400 | 3 (1 thread) |", "| mean | 0.0300 | |",
        "| standard deviation | 0.01414 | |"]


def test_readme_shows_what_was_measured():
    """The table in README.md is the one made from pretrained/seeds.json."""
    text = Path(__file__).with_name("README.md").read_text(encoding="utf-8")
    assert seeds.table(json.loads(seeds.RESULTS.read_text())["runs"]) in text
