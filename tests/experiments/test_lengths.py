"""The record of runs of several lengths says what the runs say."""

import json
from pathlib import Path

import pytest
import torch

import train
from sample import Guided, sample, to_uint8
from schedule import NoiseSchedule
from tests.experiments import lengths
from tests.experiments.lengths import judge, minutes_to, table
from tests.experiments.yardstick import load_classifier, quality
from tests.strategies import normal

pytestmark = pytest.mark.slow


def row(minutes: float, unguided: float, guided: float, images: int = 0) -> dict:
    """A row of the file, as far as the tables need it."""
    return {"seconds": 60 * minutes, "images": images, "held_out": 0.02344,
            "unguided": {"clear": unguided, "distance": 12.34},
            "guided": {"clear": guided, "distance": 5.67}}


def test_minutes_lie_on_the_curve_between_two_runs():
    """If 2 minutes give 40 % and 8 minutes 60 %, then 50 % takes 4 minutes. A share that the first
    run has reached takes less time than it, and one that no run has reached says so.
    """
    rows = [row(2, 0.4, 0.5), row(8, 0.6, 0.95)]
    assert minutes_to(0.5, "unguided", rows) == "4.0"
    assert minutes_to(0.4, "unguided", rows) == "less than 2.0"
    assert minutes_to(0.6, "unguided", rows) == "8.0"
    assert minutes_to(0.61, "unguided", rows) == "not reached"
    third = 2 * 4 ** (1 / 3)
    assert minutes_to(0.65, "guided", rows) == f"{third:.1f}"


def test_tables_have_the_shortest_run_first():
    """Whatever the order in which they were measured; real digits come last. --quick, whose digits
    are smaller, does not count for the minutes.
    """
    lines = table({"real": {"unguided": {"clear": 0.97, "distance": 0.94}},
                   "long": row(8, 0.6, 0.95, 90_000), "short": row(2, 0.4, 0.5, 1_000),
                   "--quick": row(1, 0.9, 0.9, 500)}).splitlines()
    assert lines[2:6] == [
        "| --quick | 500 | 1.0 | 0.0234 | 90.0 % | 12.3 | 90.0 % | 5.7 |",
        "| short | 1,000 | 2.0 | 0.0234 | 40.0 % | 12.3 | 50.0 % | 5.7 |",
        "| long | 90,000 | 8.0 | 0.0234 | 60.0 % | 12.3 | 95.0 % | 5.7 |",
        "| real |  |  |  | 97.0 % | 0.9 |  |  |"]
    assert lines[-2:] == ["| unguided | 4.0 | not reached | not reached |",
                          "| guided | less than 2.0 | 4.3 | 6.9 |"]


class Leaning(torch.nn.Module):
    """A network that takes the noise for a multiple of what it sees, so that all others differ."""

    def __init__(self, factor: float, size: int = 28):
        super().__init__()
        self.factor = torch.nn.Parameter(torch.tensor(factor))
        self.config = {"size": size}
        self.asked = []

    def forward(self, xt, t):
        self.asked.append(t[0].item())
        return self.factor * xt


@pytest.mark.parametrize("size", [28, 16])
def test_judge_asks_the_model_alone_and_then_guided(size):
    """The numbers are those of the digits that sample() draws with the model alone, and with the
    guidance of this weight at t from 150 to 700, at the size of the model.
    """
    schedule = NoiseSchedule()
    model = Leaning(0.9, size)
    earlier = Leaning(0.7, size)
    checkpoint = train.Checkpoint(model, schedule, train.Config(dataset="builtin"), {}, [], {})
    reference = normal(0, 10, 64)
    result = judge(checkpoint, earlier, 3.0, reference, count=4)
    levels = [1000 - 50 * k for k in range(20)]
    assert model.asked == levels + levels
    assert earlier.asked == [t for t in levels if 150 <= t <= 700]

    by_hand = {"unguided": model, "guided": Guided(model, earlier, 3.0, (150, 700))}
    for how, network in by_hand.items():
        *_, (_, digits, _) = sample(network, schedule, [0, 1, 2, 3], "sde-dpm++",
                                    shape=(1, size, size))
        assert result[how] == quality(load_classifier(), to_uint8(digits.detach()), reference)
    assert result["guided"] != result["unguided"]
    assert result["count"] == 4 and result["weight"] == 3.0


def test_numbers_of_a_run_are_those_of_its_files(tiny_run):
    """Its digits are judged with early.pt as the guide; the images that it saw, the seconds and the
    last held-out loss are those of its history.
    """
    reference = normal(0, 10, 64)
    checkpoint = train.load_checkpoint(tiny_run / "model.pt")
    earlier = train.load_checkpoint(tiny_run / "early.pt").model
    history = checkpoint.history
    assert lengths.row_of(tiny_run / "model.pt", 2.0, reference, count=2) == {
        **judge(checkpoint, earlier, 2.0, reference, count=2),
        "images": checkpoint.config.batch_size * len(history["step_loss"]),
        "seconds": sum(history["seconds"]), "held_out": history["held_out"][-1]}


@pytest.mark.skipif(not lengths.RESULTS.exists(), reason="not measured yet")
def test_readme_shows_what_was_measured():
    """The tables in README.md are those made from pretrained/lengths.json."""
    text = Path(__file__).with_name("README.md").read_text(encoding="utf-8")
    rows = json.loads(lengths.RESULTS.read_text())
    assert table(rows) in text
    quick = train.QUICK
    steps = (60_000 - quick["val_images"]) // quick["batch_size"] * quick["epochs"]
    assert rows["--quick"]["images"] == steps * quick["batch_size"]  # not those of an older --quick
