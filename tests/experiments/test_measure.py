"""The measurements of the claims: each number against a case in which it is known."""

import hashlib
import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

import measure as script
import plots
import train
from digits import builtin_digits
from measure import Bench, loss_by_t, low_frequencies, share_present
from sample import sample, to_uint8
from schedule import NoiseSchedule
from strategies import FEW, SEED, normal
from test_sample import Constant


@pytest.fixture(scope="module")
def bench(tiny_run, tmp_path_factory):
    """A bench on two steps of training and few built-in digits, T = 20."""
    folder = tmp_path_factory.mktemp("bench")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(script, "load_images", lambda data, part, dataset: builtin_digits(
            120 if part else 60, seed=0 if part else 1))
        patch.setattr(script, "SIZES", (4, 8))  # numbers of images that distances are given for
        patch.setattr(Bench, "blog", folder / "none.pt")  # even where it has been trained
        path = tiny_run / "model.pt"
        yield Bench(train.load_checkpoint(path), path, "", (8, 8, 8), "cpu", folder / "claims.pt",
                    folder / "samples")


@FEW
@given(SEED, st.integers(4, 12))
def test_low_and_high_frequencies_share_the_image(seed, size):
    """Low and high part add up to the image and are orthogonal; a wave of k periods across belongs
    to the low part for k <= 3, to the high part for k >= 4; a constant is low."""
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
    """And with the low frequencies alone: 1 of the low ones, 0 of the high ones."""
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
    """Their mean is what train.evaluate measures, if each t is seen equally often; at each t it is
    the mean over the images that are seen at this t."""
    schedule = NoiseSchedule.from_betas([0.1, 0.2, 0.3, 0.4], allow_signal=True)
    generator = torch.Generator().manual_seed(seed)
    images = torch.randint(256, (12, 1, 4, 4), generator=generator, dtype=torch.uint8)
    model = Constant(schedule, c, 0.0)

    def forward(xt, t):  # each image at its own t, which Constant leaves to the schedule
        return schedule.predict_eps(xt, t, torch.full_like(xt, c))
    model.forward = forward
    by_t = loss_by_t(model, schedule, images)
    assert by_t[0] == 0 and len(by_t) == 5
    assert math.isclose(by_t[1:].mean(), train.evaluate(model, schedule, images), rel_tol=1e-6)
    for t in range(1, 5):
        x0 = train.from_uint8(images[t - 1::4])
        # The guess at the noise is wrong by what the image is wrong, sqrt(alpha_bar) (x0 - c).
        factor = schedule.alpha_bar[t] / (1 - schedule.alpha_bar[t])
        assert math.isclose(by_t[t], (factor * (x0 - c).double().square().mean()), rel_tol=1e-4,
                            abs_tol=1e-9)


def test_wiener_is_the_best_linear_guess():
    """Its loss is that of the guess itself on Gaussian data with MNIST's spectrum, and 0.0731 in
    the mean over t, computed elsewhere from the covariance of the test images: to 2.5 %.

    Any other multiple of x_t - sqrt(alpha_bar) mu is worse: the loss of a factor g is
    (1 - g sqrt(1 - alpha_bar))^2 + g^2 alpha_bar lam.
    """
    schedule = NoiseSchedule()
    found = script.wiener(schedule)
    assert len(found) == 1001 and found[0] == 0
    assert abs(found[1:].mean() / 0.0731 - 1) < 0.025
    import json
    lam = json.loads(script.SPECTRUM.read_text())["variance"]
    for t in (1, 100, 1000):
        a = schedule.alpha_bar[t].item()

        def loss(scale):
            g = [scale * math.sqrt(1 - a) / (a * v + 1 - a) for v in lam]
            return sum((1 - k * math.sqrt(1 - a)) ** 2 + k * k * a * v
                       for k, v in zip(g, lam)) / len(lam)
        assert math.isclose(found[t], loss(1.0), rel_tol=1e-9)
        assert loss(1.0) < min(loss(0.99), loss(1.01))


def test_samples_are_those_of_their_seeds_and_are_kept(bench):
    """Drawn in two goes they are the images of seeds 0..5; what was drawn is not drawn again."""
    first, images = bench.draw("ddim 5", 2), bench.draw("ddim 5", 6)
    *_, (_, x0, _) = sample(bench.model, bench.checkpoint.schedule, list(range(6)), "ddim", steps=5)
    assert (images.int() - to_uint8(x0).int()).abs().max() <= 1  # other batches, other rounding
    assert torch.equal(images[:2], first)
    file = bench.scratch / "ddim 5.pt"
    before = file.read_bytes()
    assert torch.equal(bench.draw("ddim 5", 3), images[:3]) and file.read_bytes() == before


def test_restart_goes_on_from_the_digit_it_is_given(bench, monkeypatch):
    """Six times up to 0.4 T or 0.3 T and back, by steps of sde-dpm++: what comes out depends on the
    digit and its seed alone, and on both. A network that is sure of one image ends at that image."""
    images, levels, used = bench.draw("ddpm 1000", 8), [], []
    monkeypatch.setattr(script, "sample", lambda model, schedule, seeds, *args, **options: (
        used.extend(seeds) or sample(model, schedule, seeds, *args, **options)))
    whole = bench.restart(images, range(8)).int()
    assert len(set(used)) == 6 * 8 and not set(used) & set(range(8))  # no noise is used twice
    assert (whole[2:4] - bench.restart(images[2:4], range(2, 4)).int()).abs().max() <= 1
    for other in (bench.restart(images[2:4], range(4, 6)), bench.restart(images[4:6], range(2, 4))):
        assert (whole[2:4] - other.int()).abs().max() > 10
    sure = Constant(bench.checkpoint.schedule, 0.3, 0.0)
    sure.register_forward_pre_hook(lambda module, given: levels.append(int(given[1][0])))
    monkeypatch.setattr(bench, "model", sure)
    assert (bench.restart(images, range(8)) == round(1.3 * 127.5)).all()
    T = bench.checkpoint.schedule.T
    assert T == 20 and levels == 3 * [8, 7, 6, 5, 4, 3, 2, 1] + 3 * [6, 5, 4, 3, 2, 1]


def test_a_certain_network_decides_at_once(bench, monkeypatch):
    """If the prediction is always one image, every restart ends there, whatever t: all numerals
    agree. As the originals are all alike, there is no difference of unrelated chains to share."""
    monkeypatch.setattr(bench, "model", Constant(bench.checkpoint.schedule, 0.3, 0.0))
    monkeypatch.setattr(script, "share_present", lambda guess, final: {"low": 1.0, "high": 1.0})
    monkeypatch.setattr(torch, "pdist", lambda x: torch.ones(1))
    found = script.decided(bench, seeds=3, repeats=2)
    assert [row["class"] for row in found["levels"].values()] == [1.0] * 11
    assert all(abs(row["pixels"] - 1) < 1e-6 for row in found["levels"].values())


def test_an_undecided_network_agrees_by_chance_alone(bench):
    """With two steps of training nothing is decided at T: the pixels of restarts from there are as
    different as those of unrelated chains, within what 4 chains can tell."""
    found = script.decided(bench, seeds=4, repeats=1)
    levels = found["levels"]
    assert list(levels) == [20, 18, 16, 14, 12, 10, 8, 6, 4, 2, 1]
    assert abs(levels[20]["pixels"]) < 0.3 and levels[1]["pixels"] > 0.99
    assert levels[1]["low"] > 0.99


def test_parts_write_what_they_found(bench, monkeypatch, tmp_path, capsys):
    """Each part adds itself to the file and leaves the others; all is plain numbers and tensors.

    The distances of a sampler are those of its first 4 and of all 8 images; "copies" are nearest
    to themselves if the samples are put among the known images.
    """
    for name in ("digits", "samplers", "noise", "copies", "difficulty", "epochs"):
        found = script.PARTS[name](bench)
        train.save(bench.out, (torch.load(bench.out, weights_only=True) if bench.out.exists()
                               else {}) | {name: found})
    claims = torch.load(bench.out, weights_only=True)
    assert set(claims) == {"digits", "samplers", "noise", "copies", "difficulty", "epochs"}
    for image, kind in zip(claims["digits"]["images"], (7, 2, 4, 9)):
        assert any(torch.equal(image, other) for other in bench.real[bench.labels == kind])
    ours = {name for name in script.CHAINS if script.BLOG not in name}
    assert set(claims["samplers"]["chains"]) == ours
    for row in claims["samplers"]["chains"].values():
        assert set(row["distances"]) == {4, 8}
        assert math.isclose(row["distances"][8], row["distance"], rel_tol=1e-9) and row["seconds"] > 0
    assert claims["copies"]["samples"].shape == claims["copies"]["test"].shape == (8,)
    assert list(claims["difficulty"]["epochs"]) == [1]  # the run had one epoch
    images = claims["epochs"]["images"][1]  # its weights are those of the model, halved in length
    assert (images.int() - bench.draw("ddpm 1000", 8).int()).abs().double().mean() < 1
    monkeypatch.setattr(bench, "known", torch.cat([bench.known, bench.draw("ddpm 1000", 8)]))
    again = script.copies(bench)
    assert again["samples"].max() < 1e-3 and torch.equal(again["nearest"], again["images"])
    pixels = bench.draw("ddpm 1000", 8).double() / 127.5 - 1
    spread = (pixels - pixels.mean(dim=0)).square().sum(dim=0).mean() / 7
    assert math.isclose(claims["noise"]["ddpm 1000"]["spread"], spread, rel_tol=1e-5)
    pairs = (bench.real[:, None].double() - bench.known[None]).square().mean((2, 3, 4)) / 127.5**2
    closest = pairs.min(dim=1).values.sqrt()  # of each of the 60 test images, 8 of which were taken
    assert all((closest - d).abs().min() < 1e-3 for d in claims["copies"]["test"])


def test_samples_of_the_blogs_network_are_its_own(bench, monkeypatch, tmp_path):
    """If it has been trained, the chain named after it is drawn from it, without clipping."""
    images = builtin_digits(16, seed=0)[0], builtin_digits(8, seed=1)[0]
    script.ablations.run(script.BLOG_ROW, "", 1, tmp_path, images=images, batch_size=8, device="cpu",
                         T=20, schedule="cosine")
    monkeypatch.setattr(Bench, "blog", tmp_path / "model.pt")
    model, schedule, *_ = script.ablations.load(script.BLOG_ROW, tmp_path / "model.pt")
    *_, (_, x0, _) = sample(model, schedule, [0, 1], clip=False)
    drawn = bench.draw(script.BLOG, 2)
    assert (drawn.int() - to_uint8(x0).int()).abs().max() <= 1
    assert (drawn.int() - bench.draw("ddpm 1000", 2).int()).abs().max() > 10


def test_table_of_samplers_shows_what_was_measured():
    """Shares, distances at each size that was reached, seconds; and real digits below."""
    row = {"confident": 0.825, "count": 1000, "distances": {200: 14.6}, "seconds": 61.96,
           "chi2": 20.4, "nearest": 0.3271}
    found = {"chains": {"ddpm 1000": row}, "floor": {200: (8.125, 2.774)},
             "test images": {"confident": 0.971, "count": 10_000, "chi2": 0.0, "nearest": 0.309}}
    assert script.table(found).splitlines()[2:] == [
        "| ddpm 1000 | 1,000 | 82.5 % | 20 | 0.327 | 14.60 | 62.0 s |",
        "| real digits | 10,000 | 97.1 % | 0 | 0.309 | 8.12 ± 2.77 |  |"]


def test_command_adds_to_what_was_measured_of_the_same_model(bench, monkeypatch, tmp_path):
    """Two parts, measured one after the other, are both in the file. A file that holds what was
    measured of another model is left as it is, and a model of other images than MNIST refused."""
    monkeypatch.setattr(script, "load_images", lambda data, part, dataset: builtin_digits(
        120 if part else 60, seed=0 if part else 1))
    out = tmp_path / "claims.pt"
    train.save(out, {"noise": {"model": bench.scratch.name}})
    options = ["--checkpoint", str(bench.path), "--device", "cpu", "--out", str(out), "--scratch",
               str(tmp_path)]
    for part in ("digits", "difficulty"):
        script.main([part, *options])
    found = torch.load(out, weights_only=True)
    assert set(found) == {"noise", "digits", "difficulty"}
    assert {part["model"] for part in found.values()} == {bench.scratch.name}
    train.save(out, {"copies": {"model": "another"}})
    with pytest.raises(SystemExit):
        script.main(["digits", *options])
    assert set(torch.load(out, weights_only=True)) == {"copies"}
    out.unlink()
    checkpoint = train.load_checkpoint(bench.path)
    checkpoint.config.dataset = "builtin"
    monkeypatch.setattr(script, "open_checkpoint", lambda name: (bench.path, checkpoint))
    with pytest.raises(SystemExit):
        script.main(["digits", *options])


def test_command_refuses_unknown_parts(capsys):
    """An unknown part is an error that names the known ones."""
    with pytest.raises(SystemExit):
        script.main(["everything"])
    assert f"known are {', '.join(script.PARTS)}" in capsys.readouterr().err


def test_what_is_shipped_was_measured_on_the_shipped_model():
    """Each part of pretrained/claims.pt names the first digits of the hash of pretrained/model.pt,
    and so do bound.json and seeds.json, so that no figure is left out. The loss that was measured
    after each epoch is the one that training measured. The README has the table of the samplers."""
    folder = script.SHIPPED.parent
    claims = torch.load(folder / "claims.pt", weights_only=True)
    digest = hashlib.sha256(script.SHIPPED.read_bytes()).hexdigest()
    assert claims and all(digest.startswith(part["model"]) for part in claims.values())
    assert set(plots.measured(script.SHIPPED)) == {*plots.CLAIMS, "digits", "loss"}
    readme = (script.ROOT / "README.md").read_text(encoding="utf-8")
    assert script.table(claims["samplers"]) in readme
    history = train.load_checkpoint(script.SHIPPED).history
    for epoch, loss in claims["difficulty"]["epochs"].items():
        # The files of the epochs hold weights in half precision, good to 5e-4.
        assert math.isclose(loss[1:].mean(), history["held_out"][epoch - 1], rel_tol=2e-3)
