"""Measure what the blog only claims, and how the samplers compare. plots.py draws the results.

    python -m tests.experiments.measure --data DIR                  everything
    python -m tests.experiments.measure --data DIR decided copies   only these parts
    python -m tests.experiments.measure --data DIR --count 2000     more samples in 1,000 steps
    python -m tests.experiments.measure --table                     only print the samplers

    part          what it measures                                    on one CPU core
    digits        four test digits, to draw them                      a second
    difficulty    the loss at each t after several epochs             4 minutes
    decided       when the outcome of the chain is settled            28 minutes
    epochs        eight seeds after several epochs                    3 minutes
    samplers      distance to real digits, and time, of each sampler  3 hours
    noise         the same x_T with and without fresh noise           samples of the part above
    copies        distances to the nearest training digits            samples of the part above

The results go to claims.pt beside the model, as plain numbers and small tensors. The samples are
kept in runs/samples/, so a part that was stopped goes on where it was, and more samples can be
added later. The distances are those of yardstick.py. The images of each chain have the seeds 0, 1,
2, and so on.
"""

import argparse
import json
import time
from collections.abc import Callable
from pathlib import Path

import torch

from plots import fingerprint
from sample import RESTARTS, SHIPPED, open_checkpoint, restart, sample, to_uint8
from schedule import NoiseSchedule
from tests.experiments import ablations
from tests.experiments.yardstick import (
    draw_samples, frechet_distance, load_classifier, look, loss_by_t, measure, nearest, real_floor)
from train import HERE, Checkpoint, from_uint8, load_checkpoint, load_images, save
from unet import pick_device, prepare_device

SPECTRUM = SHIPPED.parent / "spectrum.json"  # written by spectrum.py

# The blog's network with the blog's recipe, if ablations.py has trained it.
BLOG_ROW = "the blog's network and recipe"
BLOG_MODEL = ablations.folder(BLOG_ROW, 15) / "model.pt"
BLOG = "the blog's network, ddpm 1000"

# Finished digits are noised again and taken back, as sample.py --restarts does.
RESTARTED = "sde-dpm++ 20, restarted"

# Name of a chain -> sampler, steps, variance, clip.
CHAINS = {"ddpm 1000": ("ddpm", 1000, "beta_tilde", True),
          RESTARTED: ("sde-dpm++", 20, "beta_tilde", True),
          "ddpm 1000, not clipped": ("ddpm", 1000, "beta_tilde", False),
          "ddpm 1000, beta": ("ddpm", 1000, "beta", True),
          "ddpm 1000, zero": ("ddpm", 1000, "zero", True),
          BLOG: ("ddpm", 1000, "beta_tilde", False),
          f"{BLOG}, clipped": ("ddpm", 1000, "beta_tilde", True)}
CHAINS |= {f"{sampler} {steps}": (sampler, steps, "beta_tilde", True)
           for steps in (1000, 50, 20, 10, 5) for sampler in ("ddpm", "sde-dpm++", "ddim", "dpm++")}

SIZES = (200, 500, 1000, 2000)  # numbers of images for which distances are given
TIMED = 32  # number of images drawn to measure how long a sampler takes


class Bench:
    """What all parts need: the model, the images, the classifier, and the samples drawn so far.

    checkpoint   the model, and the file that it was read from (path)
    data         folder that holds MNIST/raw
    counts       numbers of images: of ddpm in 1,000 steps, of all other chains of 1,000 steps, and
                 of chains of fewer steps
    out          the file for the results; scratch is the folder for the samples
    blog_model   the model file of the blog's network
    sizes        numbers of images for which distances are given
    timed        number of images that are drawn to measure the time
    """

    def __init__(self, checkpoint: Checkpoint, path: Path, data: str, counts: tuple[int, int, int],
                 device: str, out: Path, scratch: Path, blog_model: Path = BLOG_MODEL,
                 sizes: tuple[int, ...] = SIZES, timed: int = TIMED):
        self.checkpoint = checkpoint
        self.path = path
        self.out = out
        self.count, self.few, self.cheap = counts
        self.blog_model = blog_model
        self.sizes = sizes
        self.timed = timed
        self.device = pick_device(device)
        prepare_device(self.device)
        self.model = checkpoint.model.to(self.device)
        dataset = checkpoint.config.dataset
        self.known, self.known_labels = load_images(data, True, dataset)
        self.real, self.labels = load_images(data, False, dataset)
        self.classifier = load_classifier()
        self.reference = look(self.classifier, self.real)
        # Samples of another model must not be taken for samples of this one.
        self.scratch = scratch / fingerprint(path)
        self.scratch.mkdir(parents=True, exist_ok=True)

    def sample(self, name: str, seeds: range) -> torch.Tensor:
        """The images of these seeds by a chain, uint8 (N, 1, 28, 28)."""
        sampler, steps, variance, clip = CHAINS[name]
        checkpoint = self.checkpoint
        if BLOG in name:
            checkpoint = ablations.load(BLOG_ROW, self.blog_model)
        images = draw_samples(checkpoint, seeds, self.device, sampler=sampler, variance=variance,
                              steps=min(steps, checkpoint.schedule.T), clip=clip)
        if name == RESTARTED:
            images = self.restart(images, seeds)
        return images

    def restart(self, images: torch.Tensor, seeds: range) -> torch.Tensor:
        """Restarts as in sample.py, of images that are rounded to 256 grey levels each time."""
        schedule = self.checkpoint.schedule
        for k, share in enumerate(RESTARTS):
            others = [seed + k * 10**6 for seed in seeds]  # restart() goes up by another million
            x0 = restart(self.model, schedule, from_uint8(images), others, shares=(share,))
            images = to_uint8(x0.cpu())
        return images

    def draw(self, name: str, count: int) -> torch.Tensor:
        """The images of seeds 0..count-1; those drawn earlier are read from a file."""
        folder = self.scratch
        if BLOG in name:
            folder = self.scratch.with_name(fingerprint(self.blog_model))
            folder.mkdir(exist_ok=True)
        return kept_samples(folder / f"{name}.pt", count, lambda seeds: self.sample(name, seeds))

    def number_of_images(self, name: str) -> int:
        """How many images of a chain are judged."""
        if name == "ddpm 1000":
            return self.count
        steps = CHAINS[name][1]
        return self.few if steps == 1000 else self.cheap

    def files_of_epochs(self) -> dict[int, Path]:
        """The model files epoch-N.pt beside the model, by N, in ascending order."""
        files = {int(file.stem.removeprefix("epoch-")): file
                 for file in self.path.parent.glob("epoch-*.pt")}
        if not files:
            raise SystemExit(f"no files epoch-N.pt beside {self.path}")
        return dict(sorted(files.items()))

    def judge(self, images: torch.Tensor) -> dict:
        """The numbers of the yardstick, with the distance of all images and of the first few."""
        row = measure(self.classifier, images, self.reference, self.known)
        features, _ = look(self.classifier, images)
        row["distances"] = {n: frechet_distance(features[:n], self.reference[0])
                            for n in self.sizes if n <= len(images)}
        return row


def kept_samples(file: Path, count: int, draw: Callable[[range], torch.Tensor]) -> torch.Tensor:
    """The images of seeds 0..count-1. Those in the file are read, the others are drawn by
    draw(seeds), a hundred at a time, and added to it.
    """
    images = torch.zeros(0, 1, 28, 28, dtype=torch.uint8)
    if file.exists():
        images = torch.load(file, weights_only=True)["images"]
    while len(images) < count:
        seeds = range(len(images), min(count, len(images) + 100))
        images = torch.cat([images, draw(seeds)])
        save(file, {"images": images})
    return images[:count]


def spread(images: torch.Tensor) -> float:
    """The variance of a pixel over the images, in [-1, 1], averaged over the pixels."""
    return from_uint8(images).var(dim=0).mean().item()


def wiener(schedule: NoiseSchedule) -> torch.Tensor:
    """Loss of the best linear denoiser on the training images at each t, float64 (T+1,), 0 at 0.

    Along a principal axis of the images with mean μ and variance λ², the best linear guess is
    ε = √(1-ᾱ) (x_t - √ᾱ μ)/v with v = ᾱ λ² + 1-ᾱ (Wiener's filter). Its mean squared error is
    ᾱ λ²/v.
    """
    axes = json.loads(SPECTRUM.read_text())
    alpha_bar = schedule.alpha_bar[1:, None]
    signal = alpha_bar * torch.tensor(axes["variance"], dtype=torch.float64)
    error = signal / (signal + 1 - alpha_bar)
    return torch.cat([torch.zeros(1, dtype=torch.float64), error.mean(dim=1)])


def digits(bench: Bench) -> dict:
    """Four test digits, for the figure of the forward process: the first 7, 2, 4 and 9."""
    labels = bench.labels.tolist()
    return {"images": torch.stack([bench.real[labels.index(digit)] for digit in (7, 2, 4, 9)])}


def difficulty(bench: Bench) -> dict:
    """Which t is hard? The loss at each t after some epochs, and that of the best linear guess."""
    schedule = bench.checkpoint.schedule
    linear = wiener(schedule)
    print(f"best linear denoiser: {linear[1:].mean():.4f}", flush=True)
    losses = {}
    for epoch, file in bench.files_of_epochs().items():
        model = load_checkpoint(file).model.to(bench.device)
        losses[epoch] = loss_by_t(model, schedule, bench.real)
        print(f"epoch-{epoch}: {losses[epoch][1:].mean():.4f}", flush=True)
    return {"epochs": losses, "linear": linear}


def low_frequencies(images: torch.Tensor, waves: float = 3.5) -> torch.Tensor:
    """What is left of images (.., H, W) if only waves of up to so many periods across are kept."""
    spectrum = torch.fft.fft2(images)
    y, x = (torch.fft.fftfreq(n) * n for n in images.shape[-2:])
    kept = (y[:, None].square() + x.square()).sqrt() <= waves
    return torch.fft.ifft2(spectrum * kept).real


def share_present(guess: torch.Tensor, final: torch.Tensor) -> dict[str, float]:
    """How much of what distinguishes the final images from their mean is present in a guess.

    The share is 1 - |guess - final|²/|final - mean|², both (B, 1, H, W), for low frequencies and
    for the others: 1 if the guess is the final image, 0 if it is the mean of all final images.
    """
    error = guess - final
    spread = final - final.mean(dim=0)
    low_error = low_frequencies(error)
    low_spread = low_frequencies(spread)
    bands = {"low": (low_error, low_spread),
             "high": (error - low_error, spread - low_spread)}
    return {name: 1 - (a.square().sum() / b.square().sum()).item()
            for name, (a, b) in bands.items()}


def decided(bench: Bench, seeds: int = 32, repeats: int = 3) -> dict:
    """When is the outcome settled? From x_t of finished chains, go on with other noise.

    The results for each t: "class", the share of such chains that end as the same digit as the
    original, according to the classifier; "pixels", 1 - |difference|²/|difference of unrelated
    chains|²; and the share of the final image that is present in the prediction made at t, in low
    and in high frequencies. At t = T the chains begin with another x_T, too, which shows how much
    agreement there is by chance.
    """
    schedule = bench.checkpoint.schedule
    T = schedule.T
    levels = [max(1, round(T * share)) for share in (1, .9, .8, .7, .6, .5, .4, .3, .2, .1, .05)]
    chain = {t: (xt.cpu(), x0_hat.cpu()) for t, xt, x0_hat in
             sample(bench.model, schedule, list(range(seeds))) if t in [*levels, 0]}
    final, _ = chain[0]

    def digit(images: torch.Tensor) -> torch.Tensor:
        _, probabilities = look(bench.classifier, to_uint8(images))
        return probabilities.argmax(dim=1)

    unrelated = torch.pdist(final.flatten(1).double()).square().mean().item()
    rows = {}
    for t in levels:
        xt, x0_hat = chain[t]
        same = []
        difference = []
        for k in range(1, repeats + 1):
            others = list(range(100_000 * k, 100_000 * k + seeds))  # seeds that nothing else uses
            start = (t, xt) if t < T else None
            *_, (_, again, _) = sample(bench.model, schedule, others, start=start)
            again = again.cpu()
            same.append((digit(again) == digit(final)).double().mean().item())
            square = (again - final).double().square().sum((1, 2, 3))
            difference.append(square.mean().item())
        rows[t] = {"class": sum(same) / repeats,
                   "pixels": 1 - sum(difference) / repeats / unrelated,
                   **share_present(x0_hat, final)}
        numbers = ", ".join(f"{name} {value:.3f}" for name, value in rows[t].items())
        print(f"t = {t:4d}: {numbers}", flush=True)
    return {"seeds": seeds, "repeats": repeats, "levels": rows}


def epochs(bench: Bench, seeds: int = 8) -> dict:
    """From smudge to digit: the same seeds through the averaged weights of several epochs."""
    images = {epoch: draw_samples(load_checkpoint(file), range(seeds), bench.device)
              for epoch, file in bench.files_of_epochs().items()}
    return {"images": images}


def samplers(bench: Bench) -> dict:
    """How good is each sampler, and how long does it take? And how good are real digits?"""
    # Real digits first: how far are training images from test images?
    floors = {}
    generator = torch.Generator().manual_seed(0)
    for n in bench.sizes:
        floor = real_floor(bench.classifier, bench.known, bench.reference, n, generator)
        floors[n] = floor.mean().item(), floor.std().item()
        print(f"{len(floor)} sets of {n} training images: distance {floor.mean():.2f}, standard "
              f"deviation {floor.std():.2f}", flush=True)

    # Then each chain, the short ones first.
    rows = {}
    images = {}
    for name, (_, steps, *_) in reversed(CHAINS.items()):
        if BLOG in name and not bench.blog_model.exists():
            print(f"{name}: not trained, see tests/experiments/ablations.py", flush=True)
            continue
        drawn = bench.draw(name, bench.number_of_images(name))
        images[name] = drawn[:8].clone()

        # Draw some again, so that all chains are timed in the same way; take the best of three.
        seconds = []
        for _ in range(1 if steps == 1000 else 3):
            begun = time.perf_counter()
            bench.sample(name, range(bench.timed))
            seconds.append(time.perf_counter() - begun)
        row = bench.judge(drawn) | {"seconds": min(seconds)}
        rows[name] = row
        distances = ", ".join(f"{d:.2f} of {n}" for n, d in row["distances"].items())
        print(f"{name:16} distance {distances}; {row['confident']:.1%} of {row['count']} clear, "
              f"chi2 {row['chi2']:.0f}, {bench.timed} in {row['seconds']:.1f} s", flush=True)

    real = measure(bench.classifier, bench.real, bench.reference, bench.known)
    return {"chains": rows, "images": images, "floor": floors, "test images": real}


def noise(bench: Bench) -> dict:
    """What does the injected noise do? The same x_T with all of it, too much, and none."""
    rows = {"test images": {"spread": spread(bench.real)}}
    for name in ("ddpm 1000", "ddpm 1000, beta", "ddpm 1000, zero", "ddim 50"):
        images = bench.draw(name, bench.few)
        row = bench.judge(images) | {"spread": spread(images), "images": images[:8].clone()}
        rows[name] = row
        print(f"{name:16} spread {row['spread']:.3f} (test images "
              f"{rows['test images']['spread']:.3f}), classes {row['classes']}, "
              f"{row['confident']:.1%} confident", flush=True)
    return rows


def copies(bench: Bench, shown: int = 32) -> dict:
    """Is anything copied? How far samples, and test digits, are from the nearest training digit."""
    images = bench.draw("ddpm 1000", bench.count)
    order = torch.randperm(len(bench.real), generator=torch.Generator().manual_seed(0))
    real = bench.real[order][:len(images)]
    distance, index = nearest(images, bench.known)
    real_distance, _ = nearest(real, bench.known)
    for name, d in (("samples", distance), ("test digits", real_distance)):
        print(f"{len(d)} {name}: nearest training digit at {d.min():.3f} to {d.max():.3f}, median "
              f"{d.median():.3f}", flush=True)
    return {"samples": distance, "test": real_distance, "images": images[:shown].clone(),
            "nearest": bench.known[index[:shown]].clone()}


PARTS = {part.__name__: part for part in
         (digits, difficulty, decided, epochs, samplers, noise, copies)}


def table(results: dict) -> str:
    """The table of the samplers in README.md, in Markdown."""
    chains = results["chains"]
    sizes = [n for n in results["floor"] if any(n in row["distances"] for row in chains.values())]
    lines = ["| chain, steps | N | called a digit with p > 0.9 | χ² of classes | nearest | "
             + " | ".join(f"distance of {n:,}" for n in sizes) + " | 32 digits take |",
             "|---" + "|---:" * (len(sizes) + 5) + "|"]

    def line(name: str, row: dict, distances: list[str], seconds: str) -> str:
        cells = [name, f"{row['count']:,}", f"{100 * row['confident']:.1f} %",
                 f"{row['chi2']:.0f}", f"{row['nearest']:.3f}", *distances, seconds]
        return "| " + " | ".join(cells) + " |"

    for name, row in chains.items():
        distances = [f"{row['distances'][n]:.2f}" if n in row["distances"] else "" for n in sizes]
        lines.append(line(name, row, distances, f"{row['seconds']:.1f} s"))
    floors = ["{:.2f} ± {:.2f}".format(*results["floor"][n]) for n in sizes]
    lines.append(line("real digits", results["test images"], floors, ""))
    return "\n".join(lines)


def read_results(out: Path) -> dict:
    """The parts in the file so far."""
    return torch.load(out, weights_only=True) if out.exists() else {}


def add_common_arguments(parser: argparse.ArgumentParser) -> None:
    """The options that this command and that of guidance.py share."""
    parser.add_argument("--data", default=str(HERE / "data"),
                        help="folder that holds MNIST/raw (default: %(default)s)")
    parser.add_argument("--checkpoint", default=str(SHIPPED),
                        help="model file (default: the shipped one)")
    parser.add_argument("--device", default="auto",
                        help="cuda, mps or cpu (default: the first that is there)")
    parser.add_argument("--out", help="file for the results (default: claims.pt beside the model)")
    parser.add_argument("--scratch", default=str(HERE / "runs" / "samples"),
                        help="folder that keeps the samples (default: %(default)s)")
    parser.add_argument("--table", action="store_true",
                        help="print what has been measured, measure nothing")


def results_file(args: argparse.Namespace) -> Path:
    """The file for the results."""
    return Path(args.out or Path(args.checkpoint).parent / "claims.pt")


def open_model(parser: argparse.ArgumentParser, args: argparse.Namespace,
               parts: dict) -> tuple[Path, Checkpoint]:
    """The model file that the command line names. What cannot work is an error of the parser."""
    unknown = [name for name in args.parts if name not in parts]
    if unknown:
        parser.error(f"unknown part {unknown[0]!r}; known are {', '.join(parts)}")
    path, checkpoint = open_checkpoint(args.checkpoint)
    if checkpoint.config.dataset != "mnist":
        parser.error("the classifier and the linear denoiser are of MNIST; this model is not")
    out = results_file(args)
    if any(part["model"] != fingerprint(path) for part in read_results(out).values()):
        parser.error(f"{out} is of another model; name another file by --out, or delete it")
    if not out.parent.is_dir():
        parser.error(f"no folder {out.parent}")
    return path, checkpoint


def add_result(out: Path, name: str, result: dict, path: Path) -> None:
    """Save a part of the results, with the mark of the model file that they belong to.

    The file is read now: another process may have measured another part in the meantime.
    """
    save(out, read_results(out) | {name: result | {"model": fingerprint(path)}})


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description="Measure the claims.")
    parser.add_argument("parts", nargs="*", metavar="PART",
                        help=f"{', '.join(PARTS)} (default: all)")
    add_common_arguments(parser)
    parser.add_argument("--count", type=int, default=500,
                        help="images of ddpm in 1,000 steps (default: %(default)s)")
    parser.add_argument("--few", type=int, default=200,
                        help="images of other chains of 1,000 steps: by other samplers, with "
                        "another variance or clipping, or by the blog's network "
                        "(default: %(default)s)")
    parser.add_argument("--cheap", type=int, default=2000,
                        help="images in fewer steps (default: %(default)s)")
    args = parser.parse_args(argv)
    out = results_file(args)
    if args.table:
        print(table(torch.load(out, weights_only=True)["samplers"]))
        return

    # Refuse what cannot work before anything takes time.
    counts = (args.count, args.few, args.cheap)
    if min(counts) < SIZES[0]:
        parser.error(f"distances need at least {SIZES[0]} images")
    path, checkpoint = open_model(parser, args, PARTS)

    # Measure each part, and save it at once.
    bench = Bench(checkpoint, path, args.data, counts, args.device, out, Path(args.scratch))
    for name in args.parts or PARTS:
        begun = time.perf_counter()
        print(f"-- {name}", flush=True)
        add_result(out, name, PARTS[name](bench), path)
        print(f"-- {name}: {time.perf_counter() - begun:.0f} s", flush=True)


if __name__ == "__main__":
    main()
