"""Measure what the blog only claims, and how samplers compare. plots.py draws what this writes.

    python tests/measure.py --data DIR                     everything
    python tests/measure.py --data DIR decided copies      only the parts named
    python tests/measure.py --data DIR --count 2000        more samples in 1,000 steps

    part          what it measures                                    one CPU core, as above
    digits        four test digits, to draw them                      a second
    difficulty    the loss at each t after several epochs             4 minutes
    decided       when the outcome of the chain is settled            28 minutes
    epochs        eight seeds after several epochs                    3 minutes
    samplers      distance to real digits, and time, of each sampler  3 hours
    noise         the same x_T with and without fresh noise           samples of the part above
    copies        distances to the nearest training digits            samples of the part above

Everything goes to claims.pt beside the model: plain numbers and small tensors. The samples
themselves are kept in runs/samples/. So a part that was stopped goes on, and samples can be added.
Distances are those of yardstick.py. The images of each chain have the seeds 0, 1, 2, ...
"""

import argparse
import json
import sys
import time
from pathlib import Path

import torch

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "tests")]

import ablations  # noqa: E402
from plots import fingerprint  # noqa: E402
from sample import SHIPPED, open_checkpoint, sample, to_uint8  # noqa: E402
from schedule import NoiseSchedule  # noqa: E402
from train import Checkpoint, from_uint8, load_checkpoint, load_images, save  # noqa: E402
from unet import pick_device  # noqa: E402
from yardstick import (draw_samples, frechet_distance, load_classifier, look,  # noqa: E402
                       measure, nearest, real_floor)

SPECTRUM = ROOT / "pretrained" / "spectrum.json"  # written by spectrum.py
# The blog's network with the blog's recipe, if tests/ablations.py has trained it.
BLOG_ROW = "the blog's network and recipe"
BLOG = "the blog's network, ddpm 1000"
# Digits are noised again, up to these shares of T, and taken back in ten steps each time.
RESTARTED, RESTARTS = "sde-dpm++ 20, restarted", (0.4, 0.4, 0.4, 0.3, 0.3, 0.3)
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
SIZES = 200, 500, 1000, 2000  # numbers of images for which distances are given


class Bench:
    """What all parts need: the model, the images, the classifier, and the samples drawn so far.

    counts  numbers of images: of ddpm in 1,000 steps, of all other chains of 1,000 steps, and of
            chains of fewer steps
    """
    blog = ablations.folder(BLOG_ROW, 15) / "model.pt"

    def __init__(self, checkpoint: Checkpoint, path: Path, data: str, counts: tuple[int, int, int],
                 device: str, out: Path, scratch: Path):
        self.checkpoint, self.out, self.path = checkpoint, out, path
        self.count, self.few, self.cheap = counts
        self.device = pick_device(device)
        self.model = checkpoint.model.to(self.device)
        dataset = checkpoint.config.dataset
        self.known, _ = load_images(data, True, dataset)
        self.real, self.labels = load_images(data, False, dataset)
        self.classifier = load_classifier()
        self.reference = look(self.classifier, self.real)
        # Samples of another model must not be taken for those of this one.
        self.scratch = scratch / fingerprint(path)
        self.scratch.mkdir(parents=True, exist_ok=True)

    def sample(self, name: str, seeds: range) -> torch.Tensor:
        """The images of these seeds by a chain, uint8 (N, 1, 28, 28)."""
        sampler, steps, variance, clip = CHAINS[name]
        checkpoint = ablations.load(BLOG_ROW, self.blog) if BLOG in name else self.checkpoint
        images = draw_samples(checkpoint, seeds, self.device, sampler=sampler, variance=variance,
                              steps=min(steps, checkpoint.schedule.T), clip=clip)
        return self.restart(images, seeds) if name == RESTARTED else images

    def restart(self, images: torch.Tensor, seeds: range) -> torch.Tensor:
        """Restart sampling, after Xu et al. 2023 (who go back by an ODE): the mistakes of a chain
        fade if it is run again from the middle. All noise is that of other seeds, a million apart."""
        schedule = self.checkpoint.schedule
        for k, share in enumerate(RESTARTS, start=1):
            others, t = [seed + k * 10**6 for seed in seeds], max(1, round(share * schedule.T))
            # The first draw of each seed would be x_T. sample() skips it here, and takes the next.
            first = [torch.Generator().manual_seed(seed) for seed in others]
            eps = torch.stack([torch.randn(images.shape[1:], generator=g) for g in first])
            start = t, schedule.q_sample(from_uint8(images), t, eps)
            *_, (_, x, _) = sample(self.model, schedule, others, "sde-dpm++", steps=10, start=start)
            images = to_uint8(x.cpu())
        return images

    def draw(self, name: str, count: int) -> torch.Tensor:
        """The images of seeds 0..count-1; those drawn before are read from a file."""
        folder = self.scratch.with_name(fingerprint(self.blog)) if BLOG in name else self.scratch
        folder.mkdir(exist_ok=True)
        file = folder / f"{name}.pt"
        images = torch.load(file, weights_only=True)["images"] if file.exists() else torch.zeros(
            0, 1, 28, 28, dtype=torch.uint8)
        while len(images) < count:
            more = self.sample(name, range(len(images), min(count, len(images) + 100)))
            images = torch.cat([images, more])
            save(file, {"images": images})
        return images[:count]

    def files_of_epochs(self) -> list[Path]:
        """The model files epoch-N.pt beside the model, in the order of N."""
        files = sorted(self.path.parent.glob("epoch-*.pt"), key=lambda path: int(path.stem[6:]))
        if not files:
            raise SystemExit(f"no files epoch-N.pt beside {self.path}")
        return files

    def judge(self, images: torch.Tensor) -> dict:
        """The yardstick's numbers, with all images and, for the distance, with fewer."""
        row = measure(self.classifier, images, self.reference, self.known)
        features = look(self.classifier, images)[0]
        row["distances"] = {n: frechet_distance(features[:n], self.reference[0])
                            for n in SIZES if n <= len(images)}
        return row


@torch.no_grad()
def loss_by_t(model: torch.nn.Module, schedule, images: torch.Tensor) -> torch.Tensor:
    """Mean squared error of the predicted noise at each t, float64 (T+1,); entry 0 is 0.

    The measurement of train.evaluate, whose value is the mean of these if all t are seen equally
    often.
    """
    device = next(model.parameters()).device
    noise = torch.randn(images.shape, generator=torch.Generator().manual_seed(0))
    levels = 1 + torch.arange(len(images)) % schedule.T
    total, seen = torch.zeros(2, schedule.T + 1, dtype=torch.float64)
    for x0, t, eps in zip(*(whole.split(128) for whole in (images, levels, noise))):
        xt = schedule.q_sample(from_uint8(x0), t, eps)
        error = (eps - model(xt.to(device), t.to(device)).cpu()).double().square().mean((1, 2, 3))
        total.index_add_(0, t, error)
        seen.index_add_(0, t, torch.ones_like(error))
    return total / seen.clamp(min=1)


def wiener(schedule: NoiseSchedule) -> torch.Tensor:
    """Loss of the best linear denoiser on the training images at each t, float64 (T+1,), 0 at 0.

    Along a principal axis of the images with mean μ and variance λ², the best linear guess is
    ε = √(1-ᾱ) (x_t - √ᾱ μ)/v with v = ᾱ λ² + 1-ᾱ (Wiener's filter). It errs by ᾱ λ²/v in the mean
    square.
    """
    axes = json.loads(SPECTRUM.read_text())
    signal = schedule.alpha_bar[1:, None] * torch.tensor(axes["variance"], dtype=torch.float64)
    error = signal / (signal + 1 - schedule.alpha_bar[1:, None])
    return torch.cat([torch.zeros(1, dtype=torch.float64), error.mean(dim=1)])


def digits(bench: Bench) -> dict:
    """Four test digits, for the figure of the forward process: the first 7, 2, 4 and 9."""
    labels = bench.labels.tolist()
    return {"images": torch.stack([bench.real[labels.index(kind)] for kind in (7, 2, 4, 9)])}


def difficulty(bench: Bench) -> dict:
    """Which t is hard? The loss at each t after some epochs, and that of the best linear guess."""
    found, linear = {}, wiener(bench.checkpoint.schedule)
    print(f"best linear denoiser: {linear[1:].mean():.4f}", flush=True)
    for file in bench.files_of_epochs():
        model = load_checkpoint(file).model.to(bench.device)
        loss = loss_by_t(model, bench.checkpoint.schedule, bench.real)
        found[int(file.stem[6:])] = loss
        print(f"{file.stem}: {loss[1:].mean():.4f}", flush=True)
    return {"epochs": found, "linear": linear}


def low_frequencies(images: torch.Tensor, waves: float = 3.5) -> torch.Tensor:
    """What is left of images (.., H, W) if only waves of up to so many periods across are kept."""
    spectrum = torch.fft.fft2(images)
    y, x = (torch.fft.fftfreq(n) * n for n in images.shape[-2:])
    kept = (y[:, None].square() + x.square()).sqrt() <= waves
    return torch.fft.ifft2(spectrum * kept).real


def share_present(guess: torch.Tensor, final: torch.Tensor) -> dict[str, float]:
    """How much of what tells the final images from their mean is in a guess, by frequencies.

    1 - |guess - final|²/|final - mean|², both (B, 1, H, W), in low frequencies and in the others:
    1 if the guess is the final image, 0 if it is the mean of all.
    """
    error, spread = guess - final, final - final.mean(dim=0)
    low = [low_frequencies(part) for part in (error, spread)]
    high = [part - smooth for part, smooth in zip((error, spread), low)]
    return {name: 1 - (a.square().sum() / b.square().sum()).item()
            for name, (a, b) in (("low", low), ("high", high))}


def decided(bench: Bench, seeds: int = 32, repeats: int = 3) -> dict:
    """When is the outcome settled? From x_t of finished chains, go on with other noise.

    For each t: "class", the share of such chains that end as the same numeral as the original, to
    the classifier; "pixels", 1 - |difference|²/|difference of unrelated chains|²; and the share
    of the final image that is present in the prediction at t, in low and in high frequencies.
    At t = T they begin with another x_T, too, which shows what chance alone gives.
    """
    schedule, T = bench.checkpoint.schedule, bench.checkpoint.schedule.T
    wanted = [max(1, round(T * share)) for share in (1, .9, .8, .7, .6, .5, .4, .3, .2, .1, .05)]
    chain = {t: (xt.cpu(), x0_hat.cpu()) for t, xt, x0_hat in
             sample(bench.model, schedule, list(range(seeds))) if t in [*wanted, 0]}
    final = chain[0][0]

    def numeral(images: torch.Tensor) -> torch.Tensor:
        return look(bench.classifier, to_uint8(images))[1].argmax(dim=1)

    unrelated = torch.pdist(final.flatten(1).double()).square().mean().item()
    found = {}
    for t in wanted:
        same, difference = [], []
        for k in range(1, repeats + 1):
            others = list(range(100_000 * k, 100_000 * k + seeds))  # seeds of nobody else
            start = (t, chain[t][0]) if t < T else None
            *_, (_, again, _) = sample(bench.model, schedule, others, start=start)
            same.append((numeral(again.cpu()) == numeral(final)).double().mean().item())
            square = (again.cpu() - final).double().square().sum((1, 2, 3))
            difference.append(square.mean().item())
        found[t] = {"class": sum(same) / repeats,
                    "pixels": 1 - sum(difference) / repeats / unrelated,
                    **share_present(chain[t][1], final)}
        print(f"t = {t:4d}: " + ", ".join(f"{k} {v:.3f}" for k, v in found[t].items()), flush=True)
    return {"seeds": seeds, "repeats": repeats, "levels": found}


def epochs(bench: Bench, seeds: int = 8) -> dict:
    """From smudge to digit: the same seeds through the averaged weights of several epochs."""
    found = {}
    for file in bench.files_of_epochs():
        checkpoint = load_checkpoint(file)
        found[int(file.stem[6:])] = draw_samples(checkpoint, range(seeds), bench.device)
    return {"images": found}


def samplers(bench: Bench) -> dict:
    """How good is each sampler, and how long does it take? And how good are real digits?"""
    found = {"chains": {}, "images": {}, "floor": {}}
    generator = torch.Generator().manual_seed(0)
    for n in SIZES:
        floor = real_floor(bench.classifier, bench.known, bench.reference, n, generator)
        found["floor"][n] = floor.mean().item(), floor.std().item()
        print(f"{len(floor)} sets of {n} training images: distance {floor.mean():.2f}, standard "
              f"deviation {floor.std():.2f}", flush=True)
    for name, (_, steps, *_) in reversed(CHAINS.items()):  # the short ones first
        if BLOG in name and not bench.blog.exists():
            print(f"{name}: not trained, see tests/ablations.py", flush=True)
            continue
        count = bench.cheap if steps < 1000 else bench.count if name == "ddpm 1000" else bench.few
        images = bench.draw(name, count)
        seconds = []
        for _ in range(1 if steps == 1000 else 3):  # again, so that all are timed in one go
            begun = time.perf_counter()
            bench.sample(name, range(32))
            seconds.append(time.perf_counter() - begun)
        row = bench.judge(images) | {"seconds": min(seconds)}
        found["chains"][name], found["images"][name] = row, images[:8].clone()
        distances = ", ".join(f"{d:.2f} of {n}" for n, d in row["distances"].items())
        print(f"{name:16} distance {distances}; {row['confident']:.1%} of {row['count']} clear, "
              f"chi2 {row['chi2']:.0f}, 32 in {row['seconds']:.1f} s", flush=True)
    real = measure(bench.classifier, bench.real, bench.reference, bench.known)
    return found | {"test images": real}


def noise(bench: Bench) -> dict:
    """What does the injected noise do? The same x_T with all of it, too much, and none.

    "spread" is the variance over seeds, as a mean over pixels in [-1, 1].
    """
    def spread(images: torch.Tensor) -> float:
        return from_uint8(images).var(dim=0).mean().item()

    found = {"test images": {"spread": spread(bench.real)}}
    for name in ("ddpm 1000", "ddpm 1000, beta", "ddpm 1000, zero", "ddim 50"):
        images = bench.draw(name, bench.few)
        found[name] = bench.judge(images) | {"spread": spread(images), "images": images[:8].clone()}
        print(f"{name:16} spread {found[name]['spread']:.3f} (test images "
              f"{found['test images']['spread']:.3f}), classes {found[name]['classes']}, "
              f"{found[name]['confident']:.1%} confident", flush=True)
    return found


def copies(bench: Bench, shown: int = 32) -> dict:
    """Is anything copied? How far samples, and test digits, are from the nearest training digit."""
    images = bench.draw("ddpm 1000", bench.count)
    real = bench.real[torch.randperm(len(bench.real), generator=torch.Generator().manual_seed(0))]
    distance, index = nearest(images, bench.known)
    real_distance, _ = nearest(real[:len(images)], bench.known)
    for name, d in (("samples", distance), ("test digits", real_distance)):
        print(f"{len(d)} {name}: nearest training digit at {d.min():.3f} to {d.max():.3f}, median "
              f"{d.median():.3f}", flush=True)
    return {"samples": distance, "test": real_distance, "images": images[:shown].clone(),
            "nearest": bench.known[index[:shown]].clone()}


def table(found: dict) -> str:
    """The README's table of samplers, in Markdown."""
    sizes = [n for n in found["floor"] if any(n in row["distances"] for row in found["chains"].values())]
    lines = ["| chain, steps | N | called a digit with p > 0.9 | χ² of classes | nearest | "
             + " | ".join(f"distance of {n:,}" for n in sizes) + " | 32 digits take |",
             "|---" + "|---:" * (len(sizes) + 5) + "|"]

    def line(name: str, row: dict, distances: list[str], seconds: str) -> str:
        return " | ".join([f"| {name}", f"{row['count']:,}", f"{row['confident']:.1%}".replace(
            "%", " %"), f"{row['chi2']:.0f}", f"{row['nearest']:.3f}", *distances, seconds + " |"])

    for name, row in found["chains"].items():
        distances = [f"{row['distances'][n]:.2f}" if n in row["distances"] else "" for n in sizes]
        lines.append(line(name, row, distances, f"{row['seconds']:.1f} s"))
    floors = ["{:.2f} ± {:.2f}".format(*found["floor"][n]) for n in sizes]
    return "\n".join([*lines, line("real digits", found["test images"], floors, "")])


PARTS = {part.__name__: part for part in
         (digits, difficulty, decided, epochs, samplers, noise, copies)}


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description="Measure the claims.")
    parser.add_argument("parts", nargs="*", metavar="PART", help=f"{', '.join(PARTS)} (all)")
    parser.add_argument("--data", default=str(ROOT / "data"), help="folder that holds MNIST/raw")
    parser.add_argument("--checkpoint", default=str(SHIPPED), help="model file (the shipped one)")
    parser.add_argument("--count", type=int, default=500, help="images in 1,000 steps (500)")
    parser.add_argument("--few", type=int, default=200, help="by other samplers, "
                        "with another variance or clipping, or by the blog's network (200)")
    parser.add_argument("--cheap", type=int, default=2000, help="images in fewer steps (2000)")
    parser.add_argument("--device", default="auto", help="cuda, mps or cpu (the first there is)")
    parser.add_argument("--out", help="file for the results (claims.pt beside the model)")
    parser.add_argument("--scratch", default=str(ROOT / "runs" / "samples"),
                        help="folder that keeps the samples")
    parser.add_argument("--table", action="store_true", help="print the samplers, measure nothing")
    args = parser.parse_args(argv)
    if args.table:
        out = Path(args.out or Path(args.checkpoint).parent / "claims.pt")
        return print(table(torch.load(out, weights_only=True)["samplers"]))
    unknown = [name for name in args.parts if name not in PARTS]
    if unknown:
        parser.error(f"unknown part {unknown[0]!r}; known are {', '.join(PARTS)}")
    if min(args.count, args.few, args.cheap) < SIZES[0]:
        parser.error(f"distances need at least {SIZES[0]} images")
    path, checkpoint = open_checkpoint(args.checkpoint)
    if checkpoint.config.dataset != "mnist":
        parser.error("the classifier and the linear denoiser are of MNIST; this model is not")
    counts = args.count, args.few, args.cheap
    out = Path(args.out or path.parent / "claims.pt")
    before = torch.load(out, weights_only=True) if out.exists() else {}
    if {part["model"] for part in before.values()} - {fingerprint(path)}:
        parser.error(f"{out} is of another model; name another file by --out, or delete it")
    if not out.parent.is_dir():
        parser.error(f"no folder {out.parent}")
    bench = Bench(checkpoint, path, args.data, counts, args.device, out, Path(args.scratch))
    for name in args.parts or PARTS:
        begun = time.perf_counter()
        print(f"-- {name}", flush=True)
        found = PARTS[name](bench)
        # Another process may have measured another part in the meantime.
        before = torch.load(bench.out, weights_only=True) if bench.out.exists() else {}
        save(bench.out, before | {name: found | {"model": bench.scratch.name}})
        print(f"-- {name}: {time.perf_counter() - begun:.0f} s", flush=True)


if __name__ == "__main__":
    main()
