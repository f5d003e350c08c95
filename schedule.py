"""Part 1. The forward process: how an image becomes noise, and what is known in closed form.

A diffusion model learns to undo a process that destroys images. That process is not learned. It is
a fixed chain of T small Gaussian steps; this file derives what is known of it exactly.

    python schedule.py [--kind cosine]       a schedule as a table, and a numerical check

Notation: x₀ is a clean image with pixels in [-1, 1], x_t the image after t noisy steps. N(m, v) is
the Gaussian with mean m and variance v, N(x; m, v) its density at x. q is the law of the noising
chain, p_θ that of the model, θ the weights of its network. E is a mean, E_q the mean over q. Noise
is independent from pixel to pixel, so sections 1 to 4 may be read for one pixel. In section 5 the
network looks at all pixels at once, and ‖·‖² is a sum of squares over them.

ONE CONVENTION FOR TIME. Arrays have T+1 entries and their index is the subscript of the papers:
`beta[t]` is β_t for t = 1..T, and entry 0 stands for the clean image, with β₀ = 0 and ᾱ₀ = 1. So
"the step before" is always `alpha_bar[t - 1]`, training draws t from 1..T, sampling counts
t = T, T-1, ..., 1, and the network is always given the t of the papers.

1. One noisy step                                                                  [DDPM Eq. 2]

        q(x_t | x_{t-1}) = N(x_t; √(1-β_t) x_{t-1}, β_t),   so   x_t = √(1-β_t) x_{t-1} + √β_t ε_t

   where ε_t is standard normal noise. The factor √(1-β_t) shrinks the image while √β_t ε_t adds
   noise. The two are matched: if a pixel of x_{t-1}, over all images and noises, has variance 1, so
   has that of x_t, since (1-β_t)·1 + β_t = 1. Without the shrinking, values would grow and grow.

2. Many steps at once                                                              [DDPM Eq. 4]

   Write α_t = 1 - β_t and ᾱ_t = α_1 α_2 ··· α_t. Then

        q(x_t | x₀) = N(x_t; √ᾱ_t x₀, 1-ᾱ_t),   so   x_t = √ᾱ_t x₀ + √(1-ᾱ_t) ε

   Proof by induction. For t = 0 it reads x₀ = x₀. If it holds for t-1, one more step gives

        x_t = √α_t (√ᾱ_{t-1} x₀ + √(1-ᾱ_{t-1}) ε) + √β_t ε_t
            = √ᾱ_t x₀ + [ √α_t √(1-ᾱ_{t-1}) ε + √β_t ε_t ]

   The bracket is a sum of two independent Gaussians, hence Gaussian, and variances add:
   α_t (1-ᾱ_{t-1}) + β_t = α_t - ᾱ_t + 1 - α_t = 1-ᾱ_t. So it is √(1-ᾱ_t) times a standard normal,
   again called ε. At the end ᾱ_T is nearly 0 and x_T nearly noise. Turned around, it reads

        x₀ = (x_t - √(1-ᾱ_t) ε) / √ᾱ_t          ε = (x_t - √ᾱ_t x₀) / √(1-ᾱ_t)

3. One step back, if x₀ were known                                     [DDPM Eq. 6] [DDPM Eq. 7]

   To sample we need q(x_{t-1} | x_t). By Bayes' rule it contains q(x_{t-1}), which depends on the
   unknown law of all digits. But q(x_{t-1} | x_t, x₀) can be computed, and a guess at x₀ will serve
   (section 5). Call its mean μ̃_t and its variance β̃_t. By Bayes' rule it is proportional to
   q(x_t | x_{t-1}) q(x_{t-1} | x₀), because x_t depends on x₀ only through x_{t-1}. As functions of
   y = x_{t-1} these multiply, for t ≥ 2 and up to a factor without y, to exp(-S/2) with

        S = (x_t - √α_t y)² / β_t  +  (y - √ᾱ_{t-1} x₀)² / (1-ᾱ_{t-1})
          = y² [ α_t/β_t + 1/(1-ᾱ_{t-1}) ]  -  2y [ √α_t x_t/β_t + √ᾱ_{t-1} x₀/(1-ᾱ_{t-1}) ]  + ...

   where the dots do not contain y. Match this with (y - μ̃)²/β̃ = y²/β̃ - 2y μ̃/β̃ + ...: the first
   bracket is 1/β̃ (section 2 adds up its numerator), and the second, times β̃, is μ̃:

        1/β̃_t = [ α_t (1-ᾱ_{t-1}) + β_t ] / [ β_t (1-ᾱ_{t-1}) ]  =  (1-ᾱ_t) / [ β_t (1-ᾱ_{t-1}) ]

        β̃_t = β_t (1-ᾱ_{t-1}) / (1-ᾱ_t)

        μ̃_t = √ᾱ_{t-1} β_t / (1-ᾱ_t) · x₀  +  √α_t (1-ᾱ_{t-1}) / (1-ᾱ_t) · x_t

   At t = 1 nothing is left to compute: x₀ is given, so the mean is x₀ and the variance 0. The two
   formulas say the same. With the variance β̃_t the last step back adds no noise.

4. The same mean in terms of the noise                                            [DDPM Eq. 11]

   Put x₀ = (x_t - √(1-ᾱ_t) ε) / √ᾱ_t into μ̃_t and use √ᾱ_{t-1} / √ᾱ_t = 1/√α_t. The factor of x_t
   becomes [β_t + α_t (1-ᾱ_{t-1})] / [√α_t (1-ᾱ_t)] = 1/√α_t, because the numerator is 1-ᾱ_t. The
   factor of ε becomes -β_t / [√α_t √(1-ᾱ_t)]. Together

        μ̃_t = 1/√α_t · ( x_t - β_t/√(1-ᾱ_t) · ε )

   The 1/√α_t undoes the shrinking of step t, the bracket removes a share of the noise.

5. What to train: from the likelihood to a plain mean squared error

   Training should make p_θ(x₀) large for real digits. The model runs backwards from noise, with
   p(x_T) = N(0, 1) and p_θ(x_{t-1}|x_t) = N(μ_θ(x_t, t), σ_t²); sample.py chooses σ_t². A Gaussian
   will do if β_t is small: q(x_t|x_{t-1}) is narrow and gives q(x_{t-1}|x_t) its shape. Together,
   p_θ(x₀, ..., x_T) = p(x_T) Π_t p_θ(x_{t-1}|x_t). Integrated over x₁, ..., x_T it is p_θ(x₀),
   the mean of p_θ(x₀, ..., x_T) / q(x₁, ..., x_T | x₀) if q draws x₁, ..., x_T, given x₀. By
   Jensen's inequality -log of a mean is at most the mean of -log,                  [DDPM Eq. 3]

      -log p_θ(x₀) ≤ E_q[ -log p(x_T) - Σ_{t≥1} log p_θ(x_{t-1}|x_t) + Σ_{t≥1} log q(x_t|x_{t-1}) ]

   By Bayes' rule, q(x_t|x_{t-1}) = q(x_{t-1}|x_t, x₀) q(x_t|x₀) / q(x_{t-1}|x₀) for t ≥ 2. In the
   sum of logarithms the last two factors telescope to q(x_T|x₀) / q(x₁|x₀), and the term of t = 1
   cancels q(x₁|x₀). With the divergence KL(q ‖ p) = E_q[log q - log p], at least 0 and 0 only if
   q = p, what is left is

        KL( q(x_T|x₀) ‖ p(x_T) )                          x_T against pure noise: no θ in it
      + Σ_{t≥2} KL( q(x_{t-1}|x_t, x₀) ‖ p_θ(x_{t-1}|x_t) )   the learned steps against the exact
      - log p_θ(x₀|x₁)                                    the last step

   where each term is averaged over q [DDPM Eq. 5]. In a KL, E_q log q has no θ in it. For a pixel,
   -log p_θ is (x_{t-1} - μ_θ)²/2σ_t² and a constant; the square's mean is β̃_t + (μ̃_t - μ_θ)². So
   the KL is ‖μ̃_t - μ_θ‖²/2σ_t² and a constant [DDPM Eq. 8]. Give μ_θ the form of section 4 with a
   network's guess ε_θ(x_t, t) in place of ε. Then x_t cancels, μ̃_t - μ_θ is the factor
   -β_t / [√α_t √(1-ᾱ_t)] times (ε - ε_θ), and the term for t becomes

        β_t² / [ 2 σ_t² α_t (1-ᾱ_t) ] · ‖ε - ε_θ(x_t, t)‖²                         [DDPM Eq. 12]

   (the last step's too, up to a constant, if σ₁² > 0; the sampler's β̃₁ = 0 makes it infinite).
   Dropping the factor gives the objective: draw an image, a t, a noise, and ask for that noise,

        L_simple = E ‖ε - ε_θ(√ᾱ_t x₀ + √(1-ᾱ_t) ε, t)‖²                           [DDPM Eq. 14]

   In code it is the mean over the pixels, not the sum, so that the answer 0 scores 1. In the linear
   schedule the dropped factor is largest at small t. Leaving it out spends less effort on noise too
   faint to see and more on the shape of the digit: better pictures (DDPM, section 3.4).

Sources: [DDPM] Ho, Jain and Abbeel 2020, arXiv 2006.11239. [IDDPM] Nichol and Dhariwal 2021,
arXiv 2102.09672. [VDM] Kingma, Salimans, Poole and Ho 2021, arXiv 2107.00630.
"""

import argparse
import math

import torch

# Sampling starts from pure noise, so only a small share √ᾱ_T of the image may be left at t = T.
MAX_SIGNAL = 0.02  # the default schedule leaves 0.006
KINDS = ("linear", "cosine")  # of the schedule


class NoiseSchedule:
    """The numbers β_t, α_t, ᾱ_t, β̃_t and the Gaussians that they define.

    T             number of noisy steps, at least 2
    kind          "linear": β_t grows evenly from beta_start to beta_end    [DDPM section 4]
                  "cosine": ᾱ_t follows a squared cosine, all β_t ≤ 0.999   [IDDPM Eq. 17]
    beta_start    β_1 of the linear schedule, in (0, 1); beta_end is its β_T
    allow_signal  accept a schedule that does not turn the image into pure noise

    Attributes: T, and the float64 tensors beta, alpha, alpha_bar, beta_tilde of length T+1.
    Raises ValueError, with advice, for a schedule that cannot work.

    In all methods images are (B, C, H, W), floating point; t is an int or (B,) integers on any
    device. They raise ValueError for a t out of range and TypeError for images of bytes.
    """

    def __init__(self, T: int = 1000, kind: str = "linear", beta_start: float = 1e-4,
                 beta_end: float = 0.02, allow_signal: bool = False):
        if T < 2:
            raise ValueError(f"T = {T}, but a diffusion needs at least 2 steps; 1000 is usual")
        if kind == "linear":
            betas = torch.linspace(beta_start, beta_end, T, dtype=torch.float64)
        elif kind == "cosine":
            # ᾱ_t = f(t)/f(0) falls more evenly than in the linear schedule, whose last quarter is
            # almost pure noise. The offset 0.008 keeps the first steps from being too small, the
            # cap at 0.999 keeps ᾱ_T above 0.
            s = torch.arange(T + 1, dtype=torch.float64) / T
            f = torch.cos((s + 0.008) / 1.008 * math.pi / 2) ** 2
            betas = (1 - f[1:] / f[:-1]).clamp(max=0.999)
        else:
            raise ValueError(f"unknown schedule {kind!r}; known are {', '.join(KINDS)}")
        self._fill(betas, allow_signal)

    @classmethod
    def from_betas(cls, betas, allow_signal: bool = False) -> "NoiseSchedule":
        """A schedule from T numbers in (0, 1), betas[0] being β_1. Raises as the class does."""
        schedule = cls.__new__(cls)
        schedule._fill(torch.as_tensor(betas, dtype=torch.float64, device="cpu"), allow_signal)
        return schedule

    def _fill(self, betas: torch.Tensor, allow_signal: bool) -> None:
        if betas.dim() != 1 or len(betas) < 2:
            raise ValueError(f"betas must be a list of at least 2 steps, not {tuple(betas.shape)}")
        # A β below 5e-17 rounds α to 1, and the step would do nothing. NaN fails here too.
        if not ((1 - betas > 0) & (1 - betas < 1)).all():
            raise ValueError("every beta must lie strictly between 0 and 1; "
                             f"these run from {betas.min():g} to {betas.max():g}")

        # float64 throughout: in float32 the difference 1 - ᾱ_1 = 0.0001 is wrong by 0.02 %.
        self.T = len(betas)
        self.beta = torch.cat([torch.zeros(1, dtype=torch.float64), betas])  # β₀ = 0: no noise
        self.alpha = 1 - self.beta
        self.alpha_bar = torch.cumprod(self.alpha, dim=0)  # ᾱ₀ = 1: all signal

        signal = math.sqrt(self.alpha_bar[-1])
        if signal < 1.2e-38:  # no normal number of float32; predict_x0 divides by it
            raise ValueError("alpha_bar_T is too small; use smaller or fewer betas")
        if signal > MAX_SIGNAL and not allow_signal:
            # For small β, ln ᾱ_T is about -Σβ_t, so this factor on all β brings √ᾱ_T to the bound.
            factor = math.log(MAX_SIGNAL**2) / math.log(self.alpha_bar[-1])
            raise ValueError(
                f"{signal:.1%} of the image is left at t = T = {self.T}, but sampling starts from "
                f"pure noise (at most {MAX_SIGNAL:.0%}); take more steps or larger betas, about "
                f"{factor:.2f} times, or the cosine schedule, or accept it with allow_signal=True")

        # β̃₀ has no meaning and stays 0. β̃₁ = 0 follows from ᾱ₀ = 1.            [DDPM Eq. 7]
        self.beta_tilde = torch.zeros_like(self.beta)
        self.beta_tilde[1:] = betas * (1 - self.alpha_bar[:-1]) / (1 - self.alpha_bar[1:])

    def _check(self, t, lowest: int) -> torch.Tensor:
        """t as integers on the CPU, where the arrays are. Unchecked, t = -1 would mean t = T."""
        t = torch.as_tensor(t, device="cpu")
        if t.is_floating_point() or t.dtype == torch.bool or t.dim() > 1:
            raise TypeError("t must be an int or a one-dimensional tensor of ints")
        if t.numel() and (t.min() < lowest or t.max() > self.T):
            raise ValueError(f"t must lie in {lowest}..{self.T}, not {t.min()}..{t.max()}")
        return t.long()

    def _match(self, value: torch.Tensor, x: torch.Tensor) -> torch.Tensor:
        """A float64 scalar or (B,) in the dtype and on the device of x, shaped to multiply it."""
        if not x.is_floating_point():
            raise TypeError(f"images must be floating point in [-1, 1], not {x.dtype}")
        if value.dim() == 1 and len(value) not in (1, len(x)):
            raise ValueError(f"{len(value)} values of t for a batch of {len(x)} images")
        value = value.to(x.dtype).to(x.device)  # cast, then move: some devices have no float64
        return value.reshape(-1, *[1] * (x.dim() - 1)) if value.dim() == 1 else value

    def _signal_and_noise(self, t, x: torch.Tensor, lowest: int) -> tuple[torch.Tensor, ...]:
        """√ᾱ_t and √(1-ᾱ_t), each to multiply images like x."""
        alpha_bar = self.alpha_bar[self._check(t, lowest)]
        return self._match(alpha_bar.sqrt(), x), self._match((1 - alpha_bar).sqrt(), x)

    def q_step(self, x_prev: torch.Tensor, t, eps: torch.Tensor) -> torch.Tensor:
        """Take one noisy step, x_{t-1} -> x_t.                                    [DDPM Eq. 2]

        x_prev  images x_{t-1}; t is in 1..T
        eps     standard normal noise

        Returns x_t = √α_t x_{t-1} + √β_t ε.
        """
        t = self._check(t, lowest=1)
        return (self._match(self.alpha[t].sqrt(), x_prev) * x_prev
                + self._match(self.beta[t].sqrt(), x_prev) * eps)

    def q_sample(self, x0: torch.Tensor, t, eps: torch.Tensor) -> torch.Tensor:
        """Jump from a clean image straight to noise level t.                      [DDPM Eq. 4]

        x0   images in [-1, 1]; t is in 0..T, and t = 0 returns x0 itself
        eps  standard normal noise, drawn by the caller so that it can also be the training target

        Returns x_t = √ᾱ_t x₀ + √(1-ᾱ_t) ε, t noisy steps in one.
        """
        signal, noise = self._signal_and_noise(t, x0, lowest=0)
        return signal * x0 + noise * eps

    def step_beta(self, t, t_prev=None) -> torch.Tensor:
        """β of the one step that does what the steps t_prev + 1 .. t do; sample.py takes such.

        By section 2 that step has α = ᾱ_t / ᾱ_{t_prev}. For t_prev = t - 1, or None, it is β_t.
        Needs 0 <= t_prev < t <= T. Returns float64 of the shape of t.
        """
        t = self._check(t, lowest=1)
        t_prev = t - 1 if t_prev is None else self._check(t_prev, lowest=0)
        if (t_prev >= t).any():
            raise ValueError("t_prev must be below t")
        return 1 - self.alpha_bar[t] / self.alpha_bar[t_prev]

    def q_posterior(self, x0: torch.Tensor, xt: torch.Tensor, t,
                    t_prev=None) -> tuple[torch.Tensor, torch.Tensor]:
        """The exact step back, q(x_{t-1} | x_t, x₀).                [DDPM Eq. 6] [DDPM Eq. 7]

        x0, xt     clean images, or a guess at them, and images at noise level t
        t, t_prev  0 <= t_prev < t <= T; t_prev is t - 1 if None. A smaller t_prev gives
                   q(x_{t_prev} | x_t, x₀), a longer step back

        Returns the mean, and the variance, which broadcasts against it. A step that ends at 0 has
        mean x0 and variance 0.
        """
        t = self._check(t, lowest=1)
        t_prev = t - 1 if t_prev is None else self._check(t_prev, lowest=0)
        beta = self.step_beta(t, t_prev)
        v, v_prev = 1 - self.alpha_bar[t], 1 - self.alpha_bar[t_prev]  # variance of the noise
        x0_weight = self._match(self.alpha_bar[t_prev].sqrt() * beta / v, xt)
        xt_weight = self._match((1 - beta).sqrt() * v_prev / v, xt)
        return x0_weight * x0 + xt_weight * xt, self._match(beta * v_prev / v, xt)

    def predict_x0(self, xt: torch.Tensor, t, eps: torch.Tensor) -> torch.Tensor:
        """The clean image, if eps is the noise in x_t: section 2 solved for x₀.

        xt   images at noise level t, in 0..T; at t = 0 the result is xt itself
        eps  the noise, or a network's guess at it

        Returns x₀, or x̂₀ if eps is a guess. An error in eps comes out √(1-ᾱ_t)/√ᾱ_t times as
        large: 157 times at t = T of the default schedule.
        """
        signal, noise = self._signal_and_noise(t, xt, lowest=0)
        return (xt - noise * eps) / signal

    def predict_eps(self, xt: torch.Tensor, t, x0: torch.Tensor) -> torch.Tensor:
        """The noise in x_t, if x0 is the clean image: section 2 solved for ε.

        xt, x0  images at noise level t, in 1..T, and the clean images, or a guess at them

        Returns ε. Raises ValueError at t = 0, where x_t holds no noise to be found.
        """
        signal, noise = self._signal_and_noise(t, xt, lowest=1)
        return (xt - signal * x0) / noise

    def snr(self, t) -> torch.Tensor:
        """Signal-to-noise ratio ᾱ_t / (1-ᾱ_t), float64, infinite at t = 0.        [VDM Eq. 2]"""
        alpha_bar = self.alpha_bar[self._check(t, lowest=0)]
        return alpha_bar / (1 - alpha_bar)


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(usage=argparse.SUPPRESS, description="Print a noise schedule.")
    parser.add_argument("--T", type=int, default=1000, help="number of noisy steps (1000)")
    parser.add_argument("--kind", default="linear", choices=KINDS, help="(linear)")
    args = parser.parse_args(argv)
    try:
        schedule = NoiseSchedule(args.T, args.kind)
    except ValueError as error:
        parser.error(str(error))
    print(f"{'t':>5} {'beta':>10} {'alpha_bar':>11} {'SNR [dB]':>9} {'beta_tilde':>11}")
    for t in sorted({round(schedule.T * k / 10) for k in range(11)} | {1}):
        decibel = 10 * torch.log10(schedule.snr(t)).item()
        print(f"{t:5d} {schedule.beta[t]:10.6f} {schedule.alpha_bar[t]:11.4g} {decibel:9.1f} "
              f"{schedule.beta_tilde[t]:11.6f}")

    x0, chains = 0.5, 20_000
    print(f"\n{chains:,} chains of random single steps from x0 = {x0}, beside the closed form:")
    print(f"{'t':>5} {'mean':>10} {'closed':>10} {'std':>10} {'closed':>10}")
    generator = torch.Generator().manual_seed(0)
    x = torch.full((chains, 1, 1, 1), x0, dtype=torch.float64)
    for t in range(1, schedule.T + 1):
        x = schedule.q_step(x, t, torch.randn(x.shape, generator=generator, dtype=x.dtype))
        if t in {round(schedule.T * k / 5) for k in range(1, 6)}:
            mean, std = schedule.alpha_bar[t].sqrt() * x0, (1 - schedule.alpha_bar[t]).sqrt()
            print(f"{t:5d} {x.mean():10.4f} {mean:10.4f} {x.std():10.4f} {std:10.4f}")


if __name__ == "__main__":
    main()
