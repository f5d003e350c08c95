"""The measurements of digits to order: they ask for what they say, and know a perfect answer."""

import functools
from pathlib import Path

import pytest
import torch

import train
from sample import SHIPPED_LABELS, Guided, Labelled, sample, to_uint8
from tests.experiments import labels as script
from tests.experiments.labels import CHOICES, EARLY, EARLY_TOLD, INTERVAL, REPORTED, Setting
from tests.experiments.measure import Bench, read_results
from tests.experiments.test_guidance import Untouchable
from tests.experiments.yardstick import frechet_distance, look, loss_by_t
from tests.strategies import normal, same_images, with_changes, write_mnist
from train import from_uint8, load_checkpoint
from unet import UNet

pytestmark = pytest.mark.slow

KNOWN = 120  # digits to train on, of which the last twenty may not be used to choose by
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
    """A small network after three epochs of ten steps with labels, and early.pt beside it."""
    folder = tmp_path_factory.mktemp("run")
    digits = train.builtin_digits(80, seed=0)
    config = train.Config(epochs=3, batch_size=8, lr=0.01, labels=True, out=str(folder),
                          device="cpu")
    train.train(config, images=(digits, digits),
                network=functools.partial(UNet, channels=(8, 8, 8), blocks=(1, 1, 1)))
    return folder / "model.pt"


@pytest.fixture
def bench(mnist, model_file, tmp_path, monkeypatch) -> Bench:
    """A bench of its own for each test, since choosing changes what it compares with."""
    monkeypatch.setattr(script, "CHOSEN_FROM", KNOWN - 20)
    monkeypatch.setattr("tests.experiments.guidance.CHOSEN_FROM", KNOWN - 20)
    monkeypatch.setattr(script, "SIZES", (4, 20))
    return Bench(load_checkpoint(model_file), model_file, str(mnist), (0, 0, 0), "cpu",
                 tmp_path / "claims.pt", tmp_path / "samples", sizes=(4, 8))


def test_settings_have_names_of_their_own():
    """No two settings share a name, which is that of a file and of a row. What is reported was
    among those chosen from, but for w = 0; classifiers are trained on what is reported."""
    everything = {*CHOICES, *REPORTED}
    assert len({setting.name for setting in everything}) == len(everything)
    assert len(CHOICES) == len(set(CHOICES)) and len(REPORTED) == len(set(REPORTED))
    assert {*REPORTED} - {*CHOICES} == {Setting(0.0)}
    assert {*script.SCORED} <= {*REPORTED} and script.CHOSEN in script.SCORED
    assert {s.weight for s in REPORTED if s.interval is None} >= {0, 1, 1.5, 2, 3, 5}
    assert {s.weight for s in REPORTED if s.interval == INTERVAL} >= {1.5, 2, 3, 5}
    assert Setting(2.0, INTERVAL, EARLY).name == "w = 2, guide early.pt, not told, t of 150 to 700"
    assert Setting().name == "w = 1"


# ------------------------------------------------------------------------------ drawing to order

@pytest.mark.parametrize("setting", [
    Setting(), Setting(0.0), Setting(3.0), Setting(3.0, INTERVAL), Setting(3.0, None, EARLY),
    Setting(3.0, INTERVAL, EARLY_TOLD)], ids=lambda setting: setting.name)
def test_images_are_those_of_the_setting(setting, bench):
    """Image k has the seed k and is asked to be k mod 10. The guide is the network itself without
    the label, or early.pt without it, or early.pt with it; w = 1 has none, w = 0 is not told."""
    model = bench.model
    early = load_checkpoint(bench.path.with_name("early.pt")).model
    asked = torch.tensor([0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 0, 1])
    told = Labelled(model, asked)
    worse = {script.ITSELF: model, EARLY: early, EARLY_TOLD: Labelled(early, asked)}[setting.guide]
    network = told if setting.weight == 1 else Guided(told, worse, setting.weight, setting.interval)
    if setting.weight == 0:
        network = model
    *_, (_, x, _) = sample(network, bench.checkpoint.schedule, list(range(12)), "sde-dpm++",
                           steps=20)
    assert same_images(script.samples(bench, setting, 12), to_uint8(x))


def test_settings_differ_in_what_they_draw(bench):
    """w, interval and guide all matter, if only w is large enough for this network."""
    settings = [Setting(0.0), Setting(), Setting(50.0), Setting(25.0), Setting(50.0, INTERVAL),
                Setting(50.0, None, EARLY), Setting(50.0, None, EARLY_TOLD)]
    drawn = [script.samples(bench, setting, 4) for setting in settings]
    for i, one in enumerate(drawn):
        assert not any(same_images(one, other) for other in drawn[:i]), settings[i].name


def test_samples_are_kept_and_more_are_added(bench, monkeypatch):
    """What was drawn is read again; what is missing is drawn with the seeds that follow, and with
    their labels. Drawn in two goes, the images are those of one go."""
    setting = Setting(20.0)
    asked = []
    draw = script.draw

    def noted(bench, setting, seeds):
        asked.append(list(seeds))
        return draw(bench, setting, seeds)

    monkeypatch.setattr(script, "draw", noted)
    first = script.samples(bench, setting, 3)
    more = script.samples(bench, setting, 13)
    assert torch.equal(more[:3], first)
    assert torch.equal(script.samples(bench, setting, 4), more[:4])
    assert asked == [[0, 1, 2], list(range(3, 13))]
    assert same_images(more, draw(bench, setting, range(13)))


@pytest.mark.parametrize("setting, expected", [
    (Setting(0.0), 20), (Setting(), 20), (Setting(2.0), 40),
    # Of the levels 1000, 950, ..., 50 those from 700 down to 150, both included, are twelve.
    (Setting(2.0, (150, 700)), 20 + 12), (Setting(2.0, None, EARLY), 40),
    (Setting(2.0, (150, 700), EARLY_TOLD), 20 + 12),
], ids=lambda value: getattr(value, "name", None))
def test_evaluations_are_counted(setting, expected, bench):
    """How often a network looks at an image, with and without its label."""
    assert script.evaluations(bench, setting) == expected


def test_classes_are_as_frequent_as_among_the_training_images():
    """Shares of 40 %, 35 % and 25 % of ten images are 4, 3.5 and 2.5: of the two that are rounded,
    one goes up. Any number adds up, and none is off by one or more."""
    labels = torch.tensor([0] * 8 + [1] * 7 + [2] * 5)
    assert script.class_counts(10, labels).tolist() == [4, 4, 2, 0, 0, 0, 0, 0, 0, 0]
    assert script.class_counts(20, labels).tolist()[:3] == [8, 7, 5]
    labels = torch.randint(10, (997,), generator=torch.Generator().manual_seed(0))
    for count in (1, 7, 500, 2000):
        counts = script.class_counts(count, labels)
        exact = labels.bincount(minlength=10).double() * count / len(labels)
        assert counts.sum() == count and (counts - exact).abs().max() < 1


def test_set_as_frequent_as_mnist_takes_the_first_of_each_class():
    """With shares of 40 %, 35 % and 25 % a set of ten has the first four images that are asked to
    be a 0, the first four 1s and the first two 2s; as many are drawn as this needs."""
    labels = torch.tensor([0] * 8 + [1] * 7 + [2] * 5)
    assert script.number_to_draw(10, labels) == 40
    k = torch.arange(40)
    assert script.as_frequent(k, 10, labels).tolist() == [0, 1, 2, 10, 11, 12, 20, 21, 30, 31]
    assert script.number_to_draw(100, torch.arange(10)) == 100


# ----------------------------------------------------------------------------------------- judging

def test_names_are_counted():
    """Four images that are asked to be 0, 0, 1 and 1: a certain 0, an uncertain 0, a 1 taken for a
    certain 2, and an uncertain 1."""
    probabilities = torch.zeros(4, 10, dtype=torch.float64)
    probabilities[0, 0] = 0.95
    probabilities[1, 0], probabilities[1, 3] = 0.6, 0.4
    probabilities[2, 2] = 0.99
    probabilities[3, 1], probabilities[3, 9] = 0.55, 0.45
    row = script.names(probabilities, torch.tensor([0, 0, 1, 1]))
    assert row["named"] == 0.75 and row["certain"] == 0.25
    assert row["confusion"][0][0] == 2 and row["confusion"][1][1:3] == [1, 1]
    assert sum(map(sum, row["confusion"])) == 4


def test_spread_is_the_variance_within_each_class():
    """Images scaled by a have a² times the spread. How far the means of the classes are apart does
    not matter, nor do classes with less than two images."""
    classes = torch.arange(60) % 3
    values = normal(0, 60, 5)
    scaled = values * torch.tensor([1.0, 2.0, 0.5])[classes, None] + 100 * classes[:, None]
    share = script.share_of_spread(scaled, classes, values, classes)
    assert share["classes"][:3] == pytest.approx([1, 4, 0.25])
    assert share["mean"] == pytest.approx(5.25 / 3) and share["least"] == pytest.approx(0.25)
    assert torch.tensor(share["classes"][3:]).isnan().all()
    by_hand = torch.stack([values[classes == 0][:, d].var() for d in range(5)]).mean()
    assert script.spread_within(values, classes)[0].item() == pytest.approx(by_hand.item())
    alone = script.share_of_spread(values[:1], classes[:1], values, classes)
    assert torch.tensor(alone["mean"]).isnan()


def test_digits_are_judged_evenly_and_compared_as_frequent_as_in_mnist(bench):
    """All numbers but the distance are those of the first `count` images; the distances are of
    sets in which digits are as frequent as among the training images. Real digits in the place of
    samples are named right as often as their labels say."""
    number = script.number_to_draw(20, bench.known_labels)
    assert number > 20  # else this test would show nothing
    images, labels = train.builtin_digits(400, seed=5)
    order = torch.cat([(labels == c).nonzero()[:number // 10, 0] for c in range(10)])
    order = order.view(10, -1).T.flatten()  # 0, 1, ..., 9, 0, 1, ...
    images = images[order]
    row = script.judge(bench, images, 20)

    _, probabilities = look(bench.classifier, images[:20])
    right = probabilities.argmax(dim=1) == torch.arange(20) % 10
    assert row["named"] == right.double().mean().item() > 0.2
    assert row["count"] == 20 and sum(row["classes"]) == 20
    assert row["confident"] == (probabilities.amax(dim=1) > 0.9).double().mean().item()

    # The sets that are compared, by a plain loop.
    for size in (4, 20):
        left = script.class_counts(size, bench.known_labels).tolist()
        chosen = []
        for k in range(number):
            if left[k % 10] > 0:
                left[k % 10] -= 1
                chosen.append(k)
        assert len(chosen) == size
        features, _ = look(bench.classifier, images[chosen])
        expected = frechet_distance(features, bench.reference[0])
        assert row["distances"][size] == pytest.approx(expected)
    assert "distance" not in row


def test_real_digits_have_the_spread_of_real_digits(bench):
    """Judged against themselves, the test digits have a share of 1, in features and in pixels."""
    row = script.real_row(bench, bench.real, bench.labels, bench.known)
    for spread in (row["spread"], script.spread_in_pixels(bench, bench.real)):
        assert spread["mean"] == pytest.approx(1) and spread["least"] == pytest.approx(1)
    _, probabilities = look(bench.classifier, bench.real)
    assert row["named"] == (probabilities.argmax(1) == bench.labels).double().mean().item()


def test_classifiers_learn_from_drawn_and_from_real_digits(bench, monkeypatch):
    """Each gets as many images, evenly divided, with the labels that were asked for, or with the
    real ones; and each is tested on the real test digits."""
    monkeypatch.setattr(script, "SCORED", [Setting(), Setting(2.0)])
    learned = []

    def fake(images, labels, epochs):
        learned.append((images, labels))
        return bench.classifier

    monkeypatch.setattr(script, "train_classifier", fake)
    results = script.scores(bench, 20)
    assert list(results) == ["w = 1", "w = 2", "real digits"]
    _, probabilities = look(bench.classifier, bench.real)
    right = (probabilities.argmax(dim=1) == bench.labels).double().mean().item()
    assert set(results.values()) == {right}
    for (images, labels), setting in zip(learned, script.SCORED):
        assert torch.equal(images, script.samples(bench, setting, 20))
        assert labels.tolist() == [k % 10 for k in range(20)]
    images, labels = learned[2]
    assert labels.bincount().tolist() == [2] * 10
    for image, label in zip(images, labels):
        found = (bench.known == image).flatten(1).all(dim=1).nonzero()[0, 0]
        assert bench.known_labels[found] == label


# ------------------------------------------------------------------------ two laws of the answers

class Patterns(torch.nn.Module):
    """A perfect network for data in which class c has one image only, a faint pattern.

    The noise in x_t is known if the class is; and without a label, the answer is the mean over the
    classes, each with the probability that Bayes' rule gives it.
    """

    def __init__(self, schedule, patterns: torch.Tensor):
        super().__init__()
        self.schedule = schedule
        self.register_buffer("patterns", patterns)  # (10, 1, 28, 28)
        self.weight = torch.nn.Parameter(torch.zeros(()))  # tells the device

    def forward(self, xt, t, label=None):
        alpha_bar = self.schedule.alpha_bar[t].view(-1, 1, 1, 1, 1)
        answers = (xt[:, None] - alpha_bar.sqrt() * self.patterns) / (1 - alpha_bar).sqrt()
        posterior = (-answers.square().sum((2, 3, 4)) / 2).softmax(dim=1)
        untold = (posterior[:, :, None, None, None] * answers).sum(dim=1).float()
        if label is None:
            return untold
        told = answers[torch.arange(len(t)), label.clamp(min=0)].float()
        return torch.where((label < 0).view(-1, 1, 1, 1), untold, told)


def with_patterns(bench: Bench, count: int) -> Bench:
    """A bench whose test images are faint patterns, and whose network is perfect for them."""
    generator = torch.Generator().manual_seed(3)
    patterns = (127 + 6 * torch.randn(10, 1, 28, 28, generator=generator)).to(torch.uint8)
    labels = torch.arange(count) % 10
    model = Patterns(bench.checkpoint.schedule, from_uint8(patterns)).eval()
    return with_changes(bench, model=model, real=patterns[labels], labels=labels)


def test_losses_are_those_of_evaluation(bench):
    """Without labels those of yardstick.loss_by_t; with them, a plain loop, one image at a time."""
    losses = script.pythagoras(bench)
    expected = loss_by_t(bench.model, bench.checkpoint.schedule, bench.real)
    assert torch.allclose(losses["untold"], expected, rtol=1e-5)
    noise = torch.randn(bench.real.shape, generator=torch.Generator().manual_seed(0))
    for k in range(0, REAL, 7):
        t = torch.tensor([k + 1])  # fewer images than levels: each has a level of its own
        xt = bench.checkpoint.schedule.q_sample(from_uint8(bench.real[k:k + 1]), t, noise[k:k + 1])
        with torch.no_grad():
            told = bench.model(xt, t, bench.labels[k:k + 1])
            untold = bench.model(xt, t)
        error = (told - noise[k:k + 1]).double().square().mean()
        assert losses["told"][k + 1].item() == pytest.approx(error.item(), rel=1e-5)
        difference = (told - untold).double().square().mean()
        assert losses["difference"][k + 1].item() == pytest.approx(difference.item(), rel=1e-4)


def test_perfect_answers_obey_pythagoras(bench):
    """One image for each class: who is told the class knows the noise, and who is not is wrong by
    the difference of the two answers."""
    losses = script.pythagoras(with_patterns(bench, 2000))
    assert losses["told"].max() < 1e-8
    assert losses["untold"].max() > 1e-5  # at large t the class cannot be told from x_t
    assert torch.allclose(losses["untold"], losses["told"] + losses["difference"], atol=1e-7)


def test_best_mixture_is_the_closest_one():
    """A target that is a mixture is found with its weights. For any other, no small exchange
    between two weights brings the mixture closer; and all weights are shares."""
    answers = normal(1, 30, 10, 40)
    shares = normal(2, 30, 10).exp()
    shares = shares / shares.sum(dim=1, keepdim=True)
    target = (shares[:, :, None] * answers).sum(dim=1)
    assert torch.allclose(script.best_mixture(answers, target), shares, atol=1e-6)

    other = normal(3, 30, 40)
    p = script.best_mixture(answers, other)
    assert p.min() >= 0 and torch.allclose(p.sum(dim=1), torch.ones(30, dtype=p.dtype))

    def distance(p):
        return ((p[:, :, None] * answers).sum(dim=1) - other).square().sum(dim=1)

    for i in range(10):
        for j in range(10):
            moved = p.clone()
            step = p[:, j].clamp(max=1e-3)
            moved[:, i] += step
            moved[:, j] -= step
            assert (distance(moved) >= distance(p) - 1e-9).all()
    vertex = answers[:, 4] + 5 * (answers[:, 4] - answers.mean(dim=1))
    assert script.best_mixture(answers, vertex)[:, 4].mean() > 0.9


def perfect_classifier(patterns: Bench, t: int):
    """The scores of Bayes' rule for noisy patterns of level t."""
    def scores(xt: torch.Tensor) -> torch.Tensor:
        alpha_bar = patterns.checkpoint.schedule.alpha_bar[t]
        apart = xt[:, None].double() - alpha_bar.sqrt() * patterns.model.patterns
        return -apart.square().sum((2, 3, 4)) / (2 * (1 - alpha_bar))
    return scores


def test_perfect_answers_are_a_mixture(bench, monkeypatch):
    """The answer without a label is the mixture of those with one by the probabilities of Bayes'
    rule, and so in their hull. With another answer without a label, both show that the law is
    broken; with wrong probabilities, only the mixture by these does."""
    patterns = with_patterns(bench, 500)
    for t, low, high in ((200, 0.4, 0.7), (600, 0.1, 0.15)):
        monkeypatch.setattr(script, "LEVELS", (t,))
        classifier = perfect_classifier(patterns, t)
        row = script.mixture(patterns, classifier)[t]
        assert row["classifier"] < 1e-6 * row["range"] and row["best"] < 1e-6 * row["range"]
        assert low < row["p of own class"] < high
        assert row["own"] > 0.1 * row["range"]

    # Equal probabilities are wrong, and give the plain mean.
    monkeypatch.setattr(script, "LEVELS", (200,))
    row = script.mixture(patterns, lambda xt: torch.zeros(len(xt), 10))[200]
    assert row["classifier"] == pytest.approx(row["equal"]) and row["equal"] > 0.1 * row["range"]
    assert row["best"] < 1e-6 * row["range"] and row["p of own class"] == pytest.approx(0.1)

    class Biased(Patterns):
        def forward(self, xt, t, label=None):
            bias = 0.1 * (label < 0).view(-1, 1, 1, 1)
            return super().forward(xt, t, label) + bias

    biased = Biased(bench.checkpoint.schedule, patterns.model.patterns).eval()
    row = script.mixture(with_changes(patterns, model=biased), perfect_classifier(patterns, 200),
                         count=200)[200]
    for name in ("best", "classifier"):
        assert row[name] == pytest.approx(0.1**2, rel=0.05)


def test_classifier_of_noisy_images_learns_what_can_be_seen(bench):
    """Of black and white squares it is certain at small t. At t = T, where nothing can be seen, it
    knows how frequent they are: three in four are white."""
    labels = (torch.arange(1024) % 4 > 0).long()
    known = torch.zeros(1024, 1, 28, 28, dtype=torch.uint8)
    known[labels == 1] = 255
    classifier = script.train_on_noisy(with_changes(bench, known=known, known_labels=labels),
                                       epochs=6)
    x0 = from_uint8(known[:64])
    for t, error in ((100, 0.1), (1000, None)):
        eps = normal(t, 64, 1, 28, 28, dtype=torch.float32)
        with torch.no_grad():
            p = classifier(bench.checkpoint.schedule.q_sample(x0, t, eps)).softmax(dim=1)
        if error is not None:
            assert p[torch.arange(64), labels[:64]].min() > 1 - error
        else:
            assert p[:, 1].mean().item() == pytest.approx(0.75, abs=0.15)


# ------------------------------------------------------------------------------------ the two parts

def few_settings(monkeypatch) -> None:
    """Choose from two settings, and report three."""
    monkeypatch.setattr(script, "CHOICES", [Setting(), Setting(2.0, INTERVAL)])
    monkeypatch.setattr(script, "REPORTED", [Setting(0.0), Setting(), Setting(2.0, INTERVAL)])
    monkeypatch.setattr(script, "SCORED", [Setting(), Setting(2.0, INTERVAL)])
    monkeypatch.setattr(script, "CHOSEN", Setting(2.0, INTERVAL))
    monkeypatch.setattr(script, "LEVELS", (500,))


def test_choice_never_sees_the_test_images(bench, monkeypatch):
    """choose() gives the same numbers whatever the test images are, and if they cannot be touched
    at all. Of real digits it judges those that are not compared with."""
    few_settings(monkeypatch)
    results = script.choose(bench, [0, 1], 4)
    hidden = with_changes(bench, real=Untouchable(), labels=Untouchable(), reference=None)
    again = script.choose(hidden, [0, 1], 4)
    assert list(again["rows"]) == ["w = 1", "w = 2, t of 150 to 700"]
    for name, row in results["rows"].items():
        assert again["rows"][name]["distances"] == row["distances"]
        assert again["rows"][name]["named"] == row["named"]
        expected = script.judge(hidden, script.samples(bench, Setting(*map(row.get, (
            "weight", "interval", "guide"))), 20), 4)
        assert row["distances"] == expected["distances"]
    assert results["real"]["count"] == 20 and again["real"]["named"] == results["real"]["named"]


def test_finalists_are_judged_by_four_times_as_many_digits(bench, monkeypatch):
    """Of the others there are as many as asked for. All of the finalists are settings to choose
    from, and the one that was chosen is a finalist that was reported.
    """
    assert {*script.FINALISTS} <= {*script.CHOICES}
    assert script.CHOSEN in script.FINALISTS and script.CHOSEN in script.REPORTED
    few_settings(monkeypatch)
    monkeypatch.setattr(script, "FINALISTS", [Setting(2.0, INTERVAL)])
    rows = script.choose(bench, [0, 1], 4)["rows"]
    assert [row["count"] for row in rows.values()] == [4, 16]


def test_a_part_of_the_rows_is_drawn_and_not_measured(bench, monkeypatch):
    """So that two processes can share the drawing. Of settings that classifiers are trained on
    there are more images."""
    few_settings(monkeypatch)
    monkeypatch.setattr(script, "TRAIN_ON", 50)
    assert script.choose(bench, [1], 4) == {}
    file = bench.scratch / "labels w = 2 t of 150 to 700.pt"
    assert [path.name for path in bench.scratch.iterdir()] == [file.name]
    drawn = len(torch.load(file, weights_only=True)["images"])
    assert drawn == script.number_to_draw(4, bench.known_labels)
    assert script.report(bench, [0, 2], 10) == {}
    assert len(torch.load(file, weights_only=True)["images"]) == 50
    number = script.number_to_draw(10, bench.known_labels)
    other = torch.load(bench.scratch / "labels w = 0.pt", weights_only=True)
    assert len(other["images"]) == number


def test_command_measures_both_parts(bench, mnist, model_file, tmp_path, monkeypatch, capsys):
    """Each part is added to the file and names the model; --table prints the tables. A model
    without labels is refused, and what was measured is kept."""
    few_settings(monkeypatch)
    monkeypatch.setattr(script, "train_classifier", lambda images, labels, epochs: bench.classifier)
    monkeypatch.setattr(script, "train_on_noisy", lambda bench: bench.classifier)
    out = tmp_path / "claims.pt"
    common = ["--data", str(mnist), "--device", "cpu", "--out", str(out), "--scratch",
              str(tmp_path / "samples"), "--count", "4"]
    script.main([*common, "--checkpoint", str(model_file)])
    results = read_results(out)
    assert set(results) == {"labels_choice", "labels"}
    assert {part["model"] for part in results.values()} == {bench.scratch.name}
    report = results["labels"]
    assert list(report["rows"]) == ["w = 0", "w = 1", "w = 2, t of 150 to 700"]
    assert report["chosen"] == "w = 2, t of 150 to 700"
    assert [row["evaluations"] for row in report["rows"].values()] == [20, 20, 32]
    assert all("pixels" in row for row in report["rows"].values())
    assert report["real"]["count"] == REAL
    assert set(report["scores"]) == {"w = 1", "w = 2, t of 150 to 700", "real digits"}
    assert list(report["mixture"]) == [500] and len(report["losses"]["told"]) == 1001

    capsys.readouterr()
    script.main(["--table", "--out", str(out)])
    shown = capsys.readouterr().out
    for key, tables in script.TABLES.items():
        assert all(part(results[key]) in shown for part in tables)

    plain = tmp_path / "plain"
    digits = train.builtin_digits(8, seed=0)[0]
    train.train(train.Config(epochs=1, batch_size=8, out=str(plain), device="cpu"),
                images=(digits, digits))
    for argv, says in ((["choose", "--checkpoint", str(plain / "model.pt"), *common, "--out",
                         str(tmp_path / "other.pt")], "was not trained with the labels"),
                       (["everything", *common, "--checkpoint", str(model_file)], "unknown part"),
                       (["--rows", "0", *common], "--rows is for one part")):
        with pytest.raises(SystemExit):
            script.main(argv)
        assert says in capsys.readouterr().err
    assert read_results(out).keys() == results.keys()


# --------------------------------------------------------------------------------------- the tables

def test_tables_show_what_was_measured():
    """A row for each setting, for each digit, for each classifier, for each band of t."""
    confusion = torch.eye(10, dtype=torch.int64) * 8
    confusion[4, 9] = 2
    row = {"count": 2000, "named": 0.9512, "certain": 0.8, "confident": 0.85,
           "distances": {500: 4.25, 2000: 2.5}, "nearest": 0.3123, "confusion": confusion.tolist(),
           "spread": {"classes": [0.9] * 10, "mean": 0.9, "least": 0.75}}
    more = {"pixels": {"mean": 1.1, "least": 0.8}, "evaluations": 32.0}
    real = row | {"confusion": (torch.eye(10, dtype=torch.int64) * 5).tolist()}
    results = {"rows": {"w = 1": row, "best": row | more}, "real": real, "chosen": "best",
               "scores": {"w = 1": 0.9812, "real digits": 0.9925},
               "losses": {"untold": torch.full((1001,), 0.03), "told": torch.full((1001,), 0.02),
                          "difference": torch.full((1001,), 0.009)},
               "mixture": {50: {"range": 0.5, "equal": 0.25, "own": 0.125, "classifier": 0.01,
                                "best": 0.001, "p of own class": 0.75}}}
    assert script.table(results).splitlines()[2:4] == [
        "| w = 1 | 2,000 | 95.1 % | 80.0 % | 85.0 % | 4.25 | 2.50 | 0.312 | 0.90 (0.75) |  |  |",
        "| best | 2,000 | 95.1 % | 80.0 % | 85.0 % | 4.25 | 2.50 | 0.312 | 0.90 (0.75) "
        "| 1.10 (0.80) | 32 |"]
    assert script.table_of_classes(results).splitlines()[6] == (
        "| 4 | 80.0 % | 9 (2 of 10) | 80.0 % | 9 (2 of 10) | 0.90 | 100.0 % |")
    assert script.table_of_classes(results).splitlines()[2] == (
        "| 0 | 100.0 % | none | 100.0 % | none | 0.90 | 100.0 % |")
    assert script.table_of_scores(results).splitlines()[2:] == [
        "| w = 1 | 98.12 % |", "| real digits | 99.25 % |"]
    lines = script.table_of_losses(results).splitlines()
    assert lines[2] == "| 1 to 50 | 0.03000 | 0.02000 | 0.01000 | 0.00900 |"
    assert lines[-1].startswith("| 1 to 1000 |") and len(lines) == 2 + 11
    assert script.table_of_mixtures(results).splitlines()[2] == (
        "| 50 | 0.75 | 5.0e-01 | 2.5e-01 | 1.2e-01 | 1.0e-02 | 1.0e-03 |")
    for part in script.TABLES["labels"]:
        assert len({line.count("|") for line in part(results).splitlines()}) == 1


@pytest.mark.parametrize("key, settings", [("labels_choice", CHOICES), ("labels", REPORTED)])
def test_committed_tables_are_those_of_what_was_measured(key, settings):
    """README.md has the tables of pretrained/labels/claims.pt, with a row for each setting."""
    results = read_results(SHIPPED_LABELS.with_name("claims.pt")).get(key)
    if results is None:
        pytest.skip(f"{key} has not been measured")
    assert list(results["rows"]) == [setting.name for setting in settings]
    readme = Path(__file__).with_name("README.md").read_text(encoding="utf-8")
    for part in script.TABLES[key]:
        assert part(results) in readme
