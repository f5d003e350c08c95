"""Part 3, continued. Every figure of the book, drawn from a trained model.

    python plots.py                       all figures
    python plots.py loss grid             those named; known are forward, embedding, loss,
                                          trajectory, grid
    python plots.py --data DIR            with MNIST from DIR/MNIST/raw

This script draws and never trains. It reads a model file with its history, samples 32 digits from
seeds 0..31 where a figure needs them (one run of 1,000 steps serves all figures), and writes PNG
files. Drawn twice on one machine, a figure is the same byte for byte.

    forward       how a digit becomes noise, and the curves that say how fast           Part 1
    embedding     how the network is told t                                             Part 2
    loss          the loss of each epoch, beside the one that the blog published        Part 3
    trajectory    one digit on its way from noise, and what the network expects         Part 3
    grid          32 digits from 32 seeds                                               Part 3

One grey scale serves all pictures: black is -1, white is +1, values beyond are cut off. A scale
fitted to each picture would hide how the range changes on the way.

Sources: [DDPM] Ho, Jain and Abbeel 2020, arXiv 2006.11239. [Attention] Vaswani et al. 2017, arXiv
1706.03762.
"""

import argparse
import sys
from dataclasses import dataclass
from pathlib import Path

import torch
from matplotlib import rc_context
from matplotlib.axes import Axes
from matplotlib.figure import Figure  # without pyplot: no screen, no state that all figures share
from tqdm import tqdm

from sample import SHIPPED, open_checkpoint, sample
from schedule import NoiseSchedule
from train import BLOG_LOSS, DATASETS, HERE, Checkpoint, from_uint8, load_images
from unet import pick_device, timestep_embedding

SEEDS = list(range(32))
SHOWN = 4  # the seed whose trajectory is drawn

# Blue, orange, green and grey that colour-blind readers can tell apart (Okabe and Ito).
OURS, BLOG, THIRD, FAINT = "#0072B2", "#D55E00", "#009E73", "#777777"

STYLE = {"font.size": 11, "axes.titlesize": 12, "axes.spines.top": False,
         "axes.spines.right": False, "axes.grid": True, "grid.color": "#e6e6e6",
         "lines.linewidth": 2, "image.cmap": "gray", "image.interpolation": "nearest",
         "savefig.dpi": 150, "figure.facecolor": "white"}


@dataclass
class Material:
    """What the figures are drawn from.

    checkpoint  the trained model, its schedule, configuration and history
    chain       {t: (x_t, x̂₀)} for the levels that are drawn, each (32, 1, 28, 28), on the CPU;
                empty if no figure needs samples
    digits      (4, 1, 28, 28) clean digits in [-1, 1] for the forward process
    real        whether these digits are from the data set (else the network has drawn them)
    """
    checkpoint: Checkpoint
    chain: dict[int, tuple[torch.Tensor, torch.Tensor]]
    digits: torch.Tensor | None
    real: bool

    @property
    def dataset(self) -> str:
        """The name of the data set that the network was trained on."""
        return DATASETS[self.checkpoint.config.dataset]

    @property
    def parameters(self) -> int:
        """Number of weights of the network."""
        return sum(p.numel() for p in self.checkpoint.model.parameters())


def shown_levels(T: int) -> list[int]:
    """The noise levels that are drawn, from T to 0: denser where more happens."""
    return [round(T * share) for share in (1, .8, .6, .5, .4, .3, .2, .1, .05, 0)]


def show(ax: Axes, image: torch.Tensor) -> None:
    """One image (1, H, W) on the grey scale that all figures share."""
    ax.imshow(image[0].numpy(), vmin=-1, vmax=1)
    ax.set_xticks([])
    ax.set_yticks([])
    ax.spines[:].set_visible(False)


# -------------------------------------------------------------------------------------- figures

def plot_forward(material: Material) -> Figure:
    """Digits at growing t, above the curves of the linear and the cosine schedule. [DDPM Eq. 4]"""
    schedule, digits = material.checkpoint.schedule, material.digits
    T = schedule.T
    ts = [round(T * share) for share in (0, .05, .1, .2, .3, .4, .6, 1)]
    figure = Figure(figsize=(10, 8.6), layout="constrained")
    top, bottom = figure.subfigures(2, 1, height_ratios=[len(digits) * 1.2, 3.6])

    generator = torch.Generator().manual_seed(0)
    eps = torch.randn(digits.shape, generator=generator)  # each row keeps its noise at all t
    axes = top.subplots(len(digits), len(ts))
    for column, t in enumerate(ts):
        xt = schedule.q_sample(digits, t, eps)
        for row in range(len(digits)):
            show(axes[row, column], xt[row])
        axes[0, column].set_title(f"t = {t}")
    whose = (f"{material.dataset}: images" if material.real
             else f"{material.dataset}: generated images (real ones were not at hand)")
    top.suptitle(f"{whose} under the forward process of the {material.checkpoint.config.schedule} "
                 "schedule", fontsize=13)

    left, right = bottom.subplots(1, 2)
    for kind, style in (("linear", "-"), ("cosine", "--")):
        other = NoiseSchedule(T, kind, allow_signal=True)
        alpha_bar = other.alpha_bar.numpy()
        left.plot(alpha_bar**0.5, style, color=OURS, label=f"signal, {kind}")
        left.plot((1 - alpha_bar)**0.5, style, color=BLOG, label=f"noise, {kind}")
        # Without t = T, where the cap of the cosine schedule makes one step of 30 dB.
        decibels = 10 * other.snr(torch.arange(1, T)).log10().numpy()
        right.plot(range(1, T), decibels, style, color=THIRD, label=kind)
    left.set(title=r"Factors $\sqrt{\bar\alpha_t}$ of the image and $\sqrt{1-\bar\alpha_t}$ "
                   "of the noise", xlabel="t", xlim=(0, T), ylim=(0, 1.4),
             yticks=[0, .2, .4, .6, .8, 1])
    right.set(title="Signal-to-noise ratio", xlabel="t", ylabel="decibel", xlim=(0, T))
    right.axhline(0, color=FAINT, linewidth=1)
    left.legend(fontsize=9, loc="upper center", ncols=2)
    right.legend(fontsize=9)
    return figure


def plot_embedding(material: Material) -> Figure:
    """The sinusoidal features of every t, and how alike those of two t are.

    [Attention section 3.5]
    """
    T = material.checkpoint.schedule.T
    dim = material.checkpoint.model.config["embedding"]
    features = timestep_embedding(torch.arange(1, T + 1), dim)  # (T, dim)

    figure = Figure(figsize=(10, 4), layout="constrained")
    left, right = figure.subplots(1, 2, width_ratios=[1.25, 1])
    picture = left.imshow(features.T.numpy(), aspect="auto", cmap="RdBu_r", vmin=-1, vmax=1,
                          extent=(1, T, dim, 0))
    left.axhline(dim / 2, color="black", linewidth=1)
    left.set(title="Embedding of t, one column for each t", xlabel="t",
             ylabel="feature (above the line sines, below cosines)")
    left.grid(False)
    figure.colorbar(picture, ax=left)
    for share, color in ((.1, OURS), (.5, BLOG), (.9, THIRD)):
        t = round(T * share)
        distance = (features - features[t - 1]).norm(dim=1).numpy()
        right.plot(range(1, T + 1), distance, color=color, linewidth=1.2, label=f"to t = {t}")
    right.set(title="Distance between embeddings", xlabel="t", xlim=(0, T), ylim=(0, None))
    right.legend(fontsize=9, loc="lower center", bbox_to_anchor=(0.7, 0.02))
    return figure


def plot_loss(material: Material) -> Figure:
    """Training and held-out loss of each epoch, beside the blog's training loss."""
    history, config = material.checkpoint.history, material.checkpoint.config
    figure = Figure(figsize=(10, 5), layout="constrained")
    ax = figure.subplots()
    held_out = "validation" if config.val_images else "test"
    blog = BLOG_LOSS if config.dataset == "mnist" else ()
    # The last column keeps the two numbers of our network apart, whose curves end close together.
    for values, color, label, lift in (
            (blog, BLOG, "the blog's network, training", 0),
            (history["loss"], OURS, "ours, training", 6),
            (history["held_out"], THIRD, f"ours, averaged weights, {held_out} images", -6)):
        if len(values) == 0:  # a run that has not finished an epoch, or not MNIST
            continue
        epochs = range(1, len(values) + 1)
        ax.plot(epochs, values, "o-", color=color, markersize=4, label=label)
        ax.annotate(f"{values[-1]:.4f}", (len(values), values[-1]), xytext=(8, lift), color=color,
                    textcoords="offset points", va="center")
    ax.set_yscale("log")
    ticks = [.02, .03, .04, .05, .07, .1, .15, .2]
    ax.set_yticks(ticks, [f"{tick:g}" for tick in ticks])
    ax.minorticks_off()
    last = max(len(blog), len(history["loss"]), 1)
    ax.set(xlabel="epoch", ylabel="mean squared error of the predicted noise",
           xlim=(0.6, last + 1.2), xticks=range(1, last + 1),
           title=f"{material.dataset}: loss by epoch" + (", both networks with 324,705 parameters"
           if blog and material.parameters == 324_705 else ""))
    ax.legend(frameon=False)
    return figure


def plot_trajectory(material: Material) -> Figure:
    """One digit on its way from noise: x_t above, the prediction x̂₀ made from it below."""
    chain = material.chain
    figure = Figure(figsize=(10, 2.45), layout="constrained")
    axes = figure.subplots(2, len(chain))
    for column, (t, (xt, x0_hat)) in enumerate(chain.items()):
        show(axes[0, column], xt[SHOWN])
        show(axes[1, column], x0_hat[SHOWN])
        axes[0, column].set_title(f"t = {t}", fontsize=10)
    axes[0, 0].set_ylabel("$x_t$", rotation=0, labelpad=14, va="center", fontsize=13)
    axes[1, 0].set_ylabel(r"$\hat x_0$", rotation=0, labelpad=14, va="center", fontsize=13)
    figure.suptitle(f"{material.dataset}: denoising seed {SEEDS[SHOWN]}. The noisy image, and the "
                    "clean image that the network expects", fontsize=12)
    return figure


def plot_grid(material: Material) -> Figure:
    """32 digits from 32 seeds, four rows of eight."""
    from torchvision.utils import make_grid  # here, because it takes seconds to import

    grid = make_grid(material.chain[0][0], nrow=8, padding=2, pad_value=-0.5)
    figure = Figure(figsize=(10, 5.35), layout="constrained")
    ax = figure.subplots()
    show(ax, grid)
    ax.set_title(f"{material.dataset}: seeds {SEEDS[0]} to {SEEDS[-1]}, row by row")
    return figure


FIGURES = {"forward": plot_forward, "embedding": plot_embedding, "loss": plot_loss,
           "trajectory": plot_trajectory, "grid": plot_grid}


# ----------------------------------------------------------------------------- gather and save

def gather(checkpoint: Checkpoint, names: list[str], data: str | Path = HERE / "data",
           device: str = "cpu") -> Material:
    """Collect what the named figures need, sampling at most once.

    data  folder with MNIST/raw (or the data set of the model) for the clean digits; nothing is
          downloaded
    """
    digits, real = None, False
    if "forward" in names:
        try:
            images, labels = load_images(data, False, checkpoint.config.dataset, download=False)
            labels = labels.tolist()
            kinds = [kind for kind in (7, 2, 4, 9, *range(10)) if kind in labels][:4]
            digits, real = from_uint8(images[[labels.index(kind) for kind in kinds]]), True
        except FileNotFoundError:
            print(f"no {DATASETS[checkpoint.config.dataset]} in {data}: the forward process is "
                  "drawn on generated images", file=sys.stderr)
    chain = {}
    if {"trajectory", "grid"} & set(names) or ("forward" in names and not real):
        model = checkpoint.model.to(pick_device(device))
        wanted = set(shown_levels(checkpoint.schedule.T))
        steps = sample(model, checkpoint.schedule, SEEDS)
        for t, xt, x0_hat in tqdm(steps, total=checkpoint.schedule.T + 1, unit=" steps",
                                  desc="sampling", disable=None):
            if t in wanted:
                chain[t] = xt.cpu(), x0_hat.cpu()
    if "forward" in names and not real:
        digits = chain[0][0][:4]
    return Material(checkpoint, chain, digits, real)


def draw(name: str, material: Material, folder: Path) -> Path:
    """Draw one figure into folder/name.png and return that path."""
    config = material.checkpoint.config
    with rc_context(STYLE):
        figure = FIGURES[name](material)
        folder.mkdir(parents=True, exist_ok=True)
        path = folder / f"{name}.png"
        figure.savefig(path, metadata={
            "Software": None,  # a version number here would change the bytes
            "Description": f"{material.dataset}, {len(material.checkpoint.history['loss'])} "
                           f"epochs, training seed {config.seed}, {config.schedule} schedule, "
                           f"T = {config.T}, {material.parameters} parameters"})
    return path


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(usage=argparse.SUPPRESS,
                                     description="Draw the figures of the book.")
    parser.add_argument("names", nargs="*", metavar="FIGURE",
                        help=f"which ones: {', '.join(FIGURES)} (all)")
    parser.add_argument("--checkpoint", metavar="FILE",
                        help="model file (your own finished run, else pretrained/model.pt)")
    parser.add_argument("--data", default=HERE / "data", metavar="DIR",
                        help="folder that holds MNIST/raw, for the clean digits (data)")
    parser.add_argument("--out", metavar="DIR",
                        help="folder for the PNG files (figures, or in the folder of your run)")
    parser.add_argument("--device", default="auto", help="cuda, mps or cpu (the first there is)")
    args = parser.parse_args(argv)
    names = args.names or list(FIGURES)
    unknown = [name for name in names if name not in FIGURES]
    try:
        if unknown:
            raise ValueError(f"unknown figure {unknown[0]!r}; known are {', '.join(FIGURES)}")
        pick_device(args.device)
    except ValueError as error:
        parser.error(str(error))
    try:
        # The loss of a run can be looked at while it is still under way.
        path, checkpoint = open_checkpoint(args.checkpoint, finished=names != ["loss"])
        shipped = path.resolve().parent == SHIPPED.parent
        folder = Path(args.out or (HERE if shipped else path.parent) / "figures")
        material = gather(checkpoint, names, args.data, args.device)
        for name in names:
            print(f"wrote {draw(name, material, folder)}", flush=True)
    except KeyboardInterrupt:
        print("\nstopped; figures named above are complete", file=sys.stderr)
        sys.exit(130)
    except (ValueError, RuntimeError, OSError) as error:
        sys.exit("plots.py: " + str(error).partition("\n")[0])


if __name__ == "__main__":
    main()
