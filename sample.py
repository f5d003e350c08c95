"""Part 3. The reverse process: from pure noise to a digit, one small step at a time.

    python sample.py                                 32 digits from seeds 0..31, as a 4x8 picture
    python sample.py --seeds 7,40-46 --out my.png    other seeds, another file
    python sample.py --sampler sde-dpm++             in 20 steps instead of 1,000
    python sample.py --gif chain.gif                 the way from noise to digits, as an animation

Start from pure noise x_T and take T steps of Algorithm 2 of [DDPM], but clip x̂₀ (see below):

    1. the network guesses the noise in x_t:             ε̂ = ε_θ(x_t, t)
    2. which implies a guess at the clean image:         x̂₀ = (x_t - √(1-ᾱ_t) ε̂) / √ᾱ_t
    3. if x̂₀ were the truth, one step back would be drawn from q(x_{t-1} | x_t, x̂₀), a Gaussian
       whose mean μ̃_t and variance β̃_t are known (schedule.py, section 3)
    4. draw from it:                                     x_{t-1} = μ̃_t + √β̃_t z,   z ~ N(0, 1)

Why 1,000 steps, if line 2 of each already guesses the clean image? Because at large t the guess is
poor. The best answer in squared error is a mean, here of the noise given x_t. As x̂₀ is linear in
ε̂, it is a mean too: of all digits that x_t could have come from, weighted by their probability.
That is a grey blur. A step moves only a little towards it; then the network looks again, at a
slightly clearer image. Longer steps are less like the Gaussians of line 4, which need a small β.

Why add noise in line 4? Because x_{t-1} must be as noisy as the images that the network saw at t-1
in training: given x₀, its noise must have variance 1-ᾱ_{t-1}. The mean μ̃_t alone has less. It
contains x_t, with noise of variance 1-ᾱ_t, times √α_t (1-ᾱ_{t-1}) / (1-ᾱ_t). That leaves a variance
of α_t (1-ᾱ_{t-1})² / (1-ᾱ_t), and β̃_t is exactly what is missing. Without it the spread is lost.
Say the data are Gaussian of mean 0 and variance λ². Then x_t has variance v_t = ᾱ_t λ² + 1-ᾱ_t, and
a perfect ε̂ is √(1-ᾱ_t) x_t/v_t, covariance over variance. As v_t - β_t = α_t v_{t-1}, the mean, if
not clipped, is √α_t v_{t-1}/v_t times x_t. In T steps: √ᾱ_T λ²/v_T, or 0.006 λ². So x₀ is nearly 0.

Is β̃_t the best variance σ_t² (--variance) in line 4? The bound is lowest with β̃_t plus the mean
squared error that not knowing x₀ leaves in μ̃_t ("optimal" in README.md). For one known x₀ β̃_t
is exact. If the data are standard normal, β_t is exact [DDPM section 3.2]. Pixels in [-1, 1] have
variance at most 1, so even a linear guess at x₀ errs no more than for noise, and the best σ_t² lies
between. β_t exceeds β̃_t by 17 % at t = 10, by 2 % at t = 100. Last-step noise would stay on x₀.

Why clip x̂₀ to [-1, 1]? Pixels cannot lie outside. At t = T a mistake of 0.01 in ε̂ moves x̂₀ by
1.6. One step goes only a little way towards x̂₀, but mistakes of the same sign in many steps add
up. Clipping takes away what is certainly wrong; where no pixel is out of range it changes nothing.

FEWER STEPS. DDIM goes from t to any s < t by noising x̂₀ anew, with the noise it has just found:

        x_s = √ᾱ_s x̂₀ + √(1-ᾱ_s) ε̂                                                [DDIM Eq. 12]

Then x₀ is a function of x_T, and ever shorter steps approach a curve, the solution of an ODE. Let
r = √ᾱ/√(1-ᾱ) = √SNR, u = log r. As x_t/√(1-ᾱ_t) = r_t x̂₀ + ε̂, a step adds (r_s - r_t) x̂₀ to it
and ends on the curve if x̂₀ stays as it is. DPM-Solver++ lets x̂₀ go on changing as in the step
before, in equal steps of u. For Gaussian data, 10 are worth 50 of DDIM's. But a network errs, and
the ε̂ in x_s carries its mistakes on; line 4 replaces a part of it by fresh noise. SDE-DPM-Solver++
is line 4 with x̂₀ extrapolated so. Here 20 steps, equal in t, are as good as 1,000 (README.md).

ONE SEED, ONE DIGIT. Each image takes all its noise from a generator of its own, on the CPU. So seed
7 gives the same image, up to rounding, alone or among others, and has the same noise on any device.

Sources: [DDPM] Ho et al. 2020, arXiv 2006.11239. [IDDPM] Nichol, Dhariwal 2021, arXiv 2102.09672.
[DDIM] Song et al. 2021, arXiv 2010.02502. [DPM-Solver++] Lu et al. 2022, arXiv 2211.01095.
"""

import argparse
import math
import os
import re
import sys
from collections.abc import Iterator
from pathlib import Path

import torch
from einops import rearrange, repeat
from PIL import Image
from PIL.PngImagePlugin import PngInfo
from tqdm import tqdm

from schedule import NoiseSchedule
from train import DATASETS, HERE, Checkpoint, load_checkpoint
from unet import pick_device

VARIANCES = ("beta_tilde", "beta", "zero")
SAMPLERS = {"ddpm": math.inf, "ddim": 50, "dpm++": 20, "sde-dpm++": 20}  # their steps, at most T
SHIPPED = HERE / "pretrained" / "model.pt"


def predict_clean(schedule: NoiseSchedule, xt: torch.Tensor, t, eps_hat: torch.Tensor,
                  clip: bool = True) -> torch.Tensor:
    """x̂₀ that a guess at the noise in xt implies, (B, C, H, W), clipped to [-1, 1] if asked."""
    x0_hat = schedule.predict_x0(xt, t, eps_hat)
    return x0_hat.clamp(-1, 1) if clip else x0_hat


def p_step(schedule: NoiseSchedule, xt: torch.Tensor, t, eps_hat: torch.Tensor,
           noise: torch.Tensor, t_prev=None, variance: str = "beta_tilde",
           clip: bool = True) -> torch.Tensor:
    """Take one step back, x_t -> x_{t-1}.                               [DDPM Algorithm 2]

    xt        (B, C, H, W) images at noise level t
    t         int or (B,) integers in 1..T
    eps_hat   (B, C, H, W) the network's guess at the noise in xt
    noise     (B, C, H, W) standard normal; ignored in a step that ends at 0
    t_prev    where the step ends, int or (B,) integers below t; t - 1 if None
    variance  σ_t²: "beta_tilde", "beta", or "zero" for the mean alone
    clip      clip x̂₀ to [-1, 1]

    Returns x_{t_prev}, (B, C, H, W); no randomness of its own. Without clipping, its mean is that
    of [DDPM Eq. 11]. Raises ValueError for an unknown variance or a t out of range.
    """
    if variance not in VARIANCES:
        raise ValueError(f"unknown variance {variance!r}; known are {', '.join(VARIANCES)}")
    x0_hat = predict_clean(schedule, xt, t, eps_hat, clip)
    mean, sigma2 = schedule.q_posterior(x0_hat, xt, t, t_prev)
    if variance == "beta":
        # The last step, which ends at x₀, adds no noise. β̃ is 0 there by itself, β is not.
        beta = schedule.step_beta(t, t_prev).to(xt.dtype).to(xt.device)
        sigma2 = beta.reshape(sigma2.shape) * (sigma2 > 0)
    elif variance == "zero":
        sigma2 = torch.zeros_like(sigma2)
    return mean + sigma2.sqrt() * noise


def ddim_step(schedule: NoiseSchedule, xt: torch.Tensor, t: int, x0_hat: torch.Tensor,
              noise: torch.Tensor, t_prev: int, eta: float = 0.0) -> torch.Tensor:
    """Noise the predicted image again, to a lower level.                [DDIM Eq. 12]

    xt, noise  as in p_step; 0 <= t_prev < t; x0_hat is the prediction made from xt
    eta        0 reuses the noise of xt; 1 mixes in as much fresh noise as p_step does with
               beta_tilde, and is the same step                             [DDIM Eq. 16]
    """
    # Not the network's ε̂: if x̂₀ was clipped, the noise is what now makes the difference to x_t.
    eps_hat = schedule.predict_eps(xt, t, x0_hat)
    # Of the variance 1-ᾱ at t_prev, η² β̃_t is to be fresh: the share η² β_t/(1-ᾱ_t) of it.
    fresh = eta**2 * (schedule.step_beta(t, t_prev) / (1 - schedule.alpha_bar[t])).item()
    eps_hat = math.sqrt(1 - fresh) * eps_hat + math.sqrt(fresh) * noise
    return schedule.q_sample(x0_hat, t_prev, eps_hat)


def dpm_step(schedule: NoiseSchedule, xt: torch.Tensor, t: int, x0_hat: torch.Tensor,
             noise: torch.Tensor, t_prev: int, before: tuple[int, torch.Tensor] | None,
             eta: float = 0.0) -> torch.Tensor:
    """A DDIM step whose x̂₀ is extrapolated from two (2M).           [DPM-Solver++ Algorithm 2]

    before  t and x0_hat of the step before; None in the first step, which is that of ddim_step
    eta     as in ddim_step: 0 makes it a step of DPM-Solver++(2M), 1 of SDE-DPM-Solver++(2M)
    """
    if before is not None and t_prev > 0:  # the last step takes x̂₀ as it is
        u, u_next, u_before = (0.5 * schedule.snr(s).log().item() for s in (t, t_prev, before[0]))
        # A line through both predictions, read off in the middle of the step; it is not clipped.
        x0_hat = x0_hat + (u_next - u) / (2 * (u - u_before)) * (x0_hat - before[1])
    return ddim_step(schedule, xt, t, x0_hat, noise, t_prev, eta)


def timesteps(schedule: NoiseSchedule, sampler: str = "ddpm", steps: int | None = None,
              T: int | None = None) -> list[int]:
    """The noise levels that a chain visits, from T (that of the schedule, if None) down to 0.

    These are steps + 1 evenly spaced integers; None stands for the number in SAMPLERS, at most T.
    For dpm++, T, ..., 1 are the integers nearest to evenly spaced u = log r, each once. Raises
    ValueError unless 1 <= steps <= T."""
    T = T or schedule.T
    steps = min(T, SAMPLERS[sampler]) if steps is None else steps
    if not 1 <= steps <= T:
        raise ValueError(f"steps must be between 1 and {T}, not {steps}")
    if sampler != "dpm++":
        return [round(T * k / steps) for k in range(steps, -1, -1)]
    u = 0.5 * schedule.snr(torch.arange(1, T + 1)).log()  # (T,), falling
    wanted = torch.linspace(u[-1], u[0], steps, dtype=u.dtype)
    return [*dict.fromkeys((1 + (u[:, None] - wanted).abs().argmin(dim=0)).tolist()), 0]


@torch.no_grad()
def sample(model: torch.nn.Module, schedule: NoiseSchedule, seeds: list[int],
           sampler: str = "ddpm", variance: str = "beta_tilde", steps: int | None = None,
           clip: bool = True, start: tuple[int, torch.Tensor] | None = None,
           shape: tuple[int, int, int] = (1, 28, 28), eta: float = 0.0,
           ) -> Iterator[tuple[int, torch.Tensor, torch.Tensor]]:
    """Generate one image per seed, showing every step.                 [DDPM Algorithm 2]

    model     called as model(xt, t) with t in 1..T, (B,) integers; used in eval mode
    schedule  the schedule the model was trained with
    seeds     B integers; image k depends on seeds[k] alone
    sampler   "ddpm" (ancestral); in fewer steps "ddim" (eta: ddim_step), "dpm++", "sde-dpm++"
    variance  as in p_step, for ddpm
    steps     1..T; None is as in SAMPLERS. From t to s, ddpm has α = ᾱ_t/ᾱ_s  [IDDPM section 4]
    clip      clip x̂₀ to [-1, 1] in every step
    start     (t, xt) begins with these images at noise level t instead of with pure noise, and
              takes as many steps as said above, but at most t
    shape     (C, H, W) of an image

    Yields (t, xt, x0_hat) for each of timesteps(): images of noise level t and the prediction x̂₀
    made from them, both (B, C, H, W) on the device of the model. At t = 0 both are the finished
    images. Raises ValueError for impossible arguments, when the first triple is asked for.
    """
    for name, known in ((variance, VARIANCES), (sampler, SAMPLERS)):
        if name not in known:
            raise ValueError(f"unknown {name!r}; known are {', '.join(known)}")
    if len(seeds) == 0 or not 0 <= eta <= 1:
        raise ValueError("no seeds, so nothing to sample, or eta is not between 0 and 1")
    if sampler != "ddpm" and variance != "beta_tilde" or sampler != "ddim" and eta != 0:
        raise ValueError(f"{sampler} has no such choice: variance is one of ddpm, eta of ddim")
    eta = 1.0 if sampler == "sde-dpm++" else eta
    device = next(model.parameters()).device
    generators = [torch.Generator().manual_seed(seed) for seed in seeds]

    def draw_noise() -> torch.Tensor:
        return torch.stack([torch.randn(shape, generator=g) for g in generators]).to(device)

    xt, T, before = draw_noise(), schedule.T, None  # x_T
    if start is not None:
        T, xt = start[0], start[1].to(device)
        if not 1 <= T <= schedule.T or len(xt) != len(seeds):
            raise ValueError(f"start needs a t in 1..{schedule.T} and one image for each seed")
        steps = None if steps is None else min(steps, T)
    levels = timesteps(schedule, sampler, steps, T)
    for t, t_prev in zip(levels[:-1], levels[1:]):
        # Dropout and the like must rest while sampling. The caller may train between two steps.
        was_training = model.training
        model.eval()
        eps_hat = model(xt, torch.full((len(xt),), t, device=device))
        model.train(was_training)
        x0_hat, noise = predict_clean(schedule, xt, t, eps_hat, clip), draw_noise()
        yield t, xt, x0_hat
        if sampler == "ddpm":
            xt = p_step(schedule, xt, t, eps_hat, noise, t_prev, variance, clip)
        elif sampler == "ddim":
            xt = ddim_step(schedule, xt, t, x0_hat, noise, t_prev, eta)
        else:
            xt, before = dpm_step(schedule, xt, t, x0_hat, noise, t_prev, before, eta), (t, x0_hat)
    yield 0, xt, xt


# --------------------------------------------------------------------------- the command line

def open_checkpoint(name: str | None, finished: bool = True) -> tuple[Path, Checkpoint]:
    """Load a model file and print which: the one named, else that of your own run in runs/mnist,
    else the one that is shipped. A run that is not finished is passed over, unless finished is
    False. Raises OSError or ValueError, in one line."""
    path = Path(name or HERE / "runs" / "mnist" / "model.pt")
    if name is None and not path.exists():
        path = SHIPPED
    checkpoint = load_checkpoint(path)
    if name is None and finished and len(checkpoint.history["loss"]) < checkpoint.config.epochs:
        print(f"{path} is not finished yet; --checkpoint {path} would take it", file=sys.stderr)
        return open_checkpoint(str(SHIPPED))
    epochs = len(checkpoint.history["loss"])
    print(f"{path}: {DATASETS[checkpoint.config.dataset]}, {epochs} epochs"
          + (f", held-out loss {checkpoint.history['held_out'][-1]:.4f}" if epochs else ""),
          flush=True)
    return path, checkpoint


def parse_seeds(text: str) -> list[int]:
    """'0-3,7' -> [0, 1, 2, 3, 7]. Raises argparse.ArgumentTypeError for anything else."""
    seeds = []
    for part in text.split(","):
        match = re.fullmatch(r"(\d{1,18})(?:-(\d{1,18}))?", part, re.ASCII)
        first, last = (int(match[1]), int(match[2] or match[1])) if match else (1, 0)
        if first > last:
            raise argparse.ArgumentTypeError(f"{part!r} is not a seed or a range such as 0-31")
        if last - first + len(seeds) >= 10_000:
            raise argparse.ArgumentTypeError("more than 10,000 seeds; sample them in parts")
        seeds += range(first, last + 1)
    return seeds


def to_uint8(images: torch.Tensor) -> torch.Tensor:
    """The inverse of train.from_uint8. Values beyond [-1, 1] saturate; a bare cast would wrap."""
    return ((images + 1) * 127.5).round().clamp(0, 255).to(torch.uint8)


def draw_grid(images: torch.Tensor, scale: int = 4) -> Image.Image:
    """Images (B, 1, H, W) in [-1, 1], eight to a row, enlarged (make_grid takes long to import)."""
    columns, pad = min(8, len(images)), torch.nn.functional.pad
    cells = pad(to_uint8(images.cpu()), (0, 1, 0, 1, 0, 0, 0, -len(images) % columns), value=64)
    grid = pad(rearrange(cells, "(r c) 1 h w -> (r h) (c w)", c=columns), (1, 0, 1, 0), value=64)
    return Image.fromarray(repeat(grid, "h w -> (h i) (w j)", i=scale, j=scale).numpy())


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(usage=argparse.SUPPRESS, description="Draw digits.")
    parser.add_argument("--seeds", type=parse_seeds, default=list(range(32)), metavar="0-31",
                        help="one image for each seed: numbers and ranges with commas (0-31)")
    parser.add_argument("--sampler", choices=SAMPLERS, default="ddpm", help="(ddpm)")
    parser.add_argument("--eta", type=float, default=0.0, help="fresh noise of ddim, 0 to 1 (0)")
    parser.add_argument("--variance", choices=VARIANCES, default="beta_tilde",
                        help="variance of the noise that ddpm adds in each step (beta_tilde)")
    parser.add_argument("--steps", type=int, metavar="N", help="(ddpm all T, ddim 50, others 20)")
    parser.add_argument("--no-clip", dest="clip", action="store_false", help="do not clip x0_hat")
    parser.add_argument("--checkpoint", metavar="FILE", help="model (your own, else the shipped)")
    parser.add_argument("--out", metavar="PNG", help="picture (samples.png beside the model)")
    parser.add_argument("--gif", metavar="GIF", help="write the way there as an animation, too")
    parser.add_argument("--device", default="auto", help="cuda, mps or cpu (the first there is)")
    args = parser.parse_args(argv)
    try:
        device = pick_device(args.device)
        for option, ending, file in (("--out", ".png", args.out), ("--gif", ".gif", args.gif)):
            if file and Path(file).suffix.lower() != ending:
                raise ValueError(f"{option} must be a file that ends in {ending}, not {file}")
    except (ValueError, RuntimeError) as error:
        parser.error(str(error))
    try:
        path, checkpoint = open_checkpoint(args.checkpoint)
        model = checkpoint.model.to(device)
        levels = timesteps(checkpoint.schedule, args.sampler, args.steps)
        # Pictures go beside the model; those of the shipped one must not lie among shipped files.
        shipped = path.resolve().parent == SHIPPED.parent
        folder = HERE / "runs" / "pretrained" if shipped else path.parent
        files = [Path(file) for file in (args.out or folder / "samples.png", args.gif) if file]
        for file in files:  # what cannot be written should fail now, not after a minute
            file.parent.mkdir(parents=True, exist_ok=True)
            if file.is_dir() or not os.access(file.parent, os.W_OK):
                raise OSError(f"cannot write {file}; name another file")
        chain = sample(model, checkpoint.schedule, args.seeds, args.sampler, args.variance,
                       args.steps, args.clip, None, (1, *2 * [model.config["size"]]), args.eta)
        shown, frames = set(levels[::max(1, len(levels) // 50)]) | {0}, []  # about 50 frames
        for t, images, _ in tqdm(chain, total=len(levels), unit=" steps", disable=None):
            if args.gif and t in shown:
                frames.append(draw_grid(images, scale=2))
        about = PngInfo()
        about.add_text("Description", f"{path.name}, {DATASETS[checkpoint.config.dataset]}, seeds "
                       f"{args.seeds}, {args.sampler}, {len(levels) - 1} steps")
        draw_grid(images).save(files[0], pnginfo=about)
        if args.gif:  # 80 milliseconds a frame, the digits for three seconds, again and again
            frames[0].save(args.gif, save_all=True, append_images=frames[1:], loop=0,
                           duration=[80] * (len(frames) - 1) + [3000])
        print("wrote", *files)
    except KeyboardInterrupt:
        print("\nstopped; pictures may be missing or cut short", file=sys.stderr)
        sys.exit(130)
    except (ValueError, RuntimeError, OSError) as error:
        sys.exit("sample.py: " + str(error).partition("\n")[0])


if __name__ == "__main__":
    main()
