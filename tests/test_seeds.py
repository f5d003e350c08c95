"""The record of several runs says what the runs say."""

import json

import pytest
import torch

import seeds
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


def test_table_has_mean_and_standard_deviation():
    """Of 0.02 and 0.04 they are 0.03 and 0.02/√2."""
    text = seeds.table([{"seed": 0, "held_out": [0.02], "seconds": [60]},
                        {"seed": 1, "held_out": [0.04], "seconds": [180]}])
    assert text.splitlines()[2:] == ["| 0 | 0.0200 | 1 |", "| 1 | 0.0400 | 3 |",
                                     "| mean | 0.0300 | 2 |", "| standard deviation | 0.01414 | 1 |"]


def test_readme_shows_what_was_measured():
    """The table in the README is the one made from pretrained/seeds.json."""
    if seeds.RESULTS.exists():
        text = (seeds.ROOT / "README.md").read_text(encoding="utf-8")
        assert seeds.table(json.loads(seeds.RESULTS.read_text())["runs"]) in text
