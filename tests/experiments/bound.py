"""How many bits does the model spend on a pixel of a test digit? The variational bound, measured.

    python tests/bound.py --data DIR                            17 minutes on one CPU core
    python tests/bound.py --data DIR --count 500 --out FILE     a first look, in 3 minutes
    python tests/bound.py --table                               only print what has been measured

An image to which a model gives the probability p can be stored in -log2 p bits. The mean of that is
at most the bound of schedule.py, section 5, a sum of terms that are averaged over q. With d pixels,
error = ‖μ̃_t - μ_θ‖²/d and r = β̃_t/σ_t² they are, in nats per pixel,

    prior   KL(q(x_T|x₀) ‖ N(0, 1)) / d, known exactly for every image
    t ≥ 2   KL(q(x_{t-1}|x_t, x₀) ‖ N(μ_θ, σ_t²)) / d = (r - 1 - ln r)/2 + error / 2σ_t²
    t = 1   -ln P(x₀|x₁) / d, the decoder (DDPM, section 3.3). A pixel x has the probability that
            N(x̂₀, σ₁²) gives to [x - 1/255, x + 1/255]; black and white own all beyond, too

μ_θ is the mean of the sampler's step, x̂₀ clipped as there and as in the bound of DDPM's code. The
sampler's last step adds no noise; here it does, to give every image a probability. The same guesses
of the network serve three choices of σ_t²:

    beta        β_t, and β₁ in the decoder
    beta_tilde  β̃_t, and β̃₂ in the decoder, as in DDPM's code, because β̃₁ = 0
    optimal     β̃_t + E error, and the best number for the decoder, both from training images

The last makes each term least: its derivative by σ_t² is 0 there, and ½ ln(σ_t²/β̃_t) is left. For
a perfect network without clipping it is the analytic variance of Bao et al. Then ε - ε_θ is
orthogonal to ε_θ, so E‖ε - ε_θ‖²/d = 1 - E‖ε_θ‖²/d, and they need only the latter. For a network
that errs, it is still the best for the means as they are.

All T terms of all images would take hours. So each image is seen at t = 1 and K = 19 other t, drawn
with probabilities p_t, and its sum over t ≥ 2 is estimated by that of term/(K p_t) over these. On
average K p_t of them are t, so the mean of the estimate is the sum, whatever p is. With p_t nearly
proportional to the terms, as seen on training images, all draws say nearly the same. Images have
independent draws, so the standard error is the standard deviation over images divided by the root
of their number. It includes the choice of images.

Why so many bits? lzma takes 1.38 of the raw pixels, Glow 1.05 (reported with FFJORD), the gated
PixelCNN of the UvA deep learning tutorials, 852,160 parameters, 0.808. The last two are trained to
save bits. The plain objective spends little effort on t ≤ 50, where most of the bits are. And our
decoder is never certain: with σ₁² = β₁ even an exact x̂₀ costs 0.62 bits for a black pixel, 1.71 for
a grey one. Four of five pixels are black, and lzma or a PixelCNN can spend almost nothing on them.

Sources: DDPM, Ho et al. 2020, arXiv 2006.11239. Bao et al. 2022, arXiv 2201.06503.
"""

import argparse
import json
import math
import sys
import time
from pathlib import Path

import torch
from tqdm import tqdm

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from plots import fingerprint  # noqa: E402
from sample import SHIPPED, open_checkpoint, predict_clean  # noqa: E402
from schedule import NoiseSchedule  # noqa: E402
from train import load_images  # noqa: E402
from unet import pick_device  # noqa: E402

RESULTS = SHIPPED.parent / "bound.json"
VARIANCES = ("beta", "beta_tilde", "optimal")
STARTS = (1, 2, 11, 51, 101, 201, 501)  # the first t of each group of the table
BITS = 1 / math.log(2)  # in a nat


def prior(schedule: NoiseSchedule, x0: torch.Tensor) -> torch.Tensor:
    """KL(q(x_T|x₀) ‖ N(0, 1)) per pixel, in nats: x0 (N, C, H, W) in [-1, 1] -> (N,)."""
    signal = schedule.alpha_bar[-1]
    square = x0.square().flatten(1).mean(1)
    return (signal * (square - 1) - torch.log1p(-signal)) / 2


def divergence(schedule: NoiseSchedule, t: torch.Tensor, variance: torch.Tensor,
               error: torch.Tensor) -> torch.Tensor:
    """KL(q(x_{t-1}|x_t, x₀) ‖ N(μ_θ, σ_t²)) per pixel, in nats, for each t (integers in 2..T),
    σ_t² and error = ‖μ̃_t - μ_θ‖²/d, all of one shape."""
    r = schedule.beta_tilde[t] / variance
    return (r - 1 - r.log()) / 2 + error / (2 * variance)


def decoder(pixels: torch.Tensor, mean: torch.Tensor, variance: torch.Tensor) -> torch.Tensor:
    """-ln P(x₀|x₁) per pixel, in nats, of N(mean, variance) cut into the 256 values of a byte.

    pixels, mean  (N, ...) uint8 and float64; variance is σ₁², one number. Returns (N,)
    """
    found = []
    for k, m in zip(pixels.split(500), mean.split(500)):  # in parts, to need less memory
        lower = torch.where(k > 0, (2 * k.double() - 1) / 255 - 1 - m, -math.inf) / variance.sqrt()
        upper = torch.where(k < 255, (2 * k.double() + 1) / 255 - 1 - m, math.inf) / variance.sqrt()
        # P = Φ(upper) - Φ(lower). Right of the mean both are 1 to rounding. So what lies there is
        # mirrored to the left, where their logarithms are exact, however small they are.
        right = lower + upper > 0
        lower, upper = torch.where(right, -upper, lower), torch.where(right, -lower, upper)
        log = torch.special.log_ndtr(upper)
        log = log + (-torch.expm1(torch.special.log_ndtr(lower) - log)).log()
        found.append(-log.flatten(1).mean(1))
    return torch.cat(found)


def bound_terms(schedule: NoiseSchedule, variance: torch.Tensor, error: torch.Tensor,
                first: torch.Tensor) -> torch.Tensor:
    """The bound without its prior, term by term, (T+1,) with 0 at t = 0.

    variance, error  (T+1,), for t in 2..T as above; first is the term of t = 1
    """
    t = torch.arange(2, schedule.T + 1)
    rest = divergence(schedule, t, variance[t], error[t])
    return torch.cat([torch.stack([torch.zeros_like(first), first]), rest])


def optimal_variance(schedule: NoiseSchedule, error: torch.Tensor) -> torch.Tensor:
    """The σ_t² that makes the term of each t ≥ 2 least, for the mean error at each t, (T+1,)."""
    return schedule.beta_tilde + error


def fit_decoder(pixels: torch.Tensor, mean: torch.Tensor) -> torch.Tensor:
    """The σ₁² with which the mean of `decoder` is least: the best of 17 on a grid of ln σ², then
    of 17 closer ones around it, and so on, to 0.3 %."""
    low, high = math.log(1e-8), 0.0
    for _ in range(4):
        grid = torch.linspace(low, high, 17, dtype=torch.float64)
        best = torch.stack([decoder(pixels, mean, v).mean() for v in grid.exp()]).argmin()
        low, high = grid[max(best - 1, 0)].item(), grid[min(best + 1, 16)].item()
    return grid[best].exp()


def probabilities(terms: torch.Tensor) -> torch.Tensor:
    """p_t, (T+1,), for t ≥ 2: four fifths of it in proportion to the terms (T+1,), one fifth equal
    for all, so that no t is starved."""
    p = 0.8 * terms / terms[2:].sum() + 0.2 / (len(terms) - 2)
    p[:2] = 0
    return p


def draw_levels(p: torch.Tensor, u: torch.Tensor) -> torch.Tensor:
    """Integers t, (N, K), with probability p_t, made from u (N, K) uniform on [0, 1). The k-th of a
    row comes from the k-th of K equal slices of the probability, which spreads a row evenly."""
    slices = (torch.arange(u.shape[1], dtype=torch.float64) + u) / u.shape[1]
    # The sum of p is 1 up to rounding. The clamp guards against one below.
    return torch.searchsorted(p.cumsum(0), slices, right=True).clamp(max=len(p) - 1)


@torch.no_grad()
def look(model: torch.nn.Module, schedule: NoiseSchedule, images: torch.Tensor, rows: torch.Tensor,
         t: torch.Tensor, generator: torch.Generator,
         clip: bool = True) -> tuple[torch.Tensor, torch.Tensor]:
    """Let the network guess the noise in M noisy images.

    images   uint8 (N, 1, H, W), of which the M images of numbers `rows` (M,) are taken
    t        (M,) integers in 1..T, the noise level of each

    Returns error = ‖μ̃_t - μ_θ‖²/d, (M,), and the x̂₀ of those with t = 1, both float64.
    """
    device, errors, last = next(model.parameters()).device, [], []
    bar = tqdm(total=len(t), unit=" images", disable=None)
    for row, level in zip(rows.split(128), t.split(128)):
        x0 = images[row].double() / 127.5 - 1
        eps = torch.randn(x0.shape, generator=generator, dtype=torch.float64)
        xt = schedule.q_sample(x0, level, eps)
        eps_hat = model(xt.float().to(device), level.to(device)).cpu().double()
        x0_hat = predict_clean(schedule, xt, level, eps_hat, clip)
        exact, _ = schedule.q_posterior(x0, xt, level)
        mean, _ = schedule.q_posterior(x0_hat, xt, level)
        errors.append((exact - mean).square().flatten(1).mean(1))
        last.append(x0_hat[level == 1])
        bar.update(len(level))
    bar.close()
    return torch.cat(errors), torch.cat(last)


def mean_by_level(values: torch.Tensor, t: torch.Tensor, T: int) -> tuple[torch.Tensor, ...]:
    """Mean of the values (M,) at each t, and its standard error, (T+1,); NaN if unknown."""
    zero, count = torch.zeros(T + 1, dtype=torch.float64), t.bincount(minlength=T + 1)
    mean = zero.index_add(0, t, values) / count
    square = zero.index_add(0, t, (values - mean[t]).square())
    return mean, (square / (count - 1).clamp(min=0) / count).sqrt()


def fit(model: torch.nn.Module, schedule: NoiseSchedule, images: torch.Tensor, count: int,
        generator: torch.Generator, clip: bool = True) -> tuple[torch.Tensor, torch.Tensor]:
    """What is learned from training images, uint8 (N, 1, H, W). The bound depends on σ_t² most at
    small t, so `count` of them are seen at t = 1, and count/t at t, but 20 at least.

    Returns (3, T+1) variances, in the order of VARIANCES, with the decoder's at t = 1; and (3, T+1)
    terms with them.
    """
    t = torch.arange(1, schedule.T + 1)
    t = t.repeat_interleave((count // t).clamp(min=20))
    rows = torch.randint(len(images), t.shape, generator=generator)
    errors, x0_hat = look(model, schedule, images, rows, t, generator, clip)
    error, _ = mean_by_level(errors, t, schedule.T)
    pixels = images[rows[t == 1]]
    variances = torch.stack([schedule.beta, schedule.beta_tilde, optimal_variance(schedule, error)])
    variances[1, 1] = schedule.beta_tilde[2]
    variances[2, 1] = fit_decoder(pixels, x0_hat)
    return variances, torch.stack([
        bound_terms(schedule, v, error, decoder(pixels, x0_hat, v[1]).mean())
        for v in variances])


def mean_and_error(values: torch.Tensor) -> list[float]:
    """Mean of independent numbers (N,), and its standard error."""
    return [values.mean().item(), (values.std() / math.sqrt(len(values))).item()]


def rounded(values: torch.Tensor, digits: int = 4) -> list[float | None]:
    """As JSON has it: no NaN, and not more digits than are of use."""
    return [None if math.isnan(x) else float(f"{x:.{digits}g}") for x in values.tolist()]


def measure(model: torch.nn.Module, schedule: NoiseSchedule, images: torch.Tensor,
            variances: torch.Tensor, p: torch.Tensor, draws: int, generator: torch.Generator,
            clip: bool = True) -> dict:
    """The bound of images, uint8 (N, 1, H, W), seen `draws` times each, in bits per pixel.

    Returns for each of VARIANCES [number, standard error] in all, of the prior, and of groups of t;
    and for each t, as lists of length T+1, the mean term and its standard error, None if unknown.
    """
    count, K, T = len(images), draws - 1, schedule.T
    t = draw_levels(p, torch.rand(count, K, generator=generator, dtype=torch.float64))
    levels = torch.cat([torch.ones(count, 1, dtype=torch.long), t], dim=1)  # (N, draws)
    rows = torch.arange(count).repeat_interleave(draws)
    errors, x0_hat = look(model, schedule, images, rows, levels.flatten(), generator, clip)
    first = prior(schedule, images.double() / 127.5 - 1) * BITS  # (N,)
    starts = [start for start in STARTS if start <= T]
    found = {"draws": levels.flatten().bincount(minlength=T + 1).tolist()}
    for name, variance in zip(VARIANCES, variances):
        terms = BITS * torch.cat([
            decoder(images, x0_hat, variance[1])[:, None],
            divergence(schedule, t, variance[t], errors.view(count, draws)[:, 1:])], dim=1)
        # An image's sum over t is estimated by its term at 1, and term/(K p_t) for each other.
        shares = terms / torch.cat([torch.ones(count, 1, dtype=torch.float64), K * p[t]], dim=1)
        groups = {"prior": mean_and_error(first)}
        for low, high in zip(starts, [start - 1 for start in starts[1:]] + [T]):
            inside = (levels >= low) & (levels <= high)
            key = f"t = {low}-{high}" if high > low else f"t = {low}"
            groups[key] = mean_and_error((shares * inside).sum(1))
        curve = mean_by_level(terms.flatten(), levels.flatten(), T)
        found[name] = {"total": mean_and_error(first + shares.sum(1)), "groups": groups,
                       "terms": rounded(curve[0]), "errors": rounded(curve[1])}
    return found


def table(found: dict) -> str:
    """The README's table, in Markdown."""
    rows = {key.replace("-", " to "): [found[name]["groups"][key] for name in VARIANCES]
            for key in found["beta"]["groups"]}
    rows["**in all**"] = [found[name]["total"] for name in VARIANCES]
    lines = ["| bits per pixel | " + " | ".join(VARIANCES) + " |", "|---" + "|---:" * 3 + "|"]
    for key, row in rows.items():
        lines.append(f"| {key} | " + " | ".join(f"{a:.4f} ± {b:.4f}" for a, b in row) + " |")
    return "\n".join(lines)


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description="Measure the bound on the bits of a test image.")
    parser.add_argument("--data", default=str(ROOT / "data"), help="folder that holds MNIST/raw")
    parser.add_argument("--checkpoint", default=str(SHIPPED), help="model file (the shipped one)")
    parser.add_argument("--count", type=int, default=10_000, help="test images (all 10,000)")
    parser.add_argument("--draws", type=int, default=20, help="t per image, the first is 1 (20)")
    parser.add_argument("--fit", type=int, default=2000, help="training images at t = 1 (2000)")
    parser.add_argument("--no-clip", dest="clip", action="store_false", help="do not clip x0_hat")
    parser.add_argument("--out", help="file for the numbers (bound.json beside the model)")
    parser.add_argument("--device", default="auto", help="cuda, mps or cpu (the first there is)")
    parser.add_argument("--table", action="store_true", help="print what is in --out, and no more")
    args = parser.parse_args(argv)
    out = Path(args.out or Path(args.checkpoint).parent / "bound.json")
    if args.count < 2 or args.draws < 2:
        parser.error("an error needs two images at least, and an image two draws")
    whole = all(getattr(args, name) == parser.get_default(name)
                for name in ("count", "draws", "fit", "clip"))
    if not (args.table or args.out or whole):
        parser.error("this is not the measurement that bound.json is for; name a file by --out")
    if not args.table and not out.parent.is_dir():
        parser.error(f"no folder {out.parent}")
    if not args.table:
        device, begun = pick_device(args.device), time.perf_counter()
        path, (model, schedule, config, history, _) = open_checkpoint(args.checkpoint)
        if out.exists() and json.loads(out.read_text())["model"] != fingerprint(path):
            parser.error(f"{out} is of another model; name another file by --out, or delete it")
        model, generator = model.to(device), torch.Generator().manual_seed(0)
        known, images = (load_images(args.data, part, config.dataset)[0] for part in (True, False))
        images = images[torch.randperm(len(images), generator=generator)[:args.count]]
        variances, terms = fit(model, schedule, known, args.fit, generator, args.clip)
        found = {"model": fingerprint(path), "held_out": history["held_out"],
                 "count": len(images), "draws_per_image": args.draws, "fit": args.fit,
                 "clip": args.clip}
        found |= measure(model, schedule, images, variances, probabilities(terms.mean(0)),
                         args.draws, generator, args.clip)
        found |= {"optimal_variance": rounded(variances[2], 6),
                  "seconds": round(time.perf_counter() - begun), "device": device.type,
                  "threads": torch.get_num_threads(), "torch": torch.__version__}
        part = out.with_name(out.name + ".part")  # until it is complete
        part.write_text(json.dumps(found, allow_nan=False) + "\n")
        part.replace(out)
    found = json.loads(out.read_text())
    print(f"model {found['model']}, {found['count']:,} test images at {found['draws_per_image']} t "
          f"each, {found['seconds']} s\n\n{table(found)}")


if __name__ == "__main__":
    main()
