"""The record of runs of several lengths says what the runs say."""

import json
import math
from pathlib import Path

import pytest
import torch

import train
from schedule import NoiseSchedule
from tests.experiments import lengths
from tests.experiments.lengths import judge, minutes_to, table
from tests.experiments.test_measure import Sure
from tests.experiments.yardstick import load_classifier, look

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


def test_judge_asks_the_model_alone_and_then_guided():
    """A model that is sure of one digit, and an earlier state that is sure of another: both chains
    end at the digit of the model. The earlier state is asked at each t from 150 to 700 of one
    chain. The distance is that from the features given.
    """
    schedule = NoiseSchedule()
    digits, _ = train.builtin_digits(2, seed=3)
    features, probabilities = look(load_classifier(), digits)
    model, earlier = (Sure(schedule, train.from_uint8(digits[k:k + 1])) for k in (0, 1))
    model.config = {"size": 28}
    checkpoint = train.Checkpoint(model, schedule, train.Config(dataset="builtin"), {}, [], {})
    result = judge(checkpoint, earlier, 2.0, features[1:].repeat(3, 1), count=4)
    assert result["count"] == 4
    square = (features[0] - features[1]).square().sum().item()
    for how in ("unguided", "guided"):
        assert result[how]["clear"] == float(probabilities[0].max() > 0.9)
        assert math.isclose(result[how]["distance"], square, rel_tol=1e-3)
    levels = [1000 - 50 * k for k in range(20)]
    assert sorted(t[0].item() for _, t in model.asked) == sorted(2 * levels)
    assert [t[0].item() for _, t in earlier.asked] == [t for t in levels if 150 <= t <= 700]


def test_small_digits_are_enlarged():
    """A digit of 28x28 stays as it is; one of 14x14 becomes one whose pixels, averaged two by two,
    are nearly those of before. The classifier mostly sees the same numeral.
    """
    digits, labels = train.builtin_digits(20, seed=5)
    assert lengths.enlarged(digits) is digits
    small = train.scaled(digits, 14)
    large = lengths.enlarged(small)
    assert large.shape == (20, 1, 28, 28) and large.dtype == torch.uint8
    back = torch.nn.functional.avg_pool2d(large.double(), 2)
    assert (back - small).abs().mean() < 6
    _, before = look(load_classifier(), digits)
    _, after = look(load_classifier(), large)
    assert (before.argmax(dim=1) == after.argmax(dim=1)).sum() >= 16


def test_numbers_of_a_run_are_those_of_its_files(tiny_run):
    """The images that it saw, and the seconds and the last held-out loss of its history."""
    reference = torch.randn(10, 64, generator=torch.Generator().manual_seed(0)).double()
    history = train.load_checkpoint(tiny_run / "model.pt").history
    result = lengths.row_of(tiny_run / "model.pt", 2.0, reference, count=2)
    config = train.load_checkpoint(tiny_run / "model.pt").config
    assert result["images"] == config.batch_size * len(history["step_loss"]) > 0
    assert result["seconds"] == sum(history["seconds"])
    assert result["held_out"] == history["held_out"][-1]


@pytest.mark.skipif(not lengths.RESULTS.exists(), reason="not measured yet")
def test_readme_shows_what_was_measured():
    """The tables in README.md are those made from pretrained/lengths.json."""
    text = Path(__file__).with_name("README.md").read_text(encoding="utf-8")
    assert table(json.loads(lengths.RESULTS.read_text())) in text
