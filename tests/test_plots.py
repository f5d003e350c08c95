"""Every figure is drawn from any model file, the same each time, and shows what it says."""

import copy
import functools
import json
import re
import runpy
import shutil
from io import BytesIO

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from matplotlib.figure import Figure
from matplotlib.image import imread
from PIL import Image
from torchvision.transforms.functional import pil_to_tensor

import plots as script
from plots import (
    CLAIMS, FIGURES, LABELLED, draw, fingerprint, frame_levels, gather, measured, shown_levels)
from sample import SHIPPED, SHIPPED_LABELS, Labelled, sample, to_uint8
from schedule import NoiseSchedule
from strategies import normal, pictures
from tests.experiments import labels as orders
from tests.experiments.guidance import INTERVAL, PARTS, REPORTED, Setting
from train import BLOG_LOSS, Config, from_uint8, load_checkpoint, train
from unet import UNet

# As if measured: T = 20, losses that fall as 1/t, a digit that is decided at t = 6.
FALLING = torch.cat([torch.zeros(1), 1 / torch.arange(1, 21)]).double()
CHAIN = {"images": pictures(8), "spread": 0.25, "confident": 0.75, "count": 10, "seconds": 0.5,
         "classes": [1, 1, 1, 4, 0, 0, 1, 1, 1, 0], "distances": {500: 5.5, 2000: 4.5}}
TWICE = (0.4, 0.4)  # two restarts
SETTINGS = {setting.name: setting for setting in REPORTED}
MEASURED = {
    "digits": {"images": pictures(4, seed=7)},
    "difficulty": {"linear": 2 * FALLING, "epochs": {k: FALLING * (1 + 1 / k) for k in (1, 5, 15)}},
    "decided": {"levels": {t: {"class": 0.1 if t > 6 else 0.95, "pixels": 1 - t / 20,
                               "low": 1 - t / 20, "high": -0.2} for t in (20, 12, 8, 6, 4, 2, 1)}},
    "noise": {"test images": {"spread": 0.3}} | {name: CHAIN for name in (
        "ddpm 1000", "ddpm 1000, beta", "ddpm 1000, zero", "ddim 50")},
    "copies": {"samples": torch.full((9,), 0.25), "test": torch.full((9,), 0.5),
               "images": pictures(32), "nearest": pictures(32, seed=1)},
    "epochs": {"images": {1: pictures(8)}},
    "bits": {name: {"terms": [0.0, 0.5] + [0.025] * 18 + [None], "total": [1.0, 0.01]}
             for name in ("beta", "beta_tilde", "optimal")},
    "samplers": {"chains": {"ddpm 5": CHAIN, "ddpm 1000, zero": CHAIN, "ddpm 9, restarted": CHAIN},
                 "images": {"ddpm 5": pictures(8), "ddpm 9, restarted": pictures(8)},
                 "floor": {500: (1.25, 0.1), 2000: (1.0, 0.1)}},
    "loss": {"runs": [{"held_out": [0.3]}, {"held_out": [0.2]}]},
    "guidance": {
        "rows": {name: setting._asdict() | {"confident": 0.75, "count": 2000, "evaluations": 20.0}
                 for name, setting in SETTINGS.items()},
        "images": {name: pictures(32, seed=k) for k, name in enumerate(SETTINGS)},
        "ladder": {5.0: pictures(8, seed=5), 0.0: pictures(8), 1.0: pictures(8, seed=1)}},
    "guidance_choice": {"rows": {}, "real": {"confident": 0.975, "distances": {500: 3, 2000: 1}}},
}
for chosen, share, distance in (
        (Setting(), 0.75, 8.0), (Setting(2, 3.0), 0.95, 14.0), (Setting(2, 2.0), 0.9, 5.0),
        (Setting(1, 2.0, INTERVAL, TWICE), 0.96, 4.5), (Setting(1, 2.0, INTERVAL), 0.925, 4.0),
        (Setting(1, 2.0), 0.875, 6.0), (Setting(restarts=TWICE), 0.8, 7.0)):
    MEASURED["guidance_choice"]["rows"][chosen.name] = chosen._asdict() | {
        "confident": share, "distances": {200: 9.0, 500: distance}}
MEASURED["labels_choice"] = {
    "rows": {}, "real": {"confident": 0.975, "named": 0.99, "distances": {500: 3, 2000: 1}}}
for order, clear, named, distance in (
        (orders.Setting(), 0.75, 0.875, 8.0), (orders.Setting(3.0), 0.95, 0.99, 14.0),
        (orders.Setting(2.0, None, orders.EARLY), 0.9, 0.9, 5.0),
        (orders.Setting(2.0, INTERVAL), 0.925, 0.96, 4.0),
        (orders.Setting(2.0), 0.85, 0.98, 6.0)):
    MEASURED["labels_choice"]["rows"][order.name] = order._asdict() | {
        "confident": clear, "named": named, "distances": {500: distance}}
EVERY = [*FIGURES, "animation", *CLAIMS]


@pytest.fixture(scope="module")
def material(tiny_run):
    """What all figures need, from the tiny run, as if it had been measured."""
    return gather(load_checkpoint(tiny_run / "model.pt"), EVERY, MEASURED, mark="abc123")


@pytest.fixture(scope="module")
def labelled_run(tmp_path_factory):
    """The folder of a finished run with labels: a small network, two steps, T = 20."""
    out = tmp_path_factory.mktemp("labelled")
    digits = pictures(16), torch.arange(16) % 10
    config = Config(epochs=1, batch_size=8, T=20, schedule="cosine", labels=True, out=str(out),
                    lr=0.05, device="cpu")
    train(config, images=(digits, digits),
          network=functools.partial(UNet, channels=(8, 8, 8), blocks=(1, 1, 1)))
    # In two steps it learns nothing of labels, so let them matter.
    state = torch.load(out / "model.pt", weights_only=True)
    table = state["average"]["table"]
    state["average"]["table"] = 3 * normal(0, *table.shape, dtype=torch.float32)
    torch.save(state, out / "model.pt")
    return out


@pytest.fixture(scope="module")
def labelled(labelled_run):
    """What the figures of a model with labels need, as if it had been measured."""
    return gather(load_checkpoint(labelled_run / "model.pt"), [*LABELLED], MEASURED, mark="abc123")


def titles(figure: Figure) -> list[str]:
    return [ax.get_title() for ax in figure.axes]


def notes(figure: Figure) -> list[str]:
    return [text.get_text() for ax in figure.axes for text in ax.texts]


def drawn_image(ax) -> torch.Tensor:
    """The pixels of the picture in these axes."""
    return torch.from_numpy(ax.images[0].get_array().data)


def assert_tiles(ax, images: torch.Tensor) -> None:
    """These images, uint8, stand in the axes in rows of eight, on the grey scale of all figures."""
    assert ax.images[0].get_clim() == (-1, 1)
    tiled = drawn_image(ax)
    assert tiled.shape == (2 + 30 * -(-len(images) // 8), 242)
    for k, image in enumerate(images):
        top, left = 2 + 30 * (k // 8), 2 + 30 * (k % 8)
        assert torch.equal(tiled[top:top + 28, left:left + 28], from_uint8(image[0]))


def like_the_blogs(material):
    """The same material, as if the model were trained with the noise levels of the blog."""
    other = copy.deepcopy(material)
    other.checkpoint.config.T = 1000
    other.checkpoint.config.schedule = "linear"
    return other


# ------------------------------------------------------------------------------- files of figures

@pytest.mark.parametrize("name", [*FIGURES, *CLAIMS])
def test_figure_is_drawn_twice_the_same(name, material, labelled, tmp_path):
    """A PNG of a size for a README, byte for byte the same when drawn again, with its origin."""
    source = labelled if name in LABELLED else material
    first, second = (draw(name, source, tmp_path / run).read_bytes() for run in "ab")
    assert first == second
    with Image.open(tmp_path / "a" / f"{name}.png") as picture:
        assert picture.width == 1500 and 200 < picture.height < 2000
        origin = picture.info["Description"]
        assert "training seed 0, cosine schedule, T = 20, model abc123" in origin
        assert "Software" not in picture.info


def test_animation_shows_the_chain(material, tmp_path):
    """A GIF of the 32 images at falling t, the last the finished ones; twice the same."""
    path, again = (draw("animation", material, tmp_path / run) for run in "ab")
    assert path.name == "animation.gif" and path.read_bytes() == again.read_bytes()
    levels = frame_levels(20)
    with Image.open(path) as animation:
        assert animation.n_frames == len(levels) and animation.info["loop"] == 0
        assert b"training seed 0" in animation.info["comment"]
        assert b"model abc123" in animation.info["comment"]
        assert animation.info["duration"] == 80
        animation.seek(len(levels) - 1)
        assert animation.info["duration"] == 3000
        shown = pil_to_tensor(animation.convert("L"))[0]
    final = to_uint8(material.chain[0][0][0, 0]).float()
    # 16 shades are at most 16 apart, or a little more where few pixels share one.
    assert (shown[2:58:2, 2:58:2] - final).abs().mean() < 16


def test_animation_is_small_enough():
    """48 frames of noise at full T, the worst case, stay below two megabytes."""
    assert len(frame_levels(1000)) == 48
    noise = normal(0, 32, 1, 28, 28, dtype=torch.float32)
    file = BytesIO()
    script.draw_grid(noise, scale=2).quantize(16).save(file, "GIF")
    assert 48 * len(file.getvalue()) < 2_000_000


@given(st.integers(2, 2000))
def test_levels_fall_from_T_to_0(T):
    """Both lists of noise levels begin at T, end at 0, and have each level once."""
    for levels in (shown_levels(T), frame_levels(T)):
        assert levels[0] == T and levels[-1] == 0
        assert levels == sorted(set(levels), reverse=True)


# ---------------------------------------------------------------------------- figures of the model

def test_forward_process_follows_its_formula():
    """x_t = √ᾱ_t x₀ + √(1-ᾱ_t) ε, with one ε for all t: eight levels, from the clean image to T."""
    schedule = NoiseSchedule(100, "cosine")
    x0 = normal(3, 2, 1, 28, 28)
    noised = script.forward_images(schedule, x0)
    assert [t for t, _ in noised] == [0, 5, 10, 20, 30, 40, 60, 100]
    assert torch.equal(noised[0][1], x0)
    alpha_bar = torch.tensor([schedule.alpha_bar[t].item() for t, _ in noised[1:]])
    images = torch.stack([xt for _, xt in noised[1:]])
    signal, noise = (factor.sqrt().view(7, 1, 1, 1, 1) for factor in (alpha_bar, 1 - alpha_bar))
    eps = (images - signal * x0) / noise
    assert torch.allclose(eps, eps[-1].expand_as(eps), atol=1e-5)
    assert 0.9 < eps[-1].std() < 1.1 and abs(eps[-1].mean()) < 0.1
    assert (eps[-1, 0] - eps[-1, 1]).abs().mean() > 0.5  # each image has noise of its own


def test_forward_process_says_whose_digits_it_shows(material):
    """Measured: real digits, and no sampling for them. Not measured: the network's, and it says so.
    """
    real = gather(material.checkpoint, ["forward"], MEASURED)
    assert not real.chain
    own = gather(material.checkpoint, ["forward"], {})
    for m, word, expected in ((real, "MNIST: images", from_uint8(MEASURED["digits"]["images"])),
                              (own, "MNIST: generated images", own.chain[0][0][:4])):
        figure = script.plot_forward(m)
        assert word in figure.subfigs[0].get_suptitle()
        assert "the cosine schedule" in figure.subfigs[0].get_suptitle()
        noised = script.forward_images(material.checkpoint.schedule, expected)
        for row in range(4):
            for column, (t, xt) in enumerate(noised):
                ax = figure.axes[row * len(noised) + column]
                assert torch.equal(drawn_image(ax), xt[row, 0])
                assert ax.get_title() == (f"t = {t}" if row == 0 else "")


def test_schedules_are_drawn_as_they_are():
    """Squares of the factors add up to 1, and their ratio is the signal-to-noise ratio, whose
    logarithm is drawn up to T - 1. A third schedule is dotted."""
    factors, ratio = Figure().subplots(1, 2)
    script.draw_schedules(factors, ratio, 50, ["linear", "cosine", "linear"])
    assert [line.get_linestyle() for line in ratio.lines] == ["-", "--", ":"]
    assert [line.get_label() for line in ratio.lines] == ["linear", "cosine", "linear"]
    assert [line.get_label() for line in factors.lines[:4]] == [
        "signal, linear", "noise, linear", "signal, cosine", "noise, cosine"]
    for k, kind in enumerate(("linear", "cosine")):
        alpha_bar = NoiseSchedule(50, kind, allow_signal=True).alpha_bar
        signal, noise = (torch.from_numpy(line.get_ydata())
                         for line in factors.lines[2 * k:2 * k + 2])
        assert torch.allclose(signal, alpha_bar.sqrt())
        assert torch.allclose(signal**2 + noise**2, torch.ones_like(signal))
        decibels = torch.from_numpy(ratio.lines[k].get_ydata())
        assert torch.allclose(10**(decibels / 20), (signal / noise)[1:50])
        assert list(ratio.lines[k].get_xdata()) == list(range(1, 50))


def test_embedding_shows_sines_above_cosines_and_distances(material):
    """A column for each t, sin ω_i t in the upper half and cos ω_i t in the lower one, with ω_i
    from 1 to 1/10,000. The curves are Euclidean distances to t = 2, 10 and 18, and 0 only there."""
    figure = script.plot_embedding(material)
    features = torch.from_numpy(figure.axes[0].images[0].get_array().data)
    half = len(features) // 2
    omega = 10_000 ** (-torch.linspace(0, 1, half, dtype=torch.float64))
    angles = omega[:, None] * torch.arange(1, 21)
    expected = torch.cat([angles.sin(), angles.cos()])
    assert torch.allclose(features.double(), expected, atol=1e-5)
    for t, line in zip((2, 10, 18), figure.axes[1].lines):
        distance = torch.from_numpy(line.get_ydata()).double()
        by_hand = (expected - expected[:, [t - 1]]).square().sum(0).sqrt()
        assert torch.allclose(distance, by_hand, atol=1e-4)
        assert distance[t - 1] == 0 and (distance == 0).sum() == 1
        assert line.get_label() == f"to t = {t}"


def test_range_over_seeds_is_taken_epoch_by_epoch():
    """The lowest and the highest may be of different runs; an unfinished run ends the range."""
    runs = [{"held_out": [0.3, 0.1, 0.1]}, {"held_out": [0.2, 0.4]}, {"held_out": [0.25, 0.2, 0.3]}]
    assert script.range_over_seeds(runs) == ([0.2, 0.1], [0.3, 0.4])


def test_loss_shows_history_and_the_blogs_numbers(material):
    """The blog's fifteen numbers, our training and held-out loss, the best linear denoiser, and the
    least and the greatest held-out loss of several seeds."""
    ax = script.plot_loss(like_the_blogs(material)).axes[0]
    linear = ax.lines[-1]
    assert linear.get_ydata()[0] == pytest.approx(2 * FALLING[1:].mean().item())
    drawn = [line.get_ydata() for line in ax.lines[:-1]]
    history = material.checkpoint.history
    # The tiny run is of MNIST, as far as its file says.
    assert [list(y) for y in drawn] == [list(BLOG_LOSS), history["loss"], history["held_out"]]
    assert [text.get_text() for text in ax.texts[:3]] == [
        "0.0619", f"{history['loss'][-1]:.4f}", f"{history['held_out'][-1]:.4f}"]
    band = ax.collections[0].get_paths()[0].vertices[:, 1]
    assert band.min() == 0.2 and band.max() == 0.3


@pytest.mark.parametrize("name, value", [("dataset", "builtin"), ("T", 500), ("images", 100),
                                         ("schedule", "cosine")])
def test_blog_is_shown_only_beside_what_can_be_compared(material, name, value):
    """A model of other images or noise levels is drawn without the blog's numbers, and says of
    which images it is."""
    other = like_the_blogs(material)
    setattr(other.checkpoint.config, name, value)
    other.claims.clear()
    figure = script.plot_loss(other)
    assert len(figure.axes[0].lines) == 2 and other.dataset in figure.axes[0].get_title()


def test_loss_of_a_run_under_way(tiny_run, tmp_path, monkeypatch, capsys):
    """plots.py loss draws your own run before it is finished, and before its first epoch is; the
    other figures take the shipped model then."""
    import sample as sampler
    state = torch.load(tiny_run / "model.pt", weights_only=True)
    monkeypatch.setattr(sampler, "HERE", tmp_path)
    own = tmp_path / "runs" / "mnist" / "model.pt"
    own.parent.mkdir(parents=True)
    for losses in ([], [0.5]):
        history = {"loss": losses, "held_out": losses, "seconds": losses, "step_loss": losses}
        torch.save({**state, "config": {**state["config"], "epochs": 9}, "history": history}, own)
        script.main(["loss", "--device", "cpu"])
        assert (own.parent / "figures" / "loss.png").stat().st_size > 10_000
        assert str(own) in capsys.readouterr().out
    script.main(["embedding", "--device", "cpu", "--out", str(tmp_path)])
    out, err = capsys.readouterr()
    assert "not finished" in err and str(SHIPPED) in out


def test_loss_of_a_run_with_a_new_plan_is_marked_where_it_began(material):
    """A run of 3 epochs of 8 steps that was made longer after step 20, and once more after epoch 5:
    two vertical lines, after 2.5 and after 5 epochs, with what was planned there. The first plan
    has no line, nor has a model file that holds no plans.
    """
    other = like_the_blogs(material)
    other.claims.clear()
    lines = len(script.plot_loss(other).axes[0].lines)
    history = other.checkpoint.history
    plans = history.pop("plans", [])
    assert len(plans) == 1 and len(script.plot_loss(other).axes[0].lines) == lines

    history["plans"] = [{"step": 0, "steps": 24, "epochs": 3, "lr": 3e-3},
                        {"step": 20, "steps": 48, "epochs": 6, "lr": 3e-3},
                        {"step": 40, "steps": 80, "epochs": 10, "lr": 0.5}]
    history["loss"] = history["held_out"] = [0.5, 0.3, 0.2, 0.1, 0.1, 0.05]
    ax = script.plot_loss(other).axes[0]
    drawn = ax.lines[lines:]
    assert [list(line.get_xdata()) for line in drawn] == [[2.5, 2.5], [5, 5]]
    assert [text.get_text() for text in ax.texts[-2:]] == [
        "new plan: 6 epochs, learning rate 0.003", "new plan: 10 epochs, learning rate 0.5"]


def test_trajectory_shows_noisy_images_above_predictions(material):
    """Upper row x_t, lower row x0_hat, t falling from T to 0, one grey scale everywhere."""
    figure = script.plot_trajectory(material)
    levels = shown_levels(20)
    columns = len(levels)
    assert len(figure.axes) == 2 * columns
    for i, t in enumerate(levels):
        xt, x0_hat = material.chain[t]
        for ax, expected in ((figure.axes[i], xt), (figure.axes[columns + i], x0_hat)):
            assert torch.equal(drawn_image(ax), expected[script.SHOWN, 0])
            assert ax.images[0].get_clim() == (-1, 1)
        assert figure.axes[i].get_title() == f"t = {t}"
    assert f"seed {script.SEEDS[script.SHOWN]}." in figure.get_suptitle()


def test_grid_shows_the_samples(material):
    """The picture in the axes is made of the 32 final images, on the fixed grey scale."""
    ax = script.plot_grid(material).axes[0]
    assert ax.images[0].get_clim() == (-1, 1)
    tiled = drawn_image(ax)
    final = material.chain[0][0]
    for k in range(32):
        top, left = 2 + 30 * (k // 8), 2 + 30 * (k % 8)
        assert torch.equal(tiled[top:top + 28, left:left + 28], final[k, 0])


# -------------------------------------------------------------------- figures of what was measured

def test_figures_of_claims_state_what_was_measured(material):
    """The numbers in titles and notes are those of the measurements, not of the blog."""
    # 1/t summed up to 20 is 3.598; half of it is passed between 1/1 + 1/2 + 1/3 and the next.
    # At t = 19 the mean of 1/14 to 1/20 is 0.0597, at 1 that of 1/1 to 1/6 is 0.408.
    assert titles(script.plot_difficulty(material)) == [
        "Loss near t = 1: 7 times that near 19", "Half of the loss lies at t below 4"]
    curve = script.plot_difficulty(material).axes[1].lines[0].get_ydata()
    assert curve[-1] == pytest.approx(1) and curve[0] == pytest.approx(1 / FALLING.sum().item())
    assert titles(script.plot_decided(material)) == [
        "Nine of ten reruns from t = 6 end as the same numeral"]
    assert notes(script.plot_noise(material)) == [
        "spread 0.25\nclear 75%\n0-4 1 1 1 4 0\n5-9 0 1 1 1 0"] * 4
    assert "digits: 0.3)" in script.plot_noise(material).get_suptitle()
    assert "10 samples" in script.plot_noise(material).get_suptitle()
    assert titles(script.plot_copies(material))[1] == (
        "median distance of samples 0.250, of test digits 0.500")
    held_out = material.checkpoint.history["held_out"][0]
    assert notes(script.plot_epochs(material)) == [f"held-out loss\n{held_out:.4f}"]
    bits = script.plot_bits(material)
    assert titles(bits)[0].startswith("100% of the bits are spent at t up to 50")  # all there are
    assert bits.axes[1].lines[0].get_ydata()[-1] == pytest.approx(0.5 + 18 * 0.025)
    assert "1.000 $\\pm$ 0.010" in bits.axes[1].get_legend().get_texts()[0].get_text()
    samplers = script.plot_samplers(material)
    # Of the most images that there are, for plain chains and restarted ones.
    assert notes(samplers) == 2 * ["distance 4.5\nof 2,000 images\n32 digits in 0.5 s"]
    assert "digits:\n1.2 of 500, 1.0 of 2,000 images)" in samplers.get_suptitle()


def test_groups_of_neighbours_are_averaged():
    """Groups of two of t = 1..5 have the mean t 1.5, 3.5 and 5; entry 0 of the loss is unused."""
    mean_t, mean_loss = script.average_groups(torch.tensor([99., 1, 3, 10, 20, 7]), size=2)
    assert mean_t.tolist() == [1.5, 3.5, 5]
    assert mean_loss.tolist() == [2, 15, 7]


def test_share_of_the_loss_is_cumulative():
    """Losses 1, 3, 4 at t = 1..3 make shares of 1/8, 4/8 and 8/8."""
    assert script.share_up_to(torch.tensor([0., 1, 3, 4])).tolist() == [0.125, 0.5, 1]


def test_loss_near_t_is_a_mean_of_eleven():
    """From t - 5 to t + 5, but not of t = 0, nor beyond T."""
    loss = torch.arange(21.0)**2
    assert script.loss_near(loss, 10) == pytest.approx(sum(t * t for t in range(5, 16)) / 11)
    assert script.loss_near(loss, 2) == pytest.approx(sum(t * t for t in range(1, 8)) / 7)
    assert script.loss_near(loss, 19) == pytest.approx(sum(t * t for t in range(14, 21)) / 7)


@given(st.lists(st.integers(1, 100), min_size=2, max_size=30))
def test_half_of_the_loss_lies_below_the_t_that_a_plain_loop_finds(losses):
    """The smallest t such that the losses of 1..t-1 make up half of all."""
    t = 1
    while 2 * sum(losses[:t - 1]) < sum(losses):
        t += 1
    loss = torch.tensor([0, *losses], dtype=torch.float64)
    assert script.half_lies_below(loss) == t


@pytest.mark.parametrize("T, epochs", [(7, [1]), (251, [1, 2]), (1235, [1, 2, 3, 4])])
def test_difficulty_is_drawn_for_any_T_and_number_of_epochs(material, T, epochs):
    """The last epoch is blue and the linear denoiser grey, however many there are; each point is
    the mean of its neighbours."""
    other = copy.deepcopy(material)
    loss = 1 / torch.arange(T + 1).clamp(min=1).double()
    other.checkpoint.schedule.T = T
    other.claims["difficulty"] = {"linear": 2 * loss, "epochs": {k: loss * k for k in epochs}}
    figure = script.plot_difficulty(other)
    left, right = figure.axes
    drawn = {line.get_label(): line for line in left.lines if line.get_label()[0] != "_"}
    assert list(drawn) == [f"after epoch {k}" for k in epochs if k != 2 or k == epochs[-1]] + [
        "best linear denoiser"]
    assert drawn["best linear denoiser"].get_color() == script.FAINT
    last = drawn[f"after epoch {epochs[-1]}"]
    assert last.get_color() == script.OURS and 0 < last.get_xdata()[0] < last.get_xdata()[-1] <= T
    size = max(1, T // 100)
    assert last.get_ydata()[0] == pytest.approx(epochs[-1] * loss[1:size + 1].mean().item())
    assert [line.get_color() for line in right.lines] == [
        line.get_color() for line in drawn.values()]


def test_decided_shows_the_shares_that_were_measured(material):
    """The four curves are those that were measured, and nothing is drawn below 0."""
    levels = MEASURED["decided"]["levels"]
    ax = script.plot_decided(material).axes[0]
    curves = ax.lines[:4]
    for line, key in zip(curves, ("class", "pixels", "low")):
        assert list(line.get_xdata()) == list(levels)
        assert list(line.get_ydata()) == [row[key] for row in levels.values()]
    assert (curves[3].get_ydata() == 0).all()
    # The blog's phases end at 600, 400, 100 and 0 of 1,000, here of 20.
    assert [line.get_xdata()[0] for line in ax.lines[4:]] == [12, 8, 2, 0]


def test_digit_is_decided_at_the_largest_t_that_keeps_it():
    """The largest t with a share of 0.9 or more; 0 if there is none."""
    levels = {t: {"class": share} for t, share in ((30, 0.5), (20, 0.9), (10, 1.0))}
    assert script.decided_from(levels) == 20
    assert script.decided_from(levels, share=0.95) == 10
    assert script.decided_from({30: {"class": 0.5}}) == 0


def test_rows_alternate():
    """Ten images in rows of four: a row of the first, the row of the second below it, and so on."""
    upper = torch.arange(10).view(10, 1, 1, 1)
    rows = script.alternate_rows(upper, upper + 100, columns=4)
    assert rows.flatten().tolist() == [
        0, 1, 2, 3, 100, 101, 102, 103, 4, 5, 6, 7, 104, 105, 106, 107, 8, 9, 108, 109]


def test_copies_stand_below_their_samples(material):
    """Rows of eight: samples, their nearest training digits, the next samples, and so on."""
    tiled = drawn_image(script.plot_copies(material).axes[0])
    copies = MEASURED["copies"]
    for k in range(32):
        for row, images in ((k // 8 * 2, copies["images"]), (k // 8 * 2 + 1, copies["nearest"])):
            top, left = 2 + 30 * row, 2 + 30 * (k % 8)
            assert torch.equal(tiled[top:top + 28, left:left + 28], from_uint8(images[k, 0]))


def test_distances_are_counted_in_histograms(material):
    """Nine test digits at 0.5 and nine samples at 0.25, each in one of thirty bins up to 0.6."""
    ax = script.plot_copies(material).axes[1]
    for first, distance in ((0, 0.5), (30, 0.25)):
        counts = [bar.get_height() for bar in ax.patches[first:first + 30]]
        assert counts[int(distance / 0.02)] == 9 and sum(counts) == 9
    assert [line.get_xdata()[0] for line in ax.lines] == [0.5, 0.25]  # the medians


def test_epochs_stand_beside_their_own_loss(material):
    """The note of epoch n is the n-th held-out loss of the history, if not all epochs are shown."""
    other = copy.deepcopy(material)
    other.checkpoint.history["held_out"] = [0.5, 0.25, 0.125]
    other.claims["epochs"] = {"images": {1: pictures(8), 3: pictures(8)}}
    figure = script.plot_epochs(other)
    assert notes(figure) == ["held-out loss\n0.5000", "held-out loss\n0.1250"]
    assert [ax.get_ylabel() for ax in figure.axes] == ["epoch 1", "epoch 3"]


def test_unknown_terms_of_the_bound_are_gaps_and_count_as_nothing():
    """Terms 3, unknown, 1 at t = 1..3: the first two have three quarters of the bits."""
    terms = script.terms_of_the_bound({"terms": [None, 3.0, None, 1.0]})
    assert terms.isnan().tolist() == [False, True, False]
    assert terms[[0, 2]].tolist() == [3, 1]
    assert script.share_of_the_bits(terms, last=2) == 0.75
    assert script.share_of_the_bits(terms, last=50) == 1


def test_samplers_are_shown_once():
    """Plain chains and restarted ones, but no other variance and not the blog's network."""
    shown = [name for name in ("ddim 20", "sde-dpm++ 20, restarted", "ddpm 1000, zero",
                               "ddpm 1000, not clipped", "the blog's network, ddpm 1000")
             if script.is_shown(name)]
    assert shown == ["ddim 20", "sde-dpm++ 20, restarted"]


# ----------------------------------------------------------------------------- figures of guidance

def test_settings_that_are_compared_are_reported():
    """The names of the two settings are names of the experiment; one is unguided, one is not."""
    assert SETTINGS[script.UNGUIDED].guide is None and not SETTINGS[script.UNGUIDED].restarts
    assert SETTINGS[script.GUIDED].guide is not None and SETTINGS[script.GUIDED].weight > 1


def test_guided_digits_stand_beside_unguided_ones(material):
    """On the left the unguided ones, on the right the guided ones, each under its own title."""
    figure = script.plot_guided(material)
    guidance = MEASURED["guidance"]
    for ax, name in zip(figure.axes, (script.UNGUIDED, script.GUIDED), strict=True):
        assert_tiles(ax, guidance["images"][name])
        assert ax.get_title() == script.describe_setting(guidance["rows"][name])
    assert figure.get_suptitle() == "MNIST: seeds 0 to 31, row by row"


@pytest.mark.parametrize("setting, words", [
    (Setting(), "20 steps of sde-dpm++\nunguided\n"),
    (Setting(3, 2.5), "20 steps of sde-dpm++\nw = 2.5, guide: epoch 3\n"),
    (Setting(2, 2.0, (150, 700)),
     "20 steps of sde-dpm++\nw = 2, guide: epoch 2, t from 150 to 700\n"),
    (Setting(2, 1.5, None, (0.4, 0.3), "ddpm", 50),
     "50 steps of ddpm, 2 restarts\nw = 1.5, guide: epoch 2\n")])
def test_setting_in_words(setting, words):
    """Sampler, steps and restarts; w, guide and interval; what came of it, and at what cost."""
    row = setting._asdict() | {"confident": 0.916, "count": 2000, "evaluations": 31.0}
    assert script.describe_setting(row) == (
        words + "92% of 2,000 digits are clear, 31 evaluations each")


def test_curves_of_guides_rise_along_w():
    """A curve for each guide and interval. Each begins at w = 1 with the unguided digits, and w
    grows. Settings with restarts belong to none.
    """
    rows = MEASURED["guidance_choice"]["rows"]
    names = {id(row): name for name, row in rows.items()}
    curves = [[names[id(row)] for row in curve] for curve in script.curves_of_guides(rows)]
    assert curves == [[setting.name for setting in curve] for curve in (
        (Setting(), Setting(1, 2.0)),
        (Setting(), Setting(2, 2.0), Setting(2, 3.0)),
        (Setting(), Setting(1, 2.0, INTERVAL)))]


def test_tradeoff_shows_curves_and_what_to_compare_them_with(material):
    """Distance from left to right, clear share upwards; one colour for each guide, dashed with an
    interval; w beside each point that is guided, the others by name.
    """
    ax = script.plot_tradeoff(material).axes[0]
    curves = [(list(line.get_xdata()), list(line.get_ydata()), line.get_linestyle())
              for line in ax.lines]
    assert curves == [
        ([8, 6], [0.75, 0.875], "-"), ([8, 5, 14], [0.75, 0.9, 0.95], "-"),
        ([8, 4], [0.75, 0.925], "--"), ([8], [0.75], "None"), ([3], [0.975], "None")]
    assert [line.get_color() for line in ax.lines[:3]] == [script.OURS, script.BLOG, script.OURS]
    assert [text.get_text() for text in ax.get_legend().get_texts()] == [
        "guide: epoch 1", "guide: epoch 2", "guide: epoch 1, t from 150 to 700"]
    assert [(text.get_text(), *text.xy) for text in ax.texts] == [
        ("2", 6, 0.875), ("2", 5, 0.9), ("3", 14, 0.95), ("2", 4, 0.925),
        ("unguided", 8, 0.75), ("real digits", 3, 0.975)]
    assert "of 500 digits" in ax.get_xlabel()


def test_tradeoff_needs_no_real_digits(material):
    """If they were not measured, the curves and the unguided digits are drawn as before."""
    other = copy.deepcopy(material)
    del other.claims["guidance_choice"]["real"]
    ax = script.plot_tradeoff(other).axes[0]
    assert len(ax.lines) == 4 and ax.texts[-1].get_text() == "unguided"
    # The labels of the axes are not rounded, even if they are 2.5 % apart.
    ax.set(yticks=[0.775, 0.8, 0.825], ylim=(0.76, 0.84))
    assert [float(label.get_text().strip("%")) / 100 for label in ax.get_yticklabels()] == (
        pytest.approx(list(ax.get_yticks())))
    assert [float(label.get_text()) for label in ax.get_xticklabels()] == list(ax.get_xticks())


def test_ladder_rises_with_w(material):
    """A row for each w in ascending order, with the mean of its pixels; 0 and 1 are explained."""
    figure = script.plot_ladder(material)
    ladder = MEASURED["guidance"]["ladder"]
    assert [ax.get_ylabel() for ax in figure.axes] == ["w = 0", "w = 1", "w = 5"]
    for ax, w in zip(figure.axes, (0.0, 1.0, 5.0)):
        assert_tiles(ax, ladder[w])
    # pictures() are black and white: -1 and +1.
    white = [(ladder[w] == 255).double().mean().item() for w in (0.0, 1.0, 5.0)]
    first, second, third = (f"mean pixel {2 * share - 1:.2f}" for share in white)
    assert notes(figure) == [f"the guide alone\n{first}", f"the model alone\n{second}", third]


# ----------------------------------------------------------------------- figures of digits to order

def drawn_alone(checkpoint, label: int | None, seed: int) -> torch.Tensor:
    """What one seed gives, told a label or not told, without guidance."""
    network = checkpoint.model
    if label is not None:
        network = Labelled(network, torch.tensor([label]))
    *_, (_, x0, _) = sample(network, checkpoint.schedule, [seed], "sde-dpm++")
    return x0[0]


def test_rows_are_classes_and_columns_are_seeds(labelled, monkeypatch):
    """Without guidance (w = 1) each image is what its seed draws alone, told the class of its row.
    """
    checkpoint = labelled.checkpoint
    monkeypatch.setattr(script, "ORDER_WEIGHT", 1.0)
    images = script.images_of_classes(checkpoint, seeds=3)
    assert images.shape == (30, 1, 28, 28)
    for row, column in ((0, 0), (3, 2), (9, 1)):
        expected = drawn_alone(checkpoint, row, column)
        assert torch.allclose(images[3 * row + column], expected, atol=1e-4)
    rows = images.unflatten(0, (10, 3))
    for other in (rows[:, 1], rows[1:, 0]):
        assert (rows[0, 0] - other).abs().max() > 0.1  # seed and class both matter


def test_weight_grows_from_left_to_right(labelled):
    """Row c has the class and the seed c. Column w = 0 is not told, w = 1 is not guided, and the
    largest w leads further away from what is drawn without a label."""
    checkpoint = labelled.checkpoint
    images = script.images_of_weights(checkpoint).unflatten(0, (10, -1))
    assert images.shape[:2] == (10, len(script.SHOWN_WEIGHTS))
    for c in (0, 7):
        assert torch.allclose(images[c, 0], drawn_alone(checkpoint, None, c), atol=1e-4)
        assert torch.allclose(images[c, 1], drawn_alone(checkpoint, c, c), atol=1e-4)
    change = (images - images[:, :1]).square().mean((0, 2, 3, 4))
    assert change[0] == 0 and change[1] > 0 and change[-1] > change[1]


def test_guidance_acts_in_its_interval_only(labelled):
    """Where the interval holds no t of the chain, images are those of w = 1; w and the interval
    of the figure are passed on."""
    checkpoint = labelled.checkpoint
    labels = torch.tensor([3, 5])
    plain, outside, inside = (
        script.draw_to_order(checkpoint, labels, [0, 1], w, interval)
        for w, interval in ((1.0, None), (50.0, (1000, 1000)), (50.0, (1, 20))))
    assert torch.equal(plain, outside) and not torch.allclose(plain, inside, atol=1e-3)


def test_names_stand_beside_their_rows_and_columns():
    """Each tick is in the middle of its row or column of tiles, the first at the top left."""
    images = normal(0, 6, 1, 28, 28).clamp(-1, 1)
    ax = Figure().subplots()
    script.show_table(ax, images, ["a", "b"], ["x", "y", "z"])
    tiled = drawn_image(ax)
    for ticks, names, size in ((ax.get_yticks(), ax.get_yticklabels(), 2),
                               (ax.get_xticks(), ax.get_xticklabels(), 3)):
        assert len(ticks) == size
        assert [name.get_text() for name in names] == list("ab" if size == 2 else "xyz")
    for row, y in enumerate(ax.get_yticks()):
        for column, x in enumerate(ax.get_xticks()):
            top, left = round(y) - 14, round(x) - 14
            assert torch.equal(tiled[top:top + 28, left:left + 28], images[3 * row + column, 0])


def test_digits_to_order_name_classes_seeds_and_weights(labelled):
    """The rows are the classes of the model; the columns the seeds, or w."""
    for plot, compute, columns in (
            (script.plot_digits, script.images_of_classes, [f"seed {k}" for k in range(10)]),
            (script.plot_weight, script.images_of_weights,
             ["w = 0\nnot told", "w = 1\nunguided", "w = 1.5", "w = 2", "w = 3", "w = 5",
              "w = 8"])):
        ax = plot(labelled).axes[0]
        assert [text.get_text() for text in ax.get_yticklabels()] == list("0123456789")
        assert [text.get_text() for text in ax.get_xticklabels()] == columns
        images = compute(labelled.checkpoint)
        assert torch.equal(drawn_image(ax)[32:60, 2:30], images[len(columns), 0])
    assert orders.Setting(script.ORDER_WEIGHT, script.ORDER_INTERVAL) in orders.REPORTED
    low, high = script.ORDER_INTERVAL
    assert f"w = {script.ORDER_WEIGHT:g} at t from {low} to {high}" in titles(
        script.plot_digits(labelled))[0]


def test_curves_of_orders_rise_along_w():
    """A curve for each guide and interval, those of a guide together. Each begins at w = 1."""
    rows = MEASURED["labels_choice"]["rows"]
    names = {id(row): name for name, row in rows.items()}
    curves = [[names[id(row)] for row in curve] for curve in script.curves_of_orders(rows)]
    assert curves == [["w = 1", "w = 2", "w = 3"], ["w = 1", "w = 2, t of 150 to 700"],
                      ["w = 1", "w = 2, guide early.pt, not told"]]


def test_labels_show_curves_and_what_to_compare_them_with(labelled):
    """Distance from left to right; clear digits upwards on the left, those named as asked for on
    the right. In grey on the left is guidance without labels, if it was measured."""
    figure = script.plot_labels(labelled)
    left, right = figure.axes
    assert titles(figure) == ["clear", "named as asked for"]
    for ax, shares in ((left, ([0.75, 0.85, 0.95], [0.75, 0.925], [0.75, 0.9])),
                       (right, ([0.875, 0.98, 0.99], [0.875, 0.96], [0.875, 0.9]))):
        assert [list(line.get_ydata()) for line in ax.lines[:3]] == list(shares)
        assert [list(line.get_xdata()) for line in ax.lines[:3]] == [[8, 6, 14], [8, 4], [8, 5]]
        assert [line.get_linestyle() for line in ax.lines[:3]] == ["-", "--", "-"]
        assert [line.get_color() for line in ax.lines[:3]] == [
            script.OURS, script.OURS, script.BLOG]
        assert [text.get_text() for text in ax.texts] == [
            "2", "3", "2", "2", "w = 1", "real digits"]
        assert "of 500 digits" in ax.get_xlabel()
    legend = [text.get_text() for text in figure.legends[0].get_texts()]
    assert legend == [
        "guide: itself, not told", "guide: itself, not told, t from 150 to 700",
        "guide: early.pt, not told", "no labels, guide: epoch 2"]
    assert [line.get_color() for line in left.lines[5:]] == [script.FAINT]
    assert list(left.lines[5].get_xdata()) == [8, 5, 14] and len(right.lines) == 5

    other = copy.deepcopy(labelled)
    del other.claims["guidance_choice"]
    assert len(script.plot_labels(other).axes[0].lines) == 5


@pytest.fixture
def places(labelled_run, tmp_path, monkeypatch):
    """The folder of your own labelled run and that of the shipped one, both without a model."""
    import sample as sampler
    shipped = tmp_path / "pretrained" / "labels" / "model.pt"
    shipped.parent.mkdir(parents=True)
    for module in (sampler, script):
        monkeypatch.setattr(module, "SHIPPED_LABELS", shipped)
        monkeypatch.setattr(module, "HERE", tmp_path)
    own = tmp_path / "runs" / "mnist-labels" / "model.pt"
    own.parent.mkdir(parents=True)
    return own, shipped


def test_labelled_model_is_your_own_if_it_is_finished(labelled_run, places, monkeypatch):
    """Its figures lie beside it. While it is under way, and without one, the shipped model is
    drawn, into the figures of the book."""
    monkeypatch.setattr(script, "images_of_weights", lambda checkpoint: torch.zeros(70, 1, 28, 28))
    own, shipped = places
    shutil.copy(labelled_run / "model.pt", shipped)
    root = own.parents[2]
    script.main(["weight", "--device", "cpu"])
    assert (root / "figures" / "weight.png").exists()

    state = torch.load(labelled_run / "model.pt", weights_only=True)
    torch.save(state | {"config": state["config"] | {"epochs": 9}}, own)
    assert script.open_labelled(None)[0] == shipped
    shutil.copy(labelled_run / "model.pt", own)
    script.main(["weight", "--device", "cpu"])
    assert (own.parent / "figures" / "weight.png").exists()

    # If the shipped one is named, its figures do not replace those of the book.
    script.main(["weight", "--checkpoint", str(shipped), "--device", "cpu"])
    assert (root / "figures-labels" / "weight.png").exists()


def test_figures_of_labels_are_left_out_without_such_a_model(tiny_run, places, capsys):
    """If no figure is asked for by name, one line says what is left out and why; if one is, that is
    an error. A model without labels that is named is not replaced by another."""
    own, shipped = places

    def draw_labelled(asked, file):
        args = script.parse_arguments([*asked, "--device", "cpu", "--out", str(shipped.parent),
                                       *(["--checkpoint", file] if file else [])])
        script.draw_labelled_figures(args, asked)

    for file, why in ((None, f"no model file {shipped}"),
                      (str(tiny_run / "model.pt"), "was trained without labels")):
        draw_labelled([], file)
        err = capsys.readouterr().err
        assert err.startswith("left out: digits, weight, labels (") and why in err
        assert err.count("\n") == 1
        with pytest.raises((OSError, ValueError), match=re.escape(why)):
            draw_labelled(["digits"], file)
    assert not list(shipped.parent.iterdir())


def test_measurements_of_labels_are_those_of_their_model(labelled_run, places, capsys):
    """The figure labels is drawn from claims.pt beside the model with labels. Without it, it is
    left out, or refused if it is asked for."""
    own, shipped = places
    shutil.copy(labelled_run / "model.pt", own)
    with pytest.raises(SystemExit) as exit_:
        script.main(["labels", "--device", "cpu"])
    assert f"not measured beside {own}: labels " in exit_.value.code
    torch.save({"labels_choice": MEASURED["labels_choice"] | {"model": fingerprint(own)}},
               own.with_name("claims.pt"))
    script.main(["labels", "--device", "cpu"])
    assert [path.name for path in (own.parent / "figures").iterdir()] == ["labels.png"]


# ---------------------------------------------------------------------------- docstrings of figures

def numbers_in_docstrings() -> list[tuple[str, str]]:
    """(figure, words of its docstring), with the numbers computed from what was measured of the
    shipped model."""
    checkpoint = load_checkpoint(SHIPPED)
    claims = measured(SHIPPED)
    quotes = []

    # Where the two factors of image and noise are equal.
    t = torch.arange(1, 1001)
    for kind in ("linear", "cosine"):
        equal = t[NoiseSchedule(1000, kind).snr(t) <= 1].min()
        quotes.append(("forward", f"from t = {equal} on in the {kind}"))

    # How losses compare.
    linear = claims["difficulty"]["linear"][1:].mean()
    passed = sum(loss > linear for loss in BLOG_LOSS) + 1
    assert passed == 8
    quotes.append(("loss", "the best linear denoiser only in its eighth epoch"))
    factor = (1 / checkpoint.schedule.alpha_bar[-1] - 1).sqrt()
    quotes.append(("trajectory", f"which is {factor:.0f} in the shipped model"))
    last = claims["difficulty"]["epochs"][15]
    ratio = last[5:16].mean() / last[945:956].mean() / 1000
    quotes.append(("difficulty", f"falls by a factor of {ratio:.0f},000"))
    quotes.append(("difficulty", f"lies at t below {script.half_lies_below(last)}."))
    held_out = checkpoint.history["held_out"]
    quotes.append(("epochs", f"falls by only {1 - held_out[14] / held_out[0]:.0%} from the first"))

    # Shares and distances of samples.
    kept = {t: f"{row['class']:.0%}" for t, row in claims["decided"]["levels"].items()}
    quotes.append(("decided",
                   f"from t = 600 end as the same numeral as the original in {kept[600]}"))
    quotes.append(("decided", f"from t = 300 in {kept[300]}"))
    quotes.append(("decided", f"at t = 400 already {kept[400]} of"))
    clear = claims["samplers"]["test images"]["confident"]
    quotes.append(("noise", f"{clear:.0%} for test digits"))
    quotes.append(("noise", f"{claims['noise']['ddpm 1000, zero']['confident']:.0%} without noise"))
    samples, test = (claims["copies"][name].median() for name in ("samples", "test"))
    quotes.append(("copies", f"is {samples:.3f} for samples and {test:.3f} for test digits"))
    closest, closest_test = (claims["copies"][name].min() for name in ("samples", "test"))
    quotes.append(("copies", f"the nearest sample is at {closest:.3f}, the nearest test digit"))
    quotes.append(("copies", f"cannot be a copy, at {closest_test:.3f}."))
    distances = {chain: row["distance"] for chain, row in claims["samplers"]["chains"].items()}
    for chain, words in (("sde-dpm++ 20", "1,000 of ddpm (distances {:.1f}"),
                         ("ddpm 1000", "and {:.1f};"),
                         ("sde-dpm++ 50", "so {:.1f} for its 50 steps"),
                         ("sde-dpm++ 20, restarted", "restarted ones ({:.1f})")):
        quotes.append(("samplers", words.format(distances[chain])))

    deviation = claims["samplers"]["floor"][500][1]
    for name in ("tradeoff", "labels"):
        quotes.append((name, f"500 real digits its standard deviation is {deviation:.1f}"))

    # Bits per pixel.
    quotes.append(("bits", f"at most {claims['bits']['optimal']['total'][0]:.3f} are needed"))
    for variance, words in (("beta_tilde", "{:.0%} with β̃_t"),
                            ("optimal", "{:.0%} with the optimal variance")):
        terms = claims["bits"][variance]["terms"][1:]
        quotes.append(("bits", words.format(sum(terms[:50]) / sum(terms))))
    return quotes


def test_docstrings_quote_what_was_measured():
    """Each number that a docstring gives for the shipped model is the measured one."""
    for name, words in numbers_in_docstrings():
        docstring = " ".join((FIGURES | CLAIMS)[name].__doc__.split())
        assert words.replace("%", " %") in docstring, f"{name}: {words}"


def test_docstrings_say_how_to_measure():
    """Each figure of a measurement names a command whose module, and whose part, exists."""
    experiments = script.HERE / "tests" / "experiments"
    for name, plot in CLAIMS.items():
        docstring = " ".join(plot.__doc__.split())
        command = re.search(r"Measured by `python -m tests\.experiments\.(\w+) --data DIR ?(\w*)`",
                            docstring)
        source = (experiments / f"{command[1]}.py").read_text(encoding="utf-8")
        if command[1] == "measure":
            assert command[2] == name and f"def {name}(" in source
        if command[1] in ("guidance", "labels"):
            parts = PARTS if command[1] == "guidance" else orders.PARTS
            _, key, _ = parts[command[2]]
            assert key == script.SOURCES[name]
    for plot in FIGURES.values():
        for module in re.findall(r"-m tests\.experiments\.(\w+)", plot.__doc__):
            assert (experiments / f"{module}.py").exists()


# --------------------------------------------------------------------------------------- plumbing

def test_what_was_measured_of_the_model_is_read_from_beside_it(tmp_path):
    """claims.pt, bound.json and seeds.json. What is missing, or of another model, is left out."""
    path = tmp_path / "model.pt"
    path.write_bytes(b"a model")
    assert measured(path) == {}
    mark = {"model": fingerprint(path)}
    torch.save({"decided": {"levels": {3: 1.5}} | mark, "noise": {"model": "another"}},
               tmp_path / "claims.pt")
    (tmp_path / "bound.json").write_text(json.dumps({"beta": 1} | mark))
    (tmp_path / "seeds.json").write_text(json.dumps({"runs": []} | mark))
    assert measured(path) == {"decided": {"levels": {3: 1.5}} | mark, "bits": {"beta": 1} | mark,
                              "loss": {"runs": []} | mark}
    path.write_bytes(b"trained anew")
    assert measured(path) == {}


@pytest.mark.parametrize("names, claims, needed", [
    (["loss", "embedding"], {}, False), ([*CLAIMS], {}, False), (["loss", "grid"], {}, True),
    (["trajectory"], {}, True), (["animation"], MEASURED, True), (["forward"], {}, True),
    (["forward"], MEASURED, False), ([], {}, False)])
def test_samples_are_drawn_only_for_figures_that_show_them(names, claims, needed):
    """Trajectory, grid and animation, and the forward process if no real digits were saved."""
    assert script.needs_samples(names, claims) == needed


def test_figures_that_were_not_measured_are_left_out_or_refused(tmp_path, capsys):
    """Asked for all: the others, in order, and a line on what is missing. Asked by name: an error.
    """
    path = tmp_path / "model.pt"
    claims = {"noise": {}, "bits": {}}
    chosen = script.choose_figures([], claims, path)
    assert chosen == [*FIGURES, "animation", "noise", "bits"]
    err = capsys.readouterr().err
    assert (f"not measured beside {path}: difficulty, decided, copies, epochs, samplers, guided, "
            "tradeoff, ladder, labels (") in err
    assert err.count("\n") == 1
    assert script.choose_figures(["noise", "grid"], claims, path) == ["noise", "grid"]
    claims["guidance"] = {}  # of which two figures are drawn
    assert script.choose_figures(["ladder", "guided"], claims, path) == ["ladder", "guided"]
    assert not capsys.readouterr().err
    for name in ("decided", "tradeoff"):
        with pytest.raises(ValueError, match=f"not measured beside .*: {name} "):
            script.choose_figures(["noise", name], claims, path)


def test_figures_lie_beside_the_model_they_show(tmp_path):
    """The shipped model's in figures/ beside the scripts, your own beside your run, those of
    another file of a run in a folder of their own; --out wins."""
    run = tmp_path / "runs" / "mnist"
    assert script.output_folder(SHIPPED, None) == script.HERE / "figures"
    assert script.output_folder(SHIPPED.with_name("epoch-3.pt"), None) == (
        script.HERE / "figures-epoch-3")
    assert script.output_folder(run / "model.pt", None) == run / "figures"
    assert script.output_folder(run / "epoch-3.pt", None) == run / "figures-epoch-3"
    assert script.output_folder(run / "model.pt", str(tmp_path)) == tmp_path
    assert script.output_folder(SHIPPED_LABELS, None) == script.HERE / "figures-labels"
    assert script.output_folder(SHIPPED_LABELS.with_name("epoch-3.pt"), None) == (
        script.HERE / "figures-labels-epoch-3")


@pytest.mark.slow
def test_figures_without_measurements_are_left_out(tiny_run, tmp_path, capsys):
    """All figures of a run that has not been measured: those that need nothing, and a line on the
    others."""
    script.main(["--checkpoint", str(tiny_run / "model.pt"), "--out", str(tmp_path), "--device",
                 "cpu"])
    assert {path.stem for path in tmp_path.iterdir()} == {*FIGURES, "animation"} - {*LABELLED}
    err = capsys.readouterr().err
    assert f"not measured beside {tiny_run / 'model.pt'}: difficulty" in err
    assert "left out: digits, weight, labels (" in err


def test_command_draws_what_is_named(tiny_run, tmp_path, capsys):
    """python plots.py loss writes loss.png alone, beside the run it was drawn from."""
    run = tmp_path / "run"
    shutil.copytree(tiny_run, run)
    script.main(["loss", "--checkpoint", str(run / "model.pt")])
    assert [path.name for path in (run / "figures").iterdir()] == ["loss.png"]
    assert str(run / "figures" / "loss.png") in capsys.readouterr().out
    assert imread(run / "figures" / "loss.png").std() > 0


def test_figures_of_an_epoch_leave_those_of_the_model_alone(tiny_run, tmp_path, capsys):
    """They go to a folder of their own, and what was measured of the model is not taken for theirs.
    """
    run = tmp_path / "run"
    shutil.copytree(tiny_run, run)
    torch.save({"epochs": MEASURED["epochs"] | {"model": fingerprint(run / "model.pt")}},
               run / "claims.pt")
    script.main(["epochs", "--checkpoint", str(run / "model.pt")])
    script.main(["loss", "--checkpoint", str(run / "epoch-1.pt")])
    assert {path.relative_to(run).as_posix() for path in run.rglob("*.png")} == {
        "figures/epochs.png", "figures-epoch-1/loss.png"}
    with pytest.raises(SystemExit) as exit_:
        script.main(["epochs", "--checkpoint", str(run / "epoch-1.pt")])
    assert "not measured" in exit_.value.code


def test_damaged_measurements_are_named_in_one_line(tiny_run, tmp_path, capsys):
    """A foreign claims.pt ends in one line, not in a traceback."""
    run = tmp_path / "run"
    shutil.copytree(tiny_run, run)
    for content in (b"no measurements", b"", b"PK\x03\x04"):
        (run / "claims.pt").write_bytes(content)
        with pytest.raises(SystemExit) as exit_:
            script.main(["loss", "--checkpoint", str(run / "model.pt")])
        assert exit_.value.code.startswith("plots.py: ") and "\n" not in exit_.value.code


def test_interrupt_says_what_is_complete(tiny_run, tmp_path, monkeypatch, capsys):
    """Ctrl-C while a figure is drawn exits with 130; those before it were named and are whole."""
    save = Figure.savefig

    def interrupted(figure, file, **options):
        if "grid" in file.name:
            file.write(b"half")
            raise KeyboardInterrupt
        save(figure, file, **options)

    monkeypatch.setattr(Figure, "savefig", interrupted)
    with pytest.raises(SystemExit) as exit_:
        script.main(["loss", "grid", "--checkpoint", str(tiny_run / "model.pt"), "--out",
                     str(tmp_path), "--device", "cpu"])
    out, err = capsys.readouterr()
    assert exit_.value.code == 130 and "figures named above are complete" in err
    assert "loss.png" in out.splitlines()[-1] and imread(tmp_path / "loss.png").std() > 0
    assert [path.name for path in tmp_path.iterdir()] == ["loss.png"]


def test_help_shows_usage_and_defaults_but_errors_are_one_line(capsys):
    """--help has a usage line and the default of each option; a wrong option gets a single line."""
    with pytest.raises(SystemExit) as exit_:
        script.main(["--help"])
    shown = capsys.readouterr().out
    assert exit_.value.code == 0 and shown.startswith("usage: ")
    assert shown.count("(default: ") == 4
    for argv in (["--colour"], ["losses"], ["loss", "--device", "abacus"]):
        with pytest.raises(SystemExit) as exit_:
            script.main(argv)
        out, err = capsys.readouterr()
        assert exit_.value.code == 2 and not out and err.count("\n") == 1


@pytest.mark.parametrize("name, options, says", [
    ("schedule", ["--help"], "--kind"), ("unet", [], "324,705"),
    ("train", ["--help"], "passes over the training images"),
    ("sample", ["--help"], "one image for each seed"),
    ("plots", ["--help"], "forward, embedding, loss")])
def test_each_script_is_a_command(name, options, says, monkeypatch, capsys):
    """python SCRIPT.py runs: unet.py shows its table, the others explain their options."""
    path = script.HERE / f"{name}.py"
    monkeypatch.setattr("sys.argv", [str(path), *options])
    with torch.random.fork_rng(devices=[]):
        if options:
            with pytest.raises(SystemExit) as exit_:
                runpy.run_path(str(path), run_name="__main__")
            assert exit_.value.code == 0
        else:
            runpy.run_path(str(path), run_name="__main__")
    assert says in " ".join(capsys.readouterr().out.split())
