"""The record of several runs says what the runs say."""

import json

import pytest
import torch

import seeds
import train as script
from strategies import pictures
from train import load_checkpoint


def test_histories_are_those_of_the_runs(tiny_run, tmp_path):
    """A finished run is taken over to six digits, an unfinished one left out."""
    state = torch.load(tiny_run / "model.pt", weights_only=True)
    state["config"]["epochs"] = 2
    torch.save(state, tmp_path / "model.pt")
    runs = seeds.collect([tiny_run, tmp_path])
    history = load_checkpoint(tiny_run / "model.pt").history
    assert len(runs) == 1 and runs[0]["seed"] == 0
    assert runs[0]["held_out"] == pytest.approx(history["held_out"], rel=1e-5)
    assert runs[0]["seconds"] == pytest.approx(history["seconds"], rel=1e-5)


def test_runs_of_other_seeds_are_kept():
    """The new run of a seed takes the place of the old one, and no other's. A run that is read once
    more, perhaps by a process with another number of threads, changes nothing."""
    old = [{"seed": 2, "seconds": [1], "threads": 2}, {"seed": 0, "seconds": [2], "threads": 2}]
    new = [{"seed": 0, "seconds": [3], "threads": 1}]
    assert seeds.merged(old, new) == [*new, old[0]]
    assert seeds.merged(old, [{"seed": 0, "seconds": [2], "threads": 1}]) == old[::-1]


def test_start_looks_until_the_loss_is_below(tmp_path):
    """With a bound that anything meets, it looks once, at the average of that step, and stops; with
    one that nothing meets, it looks until the end. train.py is as before."""
    before, data = dict(vars(script)), (pictures(48, 8), pictures(8, 8))
    config = dict(dataset="mnist", device="cpu", batch_size=8, epochs=1)
    found = seeds.start(script.Config(**config, out=str(tmp_path / "a")), 9.0, every=2, images=data)
    model, schedule, _, history, _ = load_checkpoint(tmp_path / "a" / "model.pt")
    assert len(history["step_loss"]) == 2 and found == {
        "steps": [2], "held_out": [script.evaluate(model, schedule, data[1])], "epoch": 6}
    found = seeds.start(script.Config(**config, out=str(tmp_path / "b")), 0.0, every=2, images=data)
    history = load_checkpoint(tmp_path / "b" / "model.pt").history
    assert found["steps"] == [2, 4, 6] and found["held_out"][-1] == history["held_out"][0]
    assert before == dict(vars(script))


def test_table_has_mean_and_standard_deviation():
    """Of 0.02 and 0.04 they are 0.03 and 0.02/√2."""
    text = seeds.table([{"seed": 0, "held_out": [0.02], "seconds": [60], "threads": 2},
                        {"seed": 1, "held_out": [0.04], "seconds": [180], "threads": 1}])
    assert text.splitlines()[2:] == [
        "| 0 | 0.0200 | 1 (2 threads) |", "| 1 | 0.0400 | 3 (1 thread) |", "| mean | 0.0300 | |",
        "| standard deviation | 0.01414 | |"]


def test_readme_shows_what_was_measured():
    """The table in the README is the one made from pretrained/seeds.json."""
    text = (seeds.ROOT / "README.md").read_text(encoding="utf-8")
    assert seeds.table(json.loads(seeds.RESULTS.read_text())["runs"]) in text
