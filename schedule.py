"""Part 1. The forward process: how an image becomes noise, and what is known in closed form.

A diffusion model learns to undo a process that destroys images. That process itself is not learned.
It is a fixed chain of T small Gaussian steps; this file derives what is known about it exactly. To
make an image, Part 3 starts from pure noise and goes back one step at a time; each step back draws
x_{t-1} when x_t is given.

    python schedule.py [--kind cosine]       the schedule as a table, and a numerical check

NOTATION. x₀ is a clean image, here a handwritten digit of MNIST, with pixels in [-1, 1], and x_t is
the image after t noisy steps. N(m, v) is the Gaussian distribution with mean m and variance v, and
N(x; m, v) is its density at x. q stands for the distributions of the noising chain, p_θ for those
of the model, where θ are the weights of its network. E is an average, E_q an average over q. A bar
marks a product over steps (ᾱ_t), and a tilde marks what belongs to a step back when x₀ is known
(β̃_t, μ̃_t). ∝ means equal up to a constant factor. All noise is independent from pixel to pixel, so
this file may be read for a single pixel.

ONE CONVENTION FOR TIME. Arrays have T+1 entries, and their index is the subscript of the papers:
`beta[t]` is β_t for t = 1..T. Entry 0 stands for the clean image, with β₀ = 0 and ᾱ₀ = 1. So the
step before t is always `alpha_bar[t - 1]`, also for t = 1. Without these two entries the code would
need a case of its own for the first step, and would count T steps as 0..T-1 in some places and as
1..T in others, an easy way to be off by one. Training draws t from 1..T, sampling counts
t = T, T-1, ..., 1, and the network is always given the t of the papers.

CONTENTS. NoiseSchedule: 1. the numbers β_t, α_t, ᾱ_t; 2. one noisy step; 3. many steps at once;
4. one step back, if x₀ is known; 5. the same mean in terms of the noise. Below the line: checks of
arguments, and the table.

Sources: [DDPM] Ho, Jain and Abbeel 2020, "Denoising Diffusion Probabilistic Models", arXiv
2006.11239. [IDDPM] Nichol and Dhariwal 2021, "Improved ...", arXiv 2102.09672. [VDM] Kingma,
Salimans, Poole and Ho 2021, "Variational Diffusion Models", arXiv 2107.00630.
"""

import argparse
import errno
import math
import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager, redirect_stderr, redirect_stdout
from typing import TextIO

import torch

KINDS = ("linear", "cosine")  # of schedules

# Sampling starts from pure noise, so the factor √ᾱ_T on the image (section 1) may be no larger.
MAX_SIGNAL = 0.02  # in the default schedule it is 0.006


class NoiseSchedule:
    """The numbers β_t, α_t, ᾱ_t, β̃_t and the Gaussian distributions that they define.

    T             number of noisy steps, at least 2
    kind          "linear": β_t grows evenly from beta_start to beta_end    [DDPM section 4]
                  "cosine": ᾱ_t follows a squared cosine, all β_t ≤ 0.999   [IDDPM Eq. 17]
    beta_start    β_1 of the linear schedule, in (0, 1); beta_end is its β_T
    allow_signal  accept a schedule that does not turn the image into pure noise

    Attributes: T, and the float64 tensors beta, alpha, alpha_bar, beta_tilde of length T+1.
    Raises ValueError, with advice, for a schedule that cannot work.

    In all methods images are (B, C, H, W), batch by channels by height by width, floating point; t
    is an int or (B,) integers on any device. They raise ValueError for a t out of range and
    TypeError for images of bytes.
    """

    # --------------------------------------------------- 1. The numbers β_t, α_t, ᾱ_t
    #
    # β_t is the variance of the noise that step t adds. In the linear schedule it grows evenly from
    # 0.0001 to 0.02: the steps are small while the image is clean and every bit of noise shows,
    # and larger when little is left to spoil. α_t = 1 - β_t is the share of the image's variance
    # that step t keeps, and ᾱ_t = α_1 α_2 ··· α_t is the share that t steps keep. The pixels
    # themselves are multiplied by the square roots of these (section 2).
    #
    # At the end ᾱ_1000 is 4.04e-5, and the pixels have been multiplied by √ᾱ_1000 = 0.006. This
    # must be little, because sampling will start from noise that contains no digit at all. With the
    # same β_1 and β_T but T = 200, √ᾱ_T would be 0.36: every x_T in training would still show its
    # digit faintly, and the network would never have seen the pure noise from which sampling
    # starts. Such a schedule is refused.

    def __init__(self, T: int = 1000, kind: str = "linear", beta_start: float = 1e-4,
                 beta_end: float = 0.02, allow_signal: bool = False):
        if T < 2:
            raise ValueError(f"T = {T}, but a diffusion needs at least 2 steps; 1000 is usual")
        if kind == "linear":
            betas = torch.linspace(beta_start, beta_end, T, dtype=torch.float64)
        elif kind == "cosine":
            # ᾱ_t = f(t)/f(0), with f as below, falls more evenly than in the linear schedule, whose
            # last quarter is almost pure noise. Then α_t = ᾱ_t/ᾱ_{t-1} = f(t)/f(t-1). Without the
            # offset 0.008, β_1 would be nearly 0; without the cap at 0.999, ᾱ_T would be 0.
            share = torch.arange(T + 1, dtype=torch.float64) / T
            f = torch.cos((share + 0.008) / 1.008 * math.pi / 2) ** 2
            betas = (1 - f[1:] / f[:-1]).clamp(max=0.999)
        else:
            raise ValueError(f"unknown schedule {kind!r}; known are {', '.join(KINDS)}")
        self._fill(betas, allow_signal)

    @classmethod
    def from_betas(cls, betas, allow_signal: bool = False) -> "NoiseSchedule":
        """A schedule from T numbers in (0, 1), betas[0] being β_1. Raises as the class does."""
        schedule = cls.__new__(cls)  # an empty object: __init__ would make betas of its own
        schedule._fill(torch.as_tensor(betas, dtype=torch.float64, device="cpu"), allow_signal)
        return schedule

    def _fill(self, betas: torch.Tensor, allow_signal: bool) -> None:
        """Compute all arrays from β_1, ..., β_T."""
        check_betas(betas)
        self.T = len(betas)
        # float64 throughout: in float32 the difference 1 - ᾱ_1 = 0.0001 is wrong by 0.02 %.
        self.beta = torch.cat([torch.zeros(1, dtype=torch.float64), betas])  # β₀ = 0: no noise
        self.alpha = 1 - self.beta
        self.alpha_bar = torch.cumprod(self.alpha, dim=0)  # ᾱ₀ = 1: all signal
        check_signal(self.alpha_bar, allow_signal)

        # The variance of a step back, derived in section 4. β̃₀ has no meaning and stays 0;
        # β̃₁ = 0 follows from ᾱ₀ = 1.                                             [DDPM Eq. 7]
        self.beta_tilde = torch.zeros_like(self.beta)
        self.beta_tilde[1:] = betas * (1 - self.alpha_bar[:-1]) / (1 - self.alpha_bar[1:])

    # ------------------------------------------------------------ 2. One noisy step
    #
    #       q(x_t | x_{t-1}) = N(x_t; √(1-β_t) x_{t-1}, β_t),   so                  [DDPM Eq. 2]
    #
    #       x_t = √(1-β_t) x_{t-1} + √β_t ε_t
    #
    # where ε_t is standard normal noise. The first factor shrinks the image, the second adds noise.
    # The factors are matched: if a pixel of x_{t-1} has variance 1 (over images and noise), the
    # same pixel of x_t again has variance 1, because (1-β_t)·1 + β_t = 1. Any other variance moves
    # towards 1. Without the shrinking, values would grow from step to step.

    def q_step(self, x_prev: torch.Tensor, t, eps: torch.Tensor) -> torch.Tensor:
        """Take one noisy step, x_{t-1} -> x_t.                                    [DDPM Eq. 2]

        x_prev  images x_{t-1}; t is in 1..T
        eps     standard normal noise

        Returns x_t = √α_t x_{t-1} + √β_t ε.
        """
        t = self._check(t, lowest=1)
        signal = self._match(self.alpha[t].sqrt(), x_prev)
        noise = self._match(self.beta[t].sqrt(), x_prev)
        return signal * x_prev + noise * eps

    # -------------------------------------------------------- 3. Many steps at once
    #
    # Two steps, written out:
    #
    #       x_2 = √α_2 x_1 + √β_2 ε_2
    #           = √α_2 (√α_1 x₀ + √β_1 ε_1) + √β_2 ε_2
    #           = √(α_1 α_2) x₀ + [ √(α_2 β_1) ε_1 + √β_2 ε_2 ]
    #
    # The bracket is a sum of two independent Gaussians. Such a sum is again Gaussian, and variances
    # add: α_2 β_1 + β_2 = α_2 (1-α_1) + 1 - α_2 = 1 - α_1 α_2. So two steps amount to a single one,
    # with α_1 α_2 = ᾱ_2 in place of α. In general
    #
    #       q(x_t | x₀) = N(x_t; √ᾱ_t x₀, 1-ᾱ_t),   so                              [DDPM Eq. 4]
    #
    #       x_t = √ᾱ_t x₀ + √(1-ᾱ_t) ε
    #
    # Proof by induction. For t = 0 it reads x₀ = x₀. If it holds for t-1, one more step gives
    #
    #       x_t = √α_t (√ᾱ_{t-1} x₀ + √(1-ᾱ_{t-1}) ε') + √β_t ε_t
    #           = √ᾱ_t x₀ + [ √α_t √(1-ᾱ_{t-1}) ε' + √β_t ε_t ]
    #
    # where ε' is the noise of the first t-1 steps together. The variance of the bracket is
    # α_t (1-ᾱ_{t-1}) + β_t = α_t - ᾱ_t + 1 - α_t = 1-ᾱ_t. So the bracket is √(1-ᾱ_t) times standard
    # normal noise, and this noise is called ε.
    #
    # This is what makes training cheap: a noisy image of any level takes one line, not t steps.

    def q_sample(self, x0: torch.Tensor, t, eps: torch.Tensor) -> torch.Tensor:
        """Jump from a clean image straight to noise level t.                      [DDPM Eq. 4]

        x0   images in [-1, 1]; t is in 0..T, and t = 0 returns x0 itself
        eps  standard normal noise, drawn by the caller so that it can also be the training target

        Returns x_t = √ᾱ_t x₀ + √(1-ᾱ_t) ε, t noisy steps in one.
        """
        signal, noise = self._signal_and_noise(t, x0, lowest=0)
        return signal * x0 + noise * eps

    # Of the three, x₀, ε and x_t, any two determine the third. The next two methods solve the same
    # equation for x₀ and for ε:
    #
    #       x₀ = (x_t - √(1-ᾱ_t) ε) / √ᾱ_t          ε = (x_t - √ᾱ_t x₀) / √(1-ᾱ_t)

    def predict_x0(self, xt: torch.Tensor, t, eps: torch.Tensor) -> torch.Tensor:
        """The clean image, if eps is the noise in x_t.

        xt   images at noise level t, in 0..T; at t = 0 the result is xt itself
        eps  the noise, or a network's guess at it

        Returns x₀, or x̂₀ if eps is a guess. An error in eps comes out √(1-ᾱ_t)/√ᾱ_t times as
        large: 157 times at t = T of the default schedule.
        """
        signal, noise = self._signal_and_noise(t, xt, lowest=0)
        return (xt - noise * eps) / signal

    def predict_eps(self, xt: torch.Tensor, t, x0: torch.Tensor) -> torch.Tensor:
        """The noise in x_t, if x0 is the clean image.

        xt, x0  images at noise level t, in 1..T, and the clean images, or a guess at them

        Returns ε. Raises ValueError at t = 0, where x_t holds no noise to be found.
        """
        signal, noise = self._signal_and_noise(t, xt, lowest=1)
        return (xt - signal * x0) / noise

    def snr(self, t) -> torch.Tensor:
        """Signal-to-noise ratio (SNR) ᾱ_t / (1-ᾱ_t), float64, infinite at t = 0.  [VDM Eq. 2]"""
        alpha_bar = self.alpha_bar[self._check(t, lowest=0)]
        return alpha_bar / (1 - alpha_bar)

    # ------------------------------------------ 4. One step back, if x₀ is known
    #
    # To sample we need q(x_{t-1} | x_t). Bayes' rule would express it through q(x_{t-1}), the
    # distribution of all digits with t-1 steps of noise, which is unknown. But q(x_{t-1} | x_t, x₀)
    # can be computed, and in sampling a guess at x₀ takes the place of x₀. Bayes' rule says
    #
    #       q(x_{t-1} | x_t, x₀)  ∝  q(x_t | x_{t-1}) · q(x_{t-1} | x₀)
    #
    # The first factor need not mention x₀, because x_t depends on x₀ only through x_{t-1}. The
    # constant left out is 1 / q(x_t | x₀), which contains no x_{t-1}. Both factors are Gaussians
    # that we know. Write y for x_{t-1}. For t ≥ 2 their product, as a function of y, is exp(-S/2)
    # times a factor without y, where
    #
    #       S = (x_t - √α_t y)² / β_t  +  (y - √ᾱ_{t-1} x₀)² / (1-ᾱ_{t-1})
    #         =   y² [ α_t/β_t + 1/(1-ᾱ_{t-1}) ]
    #           - 2y [ √α_t x_t/β_t + √ᾱ_{t-1} x₀/(1-ᾱ_{t-1}) ]  +  ...
    #
    # where the dots contain no y. For a Gaussian with mean μ̃ and variance β̃, S would be
    # (y - μ̃)²/β̃ = y²/β̃ - 2y μ̃/β̃ + ... So the first bracket is 1/β̃_t. Over a common denominator
    # the numerator of the bracket is α_t (1-ᾱ_{t-1}) + β_t, which is 1-ᾱ_t, as above:
    #
    #       1/β̃_t = (1-ᾱ_t) / [ β_t (1-ᾱ_{t-1}) ],   so   β̃_t = β_t (1-ᾱ_{t-1}) / (1-ᾱ_t)
    #
    # The second bracket, times β̃_t, is the mean:                     [DDPM Eq. 6] [DDPM Eq. 7]
    #
    #       μ̃_t = √ᾱ_{t-1} β_t / (1-ᾱ_t) · x₀  +  √α_t (1-ᾱ_{t-1}) / (1-ᾱ_t) · x_t
    #
    # At t = 1 there is nothing to compute: x₀ is given, so the mean is x₀ and the variance 0. The
    # two formulas say the same.
    #
    # Both methods below take an argument t_prev, which Part 3 needs to skip steps. On first reading
    # take it to be t - 1. By section 3, the steps t_prev + 1, ..., t amount to one step with
    # α = ᾱ_t / ᾱ_{t_prev}, and everything above holds for that step as well.

    def step_beta(self, t, t_prev=None) -> torch.Tensor:
        """β of the one step that does what the steps t_prev + 1, ..., t do.

        Needs 0 <= t_prev < t <= T. For t_prev = t - 1, or None, it is β_t. Returns float64 of the
        shape of t. Raises ValueError if t_prev is not below t.
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
        alpha = 1 - beta
        v = 1 - self.alpha_bar[t]  # variance of the noise in x_t
        v_prev = 1 - self.alpha_bar[t_prev]  # and in x_{t_prev}
        x0_weight = self._match(self.alpha_bar[t_prev].sqrt() * beta / v, xt)
        xt_weight = self._match(alpha.sqrt() * v_prev / v, xt)
        mean = x0_weight * x0 + xt_weight * xt
        variance = self._match(beta * v_prev / v, xt)
        return mean, variance

    # ------------------------------------- 5. The same mean in terms of the noise
    #
    # Put x₀ = (x_t - √(1-ᾱ_t) ε) / √ᾱ_t into μ̃_t, and use √ᾱ_{t-1} / √ᾱ_t = 1/√α_t. The factor of
    # x_t becomes [β_t + α_t (1-ᾱ_{t-1})] / [√α_t (1-ᾱ_t)] = 1/√α_t, because the numerator is again
    # 1-ᾱ_t. The factor of ε becomes -β_t / [√α_t √(1-ᾱ_t)]. Together            [DDPM Eq. 11]
    #
    #       μ̃_t = 1/√α_t · ( x_t - β_t/√(1-ᾱ_t) · ε )
    #
    # In words: remove a share of the noise, then undo the shrinking of step t. So a network that
    # predicts the noise in x_t is all that a step back needs. No method computes this form, but
    # train.py builds the loss on it, and p_step in sample.py has the same mean.

    # --------------------------------------------- What the methods above have in common

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
        if value.dim() == 1:
            ones = [1] * (x.dim() - 1)
            value = value.reshape(-1, *ones)  # (B, 1, 1, 1)
        return value

    def _signal_and_noise(self, t, x: torch.Tensor, lowest: int) -> tuple[torch.Tensor, ...]:
        """√ᾱ_t and √(1-ᾱ_t), each to multiply images like x."""
        alpha_bar = self.alpha_bar[self._check(t, lowest)]
        return self._match(alpha_bar.sqrt(), x), self._match((1 - alpha_bar).sqrt(), x)


# =========================================================================================
# Below this line is plumbing: schedules that cannot work, the command line, the table.
# =========================================================================================

def check_betas(betas: torch.Tensor) -> None:
    """Raise ValueError if these cannot be β_1, ..., β_T."""
    if betas.dim() != 1 or len(betas) < 2:
        raise ValueError(f"betas must be a list of at least 2 steps, not {tuple(betas.shape)}")
    # A β below 5e-17 rounds α to 1, and the step would do nothing. NaN fails here, too.
    if not ((1 - betas > 0) & (1 - betas < 1)).all():
        raise ValueError("every beta must lie strictly between 0 and 1; "
                         f"these run from {betas.min():g} to {betas.max():g}")


def check_signal(alpha_bar: torch.Tensor, allow_signal: bool) -> None:
    """Raise ValueError if too much of the image is left at t = T, or too little to compute with."""
    signal = math.sqrt(alpha_bar[-1])
    if signal < 1.2e-38:  # below this float32 loses precision, and predict_x0 divides by it
        raise ValueError("alpha_bar_T is too small; use smaller or fewer betas")
    if signal > MAX_SIGNAL and not allow_signal:
        # For small β, ln ᾱ_T is about -Σβ_t, so this factor on all β brings √ᾱ_T to the bound.
        factor = math.log(MAX_SIGNAL**2) / math.log(alpha_bar[-1])
        raise ValueError(
            f"{signal:.1%} of the image is left at t = T = {len(alpha_bar) - 1}, but sampling "
            f"starts from pure noise (at most {MAX_SIGNAL:.0%}); take more steps or larger betas, "
            f"about {factor:.2f} times, or the cosine schedule, or accept it with "
            "allow_signal=True")


def advice_for_command_line(error: ValueError, option: str) -> str:
    """What is wrong with a schedule, and what can be done about it on a command line.

    error   raised by NoiseSchedule, whose own advice is for those who call it
    option  the option of this command line that names the kind of schedule
    """
    fault = str(error).partition(";")[0]
    return f"{fault}; give another --T (1000 is usual) or {option} cosine"


class Parser(argparse.ArgumentParser):
    """A command line whose mistakes are answered in one line, without the list of options."""

    def error(self, message: str):
        self.exit(2, f"{self.prog}: {message}\n")


class Output:
    """Standard output or standard error of a script that does its work even if no one reads.

    What is written to a stream that is closed (None), to a pipe whose reader has left, as in
    `| head -1`, or to a terminal that was closed, is dropped. Letters that the encoding of the
    stream lacks are replaced by question marks.
    """

    def __init__(self, stream: TextIO | None):
        self.stream = stream

    def write(self, text: str) -> int:
        encoding = getattr(self.stream, "encoding", None) or "utf-8"
        printable = text.encode(encoding, errors="replace").decode(encoding)
        self._attempt("write", printable)
        return len(text)

    def flush(self) -> None:
        self._attempt("flush")

    def isatty(self) -> bool:
        return self.stream is not None and self.stream.isatty()

    def _attempt(self, method: str, *arguments: str) -> None:
        """Call a method of the stream, if there is a stream and someone who reads it."""
        if self.stream is None:
            return
        try:
            getattr(self.stream, method)(*arguments)
        except OSError as error:
            # Windows calls a pipe without a reader an invalid argument.
            if error.errno not in (errno.EPIPE, errno.EIO, errno.EINVAL):
                raise
            # What the stream still holds must go somewhere when Python closes it at the end.
            nowhere = os.open(os.devnull, os.O_WRONLY)
            os.dup2(nowhere, self.stream.fileno())
            os.close(nowhere)

    def __getattr__(self, name: str):
        return getattr(self.stream, name)  # all else is as in the stream


@contextmanager
def forgiving_output() -> Iterator[None]:
    """Let nothing that is printed stop a script; see Output. Also a decorator for main()."""
    # C libraries write their messages to file 2, whatever it is. If standard error is closed, the
    # next file that is opened, perhaps a model file, gets this number, and the messages would end
    # up in that file. So take up the numbers 0 to 2 first, if they are free.
    number = 0
    while number <= 2:
        number = os.open(os.devnull, os.O_RDWR)
    os.close(number)

    output = Output(sys.stdout)
    errors = Output(sys.stderr)
    with redirect_stdout(output), redirect_stderr(errors):
        try:
            yield
        finally:
            output.flush()
            errors.flush()


def print_table(schedule: NoiseSchedule) -> None:
    """The numbers of a schedule at eleven t and at t = 1; SNR as 10 log10 of it, in decibels."""
    print(f"{'t':>5} {'beta':>10} {'alpha_bar':>11} {'SNR [dB]':>9} {'beta_tilde':>11}")
    for t in sorted({round(schedule.T * k / 10) for k in range(11)} | {1}):
        decibel = 10 * torch.log10(schedule.snr(t)).item()
        print(f"{t:5d} {schedule.beta[t]:10.6f} {schedule.alpha_bar[t]:11.4g} {decibel:9.1f} "
              f"{schedule.beta_tilde[t]:11.6f}")


def print_check(schedule: NoiseSchedule, x0: float = 0.5, chains: int = 20_000) -> None:
    """Mean and standard deviation of many chains of single steps, beside the closed form."""
    print(f"\n{chains:,} chains of random single steps from x0 = {x0}, beside the closed form:")
    print(f"{'t':>5} {'mean':>10} {'closed':>10} {'std':>10} {'closed':>10}")
    generator = torch.Generator().manual_seed(0)
    x = torch.full((chains, 1, 1, 1), x0, dtype=torch.float64)
    shown = {round(schedule.T * k / 5) for k in range(1, 6)}
    for t in range(1, schedule.T + 1):
        x = schedule.q_step(x, t, torch.randn(x.shape, generator=generator, dtype=x.dtype))
        if t in shown:
            mean = schedule.alpha_bar[t].sqrt() * x0
            std = (1 - schedule.alpha_bar[t]).sqrt()
            print(f"{t:5d} {x.mean():10.4f} {mean:10.4f} {x.std():10.4f} {std:10.4f}")


@forgiving_output()
def main(argv: list[str] | None = None) -> None:
    parser = Parser(description="Print a noise schedule.")
    parser.add_argument("--T", type=int, default=1000,
                        help="number of noisy steps (default: %(default)s)")
    parser.add_argument("--kind", default="linear", choices=KINDS, help="(default: %(default)s)")
    args = parser.parse_args(argv)
    try:
        schedule = NoiseSchedule(args.T, args.kind)
    except ValueError as error:
        parser.error(advice_for_command_line(error, "--kind"))
    print_table(schedule)
    print_check(schedule)


if __name__ == "__main__":
    main()
