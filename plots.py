"""Part 3, continued. The figures of this book (these five scripts), drawn from a trained model.

    python plots.py                  all figures
    python plots.py loss grid        only these two; --help lists their names

WHAT TO EXPECT. All figures together take a minute or two on two CPU cores, most of it to sample 32
digits in 1,000 steps. Each is written as a PNG file (the animation as a GIF), and its name is
printed. Figures of the shipped model go into figures/, those of your own finished run in runs/mnist
into runs/mnist/figures/. Three figures, those of section 5, are of a model that was trained with
labels: your own finished run in runs/mnist-labels, with its figures in a folder beside it, else the
shipped one, whose figures go into figures/, too. This script only draws; it never trains and never
measures.

HOW TO READ IT. Each figure has a function plot_NAME. Its docstring says what is drawn, what there
is to see, and how it was measured. Functions above it compute or draw its parts.

THE GREY SCALE. All images of the book share one: black is -1, white is +1, and values beyond these
are cut off. A scale fitted to each image would hide how the range of values changes on the way from
noise to digit.

CONTENTS. 1. What a figure is drawn from. 2. Figures of the model: forward, embedding, loss,
trajectory, grid, animation. 3. Figures of what was measured: difficulty, decided, noise, copies,
epochs, bits, samplers. 4. Figures of guidance: guided, tradeoff, ladder. 5. Figures of digits to
order: digits, weight, labels. Below the line: reading what was measured, sampling, saving, the
command line.

The notation is that of schedule.py. Sources: [DDPM] Ho, Jain and Abbeel 2020, arXiv 2006.11239.
[Attention] Vaswani et al. 2017, arXiv 1706.03762. The Fréchet distance: Heusel et al. 2017, arXiv
1706.08500. Restarts: Xu et al. 2023, arXiv 2306.14878. The optimal variance: Bao et al. 2022, arXiv
2201.06503. Guidance: Karras et al. 2024, arXiv 2406.02507, and with labels Ho and Salimans 2022,
arXiv 2207.12598.
"""

import argparse
import hashlib
import json
import os
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import cycle
from pathlib import Path

import torch

if __name__ == "__main__":  # the user's choice of a window for figures may not be installed here
    os.environ["MPLBACKEND"] = "Agg"

from matplotlib.axes import Axes
from matplotlib.figure import Figure  # and not pyplot, whose state all figures would share
from matplotlib.style import context as style_context
from matplotlib.ticker import PercentFormatter
from PIL import Image
from tqdm import tqdm

if sys.flags.safe_path:  # python -P does not look into the folder of the script
    sys.path.insert(0, str(Path(__file__).resolve().parent))

from sample import (
    SHIPPED, SHIPPED_LABELS, Guided, Labelled, draw_grid, open_checkpoint, sample)
from schedule import NoiseSchedule, Parser, forgiving_output
from train import (
    BLOG_LOSS, DATASETS, HERE, Checkpoint, from_uint8, load_checkpoint, make_folder, replacement_of)
from unet import pick_device, prepare_device, timestep_embedding

# The seeds of the generated images in section 2, and the one of them whose trajectory is drawn.
SEEDS = list(range(32))
SHOWN = 4  # its position in SEEDS

# Blue, orange, green, purple and grey that colour-blind readers can tell apart (Okabe and Ito).
OURS = "#0072B2"
BLOG = "#D55E00"  # or a second of our own curves
THIRD = "#009E73"
FOURTH = "#CC79A7"
FAINT = "#777777"


# ------------------------------------------------------------ 1. What a figure is drawn from

@dataclass
class Material:
    """Everything that the figures of one model are drawn from; `gather` below collects it.

    checkpoint  the trained model with its schedule, configuration and history
    chain       {t: (x_t, x̂₀)}: the images of SEEDS at the noise levels that are drawn, on their
                way from noise to digits, and the clean images that the network predicts from them;
                each is (32, 1, 28, 28), on the CPU. Empty if no figure needs samples
    claims      what was measured: the name of a figure, or of a measurement that several figures
                are drawn from -> its numbers
    mark        the first digits of the hash of the model file
    """
    checkpoint: Checkpoint
    chain: dict[int, tuple[torch.Tensor, torch.Tensor]]
    claims: dict
    mark: str = ""

    @property
    def dataset(self) -> str:
        return DATASETS[self.checkpoint.config.dataset]


def shown_levels(T: int) -> list[int]:
    """The noise levels of the trajectory, from T down to 0.

    Most of them lie in the second half of the chain, because there the digit takes its shape.
    """
    shares = (1, 0.8, 0.6, 0.5, 0.4, 0.3, 0.2, 0.1, 0.05, 0)
    levels = [round(T * share) for share in shares]
    return list(dict.fromkeys(levels))  # each level once, in the same order


def frame_levels(T: int) -> list[int]:
    """The noise levels of the animation, from T down to 0: T (k/48)² for k = 48, 47, ..., 0.

    The square makes the animation slower towards the end, where there is more to see.
    """
    levels = [round(T * (k / 48)**2) for k in range(48, -1, -1)]
    return list(dict.fromkeys(levels))  # each level once, in the same order


def show_image(ax: Axes, image: torch.Tensor) -> None:
    """Draw one image, (1, H, W), on the grey scale that all figures share."""
    ax.imshow(image[0].numpy(), vmin=-1, vmax=1)
    ax.set(xticks=[], yticks=[])
    ax.spines[:].set_visible(False)


def show_tiles(ax: Axes, images: torch.Tensor, columns: int = 8) -> None:
    """Draw images, (N, 1, H, W) in [-1, 1], row by row as one picture with grey gaps."""
    from torchvision.utils import make_grid  # here, because the import takes seconds
    show_image(ax, make_grid(images, nrow=columns, padding=2, pad_value=-0.5))


def draw_rows(title: str, rows: list[tuple[str, torch.Tensor, str]]) -> Figure:
    """Draw rows of eight images, each with a name on its left and a note on its right.

    rows  a list of (name, images, note), where images is uint8 (8, 1, H, W)
    """
    figure = Figure(figsize=(10, 1.05 * len(rows) + 0.5))
    figure.suptitle(title, fontsize=12)
    axes = figure.subplots(len(rows), squeeze=False)[:, 0]
    for ax, (name, images, note) in zip(axes, rows):
        show_tiles(ax, from_uint8(images))
        ax.set_ylabel(name, rotation=0, ha="right", va="center", fontsize=11)
        ax.text(1.01, 0.5, note, transform=ax.transAxes, va="center", fontsize=9)
    return figure


# ------------------------------------------------------------------- 2. Figures of the model
#
# They need only a model file with its history. For trajectory, grid and animation, 32 digits are
# sampled in T steps. If the model has been measured (section 3), forward shows real digits, and
# loss shows what the losses can be compared with.

def forward_images(schedule: NoiseSchedule, x0: torch.Tensor) -> list[tuple[int, torch.Tensor]]:
    """Noise clean images x0, (N, 1, H, W), to eight levels; returns a list of (t, x_t).

    Each image gets the same noise ε at every t, so that only the two factors of x_t change.
    """
    levels = [round(schedule.T * share) for share in (0, 0.05, 0.1, 0.2, 0.3, 0.4, 0.6, 1)]
    generator = torch.Generator().manual_seed(0)
    eps = torch.randn(x0.shape, generator=generator, dtype=x0.dtype)
    return [(t, schedule.q_sample(x0, t, eps)) for t in levels]


def draw_schedules(factors: Axes, ratio: Axes, T: int, kinds: Sequence[str]) -> None:
    """Draw the curves of the named schedules: solid the first, then dashed, then dotted.

    factors  axes for √ᾱ_t and √(1-ᾱ_t), t = 0..T
    ratio    axes for the signal-to-noise ratio in decibels, t = 1..T-1
    """
    for kind, style in zip(kinds, ("-", "--", ":")):
        schedule = NoiseSchedule(T, kind, allow_signal=True)
        alpha_bar = schedule.alpha_bar.numpy()  # (T+1,)
        factors.plot(alpha_bar**0.5, style, color=OURS, label=f"signal, {kind}")
        factors.plot((1 - alpha_bar)**0.5, style, color=BLOG, label=f"noise, {kind}")

        # Leave out t = T: β_T of the cosine schedule is capped, and its ratio drops by 30 decibels.
        decibels = 10 * schedule.snr(torch.arange(1, T)).log10().numpy()
        ratio.plot(range(1, T), decibels, style, color=THIRD, label=kind)


def plot_forward(material: Material) -> Figure:
    """How does an image become noise?                                              [DDPM Eq. 4]

    Above, four images x₀ are noised to growing t: x_t = √ᾱ_t x₀ + √(1-ᾱ_t) ε. Below on the left are
    these two factors for the linear and the cosine schedule, on the right the signal-to-noise ratio
    ᾱ_t/(1-ᾱ_t) in decibels (ten times its base-10 logarithm), which is 0 where the two factors are
    equal. With T = 1000 the noise is the larger from t = 260 on in the linear schedule, and only
    from t = 497 on in the cosine schedule, which destroys the image more slowly and has fewer steps
    at which the image is almost pure noise. The images are four test digits if they have been saved
    beside the model by `python -m tests.experiments.measure --data DIR digits`; otherwise the
    network draws them.
    """
    checkpoint = material.checkpoint
    T = checkpoint.schedule.T
    kind = checkpoint.config.schedule

    # Take real digits if there are any.
    if "digits" in material.claims:
        x0 = from_uint8(material.claims["digits"]["images"])
        subject = "images"
    else:
        x0 = material.chain[0][0][:4]
        subject = "generated images"

    # Draw the noised images: a row for each image, a column for each t.
    figure = Figure(figsize=(10, 8.6))
    top, bottom = figure.subfigures(2, 1, height_ratios=[len(x0) * 1.2, 3.6])
    noised = forward_images(checkpoint.schedule, x0)
    axes = top.subplots(len(x0), len(noised))
    for column, (t, images) in zip(axes.T, noised):
        for ax, xt in zip(column, images):
            show_image(ax, xt)
        column[0].set_title(f"t = {t}")
    top.suptitle(
        f"{material.dataset}: {subject} under the forward process of the {kind} schedule")

    # Draw the curves of both schedules, and of the model's own one if that is a third.
    kinds = ["linear", "cosine"]
    if kind not in kinds:
        kinds.append(kind)
    left, right = bottom.subplots(1, 2)
    draw_schedules(left, right, T, kinds)
    left.set(title=r"Factors $\sqrt{\bar\alpha_t}$ of the image and $\sqrt{1-\bar\alpha_t}$ "
             "of the noise", xlabel="t", xlim=(0, T), ylim=(0, 1.4), yticks=[0, .2, .4, .6, .8, 1])
    left.legend(loc="upper center", ncols=2)
    right.set(title="Signal-to-noise ratio", xlabel="t", ylabel="decibel", xlim=(0, T))
    right.axhline(0, color=FAINT, linewidth=1)
    right.legend()
    return figure


def plot_embedding(material: Material) -> Figure:
    """How is the network told t?                                       [Attention section 3.5]

    On the left is the embedding of each t, a column of sines and cosines of t, with the fast ones
    at the top of each half and the slow ones at the bottom. They work like the hands of a clock:
    the fast ones tell neighbouring t apart, the slow ones tell small t from large t. On the right
    is the Euclidean distance from the embeddings of three t to those of all t. It is 0 only at the
    same t, rises steeply on both sides and stays high, so no two t look alike to the network.
    """
    T = material.checkpoint.schedule.T
    dim = material.checkpoint.model.config["embedding"]
    features = timestep_embedding(torch.arange(1, T + 1), dim)  # (T, dim)
    figure = Figure(figsize=(10, 4))
    left, right = figure.subplots(1, 2, width_ratios=[1.25, 1])

    # Draw the features, t from left to right.
    picture = left.imshow(features.T.numpy(), aspect="auto", cmap="RdBu_r", vmin=-1, vmax=1,
                          extent=(1, T, dim, 0))
    left.axhline(dim / 2, color="black", linewidth=1)
    left.set(title="Embedding of t, one column for each t", xlabel="t",
             ylabel="feature (above the line sines, below cosines)")
    left.grid(False)
    figure.colorbar(picture, ax=left)

    # Draw the distance of all embeddings to three of them.
    for share, color in ((0.1, OURS), (0.5, BLOG), (0.9, THIRD)):
        t = max(1, round(T * share))
        distance = (features - features[t - 1]).norm(dim=1)  # (T,); row t - 1 belongs to t
        right.plot(range(1, T + 1), distance.numpy(), color=color, label=f"to t = {t}")
    right.set(title="Distance between embeddings", xlabel="t", xlim=(0, T), ylim=(0, None))
    right.legend(loc="lower center", bbox_to_anchor=(0.7, 0.02))
    return figure


def range_over_seeds(runs: list[dict]) -> tuple[list[float], list[float]]:
    """The lowest and the highest held-out loss of several runs after each epoch."""
    epochs = list(zip(*[run["held_out"] for run in runs]))  # for each epoch, one loss per run
    lowest = [min(losses) for losses in epochs]
    highest = [max(losses) for losses in epochs]
    return lowest, highest


def draw_losses(ax: Axes, losses: Sequence[float], color: str, label: str, lift: int) -> None:
    """Draw one loss per epoch and write the last one beside it, moved up by `lift` points."""
    if len(losses) == 0:  # the run has not finished its first epoch
        return
    epochs = range(1, len(losses) + 1)
    ax.plot(epochs, losses, "o-", color=color, markersize=4, label=label)
    ax.annotate(f"{losses[-1]:.4f}", xy=(len(losses), losses[-1]), xytext=(8, lift), color=color,
                textcoords="offset points", va="center")


def draw_range_over_seeds(ax: Axes, runs: list[dict]) -> None:
    """Draw a band over the held-out losses of several runs; of one run there is none."""
    if len(runs) > 1:
        lowest, highest = range_over_seeds(runs)
        ax.fill_between(range(1, len(lowest) + 1), lowest, highest, color=THIRD, alpha=0.3,
                        label=f"held-out, range over {len(runs)} seeds")


def draw_linear_loss(ax: Axes, linear: torch.Tensor) -> None:
    """Draw the loss of the best linear denoiser as a line: linear (T+1,), a mean over t = 1..T."""
    loss = linear[1:].mean().item()
    ax.axhline(loss, color=FAINT, linewidth=1, linestyle="--")
    ax.text(1.7, loss * 1.03, f"best linear denoiser, {loss:.4f}", color=FAINT, fontsize=9)


def draw_new_plans(ax: Axes, plans: list[dict]) -> None:
    """Draw a line where the number of epochs or the learning rate was changed, see train.py."""
    for plan in plans[1:]:  # the first is not new
        epoch = plan["step"] / plan["steps"] * plan["epochs"]
        ax.axvline(epoch, color=FAINT, linewidth=1, linestyle=":")
        ax.annotate(f"new plan: {plan['epochs']} epochs, learning rate {plan['lr']:g}",
                    xy=(epoch, 0.98), xycoords=ax.get_xaxis_transform(),  # 1 is the top
                    xytext=(-3, 0), textcoords="offset points", rotation=90, ha="right", va="top",
                    color=FAINT, fontsize=9)


def plot_loss(material: Material) -> Figure:
    """How well does the network learn, epoch by epoch?

    Nearly all of the fall of our training loss happens in the first two epochs, and it ends at a
    third of the blog's. Our held-out loss begins far below our training loss, which also counts the
    poor weights of the first steps. The blog's network passes the best linear denoiser only in its
    eighth epoch. Runs that differ only in their seed have nearly the same loss: the band of three
    seeds is hardly wider than the curve.

        training loss          the mean squared error of the predicted noise, averaged over the
                               steps of an epoch. The blog published the same number
        held-out loss          the same error on images that are never trained on, measured after
                               the epoch with the moving average of the weights
        best linear denoiser   of all guesses at the noise that are linear in x_t, the one with the
                               least error. That error is known in closed form for images with given
                               means and covariances; those of the training images are taken. By
                               `python -m tests.experiments.measure --data DIR difficulty`
        seeds                  the band from the lowest to the highest held-out loss of several
                               runs, trained by `python -m tests.experiments.seeds --data DIR`
        new plan               where `train.py --resume --epochs N` made a run of your own longer.
                               The learning rate jumps up there, and the loss may rise at first
    """
    history = material.checkpoint.history
    config = material.checkpoint.config
    figure = Figure(figsize=(10, 5))
    ax = figure.subplots()
    last = max(1, len(history["loss"]))

    # Draw the losses of each epoch, the blog's only beside a run on the same images and levels.
    if config.like_blog:
        last = max(last, len(BLOG_LOSS))
        draw_losses(ax, BLOG_LOSS, BLOG, "the blog's network, training", lift=0)
    held_out = "validation" if config.val_images else "test"
    draw_losses(ax, history["loss"], OURS, "ours, training", lift=6)
    draw_losses(ax, history["held_out"], THIRD,
                f"ours, held-out (averaged weights, {held_out} images)", lift=-6)

    # Draw what they can be compared with, as far as it has been measured.
    if "loss" in material.claims:
        draw_range_over_seeds(ax, material.claims["loss"].get("runs", []))
    if "difficulty" in material.claims:
        draw_linear_loss(ax, material.claims["difficulty"]["linear"])

    # Mark where the plan of the run was changed. Older model files hold no plans.
    draw_new_plans(ax, history.get("plans", []))

    # Label the axes; the losses have a logarithmic scale.
    ax.set_yscale("log")
    ax.set_yticks([.02, .03, .05, .07, .1, .2], ["0.02", "0.03", "0.05", "0.07", "0.1", "0.2"])
    ax.minorticks_off()
    ax.set(xlabel="epoch", ylabel="mean squared error of the predicted noise",
           xlim=(0.6, last + 1.2), xticks=range(1, last + 1, 1 + last // 20),
           title=f"{material.dataset}: loss by epoch")
    ax.legend(*ax.get_legend_handles_labels())  # there may be none yet
    return figure


def plot_trajectory(material: Material) -> Figure:
    """What does the network see, and what does it predict, on the way from noise to a digit?

    The upper row is x_t, one image that the ancestral sampler (Algorithm 2 of DDPM: T small steps,
    each with fresh noise) turns from noise into a digit. Below each x_t is x̂₀, the clean image
    that the network predicts when it sees this x_t. At large t it is a grey blur, a mean of all
    digits that x_t could have come from; it becomes sharp as fewer of them remain possible, and may
    turn from one digit into another on the way. The prediction at t = T means little, because there
    any error in the predicted noise is multiplied by √(1-ᾱ_T)/√ᾱ_T, which is 157 in the shipped
    model.
    """
    levels = shown_levels(material.checkpoint.schedule.T)
    figure = Figure(figsize=(10, 2.45))
    axes = figure.subplots(2, len(levels))

    # Draw a column for each t: the noisy image above, the prediction below.
    for (upper, lower), t in zip(axes.T, levels):
        xt, x0_hat = material.chain[t]
        show_image(upper, xt[SHOWN])
        show_image(lower, x0_hat[SHOWN])
        upper.set_title(f"t = {t}", fontsize=10)

    # Name the two rows.
    for ax, name in zip(axes[:, 0], ("$x_t$", r"$\hat x_0$")):
        ax.set_ylabel(name, rotation=0, labelpad=14, va="center", fontsize=13)
    figure.suptitle(f"{material.dataset}: denoising seed {SEEDS[SHOWN]}. The noisy image, and the "
                    "clean image that the network predicts", fontsize=12)
    return figure


def plot_grid(material: Material) -> Figure:
    """What does the model draw?

    These are the images of the seeds 0 to 31, each drawn in T steps of the ancestral sampler
    (Algorithm 2 of DDPM). None was picked, so malformed digits are as frequent as in any sample.
    The figure guided shows how to draw fewer of them.
    """
    figure = Figure(figsize=(10, 5.35))
    ax = figure.subplots()
    show_tiles(ax, material.chain[0][0])
    ax.set_title(f"{material.dataset}: seeds {SEEDS[0]} to {SEEDS[-1]}, row by row")
    return figure


def animation_frames(material: Material) -> list[Image.Image]:
    """The 32 images of the grid on their way from noise to digits, one frame for each t.

    Each frame is reduced to 16 shades of grey. Noise hardly compresses, and with 256 shades the
    file would be too large for a web page.
    """
    frames = []
    for t in frame_levels(material.checkpoint.schedule.T):
        xt, _ = material.chain[t]
        frames.append(draw_grid(xt, scale=2).quantize(16))
    return frames


# ----------------------------------------------------------- 3. Figures of what was measured
#
# The numbers behind these figures take minutes or hours to measure. The commands named in the
# docstrings measure them once and save them beside the model; DIR is the folder with MNIST. The
# measurements are drawn only for the model file that they were made with. The numbers quoted in the
# docstrings are those of the shipped model.
#
# They check what the blog claims:
#
#   figure       the blog                                            what we found
#   difficulty   t near 10 is hard, and so is t near 950             the second is easy
#   decided      the digit's identity locks in from t = 400 to 100   earlier, mostly above t = 400
#   noise        without fresh noise all samples would be the same   true of p_step, not of DDIM
#   copies       no sample is a copy of a training digit             true
#   epochs       early epochs give smudges, the last sharp digits    strokes are sharp at once
#   bits         the objective is one of maximum likelihood          true of the bound, but not
#                                                                    without its factors
#
# "The classifier" is the same one in all of them: a small convolutional network that was trained to
# name digits and is right on 99.6 % of the test images (pretrained/yardstick.pt).

def average_groups(loss: torch.Tensor, size: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Average the loss over groups of `size` neighbouring t, so that its curve is less ragged.

    loss  (T+1,), the loss at t = 0..T; entry 0 is not used

    Returns the mean t and the mean loss of each group, both (number of groups,).
    """
    t = torch.arange(1.0, len(loss))
    mean_t = torch.stack([group.mean() for group in t.split(size)])
    mean_loss = torch.stack([group.mean() for group in loss[1:].split(size)])
    return mean_t, mean_loss


def share_up_to(loss: torch.Tensor) -> torch.Tensor:
    """The share of the whole loss that lies at 1..t, for t = 1..T: (T+1,) -> (T,)."""
    return loss[1:].cumsum(0) / loss[1:].sum()


def loss_near(loss: torch.Tensor, t: int) -> float:
    """The mean loss at t and its five neighbours on either side: loss (T+1,), entry 0 not used."""
    return loss[max(1, t - 5):t + 6].mean().item()


def half_lies_below(loss: torch.Tensor) -> int:
    """The smallest t such that loss[1] + ... + loss[t - 1] is at least half of all: loss (T+1,)."""
    too_little = loss.cumsum(0) < loss.sum() / 2  # (T+1,), true at t = 0, ..., k - 1
    k = too_little.sum().item()  # the first t at which the sum of 1..t is half of all
    return k + 1


def draw_loss_by_t(ax: Axes, curves: dict[str, tuple[torch.Tensor, str]],
                   last: torch.Tensor) -> None:
    """Draw the left half of the difficulty figure.

    curves  label -> the loss at each t, (T+1,), and its colour
    last    the loss after the last epoch, (T+1,), of which two values are written beside its curve
    """
    T = len(last) - 1
    for label, (loss, color) in curves.items():
        mean_t, mean_loss = average_groups(loss, size=max(1, T // 100))
        ax.plot(mean_t.numpy(), mean_loss.numpy(), color=color, label=label)

    # Mark the two levels that the blog compares: t = 10 and t = 950 of 1,000.
    hard = max(1, T // 100)
    easy = 95 * T // 100
    at_hard = loss_near(last, hard)
    at_easy = loss_near(last, easy)
    ax.plot(hard, at_hard, "o", color=OURS)
    ax.annotate(f"t = {hard}: {at_hard:.2g}", xy=(hard, at_hard), xytext=(0, -45),
                textcoords="offset points", color=OURS, ha="left")
    ax.plot(easy, at_easy, "o", color=OURS)
    ax.annotate(f"t = {easy}: {at_easy:.2g}", xy=(easy, at_easy), xytext=(-10, -4),
                textcoords="offset points", color=OURS, ha="right")

    ax.set(yscale="log", xlabel="t", ylabel="mean squared error of the predicted noise",
           title=f"Loss near t = {hard}: {at_hard / at_easy:,.0f} times that near {easy}")
    ax.legend()


def plot_difficulty(material: Material) -> Figure:
    """At which t is the noise hard to predict?

    On the left is the loss at each t after the first, a middle and the last epoch. From t = 10 to
    t = 950 it falls by a factor of 4,000: at small t the noise is faint and easily taken for a part
    of the digit, at large t nearly everything in the image is noise. The network is far better than
    the best linear denoiser at small t, less than 10 % better from t = 550 on and no better from
    t = 700 on. On the right is the share of the whole loss that lies at 1..t; half of it lies at t
    below 139.

        loss                   the mean squared error of the predicted noise at this t, on the
                               10,000 test images, ten of them at each t, with the moving average of
                               the weights after the epoch. On the left it is averaged over groups
                               of T/100 neighbouring t
        best linear denoiser   of all guesses at the noise that are linear in x_t, the one with the
                               least error, for images with the means and covariances of the
                               training images

    Measured by `python -m tests.experiments.measure --data DIR difficulty`:
        epochs    {epoch: the loss at t = 0..T, (T+1,)}; the entry of t = 0 is 0
        linear    the loss of the best linear denoiser at t = 0..T, (T+1,)
    """
    T = material.checkpoint.schedule.T
    by_epoch = material.claims["difficulty"]["epochs"]
    epochs = sorted(by_epoch)
    last = by_epoch[epochs[-1]]

    # Choose the curves. There are fewer than three epochs if fewer have been measured.
    shown = sorted({epochs[0], epochs[len(epochs) // 2], epochs[-1]})
    colors = [BLOG, THIRD, OURS][-len(shown):]  # the last epoch is blue
    curves = {}
    for epoch, color in zip(shown, colors):
        curves[f"after epoch {epoch}"] = (by_epoch[epoch], color)
    curves["best linear denoiser"] = (material.claims["difficulty"]["linear"], FAINT)

    # Draw the loss on the left and its cumulative share on the right.
    figure = Figure(figsize=(10, 4.6))
    left, right = figure.subplots(1, 2)
    draw_loss_by_t(left, curves, last)
    for loss, color in curves.values():
        right.plot(range(1, T + 1), share_up_to(loss).numpy(), color=color)
    right.set(xlabel="t", ylabel="share of the loss at 1..t", ylim=(0, 1.02),
              title=f"Half of the loss lies at t below {half_lies_below(last)}")
    return figure


def decided_from(levels: dict[int, dict[str, float]], share: float = 0.9) -> int:
    """The largest t from which this share of the reruns end as the same numeral; 0 if none.

    levels  {t: what was measured for reruns from t}; see plot_decided
    """
    return max((t for t, row in levels.items() if row["class"] >= share), default=0)


def draw_phases(ax: Axes, T: int) -> None:
    """Write the names of the blog's four phases at the top, with a line at the end of each."""
    for start, end, phase in ((1.0, 0.6, "static"), (0.6, 0.4, "a blob"),
                              (0.4, 0.1, "identity locks in"), (0.1, 0.0, "polish")):
        ax.axvline(end * T, color="#bbbbbb", linewidth=1)
        ax.text((start + end) / 2 * T, 1.03, phase, ha="center", fontsize=9, color=FAINT)


def plot_decided(material: Material) -> Figure:
    """When is it decided which digit a chain will draw?

    Chains are run again from each t on the horizontal axis. Reruns from t = 600 end as the same
    numeral as the original in 28 % of the cases, reruns from t = 300 in 94 %: the numeral is
    decided in between. The blog divides the chain into four phases, written above the curves: until
    t = 600 static, until 400 a blob, until 100 "identity locks in", then polish. So the blog places
    the decision later than we find it: at t = 400 already 84 % of the reruns keep the numeral. From
    t = 500 on, coarse detail (green) is ahead of the pixels (orange) and of fine detail (grey).

        rerun              x_t is taken from a finished chain, and the steps from t to 0 are taken
                           again with other noise. At t = T not even x_T is kept, which shows what
                           chance alone gives
        same numeral       the classifier gives the same name to the original and to the rerun
        likeness           1 - |difference|²/|difference of unrelated chains|²: 1 is the same
                           picture, 0 is as different as two unrelated ones
        detail present     1 - |x̂₀ - x₀|²/|x₀ - mean|², where x₀ is the finished image, x̂₀ the
                           network's prediction of it at t, and mean the mean of all finished
                           images: 1 if all is there, 0 if nothing is but the mean. Every image is
                           a sum of waves; the waves with at most 3.5 periods across the image are
                           coarse detail, all others fine detail. Negative values are drawn as 0

    Measured by `python -m tests.experiments.measure --data DIR decided` on 32 chains of the
    ancestral sampler (Algorithm 2 of DDPM), each run again three times from each t:
        levels    {t: {"class": ..., "pixels": ..., "low": ..., "high": ...}}, the four curves
    """
    levels = material.claims["decided"]["levels"]
    T = max(levels)
    figure = Figure(figsize=(10, 4.8))
    ax = figure.subplots()

    # Draw the four curves.
    for key, color, style, label in (
            ("class", OURS, "o-", "reruns that end as the same numeral"),
            ("pixels", BLOG, "s-", "likeness of reruns, by pixel"),
            ("low", THIRD, "^--", "coarse detail present in the prediction"),
            ("high", FAINT, "v--", "fine detail present in the prediction")):
        shares = [max(0, row[key]) for row in levels.values()]
        ax.plot(list(levels), shares, style, color=color, markersize=5, label=label)

    # Write the blog's phases above them. Let t fall from left to right, as in a chain.
    draw_phases(ax, T)
    ax.set(xlim=(T, 0), ylim=(0, 1.1), ylabel="share",
           xlabel="t from which the chain is run again with other noise (above: the blog's phases)",
           title=f"Nine of ten reruns from t = {decided_from(levels)} end as the same numeral")
    ax.legend(loc="center left", fontsize=10)
    return figure


def plot_noise(material: Material) -> Figure:
    """What does the fresh noise in each step do?

    Each row shows samples from the same eight x_T. The first three rows are the ancestral sampler
    (Algorithm 2 of DDPM) in 1,000 steps, whose fresh noise has the variance β̃_t, β_t, or 0.
    Between β̃_t and β_t there is hardly a difference, but without fresh noise all samples become
    the same 1. DDIM (last row) adds no fresh noise either and does not collapse: it puts the
    noise that it finds in x_t back, as much of it as the next level needs (sample.py, section 4).

        spread       how different the samples are: the variance of a pixel over the samples,
                     averaged over all pixels, which lie in [-1, 1]. The title gives it for test
                     digits
        clear        the share of the samples to which the classifier gives a probability above 0.9
                     of being some digit. It is 97 % for test digits. The 100 % without noise says
                     only that the one image that is left is a clear 1
        0-4, 5-9     how many samples the classifier calls a 0, 1, 2, 3, 4 and a 5, 6, 7, 8, 9

    Measured by `python -m tests.experiments.measure --data DIR noise`, for each row:
        spread, confident (which is "clear"), classes, count (the number of samples)
        images    the first eight samples, uint8 (8, 1, 28, 28)
    """
    measurements = material.claims["noise"]

    # Write the numbers of each row beside its images.
    rows = []
    for label, chain in ((r"$\tilde\beta_t$", "ddpm 1000"), (r"$\beta_t$", "ddpm 1000, beta"),
                         ("none", "ddpm 1000, zero"), ("DDIM,\n50 steps", "ddim 50")):
        row = measurements[chain]
        counts = [str(count) for count in row["classes"]]
        note = (f"spread {row['spread']:.2g}\n"
                f"clear {row['confident']:.0%}\n"
                f"0-4 {' '.join(counts[:5])}\n"
                f"5-9 {' '.join(counts[5:])}")
        rows.append((label, row["images"], note))

    # Say in the title what they are to be compared with.
    samples = measurements["ddim 50"]["count"]  # the same in all rows
    spread = measurements["test images"]["spread"]
    return draw_rows(f"Variance of the fresh noise; {samples} samples counted by digit (spread of "
                     f"test digits: {spread:.2g})", rows)


def alternate_rows(upper: torch.Tensor, lower: torch.Tensor, columns: int = 8) -> torch.Tensor:
    """Put each row of `columns` images of `lower` below the same row of `upper`.

    Both are (N, 1, H, W); the result is (2N, 1, H, W), row by row.
    """
    rows = []
    for upper_row, lower_row in zip(upper.split(columns), lower.split(columns)):
        rows.append(upper_row)
        rows.append(lower_row)
    return torch.cat(rows)


def plot_copies(material: Material) -> Figure:
    """Does the model copy the digits that it was trained on?

    On the left are 32 samples (odd rows), each above the training digit that is nearest to it (even
    rows). On the right are two histograms of the distance to the nearest training digit, one for
    samples and one for test digits, with dashed lines at the medians. Copies would lie at a
    distance of 0, and there are none: the nearest sample is at 0.077, the nearest test digit, which
    cannot be a copy, at 0.059. The median is 0.331 for samples and 0.310 for test digits. The small
    hump at 0.1 is made of the digit 1, whose images are all alike.

        distance    the root of the mean squared difference between the pixels of two images, which
                    lie in [-1, 1]

    Measured by `python -m tests.experiments.measure --data DIR copies` on samples of the ancestral
    sampler (Algorithm 2 of DDPM):
        samples, test      the distances of N samples and of as many test digits, each (N,)
        images, nearest    the first 32 samples and the training digits nearest to them, each
                           uint8 (32, 1, 28, 28)
    """
    measurements = material.claims["copies"]
    samples = measurements["samples"]
    test = measurements["test"]
    figure = Figure(figsize=(10, 5))
    left, right = figure.subplots(1, 2)

    # Draw samples and their nearest training digits.
    pairs = alternate_rows(measurements["images"], measurements["nearest"])
    show_tiles(left, from_uint8(pairs))
    left.set_title("samples (odd rows) above the nearest\nof the training digits (even rows)")

    # Draw the distances.
    for distances, color, name in ((test, FAINT, "test digits"), (samples, OURS, "samples")):
        right.hist(distances.numpy(), bins=30, range=(0, 0.6), color=color, alpha=0.6,
                   label=f"{len(distances)} {name}")
        right.axvline(distances.median(), color=color, linestyle="--")
    right.set(xlabel="distance to the nearest training digit", ylabel="number of digits",
              title=f"median distance of samples {samples.median():.3f}, of test digits "
                    f"{test.median():.3f}")
    right.legend()
    return figure


def plot_epochs(material: Material) -> Figure:
    """How do the samples change while the network learns?

    Each row is drawn from the same eight seeds by the same sampler (Algorithm 2 of DDPM); only the
    weights differ, which are their moving average after several epochs. Strokes are sharp after the
    first epoch already. What is learned later is which strokes make a numeral: the second image can
    be read as a 2 only after 15 epochs. The held-out loss beside each row is the mean squared error
    of the predicted noise on test images with these weights. It falls by only 18 % from the first
    row to the last, so small differences in the loss are visible in the samples.

    Measured by `python -m tests.experiments.measure --data DIR epochs`:
        images    {epoch: the eight samples, uint8 (8, 1, 28, 28)}
    """
    held_out = material.checkpoint.history["held_out"]
    rows = []
    for epoch, images in material.claims["epochs"]["images"].items():
        note = f"held-out loss\n{held_out[epoch - 1]:.4f}"  # the list begins with epoch 1
        rows.append((f"epoch {epoch}", images, note))
    return draw_rows("The same eight seeds after several epochs", rows)


def terms_of_the_bound(measurement: dict) -> torch.Tensor:
    """The terms of the bound at t = 1..T, (T,), with NaN where one is not known."""
    terms = [torch.nan if term is None else term for term in measurement["terms"]]
    return torch.tensor(terms[1:])  # the list has an entry for t = 0, which has no term


def share_of_the_bits(terms: torch.Tensor, last: int) -> float:
    """The share of the terms at t = 1..last in the sum of all, (T,); unknown ones count as 0."""
    return (terms[:last].nansum() / terms.nansum()).item()


def plot_bits(material: Material) -> Figure:
    """How many bits does the model need for a pixel, and at which t?

    On the left is the number of bits per pixel that each t costs, on the right their sum over 1..t,
    for three choices of the variance σ_t² of the sampler's step. A pixel of a test digit takes 8
    bits uncompressed; with the optimal variance at most 1.563 are needed. Most of the bits are
    spent at t up to 50, where the image is nearly clean and to which the training loss gives little
    weight: 89 % with β̃_t, 88 % with the optimal variance.

        bits per pixel    an image to which the model gives the probability p can be stored in
                          -log2 p bits. The variational bound (train.py, section 1) is a sum over t
                          that is at least as large; here it is divided by the number of pixels.
                          The term for t ≥ 2 measures how far the model's step from t to t - 1 is
                          from the exact one, and the term for t = 1 what it costs to name x₀ when
                          x₁ is known. The part of x_T is less than 0.00005 and not drawn; the
                          totals contain it
        optimal           the variance that makes each term as small as possible: β̃_t plus the mean
                          squared error of the predicted mean of the step. At t = 1, where this
                          does not apply, it is the best of many values that were tried. (The curve
                          of β̃_t has β̃₂ there, because β̃₁ is 0.)
        ±                 the standard error of the mean over the test images

    Measured by `python -m tests.experiments.bound --data DIR` on the 10,000 test images, for each
    variance:
        terms    the bits per pixel that each t = 0..T costs; None where they are not known
        total    [bits per pixel, standard error]
    """
    T = material.checkpoint.schedule.T
    bits = material.claims["bits"]
    figure = Figure(figsize=(10, 4.6))
    left, right = figure.subplots(1, 2)

    # Draw the terms on the left and their sums on the right.
    for variance, label, color in (("beta", r"$\beta_t$", BLOG), ("optimal", "optimal", THIRD),
                                   ("beta_tilde", r"$\tilde\beta_t$", OURS)):
        terms = terms_of_the_bound(bits[variance])
        total, error = bits[variance]["total"]
        left.plot(range(1, T + 1), terms.numpy(), color=color, linewidth=1.2, label=label)
        right.plot(range(1, T + 1), terms.nan_to_num().cumsum(0).numpy(), color=color,
                   label=rf"{label}: {total:.3f} $\pm$ {error:.3f}")

    # Label the axes.
    share = share_of_the_bits(terms_of_the_bound(bits["beta_tilde"]), last=50)
    left.set(xscale="log", yscale="log", xlabel="t", ylabel="bits per pixel, term of t",
             title=rf"{share:.0%} of the bits are spent at t up to 50 ($\tilde\beta_t$)")
    right.set(xscale="log", xlabel="t", ylabel="sum of the terms 1..t", ylim=(0, None),
              title="Bits per pixel of a test digit, at most")
    right.legend(title=r"variance $\sigma_t^2$", loc="lower right")
    return figure


def is_shown(chain: str) -> bool:
    """Whether the samplers figure has a row for this chain.

    Names such as "ddim 20" are a sampler and its number of steps. What follows a comma is a change:
    restarts, which are shown, or another variance or network, which other figures and tables show.
    """
    return "," not in chain or "restart" in chain


def plot_samplers(material: Material) -> Figure:
    """Which sampler draws good digits in few steps?

    Each row shows eight samples. On its left stand the sampler and its number of steps, on its
    right the distance of its samples to test digits and the time that 32 samples take on two CPU
    cores. With fresh noise, 20 steps of sde-dpm++ are as good as 1,000 of ddpm (distances 4.3 and
    4.9; two sets of digits of the same sampler may differ by more than 1, so 5.9 for its 50 steps
    does not show that they are worse). The samplers without fresh noise, ddim and dpm++, come
    closer to the test digits with more steps, but remain behind. The best digits here are the
    restarted ones (2.9); guidance, in section 4, gives still better ones.

        ddpm         the ancestral sampler, Algorithm 2 of DDPM, with fresh noise in each step
        ddim         a sampler without fresh noise, which uses the noise that is in x_t again
        dpm++        DPM-Solver++: as ddim, but x̂₀ is extrapolated from the last two predictions
        sde-dpm++    dpm++ with the fresh noise of ddpm
        restarted    the finished samples are noised again to t = 0.4 T and denoised in ten steps,
                     three times, then three times more from t = 0.3 T. Malformed digits get another
                     chance each time
        distance     the Fréchet distance to the 10,000 test images. The classifier turns an image
                     into 64 features (its last layer but one). Two sets of images, with means μ₁,
                     μ₂ and covariance matrices C₁, C₂ of these features, are at the distance
                         |μ₁ - μ₂|² + trace(C₁ + C₂ - 2 (C₁C₂)^½)
                     which is 0 if both agree. (The trace is the sum of the diagonal, M^½ the matrix
                     whose square is M. For one feature it is (μ₁ - μ₂)² + (σ₁ - σ₂)². Think of two
                     heaps of sand with these means and covariances: it is the mean squared
                     distance by which grains must be moved to turn one into the other.) It is
                     large for digits of poor quality, and also for good ones of too little variety.
                     It depends on the number of images, so compare only rows with the same number.
                     The title gives it for real digits: sets of training images of that number

    Measured by `python -m tests.experiments.measure --data DIR samplers`:
        chains    {chain: its numbers}, among them seconds and distances = {number of images: ...}
        images    {chain: its first eight samples, uint8 (8, 1, 28, 28)}
        floor     {number of training images: (mean, standard deviation) of their distance}
    """
    measurements = material.claims["samplers"]

    # Write distance and time beside the images of each chain.
    rows = []
    for chain, row in measurements["chains"].items():
        if is_shown(chain):
            count = max(row["distances"])  # the largest number of images is the most reliable
            note = (f"distance {row['distances'][count]:.1f}\n"
                    f"of {count:,} images\n"
                    f"32 digits in {row['seconds']:.2g} s")
            rows.append((chain.replace(" ", "\n"), measurements["images"][chain], note))

    # Say in the title what the distances are to be compared with.
    real = ", ".join(f"{mean:.1f} of {count:,}"
                     for count, (mean, _) in measurements["floor"].items())
    return draw_rows("Samplers, steps, and Fréchet distance to test digits (that of real digits:\n"
                     f"{real} images)", rows)


# --------------------------------------------------------------------- 4. Figures of guidance
#
# Guidance goes beyond the blog (sample.py, section 7). Two networks answer: the model, and a guide,
# which is an earlier state of the same network and makes the same mistakes, only larger ones. The
# answers are combined to ε̂ = ε_worse + w (ε_model - ε_worse). So w = 0 is the guide alone, w = 1
# the model alone, which is called unguided, and a larger w goes beyond the model. Guidance may be
# limited to an interval of t; at all others the model answers alone.

# The two settings that the figure guided compares, by their names in the measurements.
UNGUIDED = "sde-dpm++ 20"
GUIDED = "sde-dpm++ 20, epoch 2, w = 2, t of 150 to 700"


def describe_guide(row: dict) -> str:
    """The guide in words: the epoch after which it was kept, and where it acts."""
    words = f"guide: epoch {row['guide']}"
    if row["interval"] is not None:
        low, high = row["interval"]
        words += f", t from {low} to {high}"
    return words


def describe_restarts(row: dict) -> str:
    """How many restarts there are, as the end of a longer text."""
    if row["restarts"]:
        return f", {len(row['restarts'])} restarts"
    return ""


def describe_setting(row: dict) -> str:
    """How a set of digits was drawn and what came of it, in three lines; see plot_guided."""
    guidance = "unguided"
    if row["guide"] is not None:
        guidance = f"w = {row['weight']:g}, {describe_guide(row)}"
    return (f"{row['steps']} steps of {row['sampler']}{describe_restarts(row)}\n{guidance}\n"
            f"{row['confident']:.0%} of {row['count']:,} digits are clear, "
            f"{row['evaluations']:.0f} evaluations each")


def plot_guided(material: Material) -> Figure:
    """What does guidance change?

    On the left are the digits of the seeds 0 to 31, drawn in a few steps without guidance, on the
    right those of the same seeds with guidance. None was picked. Both sides have the same noise, so
    a clear digit mostly remains what it was, while most malformed ones become a numeral. The price
    is that strokes become a little bolder, and that a second network has to answer.

        steps of sde-dpm++    a sampler that extrapolates the clean image from the last two
                              predictions and adds fresh noise (sample.py, section 5)
        w, guide, t from      how far guidance goes, the epoch after which the guide was kept, and
                              the t at which it guides (all, if the title names none)
        clear                 the classifier gives a probability above 0.9 of being some digit
        evaluations           how often a network looks at an image until it is finished; those of
                              the guide count as much as those of the model

    Measured by `python -m tests.experiments.guidance --data DIR report`:
        rows      {setting: its numbers}, among them sampler, steps, restarts, guide (an epoch, or
                  None), weight (which is w), interval ((low, high), or None), confident (which is
                  "clear"), count (the number of digits) and evaluations
        images    {setting: its first 32 digits, uint8 (32, 1, 28, 28)}
    """
    measurements = material.claims["guidance"]
    figure = Figure(figsize=(10, 3.4))
    for ax, name in zip(figure.subplots(1, 2), (UNGUIDED, GUIDED)):
        show_tiles(ax, from_uint8(measurements["images"][name]))
        ax.set_title(describe_setting(measurements["rows"][name]), fontsize=11)
    figure.suptitle(f"{material.dataset}: seeds {SEEDS[0]} to {SEEDS[-1]}, row by row", fontsize=12)
    return figure


def curves_of_guides(rows: dict[str, dict]) -> list[list[dict]]:
    """Sort settings into curves along w.

    rows  {setting: its numbers}; see plot_tradeoff. Those with restarts are left out

    Returns a list of curves. Each is a list of rows that have the same guide and interval, in the
    order of w. It begins with the unguided row, which is what any guide gives at w = 1. First are
    the curves without an interval, then those with one.
    """
    curves = {}
    for row in rows.values():
        if row["guide"] is not None and not row["restarts"]:
            key = (row["interval"], row["guide"])
            if key not in curves:
                curves[key] = [rows[UNGUIDED]]
            curves[key].append(row)

    order = sorted(curves, key=lambda key: (key[0] is not None, key[1]))
    return [sorted(curves[key], key=lambda row: row["weight"]) for key in order]


def draw_curve(ax: Axes, curve: list[dict], count: int, color: str) -> None:
    """Draw one curve along w, and write w beside each of its points that is guided.

    curve  rows with the same guide and interval, in the order of w
    count  the distances are those of so many digits
    """
    last = curve[-1]  # not curve[0], the unguided row, which has no guide
    style = "o-"
    align = "right"  # the labels stand to the left of the points
    shift = -4
    if last["interval"] is not None:
        style = "s--"
        align = "left"
        shift = 4

    distances = [row["distances"][count] for row in curve]
    clear = [row["confident"] for row in curve]
    ax.plot(distances, clear, style, color=color, markersize=4, label=describe_guide(last))
    for row, distance, share in zip(curve, distances, clear):
        if row["guide"] is not None:
            ax.annotate(f"{row['weight']:g}", xy=(distance, share), xytext=(shift, 0), ha=align,
                        va="center", color=color, fontsize=8, textcoords="offset points")


def draw_curves(ax: Axes, curves: list[list[dict]], count: int) -> None:
    """Draw all curves, those of the same guide in the same colour; see draw_curve."""
    guides = sorted({curve[-1]["guide"] for curve in curves})
    colors = dict(zip(guides, cycle((OURS, BLOG, THIRD, FOURTH))))
    for curve in curves:
        draw_curve(ax, curve, count, colors[curve[-1]["guide"]])


def draw_landmark(ax: Axes, row: dict, count: int, name: str) -> None:
    """Draw a point that the curves can be compared with, and write its name beside it."""
    point = (row["distances"][count], row["confident"])
    ax.plot(*point, "D", color="black", markersize=6)
    ax.annotate(name, xy=point, xytext=(8, -12), textcoords="offset points", fontsize=10)


def plot_tradeoff(material: Material) -> Figure:
    """Which guide and which w are best?

    Each point is a set of digits drawn with one guide and one w. The higher it is, the more digits
    are clear; the further to the left, the closer they are to real ones. So the best points are at
    the top left. Every curve begins at the unguided digits, which are those of w = 1; the numbers
    along it are w. Guidance first makes digits both clearer and closer to
    real ones. If w is too large for the guide, the curve turns to the right: the digits are clear,
    but their strokes are too bold, and some numerals too frequent. With epoch 1 as the guide this
    happens from w = 2 on, with epoch 2 from 2.5 on, and with later ones not up to w = 3. (The
    zigzag of epoch 5 is chance.)

        clear       the share of digits to which the classifier gives a probability above 0.9 of
                    being some digit
        distance    the Fréchet distance to 10,000 training images (plot_samplers explains it).
                    Small differences mean little: for sets of 500 real digits its standard
                    deviation is 1.2
        guide       the moving average of the weights after this epoch. It guides at the t that are
                    named (dashed curves), or at all t (solid curves)

    The comparison is with training images, so that the test images can judge what was chosen.

    Measured by `python -m tests.experiments.guidance --data DIR choose`:
        rows    {setting: its numbers}, as for plot_guided, and distances = {number of images: ...};
                those with restarts are not drawn
        real    confident and distances of real digits, if they were measured
    """
    measurements = material.claims["guidance_choice"]
    rows = measurements["rows"]
    count = max(rows[UNGUIDED]["distances"])  # the largest number of digits is the most reliable
    figure = Figure(figsize=(10, 7))
    ax = figure.subplots()

    # Draw the curves, and what they can be compared with.
    draw_curves(ax, curves_of_guides(rows), count)
    draw_landmark(ax, rows[UNGUIDED], count, "unguided")
    if "real" in measurements:
        draw_landmark(ax, measurements["real"], count, "real digits")

    # Label the axes.
    ax.set_xscale("log")
    ax.xaxis.set_major_formatter("{x:g}")
    ax.xaxis.set_minor_formatter("{x:g}")
    ax.yaxis.set_major_formatter(PercentFormatter(1))
    ax.set(xlabel=f"Fréchet distance of {count:,} digits to training images (less is better)",
           ylabel="clear digits (more is better)", title="Guidance: w along each curve")
    ax.legend()
    return figure


def plot_ladder(material: Material) -> Figure:
    """What happens to a digit as w grows?

    Each column is one seed, with the same noise in all rows. In the first row the guide draws
    alone (w = 0), in the second the model alone (w = 1); below, guidance goes beyond the model.
    Most malformed digits become a numeral, and most clear ones remain what they are. A w that is
    too large makes strokes bold and uneven, and turns clear digits into others.

        mean pixel    the mean of the row's eight images over all pixels, which lie in [-1, 1]. The
                      bolder the strokes, the larger it is

    Measured by `python -m tests.experiments.guidance --data DIR report`:
        ladder    {w: the digits of the seeds 0 to 7, uint8 (8, 1, 28, 28)}, drawn in 20 steps of
                  sde-dpm++ with guidance at all t
    """
    notes = {0: "the guide alone\n", 1: "the model alone\n"}
    rows = []
    for w, images in sorted(material.claims["guidance"]["ladder"].items()):
        brightness = from_uint8(images).mean().item()
        rows.append((f"w = {w:g}", images, f"{notes.get(w, '')}mean pixel {brightness:.2f}"))
    return draw_rows("The same eight seeds as guidance grows", rows)


# -------------------------------------------------------------- 5. Figures of digits to order
#
# These figures are of another model: one that train.py --labels has trained, which is told which
# digit to draw (sample.py, section 8). It is the one named by --checkpoint, or else your own
# finished run in runs/mnist-labels, or else pretrained/labels/model.pt.
#
# Its guide is the same network, not told the label: ε̂ = ε(x_t, t) + w (ε(x_t, t, c) - ε(x_t, t)).
# So w = 0 draws any digit, w = 1 the digit c without guidance, and a larger w goes beyond it.

# How the figure digits is drawn, and what the figure weight shows.
ORDER_WEIGHT = 1.5
ORDER_INTERVAL = (150, 700)
SHOWN_WEIGHTS = (0.0, 1.0, 1.5, 2.0, 3.0, 5.0, 8.0)


def draw_to_order(checkpoint: Checkpoint, labels: torch.Tensor, seeds: list[int], weight: float,
                  interval: tuple[int, int] | None = None) -> torch.Tensor:
    """Images of the classes that are asked for, drawn in 20 steps of sde-dpm++.

    labels            (B,) integers, the class of each image
    seeds             B integers
    weight, interval  w of classifier-free guidance, and the t at which it acts; None is all

    Returns (B, 1, H, W) on the CPU.
    """
    model = checkpoint.model
    device = next(model.parameters()).device
    network = Guided(Labelled(model, labels.to(device)), model, weight, interval)
    size = model.config["size"]
    chain = sample(network, checkpoint.schedule, seeds, "sde-dpm++", shape=(1, size, size))
    for _, _, x0_hat in chain:
        images = x0_hat  # the last one is the finished image
    return images.cpu()


def images_of_classes(checkpoint: Checkpoint, seeds: int = 10) -> torch.Tensor:
    """The first ten classes, a row each, drawn from the seeds 0, 1, 2, ..., a column each."""
    rows = len(checkpoint.classes[:10])
    labels = torch.arange(rows).repeat_interleave(seeds)
    return draw_to_order(checkpoint, labels, list(range(seeds)) * rows, ORDER_WEIGHT,
                         ORDER_INTERVAL)


def images_of_weights(checkpoint: Checkpoint) -> torch.Tensor:
    """The first ten classes, a row each, at growing w, a column each; class c has the seed c."""
    labels = torch.arange(len(checkpoint.classes[:10]))
    columns = [draw_to_order(checkpoint, labels, labels.tolist(), w) for w in SHOWN_WEIGHTS]
    return torch.stack(columns, dim=1).flatten(0, 1)  # row by row


def show_table(ax: Axes, images: torch.Tensor, rows: list[str], columns: list[str]) -> None:
    """Draw images, (rows * columns, 1, H, W), row by row, with a name for each row and column."""
    show_tiles(ax, images, len(columns))
    height, width = images.shape[2:]
    middle_of_rows = [2 + height / 2 + k * (height + 2) for k in range(len(rows))]
    middle_of_columns = [2 + width / 2 + k * (width + 2) for k in range(len(columns))]
    ax.set_yticks(middle_of_rows, rows)
    ax.set_xticks(middle_of_columns, columns)
    ax.tick_params(length=0, labelsize=11, top=False, labeltop=True, labelbottom=False)
    ax.grid(False)


def plot_digits(material: Material) -> Figure:
    """Does the network draw what it is asked for?

    Each row is a digit that was asked for, each column a seed. None was picked. The images of a
    column begin with the same noise and get the same fresh noise, and only the label differs; so
    slant, width and boldness of the stroke tend to be alike down a column, while the label decides
    which digit it is. They were drawn in 20 steps of sde-dpm++, with classifier-free guidance of
    w = 1.5 at t from 150 to 700.
    """
    checkpoint = material.checkpoint
    figure = Figure(figsize=(10, 10))
    ax = figure.subplots()
    columns = [f"seed {seed}" for seed in range(10)]
    show_table(ax, images_of_classes(checkpoint), checkpoint.classes[:10], columns)
    low, high = ORDER_INTERVAL
    ax.set_title(f"{material.dataset} to order: one class a row, one seed a column "
                 f"(w = {ORDER_WEIGHT:g} at t from {low} to {high})")
    return figure


def plot_weight(material: Material) -> Figure:
    """What does the label do as w grows?

    Each row is one seed, with the same noise in all columns, and is asked to be the digit on its
    left; w grows from left to right, and guidance acts at all t. In the first column (w = 0) the
    label has no effect: this is what the seed draws if nothing is asked for. In the second (w = 1)
    the label is told, without guidance. From there on digits become more like what one imagines
    under their name, and more alike. If w is too large, strokes become bold and lose their shape.
    """
    checkpoint = material.checkpoint
    figure = Figure(figsize=(10, 10))
    ax = figure.subplots()
    notes = {0: "\nnot told", 1: "\nunguided"}
    columns = [f"w = {w:g}{notes.get(w, '')}" for w in SHOWN_WEIGHTS]
    show_table(ax, images_of_weights(checkpoint), checkpoint.classes[:10], columns)
    ax.set_title(f"{material.dataset} to order: one class and one seed a row, w from left to right")
    return figure


def curves_of_orders(rows: dict[str, dict]) -> list[list[dict]]:
    """Sort settings into curves along w.

    rows  {setting: its numbers}; see plot_labels

    Returns a list of curves. Each is a list of rows that have the same guide and interval, in the
    order of w. It begins with the row of w = 1, which is the same for any guide. The guides are in
    the order of `rows`, and of one guide the curve without an interval is first.
    """
    unguided = next(row for row in rows.values() if row["weight"] == 1)
    curves = {}
    for row in rows.values():
        if row["weight"] > 1:
            key = (row["guide"], row["interval"])
            if key not in curves:
                curves[key] = [unguided]
            curves[key].append(row)
    guides = list(dict.fromkeys(guide for guide, _ in curves))
    order = sorted(curves, key=lambda key: (guides.index(key[0]), key[1] is not None))
    return [sorted(curves[key], key=lambda row: row["weight"]) for key in order]


def draw_orders(ax: Axes, curves: list[list[dict]], count: int, share: str) -> None:
    """Draw curves along w, and write w beside each point that is guided.

    curves  as curves_of_orders returns them; those of one guide have the same colour, the one
            without an interval is solid and the others are dashed and dotted
    count   the distances are those of so many digits
    share   the name of the number on the vertical axis
    """
    guides = list(dict.fromkeys(curve[-1]["guide"] for curve in curves))
    colors = dict(zip(guides, cycle((OURS, BLOG, THIRD, FOURTH))))
    drawn = dict.fromkeys(guides, 0)  # how many curves of each guide
    for curve in curves:
        last = curve[-1]
        style = ("o-", "s--", "^:")[drawn[last["guide"]] % 3]
        drawn[last["guide"]] += 1
        label = f"guide: {last['guide']}"
        if last["interval"] is not None:
            label += f", t from {last['interval'][0]} to {last['interval'][1]}"
        color = colors[last["guide"]]
        ax.plot([row["distances"][count] for row in curve], [row[share] for row in curve], style,
                color=color, markersize=4, label=label)
        for row in curve[1:]:
            ax.annotate(f"{row['weight']:g}", xy=(row["distances"][count], row[share]),
                        xytext=(4, -2), textcoords="offset points", color=color, fontsize=8)


def draw_guidance_without_labels(ax: Axes, rows: dict[str, dict], count: int) -> None:
    """Draw the curves of plot_tradeoff for the guide after epoch 2 in grey, to compare with."""
    for curve in curves_of_guides(rows):
        if curve[-1]["guide"] == 2:
            style = "-" if curve[-1]["interval"] is None else "--"
            ax.plot([row["distances"][count] for row in curve],
                    [row["confident"] for row in curve], style, color=FAINT, linewidth=1,
                    label=f"no labels, {describe_guide(curve[-1])}")


def plot_labels(material: Material) -> Figure:
    """What do the label and a growing w bring, and at what price?

    Each point is a set of digits. The further to the left in its panel, the closer they are to real
    ones; the higher, the more of them are clear (left panel) or are the digit that was asked for
    (right panel). Every curve begins at w = 1, where the network is told the label
    and not guided; the numbers along it are w. The grey curves are the digits of the model without
    labels, guided by its own earlier state (plot_tradeoff).

        clear           the share of digits for which the classifier gives one of the ten classes a
                        probability above 0.9, each of the ten asked for equally often
        named           the share that the classifier gives the name that was asked for
        distance        the Fréchet distance to 10,000 training images (plot_samplers explains it),
                        of digits asked for as often as they are in MNIST. Small differences mean
                        little: for sets of 500 real digits its standard deviation is 1.2
        guide           the worse network: the same one, not told the label (classifier-free
                        guidance); or early.pt, an earlier state of it, not told the label or told
                        it as well. It guides at the t that are named, or at all t (solid curves)

    Measured by `python -m tests.experiments.labels --data DIR choose`:
        rows    {setting: its numbers}, among them guide, weight (which is w), interval ((low,
                high), or None), named, confident (which is "clear") and distances = {number of
                images: ...}
        real    named, confident and distances of real digits
    """
    measurements = material.claims["labels_choice"]
    curves = curves_of_orders(measurements["rows"])
    count = max(curves[0][0]["distances"])  # the largest number of digits is the most reliable
    figure = Figure(figsize=(10, 6))
    axes = figure.subplots(1, 2)

    # Draw the curves, and what they can be compared with.
    for ax, share, name in zip(axes, ("confident", "named"), ("clear", "named as asked for")):
        draw_orders(ax, curves, count, share)
        unguided = curves[0][0]
        for row, label in ((unguided, "w = 1"), (measurements["real"], "real digits")):
            if count in row["distances"]:
                point = (row["distances"][count], row[share])
                ax.plot(*point, "D", color="black", markersize=6)
                ax.annotate(label, xy=point, xytext=(8, -12), textcoords="offset points")
        ax.set(xscale="log", xlabel=f"Fréchet distance of {count:,} digits", title=name)
        ax.xaxis.set_major_formatter("{x:g}")
        ax.xaxis.set_minor_formatter("{x:g}")
        ax.yaxis.set_major_formatter(PercentFormatter(1))
    choice = material.claims.get("guidance_choice")
    if choice is not None and count in choice["rows"][UNGUIDED]["distances"]:
        draw_guidance_without_labels(axes[0], choice["rows"], count)

    handles, names = axes[0].get_legend_handles_labels()
    figure.legend(handles, names, loc="outside lower center", ncols=2, fontsize=9)
    figure.suptitle("Digits to order: w along each curve", fontsize=12)
    return figure


FIGURES = {"forward": plot_forward, "embedding": plot_embedding, "loss": plot_loss,
           "trajectory": plot_trajectory, "grid": plot_grid, "digits": plot_digits,
           "weight": plot_weight}
CLAIMS = {"difficulty": plot_difficulty, "decided": plot_decided, "noise": plot_noise,
          "copies": plot_copies, "epochs": plot_epochs, "bits": plot_bits,
          "samplers": plot_samplers, "guided": plot_guided, "tradeoff": plot_tradeoff,
          "ladder": plot_ladder, "labels": plot_labels}


# =========================================================================================
# Below this line is plumbing: reading what was measured, sampling, saving, the command line.
# =========================================================================================

STYLE = {"font.size": 11, "axes.titlesize": 12, "axes.spines.top": False,
         "axes.spines.right": False, "axes.grid": True, "grid.color": "#e6e6e6",
         "lines.linewidth": 1.5, "legend.frameon": False, "legend.fontsize": 10,
         "image.cmap": "gray", "image.interpolation": "nearest", "savefig.dpi": 150,
         "figure.facecolor": "white", "figure.constrained_layout.use": True}

KNOWN = [*FIGURES, "animation", *CLAIMS]  # the names of all figures, in the order of drawing

# The measurements of those figures that are not drawn from one of their own name.
SOURCES = {"guided": "guidance", "tradeoff": "guidance_choice", "ladder": "guidance",
           "labels": "labels_choice"}

# The figures of a model that was trained with labels.
LABELLED = ("digits", "weight", "labels")


def fingerprint(path: Path) -> str:
    """The first digits of the SHA-256 of a model file, by which measurements name it."""
    return hashlib.sha256(path.read_bytes()).hexdigest()[:12]


def measured(path: Path) -> dict:
    """Read what has been measured of a model file from the files beside it.

    path  the model file; claims.pt, bound.json and seeds.json in its folder are read if they exist

    Returns {name of the figure: its numbers}, with the name in SOURCES instead if there is one.
    Measurements of any other model are left out. Raises ValueError if a file is damaged.
    """
    mark = fingerprint(path)
    measurements = {}
    try:
        # Read claims.pt, which holds several figures, and the files that hold one figure each.
        claims = path.parent / "claims.pt"
        if claims.exists():
            measurements.update(torch.load(claims, weights_only=True))
        for name, file in (("bits", path.parent / "bound.json"),
                           ("loss", path.parent / "seeds.json")):
            if file.exists():
                measurements[name] = json.loads(file.read_text())

        # Keep what was measured of this very file.
        return {name: part for name, part in measurements.items() if part.get("model") == mark}
    except Exception as error:  # torch.load raises many kinds if a file is damaged
        raise ValueError(f"what was measured beside {path} cannot be read; repeat it") from error


def needs_samples(names: list[str], claims: dict) -> bool:
    """Whether one of the named figures is drawn from samples of the model."""
    for name in names:
        if name in ("trajectory", "grid", "animation"):
            return True
        if name == "forward" and "digits" not in claims:
            return True
    return False


def gather(checkpoint: Checkpoint, names: list[str], claims: dict, device: str = "cpu",
           mark: str = "") -> Material:
    """Collect what the named figures need; sample only if one of them needs it, and only once.

    claims  what measured() has read
    device  the name of a device, as for --device
    mark    the fingerprint of the model file
    """
    if not needs_samples(names, claims):
        return Material(checkpoint, {}, claims, mark)

    # Move the model to the device.
    chosen = pick_device(device)
    prepare_device(chosen)
    model = checkpoint.model.to(chosen)

    # Run one chain of T steps, and keep the levels that are drawn.
    T = checkpoint.schedule.T
    size = model.config["size"]
    wanted = {*shown_levels(T), *frame_levels(T)}
    steps = sample(model, checkpoint.schedule, SEEDS, shape=(1, size, size))
    chain = {}
    for t, xt, x0_hat in tqdm(steps, total=T + 1, unit=" steps", desc="sampling", disable=None):
        if t in wanted:
            chain[t] = (xt.cpu(), x0_hat.cpu())
    return Material(checkpoint, chain, claims, mark)


def describe_origin(material: Material) -> str:
    """The text inside each file that says which model and which run it was drawn from."""
    config = material.checkpoint.config
    epochs = len(material.checkpoint.history["loss"])
    return (f"{material.dataset}, {epochs} epochs, training seed {config.seed}, {config.schedule} "
            f"schedule, T = {config.T}, model {material.mark}, samples of seeds from 0 on")


def save_animation(material: Material, path: Path) -> None:
    """Write the animation: 80 milliseconds a frame, the digits three seconds, again and again."""
    first, *others = animation_frames(material)
    with replacement_of(path) as file:
        first.save(file, format="GIF", save_all=True, append_images=others, loop=0,
                   comment=describe_origin(material), duration=[80] * len(others) + [3000])


def draw(name: str, material: Material, folder: Path) -> Path:
    """Draw one figure into folder/name.png, or the animation into folder/animation.gif.

    The same material gives the same file, byte for byte. Returns its path; raises OSError if it
    cannot be written.
    """
    make_folder(folder)
    if name == "animation":
        path = folder / "animation.gif"
        save_animation(material, path)
        return path

    # Leave out "Software": it holds the version of matplotlib, which would change the bytes.
    metadata = {"Description": describe_origin(material), "Software": None}
    path = folder / f"{name}.png"
    plot = (FIGURES | CLAIMS)[name]
    with style_context(["default", STYLE]):  # and nothing of the user's own settings
        figure = plot(material)
        with replacement_of(path) as file:
            figure.savefig(file, format="png", metadata=metadata)
    return path


def output_folder(path: Path, out: str | None) -> Path:
    """The folder for the figures of a model file: `out` if it is given (by --out), else its own.

    Figures of pretrained/model.pt go to figures/ beside the scripts, those of your own model.pt to
    figures/ beside it. Those of another file, such as epoch-3.pt, go to figures-epoch-3/ instead,
    and those of pretrained/labels/model.pt to figures-labels/.
    """
    if out:
        return Path(out)
    home = path.parent
    name = "figures"
    if home.resolve() == SHIPPED.parent:
        home = HERE
    elif home.resolve() == SHIPPED_LABELS.parent:
        home = HERE
        name = "figures-labels"
    return home / f"{name}-{path.stem}".removesuffix("-model")


def choose_figures(asked: list[str], claims: dict, path: Path,
                   every: Sequence[str] = tuple(KNOWN)) -> list[str]:
    """The names of the figures to draw: those asked for, or all that can be drawn if none is.

    every  the names of all figures of this kind of model

    Raises ValueError if one is asked for by name whose measurements are missing. If none is asked
    for, prints which are left out.
    """
    names = asked if asked else every
    missing = [name for name in names
               if name in CLAIMS and SOURCES.get(name, name) not in claims]
    if missing:
        message = (f"not measured beside {path}: {', '.join(missing)} (measure them by python -m "
                   "tests.experiments.measure, bits by python -m tests.experiments.bound, guided, "
                   "tradeoff and ladder by python -m tests.experiments.guidance, labels by python "
                   "-m tests.experiments.labels)")
        if asked:
            raise ValueError(message)
        print(message, file=sys.stderr)
    return [name for name in names if name not in missing]


def parse_arguments(argv: list[str] | None) -> argparse.Namespace:
    """Read the command line; for options that can never work, exit with status 2 and one line."""
    parser = Parser(description="Draw the figures of the book from a trained model.")
    parser.add_argument("names", nargs="*", metavar="FIGURE",
                        help=f"what to draw: {', '.join(KNOWN)} (default: all)")
    parser.add_argument("--checkpoint", type=os.path.expanduser, metavar="FILE",
                        help="model file (default: your own finished run, else the shipped one)")
    parser.add_argument("--out", type=os.path.expanduser, metavar="DIR",
                        help="folder for the figures (default: figures/ beside the model file; for "
                             "the shipped model, beside the scripts)")
    parser.add_argument("--device", default="auto",
                        help="cuda, mps or cpu; auto is the first that is there "
                             "(default: %(default)s)")
    args = parser.parse_args(argv)

    # Refuse what is not known.
    for name in args.names:
        if name not in KNOWN:
            parser.error(f"unknown figure {name!r}; known are {', '.join(KNOWN)}")
    try:
        pick_device(args.device)
    except (ValueError, RuntimeError) as error:
        parser.error(str(error))
    return args


def draw_all(args: argparse.Namespace) -> None:
    """Draw the figures that the command line asks for, and print the name of each file."""
    asked = [name for name in args.names if name not in LABELLED]
    asked_with_labels = [name for name in args.names if name in LABELLED]
    if asked or not args.names:
        draw_figures(args, asked)
    if asked_with_labels or not args.names:
        draw_labelled_figures(args, asked_with_labels)


def draw_figures(args: argparse.Namespace, asked: list[str]) -> None:
    """Draw figures of a model: those asked for, or all if none is."""
    # Open the model. The loss alone can be drawn while the run is still under way.
    finished = args.names != ["loss"]
    path, checkpoint = open_checkpoint(args.checkpoint, finished=finished)

    # Decide what to draw, and where to.
    claims = measured(path)
    every = [name for name in KNOWN if name not in LABELLED]
    names = choose_figures(asked, claims, path, every)
    folder = output_folder(path, args.out)

    # Collect what the figures need, then draw them.
    material = gather(checkpoint, names, claims, args.device, mark=fingerprint(path))
    for name in names:
        print("wrote", draw(name, material, folder), flush=True)


def open_labelled(name: str | None) -> tuple[Path, Checkpoint]:
    """The model with labels: the file named, else your own finished run, else the shipped one.

    Raises OSError if there is none, ValueError if the one named was trained without labels.
    """
    if name is None:
        return open_checkpoint(None, labels=True)
    path = Path(name)
    checkpoint = load_checkpoint(path)
    if not checkpoint.classes:
        raise ValueError(f"{path} was trained without labels; python train.py --labels makes a "
                         "model that knows them")
    return path, checkpoint


def draw_labelled_figures(args: argparse.Namespace, asked: list[str]) -> None:
    """Draw figures of a model with labels: those asked for, or all if none is.

    If none is asked for and there is no such model, prints what is left out.
    """
    try:
        path, checkpoint = open_labelled(args.checkpoint)
    except (OSError, ValueError) as error:
        if asked:
            raise
        print(f"left out: {', '.join(LABELLED)} ({error})", file=sys.stderr)
        return

    # The shipped one belongs to the figures of the book, unless it was named.
    folder = output_folder(path, args.out)
    if args.checkpoint is None and path == SHIPPED_LABELS:
        folder = output_folder(SHIPPED, args.out)

    # Collect what the figures need. The model without labels is there to compare with.
    claims = measured(path)
    names = choose_figures(asked, claims, path, LABELLED)
    others = measured(SHIPPED)
    if "guidance_choice" in others:
        claims["guidance_choice"] = others["guidance_choice"]
    device = pick_device(args.device)
    prepare_device(device)
    checkpoint.model.to(device)

    # Draw them.
    material = gather(checkpoint, names, claims, mark=fingerprint(path))
    for name in names:
        print("wrote", draw(name, material, folder), flush=True)


@forgiving_output()
def main(argv: list[str] | None = None) -> None:
    """The command line. If something is missing or damaged, exit with one line on stderr."""
    args = parse_arguments(argv)
    try:
        draw_all(args)
    except KeyboardInterrupt:
        print("\nstopped; figures named above are complete", file=sys.stderr)
        sys.exit(130)
    except (ValueError, RuntimeError, OSError, FloatingPointError) as error:
        first_line = str(error).partition("\n")[0]
        sys.exit(f"plots.py: {first_line}")


if __name__ == "__main__":
    main()
