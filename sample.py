"""Part 3. The reverse process: from pure noise to a digit, one small step at a time.

    python sample.py                                 32 digits from seeds 0..31, as a 4x8 picture
    python sample.py --seeds 7,40-46 --out my.png    other seeds, another file
    python sample.py --sampler sde-dpm++             in 20 steps instead of 1,000
    python sample.py --sampler sde-dpm++ --guidance 2   clearer digits, for twice the work
    python sample.py --sampler sde-dpm++ --digits 0-9 --guidance 1.5   digits to order
    python sample.py --gif chain.gif                 the way from noise to digits, as an animation
    python sample.py --sampler sde-dpm++ --seeds 0-9999 --out digits/
                                                     10,000 digits, each as a file

WHAT TO EXPECT. On two CPU cores 32 digits take about a minute in 1,000 steps and 2 seconds in 20.
Of 2,000 digits, 77 % (in 20 steps 76 %) were clear to a classifier, which means that it gave one of
the ten digits a probability above 0.9 (of real test digits, 97 %). Most of the others show strokes
of the right kind that form no numeral. The picture goes beside the model file, or into
runs/pretrained/ if the model is the shipped one (pretrained/model.pt, which this project trained
and brings along). Your own finished run in runs/mnist/ is used if there is one. --digits needs a
model that was trained with labels: your own finished run in runs/mnist-labels/, else
pretrained/labels/model.pt.

CONTENTS. 1. Algorithm 2, the whole of sampling in a few lines. 2. The clean image that a guess at
the noise implies. 3. One step back. 4. DDIM: a step back that adds no noise. 5. DPM-Solver++: fewer
steps by extrapolation. 6. Which noise levels to visit. 7. Guidance: away from a worse network.
8. Labels: digits to order. 9. The whole chain: one seed, one digit. 10. Restarts: a second chance.
Below the line: files, pictures, the command line.

The notation is that of schedule.py; x̂₀ and ε̂ are guesses at x₀ and ε. Sources: [DDPM] Ho et al.
2020, arXiv 2006.11239. [IDDPM] Nichol and Dhariwal 2021, arXiv 2102.09672. [DDIM] Song et al. 2021,
arXiv 2010.02502. [DPM-Solver++] Lu et al. 2022, arXiv 2211.01095. [Autoguidance] Karras et al.
2024, arXiv 2406.02507, and for its interval Kynkäänniemi et al. 2024, arXiv 2404.07724. [CFG] Ho
and Salimans 2022, arXiv 2207.12598. Restarts: Xu et al. 2023, arXiv 2306.14878.
"""

import argparse
import hashlib
import math
import os
import re
import sys
from collections.abc import Iterator
from pathlib import Path
from urllib.parse import quote

import torch
from einops import rearrange, repeat
from PIL import Image
from PIL.PngImagePlugin import PngInfo
from tqdm import tqdm

if sys.flags.safe_path:  # python -P does not look into the folder of the script
    sys.path.insert(0, str(Path(__file__).resolve().parent))

from schedule import NoiseSchedule, Parser, forgiving_output
from train import DATASETS, EARLY, HERE, Checkpoint, load_checkpoint, make_folder, replacement_of
from unet import pick_device, prepare_device

VARIANCES = ("beta_tilde", "beta", "zero")  # of the fresh noise in p_step

# The samplers, explained in sections 1, 4 and 5, and their usual number of steps (inf: all T).
SAMPLERS = {"ddpm": math.inf, "ddim": 50, "dpm++": 20, "sde-dpm++": 20}

SHIPPED = HERE / "pretrained" / "model.pt"
SHIPPED_LABELS = HERE / "pretrained" / "labels" / "model.pt"

BATCH_SIZE = 128  # of digits drawn into a folder; larger ones are hardly faster on a CPU


# -------------------------------------------------------------------------- 1. Algorithm 2
#
# Sampling runs the chain of schedule.py backwards; this is called ancestral sampling. Start from
# pure noise x_T. In each step let the network guess the noise in x_t, work out what a slightly less
# noisy image looks like if the guess is right, and go there. Algorithm 2 of DDPM:
#
#       1  x_T ~ N(0, 1)
#       2  for t = T, ..., 1:
#       3      z ~ N(0, 1) if t > 1, else z = 0
#       4      x_{t-1} = μ_θ(x_t, t) + σ_t z             p_step, below
#       5  (end of the loop)
#       6  return x₀
#
# Why so many steps, if each of them guesses the whole noise and thereby the clean image? Because at
# large t the guess is poor. The number with the least mean squared error is the mean, so a network
# trained with squared errors answers with an average of all noises that may be in x_t. For a given
# x_t, x₀ is linear in the noise, so the clean image that this answer implies is the average of all
# digits that x_t could have come from, weighted by their probability. At large t, where that is
# almost any digit, it is a grey blur. So a step moves only a little towards it, and then the
# network looks again, at a slightly clearer image. Besides, the true step back is a Gaussian only
# if β is small. The network was trained for 1,000 noise levels, so there are 1,000 steps; sections
# 4 to 6 say how to make do with fewer.

@torch.no_grad()
def draw_digit(model: torch.nn.Module, schedule: NoiseSchedule, seed: int) -> torch.Tensor:
    """Draw one digit, (1, 1, 28, 28) in [-1, 1], on the CPU.               [DDPM Algorithm 2]

    model  in eval mode, as load_checkpoint returns it

    The same as the last image of sample(model, schedule, [seed]), which can do more.
    """
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(1, 1, 28, 28, generator=generator, dtype=torch.float32)
    for t in range(schedule.T, 0, -1):
        eps_hat = model(x, torch.tensor([t]))
        noise = torch.randn(x.shape, generator=generator, dtype=x.dtype)
        x = p_step(schedule, x, t, eps_hat, noise)
    return x


# --------------------------------------- 2. The clean image that a guess at the noise implies
#
# A guess ε̂ at the noise in x_t implies a guess x̂₀ at the clean image: the equation of q_sample,
# solved for x₀.
#
# Why clip x̂₀ to [-1, 1]? Pixels cannot lie outside. At t = T a mistake of 0.01 in ε̂ moves x̂₀ by
# 1.6. One step goes only a little way towards x̂₀, but mistakes of the same sign in many steps add
# up. Clipping takes away what is certainly wrong; where no pixel is out of range, it does nothing.

def predict_clean(schedule: NoiseSchedule, xt: torch.Tensor, t, eps_hat: torch.Tensor,
                  clip: bool = True) -> torch.Tensor:
    """x̂₀ that a guess at the noise in xt implies, (B, C, H, W), clipped to [-1, 1] if asked."""
    x0_hat = schedule.predict_x0(xt, t, eps_hat)
    return x0_hat.clamp(-1, 1) if clip else x0_hat


# ------------------------------------------------------------------------ 3. One step back
#
# If x̂₀ were the true image, x_{t-1} would have the distribution q(x_{t-1} | x_t, x̂₀), a Gaussian
# with known mean μ̃_t and variance β̃_t (schedule.q_posterior). A step back draws from it:
#
#       x_{t-1} = μ̃_t + σ_t z,      z ~ N(0, 1),      σ_t² = β̃_t
#
# Why add noise on the way to a clean image? Because x_{t-1} must be as noisy as the images that the
# network saw at t-1 in training: given x₀, the noise in it must have variance 1-ᾱ_{t-1}. The mean
# alone has less. In μ̃_t, x_t is multiplied by c = √α_t (1-ᾱ_{t-1}) / (1-ᾱ_t), so of its noise a
# variance of c² (1-ᾱ_t) = α_t (1-ᾱ_{t-1})² / (1-ᾱ_t) is left. The difference from 1-ᾱ_{t-1} is
#
#       (1-ᾱ_{t-1}) · [ (1-ᾱ_t) - α_t (1-ᾱ_{t-1}) ] / (1-ᾱ_t)  =  (1-ᾱ_{t-1}) β_t / (1-ᾱ_t)  =  β̃_t
#
# because the bracket is 1 - ᾱ_t - α_t + ᾱ_t = β_t.
#
# What happens without the noise? The differences between samples die out; they "collapse". Say the
# data are Gaussian with mean 0 and variance λ². Then x_t has variance v_t = ᾱ_t λ² + 1-ᾱ_t. As ε
# and x_t are jointly Gaussian, the best guess at ε is linear in x_t, and its slope is the mean of
# ε x_t divided by the mean of x_t². Put into μ̃_t [DDPM Eq. 11], it gives
#
#       ε̂ = √(1-ᾱ_t)/v_t · x_t       μ̃_t = 1/√α_t · (1 - β_t/v_t) x_t = √α_t v_{t-1}/v_t · x_t
#
# where the last step uses v_t - β_t = α_t v_{t-1}. Over all T steps the factors multiply to
# √ᾱ_T λ² / v_T (since v₀ = λ²), which is 0.006 λ². Wherever a chain begins, it ends near 0, the
# mean of the data. The digits of our network collapse as well, though not to their mean: all 200
# samples that we drew without noise were the same 1 (figures/noise.png).
#
# Which variance? For two kinds of data the exact step back is known. If every image is the same
# known x₀, it is q(x_{t-1} | x_t, x₀), with variance β̃_t. If images are standard normal noise, all
# x_t are, and the step back is like the step forward, with variance β_t. Digits lie in between
# [DDPM section 3.2]: since x₀ is not known, the mean computed from x̂₀ is off by an error, and the
# best variance is β̃_t plus the mean square of this error. For the look of the samples the choice
# hardly matters: β_t exceeds β̃_t by 2 % at t = 100, by 17 % at t = 10, and by more than that only
# in the last nine steps. (For the bound of train.py, most of which lies at small t, it matters:
# figures/bits.png.)

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
    x0_hat = predict_clean(schedule, xt, t, eps_hat, clip)
    mean, beta_tilde = schedule.q_posterior(x0_hat, xt, t, t_prev)
    if variance == "beta_tilde":
        sigma2 = beta_tilde
    elif variance == "beta":
        # The last step must not add noise, which would stay on the finished image (z = 0 in line 3
        # of the algorithm). β̃ is 0 there by itself; β is not.
        beta = schedule.step_beta(t, t_prev).to(xt.dtype).to(xt.device)
        sigma2 = torch.where(beta_tilde > 0, beta.reshape(beta_tilde.shape), 0)
    elif variance == "zero":
        sigma2 = torch.zeros_like(beta_tilde)
    else:
        raise ValueError(f"unknown variance {variance!r}; known are {', '.join(VARIANCES)}")
    return mean + sigma2.sqrt() * noise


# --------------------------------------------------- 4. DDIM: a step back that adds no noise
#
# Fewer steps have to be longer. DDIM goes from t to any s < t by noising the predicted image again,
# with the noise that has just been found in x_t:
#
#       x_s = √ᾱ_s x̂₀ + √(1-ᾱ_s) ε̂                                               [DDIM Eq. 12]
#
# It draws nothing at random, yet its samples do not collapse. Compare the two ways to add no noise:
#
#   * p_step without noise leaves less noise in x_{t-1} than level t-1 should have. But the network
#     is told t-1, and removes as much noise as that level should have. So it goes, step after step,
#     and the differences between samples go with the noise.
#   * A DDIM step separates x_t into image and noise, and puts exactly as much noise back as level s
#     should have. For the Gaussian data from above, x̂₀ = √ᾱ_t λ²/v_t · x_t, and a step multiplies
#     x_t by (√(ᾱ_s ᾱ_t) λ² + √((1-ᾱ_s)(1-ᾱ_t))) / v_t. The numerator is the scalar product of the
#     vectors (√ᾱ_s λ, √(1-ᾱ_s)) and (√ᾱ_t λ, √(1-ᾱ_t)), whose lengths are √v_s and √v_t. If s is
#     close to t, they are nearly parallel, and the product is nearly √(v_s v_t). So the factor is
#     nearly √(v_s/v_t), which takes the variance from v_t to v_s. If λ² = 0.27, the variance of
#     MNIST's pixels (as a mean over the image), 1,000 steps end with a variance of 0.268.
#
# A part of the noise can be fresh, too; a number η from 0 to 1 says how much. η = 0 is DDIM as
# above, and η = 1 has as much fresh noise as p_step:
#
#       x_s = √ᾱ_s x̂₀ + √(1-ᾱ_s-σ²) ε̂ + σ z,      σ² = η² β̃_t      [DDIM Eq. 12] [DDIM Eq. 16]
#
# where β̃_t, and below β_t, α_t and c, are those of the whole step from t to s (its α_t is ᾱ_t/ᾱ_s,
# see schedule.step_beta). With η = 1 this is the same as p_step. To see it, put x_t = √ᾱ_t x̂₀ +
# √(1-ᾱ_t) ε̂ into μ̃_t, with s for t-1. The factor of x̂₀ is √ᾱ_s [β_t + α_t (1-ᾱ_s)] / (1-ᾱ_t) =
# √ᾱ_s. The factor of ε̂ is c √(1-ᾱ_t), and by section 3 c² (1-ᾱ_t) = 1-ᾱ_s-β̃_t.

def ddim_step(schedule: NoiseSchedule, xt: torch.Tensor, t: int, eps_hat: torch.Tensor,
              noise: torch.Tensor, t_prev: int | None = None, eta: float = 0.0,
              clip: bool = True) -> torch.Tensor:
    """Noise the predicted image again, to a lower level.                [DDIM Eq. 12]

    xt, t, eps_hat, noise, t_prev, clip  as in p_step, but t and t_prev are ints
    eta                                  0 reuses the noise of xt; 1 takes as much fresh noise as
                                         p_step does with beta_tilde, and is the same step

    Returns x_{t_prev}, (B, C, H, W).
    """
    x0_hat = predict_clean(schedule, xt, t, eps_hat, clip)
    return noise_again(schedule, xt, t, x0_hat, noise, t_prev, eta)


def noise_again(schedule: NoiseSchedule, xt: torch.Tensor, t: int, x0_hat: torch.Tensor,
                noise: torch.Tensor, t_prev: int | None, eta: float) -> torch.Tensor:
    """The DDIM step for a given x̂₀.                                     [DDIM Eq. 16]"""
    if t_prev is None:
        t_prev = t - 1
    # If x̂₀ was clipped, it and the network's ε̂ no longer add up to x_t. So compute ε̂ anew.
    eps_hat = schedule.predict_eps(xt, t, x0_hat)
    # Write s for t_prev. The noise in x_s has the variance 1-ᾱ_s, and η² β̃_t of it is to be fresh.
    # As β̃_t is (1-ᾱ_s) β_t/(1-ᾱ_t), that is a share of η² β_t/(1-ᾱ_t).
    fresh = eta**2 * (schedule.step_beta(t, t_prev) / (1 - schedule.alpha_bar[t])).item()
    eps = math.sqrt(1 - fresh) * eps_hat + math.sqrt(fresh) * noise
    return schedule.q_sample(x0_hat, t_prev, eps)


# --------------------------------------------- 5. DPM-Solver++: fewer steps by extrapolation
#
# DDIM draws nothing at random, so x₀ is a function of x_T. What does the path from x_T to x₀ look
# like if the steps get shorter and shorter? Write r = √ᾱ / √(1-ᾱ), the square root of the
# signal-to-noise ratio, and divide the equation of a DDIM step by √(1-ᾱ_s):
#
#       x_s / √(1-ᾱ_s) = r_s x̂₀ + ε̂
#
# Before the step, likewise, x_t / √(1-ᾱ_t) = r_t x̂₀ + ε̂. So the step changes x/√(1-ᾱ) by
# (r_s-r_t) x̂₀: the path of x/√(1-ᾱ), drawn over r, has the slope x̂₀. A DDIM step follows this
# path exactly if x̂₀ stays as it is during the step. But x̂₀ becomes clearer all the time.
#
# DPM-Solver++(2M) assumes instead that x̂₀ changes linearly with u = log r. It draws a line through
# the last two predictions, and uses the x̂₀ that this line gives half-way to the next level. ("2M"
# says that two predictions are used, from two steps.) For Gaussian data and a perfect network, 10
# such steps are as exact as 50 of DDIM.
#
# A trained network makes mistakes, though, and a step without fresh noise passes them on, as a part
# of ε̂, to the next image. With our network, extrapolation alone gains nothing: in 20 steps the
# Fréchet distance from real digits (plots.py explains it; less is better) is 10.3 with DDIM and
# 10.2 with DPM-Solver++. Fresh noise replaces a share of ε̂, mistakes included. The same step with
# η = 1 is SDE-DPM-Solver++(2M) (a path with noise solves a stochastic differential equation, an
# SDE). Its 20 steps are at a distance of 4.3, as good as the 1,000 of p_step, at 4.9.

def dpm_step(schedule: NoiseSchedule, xt: torch.Tensor, t: int, eps_hat: torch.Tensor,
             noise: torch.Tensor, t_prev: int | None = None,
             previous: tuple[int, torch.Tensor] | None = None, eta: float = 0.0,
             clip: bool = True) -> torch.Tensor:
    """A DDIM step whose x̂₀ is extrapolated from two.          [DPM-Solver++ Algorithm 2]

    xt, t, eps_hat, noise, t_prev, clip  as in ddim_step
    previous                             (t, x̂₀) of the previous step; None in the first step,
                                         which is a DDIM step
    eta                                  0 for DPM-Solver++(2M), 1 for SDE-DPM-Solver++(2M)

    Returns x_{t_prev}, (B, C, H, W).
    """
    if t_prev is None:
        t_prev = t - 1
    x0_hat = predict_clean(schedule, xt, t, eps_hat, clip)
    if previous is not None and t_prev > 0:  # at t = 0, u is infinite: the last step is DDIM's
        t_before, x0_before = previous
        u_before = log_r(schedule, t_before)
        u = log_r(schedule, t)
        u_next = log_r(schedule, t_prev)
        # The line through both predictions, read off in the middle of the step. It is not clipped.
        x0_hat = x0_hat + (u_next - u) / (2 * (u - u_before)) * (x0_hat - x0_before)
    return noise_again(schedule, xt, t, x0_hat, noise, t_prev, eta)


def log_r(schedule: NoiseSchedule, t: int) -> float:
    """log(√ᾱ_t / √(1-ᾱ_t)): half the logarithm of the signal-to-noise ratio."""
    return 0.5 * schedule.snr(t).log().item()


# -------------------------------------------------------- 6. Which noise levels to visit
#
# A chain of fewer than T steps visits some of the levels T, ..., 1 and ends at 0. For DPM-Solver++
# they are evenly spaced in u = log r, as its authors recommend; its formula allows any others. For
# the rest they are evenly spaced in t. That includes sde-dpm++, which did better that way when we
# tried both (1,000 digits in 20 steps: Fréchet distance 5.1 with levels even in t, 6.9 in u).
#
# How many steps are enough? For p_step the distance of 2,000 digits is 4.9 in 1,000 steps, 5.3 in
# 50 and in 20, 12.8 in 10 and 35.7 in 5. For sde-dpm++ it is 5.9 in 50 steps, 4.3 in 20, 6.3 in 10
# and 18.9 in 5. (Two sets of 1,000 digits of p_step in 1,000 steps were at 4.8 and 6.1, so
# differences of about 1 mean little.) So even p_step needs far fewer than 1,000 steps for digits of
# 28x28 pixels.

def timesteps(schedule: NoiseSchedule, sampler: str = "ddpm", steps: int | None = None,
              T: int | None = None) -> list[int]:
    """The noise levels that a chain visits, from T down to 0.

    sampler  a name in SAMPLERS; the levels are evenly spaced in u for "dpm++", else in t
    steps    number of steps, 1..T; None is the usual number of the sampler, at most T
    T        where the chain begins; None is the T of the schedule

    Returns steps + 1 integers, or fewer for "dpm++" if some of them are the same. Raises ValueError
    unless 1 <= steps <= T.
    """
    if T is None:
        T = schedule.T
    if steps is None:
        steps = min(T, SAMPLERS[sampler])
    if not 1 <= steps <= T:
        raise ValueError(f"steps must be between 1 and {T}, not {steps}")

    if sampler != "dpm++":
        return [round(T * k / steps) for k in range(steps, -1, -1)]

    # Choose evenly spaced u, from that of T to that of 1, and take the t nearest to each. If two
    # give the same t, it is visited once. The last step, to 0, comes on top.
    u = 0.5 * schedule.snr(torch.arange(1, T + 1)).log()  # (T,), falling
    wanted = torch.linspace(u[-1], u[0], steps, dtype=u.dtype)
    nearest = 1 + (u[:, None] - wanted).abs().argmin(dim=0)  # (steps,) of 1..T
    without_repeats = list(dict.fromkeys(nearest.tolist()))
    return [*without_repeats, 0]


# --------------------------------------------- 7. Guidance: away from a worse network
#
# One digit in four is not clear. Our network is small and was trained for a short time, so its
# answer often includes digits that x_t in fact rules out. An earlier state of the same network
# makes the same mistakes, only larger ones. So the difference between the two answers points away
# from the mistakes, and we can go further in that direction than the network did:
#
#       ε̂ = ε_worse + w (ε_model - ε_worse)                                [Autoguidance]
#
# With w = 0 this is the worse network, with w = 1 the model, with w = 2 it goes beyond the model by
# as much as the model is ahead of the worse one. With the state after epoch 2 of 15 (which train.py
# keeps as early.pt) and w = 2, nine digits in ten are clear, and the Fréchet distance falls from
# 4.3 to 2.7.
#
# Why does it help? Say the perfect answer is ε*, the model errs by e and the worse network by k e,
# the same mistake, only k > 1 times as large. Then ε̂ = ε* + (k - w (k-1)) e, and w = k/(k-1), 2 if
# the worse network errs twice as much, removes the mistake altogether. A mistake that the model
# alone makes is multiplied by w, and one of the worse network alone comes in w-1 times, with the
# opposite sign. So not every other network is of use as a guide.
#
# What does it cost? Twice the work: two networks have to answer. And some variety: where the model
# has learned to rule out more images than the worse network, guidance rules out more still. A large
# w gives bold strokes and too many of the simplest digits.
#
# What is drawn then? Let p and p_worse be the densities of what the two networks draw alone. Most
# texts say that guidance draws images with the density p^w / p_worse^(w-1), up to a factor. That is
# not so. It is true that at each t, ε̂ = w ε_model - (w-1) ε_worse belongs to such a density of
# noisy images. To see it, write the density of x_t as p_t(x_t) = ∫ q(x_t|x₀) p(x₀) dx₀ and take the
# gradient ∇ with respect to x_t. The logarithm of the Gaussian q(x_t|x₀) has the gradient
# -(x_t - √ᾱ_t x₀) / (1-ᾱ_t) = -ε/√(1-ᾱ_t), where ε = (x_t - √ᾱ_t x₀) / √(1-ᾱ_t) is the noise that
# leads from x₀ to x_t. As ∇q = q ∇log q for any density,
#
#       ∇p_t(x_t) = ∫ -ε/√(1-ᾱ_t) · q(x_t|x₀) p(x₀) dx₀
#
# Divide by p_t(x_t). The left side becomes ∇log p_t(x_t). On the right, q(x_t|x₀) p(x₀) / p_t(x_t)
# is by Bayes' rule the probability density of x₀ given x_t, so the integral becomes the average of
# -ε/√(1-ᾱ_t) over all x₀ that x_t could have come from. The average of ε is the perfect answer of
# section 1. So
#
#       the perfect answer = -√(1-ᾱ_t) ∇log p_t(x_t)
#
# and w ε_model - (w-1) ε_worse belongs to the density with the logarithm w log p_t - (w-1) log
# p_worse,t. But these densities of different t do not belong together: noise added to the one of
# t = 0 does not give the others.
#
# A case that can be computed: the data are N(0, 1), the model is perfect, the worse network is
# perfect for N(0, a), a being its variance, with a = 2, and w = 2. The density above would have the
# variance a / (wa - w + 1) = 0.667. DDIM in ever shorter steps ends at a^(1-w) = 0.5. (In a very
# short step the logarithm of its factor is linear in ε̂, so the guided factor is that of the model
# to the power w times that of the worse network to the power 1-w. By section 4 each is √(v_s/v_t).
# For the model v is always 1; for the worse network it goes from 1 to a.) p_step ends at 0.583. All
# three differ, so what is drawn depends on the sampler, too.
#
# Guidance can be limited to an interval of noise levels. At large t, where the digit is still open,
# it narrows the choice of images; at small t, where all is decided, it changes little. With w = 2,
# guidance at t from 150 to 700 gives as many clear digits as at all t, at a smaller distance (2.3).
# Of 20 steps, 12 then need the second network.

class Guided(torch.nn.Module):
    """A network made of two, which sample() uses as any other.               [Autoguidance]

    model     the network to be guided
    worse     the guide: a network for the same images and schedule that makes the same mistakes,
              only larger ones, such as an earlier state of the model
    guidance  w: 0 is the worse network, 1 the model, above 1 goes beyond it; any finite number
    interval  (low, high): the t, both ends included, at which guidance acts; at others the model
              answers alone. None is all t

    If model is a Labelled network (section 8) and worse is the same network without its label, this
    is classifier-free guidance [CFG Eq. 6]. Called as network(xt, t), as UNet is. Raises ValueError
    for a guidance that is not finite and for an empty interval.
    """

    def __init__(self, model: torch.nn.Module, worse: torch.nn.Module, guidance: float,
                 interval: tuple[int, int] | None = None):
        super().__init__()
        if not math.isfinite(guidance):
            raise ValueError(f"guidance must be a finite number, not {guidance}")
        if interval is not None and interval[0] > interval[1]:
            raise ValueError(f"the interval {interval[0]}-{interval[1]} contains no t")
        self.model = model
        self.worse = worse
        self.guidance = guidance
        self.interval = interval
        self.train(model.training)  # a new module is in training mode; take over that of the model

    def forward(self, xt: torch.Tensor, t: torch.Tensor) -> torch.Tensor:
        """ε̂, (B, C, H, W), for noisy images xt, (B, C, H, W), of the levels t, (B,)."""
        # Spare a network where it would change nothing.
        if self.guidance == 1:
            return self.model(xt, t)
        if self.interval is not None:
            low, high = self.interval
            inside = (low <= t) & (t <= high)  # (B,)
            if not inside.any():
                return self.model(xt, t)
        elif self.guidance == 0:
            return self.worse(xt, t)

        # Ask both. If it is the same network, with its label and without, ask in one batch.
        if isinstance(self.model, Labelled) and self.model.network is self.worse:
            eps_model, eps_worse = self.model.told_and_untold(xt, t)
        else:
            eps_model = self.model(xt, t)
            eps_worse = self.worse(xt, t)

        # Go from the worse answer through the better one and beyond.
        eps_hat = eps_worse + self.guidance * (eps_model - eps_worse)
        if self.interval is not None:
            eps_hat = torch.where(inside.reshape(-1, 1, 1, 1), eps_hat, eps_model)
        return eps_hat


# ----------------------------------------------------------- 8. Labels: digits to order
#
# "Draw me a 7." train.py --labels trains a network that is told the class c of each image and
# learns the answer ε(x_t, t, c). From one image in ten the label is withheld, so that it learns the
# answer ε(x_t, t) without a label as well. Nothing else in these scripts has to change: all that is
# said about x₀ holds for the images of a single class, too, and a sampler that is given the answers
# for class 7 draws sevens.
#
# How do the two answers differ? Let p_t(x_t | c) be the density of the noisy images of class c. By
# Bayes' rule it is p_t(x_t) p(c | x_t) / p(c). Take the logarithm and its gradient with respect to
# x_t, in which p(c) does not occur. By section 7 the perfect answers are -√(1-ᾱ_t) times the
# gradients of log p_t(x_t | c) and of log p_t(x_t), so
#
#       ε(x_t, t, c) = ε(x_t, t) - √(1-ᾱ_t) ∇log p(c | x_t)
#
# p(c | x_t) is what a perfect classifier says about a noisy image. A step back takes away a part of
# the noise, that is, it goes against ε̂. So the label pushes the image in the direction in which
# this classifier becomes more certain of c, although no one has trained a classifier. Hence the
# name of what comes next, classifier-free guidance: push w times as hard.
#
#       ε̂ = ε(x_t, t) + w (ε(x_t, t, c) - ε(x_t, t))                        [CFG Eq. 6]
#
# This is the formula of Guided, and the worse network is the same network without its label. w = 0
# draws any digit, w = 1 digits of class c as they are, and a larger w digits of which a classifier
# would be more certain still. (Ho and Salimans write 1 + w where we write w.)
#
# At w = 1, 95 % of 2,000 digits were what had been asked for (by the judgement of a classifier),
# and at w = 1.5, guided at t from 150 to 700, 99.5 %. The price is variety: among the digits of a
# class, the variance of the classifier's features is a quarter smaller than among real ones, and
# with w = 3 it is half of it. An earlier state of the network, told the same label, makes a gentler
# guide (section 7; --guide names its file): with w = 1.5 it gives 98.6 %, and a variance smaller by
# less than a tenth.
#
# How can one check the two answers against each other? The answer without a label is the average of
# all noises that may be in x_t. Average first within each class, then over the classes:
#
#       ε(x_t, t) = Σ_c p(c | x_t) ε(x_t, t, c)
#
# tests/experiments/README.md says how well our network obeys this.
#
# And "draw me a cat in the rain"? From here to text-to-image models it is a short way. Where this
# network adds the row of its table that belongs to the class, they add what another network, a text
# encoder, makes of the sentence. (Most also let attention look at its words: the places of the
# image ask the queries, the words give keys and values.) In training the sentence is withheld now
# and then, and guidance goes from the answer without it to the answer with it and beyond. Only the
# row of the table is replaced; the noising, the loss and the samplers stay as they are.

class Labelled(torch.nn.Module):
    """A network that is told what to draw, which sample() uses as any other.       [CFG]

    network  a UNet with classes, called as network(xt, t, label)
    labels   (B,) integers, the class of each image of the batch; -1 tells none

    Called as labelled(xt, t), as UNet is, with batches of B images.
    """

    def __init__(self, network: torch.nn.Module, labels: torch.Tensor):
        super().__init__()
        self.network = network
        self.register_buffer("labels", labels)
        self.train(network.training)  # see Guided

    def forward(self, xt: torch.Tensor, t: torch.Tensor) -> torch.Tensor:
        """ε(x_t, t, c), (B, C, H, W), for noisy images xt, (B, C, H, W), of the levels t, (B,)."""
        return self.network(xt, t, self.labels)

    def told_and_untold(self, xt: torch.Tensor, t: torch.Tensor
                        ) -> tuple[torch.Tensor, torch.Tensor]:
        """ε(x_t, t, c) and ε(x_t, t), computed in one batch of 2B images."""
        labels = torch.cat([self.labels, torch.full_like(self.labels, -1)])
        eps_hat = self.network(torch.cat([xt, xt]), torch.cat([t, t]), labels)
        told, untold = eps_hat.chunk(2)
        return told, untold


# ------------------------------------------------ 9. The whole chain: one seed, one digit
#
# Each image takes all its noise from a generator of its own, which is seeded with the seed of the
# image and lives on the CPU. So seed 7 gives the same image, up to rounding, alone or among others,
# and it has the same noise on any device. If one generator served the whole batch, an image would
# depend on how many others are drawn beside it.

def draw_noise(generators: list[torch.Generator], shape: tuple[int, ...]) -> torch.Tensor:
    """Standard normal noise, an image of this shape from each generator, on the CPU."""
    noise = [torch.randn(shape, generator=generator, dtype=torch.float32)
             for generator in generators]
    return torch.stack(noise)


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
    sampler   "ddpm" (ancestral sampling, p_step), or in fewer steps "ddim", "dpm++", "sde-dpm++"
    variance  as in p_step, for ddpm
    steps     see timesteps(). A step of ddpm has α = ᾱ_t/ᾱ_{t_prev}          [IDDPM section 4]
    clip      clip x̂₀ to [-1, 1] in every step
    start     (t, xt) begins with these images at noise level t instead of with pure noise; the
              number of steps is the same, but at most t
    shape     (C, H, W) of an image
    eta       as in ddim_step, for ddim

    Yields (t, xt, x0_hat) for each of timesteps(): images of noise level t and the prediction x̂₀
    made from them, both (B, C, H, W) on the device of the model. At t = 0 both are the finished
    images. Raises ValueError for impossible arguments, when the first triple is asked for, and
    FloatingPointError after a triple whose prediction is not finite.
    """
    check_choices(seeds, sampler, variance, eta)
    if sampler == "sde-dpm++":
        eta = 1.0
    device = next(model.parameters()).device
    generators = [torch.Generator().manual_seed(seed) for seed in seeds]

    # Begin with pure noise, or with the images given. x_T is drawn in any case, so that a seed's
    # later noise is the same.
    xt = draw_noise(generators, shape).to(device)
    T = schedule.T
    if start is not None:
        check_start(start, schedule, seeds)
        T = start[0]
        xt = start[1].to(device)
        if steps is not None:
            steps = min(steps, T)

    levels = timesteps(schedule, sampler, steps, T)
    previous = None  # t and x̂₀ of the step before
    for t, t_prev in zip(levels[:-1], levels[1:]):
        # Guess the noise, in eval mode: a network with dropout must not drop anything here. Then
        # restore the mode, since the caller gets control at `yield` and may go on training.
        was_training = model.training
        model.eval()
        eps_hat = model(xt, torch.full((len(xt),), t, device=device))
        model.train(was_training)

        # Show what there is.
        x0_hat = predict_clean(schedule, xt, t, eps_hat, clip)
        yield t, xt, x0_hat

        # Take the step.
        noise = draw_noise(generators, shape).to(device)
        check_finite(t, eps_hat, x0_hat, clip)
        if sampler == "ddpm":
            xt = p_step(schedule, xt, t, eps_hat, noise, t_prev, variance, clip)
        elif sampler == "ddim":
            xt = ddim_step(schedule, xt, t, eps_hat, noise, t_prev, eta, clip)
        else:
            xt = dpm_step(schedule, xt, t, eps_hat, noise, t_prev, previous, eta, clip)
        previous = t, x0_hat

    yield 0, xt, xt


# -------------------------------------------------------- 10. Restarts: a second chance
#
# Which digit a chain draws is decided at t of about 600 to 300 (figures/decided.png). If the chain
# goes wrong there, later steps can only make the best of it. A restart gives it a second chance:
# add noise to the finished image, up to t = 400 say, and draw it again from there, guided or not. A
# clear digit mostly comes back as the same digit; a malformed one is likely to become something
# better, perhaps because the network has seen no malformed ones. Doing it again and again helps
# more, and costs as much again. (Xu et al. take a path without noise on the way back; we take
# sde-dpm++.) Six restarts bring 86 % clear digits and a distance of 2.9, with guidance 90 % and
# 1.9.

# The levels up to which images are noised again, as shares of T.
RESTARTS = (0.4, 0.4, 0.4, 0.3, 0.3, 0.3)

def restart(model: torch.nn.Module, schedule: NoiseSchedule, images: torch.Tensor,
            seeds: list[int], shares: tuple[float, ...] = RESTARTS, steps: int = 10,
            clip: bool = True) -> torch.Tensor:
    """Noise finished images again and take them back, once for each share.

    model   as in sample(); images is (B, C, H, W) in [-1, 1], one for each seed
    shares  a restart for each, up to t = share · T; restart k = 1, 2, ... has the noise of the
            seeds + k million
    steps   steps of sde-dpm++ on each way back, at most t

    Returns images like those given, on the device of the model. Raises ValueError if there is not
    one image for each seed.
    """
    if len(images) != len(seeds):
        raise ValueError(f"{len(images)} images for {len(seeds)} seeds")
    device = next(model.parameters()).device
    images = images.to(device)
    shape = tuple(images.shape[1:])
    for k, share in enumerate(shares, start=1):
        # Draw the noise: the first draw of each seed. sample() makes the same draw once more and
        # throws it away, because it is given `start`. So no noise is used twice.
        others = [seed + k * 10**6 for seed in seeds]
        generators = [torch.Generator().manual_seed(seed) for seed in others]
        eps = draw_noise(generators, shape).to(device)

        # Noise the images to t, and go back to 0.
        t = max(1, round(share * schedule.T))
        xt = schedule.q_sample(images, t, eps)
        for _, _, x0_hat in sample(model, schedule, others, "sde-dpm++", steps=steps, clip=clip,
                                   start=(t, xt), shape=shape):
            images = x0_hat  # the last one is the finished image
    return images


# =========================================================================================
# Below this line is plumbing: impossible arguments, model files, pictures, the command line.
# =========================================================================================

def check_choices(seeds: list[int], sampler: str, variance: str, eta: float) -> None:
    """Raise ValueError for arguments of sample() that cannot be."""
    if len(seeds) == 0:
        raise ValueError("no seeds, so nothing to sample")
    if sampler not in SAMPLERS:
        raise ValueError(f"unknown sampler {sampler!r}; known are {', '.join(SAMPLERS)}")
    if variance not in VARIANCES:
        raise ValueError(f"unknown variance {variance!r}; known are {', '.join(VARIANCES)}")
    if not 0 <= eta <= 1:
        raise ValueError(f"eta must be between 0 and 1, not {eta}")
    if variance != "beta_tilde" and sampler != "ddpm":
        raise ValueError(f"{sampler} has no choice of variance; only ddpm has")
    if eta != 0 and sampler != "ddim":
        raise ValueError(f"{sampler} has no eta; only ddim has")


def check_finite(t: int, eps_hat: torch.Tensor, x0_hat: torch.Tensor, clip: bool) -> None:
    """Raise FloatingPointError if a prediction is not finite: no digit can come of it.

    sample() asks when it has moved noise to the device, which waits for the device anyway.
    """
    if (eps_hat.isfinite() & x0_hat.isfinite()).all():
        return
    advice = "take another model file" if clip else "clip the predicted images (no --no-clip)"
    raise FloatingPointError(f"the prediction is not finite at t = {t}; {advice}")


def check_start(start: tuple[int, torch.Tensor], schedule: NoiseSchedule,
                seeds: list[int]) -> None:
    """Raise ValueError if a chain cannot begin with these images."""
    t, images = start
    if not 1 <= t <= schedule.T:
        raise ValueError(f"start needs a t in 1..{schedule.T}, not {t}")
    if len(images) != len(seeds):
        raise ValueError(f"start needs one image for each seed, not {len(images)} "
                         f"for {len(seeds)}")


def open_checkpoint(name: str | None, finished: bool = True,
                    labels: bool = False) -> tuple[Path, Checkpoint]:
    """Load a model file and print which: the one named, else your own run, else the shipped one.

    name      a file; None takes runs/mnist/model.pt if it is there, else pretrained/model.pt
    finished  with None, skip your own run if it is still under way
    labels    with None, take a model that knows labels: runs/mnist-labels/model.pt, else
              pretrained/labels/model.pt

    Raises OSError or ValueError, in one line.
    """
    shipped = SHIPPED_LABELS if labels else SHIPPED
    path = Path(name or HERE / "runs" / ("mnist-labels" if labels else "mnist") / "model.pt")
    if name is None and not path.exists():
        path = shipped
    checkpoint = load_checkpoint(path)
    epochs = len(checkpoint.history["loss"])
    if name is None and finished and epochs < checkpoint.config.epochs:
        print(f"{path} is not finished yet; --checkpoint {path} would take it", file=sys.stderr)
        return open_checkpoint(str(shipped))

    line = f"{path}: {DATASETS[checkpoint.config.dataset]}, {epochs} epochs"
    if epochs > 0:
        line += f", held-out loss {checkpoint.history['held_out'][-1]:.4f}"
    print(line, flush=True)
    return path, checkpoint


def find_guide(path: Path, checkpoint: Checkpoint) -> Path:
    """The file with an earlier state of a model: early.pt beside it, else that of an epoch.

    train.py writes early.pt after the share EARLY of all steps. pretrained/model.pt has none,
    because its epoch-2.pt is the same. Raises OSError if there is neither.
    """
    epoch = max(1, round(EARLY * checkpoint.config.epochs))
    for name in ("early.pt", f"epoch-{epoch}.pt"):
        if path.with_name(name).exists():
            return path.with_name(name)
    raise OSError(f"no early.pt and no epoch-{epoch}.pt beside {path} to guide it; name an earlier "
                  "state of the same network by --guide")


def guided(checkpoint: Checkpoint, path: Path, guidance: float, guide: str | None = None,
           interval: tuple[int, int] | None = None,
           labels: torch.Tensor | None = None) -> torch.nn.Module:
    """The network of a model file, guided by itself without labels or by an earlier state of it.

    path      the model file
    guide     the file of the earlier state; None is find_guide(), or with labels the network itself
    labels    (B,) integers, the classes to draw; None if none is asked for. An earlier state is
              told them, too

    Raises OSError if there is no guide, ValueError if it does not fit the model.
    """
    # With labels, the network itself can be the guide.
    if labels is not None and guide is None:
        print(f"guided by itself without labels, w = {guidance:g}", flush=True)
        return Guided(Labelled(checkpoint.model, labels), checkpoint.model, guidance, interval)

    # Otherwise, load its earlier state.
    guide_path = Path(guide) if guide else find_guide(path, checkpoint)
    earlier = load_checkpoint(guide_path)
    check_guide(earlier, guide_path, checkpoint, path)
    print(f"guided by {guide_path}, w = {guidance:g}", flush=True)
    if labels is None:
        return Guided(checkpoint.model, earlier.model, guidance, interval)
    return Guided(Labelled(checkpoint.model, labels), Labelled(earlier.model, labels), guidance,
                  interval)


def check_guide(guide: Checkpoint, guide_path: Path, checkpoint: Checkpoint, path: Path) -> None:
    """Raise ValueError unless a guide is an earlier state of the network in a checkpoint."""
    advice = "a guide must be an earlier state of the same network"
    if guide.model.config != checkpoint.model.config:
        raise ValueError(f"{guide_path} has another network than {path}; {advice}")
    if not torch.equal(guide.schedule.beta, checkpoint.schedule.beta):
        raise ValueError(f"{guide_path} has another schedule than {path}; {advice}")
    if guide.config.dataset != checkpoint.config.dataset or guide.classes != checkpoint.classes:
        raise ValueError(f"{guide_path} has learned other images than {path}; {advice}")
    if len(guide.history["step_loss"]) >= len(checkpoint.history["step_loss"]):
        raise ValueError(f"{guide_path} was not trained for fewer steps than {path}; {advice}")


def parse_digits(text: str) -> list[str]:
    """'0-3,7' -> ['0', '1', '2', '3', '7']. Raises argparse.ArgumentTypeError for anything else."""
    digits = []
    for part in text.split(","):
        match = re.fullmatch(r"([0-9])(?:-([0-9]))?", part)
        if match is None or match[1] > (match[2] or match[1]):
            raise argparse.ArgumentTypeError(f"{part!r} is not a digit or a range such as 0-9")
        first = int(match[1])
        last = int(match[2] or match[1])
        digits += [str(digit) for digit in range(first, last + 1)]
    return digits


def labels_for(seeds: list[int], names: list[str], checkpoint: Checkpoint,
               path: Path) -> torch.Tensor:
    """The label of each seed: those of the named classes, repeated as needed; (B,) integers.

    Raises ValueError if the model of this file knows no labels, or not such a class.
    """
    if not checkpoint.classes:
        raise ValueError(f"{path} was trained without labels and cannot be asked for a class; "
                         "python train.py --labels makes a model that can")
    # Upper and lower case count alike, unless both spellings are names of classes.
    known = {name.lower(): label for label, name in enumerate(checkpoint.classes)}
    known |= {name: label for label, name in enumerate(checkpoint.classes)}
    asked = []
    for name in names:
        label = known.get(name, known.get(name.lower()))
        if label is None:
            raise ValueError(f"{path} knows no class {name!r}; give --classes some of "
                             f"{','.join(checkpoint.classes)}")
        asked.append(label)
    return torch.tensor([asked[k % len(asked)] for k in range(len(seeds))])


def parse_interval(text: str) -> tuple[int, int]:
    """'150-700' -> (150, 700). Raises argparse.ArgumentTypeError for anything else."""
    match = re.fullmatch(r"(\d{1,9})-(\d{1,9})", text, re.ASCII)
    if match is None or int(match[1]) > int(match[2]):
        raise argparse.ArgumentTypeError(f"{text!r} is not an interval of t such as 150-700")
    return int(match[1]), int(match[2])


def parse_seeds(text: str) -> list[int]:
    """'0-3,7' -> [0, 1, 2, 3, 7]. Raises argparse.ArgumentTypeError for anything else."""
    seeds = []
    for part in text.split(","):
        match = re.fullmatch(r"(\d{1,18})(?:-(\d{1,18}))?", part, re.ASCII)
        if match is None:
            raise argparse.ArgumentTypeError(f"{part!r} is not a seed or a range such as 0-31")
        first = int(match[1])
        last = int(match[2] or match[1])
        if first > last:
            raise argparse.ArgumentTypeError(f"{part!r} is not a seed or a range such as 0-31")
        if last - first + len(seeds) >= 10_000:
            raise argparse.ArgumentTypeError("more than 10,000 seeds; sample them in parts")
        seeds += range(first, last + 1)
    return seeds


def to_uint8(images: torch.Tensor) -> torch.Tensor:
    """The inverse of train.from_uint8. Values beyond [-1, 1] saturate; a bare cast would wrap."""
    return ((images + 1) * 127.5).round().clamp(0, 255).to(torch.uint8)


def draw_grid(images: torch.Tensor, scale: int = 4, columns: int = 8) -> Image.Image:
    """Images (B, 1, H, W) in [-1, 1], so many to a row, on a dark grey grid, enlarged.

    The same as torchvision's make_grid, which takes seconds to import.
    """
    columns = min(columns, len(images))
    empty = -len(images) % columns  # places left over in the last row
    grey = 64
    pad = torch.nn.functional.pad

    # Each image gets a grey line to its right and one below it, then the whole grid gets one to its
    # left and one above it.
    cells = pad(to_uint8(images.cpu()), (0, 1, 0, 1, 0, 0, 0, empty), value=grey)
    grid = rearrange(cells, "(row column) 1 h w -> (row h) (column w)", column=columns)
    grid = pad(grid, (1, 0, 1, 0), value=grey)
    enlarged = repeat(grid, "h w -> (h i) (w j)", i=scale, j=scale)
    return Image.fromarray(enlarged.numpy())


def make_parser() -> Parser:
    parser = Parser(description="Draw digits.")
    parser.add_argument("--seeds", type=parse_seeds, default="0-31", metavar="SEEDS",
                        help="one image for each seed, as numbers and ranges with commas "
                             "(default: %(default)s)")
    parser.add_argument("--sampler", choices=SAMPLERS, default="ddpm",
                        help="(default: %(default)s)")
    parser.add_argument("--eta", type=float, default=0.0,
                        help="share of fresh noise in ddim, 0 to 1 (default: %(default)s)")
    parser.add_argument("--variance", choices=VARIANCES, default="beta_tilde",
                        help="variance of the noise that ddpm adds in each step "
                             "(default: %(default)s)")
    parser.add_argument("--steps", type=int, metavar="N",
                        help="number of steps (default: all T for ddpm, 50 for ddim, else 20)")
    what = parser.add_mutually_exclusive_group()
    what.add_argument("--digits", type=parse_digits, metavar="DIGITS", dest="classes",
                      help="what to draw, such as 7 or 0-9, given to the seeds in turn; for a "
                           "model trained with labels")
    what.add_argument("--classes", type=lambda text: text.split(","), metavar="NAMES",
                      help="the same for other data sets: names of classes, with commas")
    parser.add_argument("--guidance", type=float, default=1.0, metavar="W",
                        help="go beyond the model, away from a worse one: 1 is no guidance; 2 is "
                             "usual, with --digits or --classes 1.5 (default: %(default)s)")
    parser.add_argument("--guide", type=os.path.expanduser, metavar="FILE",
                        help="model file of the worse one, an earlier state, told the same classes "
                             "(default: with --digits or --classes, the model itself, not told; "
                             "else early.pt beside the model or the file of its epoch 2 of 15)")
    parser.add_argument("--interval", type=parse_interval, metavar="LOW-HIGH",
                        help="noise levels t at which guidance acts (default: all)")
    parser.add_argument("--restarts", action="store_true",
                        help="noise the finished digits again and draw them anew from the middle "
                             f"of the chain, {len(RESTARTS)} times")
    parser.add_argument("--no-clip", dest="clip", action="store_false",
                        help="do not clip the predicted clean image to [-1, 1]")
    parser.add_argument("--checkpoint", type=os.path.expanduser, metavar="FILE",
                        help="model file (default: your own finished run, else the shipped one)")
    parser.add_argument("--out", type=os.path.expanduser, metavar="PNG",
                        help="picture to write (default: samples.png beside the model), or a "
                             "folder, DIR/, for a file for each digit; the same command again "
                             "draws those that are missing")
    parser.add_argument("--batch-size", type=int, metavar="N",
                        help="digits drawn at a time, with a folder "
                             f"(default: {BATCH_SIZE})")
    parser.add_argument("--gif", type=os.path.expanduser, metavar="GIF",
                        help="write the way there as an animation, too")
    parser.add_argument("--device", default="auto",
                        help="cuda, mps or cpu; auto is the first that is there "
                             "(default: %(default)s)")
    return parser


def is_folder(out: str | None) -> bool:
    """Whether --out asks for a folder: it ends in a slash, or is a folder already."""
    if not out:
        return False
    return out.endswith(("/", os.sep)) or Path(out).is_dir()


def check_output(args: argparse.Namespace) -> None:
    """Raise ValueError for --out, --gif and --batch-size that do not go together."""
    check_ending("--gif", args.gif, ".gif")
    if args.batch_size is not None and args.batch_size < 1:
        raise ValueError(f"--batch-size must be at least 1, not {args.batch_size}")

    if is_folder(args.out):
        if args.gif:
            raise ValueError("--gif shows a grid on its way; it does not go with a folder as --out")
        return
    if args.out and Path(args.out).suffix.lower() != ".png":
        raise ValueError("--out must be a file that ends in .png or a folder that ends in /, "
                         f"not {args.out}")
    if args.batch_size is not None:
        raise ValueError("--batch-size is for a folder as --out; a grid is drawn in one batch")


def check_ending(option: str, file: str | None, ending: str) -> None:
    if file and Path(file).suffix.lower() != ending:
        raise ValueError(f"{option} must be a file that ends in {ending}, not {file}")


def files_to_write(out: str | None, gif: str | None, model_path: Path) -> list[Path]:
    """The files that this call writes, which can be written. Raises OSError if one cannot."""
    # Pictures go beside the model; those of the shipped one must not lie among shipped files.
    folder = model_path.parent
    if SHIPPED.parent in model_path.resolve().parents:
        folder = HERE / "runs" / "pretrained"
    files = [Path(out or folder / "samples.png")]
    if gif:
        files.append(Path(gif))

    # What cannot be written should fail now, not after a minute of sampling.
    for file, option in zip(files, ("--out", "--gif")):
        make_folder(file.parent, option)
        if file.is_dir():
            raise OSError(f"{file} is a folder; name another file by {option}")
    return files


def check_interval(interval: tuple[int, int] | None, levels: list[int]) -> None:
    """Raise ValueError if guidance would act nowhere: no level of the chain is in the interval."""
    if interval is None:
        return
    low, high = interval
    if not any(low <= t <= high for t in levels[:-1]):
        raise ValueError(f"no noise level of this chain, {levels[0]} to {levels[-2]}, lies in "
                         "--interval")


def describe_chain(args: argparse.Namespace, steps: int) -> str:
    """How the digits were drawn, for the description inside the picture."""
    words = f"{args.sampler}, {steps} steps"
    if args.eta != 0:
        words += f", eta {args.eta:g}"
    if args.variance != "beta_tilde":
        words += f", variance {args.variance}"
    if not args.clip:
        words += ", not clipped"
    if args.guidance != 1:
        words += f", guidance {args.guidance:g}"
    if args.guide:
        words += f" by {Path(args.guide).name}"
    if args.interval:
        words += f" at t of {args.interval[0]} to {args.interval[1]}"
    if args.restarts:
        words += f", {len(RESTARTS)} restarts"
    return words


def place_network(model: torch.nn.Module, device: torch.device) -> torch.nn.Module:
    """Move a network to a device, and lay its weights out as sampling is fastest there."""
    model = model.to(device)
    # On a CPU, convolutions are faster if the channels of a pixel lie next to each other in memory
    # (channels last) than if the pixels of a channel do. Only the last bits of the results change.
    # Images take over the layout of the weights in the first convolution.
    if device.type == "cpu":
        model = model.to(memory_format=torch.channels_last)
    return model


def begin_chain(args: argparse.Namespace, checkpoint: Checkpoint, model: torch.nn.Module,
                seeds: list[int]) -> Iterator[tuple[int, torch.Tensor, torch.Tensor]]:
    """The chain of these seeds, sampled as the command line says."""
    size = checkpoint.model.config["size"]
    return sample(model, checkpoint.schedule, seeds, args.sampler, args.variance, args.steps,
                  args.clip, shape=(1, size, size), eta=args.eta)


def fingerprint(model: torch.nn.Module) -> str:
    """Eight hexadecimal digits that depend on all weights, those of a guide included."""
    digest = hashlib.sha256()
    for weights in model.parameters():
        digest.update(weights.detach().cpu().numpy().tobytes())
    return digest.hexdigest()[:8]


def digit_file(seed: int, name: str | None) -> str:
    """The file name of a digit: 00042.png, or 00042-7.png if class 7 was asked for.

    Letters, digits and _.-~ of a class name are kept, all else becomes %20 and the like, so that
    no two classes share a file.
    """
    if name is None:
        return f"{seed:05}.png"
    return f"{seed:05}-{quote(name, safe='')}.png"


def find_digits(folder: Path, settings: str) -> set[str]:
    """The names of the finished digits in a folder; a damaged file does not count.

    Raises OSError if a digit in there was drawn with other settings, or no one knows with which.
    """
    names = set()
    for file in sorted(folder.glob("*.png")):
        if re.fullmatch(r"\d{5,}(-.+)?", file.stem, re.ASCII) is None:
            continue  # some other picture
        try:
            with Image.open(file) as picture:
                picture.load()  # fails if the file was cut short
                description = picture.info.get("Description", "nothing is known of how")
        except (OSError, SyntaxError):  # what Pillow raises for damaged files
            continue
        if not description.endswith(f", {settings}"):
            raise OSError(f"{file} was drawn with other settings ({description}) than those "
                          f"of now ({settings}); name another folder")
        names.add(file.name)
    return names


def write_digit(image: torch.Tensor, path: Path, text: str) -> None:
    """Write (1, H, W) bytes as a grey PNG with a description."""
    with replacement_of(path) as file:
        Image.fromarray(image[0].numpy()).save(file, format="PNG", pnginfo=described(text))


def tell(model: torch.nn.Module, labels: torch.Tensor) -> None:
    """Tell the Labelled network in a model the classes of the next batch."""
    for module in model.modules():
        if isinstance(module, Labelled):
            module.labels = labels.to(module.labels.device)


def missing_digits(folder: Path, seeds: list[int], names: list[str | None],
                   settings: str) -> dict[str, int]:
    """The files that are still to be drawn into a folder, each with its place in `seeds`.

    names  the class of each seed; None if none is asked for

    Makes the folder. Raises OSError if it cannot be written, or as find_digits() does.
    """
    make_folder(folder)
    digits = {digit_file(seed, name): k for k, (seed, name) in enumerate(zip(seeds, names))}
    finished = find_digits(folder, settings)
    missing = {file: k for file, k in digits.items() if file not in finished}
    if len(missing) < len(digits):
        print(f"{len(digits) - len(missing)} of {len(digits)} digits are there already", flush=True)
    return missing


def write_folder(args: argparse.Namespace, checkpoint: Checkpoint, model: torch.nn.Module,
                 labels: torch.Tensor | None, levels: list[int], settings: str) -> list[Path]:
    """Draw each digit into a file of its own, in batches. Returns the folder, if it is changed.

    labels    (B,) integers, the class of each seed; None if none is asked for
    levels    those of the chain
    settings  how the digits are drawn; the description of a file also tells seed and class

    Digits that are there already are not drawn again. Raises OSError as missing_digits() does.
    """
    folder = Path(args.out)
    names = [None] * len(args.seeds)
    if labels is not None:
        names = [checkpoint.classes[label] for label in labels]
    missing = list(missing_digits(folder, args.seeds, names, settings).items())
    size = args.batch_size or BATCH_SIZE
    batches = [missing[first:first + size] for first in range(0, len(missing), size)]

    with tqdm(total=len(batches) * len(levels), unit=" steps", disable=None) as bar:
        for number, batch in enumerate(batches):
            # Draw a batch.
            bar.set_description(f"{number * size} of {len(missing)} digits")
            places = [k for _, k in batch]
            seeds = [args.seeds[k] for k in places]
            if labels is not None:
                tell(model, labels[places])
            for _, _, x0_hat in begin_chain(args, checkpoint, model, seeds):
                images = x0_hat  # the last one is the finished image
                bar.update()
            if args.restarts:
                images = restart(model, checkpoint.schedule, images, seeds, clip=args.clip)

            # Write it.
            for (file, k), image in zip(batch, to_uint8(images.cpu())):
                text = f"seed {args.seeds[k]}"
                if names[k] is not None:
                    text += f", class {names[k]}"
                write_digit(image, folder / file, f"{text}, {settings}")
    return [folder] if missing else []


def open_network(args: argparse.Namespace, device: torch.device
                 ) -> tuple[Path, Checkpoint, torch.nn.Module, torch.Tensor | None]:
    """Load the model; tell it the classes and guide it, if that is asked for.

    Returns the model file, what it holds, the network to draw with, and the label of each seed, or
    None.
    """
    path, checkpoint = open_checkpoint(args.checkpoint, labels=args.classes is not None)
    model = checkpoint.model
    labels = None
    if args.classes is not None:
        labels = labels_for(args.seeds, args.classes, checkpoint, path)
    if args.guidance != 1:
        model = guided(checkpoint, path, args.guidance, args.guide, args.interval, labels)
    elif labels is not None:
        model = Labelled(model, labels)
    return path, checkpoint, place_network(model, device), labels


def columns_of_grid(classes: list[str] | None) -> int:
    """How many digits stand in a row: eight, or a multiple of the number of classes, if any are
    asked for, so that the digits of a column are of one class.
    """
    if not classes:
        return 8
    return max(1, 8 // len(classes)) * len(classes)


def write_grid(args: argparse.Namespace, checkpoint: Checkpoint, model: torch.nn.Module,
               levels: list[int], files: list[Path], text: str) -> None:
    """Draw the digits of all seeds as one picture, and if asked for, the way there.

    levels  those of the chain
    files   the picture, and the animation if there is one
    text    the description inside the picture
    """
    # Sample. An animation shows about 50 of the levels.
    columns = columns_of_grid(args.classes)
    # Small images are enlarged more, so that their grid is about as large as one of 28x28.
    scale = max(2, 2 * 28 // checkpoint.model.config["size"])
    shown = set(levels[::max(1, len(levels) // 50)]) | {0}
    frames = []
    chain = begin_chain(args, checkpoint, model, args.seeds)
    for t, images, _ in tqdm(chain, total=len(levels), unit=" steps", disable=None):
        if args.gif and t in shown:
            frames.append(draw_grid(images, scale, columns))
        digits = images  # the last ones are finished
    if args.restarts:
        digits = restart(model, checkpoint.schedule, digits, args.seeds, clip=args.clip)
        if args.gif:
            frames.append(draw_grid(digits, scale, columns))

    # Write the picture and the animation: 80 milliseconds a frame, the digits for three seconds,
    # again and again.
    with replacement_of(files[0]) as file:
        draw_grid(digits, 2 * scale, columns).save(file, format="PNG", pnginfo=described(text))
    if args.gif:
        with replacement_of(files[1]) as file:
            frames[0].save(file, format="GIF", save_all=True, append_images=frames[1:], loop=0,
                           duration=[80] * (len(frames) - 1) + [3000])


def described(text: str) -> PngInfo:
    """A description to be saved inside a PNG."""
    description = PngInfo()
    description.add_text("Description", text)
    return description


def write_pictures(args: argparse.Namespace) -> list[Path]:
    """Sample as the command line says, and write what it asks for. Returns the files."""
    # Load the model.
    device = pick_device(args.device)
    prepare_device(device)
    path, checkpoint, model, labels = open_network(args, device)
    levels = timesteps(checkpoint.schedule, args.sampler, args.steps)
    check_interval(args.interval, levels)
    dataset = DATASETS[checkpoint.config.dataset]
    settings = describe_chain(args, len(levels) - 1)

    # Draw each digit into a file of its own.
    if is_folder(args.out):
        settings = f"{path.name}, {dataset}, {settings}, weights {fingerprint(model)}"
        return write_folder(args, checkpoint, model, labels, levels, settings)

    # Draw all into one picture, which says how it was made.
    files = files_to_write(args.out, args.gif, path)
    if args.classes:
        settings = f"classes {','.join(args.classes)}, {settings}"
    text = f"{path.name}, {dataset}, seeds {args.seeds}, {settings}"
    write_grid(args, checkpoint, model, levels, files, text)
    return files


@forgiving_output()
def main(argv: list[str] | None = None) -> None:
    # Read the options. What can never work ends here, with exit status 2.
    parser = make_parser()
    args = parser.parse_args(argv)
    try:
        pick_device(args.device)
        check_output(args)
        if not 0 <= args.guidance <= 100:
            raise ValueError(f"--guidance must be between 0 and 100, not {args.guidance}")
        if args.guidance == 1 and (args.guide or args.interval):
            raise ValueError("--guide and --interval are for --guidance; 2 is usual")
    except (ValueError, RuntimeError) as error:
        parser.error(str(error))

    # Sample.
    try:
        files = write_pictures(args)
        if files:
            print("wrote", *files)
    except KeyboardInterrupt:
        advice = "pictures that were there are kept"
        if is_folder(args.out):
            advice = f"the digits in {args.out} are complete; the same command draws the rest"
        print(f"\nstopped; {advice}", file=sys.stderr)
        sys.exit(130)
    except (ValueError, RuntimeError, OSError, FloatingPointError) as error:
        sys.exit("sample.py: " + str(error).partition("\n")[0])


if __name__ == "__main__":
    main()
