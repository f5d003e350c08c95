"""Every figure is drawn, from any model file, the same each time, and shows what it says."""

import runpy
import shutil

import pytest
import torch
from matplotlib.image import imread
from PIL import Image

import plots as script
from plots import FIGURES, draw, gather
from strategies import pictures, write_mnist
from train import BLOG_LOSS, from_uint8, load_checkpoint


@pytest.fixture(scope="module")
def material(tiny_run):
    """What all figures need, from the tiny run and without MNIST."""
    return gather(load_checkpoint(tiny_run / "model.pt"), list(FIGURES), data=tiny_run)


@pytest.mark.parametrize("name", FIGURES)
def test_figure_is_drawn_twice_the_same(name, material, tmp_path):
    """A PNG of a size for a README, byte for byte the same when drawn again, with its origin."""
    first, second = (draw(name, material, tmp_path / run).read_bytes() for run in "ab")
    assert first == second
    with Image.open(tmp_path / "a" / f"{name}.png") as picture:
        assert picture.width == 1500 and 300 < picture.height < 2000
        assert "training seed 0, cosine schedule, T = 20" in picture.info["Description"]


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


def test_loss_shows_history_and_the_blogs_numbers(material):
    """The three curves are the blog's fifteen numbers, our training and our held-out loss."""
    figure = script.plot_loss(material)
    blog, loss, held_out = (line.get_ydata().tolist() for line in figure.axes[0].lines)
    assert blog == list(BLOG_LOSS)
    assert loss == material.checkpoint.history["loss"]
    assert held_out == material.checkpoint.history["held_out"]


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


def test_blog_is_shown_beside_mnist_alone(material):
    """A model of other images is drawn without the blog's numbers, and the figure says which."""
    import copy
    other = copy.deepcopy(material)
    other.checkpoint.config.dataset = "builtin"
    figure = script.plot_loss(other)
    assert len(figure.axes[0].lines) == 2 and "built-in digits" in figure.axes[0].get_title()


def test_forward_process_says_whose_digits_it_shows(material, tiny_run, tmp_path):
    """With MNIST at hand: real digits, and no sampling. Without: the network's, and it says so."""
    labels = torch.tensor([7, 2, 4, 9])
    write_mnist(tmp_path, pictures(4), labels)
    real = gather(material.checkpoint, ["forward"], data=tmp_path)
    assert real.real and not real.chain and torch.equal(real.digits, from_uint8(pictures(4)))
    assert not material.real and torch.equal(material.digits, material.chain[0][0][:4])
    for m, word in ((real, "MNIST: images"), (material, "MNIST: generated images")):
        figure = script.plot_forward(m)
        assert word in figure.subfigs[0].get_suptitle()
        shown = figure.axes[0].images[0].get_array().data
        assert torch.equal(torch.from_numpy(shown), m.digits[0, 0])


def test_command_draws_what_is_named(tiny_run, tmp_path, capsys):
    """python plots.py loss writes loss.png alone, beside the run it was drawn from."""
    run = tmp_path / "run"
    shutil.copytree(tiny_run, run)
    script.main(["loss", "--checkpoint", str(run / "model.pt")])
    assert [path.name for path in (run / "figures").iterdir()] == ["loss.png"]
    assert str(run / "figures" / "loss.png") in capsys.readouterr().out
    assert imread(run / "figures" / "loss.png").std() > 0


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
    ("plots", ["--help"], "which ones: forward")])
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
