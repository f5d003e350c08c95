"""How many bits does the model spend on a pixel of a test digit? The variational bound, measured.

    python -m tests.experiments.bound --data DIR               17 minutes on one CPU core
    python -m tests.experiments.bound --data DIR --count 500 --out FILE
                                                               a first look, in 3 minutes
    python -m tests.experiments.bound --table                  only print what has been measured

An image to which a model gives the probability p can be stored in -log2 p bits. The mean of that is
at most the bound that train.py derives, a sum of terms that are averaged over q. With d pixels,
error = ‖μ̃_t - μ_θ‖²/d and r = β̃_t/σ_t², these terms are, in nats per pixel,

    prior   KL(q(x_T|x₀) ‖ N(0, 1)) / d, known exactly for every image
    t ≥ 2   KL(q(x_{t-1}|x_t, x₀) ‖ N(μ_θ, σ_t²)) / d = (r - 1 - ln r)/2 + error / 2σ_t²
    t = 1   -ln P(x₀|x₁) / d, the decoder (DDPM, section 3.3). The probability of a pixel x is the
            one that N(x̂₀, σ₁²) gives to [x - 1/255, x + 1/255]; black and white also own all that
            lies beyond

μ_θ is the mean of the sampler's step, with x̂₀ clipped as it is there and in DDPM's code. The last
step of the sampler adds no noise. Here it does, so that every image has a probability. The same
guesses of the network serve three choices of σ_t²:

    beta        β_t, and β₁ in the decoder
    beta_tilde  β̃_t, and β̃₂ in the decoder, as in DDPM's code, because β̃₁ = 0
    optimal     β̃_t + E error, and the best number for the decoder, both from training images

The third choice makes each term as small as possible: there the derivative by σ_t² is 0, and
½ ln(σ_t²/β̃_t) remains. For a perfect network without clipping, it is the analytic variance of Bao
et al.: ε - ε_θ is then orthogonal to ε_θ, so E‖ε - ε_θ‖²/d = 1 - E‖ε_θ‖²/d, and only the latter
must be known. For a network that errs, it is still the best variance for the means as they are.

All T terms of all images would take hours. So each image is seen at t = 1 and at K = 19 other t,
which are drawn with probabilities p_t. The sum over t ≥ 2 is estimated by the sum of term/(K p_t)
over these. A given t comes up K p_t times on average, so the mean of the estimate is the sum,
whatever p is. If p_t is nearly proportional to the terms, as measured on training images, all draws
give nearly the same estimate. Images have independent draws, so the standard error is the standard
deviation over images, divided by the root of their number. It includes the choice of images.

Why so many bits? Most of them belong to t ≤ 50, to which the plain objective gives little weight.
And our decoder is never certain: with σ₁² = β₁ even an exact x̂₀ costs 0.62 bits for a black pixel
and 1.71 for a grey one, while a good compressor spends almost nothing on the black pixels, which
are four of five. README.md compares the bound with other programs.

Sources: DDPM, Ho et al. 2020, arXiv 2006.11239. Bao et al. 2022, arXiv 2201.06503.
"""

import argparse
import json
import math
import time
from pathlib import Path

import torch
from tqdm import tqdm

from plots import fingerprint
from sample import SHIPPED, open_checkpoint, predict_clean
from schedule import NoiseSchedule
from train import HERE, load_images
from unet import pick_device, prepare_device

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
    """KL(q(x_{t-1}|x_t, x₀) ‖ N(μ_θ, σ_t²)) per pixel, in nats.

    t (integers in 2..T), variance (σ_t²) and error (‖μ̃_t - μ_θ‖²/d) have one shape, which is also
    that of the result.
    """
    r = schedule.beta_tilde[t] / variance
    return (r - 1 - r.log()) / 2 + error / (2 * variance)


def decoder(pixels: torch.Tensor, mean: torch.Tensor, variance: torch.Tensor) -> torch.Tensor:
    """-ln P(x₀|x₁) per pixel, in nats, of N(mean, variance) cut into the 256 values of a byte.

    pixels, mean  (N, ...) uint8 and float64; variance is σ₁², one number. Returns (N,)
    """
    nats = []
    for k, m in zip(pixels.split(500), mean.split(500)):  # in parts, to need less memory
        # The ends of the interval of each byte k, in standard deviations from the mean.
        deviation = variance.sqrt()
        lower = torch.where(k > 0, (2 * k.double() - 1) / 255 - 1 - m, -math.inf) / deviation
        upper = torch.where(k < 255, (2 * k.double() + 1) / 255 - 1 - m, math.inf) / deviation

        # P = Φ(upper) - Φ(lower). To the right of the mean, both are 1 up to rounding. So what lies
        # there is mirrored to the left, where the logarithms are exact, however small the numbers.
        is_right = lower + upper > 0
        near = torch.where(is_right, -lower, upper)
        far = torch.where(is_right, -upper, lower)
        log_near = torch.special.log_ndtr(near)
        log_far = torch.special.log_ndtr(far)
        log = log_near + (-torch.expm1(log_far - log_near)).log()
        nats.append(-log.flatten(1).mean(1))
    return torch.cat(nats)


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
    """The σ₁² for which the mean of `decoder` is least, to 0.3 %.

    It is the best of 17 values on a grid of ln σ², then of 17 closer ones around it, and so on.
    """
    low, high = math.log(1e-8), 0.0
    for _ in range(4):
        grid = torch.linspace(low, high, 17, dtype=torch.float64)
        losses = torch.stack([decoder(pixels, mean, variance).mean() for variance in grid.exp()])
        best = losses.argmin()
        low, high = grid[max(best - 1, 0)].item(), grid[min(best + 1, 16)].item()
    return grid[best].exp()


def probabilities(terms: torch.Tensor) -> torch.Tensor:
    """p_t, (T+1,), for t ≥ 2: four fifths in proportion to the terms (T+1,), and one fifth the same
    for all t, so that none is neglected.
    """
    p = 0.8 * terms / terms[2:].sum() + 0.2 / (len(terms) - 2)
    p[:2] = 0
    return p


def draw_levels(p: torch.Tensor, u: torch.Tensor) -> torch.Tensor:
    """Integers t, (N, K), with probability p_t, made from u (N, K), uniform on [0, 1).

    The k-th of a row comes from the k-th of K equal slices of the probability, so that the draws of
    a row are spread evenly.
    """
    slices = (torch.arange(u.shape[1], dtype=torch.float64) + u) / u.shape[1]
    # The sum of p is 1 up to rounding. The clamp is needed if it is a little less.
    return torch.searchsorted(p.cumsum(0), slices, right=True).clamp(max=len(p) - 1)


@torch.no_grad()
def look(model: torch.nn.Module, schedule: NoiseSchedule, images: torch.Tensor, rows: torch.Tensor,
         t: torch.Tensor, generator: torch.Generator,
         clip: bool = True) -> tuple[torch.Tensor, torch.Tensor]:
    """Let the network guess the noise in M noisy images.

    images   uint8 (N, 1, H, W), of which the M images with the indices `rows` (M,) are taken
    t        (M,) integers in 1..T, the noise level of each

    Returns error = ‖μ̃_t - μ_θ‖²/d, (M,), and the x̂₀ of those with t = 1, both float64.
    """
    device = next(model.parameters()).device
    errors = []
    last_guesses = []
    bar = tqdm(total=len(t), unit=" images", disable=None)
    for row, level in zip(rows.split(128), t.split(128)):
        # Make the noisy images, and ask the network.
        x0 = images[row].double() / 127.5 - 1
        eps = torch.randn(x0.shape, generator=generator, dtype=torch.float64)
        xt = schedule.q_sample(x0, level, eps)
        eps_hat = model(xt.float().to(device), level.to(device)).cpu().double()

        # Compare the two means of the step back.
        x0_hat = predict_clean(schedule, xt, level, eps_hat, clip)
        exact, _ = schedule.q_posterior(x0, xt, level)
        mean, _ = schedule.q_posterior(x0_hat, xt, level)
        errors.append((exact - mean).square().flatten(1).mean(1))
        last_guesses.append(x0_hat[level == 1])
        bar.update(len(level))
    bar.close()
    return torch.cat(errors), torch.cat(last_guesses)


def mean_by_level(values: torch.Tensor, t: torch.Tensor,
                  T: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Mean of the values (M,) at each t, and its standard error, (T+1,); NaN if unknown."""
    zero = torch.zeros(T + 1, dtype=torch.float64)
    count = t.bincount(minlength=T + 1)
    mean = zero.index_add(0, t, values) / count
    square = zero.index_add(0, t, (values - mean[t]).square())
    return mean, (square / (count - 1).clamp(min=0) / count).sqrt()


def fit(model: torch.nn.Module, schedule: NoiseSchedule, images: torch.Tensor, count: int,
        generator: torch.Generator, clip: bool = True) -> tuple[torch.Tensor, torch.Tensor]:
    """Learn the variances from training images, uint8 (N, 1, H, W), and the size of the terms.

    The bound depends on σ_t² most at small t, so `count` images are seen at t = 1, and count/t at
    other t, but at least 20.

    Returns (3, T+1) variances, in the order of VARIANCES, with that of the decoder at t = 1; and
    (3, T+1) terms with these variances.
    """
    levels = torch.arange(1, schedule.T + 1)
    t = levels.repeat_interleave((count // levels).clamp(min=20))
    rows = torch.randint(len(images), t.shape, generator=generator)
    errors, x0_hat = look(model, schedule, images, rows, t, generator, clip)
    error, _ = mean_by_level(errors, t, schedule.T)
    pixels = images[rows[t == 1]]
    variances = torch.stack([schedule.beta, schedule.beta_tilde, optimal_variance(schedule, error)])
    variances[1, 1] = schedule.beta_tilde[2]
    variances[2, 1] = fit_decoder(pixels, x0_hat)
    terms = [bound_terms(schedule, variance, error, decoder(pixels, x0_hat, variance[1]).mean())
             for variance in variances]
    return variances, torch.stack(terms)


def mean_and_error(values: torch.Tensor) -> list[float]:
    """Mean of independent numbers (N,), and its standard error."""
    return [values.mean().item(), (values.std() / math.sqrt(len(values))).item()]


def rounded(values: torch.Tensor, digits: int = 4) -> list[float | None]:
    """Numbers for JSON, which has no NaN, with no more digits than are useful."""
    return [None if math.isnan(x) else float(f"{x:.{digits}g}") for x in values.tolist()]


def groups_of_levels(T: int) -> dict[str, tuple[int, int]]:
    """The name, the first and the last t of each group of the table, up to T."""
    starts = [start for start in STARTS if start <= T]
    ends = [start - 1 for start in starts[1:]] + [T]
    return {f"t = {low}-{high}" if high > low else f"t = {low}": (low, high)
            for low, high in zip(starts, ends)}


def measure(model: torch.nn.Module, schedule: NoiseSchedule, images: torch.Tensor,
            variances: torch.Tensor, p: torch.Tensor, draws: int, generator: torch.Generator,
            clip: bool = True) -> dict:
    """The bound of images, uint8 (N, 1, H, W), seen `draws` times each, in bits per pixel.

    Returns for each of VARIANCES [number, standard error] of the whole bound, of the prior, and of
    groups of t; and for each t, as lists of length T+1, the mean term and its standard error, None
    if unknown.
    """
    count = len(images)
    K = draws - 1
    T = schedule.T

    # Draw the levels: t = 1 for each image, and K others.
    t = draw_levels(p, torch.rand(count, K, generator=generator, dtype=torch.float64))
    levels = torch.cat([torch.ones(count, 1, dtype=torch.long), t], dim=1)  # (N, draws)
    rows = torch.arange(count).repeat_interleave(draws)
    errors, x0_hat = look(model, schedule, images, rows, levels.flatten(), generator, clip)
    later_errors = errors.view(count, draws)[:, 1:]

    # An image's sum over t is estimated by its term at 1, and term/(K p_t) for each other.
    divisors = torch.cat([torch.ones(count, 1, dtype=torch.float64), K * p[t]], dim=1)
    prior_bits = BITS * prior(schedule, images.double() / 127.5 - 1)  # (N,)
    results = {"draws": levels.flatten().bincount(minlength=T + 1).tolist()}
    for name, variance in zip(VARIANCES, variances):
        first = decoder(images, x0_hat, variance[1])[:, None]
        rest = divergence(schedule, t, variance[t], later_errors)
        terms = BITS * torch.cat([first, rest], dim=1)  # (N, draws)
        shares = terms / divisors
        groups = {"prior": mean_and_error(prior_bits)}
        for group, (low, high) in groups_of_levels(T).items():
            inside = (levels >= low) & (levels <= high)
            groups[group] = mean_and_error((shares * inside).sum(1))
        mean, error = mean_by_level(terms.flatten(), levels.flatten(), T)
        results[name] = {"total": mean_and_error(prior_bits + shares.sum(1)), "groups": groups,
                         "terms": rounded(mean), "errors": rounded(error)}
    return results


def table(results: dict) -> str:
    """The table of README.md, in Markdown."""
    rows = {group.replace("-", " to "): [results[name]["groups"][group] for name in VARIANCES]
            for group in results["beta"]["groups"]}
    rows["**in all**"] = [results[name]["total"] for name in VARIANCES]
    lines = ["| bits per pixel | " + " | ".join(VARIANCES) + " |", "|---" + "|---:" * 3 + "|"]
    for label, row in rows.items():
        numbers = " | ".join(f"{value:.4f} ± {error:.4f}" for value, error in row)
        lines.append(f"| {label} | {numbers} |")
    return "\n".join(lines)


def measure_file(args: argparse.Namespace, out: Path, parser: argparse.ArgumentParser) -> None:
    """Measure the model file that the command line names, and write the results."""
    begun = time.perf_counter()
    device = pick_device(args.device)
    prepare_device(device)
    path, checkpoint = open_checkpoint(args.checkpoint)
    if out.exists() and json.loads(out.read_text())["model"] != fingerprint(path):
        parser.error(f"{out} is of another model; name another file by --out, or delete it")
    model = checkpoint.model.to(device)
    schedule = checkpoint.schedule

    # Read the images, and choose which test images to measure.
    generator = torch.Generator().manual_seed(0)
    known, _ = load_images(args.data, True, checkpoint.config.dataset)
    images, _ = load_images(args.data, False, checkpoint.config.dataset)
    images = images[torch.randperm(len(images), generator=generator)[:args.count]]

    # Measure.
    variances, terms = fit(model, schedule, known, args.fit, generator, args.clip)
    p = probabilities(terms.mean(0))
    results = {"model": fingerprint(path), "held_out": checkpoint.history["held_out"],
               "count": len(images), "draws_per_image": args.draws, "fit": args.fit,
               "clip": args.clip}
    results |= measure(model, schedule, images, variances, p, args.draws, generator, args.clip)
    results |= {"optimal_variance": rounded(variances[2], 6),
                "seconds": round(time.perf_counter() - begun), "device": device.type,
                "threads": torch.get_num_threads(), "torch": torch.__version__}

    # Replace the file only when the new one is complete.
    part = out.with_name(out.name + ".part")
    part.write_text(json.dumps(results, allow_nan=False) + "\n")
    part.replace(out)


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description="Measure the bound on the bits of a test image.")
    parser.add_argument("--data", default=str(HERE / "data"),
                        help="folder that holds MNIST/raw (default: %(default)s)")
    parser.add_argument("--checkpoint", default=str(SHIPPED),
                        help="model file (default: the shipped one)")
    parser.add_argument("--count", type=int, default=10_000,
                        help="number of test images (default: all %(default)s)")
    parser.add_argument("--draws", type=int, default=20,
                        help="number of t per image, the first of which is 1 "
                        "(default: %(default)s)")
    parser.add_argument("--fit", type=int, default=2000,
                        help="number of training images at t = 1 (default: %(default)s)")
    parser.add_argument("--no-clip", dest="clip", action="store_false",
                        help="do not clip the predicted clean image to [-1, 1]")
    parser.add_argument("--out", help="file for the results (default: bound.json beside the model)")
    parser.add_argument("--device", default="auto",
                        help="cuda, mps or cpu (default: the first that is there)")
    parser.add_argument("--table", action="store_true",
                        help="print the table of what is in --out, measure nothing")
    args = parser.parse_args(argv)
    out = Path(args.out or Path(args.checkpoint).parent / "bound.json")
    if args.count < 2 or args.draws < 2:
        parser.error("a standard error needs at least two images, and an image two draws")
    is_standard = all(getattr(args, name) == parser.get_default(name)
                      for name in ("count", "draws", "fit", "clip"))
    if not args.table:
        if not args.out and not is_standard:
            parser.error("this is not the measurement that bound.json is for; name a file by --out")
        if not out.parent.is_dir():
            parser.error(f"no folder {out.parent}")
        measure_file(args, out, parser)

    results = json.loads(out.read_text())
    print(f"model {results['model']}, {results['count']:,} test images at "
          f"{results['draws_per_image']} t each, {results['seconds']} s\n\n{table(results)}")


if __name__ == "__main__":
    main()
