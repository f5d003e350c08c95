"""Part 3, continued. The figures of the book, drawn from a trained model.

    python plots.py                       all figures
    python plots.py loss grid             those named; --help lists them

This script draws and never trains. Some figures need only a model file with its history, others 32
digits sampled in 1,000 steps. The rest show what tests/measure.py and tests/bound.py have measured
to check the blog's claims. One grey scale serves all pictures: black is -1, white is +1, values
beyond are cut off. A scale fitted to each picture would hide how the range changes on the way.

Sources: [DDPM] Ho, Jain and Abbeel 2020, arXiv 2006.11239. [Attention] Vaswani et al. 2017, arXiv
1706.03762.
"""

import argparse
import hashlib
import json
import sys
from dataclasses import dataclass
from pathlib import Path

import torch
from matplotlib import rc_context
from matplotlib.axes import Axes
from matplotlib.figure import Figure  # without pyplot: no screen, no state that all figures share
from tqdm import tqdm

from sample import SHIPPED, draw_grid, open_checkpoint, sample
from schedule import NoiseSchedule
from train import BLOG_LOSS, DATASETS, HERE, Checkpoint, from_uint8
from unet import pick_device, timestep_embedding

SEEDS = list(range(32))
SHOWN = 4  # the seed whose trajectory is drawn

# Blue, orange, green and grey that colour-blind readers can tell apart (Okabe and Ito).
OURS, BLOG, THIRD, FAINT = "#0072B2", "#D55E00", "#009E73", "#777777"

STYLE = {"font.size": 11, "axes.titlesize": 12, "axes.spines.top": False,
         "axes.spines.right": False, "axes.grid": True, "grid.color": "#e6e6e6",
         "lines.linewidth": 1.5, "legend.frameon": False, "legend.fontsize": 10,
         "image.cmap": "gray", "image.interpolation": "nearest", "savefig.dpi": 150,
         "figure.facecolor": "white", "figure.constrained_layout.use": True}


@dataclass
class Material:
    """What the figures are drawn from.

    checkpoint  the trained model, its schedule, configuration and history
    chain       {t: (x_t, x̂₀)} for the levels that are drawn, each (32, 1, 28, 28), on the CPU;
                empty if no figure needs samples
    claims      what has been measured, by the name of the figure
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
    """The noise levels of the trajectory, from T to 0: denser where more happens."""
    return [round(T * share) for share in (1, .8, .6, .5, .4, .3, .2, .1, .05, 0)]


def frame_levels(T: int) -> list[int]:
    """The noise levels of the animation, T (k/48)² for k = 48, 47, ..., 0: slower at the end."""
    return [*dict.fromkeys(round(T * (k / 48)**2) for k in range(48, -1, -1))]


def show(ax: Axes, image: torch.Tensor) -> None:
    """One image (1, H, W) on the grey scale that all figures share."""
    ax.imshow(image[0].numpy(), vmin=-1, vmax=1)
    ax.set(xticks=[], yticks=[])
    ax.spines[:].set_visible(False)


def tiles(ax: Axes, images: torch.Tensor, columns: int = 8) -> None:
    """Images (N, 1, H, W) in [-1, 1] as one picture."""
    from torchvision.utils import make_grid  # here, because it takes seconds to import
    show(ax, make_grid(images, nrow=columns, padding=2, pad_value=-0.5))


def picture_rows(title: str, rows: list[tuple[str, torch.Tensor, str]]) -> Figure:
    """Rows of bytes (8, 1, H, W), each with a name on its left and a note on its right."""
    figure = Figure(figsize=(10, 1.05 * len(rows) + 0.5))
    figure.suptitle(title, fontsize=12)
    for ax, (name, images, note) in zip(figure.subplots(len(rows), squeeze=False)[:, 0], rows):
        tiles(ax, from_uint8(images))
        ax.set_ylabel(name, rotation=0, ha="right", va="center", fontsize=11)
        ax.text(1.01, 0.5, note, transform=ax.transAxes, va="center", fontsize=9)
    return figure


# -------------------------------------------------------------------------------------- figures

def plot_forward(material: Material) -> Figure:
    """Digits at growing t, above the curves of the linear and the cosine schedule. [DDPM Eq. 4]"""
    schedule, kind = material.checkpoint.schedule, material.checkpoint.config.schedule
    T, real = schedule.T, material.claims.get("digits")
    digits = from_uint8(real["images"]) if real else material.chain[0][0][:4]
    figure = Figure(figsize=(10, 8.6))
    top, bottom = figure.subfigures(2, 1, height_ratios=[len(digits) * 1.2, 3.6])
    ts = [round(T * share) for share in (0, .05, .1, .2, .3, .4, .6, 1)]
    eps = torch.randn(digits.shape, generator=torch.Generator().manual_seed(0))  # for all t
    axes = top.subplots(len(digits), len(ts))
    for column, t in enumerate(ts):
        for ax, xt in zip(axes[:, column], schedule.q_sample(digits, t, eps)):
            show(ax, xt)
        axes[0, column].set_title(f"t = {t}")
    whose = "images" if real else "generated images"
    top.suptitle(f"{material.dataset}: {whose} under the forward process of the {kind} schedule")

    left, right = bottom.subplots(1, 2)
    for kind, style in zip(dict.fromkeys(("linear", "cosine", kind)), ("-", "--", ":")):
        other = NoiseSchedule(T, kind, allow_signal=True)
        alpha_bar = other.alpha_bar.numpy()
        left.plot(alpha_bar**0.5, style, color=OURS, label=f"signal, {kind}")
        left.plot((1 - alpha_bar)**0.5, style, color=BLOG, label=f"noise, {kind}")
        # Without t = T, where the cap of the cosine schedule makes one step of 30 dB.
        decibels = 10 * other.snr(torch.arange(1, T)).log10().numpy()
        right.plot(range(1, T), decibels, style, color=THIRD, label=kind)
    left.set(title=r"Factors $\sqrt{\bar\alpha_t}$ of the image and $\sqrt{1-\bar\alpha_t}$ "
             "of the noise", xlabel="t", xlim=(0, T), ylim=(0, 1.4), yticks=[0, .2, .4, .6, .8, 1])
    right.set(title="Signal-to-noise ratio", xlabel="t", ylabel="decibel", xlim=(0, T))
    right.axhline(0, color=FAINT, linewidth=1)
    left.legend(loc="upper center", ncols=2)
    right.legend()
    return figure


def plot_embedding(material: Material) -> Figure:
    """The features of every t, and how alike those of two t are.      [Attention section 3.5]"""
    T = material.checkpoint.schedule.T
    dim = material.checkpoint.model.config["embedding"]
    features = timestep_embedding(torch.arange(1, T + 1), dim)  # (T, dim)
    figure = Figure(figsize=(10, 4))
    left, right = figure.subplots(1, 2, width_ratios=[1.25, 1])
    picture = left.imshow(features.T.numpy(), aspect="auto", cmap="RdBu_r", vmin=-1, vmax=1,
                          extent=(1, T, dim, 0))
    left.axhline(dim / 2, color="black", linewidth=1)
    left.set(title="Embedding of t, one column for each t", xlabel="t",
             ylabel="feature (above the line sines, below cosines)")
    left.grid(False)
    figure.colorbar(picture, ax=left)
    for share, color in ((.1, OURS), (.5, BLOG), (.9, THIRD)):
        t = max(1, round(T * share))
        distance = (features - features[t - 1]).norm(dim=1).numpy()
        right.plot(range(1, T + 1), distance, color=color, label=f"to t = {t}")
    right.set(title="Distance between embeddings", xlabel="t", xlim=(0, T), ylim=(0, None))
    right.legend(loc="lower center", bbox_to_anchor=(0.7, 0.02))
    return figure


def plot_loss(material: Material) -> Figure:
    """Loss of each epoch, beside the blog's and that of the best guess that is linear in x_t."""
    history, config = material.checkpoint.history, material.checkpoint.config
    figure = Figure(figsize=(10, 5))
    ax = figure.subplots()
    held_out = "validation" if config.val_images else "test"
    blog = BLOG_LOSS if config.like_blog else ()
    for values, color, label, lift in (
            (blog, BLOG, "the blog's network, training", 0),
            (history["loss"], OURS, "ours, training", 6),
            (history["held_out"], THIRD, f"ours, averaged weights, {held_out} images", -6)):
        if len(values) == 0:  # a run that has not finished an epoch, or not like the blog's
            continue
        epochs = range(1, len(values) + 1)
        ax.plot(epochs, values, "o-", color=color, markersize=4, label=label)
        ax.annotate(f"{values[-1]:.4f}", (len(values), values[-1]), xytext=(8, lift), color=color,
                    textcoords="offset points", va="center")
    seeds = [run["held_out"] for run in material.claims.get("loss", {}).get("runs", [])]
    if len(seeds) > 1:
        low, high = ([f(column) for column in zip(*seeds)] for f in (min, max))
        ax.fill_between(range(1, len(low) + 1), low, high, color=THIRD, alpha=0.3,
                        label=f"{len(seeds)} seeds")
    if "difficulty" in material.claims:
        line = material.claims["difficulty"]["linear"][1:].mean().item()
        ax.axhline(line, color=FAINT, linewidth=1, linestyle="--")
        ax.text(1.7, line * 1.03, f"best linear denoiser, {line:.4f}", color=FAINT, fontsize=9)
    ax.set_yscale("log")
    ax.set_yticks([.02, .03, .05, .07, .1, .2], ["0.02", "0.03", "0.05", "0.07", "0.1", "0.2"])
    ax.minorticks_off()
    last = max(len(blog), len(history["loss"]), 1)
    ax.set(xlabel="epoch", ylabel="mean squared error of the predicted noise",
           xlim=(0.6, last + 1.2), xticks=range(1, last + 1, 1 + last // 20),
           title=f"{material.dataset}: loss by epoch")
    ax.legend(*ax.get_legend_handles_labels())  # there may be none yet
    return figure


def plot_trajectory(material: Material) -> Figure:
    """One digit on its way from noise: x_t above, the prediction x̂₀ made from it below."""
    chain = {t: material.chain[t] for t in shown_levels(material.checkpoint.schedule.T)}
    figure = Figure(figsize=(10, 2.45))
    axes = figure.subplots(2, len(chain))
    for (above, below), (t, (xt, x0_hat)) in zip(axes.T, chain.items()):
        show(above, xt[SHOWN])
        show(below, x0_hat[SHOWN])
        above.set_title(f"t = {t}", fontsize=10)
    for ax, name in zip(axes[:, 0], ("$x_t$", r"$\hat x_0$")):
        ax.set_ylabel(name, rotation=0, labelpad=14, va="center", fontsize=13)
    figure.suptitle(f"{material.dataset}: denoising seed {SEEDS[SHOWN]}. The noisy image, and the "
                    "clean image that the network expects", fontsize=12)
    return figure


def plot_grid(material: Material) -> Figure:
    """32 digits from 32 seeds, four rows of eight."""
    figure = Figure(figsize=(10, 5.35))
    ax = figure.subplots()
    tiles(ax, material.chain[0][0])
    ax.set_title(f"{material.dataset}: seeds {SEEDS[0]} to {SEEDS[-1]}, row by row")
    return figure


def plot_difficulty(material: Material) -> Figure:
    """Loss at each t after the first, a middle and the last epoch, and the share of it up to t."""
    T, found = material.checkpoint.schedule.T, material.claims["difficulty"]
    epochs = sorted(found["epochs"])
    curves = {f"after epoch {epoch}": found["epochs"][epoch]
              for epoch in (epochs[0], epochs[len(epochs) // 2], epochs[-1])}
    last = found["epochs"][epochs[-1]]
    figure = Figure(figsize=(10, 4.6))
    left, right = figure.subplots(1, 2)
    curves["best linear denoiser"] = found["linear"]
    few = torch.arange(1.0, T + 1).split(max(1, T // 100))  # neighbours that share a point
    for (name, loss), color in zip(curves.items(), (BLOG, THIRD, OURS, FAINT)[-len(curves):]):
        smooth = [part.mean() for part in loss[1:].split(len(few[0]))]
        left.plot([ts.mean() for ts in few], smooth, color=color, label=name)
        right.plot(range(1, T + 1), loss[1:].cumsum(0) / loss[1:].sum(), color=color)
    hard, easy = max(1, T // 100), 95 * T // 100  # which the blog names
    near = {t: last[max(1, t - 5):t + 6].mean().item() for t in (hard, easy)}
    for t, loss in near.items():
        left.plot(t, loss, "o", color=OURS)
        left.annotate(f"t = {t}: {loss:.2g}", (t, loss), (0, -45) if t < T / 2 else (-10, -4),
                      textcoords="offset points", color=OURS, ha="left" if t < T / 2 else "right")
    half = 1 + (last.cumsum(0) < last.sum() / 2).sum().item()
    left.set(yscale="log", xlabel="t", ylabel="mean squared error of the predicted noise",
             title=f"Loss near t = {hard}: {near[hard] / near[easy]:,.0f} times that near {easy}")
    right.set(xlabel="t", ylabel="share of the loss at 1..t", ylim=(0, 1.02),
              title=f"Half of the loss lies at t below {half}")
    left.legend()
    return figure


def plot_decided(material: Material) -> Figure:
    """Chains restarted at t: do they end as before? See `decided` in tests/measure.py."""
    levels = material.claims["decided"]["levels"]
    figure = Figure(figsize=(10, 4.8))
    ax = figure.subplots()
    for key, color, style, label in (
            ("class", OURS, "o-", "restarts that end as the same numeral"),
            ("pixels", BLOG, "s-", "likeness of restarts, by pixel"),
            ("low", THIRD, "^--", "coarse detail present in the prediction"),
            ("high", FAINT, "v--", "fine detail present in the prediction")):
        shares = [max(0, row[key]) for row in levels.values()]
        ax.plot([*levels], shares, style, color=color, markersize=5, label=label)
    T = max(levels)
    for start, end, name in ((1, .6, "static"), (.6, .4, "a blob"), (.4, .1, "identity locks in"),
                             (.1, 0, "polish")):
        ax.axvline(end * T, color="#bbbbbb", linewidth=1)
        ax.text((start + end) / 2 * T, 1.03, name, ha="center", fontsize=9, color=FAINT)
    settled = max((t for t, row in levels.items() if row["class"] >= 0.9), default=0)
    ax.set(xlim=(T, 0), ylim=(0, 1.1), ylabel="share",
           xlabel="t at which the chain goes on with other noise (above: the blog's phases)",
           title=f"Nine of ten restarts keep the numeral from t = {settled} on")
    ax.legend(loc="center left", fontsize=10)
    return figure


def plot_noise(material: Material) -> Figure:
    """The same eight x_T with four choices of the fresh noise, as measured by tests/measure.py."""
    found, rows = material.claims["noise"], []
    for label, name in ((r"$\tilde\beta_t$", "ddpm 1000"), (r"$\beta_t$", "ddpm 1000, beta"),
                        ("none", "ddpm 1000, zero"), ("DDIM,\n50 steps", "ddim 50")):
        row, kinds = found[name], [str(count) for count in found[name]["classes"]]
        rows.append((label, row["images"], f"spread {row['spread']:.2g}\n"
                     f"clear {row['confident']:.0%}\n0-4 {' '.join(kinds[:5])}\n"
                     f"5-9 {' '.join(kinds[5:])}"))
    return picture_rows(f"Variance of the fresh noise; {row['count']} samples by kind (spread of "
                        f"test digits: {found['test images']['spread']:.2g})", rows)


def plot_copies(material: Material) -> Figure:
    """32 samples above their nearest training digits, and the distances of many."""
    found = material.claims["copies"]
    pairs = [part for rows in zip(found["images"].split(8), found["nearest"].split(8))
             for part in rows]
    figure = Figure(figsize=(10, 5))
    left, right = figure.subplots(1, 2)
    tiles(left, from_uint8(torch.cat(pairs)))
    left.set_title("samples (odd rows) above the nearest\nof the training digits (even rows)")
    for key, color, label in (("test", FAINT, "test digits"), ("samples", OURS, "samples")):
        right.hist(found[key].numpy(), 30, range=(0, 0.6), color=color, alpha=0.6,
                   label=f"{len(found[key])} {label}")
        right.axvline(found[key].median(), color=color, linestyle="--")
    right.set(xlabel="distance to the nearest training digit", ylabel="number of digits",
              title=f"median distance of samples {found['samples'].median():.3f}, of test digits "
                    f"{found['test'].median():.3f}")
    right.legend()
    return figure


def plot_epochs(material: Material) -> Figure:
    """The same eight seeds through the averaged weights of several epochs."""
    held_out = material.checkpoint.history["held_out"]
    return picture_rows("The same eight seeds after several epochs", [
        (f"epoch {epoch}", images, f"held-out loss\n{held_out[epoch - 1]:.4f}")
        for epoch, images in material.claims["epochs"]["images"].items()])


def plot_bits(material: Material) -> Figure:
    """The bound of schedule.py, section 5, in bits per pixel: each term, and the sum from t = 1."""
    found, T = material.claims["bits"], material.checkpoint.schedule.T
    figure = Figure(figsize=(10, 4.6))
    left, right = figure.subplots(1, 2)
    for name, label, color in (("beta", r"$\beta_t$", BLOG), ("optimal", "optimal", THIRD),
                               ("beta_tilde", r"$\tilde\beta_t$", OURS)):
        terms = torch.tensor([x or torch.nan for x in found[name]["terms"]])  # unknown: not drawn
        total, error = found[name]["total"]
        left.plot(range(1, T + 1), terms[1:], color=color, linewidth=1.2, label=label)
        right.plot(range(1, T + 1), terms[1:].nan_to_num().cumsum(0), color=color,
                   label=rf"{label}: {total:.3f} $\pm$ {error:.3f}")
    share = terms[1:51].nansum() / terms.nansum()
    left.set(xscale="log", yscale="log", xlabel="t", ylabel="bits per pixel, term of t",
             title=rf"{share:.0%} of the bits are spent at t up to 50 ($\tilde\beta_t$)")
    right.set(xscale="log", xlabel="t", ylabel="sum of the terms 1..t", ylim=(0, None),
              title="Bits per pixel of a test digit, at most")
    right.legend(title=r"variance $\sigma_t^2$", loc="lower right")
    return figure


def plot_samplers(material: Material) -> Figure:
    """The same eight seeds through each sampler. The distance is that of tests/yardstick.py."""
    found, note = material.claims["samplers"], "distance {1:.1f}\nof {0:,} images\n32 in {2:.2g} s"
    rows = [(name.replace(" ", "\n"), found["images"][name],
             note.format(*max(row["distances"].items()), row["seconds"]))
            for name, row in found["chains"].items() if "," not in name or "restart" in name]
    real = ", ".join(f"{floor:.1f} of {n:,}" for n, (floor, _) in found["floor"].items())
    return picture_rows("Samplers, steps, and distance to test digits (that of real digits:\n"
                        f"{real} images)", rows)


FIGURES = {"forward": plot_forward, "embedding": plot_embedding, "loss": plot_loss,
           "trajectory": plot_trajectory, "grid": plot_grid}
CLAIMS = {"difficulty": plot_difficulty, "decided": plot_decided, "noise": plot_noise,
          "copies": plot_copies, "epochs": plot_epochs, "bits": plot_bits,
          "samplers": plot_samplers}


# ----------------------------------------------------------------------------- gather and save

def fingerprint(path: Path) -> str:
    """The first digits of the SHA-256 of a model file, by which measurements name it."""
    return hashlib.sha256(path.read_bytes()).hexdigest()[:12]


def measured(path: Path) -> dict:
    """What has been measured of this model file, and of no other, by the name of the figure."""
    found, mark = {}, fingerprint(path)
    try:
        if (file := path.parent / "claims.pt").exists():
            found |= torch.load(file, weights_only=True)
        for name, file in (("bits", "bound.json"), ("loss", "seeds.json")):
            if (path.parent / file).exists():
                found[name] = json.loads((path.parent / file).read_text())
        return {name: part for name, part in found.items() if part.get("model") == mark}
    except Exception as error:  # of many kinds, if a file is damaged
        raise ValueError(f"what was measured beside {path} cannot be read; repeat it") from error


def gather(checkpoint: Checkpoint, names: list, claims: dict, device="cpu", mark="") -> Material:
    """Collect what the named figures need, sampling at most once; claims is from measured()."""
    chain, T = {}, checkpoint.schedule.T
    needed = {"trajectory", "grid", "animation"} | (set() if "digits" in claims else {"forward"})
    if needed & {*names}:
        model, wanted = checkpoint.model.to(pick_device(device)), shown_levels(T) + frame_levels(T)
        steps = sample(model, checkpoint.schedule, SEEDS, shape=(1, *2 * [model.config["size"]]))
        for t, xt, x0_hat in tqdm(steps, total=T + 1, unit=" steps", desc="sampling", disable=None):
            if t in wanted:
                chain[t] = xt.cpu(), x0_hat.cpu()
    return Material(checkpoint, chain, claims, mark)


def draw(name: str, material: Material, folder: Path) -> Path:
    """Draw one figure into folder/name.png, or the animation into name.gif; return that path."""
    config, epochs = material.checkpoint.config, len(material.checkpoint.history["loss"])
    about = (f"{material.dataset}, {epochs} epochs, training seed {config.seed}, {config.schedule} "
             f"schedule, T = {config.T}, model {material.mark}, samples of seeds from 0 on")
    path = folder / (f"{name}.gif" if name == "animation" else f"{name}.png")
    folder.mkdir(parents=True, exist_ok=True)
    if name == "animation":
        # 16 shades: noise does not compress otherwise. The digits stay for three seconds.
        first, *rest = [draw_grid(material.chain[t][0], scale=2).quantize(16)
                        for t in frame_levels(material.checkpoint.schedule.T)]
        first.save(path, save_all=True, append_images=rest, loop=0, comment=about,
                   duration=[80] * len(rest) + [3000])
        return path
    with rc_context(STYLE):
        (FIGURES | CLAIMS)[name](material).savefig(path, metadata={
            "Description": about, "Software": None})  # whose version would change the bytes
    return path


def main(argv: list[str] | None = None) -> None:
    known = [*FIGURES, "animation", *CLAIMS]
    parser = argparse.ArgumentParser(usage=argparse.SUPPRESS, description="Draw the figures.")
    parser.add_argument("names", nargs="*", metavar="FIGURE", help=f"{', '.join(known)} (all)")
    parser.add_argument("--checkpoint", metavar="FILE", help="model (your own, else the shipped)")
    parser.add_argument("--out", metavar="DIR", help="folder (figures, or beside your own model)")
    parser.add_argument("--device", default="auto", help="cuda, mps or cpu (the first there is)")
    args = parser.parse_args(argv)
    unknown = [name for name in args.names if name not in known]
    try:
        if unknown:
            raise ValueError(f"unknown figure {unknown[0]!r}; known are {', '.join(known)}")
        pick_device(args.device)
    except (ValueError, RuntimeError) as error:
        parser.error(str(error))
    try:
        # The loss of a run can be looked at while it is still under way.
        path, checkpoint = open_checkpoint(args.checkpoint, finished=args.names != ["loss"])
        home = HERE if path.resolve().parent == SHIPPED.parent else path.parent
        folder = Path(args.out or home / f"figures-{path.stem}".removesuffix("-model"))
        claims = measured(path)
        missing = [name for name in args.names or known if name in CLAIMS and name not in claims]
        if missing:
            lack = f"not measured beside {path}: {', '.join(missing)} (see tests/measure.py)"
            if args.names:
                raise ValueError(lack)
            print(lack, file=sys.stderr)
        names = [name for name in args.names or known if name not in missing]
        material = gather(checkpoint, names, claims, args.device, fingerprint(path))
        for name in names:
            print("wrote", draw(name, material, folder), flush=True)
    except KeyboardInterrupt:
        print("\nstopped; figures named above are complete", file=sys.stderr)
        sys.exit(130)
    except (ValueError, RuntimeError, OSError) as error:
        sys.exit("plots.py: " + str(error).partition("\n")[0])


if __name__ == "__main__":
    main()
