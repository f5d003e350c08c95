"""Every figure is drawn, from any model file, the same each time, and shows what it says."""

import copy
import json
import runpy
import shutil

import pytest
import torch
from matplotlib.image import imread
from PIL import Image
from torchvision.transforms.functional import pil_to_tensor

import plots as script
from plots import CLAIMS, FIGURES, draw, fingerprint, frame_levels, gather, measured
from sample import to_uint8
from strategies import normal, pictures
from train import BLOG_LOSS, from_uint8, load_checkpoint


# As if measured: T = 20, losses that fall as 1/t, a digit that is decided at t = 6.
FALLING = torch.cat([torch.zeros(1), 1 / torch.arange(1, 21)]).double()
CHAIN = {"images": pictures(8), "spread": 0.25, "confident": 0.75, "count": 10, "seconds": 0.5,
         "classes": [1, 1, 1, 4, 0, 0, 1, 1, 1, 0], "distances": {500: 5.5, 2000: 4.5}}
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
}
EVERY = [*FIGURES, "animation", *CLAIMS]


@pytest.fixture(scope="module")
def material(tiny_run):
    """What all figures need, from the tiny run, which has been measured."""
    return gather(load_checkpoint(tiny_run / "model.pt"), EVERY, MEASURED, mark="abc123")


@pytest.mark.parametrize("name", [*FIGURES, *CLAIMS])
def test_figure_is_drawn_twice_the_same(name, material, tmp_path):
    """A PNG of a size for a README, byte for byte the same when drawn again, with its origin."""
    first, second = (draw(name, material, tmp_path / run).read_bytes() for run in "ab")
    assert first == second
    with Image.open(tmp_path / "a" / f"{name}.png") as picture:
        assert picture.width == 1500 and 200 < picture.height < 2000
        assert "training seed 0, cosine schedule, T = 20, model abc123" in picture.info["Description"]


def test_animation_shows_the_chain(material, tmp_path):
    """A GIF of the 32 images at falling t, the last the finished ones; twice the same."""
    path, again = (draw("animation", material, tmp_path / run) for run in "ab")
    assert path.name == "animation.gif" and path.read_bytes() == again.read_bytes()
    levels = frame_levels(20)
    assert levels[0] == 20 and levels[-1] == 0 and levels == sorted(set(levels), reverse=True)
    with Image.open(path) as animation:
        assert animation.n_frames == len(levels) and animation.info["loop"] == 0
        assert b"training seed 0" in animation.info["comment"]
        assert b"model abc123" in animation.info["comment"]
        animation.seek(len(levels) - 1)
        shown = pil_to_tensor(animation.convert("L"))[0]
    final = to_uint8(material.chain[0][0][0, 0]).float()
    # 16 shades are at most 16 apart, or a little more where few pixels share one.
    assert (shown[2:58:2, 2:58:2] - final).abs().mean() < 16


def test_animation_is_small_enough():
    """48 frames of noise at full T, the worst case, stay below two megabytes."""
    assert len(frame_levels(1000)) == 48
    from io import BytesIO
    noise = normal(0, 32, 1, 28, 28, dtype=torch.float32)
    file = BytesIO()
    script.draw_grid(noise, scale=2).quantize(16).save(file, "GIF")
    assert 48 * len(file.getvalue()) < 2_000_000


def titles(figure) -> list[str]:
    return [ax.get_title() for ax in figure.axes]


def notes(figure) -> list[str]:
    return [text.get_text() for ax in figure.axes for text in ax.texts]


def test_figures_of_claims_state_what_was_measured(material):
    """The numbers in titles and notes are those of the measurements, not of the blog."""
    # 1/t summed up to 20 is 3.598; half of it is passed between 1/1 + 1/2 + 1/3 and the next.
    # At t = 19 the mean of 1/14 to 1/20 is 0.0597, at 1 that of 1/1 to 1/6 is 0.408.
    assert titles(script.plot_difficulty(material)) == [
        "Loss near t = 1: 7 times that near 19", "Half of the loss lies at t below 4"]
    curve = script.plot_difficulty(material).axes[1].lines[0].get_ydata()
    assert curve[-1] == pytest.approx(1) and curve[0] == pytest.approx(1 / FALLING.sum().item())
    assert titles(script.plot_decided(material)) == [
        "Nine of ten restarts keep the numeral from t = 6 on"]
    assert (script.plot_decided(material).axes[0].lines[3].get_ydata() == 0).all()  # not below
    assert notes(script.plot_noise(material)) == [
        "spread 0.25\nclear 75%\n0-4 1 1 1 4 0\n5-9 0 1 1 1 0"] * 4
    assert "digits: 0.3)" in script.plot_noise(material).get_suptitle()
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
    assert notes(samplers) == 2 * ["distance 4.5\nof 2,000 images\n32 in 0.5 s"]
    assert "digits:\n1.2 of 500, 1.0 of 2,000 images)" in samplers.get_suptitle()


def test_copies_stand_below_their_samples(material):
    """Rows of eight: samples, their nearest training digits, the next samples, and so on."""
    tiled = torch.from_numpy(script.plot_copies(material).axes[0].images[0].get_array().data)
    found = MEASURED["copies"]
    for k in range(32):
        for row, images in ((k // 8 * 2, found["images"]), (k // 8 * 2 + 1, found["nearest"])):
            top, left = 2 + 30 * row, 2 + 30 * (k % 8)
            assert torch.equal(tiled[top:top + 28, left:left + 28], from_uint8(images[k, 0]))


def test_grid_shows_the_samples(material):
    """The picture in the axes is made of the 32 final images, on the fixed grey scale."""
    figure = script.plot_grid(material)
    shown = figure.axes[0].images[0]
    assert shown.get_clim() == (-1, 1)
    final = material.chain[0][0]
    for k in range(32):
        top, left = 2 + 30 * (k // 8), 2 + 30 * (k % 8)
        tile = torch.from_numpy(shown.get_array().data[top:top + 28, left:left + 28])
        assert torch.equal(tile, final[k, 0])


def test_trajectory_shows_noisy_images_above_predictions(material):
    """Upper row x_t, lower row x0_hat, t falling from T to 0, one grey scale everywhere."""
    figure = script.plot_trajectory(material)
    levels = script.shown_levels(20)
    columns = len(levels)
    assert levels[0] == 20 and levels[-1] == 0 and len(figure.axes) == 2 * columns
    for i, t in enumerate(levels):
        xt, x0_hat = material.chain[t]
        for ax, expected in ((figure.axes[i], xt), (figure.axes[columns + i], x0_hat)):
            drawn = torch.from_numpy(ax.images[0].get_array().data)
            assert torch.equal(drawn, expected[script.SHOWN, 0])
            assert ax.images[0].get_clim() == (-1, 1)
        assert figure.axes[i].get_title() == f"t = {t}"


def like_the_blogs(material):
    """The same, as if trained with the noise levels of the blog."""
    other = copy.deepcopy(material)
    other.checkpoint.config.T, other.checkpoint.config.schedule = 1000, "linear"
    return other


def test_loss_shows_history_and_the_blogs_numbers(material):
    """The blog's fifteen numbers, our training and held-out loss, the best linear denoiser, and the
    least and the greatest held-out loss of several seeds."""
    ax = script.plot_loss(like_the_blogs(material)).axes[0]
    linear = ax.lines[-1]
    assert linear.get_ydata()[0] == pytest.approx(2 * FALLING[1:].mean().item())
    drawn = [line.get_ydata() for line in ax.lines[:-1]]
    assert [list(y) for y in drawn] == [  # the tiny run is of MNIST, as far as its file says
        list(BLOG_LOSS), material.checkpoint.history["loss"],
        material.checkpoint.history["held_out"]]
    band = ax.collections[0].get_paths()[0].vertices[:, 1]
    assert band.min() == 0.2 and band.max() == 0.3


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
    assert "not finished" in err and str(script.SHIPPED) in out


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


@pytest.mark.parametrize("T, epochs", [(7, [1]), (251, [1, 2]), (1235, [1, 2, 3, 4])])
def test_difficulty_is_drawn_for_any_T_and_number_of_epochs(material, T, epochs):
    """The last epoch is blue and the linear denoiser grey, however many there are; each point is the
    mean of its neighbours, so the mean of all points is that of the losses, up to the last few."""
    other, loss = copy.deepcopy(material), 1 / torch.arange(T + 1).clamp(min=1).double()
    other.checkpoint.schedule.T = T
    other.claims["difficulty"] = {"linear": 2 * loss, "epochs": {k: loss * k for k in epochs}}
    left = script.plot_difficulty(other).axes[0]
    drawn = {line.get_label(): line for line in left.lines if line.get_label()[0] != "_"}
    assert drawn["best linear denoiser"].get_color() == script.FAINT
    last = drawn[f"after epoch {epochs[-1]}"]
    assert last.get_color() == script.OURS and 0 < last.get_xdata()[0] < last.get_xdata()[-1] <= T
    size = max(1, T // 100)
    assert last.get_ydata()[0] == pytest.approx(epochs[-1] * loss[1:size + 1].mean().item())


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
        shown = figure.axes[0].images[0].get_array().data
        assert torch.equal(torch.from_numpy(shown), expected[0, 0])


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


def test_figures_without_measurements_are_left_out(tiny_run, tmp_path, capsys):
    """All figures of a run that has not been measured: those that need nothing, and a line on the
    others."""
    script.main(["--checkpoint", str(tiny_run / "model.pt"), "--out", str(tmp_path), "--device",
                 "cpu"])
    assert {path.stem for path in tmp_path.iterdir()} == {*FIGURES, "animation"}
    assert f"not measured beside {tiny_run / 'model.pt'}: difficulty" in capsys.readouterr().err


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
    def stopped(material):
        raise KeyboardInterrupt
    monkeypatch.setitem(FIGURES, "grid", stopped)
    with pytest.raises(SystemExit) as exit_:
        script.main(["loss", "grid", "--checkpoint", str(tiny_run / "model.pt"), "--out",
                     str(tmp_path), "--device", "cpu"])
    out, err = capsys.readouterr()
    assert exit_.value.code == 130 and "figures named above are complete" in err
    assert "loss.png" in out.splitlines()[-1] and imread(tmp_path / "loss.png").std() > 0
    assert [path.name for path in tmp_path.iterdir()] == ["loss.png"]


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
