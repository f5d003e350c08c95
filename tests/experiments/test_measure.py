"""The measurements of the claims: each number against a case in which it is known."""

import functools
import hashlib
import json
import math
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

import plots
import train
from sample import sample, to_uint8
from schedule import NoiseSchedule
from tests.experiments import ablations
from tests.experiments import measure as script
from tests.experiments.measure import Bench, low_frequencies, share_present
from tests.experiments.yardstick import loss_by_t
from tests.strategies import FEW, SEED, normal, same_images, with_changes, write_mnist
from unet import UNet

pytestmark = pytest.mark.slow


class Sure(torch.nn.Module):
    """A predictor that is sure of an image for each row of the batch, (B, 1, H, W): its noise is
    what makes the difference to it. It keeps what it was asked, as pairs (xt, t).
    """

    def __init__(self, schedule: NoiseSchedule, images: torch.Tensor):
        super().__init__()
        self.unused = torch.nn.Parameter(torch.zeros(1))  # tells others the device
        self.schedule = schedule
        self.images = images
        self.asked = []

    def forward(self, xt, t):
        self.asked.append((xt, t))
        return self.schedule.predict_eps(xt, t, self.images.expand_as(xt).to(xt.dtype))


@pytest.fixture(scope="module")
def mnist(tmp_path_factory) -> Path:
    """A folder with few built-in digits, in the place and format of MNIST: 120 and 60 of them."""
    data = tmp_path_factory.mktemp("mnist")
    write_mnist(data, *train.builtin_digits(120, seed=0), splits=("train",))
    write_mnist(data, *train.builtin_digits(60, seed=1), splits=("t10k",))
    return data


@pytest.fixture(scope="module")
def bench(mnist, tmp_path_factory) -> Bench:
    """A bench on few built-in digits and a small network, trained for two steps with T = 20."""
    folder = tmp_path_factory.mktemp("bench")
    training, _ = train.builtin_digits(16, seed=0)
    held_out, _ = train.builtin_digits(8, seed=1)
    config = train.Config(epochs=1, batch_size=8, T=20, schedule="cosine", out=str(folder),
                          device="cpu")
    train.train(config, images=(training, held_out),
                network=functools.partial(UNet, channels=(8, 8, 8), blocks=(1, 1, 1)))
    path = folder / "model.pt"
    return Bench(train.load_checkpoint(path), path, str(mnist), (8, 8, 8), "cpu",
                 folder / "claims.pt", folder / "samples", blog_model=folder / "none.pt",
                 sizes=(4, 8), timed=2)


@FEW
@given(SEED, st.integers(4, 12))
def test_low_and_high_frequencies_share_the_image(seed, size):
    """The low and the high part add up to the image and are orthogonal. A wave of k periods across
    belongs to the low part for k <= 3, to the high part for k >= 4; a constant is low.
    """
    image = normal(seed, 2, 1, 2 * size, 2 * size)
    low = low_frequencies(image)
    high = image - low
    assert abs((low * high).sum().item()) < 1e-9 * image.square().sum().item()
    assert torch.allclose(low_frequencies(low), low, atol=1e-9)
    x = torch.arange(28, dtype=torch.float64)
    for k in range(14):
        wave = torch.cos(2 * math.pi * k * x / 28).expand(28, 28)
        for turned in (wave, wave.T):
            left = low_frequencies(turned).abs().max()
            assert abs(left - (1 if k <= 3 else 0)) < 1e-9


@FEW
@given(SEED)
def test_share_present_is_1_for_the_image_and_0_for_the_mean(seed):
    """And with the low frequencies alone, it is 1 for the low ones and 0 for the high ones."""
    final = normal(seed, 5, 1, 28, 28)
    mean = final.mean(dim=0)
    assert share_present(final, final) == {"low": 1.0, "high": 1.0}
    nothing = share_present(mean.expand_as(final), final)
    assert all(abs(value) < 1e-9 for value in nothing.values())
    blurred = share_present(mean + low_frequencies(final - mean), final)
    assert abs(blurred["low"] - 1) < 1e-9 and abs(blurred["high"]) < 1e-9


@FEW
@given(SEED, st.floats(-1, 1))
def test_loss_by_t_is_that_of_evaluate(seed, c):
    """The mean over t is what train.evaluate measures, if each t is seen equally often; at each t
    it is the mean over the images that are seen at this t.
    """
    schedule = NoiseSchedule.from_betas([0.1, 0.2, 0.3, 0.4], allow_signal=True)
    generator = torch.Generator().manual_seed(seed)
    images = torch.randint(256, (12, 1, 4, 4), generator=generator, dtype=torch.uint8)
    model = Sure(schedule, torch.full((1, 1, 4, 4), c))
    by_t = loss_by_t(model, schedule, images)
    assert by_t[0] == 0 and len(by_t) == 5
    assert math.isclose(by_t[1:].mean(), train.evaluate(model, schedule, images), rel_tol=1e-6)
    for t in range(1, 5):
        x0 = train.from_uint8(images[t - 1::4])
        # The error of the noise is that of the image, x0 - c, times sqrt(alpha_bar/(1-alpha_bar)).
        factor = schedule.alpha_bar[t] / (1 - schedule.alpha_bar[t])
        expected = factor * (x0 - c).double().square().mean()
        assert math.isclose(by_t[t], expected, rel_tol=1e-4, abs_tol=1e-9)


def test_wiener_is_the_best_linear_guess():
    """Its loss is that of the guess itself on Gaussian data with MNIST's spectrum, and 0.0731 on
    average over t, computed elsewhere from the covariance of the test images: to 2.5 %.

    Any other multiple of x_t - sqrt(alpha_bar) mu is worse: the loss of a factor g is
    (1 - g sqrt(1 - alpha_bar))^2 + g^2 alpha_bar lam.
    """
    schedule = NoiseSchedule()
    losses = script.wiener(schedule)
    assert len(losses) == 1001 and losses[0] == 0
    assert abs(losses[1:].mean() / 0.0731 - 1) < 0.025
    lam = json.loads(script.SPECTRUM.read_text())["variance"]
    for t in (1, 100, 1000):
        a = schedule.alpha_bar[t].item()

        def loss(scale):
            factors = [scale * math.sqrt(1 - a) / (a * v + 1 - a) for v in lam]
            return sum((1 - g * math.sqrt(1 - a)) ** 2 + g * g * a * v
                       for g, v in zip(factors, lam)) / len(lam)
        assert math.isclose(losses[t], loss(1.0), rel_tol=1e-9)
        assert loss(1.0) < min(loss(0.99), loss(1.01))


def test_samples_are_those_of_their_seeds_and_are_kept(bench):
    """Drawn in two goes, they are the images of seeds 0..5; what was drawn is not drawn again."""
    first = bench.draw("ddim 5", 2)
    images = bench.draw("ddim 5", 6)
    *_, (_, x0, _) = sample(bench.model, bench.checkpoint.schedule, list(range(6)), "ddim", steps=5)
    assert same_images(images, to_uint8(x0))
    assert torch.equal(images[:2], first)
    file = bench.scratch / "ddim 5.pt"
    content = file.read_bytes()
    assert torch.equal(bench.draw("ddim 5", 3), images[:3]) and file.read_bytes() == content


def test_restart_goes_on_from_the_digit_it_is_given(bench):
    """What comes out depends on the digit and on its seed alone, and on both."""
    images = bench.draw("ddpm 1000", 8)
    whole = bench.restart(images, range(8))
    assert same_images(whole[2:4], bench.restart(images[2:4], range(2, 4)))
    for other in (bench.restart(images[2:4], range(4, 6)), bench.restart(images[4:6], range(2, 4))):
        assert (whole[2:4].int() - other.int()).abs().max() > 10


def test_restart_goes_six_times_to_the_middle_and_back_with_new_noise(bench):
    """Six times up to 0.4 T or 0.3 T, with the first noise of seeds that are k million higher, and
    back by steps of sde-dpm++ with the rest of their noise. So no noise is used twice. A network
    that is sure of one image ends at that image.
    """
    schedule = bench.checkpoint.schedule
    assert schedule.T == 20
    model = Sure(schedule, torch.full((1, 1, 28, 28), 0.3))
    images = bench.draw("ddpm 1000", 3)
    results = with_changes(bench, model=model).restart(images, range(3))
    assert (results == round(1.3 * 127.5)).all()
    asked = [(int(t[0]), xt) for xt, t in model.asked]
    levels = [8, 7, 6, 5, 4, 3, 2, 1] * 3 + [6, 5, 4, 3, 2, 1] * 3
    assert [t for t, _ in asked] == levels

    for k in range(1, 7):
        seeds = [10**6 * k + seed for seed in range(3)]
        eps = torch.stack([torch.randn(1, 28, 28, generator=torch.Generator().manual_seed(seed))
                           for seed in seeds])
        t = 8 if k <= 3 else 6
        start = (t, schedule.q_sample(train.from_uint8(images), t, eps))
        *chain, _ = sample(Sure(schedule, model.images), schedule, seeds, "sde-dpm++", steps=10,
                           start=start)
        for level, xt, _ in chain:
            asked_level, asked_xt = asked.pop(0)
            assert asked_level == level and torch.allclose(asked_xt, xt, atol=1e-6)
        images = results
    assert not asked


def test_a_certain_network_decides_at_once(bench):
    """If the prediction is always the image of this chain, every restart ends there, whatever t:
    all digits agree, all pixels do, and the prediction has all frequencies of the image.
    """
    images = train.from_uint8(bench.real[:3])
    model = Sure(bench.checkpoint.schedule, images)
    results = script.decided(with_changes(bench, model=model), seeds=3, repeats=2)
    for row in results["levels"].values():
        assert row["class"] == 1
        for share in ("pixels", "low", "high"):
            assert abs(row[share] - 1) < 1e-6
    assert len(results["levels"]) == 11


def test_an_undecided_network_agrees_by_chance_alone(bench):
    """After two steps of training nothing is decided at T: the pixels of chains that start there
    anew differ as much as those of unrelated chains, as far as 4 chains can tell.
    """
    levels = script.decided(bench, seeds=4, repeats=1)["levels"]
    assert list(levels) == [20, 18, 16, 14, 12, 10, 8, 6, 4, 2, 1]
    assert abs(levels[20]["pixels"]) < 0.3 and levels[1]["pixels"] > 0.99
    assert levels[1]["low"] > 0.99


@pytest.fixture(scope="module")
def claims(bench) -> dict:
    """What the parts found, written to a file and read again."""
    for name in ("digits", "samplers", "noise", "copies", "difficulty", "epochs"):
        train.save(bench.out, script.read_results(bench.out) | {name: script.PARTS[name](bench)})
    return torch.load(bench.out, weights_only=True)


def test_parts_are_plain_numbers_and_tensors(claims):
    """torch.load reads them without running code, and none replaces another."""
    assert set(claims) == {"digits", "samplers", "noise", "copies", "difficulty", "epochs"}


def test_digits_are_those_asked_for(bench, claims):
    """A 7, a 2, a 4 and a 9 of the test images."""
    for image, digit in zip(claims["digits"]["images"], (7, 2, 4, 9)):
        assert any(torch.equal(image, other) for other in bench.real[bench.labels == digit])


def test_samplers_are_all_judged(bench, claims):
    """All chains but those of a network that is not there, each with the distances of its first 4
    and of all 8 images, and the time that it took.
    """
    rows = claims["samplers"]["chains"]
    assert set(rows) == {name for name in script.CHAINS if script.BLOG not in name}
    for row in rows.values():
        assert set(row["distances"]) == {4, 8} and row["seconds"] > 0
        assert math.isclose(row["distances"][8], row["distance"], rel_tol=1e-9)


def test_epochs_have_their_own_networks(bench, claims):
    """The run had one epoch, and its file has the weights of the model in half precision."""
    assert list(claims["difficulty"]["epochs"]) == [1]
    images = claims["epochs"]["images"][1]
    assert (images.int() - bench.draw("ddpm 1000", 8).int()).abs().double().mean() < 1


def test_spread_is_the_variance_over_seeds(bench, claims):
    """The sum of squared differences from the mean of 8 images, divided by 7."""
    pixels = bench.draw("ddpm 1000", 8).double() / 127.5 - 1
    spread = (pixels - pixels.mean(dim=0)).square().sum(dim=0).mean() / 7
    assert math.isclose(claims["noise"]["ddpm 1000"]["spread"], spread, rel_tol=1e-5)


def test_copies_would_be_noticed(bench, claims):
    """If the samples are put among the known images, they are nearest to themselves. The distances
    of test digits are those of 8 of the 60 test images, as a plain loop finds them.
    """
    assert claims["copies"]["samples"].shape == claims["copies"]["test"].shape == (8,)
    known = torch.cat([bench.known, bench.draw("ddpm 1000", 8)])
    again = script.copies(with_changes(bench, known=known))
    assert again["samples"].max() < 1e-3 and torch.equal(again["nearest"], again["images"])
    pairs = (bench.real[:, None].double() - bench.known[None]).square().mean((2, 3, 4)) / 127.5**2
    closest = pairs.min(dim=1).values.sqrt()
    assert all((closest - d).abs().min() < 1e-3 for d in claims["copies"]["test"])


def test_samples_of_the_blogs_network_are_its_own(bench, tmp_path):
    """If it has been trained, the chain named after it is drawn from it, without clipping."""
    training, _ = train.builtin_digits(16, seed=0)
    held_out, _ = train.builtin_digits(8, seed=1)
    ablations.train_row(script.BLOG_ROW, "", 1, tmp_path, images=(training, held_out),
                        batch_size=8, device="cpu", T=20, schedule="cosine")
    path = tmp_path / "model.pt"
    checkpoint = ablations.load(script.BLOG_ROW, path)
    *_, (_, x0, _) = sample(checkpoint.model, checkpoint.schedule, [0, 1], clip=False)
    drawn = with_changes(bench, blog_model=path).draw(script.BLOG, 2)
    assert same_images(drawn, to_uint8(x0))
    assert (drawn.int() - bench.draw("ddpm 1000", 2).int()).abs().max() > 10


def test_table_of_samplers_shows_what_was_measured():
    """Shares, distances at each size that was reached, seconds; and real digits below."""
    row = {"confident": 0.825, "count": 1000, "distances": {200: 14.6}, "seconds": 61.96,
           "chi2": 20.4, "nearest": 0.3271}
    results = {"chains": {"ddpm 1000": row}, "floor": {200: (8.125, 2.774)},
               "test images": {"confident": 0.971, "count": 10_000, "chi2": 0.0, "nearest": 0.309}}
    assert script.table(results).splitlines()[2:] == [
        "| ddpm 1000 | 1,000 | 82.5 % | 20 | 0.327 | 14.60 | 62.0 s |",
        "| real digits | 10,000 | 97.1 % | 0 | 0.309 | 8.12 ± 2.77 |  |"]


def test_command_adds_to_what_was_measured_of_the_same_model(bench, mnist, tmp_path):
    """Two parts, measured one after the other, are both in the file. A file that holds results of
    another model is left as it is, and a model of other images than MNIST is refused.
    """
    out = tmp_path / "claims.pt"
    mark = bench.scratch.name
    train.save(out, {"noise": {"model": mark}})
    options = ["--data", str(mnist), "--device", "cpu", "--out", str(out), "--scratch",
               str(tmp_path)]
    for part in ("digits", "difficulty"):
        script.main([part, *options, "--checkpoint", str(bench.path)])
    results = torch.load(out, weights_only=True)
    assert set(results) == {"noise", "digits", "difficulty"}
    assert {part["model"] for part in results.values()} == {mark}

    train.save(out, {"copies": {"model": "another"}})
    with pytest.raises(SystemExit):
        script.main(["digits", *options, "--checkpoint", str(bench.path)])
    assert set(torch.load(out, weights_only=True)) == {"copies"}
    out.unlink()

    state = torch.load(bench.path, weights_only=True)
    state["config"]["dataset"] = "builtin"
    torch.save(state, tmp_path / "builtin.pt")
    with pytest.raises(SystemExit):
        script.main(["digits", *options, "--checkpoint", str(tmp_path / "builtin.pt")])
    assert not out.exists()


def test_command_refuses_unknown_parts(capsys):
    """An unknown part is an error that names the known ones."""
    with pytest.raises(SystemExit):
        script.main(["everything"])
    assert f"known are {', '.join(script.PARTS)}" in capsys.readouterr().err


def test_what_is_shipped_was_measured_on_the_shipped_model():
    """Each part of pretrained/claims.pt names the first digits of the hash of pretrained/model.pt,
    and so do bound.json and seeds.json, so that no figure is left out. The loss that was measured
    after each epoch is the one that training measured. README.md has the table of the samplers.
    """
    claims = torch.load(script.SHIPPED.with_name("claims.pt"), weights_only=True)
    digest = hashlib.sha256(script.SHIPPED.read_bytes()).hexdigest()
    assert claims and all(digest.startswith(part["model"]) for part in claims.values())
    names = set(plots.CLAIMS) - set(plots.LABELLED)  # those are of another model
    sources = {plots.SOURCES.get(name, name) for name in names}
    assert set(plots.measured(script.SHIPPED)) == {*sources, "digits", "loss"}
    readme = Path(__file__).with_name("README.md").read_text(encoding="utf-8")
    assert script.table(claims["samplers"]) in readme
    history = train.load_checkpoint(script.SHIPPED).history
    for epoch, loss in claims["difficulty"]["epochs"].items():
        # The files of the epochs hold weights in half precision, good to 5e-4.
        assert math.isclose(loss[1:].mean(), history["held_out"][epoch - 1], rel_tol=2e-3)
