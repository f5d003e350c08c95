"""The measurements of guidance: they draw what they say, count what it costs, and choose fairly."""

import functools
from pathlib import Path

import pytest
import torch

import train
from sample import RESTARTS, SHIPPED, Guided, restart, sample, to_uint8
from tests.experiments import guidance as script
from tests.experiments.guidance import CHOICES, REPORTED, Setting
from tests.experiments.measure import Bench, read_results
from tests.experiments.yardstick import look
from tests.strategies import same_images, with_changes, write_mnist
from train import from_uint8, load_checkpoint
from unet import UNet

pytestmark = pytest.mark.slow

KNOWN = 120  # digits to train on, of which the last ten may not be used to choose by
REAL = 60


@pytest.fixture(scope="module")
def mnist(tmp_path_factory) -> Path:
    """A folder with few built-in digits, in the place and format of MNIST."""
    data = tmp_path_factory.mktemp("mnist")
    write_mnist(data, *train.builtin_digits(KNOWN, seed=0), splits=("train",))
    write_mnist(data, *train.builtin_digits(REAL, seed=1), splits=("t10k",))
    return data


@pytest.fixture(scope="module")
def model_file(tmp_path_factory) -> Path:
    """A small network after five epochs of two steps, with the files of all epochs beside it."""
    folder = tmp_path_factory.mktemp("run")
    training, _ = train.builtin_digits(16, seed=0)
    held_out, _ = train.builtin_digits(8, seed=1)
    config = train.Config(epochs=5, batch_size=8, out=str(folder), device="cpu")
    train.train(config, images=(training, held_out),
                network=functools.partial(UNet, channels=(8, 8, 8), blocks=(1, 1, 1)))
    return folder / "model.pt"


@pytest.fixture
def bench(mnist, model_file, tmp_path, monkeypatch) -> Bench:
    """A bench of its own for each test, since choosing changes what it compares with."""
    monkeypatch.setattr(script, "CHOSEN_FROM", KNOWN - 10)
    return Bench(load_checkpoint(model_file), model_file, str(mnist), (0, 0, 0), "cpu",
                 tmp_path / "claims.pt", tmp_path / "samples", sizes=(4, 8))


SETTINGS = [
    Setting(),
    Setting(2, 2.0),
    Setting(3, 1.5, (150, 700)),
    Setting(restarts=RESTARTS),
    Setting(2, 1.5, (150, 700), (0.3, 0.2)),
    Setting(1, 3.0, sampler="ddpm", steps=7),
]


def test_settings_have_names_of_their_own():
    """No two settings that are chosen from or reported share a name, which is that of a file and of
    a row. What is reported was among those chosen from, if perhaps with another sampler."""
    everything = {*CHOICES, *REPORTED, *SETTINGS}
    assert len({setting.name for setting in everything}) == len(everything)
    assert len(CHOICES) == len(set(CHOICES)) and Setting() not in CHOICES
    for setting in REPORTED:
        assert setting._replace(sampler="sde-dpm++", steps=20) in [Setting(), *CHOICES]
    assert {(s.guide, s.weight, s.interval) for s in CHOICES if not s.restarts} == {
        (guide, w, interval) for guide in (1, 2, 3, 5) for w in (1.5, 2.0, 2.5, 3.0)
        for interval in (None, (150, 700))}
    assert Setting().name == "sde-dpm++ 20"  # whose samples measure.py has drawn
    assert Setting(2, 1.5, (150, 700), RESTARTS).name == (
        "sde-dpm++ 20, epoch 2, w = 1.5, t of 150 to 700, 6 restarts")


@pytest.mark.parametrize("setting", SETTINGS, ids=lambda setting: setting.name)
def test_images_are_those_of_the_setting(setting, bench):
    """They are what sample() and restart() give for the model, guided by the file of the epoch."""
    network = bench.model
    if setting.guide is not None:
        worse = load_checkpoint(bench.path.with_name(f"epoch-{setting.guide}.pt")).model
        network = Guided(network, worse, setting.weight, setting.interval)
    schedule = bench.checkpoint.schedule
    *_, (_, x, _) = sample(network, schedule, [0, 1, 2], setting.sampler, steps=setting.steps)
    if setting.restarts:
        x = restart(network, schedule, x, [0, 1, 2], setting.restarts)
    images = script.samples(bench, setting, 3)
    assert images.shape == (3, 1, 28, 28) and images.dtype == torch.uint8
    assert same_images(images, to_uint8(x))


def test_settings_differ_in_what_they_draw(bench):
    """Guide, w, interval and restarts all matter, if only w is large enough for this network."""
    settings = [Setting(), Setting(1, 50.0), Setting(2, 50.0), Setting(1, 25.0),
                Setting(1, 50.0, (150, 700)), Setting(restarts=(0.4,)),
                Setting(1, 50.0, restarts=(0.4,))]
    drawn = [script.samples(bench, setting, 2) for setting in settings]
    for i, one in enumerate(drawn):
        assert not any(same_images(one, other) for other in drawn[:i]), settings[i].name


def test_samples_are_kept_and_more_are_added(bench, monkeypatch):
    """What was drawn is read again, not drawn again; those that are missing are drawn with the
    seeds that follow. Drawn in two goes, they are those of one go."""
    setting = Setting(2, 2.0, restarts=(0.3,))
    asked = []
    draw = script.draw

    def noted(bench, setting, model, seeds):
        asked.append(list(seeds))
        return draw(bench, setting, model, seeds)

    monkeypatch.setattr(script, "draw", noted)
    first = script.samples(bench, setting, 2)
    more = script.samples(bench, setting, 5)
    assert torch.equal(more[:2], first)
    assert torch.equal(script.samples(bench, setting, 4), more[:4])
    assert asked == [[0, 1], [2, 3, 4]]
    model = script.guided_model(bench, setting)
    assert same_images(more, draw(bench, setting, model, [0, 1, 2, 3, 4]))


@pytest.mark.parametrize("setting, expected", [
    (Setting(), 20),
    (Setting(2, 2.0), 40),
    # Of the levels 1000, 950, ..., 50 those from 700 down to 150, both included, are twelve.
    (Setting(2, 2.0, (150, 700)), 20 + 12),
    (Setting(2, 2.0, (151, 699)), 20 + 10),
    (Setting(restarts=RESTARTS), 20 + 6 * 10),
    (Setting(2, 1.5, None, RESTARTS), 2 * (20 + 6 * 10)),
    # Of 400, 360, ..., 40 seven are 150 or more, of 300, 270, ..., 30 six.
    (Setting(2, 1.5, (150, 700), RESTARTS), 20 + 12 + 6 * 10 + 3 * 7 + 3 * 6),
    (Setting(sampler="ddpm", steps=7), 7),
], ids=lambda value: getattr(value, "name", None))
def test_evaluations_are_counted(setting, expected, bench):
    """How often a network looks at an image, guides included; and the seconds are positive."""
    row = script.cost(bench, setting, count=2)
    assert row["evaluations"] == expected and row["seconds"] > 0


class Untouchable:
    """Stands in for the test images: that there are so many is known, nothing else."""

    def __len__(self) -> int:
        return REAL

    def __getattr__(self, name):
        raise AssertionError(f"the test images were touched: {name}")

    def __getitem__(self, index):
        raise AssertionError("the test images were touched")


def few_choices(monkeypatch) -> list[Setting]:
    """Choose from three settings only."""
    few = [Setting(2, 2.0), Setting(2, 2.0, (150, 700)), Setting(restarts=(0.3,))]
    monkeypatch.setattr(script, "CHOICES", few)
    return few


def test_choice_never_sees_the_test_images(bench, monkeypatch):
    """choose() gives the same numbers whatever the test images are, and if they cannot be touched
    at all. They are those of the yardstick, against training images. The unguided setting is among
    the rows, too."""
    few = few_choices(monkeypatch)
    results = script.choose(bench, list(range(len(few))), 8)
    assert list(results["rows"]) == [setting.name for setting in (Setting(), *few)]
    hidden = with_changes(bench, real=Untouchable(), labels=Untouchable(), reference=None)
    assert script.choose(hidden, list(range(len(few))), 8) == results

    for setting in (Setting(), *few):
        row = results["rows"][setting.name]
        images = script.samples(bench, setting, 8)
        judged = hidden.judge(images)  # which compares with the training images since
        assert row["count"] == 8 and set(row["distances"]) == {4, 8}
        assert all(row[name] == judged[name] for name in judged)
        assert row["brightness"] == pytest.approx(from_uint8(images).mean().item())
        spread = from_uint8(images).double()
        spread = (spread - spread.mean(dim=0)).square().sum(dim=0).mean().item() / 7
        assert row["spread"] == pytest.approx(spread, rel=1e-5)
        assert (row["guide"], row["weight"], row["interval"], row["restarts"]) == setting[:4]


def test_choice_compares_with_training_images_that_chose_nothing_before(bench):
    """With as many as there are test images, each once, none of them among the last ones (the last
    ten here, the last 5,000 of MNIST), and always the same ones."""
    script.with_training_reference(bench)
    features, probabilities = bench.reference
    assert features.shape == (REAL, 64) and probabilities.shape == (REAL, 10)
    all_features, _ = look(bench.classifier, bench.known)
    nearest = torch.cdist(features, all_features).argmin(dim=1)
    assert (features - all_features[nearest]).abs().max() < 1e-3  # rounding depends on the batch
    assert len(set(nearest.tolist())) == REAL and nearest.max() < KNOWN - 10

    known = bench.known.clone()
    known[KNOWN - 10:] = 0
    other = with_changes(bench, known=known)
    script.with_training_reference(other)
    assert torch.equal(other.reference[0], features)


def test_a_part_of_the_rows_is_drawn_and_not_measured(bench, monkeypatch):
    """So that two processes can share the drawing: nothing but the samples of these rows is left,
    and no results."""
    few = few_choices(monkeypatch)
    assert script.choose(bench, [2, 0], 3) == {}
    assert script.report(bench, [1], 3) == {}
    names = {setting.name.replace(",", "") for setting in (few[2], few[0], list(REPORTED)[1])}
    assert {path.stem for path in bench.scratch.iterdir()} == names


def test_report_is_against_the_test_images(bench, monkeypatch):
    """report() has a row for each setting with its numbers and its cost, the first images of each,
    real digits, and one seed per column for growing w. It compares with the test images.
    """
    reported = {Setting(): 8, Setting(2, 2.0, (150, 700)): 6}
    monkeypatch.setattr(script, "REPORTED", reported)
    results = script.report(bench, [0, 1], 2000)
    assert list(results["rows"]) == [setting.name for setting in reported]
    for setting, count in reported.items():
        row = results["rows"][setting.name]
        images = script.samples(bench, setting, count)
        assert row["count"] == count
        assert row["evaluations"] == (20 if setting.guide is None else 32)
        judged = bench.judge(images)
        assert all(row[name] == judged[name] for name in judged)
        assert torch.equal(results["images"][setting.name], images[:32])
    assert results["real"]["count"] == REAL

    ladder = results["ladder"]
    assert list(ladder) == [0.0, 1.0, 1.5, 2.0, 3.0, 5.0]
    assert all(images.shape == (8, 1, 28, 28) for images in ladder.values())
    assert same_images(ladder[1.0], script.samples(bench, Setting(), 8))
    worse = with_changes(bench, model=load_checkpoint(bench.path.with_name("epoch-2.pt")).model,
                         scratch=bench.scratch.parent)
    assert same_images(ladder[0.0], script.samples(worse, Setting(), 8))

    other = with_changes(bench, reference=look(bench.classifier, bench.known))
    again = script.report(other, [0, 1], 2000)
    for name, row in again["rows"].items():
        assert row["distances"] != results["rows"][name]["distances"]


def test_table_has_a_row_for_each_setting():
    """Shares, distances of 500 and 2,000 if they were measured, and what it costs; real digits
    below, if they are there."""
    row = {"count": 2000, "confident": 0.9123, "distances": {200: 9.0, 500: 4.6, 2000: 2.684},
           "chi2": 15.2, "nearest": 0.3131, "brightness": -0.7284, "spread": 0.2761}
    cost = {"evaluations": 32.0, "seconds": 3.14}
    short = row | {"count": 500, "distances": {200: 9.0, 500: 5.561}}
    lines = script.table({"rows": {"a": row | cost, "b": short}, "real": short}).splitlines()
    assert len({line.count("|") for line in lines}) == 1
    assert lines[2:] == [
        "| a | 2,000 | 91.2 % | 4.60 | 2.68 | 15 | 0.313 | -0.728 | 0.276 | 32 | 3.1 s |",
        "| b | 500 | 91.2 % | 5.56 |  | 15 | 0.313 | -0.728 | 0.276 |  |  |",
        "| real digits | 500 | 91.2 % | 5.56 |  | 15 | 0.313 | -0.728 | 0.276 |  |  |"]
    assert len(script.table({"rows": {"a": row}}).splitlines()) == 3


def test_command_keeps_what_others_have_measured(bench, mnist, model_file, tmp_path, monkeypatch,
                                                 capsys):
    """A part is added to the file, and names the model. With --rows nothing is measured. A file
    with results of another model is left as it is; so is one if a part is unknown or the model has
    learned other images than MNIST. --table prints what there is."""
    few_choices(monkeypatch)
    out = tmp_path / "claims.pt"
    mark = bench.scratch.name
    train.save(out, {"noise": {"model": mark}})
    common = ["--data", str(mnist), "--device", "cpu", "--out", str(out), "--scratch",
              str(tmp_path / "samples"), "--checkpoint", str(model_file), "--count", "4"]
    script.main(["choose", *common, "--rows", "0"])
    assert set(read_results(out)) == {"noise"}
    monkeypatch.setitem(script.PARTS, "choose", (script.choose, "guidance_choice", 3))
    script.main(["choose", *common])
    results = torch.load(out, weights_only=True)
    assert set(results) == {"noise", "guidance_choice"}
    assert results["guidance_choice"]["model"] == mark
    assert len(results["guidance_choice"]["rows"]) == 4

    train.save(out, {"guidance": results["guidance_choice"]} | results)
    capsys.readouterr()
    script.main(["--table", "--out", str(out)])
    assert script.table(results["guidance_choice"]) in capsys.readouterr().out

    train.save(out, {"noise": {"model": "another"}})
    with pytest.raises(SystemExit):
        script.main(["choose", *common])
    assert "is of another model" in capsys.readouterr().err
    with pytest.raises(SystemExit):
        script.main(["everything", *common])
    assert "known are choose, report" in capsys.readouterr().err
    state = torch.load(model_file, weights_only=True)
    state["config"]["dataset"] = "builtin"
    torch.save(state, tmp_path / "builtin.pt")
    with pytest.raises(SystemExit):
        script.main(["choose", *common, "--checkpoint", str(tmp_path / "builtin.pt")])
    assert read_results(out) == {"noise": {"model": "another"}}


@pytest.mark.parametrize("part, key, settings", [
    ("choose", "guidance_choice", [Setting(), *CHOICES]), ("report", "guidance", list(REPORTED))])
def test_committed_table_is_that_of_what_was_measured(part, key, settings):
    """README.md has the table of pretrained/claims.pt, with a row for each setting."""
    results = read_results(SHIPPED.with_name("claims.pt")).get(key)
    if results is None:
        pytest.skip(f"{part} has not been measured")
    assert list(results["rows"]) == [setting.name for setting in settings]
    readme = Path(__file__).with_name("README.md").read_text(encoding="utf-8")
    assert script.table(results) in readme
