"""The laws of the sampler: what each step does to mean and variance, and what decides a digit.

The oracle is data whose best noise prediction is known exactly. If x_0 ~ N(mu, lam) in every
pixel, then x_t ~ N(sqrt(alpha_bar) mu, v) with v = alpha_bar lam + 1 - alpha_bar, and

    eps*(x_t) = sqrt(1 - alpha_bar) (x_t - sqrt(alpha_bar) mu) / v.

With this predictor and without clipping a step is affine in x_t and in the noise, so the mean and
variance of the whole chain follow by a plain loop: no network, no randomness, no tolerance for
luck. What the loop must give is known from theory.

The steps are given the network's guess eps_hat, and work out x0_hat from it. Where a law is about
a certain x0_hat, the test makes the eps_hat that implies it, by schedule.predict_eps.

Tolerances are derived as in test_schedule.py: the factors of a step are good to 2e-11, so a chain
of at most 40 steps is good to 1e-9. Tests that draw random numbers say how many standard errors
they allow, how likely a false alarm is, and which error they notice with 99.9 %. Such an error is
3.1 standard errors larger than what is allowed.
"""

import argparse
import functools
import inspect
import json
import math
import signal
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from hypothesis import assume, given
from hypothesis import strategies as st
from PIL import Image
from torch.nn.modules.module import register_module_forward_hook
from torchvision.transforms.functional import pil_to_tensor
from torchvision.utils import make_grid

import sample as script
import train
from sample import (RESTARTS, SAMPLERS, VARIANCES, Guided, Labelled, ddim_step, dpm_step,
                    draw_digit, find_guide, guided, labels_for, p_step, parse_digits,
                    parse_interval, parse_seeds, predict_clean, restart, sample, timesteps,
                    to_uint8)
from schedule import NoiseSchedule
from strategies import FEW, SEED, normal, pictures, same_images, schedules, schedules_and_t
from unet import UNet

LINEAR = NoiseSchedule()
STEEP = NoiseSchedule.from_betas(torch.linspace(0.2, 0.8, 10, dtype=torch.float64),
                                 allow_signal=True)
ONE = torch.ones(1, 1, 1, 1, dtype=torch.float64)
ZERO = torch.zeros(1, 1, 1, 1, dtype=torch.float64)


class Gaussian(torch.nn.Module):
    """The exact noise predictor for data N(mu, lam) in every pixel; stands in for the network."""

    def __init__(self, schedule, mu: float, lam: float):
        super().__init__()
        self.schedule = schedule
        self.mu = mu
        self.lam = lam
        self.weight = torch.nn.Parameter(torch.zeros(()))  # so that it is on a device
        self.calls = []  # the t that it was shown

    def forward(self, xt, t):
        self.calls.append(int(t[0]))
        alpha_bar = self.schedule.alpha_bar[t].reshape(-1, 1, 1, 1).to(xt.dtype)
        v = alpha_bar * self.lam + 1 - alpha_bar
        return (1 - alpha_bar).sqrt() * (xt - alpha_bar.sqrt() * self.mu) / v


def affine(schedule, t, lam, variance, t_prev=None):
    """(a, b) with x_{t-1} = a x_t + b noise for data N(0, lam), read off the real p_step."""
    eps_hat = Gaussian(schedule, 0.0, lam)(ONE, torch.tensor([t]))
    a = p_step(schedule, ONE, t, eps_hat, ZERO, t_prev, variance, clip=False).item()
    b = p_step(schedule, ZERO, t, ZERO, ONE, t_prev, variance, clip=False).item()
    return a, b


def chain_variances(schedule, lam, variance, start: float = 1.0) -> list[float]:
    """Var x_t for t = T..0 of the real step from variance `start` at T; list index t."""
    v = [0.0] * schedule.T + [start]
    for t in range(schedule.T, 0, -1):
        a, b = affine(schedule, t, lam, variance)
        v[t - 1] = a * a * v[t] + b * b
    return v


# ------------------------------------------------------------- the variance behaviour, exactly

@given(schedules(), st.floats(-1, 1), st.floats(0, 4), st.sampled_from(VARIANCES))
def test_variance_follows_the_exact_recursion(schedule, mu, lam, variance):
    """V_{t-1} = g^2 V_t + sigma_t^2, g = sqrt(alpha_t) v_{t-1}/v_t, at every t.

    The mean is that of the forward process plus what is left of its deviation at T:
    M_{t-1} - sqrt(alpha_bar_{t-1}) mu = g (M_t - sqrt(alpha_bar_t) mu). [DDPM Algorithm 2]
    sigma_t^2 is beta_t, beta_tilde_t or 0, and 0 in the last step. The loop here uses only products
    of betas.
    """
    variances = chain_variances(schedule, lam, variance)
    alpha_bar = [1.0]
    for beta in schedule.beta[1:].tolist():
        alpha_bar.append(alpha_bar[-1] * (1 - beta))
    v = [a * lam + 1 - a for a in alpha_bar]

    # The chain begins with standard normal noise.
    V = 1.0
    M = 0.0
    mean = 0.0  # by the real steps; M is what it must be
    for t in range(schedule.T, 0, -1):
        beta = schedule.beta[t].item()
        if v[t - 1] == 0:  # lam = 0 and t = 1: the chain lands on the point
            gain = 0.0
        else:
            gain = math.sqrt(1 - beta) * v[t - 1] / v[t]
        sigma2 = {"beta": beta, "zero": 0.0,
                  "beta_tilde": beta * (1 - alpha_bar[t - 1]) / (1 - alpha_bar[t])}[variance]
        if t == 1:
            sigma2 = 0.0
        V = gain**2 * V + sigma2
        assert abs(variances[t - 1] - V) < 1e-9 * max(1, V)

        eps_hat = Gaussian(schedule, mu, lam)(mean * ONE, torch.tensor([t]))
        mean = p_step(schedule, mean * ONE, t, eps_hat, ZERO, variance=variance, clip=False).item()
        M = math.sqrt(alpha_bar[t - 1]) * mu + gain * (M - math.sqrt(alpha_bar[t]) * mu)
        assert abs(mean - M) < 1e-9


@pytest.mark.parametrize("lam, variance, golden", [
    (1, "beta", 0.999900), (1, "beta_tilde", 0.991067),
    (0.27, "beta", 0.270757), (0.27, "beta_tilde", 0.265955),
    (0.01, "beta", 0.010154), (0.01, "beta_tilde", 0.009276),
    (0, "beta", 0.0), (0, "beta_tilde", 0.0)])
def test_golden_final_variances(lam, variance, golden):
    """V_0 of the default schedule for data N(0, lam), V_T = 1, to all six digits given.

    Computed elsewhere by V_{t-1} = g^2 V_t + sigma_t^2, as above.
    """
    assert abs(chain_variances(LINEAR, lam, variance)[0] - golden) < 6e-7


@given(schedules())
def test_beta_keeps_standard_normal_data(schedule):
    """Data N(0, 1), sigma^2 = beta: variance 1 at every t >= 1; the noiseless last step leaves
    1 - beta_1. [DDPM section 3.2]"""
    v = chain_variances(schedule, 1.0, "beta")
    assert all(abs(value - 1) < 1e-10 for value in v[1:])
    assert abs(v[0] - (1 - schedule.beta[1].item())) < 1e-10


@given(schedules(), st.floats(-1, 1))
def test_beta_tilde_keeps_the_marginals_of_a_point(schedule, c):
    """Data always c, sigma^2 = beta_tilde, started from q(x_T): x_t has the forward process's mean
    sqrt(alpha_bar_t) c and variance 1 - alpha_bar_t at every t. [DDPM section 3.2]

    With beta the variance is too large, seen here at t = 1 and at every t in the next law.
    """
    alpha_bar = schedule.alpha_bar.tolist()
    v = chain_variances(schedule, 0.0, "beta_tilde", start=1 - alpha_bar[-1])
    mean = math.sqrt(alpha_bar[-1]) * c
    for t in range(schedule.T, 0, -1):
        eps_hat = Gaussian(schedule, c, 0.0)(mean * ONE, torch.tensor([t]))
        mean = p_step(schedule, mean * ONE, t, eps_hat, ZERO, clip=False).item()
        assert abs(mean - math.sqrt(alpha_bar[t - 1]) * c) < 1e-9
        assert abs(v[t - 1] - (1 - alpha_bar[t - 1])) < 1e-9
    wrong = chain_variances(schedule, 0.0, "beta", start=1 - alpha_bar[-1])
    assert wrong[1] > v[1]


def test_no_other_variance_keeps_the_marginals_of_a_point():
    """Data a point, sigma^2 = beta: Var x_t > 1 - alpha_bar_t at every t from T-1 to 1. With
    sigma^2 = 0 it is smaller. [DDPM section 3.2]

    At t = 0 all three land on the point. Seen on the default schedule and on ten steep steps.
    """
    for schedule in (LINEAR, STEEP):
        start = 1 - schedule.alpha_bar[-1].item()
        beta = chain_variances(schedule, 0.0, "beta", start)
        zero = chain_variances(schedule, 0.0, "zero", start)
        for t in range(1, schedule.T):
            assert beta[t] > (1 + 1e-9) * (1 - schedule.alpha_bar[t].item())
            assert zero[t] < (1 - 1e-9) * (1 - schedule.alpha_bar[t].item())
        assert abs(beta[0]) < 1e-12 and abs(zero[0]) < 1e-12


@given(schedules_and_t(lowest=2), st.floats(0, 1))
def test_exact_variance_lies_between_beta_tilde_and_beta(drawn, lam):
    """beta_tilde_t <= v_{t-1} - alpha_t v_{t-1}^2/v_t <= beta_t if 0 <= lam <= 1.

    The middle is the variance of x_{t-1} given x_t for Gaussian data. It is beta_tilde_t for a
    point, lam = 0, and beta_t for lam = 1. It is also v_{t-1}/v_t beta_t, and v_t falls towards 1
    if lam > 1. So for lam = 4 it exceeds beta_t: the bracket holds because data have at most unit
    variance. [DDPM section 3.2]
    """
    schedule, t = drawn
    tilde = affine(schedule, t, lam, "beta_tilde")[1] ** 2
    beta = affine(schedule, t, lam, "beta")[1] ** 2

    def v(s: int, lam: float) -> float:
        return schedule.alpha_bar[s].item() * lam + 1 - schedule.alpha_bar[s].item()

    def exact(lam: float) -> float:
        return v(t - 1, lam) - schedule.alpha[t].item() * v(t - 1, lam) ** 2 / v(t, lam)

    assert tilde < beta
    assert tilde - 1e-12 <= exact(lam) <= beta + 1e-12
    assert abs(exact(0.0) - tilde) < 1e-12
    assert abs(exact(1.0) - beta) < 1e-12
    assert v(t - 1, 4.0) / v(t, 4.0) > 1
    assert abs(exact(4.0) - v(t - 1, 4.0) / v(t, 4.0) * beta) < 1e-12


@given(schedules(), st.floats(0.01, 4))
def test_without_noise_the_spread_collapses(schedule, lam):
    """sigma = 0: V_0 = V_T alpha_bar_T lam^2 / v_T^2, however small the steps are.

    So with V_T = 1, V_0 is at most alpha_bar_T lam^2 / (1 - alpha_bar_T)^2: the more noise the
    forward process ends with, the less is left of the data's spread. A product of 40 factors good
    to 2e-11, squared, is good to 2e-9.
    """
    alpha_bar = schedule.alpha_bar[-1].item()
    law = alpha_bar * lam**2 / (alpha_bar * lam + 1 - alpha_bar) ** 2
    for V_T in (1.0, 0.3):
        left = chain_variances(schedule, lam, "zero", V_T)[0]
        assert abs(left / (V_T * law) - 1) < 1e-8
        assert left <= (1 + 1e-8) * V_T * alpha_bar * lam**2 / (1 - alpha_bar) ** 2


def test_without_noise_p_step_collapses_and_ddim_does_not():
    """Data N(0, lam), 1,000 steps without noise. Those of p_step multiply what they begin with by
    sqrt(alpha_bar_T) lam/v_T, which is 0.006 lam: the variance is lost. DDIM keeps it: of
    lam = 0.27 (a pixel of MNIST) it leaves 0.268.

    The reason is that a short step of DDIM from t to s multiplies by nearly sqrt(v_s/v_t), so that
    each image keeps its place in the distribution. The step is off by 5e-5 of that at most, and by
    2e-4 if it ends at 0.
    """
    lam = 0.27
    alpha_bar = LINEAR.alpha_bar.tolist()
    v = [a * lam + 1 - a for a in alpha_bar]
    gain_of_p = 1.0
    gain_of_ddim = 1.0
    for t in range(1000, 0, -1):
        gain_of_p *= affine(LINEAR, t, lam, "zero")[0]
        eps_hat = Gaussian(LINEAR, 0.0, lam)(ONE, torch.tensor([t]))
        gain = ddim_step(LINEAR, ONE, t, eps_hat, ZERO, clip=False).item()
        gain_of_ddim *= gain
        tolerance = 2e-4 if t == 1 else 5e-5
        assert abs(gain / math.sqrt(v[t - 1] / v[t]) - 1) < tolerance
    assert abs(gain_of_p * v[-1] / (math.sqrt(alpha_bar[-1]) * lam) - 1) < 1e-9
    assert f"{gain_of_p / lam:.3f}" == "0.006"
    assert f"{gain_of_ddim**2:.3f}" == "0.268"


@given(schedules_and_t(), SEED, st.booleans())
def test_last_step_ignores_the_noise(drawn, seed, clip):
    """x_0 = x0_hat: a step that ends at t = 0 ignores the noise, whatever the variance.

    [DDPM Algorithm 2] With a step from t = 1, or a longer one that ends at 0.
    """
    schedule, t = drawn
    xt, eps_hat, noise, other = (normal(seed + k, 2, 1, 3, 3) for k in range(4))
    expected = schedule.predict_x0(xt, t, eps_hat)
    if clip:
        expected = expected.clamp(-1, 1)
    for variance in VARIANCES:
        one = p_step(schedule, xt, t, eps_hat, noise, 0, variance, clip)
        assert torch.equal(one, p_step(schedule, xt, t, eps_hat, other, 0, variance, clip))
        assert (one - expected).abs().max() <= 1e-12 * expected.abs().max()


@given(schedules_and_t(), SEED)
def test_unclipped_mean_is_the_papers(drawn, seed):
    """x_{t-1} = (x_t - beta_t/sqrt(1 - alpha_bar_t) eps_hat)/sqrt(alpha_t) + sigma_t z.

    [DDPM Eq. 11] for the mean, [DDPM Algorithm 2] for the step.
    """
    schedule, t = drawn
    xt, eps_hat, z = (normal(seed + k, 2, 1, 3, 3) for k in range(3))
    beta = schedule.beta[t].item()
    alpha_bar = schedule.alpha_bar[t].item()
    mean = (xt - beta / math.sqrt(1 - alpha_bar) * eps_hat) / math.sqrt(1 - beta)
    for variance, sigma2 in (("beta", beta), ("beta_tilde", schedule.beta_tilde[t].item()),
                             ("zero", 0.0)):
        expected = mean
        if t > 1:
            expected = mean + math.sqrt(sigma2) * z
        got = p_step(schedule, xt, t, eps_hat, z, variance=variance, clip=False)
        assert (got - expected).abs().max() < 1e-9


def test_each_image_steps_from_its_own_t():
    """p_step(x, t)_i = p_step(x_i, t_i): a batch with a t for each image, and one by one."""
    t = torch.tensor([1, 2, 500, 1000])
    xt, eps_hat, z = (normal(k, 4, 1, 3, 3) for k in range(3))
    for variance in VARIANCES:
        together = p_step(LINEAR, xt, t, eps_hat, z, variance=variance)
        for i in range(4):
            alone = p_step(LINEAR, xt[i:i + 1], int(t[i]), eps_hat[i:i + 1], z[i:i + 1],
                           variance=variance)
            assert torch.equal(together[i:i + 1], alone)


STEPS = [p_step, ddim_step, dpm_step]


def test_all_steps_have_one_signature():
    """schedule, xt, t, eps_hat, noise, t_prev come first in all of them, and t_prev may be left
    out; then each has its own choices, and clip comes last."""
    for step in STEPS:
        parameters = inspect.signature(step).parameters
        assert list(parameters)[:6] == ["schedule", "xt", "t", "eps_hat", "noise", "t_prev"]
        assert parameters["t_prev"].default is None
        assert list(parameters)[-1] == "clip" and parameters["clip"].default is True


@given(schedules_and_t(), SEED, st.booleans())
def test_steps_end_at_t_minus_1_if_nothing_else_is_said(drawn, seed, clip):
    """t_prev = None is t_prev = t - 1, bit for bit, in all steps, with and without fresh noise."""
    schedule, t = drawn
    xt, eps_hat, z, x0_before = (normal(seed + k, 2, 1, 3, 3) for k in range(4))
    choices = [(p_step, {"variance": name}) for name in VARIANCES]
    for eta in (0.0, 0.7, 1.0):
        choices.append((ddim_step, {"eta": eta}))
        choices.append((dpm_step, {"eta": eta}))
        if t < schedule.T:
            choices.append((dpm_step, {"eta": eta, "previous": (t + 1, x0_before)}))
    for step, options in choices:
        short = step(schedule, xt, t, eps_hat, z, clip=clip, **options)
        assert torch.equal(short, step(schedule, xt, t, eps_hat, z, t - 1, clip=clip, **options))


@given(schedules_and_t(), SEED)
def test_all_steps_clip(drawn, seed):
    """With clip, a step that ends at 0 ends within [-1, 1]; without, at the x0_hat that eps_hat
    implies, however far out that is. A step clips unless it is told not to."""
    schedule, t = drawn
    xt, z = (normal(seed + k, 2, 1, 3, 3) for k in range(2))
    x0_hat = 3 * normal(seed + 2, 2, 1, 3, 3)
    eps_hat = schedule.predict_eps(xt, t, x0_hat)
    for step in STEPS:
        free = step(schedule, xt, t, eps_hat, z, 0, clip=False)
        assert (free - x0_hat).abs().max() < 1e-10
        clipped = step(schedule, xt, t, eps_hat, z, 0)
        assert (clipped - x0_hat.clamp(-1, 1)).abs().max() < 1e-10


def test_a_mistake_at_the_end_is_magnified():
    """At t = T a mistake of 0.01 in eps_hat moves x0_hat by 1.6 if it is not clipped."""
    moved = predict_clean(LINEAR, ZERO, 1000, 0.01 * ONE, clip=False)
    assert f"{-moved.item():.1f}" == "1.6"
    assert predict_clean(LINEAR, ZERO, 1000, 0.01 * ONE).item() == -1


# --------------------------------------------------------------------- the chain, with real noise

def last(chain) -> torch.Tensor:
    """The finished images of a chain."""
    t, images, _ = list(chain)[-1]
    assert t == 0
    return images


def compare_at_every_t(chain, expected: dict[int, tuple[float, float]], count: int) -> None:
    """Mean and variance of x_t against expected[t], at exactly the t that it names.

    Allowed are 5.8 standard errors, sigma/sqrt(N) and sigma^2 sqrt(2/N), a false alarm with
    probability 6.7e-9 a number. An error of 8.9 standard errors is noticed with 99.9 %.
    """
    seen = set()
    for t, x, _ in chain:
        if t in expected:
            seen.add(t)
            mean, variance = expected[t]
            off = abs(x.double().mean().item() - mean)
            assert off <= 5.8 * math.sqrt(variance / count) + 1e-6, "mean"
            if variance > 0:
                off = abs(x.double().var().item() / variance - 1)
                assert off < 5.8 * math.sqrt(2 / count), "variance"
            else:
                assert (x - mean).abs().max() < 1e-5  # float32 rounding
    assert seen == set(expected)


@pytest.mark.parametrize("variance", VARIANCES)
@pytest.mark.parametrize("mu, lam", [(0.4, 0.3), (0.0, 1.0)])
def test_sampled_moments_equal_the_recursion(mu, lam, variance):
    """Real sample() on data N(mu, lam): the mean M_t and variance V_t of the recursion.

    [DDPM Algorithm 2] 40 images of 28x28 pixels are 31,360 independent values at each of ten t. In
    all six cases 120 numbers have a false alarm with probability 8e-7. It notices a mean wrong by
    5 % of the spread and a variance wrong by 7.1 %; each of these steep steps injects more. For
    N(0, 1) with sigma^2 = beta the variances are 1 at every t and 1 - beta_1 at the end, without
    noise the last one is alpha_bar_T lam^2/v_T^2.
    """
    count = 40 * 28 * 28
    variances = chain_variances(STEEP, lam, variance)
    if lam == 1 and variance == "beta":
        assert max(abs(v - 1) for v in variances[1:]) < 1e-12 and abs(variances[0] - 0.8) < 1e-12
    if variance == "zero":
        end = STEEP.alpha_bar[-1].item()
        law = end * lam**2 / (end * lam + 1 - end) ** 2
        assert abs(variances[0] / law - 1) < 1e-12
    mean = 0.0
    expected = {}
    for t in range(10, 0, -1):
        a, _ = affine(STEEP, t, lam, variance)
        # The fixed point of the mean is the forward process's: deviations from it shrink by a.
        mean = (STEEP.alpha_bar[t - 1].sqrt().item() * mu
                + a * (mean - STEEP.alpha_bar[t].sqrt().item() * mu))
        expected[t - 1] = mean, variances[t - 1]
    chain = sample(Gaussian(STEEP, mu, lam), STEEP, list(range(40)), variance=variance, clip=False)
    compare_at_every_t(chain, expected, count)


@pytest.mark.parametrize("sampler, steps", [("ddpm", 10), ("ddpm", 7), ("ddpm", 3),
                                            ("sde-dpm++", 7), ("sde-dpm++", 3)])
def test_sampled_chain_keeps_the_marginals_of_a_point(sampler, steps):
    """Data always c, sigma^2 = beta_tilde, from q(x_T): N(sqrt(alpha_bar_t) c, 1 - alpha_bar_t).

    [DDPM section 3.2] Real sample(), at every t that it visits, with long steps too; at t = 0 every
    pixel is c. It notices a mean wrong by 5 % of the spread and a variance wrong by 7.1 %; 50
    numbers have a false alarm with probability 3.4e-7. With sigma^2 = beta the variance is wrong.
    """
    c = 0.7
    count = 40 * 28 * 28
    # The seed of this noise must not be one of the chain's, 0..39.
    noise = normal(1000, 40, 1, 28, 28, dtype=torch.float32)
    x_T = STEEP.q_sample(torch.full((40, 1, 28, 28), c), 10, noise)
    alpha_bar = STEEP.alpha_bar.tolist()
    levels = {10: range(10), 7: (9, 7, 6, 4, 3, 1, 0), 3: (7, 3, 0)}[steps]
    expected = {t: (math.sqrt(alpha_bar[t]) * c, 1 - alpha_bar[t]) for t in levels}

    def chain(sampler, variance):
        return sample(Gaussian(STEEP, c, 0.0), STEEP, list(range(40)), sampler, variance,
                      steps=steps, clip=False, start=(10, x_T))

    compare_at_every_t(chain(sampler, "beta_tilde"), expected, count)
    with pytest.raises(AssertionError, match="variance"):
        compare_at_every_t(chain("ddpm", "beta"), expected, count)


class TwoPoints(Gaussian):
    """The exact predictor for pixels that are +a with probability p, else -a; a is `mu` here.

    x0* = a tanh(a sqrt(alpha_bar) x_t/(1 - alpha_bar) + atanh(2p - 1)): the share of +a minus that
    of -a in the posterior is the tanh of half the difference of their logarithms.
    """

    p = 0.25

    def forward(self, xt, t):
        alpha_bar = self.schedule.alpha_bar[t[0]].item()
        x0 = self.mu * torch.tanh(self.mu * math.sqrt(alpha_bar) * xt / (1 - alpha_bar)
                                  + math.atanh(2 * self.p - 1))
        return self.schedule.predict_eps(xt, t, x0)


FINE = NoiseSchedule.from_betas(torch.logspace(-3.5, -0.1, 20, dtype=torch.float64),
                                allow_signal=True)


def exact_share(model: TwoPoints, variance: str) -> float:
    """P(x_0 > 0) of the chain, by pushing the density of x_t through the steps on a grid.

    p(x_{t-1}) = integral p(x_t) N(x_{t-1}; mean(x_t), sigma_t^2) dx_t. Without noise the chain is a
    function of x_T, and the share is the probability that it is positive.
    """
    x = torch.linspace(-5, 5, 1251, dtype=torch.float64)
    spacing = 10 / 1250
    density = (-x**2 / 2).exp() / math.sqrt(2 * math.pi)

    def step(x, t, noise):
        x = x.reshape(-1, 1, 1, 1)
        eps_hat = model(x, torch.tensor([t]))
        return p_step(FINE, x, t, eps_hat, noise, variance=variance, clip=False).flatten()

    end = x  # where a chain without noise has come to
    for t in range(20, 0, -1):
        if variance == "zero":
            end = step(end, t, ZERO)
        elif t > 1:
            mean = step(x, t, ZERO)
            sigma = (step(x[:1], t, ONE) - mean[:1]).item()
            # Row i: where the chain goes from x_i. The narrowest row has 1.5 points in a sigma, and
            # the sum over them equals the integral to 1e-19.
            moved = (-(x - mean[:, None]) ** 2 / (2 * sigma**2)).exp()
            moved /= math.sqrt(2 * math.pi) * sigma
            density = density @ moved * spacing
        else:  # the last step adds no noise
            end = step(x, t, ZERO)
    return density[end > 0].sum().item() * spacing


@pytest.mark.parametrize("variance", VARIANCES)
def test_chain_lands_on_two_points(variance):
    """x_0 is +a or -a for every pixel, and P(+a) is what the steps make of it.

    The data are not Gaussian, so 20 Gaussian steps back keep the quarter of +a only nearly; what
    they keep is known by integration. Among 31,360 pixels the share has a standard error of at most
    0.0029; 5.5 of them have a false alarm with probability 3.8e-8, and a share wrong by 0.025 is
    noticed. Without injected noise all of them end on the more frequent point.
    """
    a = 0.6
    count = 40 * 28 * 28
    model = TwoPoints(FINE, a, 0.0)
    share = exact_share(model, variance)
    x = last(sample(model, FINE, list(range(40)), variance=variance, clip=False))
    assert (x.abs() - a).abs().max() < 1e-5  # float32 rounding
    error = math.sqrt(share * (1 - share) / count)
    assert abs((x > 0).double().mean().item() - share) <= 5.5 * error
    if variance == "zero":
        assert share < 1e-6
    else:
        assert abs(share - TwoPoints.p) < 0.05


class Finite(torch.nn.Module):
    """The exact predictor for data that are one of a few points y_k, each with equal probability.

    x0* = sum_k w_k y_k, with w_k ~ exp(-|x_t - sqrt(alpha_bar_t) y_k|^2/(2 (1 - alpha_bar_t))), a
    softmax.
    """

    def __init__(self, schedule, points):
        super().__init__()
        self.schedule = schedule
        self.points = points  # (K, C, H, W)
        self.weight = torch.nn.Parameter(torch.zeros(()))

    def forward(self, xt, t):
        alpha_bar = self.schedule.alpha_bar[t[0]].item()
        distance = (xt[:, None] - math.sqrt(alpha_bar) * self.points).square().sum((2, 3, 4))
        share = (-distance / (2 * (1 - alpha_bar))).softmax(dim=1)
        x0_hat = torch.einsum("bk,kchw->bchw", share, self.points)
        return self.schedule.predict_eps(xt, t, x0_hat)


@pytest.mark.parametrize("variance", ["beta_tilde", "beta"])
def test_chain_lands_on_the_data(variance):
    """x_0 is one of y_1..y_4, the data, and not always the same one.

    If each is as likely as the others, all of 12 chains end on one with probability 2.4e-7.
    """
    points = normal(3, 4, 1, 4, 4, dtype=torch.float32).clamp(-1, 1)
    x = last(sample(Finite(LINEAR, points), LINEAR, list(range(12)), variance=variance,
                    shape=(1, 4, 4)))
    distance = (x[:, None] - points).abs().amax(dim=(2, 3, 4))  # (12, 4)
    assert (distance.min(dim=1).values < 1e-5).all()  # float32 rounding
    assert len(set(distance.argmin(dim=1).tolist())) > 1


# --------------------------------------------------------------------------- the chain, exactly

def test_draw_digit_is_the_whole_chain_of_one_seed():
    """draw_digit(model, schedule, seed) is the last image of sample(model, schedule, [seed]), bit
    for bit: with the shipped network, in a schedule of ten steps, and with an exact predictor."""
    short = NoiseSchedule(10, "cosine")
    for model in (script.load_checkpoint(script.SHIPPED).model, Gaussian(short, 0.1, 0.3)):
        for seed in (0, 7):
            digit = draw_digit(model, short, seed)
            assert digit.shape == (1, 1, 28, 28) and not digit.requires_grad
            assert torch.equal(digit, last(sample(model, short, [seed])))
        assert not torch.equal(digit, draw_digit(model, short, 8))


@FEW
@given(schedules(max_T=12), SEED)
def test_chain_visits_every_level_once(schedule, seed):
    """(t, x_t, x0_hat) come for t = T, T-1, ..., 0; the network is given T..1, as in the paper."""
    model = Gaussian(schedule, 0.0, 0.3)
    chain = list(sample(model, schedule, [seed, seed + 1], shape=(1, 4, 4)))
    assert [t for t, _, _ in chain] == list(range(schedule.T, -1, -1))
    assert model.calls == list(range(schedule.T, 0, -1))
    for t, xt, x0_hat in chain[:-1]:
        implied = schedule.predict_x0(xt, t, model(xt, torch.tensor([t, t]))).clamp(-1, 1)
        assert torch.equal(x0_hat, implied)
    assert torch.equal(chain[-1][1], chain[-1][2])
    assert len({x.data_ptr() for _, x, _ in chain}) == len(chain)  # tensors are not reused
    first = torch.randn(1, 4, 4, generator=torch.Generator().manual_seed(seed))
    assert torch.equal(chain[0][1][0], first)  # the first draw of a seed is x_T


@FEW
@given(schedules(max_T=12), SEED, st.sampled_from(VARIANCES), st.booleans())
def test_chain_is_its_steps_with_the_noise_of_the_seed(schedule, seed, variance, clip):
    """x_{t-1} = p_step(x_t, t, eps_hat, z), z the seed's next draw of noise, bit for bit."""
    model = Gaussian(schedule, 0.2, 0.3)
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(1, 4, 4, generator=generator)[None]
    for t, xt, _ in sample(model, schedule, [seed], variance=variance, clip=clip, shape=(1, 4, 4)):
        assert torch.equal(xt, x)
        if t > 0:
            z = torch.randn(1, 4, 4, generator=generator)[None]
            x = p_step(schedule, xt, t, model(xt, torch.tensor([t])), z, variance=variance,
                       clip=clip)


@FEW
@given(st.lists(SEED, min_size=1, max_size=5), st.data())
def test_image_depends_on_its_seed_alone(seeds, data):
    """Image k is the same alone, among others, and in any order, bit for bit."""
    model = Gaussian(STEEP, 0.1, 0.3)
    together = last(sample(model, STEEP, seeds, shape=(1, 4, 4)))
    k = data.draw(st.integers(0, len(seeds) - 1))
    assert torch.equal(together[k], last(sample(model, STEEP, [seeds[k]], shape=(1, 4, 4)))[0])
    backwards = last(sample(model, STEEP, seeds[::-1], shape=(1, 4, 4)))
    assert torch.equal(together, backwards.flip(0))


@pytest.mark.parametrize("sampler", SAMPLERS)
def test_chain_does_not_know_of_the_one_before(sampler):
    """The same call gives the same images again, bit for bit: nothing is remembered in between."""
    model = Gaussian(STEEP, 0.1, 0.3)
    first, second = (last(sample(model, STEEP, [1, 2], sampler, steps=5, shape=(1, 4, 4)))
                     for _ in range(2))
    assert torch.equal(first, second)


def test_real_network_draws_the_same_image_in_any_batch(tiny_run):
    """With the real network in float32, batch 1 and batch 5 agree within one grey level."""
    checkpoint = script.load_checkpoint(tiny_run / "model.pt")
    together = last(sample(checkpoint.model, checkpoint.schedule, [3, 1, 4, 15, 9]))
    for k, seed in enumerate([3, 1, 4, 15, 9]):
        alone = last(sample(checkpoint.model, checkpoint.schedule, [seed]))
        grey = (to_uint8(together[k]).int() - to_uint8(alone[0]).int()).abs()
        assert grey.max() <= 1


def test_chain_can_start_in_the_middle():
    """From its own x_T the chain is as if nothing were given; from (t, x_t) it goes t, ..., 0."""
    model = Gaussian(STEEP, 0.0, 0.3)
    plain = list(sample(model, STEEP, [1, 2], shape=(1, 4, 4)))
    again = list(sample(model, STEEP, [1, 2], start=(10, plain[0][1]), shape=(1, 4, 4)))
    assert all(torch.equal(a[1], b[1]) for a, b in zip(plain, again))
    middle = list(sample(model, STEEP, [5, 6], start=(4, plain[6][1]), shape=(1, 4, 4)))
    assert [t for t, _, _ in middle] == [4, 3, 2, 1, 0]
    assert torch.equal(middle[0][1], plain[6][1])
    assert not torch.equal(middle[1][1], plain[7][1])  # other seeds, other noise
    for steps, levels in ((2, [4, 2, 0]), (9, [4, 3, 2, 1, 0])):
        short = sample(model, STEEP, [5, 6], start=(4, plain[6][1]), steps=steps, shape=(1, 4, 4))
        assert [t for t, _, _ in short] == levels


class Dropping(Gaussian):
    """A predictor with dropout, which must rest while sampling."""

    def forward(self, xt, t):
        guess = super().forward(xt, t) + 0 * self.weight  # so that a graph could be kept
        return torch.nn.functional.dropout(guess, 0.5, self.training)


def test_sampling_is_in_eval_mode_without_gradients_and_leaves_the_mode():
    """Dropout rests; no graph is kept; a network in training mode is in it again at each yield."""
    model = Dropping(STEEP, 0.0, 0.3).train()
    images = []
    for _, x, _ in sample(model, STEEP, [1], shape=(1, 4, 4)):
        assert model.training and not x.requires_grad
        images.append(x)
    without_dropout = last(sample(Gaussian(STEEP, 0.0, 0.3), STEEP, [1], shape=(1, 4, 4)))
    assert torch.equal(images[-1], without_dropout)
    assert torch.is_grad_enabled()
    assert not draw_digit(model.eval(), STEEP, 1).requires_grad


# ---------------------------------------------------------------------------- clipping, few steps

class Wild(Gaussian):
    """A useless predictor: fifty times too loud."""

    def forward(self, xt, t):
        return 50 * torch.sin(40 * xt + t.reshape(-1, 1, 1, 1))


@FEW
@given(schedules(max_T=12), SEED, st.sampled_from(VARIANCES))
def test_clipping_bounds_a_wild_network(schedule, seed, variance):
    """|x0_hat| <= 1 whatever the network says, and |x_{t-1}| <= c_0 + c_t |x_t| + sigma_t |z|.

    c_0 and c_t are the weights of x_0 and x_t in the posterior mean. So |x_0| <= 1 at the end.
    """
    generator = torch.Generator().manual_seed(seed)
    torch.randn(1, 4, 4, generator=generator)  # x_T
    bound = torch.full((1, 4, 4), math.inf)  # there is none for x_T
    for t, xt, x0_hat in sample(Wild(schedule, 0, 1), schedule, [seed], variance=variance,
                                shape=(1, 4, 4)):
        assert x0_hat.abs().max() <= 1
        assert (xt[0].abs() <= bound * (1 + 1e-5)).all()
        if t > 0:
            before = schedule.alpha_bar[t - 1].item()
            now = schedule.alpha_bar[t].item()
            beta = schedule.beta[t].item()
            c0 = math.sqrt(before) * beta / (1 - now)
            ct = math.sqrt(1 - beta) * (1 - before) / (1 - now)
            sigma2 = {"zero": 0, "beta": beta, "beta_tilde": beta * (1 - before) / (1 - now)}
            z = torch.randn(1, 4, 4, generator=generator)
            bound = c0 + ct * xt[0].abs()
            if t > 1:
                bound += math.sqrt(sigma2[variance]) * z.abs()


def test_without_clipping_a_wild_network_runs_away():
    """Unclipped, x0_hat = (x_t - sqrt(1 - alpha_bar_t) eps_hat)/sqrt(alpha_bar_t) has no bound."""
    free = list(sample(Wild(STEEP, 0, 1), STEEP, [1, 2], shape=(1, 4, 4), clip=False))
    assert free[-1][1].abs().max() > 10 and free[0][2].abs().max() > 10


@given(schedules_and_t(), SEED, st.sampled_from(VARIANCES))
def test_clipping_changes_nothing_inside_the_range(drawn, seed, variance):
    """Where |x0_hat| <= 1, clipped and unclipped steps agree bit for bit, pixel by pixel."""
    schedule, t = drawn
    xt, eps, z = (normal(seed + k, 2, 1, 8, 8) for k in range(3))
    xt[0] = schedule.q_sample(normal(seed + 3, 1, 8, 8)[None].clamp(-0.9, 0.9), t, eps[:1])[0]
    clipped, free = (p_step(schedule, xt, t, eps, z, variance=variance, clip=clip)
                     for clip in (True, False))
    x0_hat = schedule.predict_x0(xt, t, eps)
    inside = x0_hat.abs() <= 1
    assert inside[0].all()
    assert torch.equal(clipped[inside], free[inside])
    assert (clipped != free)[x0_hat.abs() > 1.001].all()


@given(st.integers(2, 1500), st.data())
def test_fewer_steps_run_from_T_to_0(T, data):
    """T = tau_S > ... > tau_0 = 0, and tau_k is the integer next to k T/S. By default ddpm takes
    all T steps, ddim 50 and sde-dpm++ 20, or T if that is less. With another T than the schedule's,
    the chain begins there.
    """
    steps = data.draw(st.integers(1, T))
    schedule = NoiseSchedule.from_betas([1e-3] * 1500, allow_signal=True)
    for sampler in ("ddpm", "ddim", "sde-dpm++"):
        levels = timesteps(schedule, sampler, steps, T)
        assert levels[0] == T and levels[-1] == 0 and len(levels) == steps + 1
        assert all(a > b for a, b in zip(levels, levels[1:]))
        assert all(abs(level - T * k / steps) <= 0.5 for k, level in enumerate(reversed(levels)))
    assert timesteps(schedule, T=T) == list(range(T, -1, -1))
    assert len(timesteps(schedule, "ddim", T=T)) == min(T, 50) + 1
    assert len(timesteps(schedule, "sde-dpm++", T=T)) == min(T, 20) + 1
    assert timesteps(schedule) == list(range(1500, -1, -1))


@given(schedules(), st.data())
def test_steps_of_equal_length_in_the_signal_to_noise_ratio(schedule, data):
    """dpm++: T and 1 are visited, and of each of the S values u_k, evenly spaced from u_T to u_1,
    u = log(alpha_bar/(1 - alpha_bar))/2, the nearest level; then 0. No others, none twice.
    """
    T = data.draw(st.integers(2, schedule.T))
    steps = data.draw(st.integers(2, T))
    levels = timesteps(schedule, "dpm++", steps, T)
    assert levels[0] == T and levels[-2:] == [1, 0]
    assert all(a > b for a, b in zip(levels, levels[1:])) and len(levels) <= steps + 1
    alpha_bar = schedule.alpha_bar.tolist()
    u = {t: math.log(alpha_bar[t] / (1 - alpha_bar[t])) / 2 for t in range(1, T + 1)}
    wanted = [u[T] + (u[1] - u[T]) * k / (steps - 1) for k in range(steps)]
    for target in wanted:  # some visited level is as near as any
        best = min(abs(value - target) for value in u.values())
        assert min(abs(u[t] - target) for t in levels[:-1]) <= best + 1e-9
    for t in levels[:-1]:  # and each visited level is the nearest to some target
        assert any(abs(u[t] - target) <= min(abs(value - target) for value in u.values()) + 1e-9
                   for target in wanted)
    assert timesteps(schedule, "dpm++", 1, T) == [T, 0]


def test_all_steps_are_the_chain_without_a_number_of_steps():
    """Respacing by the identity changes nothing, bit for bit."""
    model = Gaussian(STEEP, 0.1, 0.3)
    by_default = last(sample(model, STEEP, [1, 2], shape=(1, 4, 4)))
    by_number = last(sample(model, STEEP, [1, 2], steps=10, shape=(1, 4, 4)))
    assert torch.equal(by_default, by_number)


@given(schedules(), SEED, st.data())
def test_long_steps_are_steps_of_the_respaced_schedule(schedule, seed, data):
    """A step from t to s is the single step of the schedule whose alpha_bar are alpha_bar_t's.

    Respacing to levels tau gives beta'_i = 1 - alpha_bar_{tau_i}/alpha_bar_{tau_{i-1}}.
    [IDDPM section 4] The product of the respaced alphas is good to 1e-14, its difference from 1,
    at least 1e-5, to 1e-9.
    """
    levels = timesteps(schedule, steps=data.draw(st.integers(2, schedule.T)))[::-1]
    respaced = NoiseSchedule.from_betas(
        [1 - (schedule.alpha_bar[t] / schedule.alpha_bar[s]).item()
         for s, t in zip(levels, levels[1:])], allow_signal=True)
    i = data.draw(st.integers(1, len(levels) - 1))
    xt, eps_hat, z = (normal(seed + k, 1, 1, 3, 3) for k in range(3))
    for variance in VARIANCES:
        long = p_step(schedule, xt, levels[i], eps_hat, z, levels[i - 1], variance)
        short = p_step(respaced, xt, i, eps_hat, z, variance=variance)
        assert (long - short).abs().max() < 1e-8


# ------------------------------------------------------------------------- few-step samplers

@st.composite
def long_steps(draw):
    """A schedule and a step from t to s, 0 <= s < t <= T."""
    schedule, t = draw(schedules_and_t())
    return schedule, t, draw(st.integers(0, t - 1))


@given(long_steps(), SEED, st.floats(0, 1))
def test_ddim_step_is_the_papers(drawn, seed, eta):
    """x_s = sqrt(alpha_bar_s) x0_hat + sqrt(1 - alpha_bar_s - sigma^2) eps_hat + sigma z.

    [DDIM Eq. 12] sigma = eta sqrt((1 - alpha_bar_s)/(1 - alpha_bar_t))
    sqrt(1 - alpha_bar_t/alpha_bar_s). [DDIM Eq. 16] The x0_hat that eps_hat implies is at most 1e4
    times as large, and good to 1e-12 of that.
    """
    schedule, t, s = drawn
    xt, eps_hat, z = (normal(seed + k, 2, 1, 3, 3) for k in range(3))
    now = schedule.alpha_bar[t].item()
    then = schedule.alpha_bar[s].item()
    x0_hat = (xt - math.sqrt(1 - now) * eps_hat) / math.sqrt(now)
    sigma = eta * math.sqrt((1 - then) / (1 - now)) * math.sqrt(1 - now / then)
    kept = math.sqrt(max(0, 1 - then - sigma**2))
    expected = math.sqrt(then) * x0_hat + kept * eps_hat + sigma * z
    got = ddim_step(schedule, xt, t, eps_hat, z, s, eta, clip=False)
    assert (got - expected).abs().max() < 1e-7


@given(long_steps(), SEED)
def test_ddim_puts_back_the_noise_that_clipping_leaves(drawn, seed):
    """If x0_hat was clipped, x_s = sqrt(alpha_bar_s) x0_hat + sqrt(1 - alpha_bar_s) eps with the
    eps that makes the difference between x_t and the clipped x0_hat, not the network's.
    """
    schedule, t, s = drawn
    xt, eps_hat, z = (normal(seed + k, 2, 1, 3, 3) for k in range(3))
    now = schedule.alpha_bar[t].item()
    then = schedule.alpha_bar[s].item()
    x0_hat = ((xt - math.sqrt(1 - now) * eps_hat) / math.sqrt(now)).clamp(-1, 1)
    eps = (xt - math.sqrt(now) * x0_hat) / math.sqrt(1 - now)
    expected = math.sqrt(then) * x0_hat + math.sqrt(1 - then) * eps
    got = ddim_step(schedule, xt, t, eps_hat, z, s)
    assert (got - expected).abs().max() < 1e-10


@given(long_steps(), SEED, st.booleans())
def test_ddim_with_fresh_noise_is_the_ancestral_step(drawn, seed, clip):
    """eta = 1 is the step of ddpm with beta_tilde, with the same noise, clipped or not.

    [DDIM Eq. 16] So is that of the solver, if x0_hat did not change since the step before.
    """
    schedule, t, s = drawn
    xt, eps_hat, z = (normal(seed + k, 2, 1, 3, 3) for k in range(3))
    x0_hat = predict_clean(schedule, xt, t, eps_hat, clip)
    ddim = ddim_step(schedule, xt, t, eps_hat, z, s, eta=1.0, clip=clip)
    ddpm = p_step(schedule, xt, t, eps_hat, z, s, clip=clip)
    assert (ddim - ddpm).abs().max() < 1e-8 * max(1, x0_hat.abs().max())
    previous = None
    if t < schedule.T:
        previous = t + 1, x0_hat
    dpm = dpm_step(schedule, xt, t, eps_hat, z, s, previous, eta=1.0, clip=clip)
    assert torch.equal(dpm, ddim)


@pytest.mark.parametrize("t", [1, 2, 10])
def test_chain_with_all_fresh_noise_is_that_of_ddpm(t):
    """Real sample(), in as many steps from any t: ddim with eta = 1 is ddpm, [DDIM Eq. 16], and so
    is sde-dpm++ in one step, which has nothing to extrapolate from."""
    model = Gaussian(STEEP, 0.2, 0.3)
    xt = normal(7, 2, 1, 4, 4, dtype=torch.float32)
    for sampler, steps, eta in (("ddim", 1, 1.0), ("ddim", 5, 1.0), ("sde-dpm++", 1, 0.0)):
        common = {"steps": steps, "start": (t, xt), "shape": (1, 4, 4)}
        one = list(sample(model, STEEP, [3, 4], "ddpm", **common))
        other = list(sample(model, STEEP, [3, 4], sampler, eta=eta, **common))
        assert [s for s, _, _ in one] == [s for s, _, _ in other] and one[0][0] == t
        for (_, x, _), (_, y, _) in zip(one, other):
            assert (x - y).abs().max() < 1e-5


class Constant(Gaussian):
    """A predictor that is sure of one image: its noise is what makes the difference to it."""

    def forward(self, xt, t):
        self.calls.append(int(t[0]))
        return self.schedule.predict_eps(xt, t, torch.full_like(xt, self.mu))


@FEW
@given(schedules(), SEED, st.floats(-1, 1), st.sampled_from(["ddim", "dpm++"]), st.data())
def test_certainty_leads_straight_there(schedule, seed, c, sampler, data):
    """Where x0_hat is always c, x_s = sqrt(alpha_bar_s) c + sqrt(1 - alpha_bar_s) eps with one and
    the same eps at every level, for any subsequence of levels; so x_0 = c.

    The network is called with the paper's t, the levels themselves.
    """
    steps = data.draw(st.integers(1, schedule.T))
    x_T = normal(seed, 1, 1, 4, 4)
    model = Constant(schedule, c, 0.0)
    alpha_bar = schedule.alpha_bar.tolist()
    eps = (x_T - math.sqrt(alpha_bar[-1]) * c) / math.sqrt(1 - alpha_bar[-1])
    chain = list(sample(model, schedule, [seed], sampler, steps=steps, clip=False,
                        start=(schedule.T, x_T), shape=(1, 4, 4)))
    levels = [t for t, _, _ in chain]
    assert levels == timesteps(schedule, sampler, steps) and model.calls == levels[:-1]
    for t, xt, _ in chain:
        expected = math.sqrt(alpha_bar[t]) * c + math.sqrt(1 - alpha_bar[t]) * eps
        assert (xt - expected).abs().max() < 1e-8


@FEW
@given(schedules().filter(lambda schedule: schedule.T >= 3), SEED, st.data())
def test_solver_follows_the_paper(schedule, seed, data):
    """x_s = sigma_s/sigma_t x_t - sqrt(alpha_bar_s) (e^-h - 1) D, sigma^2 = 1 - alpha_bar, and
    D = (1 + 1/(2r)) x0_hat - 1/(2r) (x0_hat of the step before), with the lengths h in u and
    r = h_before/h. [DPM-Solver++ Algorithm 2]

    The first step and the last have D = x0_hat, so x_0 = x0_hat at the end. With fresh noise, in
    SDE-DPM-Solver++(2M), x_s = sigma_s/sigma_t e^-h x_t + sqrt(alpha_bar_s) (1 - e^-2h) D
    + sigma_s sqrt(1 - e^-2h) z.

    The x0_hat that the step works out from eps_hat is the one meant here to 1e-11.
    """
    s, t, before = sorted(data.draw(st.lists(st.integers(1, schedule.T), min_size=3, max_size=3,
                                             unique=True)))
    xt, x0_hat, x0_before, z = (normal(seed + k, 2, 1, 3, 3) for k in range(4))
    eps_hat = schedule.predict_eps(xt, t, x0_hat)
    alpha_bar = schedule.alpha_bar.tolist()

    def u(t):
        return math.log(alpha_bar[t] / (1 - alpha_bar[t])) / 2

    def move(D, eta):
        ratio = math.sqrt((1 - alpha_bar[s]) / (1 - alpha_bar[t]))
        h = u(s) - u(t)
        if eta == 0:
            return ratio * xt - math.sqrt(alpha_bar[s]) * math.expm1(-h) * D
        fresh = math.sqrt(-(1 - alpha_bar[s]) * math.expm1(-2 * h))
        return (ratio * math.exp(-h) * xt - math.sqrt(alpha_bar[s]) * math.expm1(-2 * h) * D
                + fresh * z)

    for eta in (0.0, 1.0):
        first = dpm_step(schedule, xt, t, eps_hat, z, s, None, eta, clip=False)
        assert (first - move(x0_hat, eta)).abs().max() < 1e-9

        end = dpm_step(schedule, xt, t, eps_hat, z, 0, (before, x0_before), eta, clip=False)
        assert torch.equal(end, predict_clean(schedule, xt, t, eps_hat, clip=False))
        assert (end - x0_hat).abs().max() < 1e-11

        r = (u(t) - u(before)) / (u(s) - u(t))
        D = (1 + 1 / (2 * r)) * x0_hat - 1 / (2 * r) * x0_before
        got = dpm_step(schedule, xt, t, eps_hat, z, s, (before, x0_before), eta, clip=False)
        assert (got - move(D, eta)).abs().max() < 1e-9 * max(1, D.abs().max())


# Data with the mean and the variances of MNIST along its 784 principal axes, as they are measured
# by tests/experiments/spectrum.py.
MNIST = json.loads((script.SHIPPED.parent / "spectrum.json").read_text())
MU, LAM = (torch.tensor(MNIST[name], dtype=torch.float64).reshape(28, 28)
           for name in ("mean", "variance"))


def real_map(schedule, sampler, steps) -> tuple[torch.Tensor, torch.Tensor]:
    """(a, b) with x_0 = a x_T + b along each axis, read off the real chain in float64."""
    x_T = torch.stack([torch.zeros(1, 28, 28), torch.ones(1, 28, 28)]).double()
    x = last(sample(Gaussian(schedule, MU, LAM), schedule, [0, 1], sampler, steps=steps, clip=False,
                    start=(schedule.T, x_T)))
    return x[1, 0] - x[0, 0], x[0, 0]


def exact_map(schedule, levels, second_order: bool) -> torch.Tensor:
    """a of the same by the affine recursion, for deviations from sqrt(alpha_bar_t) mu.

    A deviation p of x_t means q = sqrt(alpha_bar_t) lam/v_t p for x0_hat. A step makes of it
    r p + (sqrt(alpha_bar_s) - r sqrt(alpha_bar_t)) D with r = sqrt((1 - alpha_bar_s)/
    (1 - alpha_bar_t)) and D = q, or D extrapolated from the last two q to the middle of the step.
    """
    alpha_bar = schedule.alpha_bar.tolist()
    u = [math.inf] + [math.log(a / (1 - a)) / 2 for a in alpha_bar[1:]]
    p = torch.ones_like(LAM)
    previous = None
    for t, s in zip(levels, levels[1:]):
        now = math.sqrt(alpha_bar[t])
        then = math.sqrt(alpha_bar[s])
        q = now * LAM / (alpha_bar[t] * LAM + 1 - alpha_bar[t]) * p
        D = q
        if second_order and previous is not None and s > 0:
            t_before, q_before = previous
            D = q + (u[s] - u[t]) / 2 * (q - q_before) / (u[t] - u[t_before])
        r = math.sqrt((1 - alpha_bar[s]) / (1 - alpha_bar[t]))
        p = r * p + (then - r * now) * D
        previous = t, q
    return p


def distance(a: torch.Tensor, b: torch.Tensor) -> float:
    """How far N(b, a^2) is from the data N(MU, LAM): the Wasserstein distance of both normal
    distributions, as the root of the mean square over the axes."""
    return ((b - MU).square() + (a.abs() - LAM.sqrt()).square()).mean().sqrt().item()


@pytest.mark.parametrize("steps", [1, 2, 7, 10, 20, 50])
@pytest.mark.parametrize("sampler", ["ddim", "dpm++"])
def test_few_steps_follow_the_recursion_on_the_spectrum_of_digits(sampler, steps):
    """Real chains of ddim and dpm++ on Gaussian data with MNIST's spectrum: the affine recursion,
    and b = (1 - a sqrt(alpha_bar_T)) mu for the mean, to 1e-10 of the largest of them."""
    a, b = real_map(LINEAR, sampler, steps)
    expected = exact_map(LINEAR, timesteps(LINEAR, sampler, steps), sampler == "dpm++")
    assert (a - expected).abs().max() < 1e-10 * expected.abs().max()
    mean = (1 - expected * math.sqrt(LINEAR.alpha_bar[-1])) * MU
    assert (b - mean).abs().max() < 1e-10 * MU.abs().max() * max(1, expected.abs().max())


@pytest.mark.parametrize("steps, golden", [(10, 0.0210), (20, 0.0107), (50, 0.0077)])
def test_golden_distances_of_the_solver(steps, golden):
    """Distance of dpm++ to Gaussian data with the spectrum of digits, in units of [-1, 1].

    The numbers were computed elsewhere, from the covariance of the test images; that of the
    training images, used here, makes up to 3 % of difference. DDIM needs more than five times as
    many steps for the same distance. At 50 steps most of the distance is that the chain starts with
    mean 0, not with the 0.6 % of the data's mean that are left at T.
    """
    assert abs(distance(*real_map(LINEAR, "dpm++", steps)) / golden - 1) < 0.03
    assert distance(*real_map(LINEAR, "ddim", 5 * steps)) > golden


def steps_with_noise(levels: list[int], solver: bool) -> torch.Tensor:
    """Var x_0 of a chain of real steps with all fresh noise, started from a standard normal x_T.

    The chain is linear in its S + 1 noises. So image k is given 1 for noise k and 0 for the others,
    and the squares of what comes out are summed. Without `solver`, each step is as the first one.
    """
    model = Gaussian(LINEAR, 0.0, LAM)
    ones = torch.eye(len(levels), dtype=torch.float64)[:, :, None, None, None]
    ones = ones.expand(-1, -1, 1, 28, 28)  # noise j is ones[:, j]
    x = ones[:, 0]
    previous = None
    for j, (t, s) in enumerate(zip(levels, levels[1:]), start=1):
        eps_hat = model(x, torch.full((len(x),), t))
        x0_hat = LINEAR.predict_x0(x, t, eps_hat)
        x = dpm_step(LINEAR, x, t, eps_hat, ones[:, j], s, previous, eta=1.0, clip=False)
        if solver:
            previous = t, x0_hat
    return x.square().sum(dim=0)[0]


@pytest.mark.parametrize("steps", [5, 10, 20, 50])
def test_variance_of_the_solver_with_noise_follows_its_recursion(steps):
    """Steps of sde-dpm++ on Gaussian data with MNIST's spectrum: the variance is that of x' = A x +
    B q + f z, where q is the x0_hat of the step before, to 1e-10.

    With P = Var x, C = Cov(x, q), Q = Var q and x0_hat = g x, a step makes of them
    A^2 P + 2 A B C + B^2 Q + f^2, g (A P + B C) and g^2 P. The distance from the data is at most
    0.75 of that of as many steps of ddpm, where q has no part.
    """
    levels = timesteps(LINEAR, "sde-dpm++", steps)
    alpha_bar = LINEAR.alpha_bar.tolist()
    u = [math.inf] + [math.log(a / (1 - a)) / 2 for a in alpha_bar[1:]]
    P = torch.ones_like(LAM)
    C = torch.zeros_like(LAM)
    Q = torch.zeros_like(LAM)
    for before, t, s in zip([None, *levels], levels, levels[1:]):
        now = alpha_bar[t]
        then = alpha_bar[s]
        g = math.sqrt(now) * LAM / (now * LAM + 1 - now)
        k = 0.0  # by how much the step extrapolates
        if before is not None and s > 0:
            k = (u[s] - u[t]) / (u[t] - u[before]) / 2
        f2 = (1 - then) / (1 - now) * (1 - now / then)  # beta_tilde
        r = math.sqrt(max(0, 1 - then - f2) / (1 - now))
        D = math.sqrt(then) - r * math.sqrt(now)
        A = r + D * g * (1 + k)
        B = -D * k
        P, C, Q = A**2 * P + 2 * A * B * C + B**2 * Q + f2, g * (A * P + B * C), g**2 * P
    with_previous = steps_with_noise(levels, solver=True)
    assert (with_previous - P).abs().max() < 1e-10

    without = steps_with_noise(levels, solver=False)
    ours = distance(with_previous.sqrt(), MU)
    assert ours < 0.75 * distance(without.sqrt(), MU)


def test_order_of_the_samplers():
    """On one grid in u, the error of DDIM falls with the length of the steps, that of the solver
    with its square: by 2 and by 4 for twice as many steps.

    The error is that of a against a chain of infinitely many steps from T to 1, which multiplies
    deviations by sqrt(v_1/v_T), and the last step. A schedule of 20,000 small steps leaves room
    between the integers. The solver's chains are real ones; those of DDIM on this grid, which
    sample() does not offer, are made of its steps.
    """
    fine = NoiseSchedule.from_betas(LINEAR.beta[1:].repeat_interleave(20) / 20)
    first = fine.alpha_bar[1].item()
    end = fine.alpha_bar[-1].item()
    v_1 = first * LAM + 1 - first
    v_T = end * LAM + 1 - end
    limit = (v_1 / v_T).sqrt() * math.sqrt(first) * LAM / v_1
    model = Gaussian(fine, MU, LAM)

    def by_ddim(levels: list[int]) -> torch.Tensor:
        x = torch.stack([torch.zeros(1, 28, 28), torch.ones(1, 28, 28)]).double()
        noise = torch.zeros_like(x)
        for t, s in zip(levels, levels[1:]):
            eps_hat = model(x, torch.full((2,), t))
            x = ddim_step(fine, x, t, eps_hat, noise, s, clip=False)
        return x[1, 0] - x[0, 0]

    def error(a: torch.Tensor) -> float:
        return (a - limit).square().mean().sqrt().item()

    counts = (20, 40, 80, 160)
    first_order = [error(by_ddim(timesteps(fine, "dpm++", steps))) for steps in counts]
    second_order = [error(real_map(fine, "dpm++", steps)[0]) for steps in counts]
    for i in range(3):
        assert 1.85 < first_order[i] / first_order[i + 1] < 2.15
        assert 3.4 < second_order[i] / second_order[i + 1] < 4.6
    for i in range(4):
        assert second_order[i] < first_order[i]


@FEW
@given(schedules(max_T=12), SEED, st.sampled_from(list(SAMPLERS)), st.booleans(), st.data())
def test_few_steps_are_chained_with_the_noise_of_the_seed(schedule, seed, sampler, clip, data):
    """Each sampler's chain is its step, with the seed's draws of noise and the clipped x0_hat,
    bit for bit. The solver is given t and x0_hat of the step before."""
    steps = data.draw(st.integers(1, schedule.T))
    eta = 0.0
    if sampler == "ddim":
        eta = data.draw(st.floats(0, 1))
    model = Gaussian(schedule, 0.2, 0.3)
    chain = list(sample(model, schedule, [seed], sampler, steps=steps, clip=clip, shape=(1, 4, 4),
                        eta=eta))
    levels = timesteps(schedule, sampler, steps)
    assert [t for t, _, _ in chain] == levels

    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(1, 4, 4, generator=generator)[None]
    previous = None
    for (t, xt, x0_hat), s in zip(chain, levels[1:]):
        assert torch.equal(xt, x)
        eps_hat = model(xt, torch.tensor([t]))
        implied = schedule.predict_x0(xt, t, eps_hat)
        if clip:
            implied = implied.clamp(-1, 1)
        assert torch.equal(x0_hat, implied)
        z = torch.randn(1, 4, 4, generator=generator)[None]
        if sampler == "ddpm":
            x = p_step(schedule, xt, t, eps_hat, z, s, clip=clip)
        elif sampler == "ddim":
            x = ddim_step(schedule, xt, t, eps_hat, z, s, eta, clip)
        elif sampler == "dpm++":
            x = dpm_step(schedule, xt, t, eps_hat, z, s, previous, clip=clip)
        else:
            x = dpm_step(schedule, xt, t, eps_hat, z, s, previous, eta=1.0, clip=clip)
        previous = t, x0_hat
    assert torch.equal(chain[-1][1], x)


# --------------------------------------------------------------------------------------- guidance

def pair(schedule) -> tuple[Gaussian, Gaussian]:
    """A model and a worse network: perfect predictors for two kinds of data."""
    return Gaussian(schedule, 0.2, 0.3), Gaussian(schedule, -0.1, 0.8)


@given(schedules_and_t(), SEED)
def test_guidance_of_1_is_the_model_and_of_0_the_worse_network(drawn, seed):
    """Bit for bit. With w = 1 the worse network is never asked, so it costs one evaluation. With
    w = 0 it is asked alone; if there is an interval, both are, and the formula gives the same.
    """
    schedule, t = drawn
    model, worse = pair(schedule)
    xt = normal(seed, 3, 1, 3, 3)
    levels = torch.full((3,), t)
    assert torch.equal(Guided(model, worse, 1.0)(xt, levels), model(xt, levels))
    assert worse.calls == []
    assert torch.equal(Guided(model, worse, 0.0)(xt, levels), worse(xt, levels))
    everywhere = Guided(model, worse, 0.0, (1, schedule.T))
    assert torch.equal(everywhere(xt, levels), worse(xt, levels))


@given(schedules_and_t(), SEED, st.floats(-100, 100))
def test_a_network_that_guides_itself_changes_nothing(drawn, seed, w):
    """eps + w (eps - eps) = eps, bit for bit, for every w."""
    schedule, t = drawn
    model, _ = pair(schedule)
    xt = normal(seed, 3, 1, 3, 3)
    levels = torch.full((3,), t)
    assert torch.equal(Guided(model, model, w)(xt, levels), model(xt, levels))


@given(schedules_and_t(), SEED, st.floats(-10, 10), st.floats(-10, 10), st.floats(-2, 3))
def test_guidance_is_affine_in_w(drawn, seed, a, b, share):
    """The predictions of w = a, w = b and a third w between them or beyond lie on one line. With
    the two laws above, this leaves no other formula than eps_worse + w (eps_model - eps_worse).

    The predictors are of the size of xt, at most 5. With |w| up to 50 the sums are good to 1e-12.
    """
    schedule, t = drawn
    xt = normal(seed, 3, 1, 3, 3)
    levels = torch.full((3,), t)

    def prediction(w: float) -> torch.Tensor:
        return Guided(*pair(schedule), w)(xt, levels)

    line = (1 - share) * prediction(a) + share * prediction(b)
    assert (prediction((1 - share) * a + share * b) - line).abs().max() < 1e-11


@given(st.integers(1, 10), st.integers(1, 10), SEED)
def test_interval_bounds_where_guidance_acts(one, other, seed):
    """At low <= t <= high, both ends included, the prediction is the guided one; at any other t it
    is the model's, and the worse network is not asked. In a batch each image goes by its own t.
    """
    low, high = sorted((one, other))
    model, worse = pair(STEEP)
    limited = Guided(model, worse, 2.5, (low, high))
    xt = normal(seed, 10, 1, 3, 3)
    t = torch.arange(1, 11)
    always = Guided(*pair(STEEP), 2.5)(xt, t)
    alone = model(xt, t)
    assert (always != alone).flatten(1).all(dim=1).all()
    together = limited(xt, t)
    assert len(worse.calls) == 1
    for i in range(10):
        worse.calls.clear()
        acts = low <= i + 1 <= high
        expected = always if acts else alone
        assert torch.equal(together[i], expected[i])
        assert torch.equal(limited(xt[i:i + 1], t[i:i + 1])[0], expected[i])
        assert len(worse.calls) == acts


class Mistaken(Gaussian):
    """A perfect predictor that errs by `size` times the waves sin(3 xt + phase)."""

    def __init__(self, schedule, size: float, phase: float = 0.0):
        super().__init__(schedule, 0.1, 0.3)
        self.size = size
        self.phase = phase

    def forward(self, xt, t):
        return super().forward(xt, t) + self.size * torch.sin(3 * xt + self.phase)


@given(schedules_and_t(), SEED, st.floats(1.25, 10), st.floats(0, 6))
def test_guidance_removes_a_mistake_that_both_share(drawn, seed, k, w):
    """If the model errs by e and the worse network by k e, what is left is (k - w (k-1)) e; with
    w = k/(k-1), nothing: 2 if the worse one errs twice as much. A model and a worse network that
    err by e and f leave w e - (w-1) f, so mistakes that they do not share are enlarged.
    """
    schedule, t = drawn
    xt = normal(seed, 3, 1, 3, 3)
    levels = torch.full((3,), t)
    perfect = Mistaken(schedule, 0.0)(xt, levels)
    model = Mistaken(schedule, 0.2)
    worse = Mistaken(schedule, 0.2 * k)
    e = 0.2 * torch.sin(3 * xt)
    left = Guided(model, worse, w)(xt, levels) - perfect
    assert (left - (k - w * (k - 1)) * e).abs().max() < 1e-12
    assert (Guided(model, worse, k / (k - 1))(xt, levels) - perfect).abs().max() < 1e-12

    f = 0.2 * torch.cos(3 * xt)
    other = Mistaken(schedule, 0.2, phase=math.pi / 2)
    left = Guided(model, other, w)(xt, levels) - perfect
    assert (left - (w * e - (w - 1) * f)).abs().max() < 1e-12


@FEW
@given(SEED, st.floats(0, 4), st.sampled_from(list(SAMPLERS)), st.booleans(),
       st.sampled_from([None, (3, 7), (8, 10), (1, 1)]), st.data())
def test_guided_chain_mixes_the_two_predictions_in_every_step(seed, w, sampler, clip, interval,
                                                               data):
    """sample() with a guided network takes the steps of the sampler with
    eps_hat = w eps_model + (1-w) eps_worse at the t of the interval, and with eps_model at others.
    x0_hat is that of the mixture, clipped afterwards. In float64, from a given x_T.

    STEEP magnifies rounding by less than 1e4 from T to 0.
    """
    steps = data.draw(st.integers(1, 10))
    model, worse = pair(STEEP)
    x = normal(seed + 1, 1, 1, 4, 4)
    chain = list(sample(Guided(model, worse, w, interval), STEEP, [seed], sampler, steps=steps,
                        clip=clip, start=(10, x), shape=(1, 4, 4)))
    levels = timesteps(STEEP, sampler, steps)
    assert [t for t, _, _ in chain] == levels

    generator = torch.Generator().manual_seed(seed)
    torch.randn(1, 4, 4, generator=generator)  # x_T, in place of which x is given
    previous = None
    for (t, xt, x0_hat), s in zip(chain, levels[1:]):
        assert (xt - x).abs().max() < 1e-9 * max(1, x.abs().max())
        eps_hat = model(x, torch.tensor([t]))
        if interval is None or interval[0] <= t <= interval[1]:
            eps_hat = w * eps_hat + (1 - w) * worse(x, torch.tensor([t]))
        implied = (x - (1 - STEEP.alpha_bar[t]).sqrt() * eps_hat) / STEEP.alpha_bar[t].sqrt()
        if clip:
            implied = implied.clamp(-1, 1)
        assert (x0_hat - implied).abs().max() < 1e-9 * max(1, implied.abs().max())
        z = torch.randn(1, 4, 4, generator=generator)[None]
        if sampler == "ddpm":
            x = p_step(STEEP, x, t, eps_hat, z, s, clip=clip)
        elif sampler == "ddim":
            x = ddim_step(STEEP, x, t, eps_hat, z, s, 0.0, clip)
        else:
            eta = 1.0 if sampler == "sde-dpm++" else 0.0
            x = dpm_step(STEEP, x, t, eps_hat, z, s, previous, eta, clip)
        previous = t, implied
    assert (chain[-1][1] - x).abs().max() < 1e-9 * max(1, x.abs().max())


@pytest.mark.parametrize("sampler", SAMPLERS)
def test_guided_chains_of_0_and_1_are_those_of_the_two_networks(sampler):
    """Real sample(), bit for bit: w = 1 and an interval without any t of the chain give the chain
    of the model, w = 0 that of the worse network."""
    model, worse = pair(STEEP)

    def images(network):
        return last(sample(network, STEEP, [1, 2], sampler, steps=5, shape=(1, 4, 4)))

    assert torch.equal(images(Guided(model, worse, 1.0)), images(model))
    assert torch.equal(images(Guided(model, worse, 3.0, (11, 99))), images(model))
    assert worse.calls == []
    assert torch.equal(images(Guided(model, worse, 0.0)), images(worse))
    assert not torch.equal(images(Guided(model, worse, 2.0)), images(model))


@pytest.mark.parametrize("training", [True, False])
def test_guided_sampling_is_in_eval_mode_and_leaves_the_mode(training):
    """Dropout rests in both networks. At each yield, and at the end, the model is again in the mode
    in which it was, also if that is another one than that of a fresh module.
    """
    model = Dropping(STEEP, 0.0, 0.3).train(training)
    worse = Dropping(STEEP, 0.0, 0.8).train(training)
    for _, x, _ in sample(Guided(model, worse, 2.0), STEEP, [1], shape=(1, 4, 4)):
        assert (model.training, worse.training) == (training, training)
    calm = Guided(Gaussian(STEEP, 0.0, 0.3), Gaussian(STEEP, 0.0, 0.8), 2.0)
    assert torch.equal(x, last(sample(calm, STEEP, [1], shape=(1, 4, 4))))


@FEW
@given(st.lists(SEED, min_size=1, max_size=4, unique=True), st.sampled_from([None, (3, 7)]),
       st.data())
def test_guided_and_restarted_image_depends_on_its_seed_alone(seeds, interval, data):
    """Image k is the same alone and among others, bit for bit, with guidance, with restarts and
    with both."""
    def images(seeds: list[int], w: float) -> tuple[torch.Tensor, torch.Tensor]:
        network = Guided(*pair(STEEP), w, interval)
        x = last(sample(network, STEEP, seeds, "sde-dpm++", steps=5, shape=(1, 4, 4)))
        return x, restart(network, STEEP, x, seeds)

    k = data.draw(st.integers(0, len(seeds) - 1))
    for w in (1.0, 2.0):
        for together, alone in zip(images(seeds, w), images([seeds[k]], w)):
            assert torch.equal(together[k], alone[0])


# ------------------------------------------- what guidance draws: Gaussian data, three variances

KINDS_OF_STEPS = ["ddim", "beta", "beta_tilde"]


def real_guided_variance(schedule, lam: float, w: float, kind: str) -> list[float]:
    """Var x_t of a chain of real steps, for t = T-1 down to 0, from Var x_T = 1: data N(0, 1),
    guided with w by the perfect network of N(0, lam)."""
    network = Guided(Gaussian(schedule, 0.0, 1.0), Gaussian(schedule, 0.0, lam), w)
    variances = []
    V = 1.0
    for t in range(schedule.T, 0, -1):
        eps_hat = network(ONE, torch.tensor([t]))
        if kind == "ddim":
            a = ddim_step(schedule, ONE, t, eps_hat, ZERO, clip=False).item()
            b = 0.0
        else:
            a = p_step(schedule, ONE, t, eps_hat, ZERO, variance=kind, clip=False).item()
            b = p_step(schedule, ZERO, t, ZERO, ONE, variance=kind, clip=False).item()
        V = a**2 * V + b**2
        variances.append(V)
    return variances


def guided_variance(betas: list[float], lam: float, w: float, kind: str) -> list[float]:
    """The same by the recursion: eps_hat = sqrt(1 - alpha_bar_t) (w + (1-w)/v_t) x_t with
    v_t = alpha_bar_t lam + 1 - alpha_bar_t, put into [DDPM Eq. 11] and [DDIM Eq. 12]."""
    now = math.prod(1 - beta for beta in betas)  # alpha_bar_t
    variances = []
    V = 1.0
    for t in range(len(betas), 0, -1):
        beta = betas[t - 1]
        then = now / (1 - beta) if t > 1 else 1.0
        slope = w + (1 - w) / (now * lam + 1 - now)
        if kind == "ddim":
            x0 = (1 - (1 - now) * slope) / math.sqrt(now)
            V *= (math.sqrt(then) * x0 + math.sqrt((1 - then) * (1 - now)) * slope) ** 2
        else:
            fresh = beta * (1 - then) / (1 - now) if kind == "beta_tilde" else beta
            V = (1 - beta * slope) ** 2 / (1 - beta) * V + (fresh if t > 1 else 0)
        variances.append(V)
        now = then
    return variances


@FEW
@given(schedules(), st.floats(0.25, 4), st.floats(-1, 4), st.sampled_from(KINDS_OF_STEPS))
def test_variance_under_guidance_follows_its_recursion(schedule, lam, w, kind):
    """Real steps with a guided network on Gaussian data: the variance of the chain at every t, to
    1e-8 of the largest so far. With w = 1 or lam = 1 it is that of the perfect network alone.
    """
    real = real_guided_variance(schedule, lam, w, kind)
    exact = guided_variance(schedule.beta[1:].tolist(), lam, w, kind)
    largest = 1.0
    for a, b in zip(real, exact, strict=True):
        largest = max(largest, b)
        assert abs(a - b) < 1e-8 * largest
    unguided = guided_variance(schedule.beta[1:].tolist(), 1.0, 1.0, kind)
    for trivial in (real_guided_variance(schedule, lam, 1.0, kind),
                    real_guided_variance(schedule, 1.0, w, kind)):
        assert max(abs(a - b) for a, b in zip(trivial, unguided)) < 1e-9


@pytest.mark.parametrize("kind, golden, limit", [
    ("ddim", 0.497677, 0.5), ("beta", 0.583639, 0.58333), ("beta_tilde", 0.576549, 0.58333)])
def test_golden_variances_under_guidance(kind, golden, limit):
    """Data N(0, 1) guided by the perfect network of N(0, 2) with w = 2, T = 1000, linear: Var x_0
    of the real steps, to all six digits. The golden numbers were computed elsewhere.

    They are near the variances of infinitely many steps, and none is near 0.66667, that of the
    density p^w / p_worse^(w-1). So what is drawn is not that density, and depends on the sampler.
    """
    lam = w = 2
    V = real_guided_variance(LINEAR, lam, w, kind)[-1]
    assert abs(V - golden) < 6e-7
    assert abs(V - limit) < 0.007
    assert abs(V - lam / (w * lam - w + 1)) > 0.08


@pytest.mark.parametrize("lam, w", [(2, 2), (0.5, 2), (3, 1.5), (2, 0.25)])
@pytest.mark.parametrize("kind", KINDS_OF_STEPS)
def test_variance_under_guidance_has_a_limit(kind, lam, w):
    """In ever shorter steps DDIM ends at lam^(1-w) and p_step, with either variance, at
    (lam^(2w-1) - 1)/((lam - 1)(2w - 1) lam^(2w-2)): the error is halved if each step of the linear
    schedule is cut in two, and again and again, and is below 0.0013 with 16,000 steps. For lam = 2
    and w = 2 the limits are 0.5 and 0.58333.

    DDIM does not forget where it begins: at T, where v_T = alpha_bar_T lam + 1 - alpha_bar_T is not
    quite 1. So its limit is (lam/v_T)^(1-w), which differs by less than 2e-4.
    """
    alpha_bar_T = math.exp(-LINEAR.beta.sum())
    v_T = alpha_bar_T * lam + 1 - alpha_bar_T
    limit = (lam / v_T) ** (1 - w)
    assert abs(limit - lam ** (1 - w)) < 2e-4
    if kind != "ddim":
        limit = (lam ** (2 * w - 1) - 1) / ((lam - 1) * (2 * w - 1) * lam ** (2 * w - 2))
    if (lam, w) == (2, 2):
        assert abs(limit - (0.5 if kind == "ddim" else 0.58333)) < 3e-5
    errors = []
    for parts in (2, 4, 8, 16):
        betas = (LINEAR.beta[1:].repeat_interleave(parts) / parts).tolist()
        errors.append(abs(guided_variance(betas, lam, w, kind)[-1] - limit))
    assert errors[-1] < 0.0013
    for longer, shorter in zip(errors, errors[1:]):
        assert 1.9 < longer / shorter < 2.1


@given(schedules_and_t(), st.floats(0.25, 4), st.floats(0, 4))
def test_guided_prediction_is_perfect_for_a_density_that_no_noise_leads_to(drawn, lam, w):
    """At each t, eps_hat is perfect for noisy images of the density p_t^w / p_worse,t^(w-1), which
    for Gaussian data has the variance u_t = 1/(w - (w-1)/v_t), v_t = alpha_bar_t lam + 1 -
    alpha_bar_t, if that is positive: eps_hat = -sqrt(1 - alpha_bar_t) times the gradient of its
    logarithm. But u_t is not what noise makes of u_0, which is alpha_bar_t u_0 + 1 - alpha_bar_t.

    u_t minus that is alpha_bar_t (1 - alpha_bar_t) w (1-w) (lam-1)^2 / ((w v_t - w + 1)
    (w lam - w + 1)), so it is the smaller one if w > 1, and the larger one if 0 < w < 1.
    """
    schedule, t = drawn
    now = schedule.alpha_bar[t].item()
    v = now * lam + 1 - now
    assume(min(w * v - w + 1, w * lam - w + 1) > 0.01)  # else there is no such density
    network = Guided(Gaussian(schedule, 0.0, 1.0), Gaussian(schedule, 0.0, lam), w)
    slope = network(ONE, torch.tensor([t])).item() / math.sqrt(1 - now)
    u = v / (w * v - w + 1)
    u_0 = lam / (w * lam - w + 1)
    assert abs(slope - 1 / u) < 1e-10 * max(1, 1 / u)
    difference = (now * (1 - now) * w * (1 - w) * (lam - 1) ** 2
                  / ((w * v - w + 1) * (w * lam - w + 1)))
    assert abs(u - (now * u_0 + 1 - now) - difference) < 1e-9 * max(1, u, u_0)


# ----------------------------------------------------------------------------------------- labels

def little(classes: int = 10) -> UNet:
    """A small UNet in float64 whose weights are all random, so that every label matters."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = UNet(channels=(8, 8), blocks=(1, 1), embedding=8, time_hidden=8, time_width=4,
                     heads=2, groups=4, size=8, classes=classes).double().eval()
        for p in model.parameters():
            torch.nn.init.normal_(p, std=0.3)
    return model


LITTLE = little()
LABELS = st.lists(st.integers(-1, 9), min_size=1, max_size=4)


def noisy(seed: int, count: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Noisy images of 8x8 pixels, and their t."""
    t = torch.randint(1, 1001, (count,), generator=torch.Generator().manual_seed(seed))
    return normal(seed, count, 1, 8, 8), t


def told_of(seed: int, labels: list[int], w: float, interval=None) -> torch.Tensor:
    """What LITTLE answers for these images if it is guided by itself without labels."""
    told = Labelled(LITTLE, torch.tensor(labels))
    with torch.no_grad():
        return Guided(told, LITTLE, w, interval)(*noisy(seed, len(labels)))


@FEW
@given(SEED, LABELS, st.floats(-3, 6))
def test_guidance_by_labels_is_the_formula_of_the_paper(seed, labels, w):
    """(1 + v) eps(x_t, t, c) - v eps(x_t, t), with v = w - 1, for each image and its own label.
    [CFG Eq. 6] So the two answers, which are computed in one batch, are those of two calls for each
    image alone, up to rounding.
    """
    got = told_of(seed, labels, w)
    xt, t = noisy(seed, len(labels))
    for i, label in enumerate(labels):
        one = slice(i, i + 1)
        with torch.no_grad():
            told = LITTLE(xt[one], t[one], torch.tensor([label]))
            untold = LITTLE(xt[one], t[one])
        v = w - 1
        assert (got[one] - ((1 + v) * told - v * untold)).abs().max() < 1e-9
        assert torch.equal(told, untold) == (label == -1)


@FEW
@given(SEED, LABELS, LABELS)
def test_answer_without_labels_does_not_depend_on_them(seed, labels, others):
    """w = 0 tells nothing: for any two sets of labels the answer is the same, bit for bit, whether
    the network is asked once (no interval) or twice (an interval). That of w = 1 is the answer with
    labels, bit for bit.
    """
    count = min(len(labels), len(others))
    labels, others = labels[:count], others[:count]
    xt, t = noisy(seed, count)
    with torch.no_grad():
        assert torch.equal(told_of(seed, labels, 0.0), LITTLE(xt, t))
        assert torch.equal(told_of(seed, labels, 1.0), LITTLE(xt, t, torch.tensor(labels)))
    twice = [told_of(seed, each, 0.0, (1, 1000)) for each in (labels, others)]
    assert torch.equal(*twice)


@pytest.mark.parametrize("sampler", SAMPLERS)
def test_guided_chains_of_0_and_1_are_those_without_and_with_labels(sampler):
    """Real sample(), bit for bit: w = 1 and an interval without any t of the chain give the chain
    of the network that is told the labels, w = 0 that of the network that is told nothing.
    """
    network = little().float()
    labels = torch.tensor([3, 8])

    def images(model):
        return last(sample(model, STEEP, [1, 2], sampler, steps=5, shape=(1, 8, 8)))

    told = images(Labelled(network, labels))
    untold = images(network)
    assert not torch.equal(told, untold)
    assert torch.equal(images(Guided(Labelled(network, labels), network, 1.0)), told)
    assert torch.equal(images(Guided(Labelled(network, labels), network, 3.0, (11, 99))), told)
    assert torch.equal(images(Guided(Labelled(network, labels), network, 0.0)), untold)
    assert torch.equal(images(Labelled(network, torch.tensor([-1, -1]))), untold)


@FEW
@given(SEED, st.floats(-3, 6), st.floats(-3, 6), st.floats(-2, 3))
def test_guidance_by_labels_is_affine_in_w(seed, a, b, share):
    """The predictions of any three w lie on one line, also those of 0 and 1, where one network is
    spared.
    """
    labels = [3, -1, 8]
    line = (1 - share) * told_of(seed, labels, a) + share * told_of(seed, labels, b)
    assert (told_of(seed, labels, (1 - share) * a + share * b) - line).abs().max() < 1e-8
    ends = (1 - a) * told_of(seed, labels, 0.0) + a * told_of(seed, labels, 1.0)
    assert (told_of(seed, labels, a) - ends).abs().max() < 1e-9


@pytest.mark.parametrize("w", [1.0, 2.5])
def test_image_depends_on_its_seed_and_its_label_alone(w):
    """In float32, drawn alone and in a batch with other labels, an image is the same to within one
    grey level, guided and restarted too. With another label it is another image.
    """
    network = little().float()

    def images(seeds: list[int], labels: list[int]) -> torch.Tensor:
        told = Guided(Labelled(network, torch.tensor(labels)), network, w)
        x = last(sample(told, STEEP, seeds, "sde-dpm++", steps=5, shape=(1, 8, 8)))
        return to_uint8(restart(told, STEEP, x, seeds, shares=(0.4,), steps=2)).int()

    together = images([3, 1, 4, 1], [7, 2, 0, 9])
    for k, (seed, label) in enumerate(((3, 7), (1, 2), (4, 0), (1, 9))):
        assert (together[k] - images([seed], [label])[0]).abs().max() <= 1
    assert (together[1] - together[3]).abs().max() > 20  # one seed, two labels


@pytest.mark.parametrize("training", [True, False])
def test_labelled_network_keeps_its_mode(training):
    """At each yield the network is in the mode in which it was before; so it is at the end."""
    network = little().float().train(training)
    for told in (Labelled(network, torch.tensor([3])),
                 Guided(Labelled(network, torch.tensor([3])), network, 2.0)):
        for _ in sample(told, STEEP, [1], steps=2, shape=(1, 8, 8)):
            assert told.training == network.training == training


# --------------------------------------------------------- labels: three clouds, known exactly

# Of three classes, the shares of all data, and in each of two pixels mean and variance.
SHARES = torch.tensor([0.5, 0.3, 0.2], dtype=torch.float64)
MEANS = torch.tensor([[-0.7, 0.4], [0.5, 0.6], [0.2, -0.8]], dtype=torch.float64)
SPREADS = torch.tensor([[0.09, 0.04], [0.16, 0.02], [0.03, 0.12]], dtype=torch.float64)


class Clouds(torch.nn.Module):
    """The exact predictor for data of three classes, each a Gaussian. Called as a UNet with classes
    is. An image (1, H, P) has H points of P = 1 or 2 pixels, which are independent.

    Told the class, eps is that of its Gaussian, as above. Told nothing, it is the mean of these,
    weighted by the classes' share in the density of x_t.
    """

    def __init__(self, schedule):
        super().__init__()
        self.schedule = schedule
        self.weight = torch.nn.Parameter(torch.zeros(()))

    def forward(self, xt, t, label=None):
        alpha_bar = self.schedule.alpha_bar[t].reshape(-1, 1, 1, 1).to(xt.dtype)
        pixels = xt.shape[-1]
        x = xt[:, 0, :, None, :]  # (B, H, 1, P)
        v = alpha_bar * SPREADS[:, :pixels].to(xt.dtype) + 1 - alpha_bar  # (B, 1, 3, P)
        off = x - alpha_bar.sqrt() * MEANS[:, :pixels].to(xt.dtype)
        eps = (1 - alpha_bar).sqrt() * off / v  # (B, H, 3, P)
        log_density = SHARES.to(xt.dtype).log() - (off**2 / v + v.log()).sum(-1) / 2
        answer = (log_density.softmax(-1)[..., None] * eps).sum(-2)  # (B, H, P)
        if label is not None:
            own = eps[torch.arange(len(xt)), :, label.clamp(min=0)]
            answer = torch.where(label[:, None, None] < 0, answer, own)
        return answer[:, None]


def integrals(alpha_bar: float, x: float) -> tuple[list[float], list[float]]:
    """For each class the density of x_t = x, in one pixel, times the share of the class; and the
    mean of eps, given that x_t = x. Both by their definition, as sums over a grid of eps:

        x_0 = (x - sqrt(1 - alpha_bar) eps) / sqrt(alpha_bar),    q(x_t) dx_t = p(x_0) dx_0
    """
    eps = torch.linspace(-12, 12, 16_001, dtype=torch.float64)
    x0 = (x - math.sqrt(1 - alpha_bar) * eps) / math.sqrt(alpha_bar)
    normal_density = (-eps**2 / 2).exp() / math.sqrt(2 * math.pi)
    densities, means = [], []
    for share, mean, spread in zip(SHARES.tolist(), MEANS[:, 0].tolist(), SPREADS[:, 0].tolist()):
        p = (-(x0 - mean)**2 / (2 * spread)).exp() / math.sqrt(2 * math.pi * spread)
        weight = normal_density * p / math.sqrt(alpha_bar)
        densities.append(share * weight.sum().item() * 24 / 16_000)
        means.append(((weight * eps).sum() / weight.sum()).item())
    return densities, means


@FEW
@given(st.integers(1, 10), st.floats(-2.5, 2.5))
def test_answer_of_a_class_and_that_without_differ_by_the_gradient_of_a_classifier(t, x):
    """By integration, for three classes in one pixel:

    eps = -sqrt(1 - alpha_bar) d/dx log p_t(x), with and without a label (section 7),
    eps(x) = sum_c p(c | x) eps(x, c) (section 8), and
    eps(x) - eps(x, c) = sqrt(1 - alpha_bar) d/dx log p(c | x) (section 8).

    The network that answers so, Labelled and Guided, goes along this gradient, w times as far. The
    derivatives are differences over 2e-4, which are good to 1e-5 here.
    """
    alpha_bar = STEEP.alpha_bar[t].item()
    root = math.sqrt(1 - alpha_bar)
    h = 1e-4
    density, eps = integrals(alpha_bar, x)
    below, above = (integrals(alpha_bar, x + step)[0] for step in (-h, h))
    share = [each / sum(density) for each in density]
    untold = sum(p * e for p, e in zip(share, eps))
    assert abs(untold + root * math.log(sum(above) / sum(below)) / (2 * h)) < 1e-5

    network = Clouds(STEEP)
    xt = torch.full((3, 1, 1, 1), x, dtype=torch.float64)
    levels = torch.full((3,), t)
    answers = network(xt, levels).flatten()
    told = Labelled(network, torch.arange(3))
    for c in range(3):
        assert abs(eps[c] + root * math.log(above[c] / below[c]) / (2 * h)) < 1e-5
        certainty = math.log(above[c] / sum(above)) - math.log(below[c] / sum(below))
        push = root * certainty / (2 * h)
        assert abs(untold - eps[c] - push) < 1e-5
        assert abs(answers[c].item() - untold) < 1e-9
        assert abs(told(xt, levels).flatten()[c].item() - eps[c]) < 1e-9
        pushed = Guided(told, network, 3.0)(xt, levels).flatten()[c].item()
        assert abs(pushed - (untold - 3 * push)) < 1e-4


@pytest.mark.parametrize("w, interval", [(1.0, None), (0.0, None), (0.0, (1, 1000))])
def test_chain_draws_the_class_that_is_asked_for_or_all(w, interval):
    """With w = 1 each image has the mean and variance of the class of its label, with w = 0 those
    of all classes together, whatever its label; so too with an interval of all t, where both
    answers are computed.

    From 8,000 points a number, 5.8 standard errors are 5.8 sigma/sqrt(N) of the mean and, as no
    cloud has a greater fourth moment than a Gaussian, 5.8 sqrt(2/N) of the variance. The 60 steps
    of dpm++ are allowed 0.01 and 2 % on top. The classes differ by more than ten times as much.
    """
    network = Clouds(LINEAR)
    told = Guided(Labelled(network, torch.arange(3)), network, w, interval)
    x = last(sample(told, LINEAR, [1, 2, 3], "dpm++", steps=60, clip=False, shape=(1, 8000, 2)))
    all_means = (SHARES[:, None] * MEANS).sum(0)
    all_spreads = (SHARES[:, None] * (SPREADS + MEANS**2)).sum(0) - all_means**2
    for c in range(3):
        points = x[c, 0].double()
        mean, variance = (MEANS[c], SPREADS[c]) if w == 1 else (all_means, all_spreads)
        assert ((points.mean(0) - mean).abs() < 5.8 * (variance / 8000).sqrt() + 0.01).all()
        assert ((points.var(0) / variance - 1).abs() < 5.8 * math.sqrt(2 / 8000) + 0.02).all()


# --------------------------------------------------------------------------------------- restarts

@FEW
@given(SEED, st.sampled_from([(0.4,), (0.4, 0.4, 0.3, 0.3), (1.0, 0.05)]), st.booleans(),
       st.integers(1, 6))
def test_restart_is_made_of_noise_and_of_the_steps_of_the_sampler(seed, shares, clip, steps):
    """Restart k goes to t = shares[k-1] T with the first noise of the seeds + k million, and back
    by `steps` steps of sde-dpm++, or t if that is less, with their later noise. Bit for bit.

    So no noise of a seed is used twice, neither that of x_T nor that of another restart.
    """
    model = Gaussian(STEEP, 0.2, 0.3)
    seeds = [seed, seed + 7]
    images = normal(1, 2, 1, 4, 4, dtype=torch.float32).clamp(-1, 1)
    got = restart(model, STEEP, images, seeds, shares, steps, clip)

    for k, share in enumerate(shares, start=1):
        generators = [torch.Generator().manual_seed(s + 1_000_000 * k) for s in seeds]

        def noise():
            return torch.stack([torch.randn(1, 4, 4, generator=g) for g in generators])

        t = {0.4: 4, 0.3: 3, 1.0: 10, 0.05: 1}[share]
        x = STEEP.q_sample(images, t, noise())
        levels = timesteps(STEEP, "sde-dpm++", min(steps, t), t)
        previous = None
        for t, s in zip(levels, levels[1:]):
            eps_hat = model(x, torch.tensor([t, t]))
            x0_hat = predict_clean(STEEP, x, t, eps_hat, clip)
            x = dpm_step(STEEP, x, t, eps_hat, noise(), s, previous, 1.0, clip)
            previous = t, x0_hat
        images = x
    assert torch.equal(got, images)


def test_restarts_of_the_book():
    """Six, three from 0.4 T and three from 0.3 T, in ten steps each; from t = 1 at least, in t
    steps at most. Without shares the images come back as they are.
    """
    assert RESTARTS == (0.4, 0.4, 0.4, 0.3, 0.3, 0.3)
    images = torch.zeros(1, 1, 4, 4)
    model = Gaussian(LINEAR, 0.0, 0.3)
    restart(model, LINEAR, images, [0])
    high = [400, 360, 320, 280, 240, 200, 160, 120, 80, 40]
    low = [300, 270, 240, 210, 180, 150, 120, 90, 60, 30]
    assert model.calls == 3 * high + 3 * low

    model = Gaussian(STEEP, 0.0, 0.3)
    restart(model, STEEP, images, [0], shares=(1e-9, 0.4))
    assert model.calls == [1, 4, 3, 2, 1]
    assert torch.equal(restart(model, STEEP, images, [0], shares=()), images)


@given(st.floats(-1, 1), SEED, st.booleans())
def test_certainty_leads_back_from_every_restart(c, seed, clip):
    """If x0_hat is always c, every restart ends at c, whatever image it is given. (float32)"""
    images = normal(seed, 2, 1, 4, 4, dtype=torch.float32).clamp(-1, 1)
    for shares in ((0.4,), RESTARTS):
        x = restart(Constant(STEEP, c, 0.0), STEEP, images, [1, 2], shares, clip=clip)
        assert (x - c).abs().max() < 1e-5


def test_restarts_go_on_from_the_image_that_they_are_given():
    """From t = 0.2 T and 0.1 T each of four points comes back to itself, since the others are too
    far away. From T nothing is left of it: where a chain ends depends on its seed alone."""
    points = normal(3, 4, 1, 4, 4, dtype=torch.float32).clamp(-1, 1)
    model = Finite(LINEAR, points)
    again = restart(model, LINEAR, points, [0, 1, 2, 3], shares=(0.2, 0.1))
    assert (again - points).abs().max() < 1e-5
    one, other = (restart(model, LINEAR, image.expand(8, 1, 4, 4), list(range(8)), shares=(1.0,))
                  for image in points[:2])
    assert (one - other).abs().max() < 1e-5
    assert (one - one[0]).abs().max() > 0.1  # not always the same point


# ------------------------------------------------------------------------- refusals, command line

def first_of(*arguments, seeds=(0,), **options):
    """The first triple of a chain of ten steps with a useless predictor."""
    return next(sample(Wild(STEEP, 0, 1), STEEP, list(seeds), *arguments, **options))


@pytest.mark.parametrize("call, message", [
    (lambda: p_step(LINEAR, ONE, 5, ONE, ONE, variance="large"),
     "unknown variance 'large'; known are beta_tilde, beta, zero"),
    (lambda: p_step(LINEAR, ONE, 0, ONE, ONE), "t must lie in 1..1000, not 0..0"),
    (lambda: ddim_step(LINEAR, ONE, 0, ONE, ONE), "t must lie in 1..1000, not 0..0"),
    (lambda: ddim_step(LINEAR, ONE, 5, ONE, ONE, 5), "t_prev must be below t"),
    (lambda: dpm_step(LINEAR, ONE, 5, ONE, ONE, 6), "t_prev must be below t"),
    (lambda: first_of("euler"), "unknown sampler 'euler'; known are ddpm, ddim, dpm++, sde-dpm++"),
    (lambda: first_of(variance="large"),
     "unknown variance 'large'; known are beta_tilde, beta, zero"),
    (lambda: first_of("ddim", eta=1.5), "eta must be between 0 and 1, not 1.5"),
    (lambda: first_of("ddim", eta=-0.1), "eta must be between 0 and 1, not -0.1"),
    (lambda: first_of("ddim", eta=math.nan), "eta must be between 0 and 1, not nan"),
    (lambda: first_of(eta=0.5), "ddpm has no eta; only ddim has"),
    (lambda: first_of("sde-dpm++", eta=0.5), "sde-dpm++ has no eta; only ddim has"),
    (lambda: first_of("dpm++", "zero"), "dpm++ has no choice of variance; only ddpm has"),
    (lambda: first_of("ddim", "beta"), "ddim has no choice of variance; only ddpm has"),
    (lambda: first_of(seeds=[]), "no seeds, so nothing to sample"),
    (lambda: first_of(steps=11), "steps must be between 1 and 10, not 11"),
    (lambda: first_of("dpm++", steps=0), "steps must be between 1 and 10, not 0"),
    (lambda: first_of(start=(11, ONE)), "start needs a t in 1..10, not 11"),
    (lambda: first_of(start=(0, ONE)), "start needs a t in 1..10, not 0"),
    (lambda: first_of(seeds=[0, 1], start=(5, ONE)),
     "start needs one image for each seed, not 1 for 2"),
    (lambda: Guided(*pair(STEEP), math.nan), "guidance must be a finite number, not nan"),
    (lambda: Guided(*pair(STEEP), math.inf), "guidance must be a finite number, not inf"),
    (lambda: Guided(*pair(STEEP), 2.0, (5, 4)), "the interval 5-4 contains no t"),
    (lambda: restart(Wild(STEEP, 0, 1), STEEP, ONE, [0], shares=(1.1, 0.4)),
     "t must lie in 0..10, not 11..11"),
])
def test_impossible_arguments_are_errors(call, message):
    """Each message blames one thing. Unknown names list the known ones; numbers out of range say
    the range."""
    with pytest.raises(ValueError) as error:
        call()
    assert str(error.value) == message


def test_seeds_are_numbers_and_ranges():
    """'0-3,7' is 0, 1, 2, 3, 7; up to 10,000 of them; anything else is refused."""
    assert parse_seeds("0-3,7") == [0, 1, 2, 3, 7]
    assert parse_seeds("5") == [5]
    assert parse_seeds("7,0-9998") == [7, *range(9999)]
    for text in ("", "a", "1-", "-3", "3-1", "5,3-1", "1.5", "1,,2", str(2**63), "0x1"):
        with pytest.raises(argparse.ArgumentTypeError, match="is not a seed or a range"):
            parse_seeds(text)
    for text in ("0-10000", "7,0-9999"):
        with pytest.raises(argparse.ArgumentTypeError, match="more than 10,000 seeds"):
            parse_seeds(text)


@pytest.mark.parametrize("count, scale, columns", [
    (2, 4, 8), (8, 1, 8), (13, 2, 8), (16, 1, 8), (13, 1, 10), (3, 1, 10)])
def test_grid_is_that_of_torchvision(count, scale, columns):
    """So many to a row, eight if nothing is said, lines of one pixel of grey 64 between and around,
    each pixel enlarged.
    """
    images = normal(0, count, 1, 6, 5)
    expected = make_grid(to_uint8(images), nrow=columns, padding=1, pad_value=64)[0]
    expected = expected.repeat_interleave(scale, 0).repeat_interleave(scale, 1)
    picture = script.draw_grid(images, scale, columns=columns)
    assert torch.equal(pil_to_tensor(picture)[0], expected)
    if columns == 8:
        assert picture == script.draw_grid(images, scale)


def draw(model_file: Path, *options: str, folder: Path | None = None) -> torch.Tensor:
    """Run sample.py on a model file. Returns the picture, (height, width) bytes.

    folder  where it is written, by --out; if None, beside the model file
    """
    out = model_file.parent / "samples.png"
    arguments = ["--checkpoint", str(model_file), "--device", "cpu", *options]
    if folder is not None:
        out = folder / "digits.png"
        arguments += ["--out", str(out)]
    script.main(arguments)
    with Image.open(out) as picture:
        return pil_to_tensor(picture)[0]


def first_digit(picture: torch.Tensor) -> torch.Tensor:
    """The first image of a grid, (28, 28) bytes, of which each pixel is four by four."""
    return picture[4:4 + 112:4, 4:4 + 112:4]


def test_command_writes_a_picture(tiny_run, tmp_path, capsys):
    """python sample.py writes a grid, eight images to a row, and says where. The first image is
    that of the first seed, and the file says how it was made."""
    picture = draw(tiny_run / "model.pt", "--seeds", "0-9", folder=tmp_path / "new")
    out = tmp_path / "new" / "digits.png"
    assert capsys.readouterr().out.splitlines()[-1] == f"wrote {out}"
    assert picture.shape == (4 * (2 * 29 + 1), 4 * (8 * 29 + 1))
    checkpoint = script.load_checkpoint(tiny_run / "model.pt")
    digit = last(sample(checkpoint.model, checkpoint.schedule, [0]))
    assert (first_digit(picture).int() - to_uint8(digit)[0, 0].int()).abs().max() <= 1
    with Image.open(out) as file:
        description = file.text["Description"]
    assert description.startswith("model.pt, MNIST, seeds [0, 1, ")
    assert description.endswith(", ddpm, 20 steps")


@pytest.mark.parametrize("size, scale", [(8, 14), (16, 6), (28, 4), (32, 4)])
def test_command_draws_images_of_the_size_that_was_learned(size, scale, tmp_path):
    """A model of 8x8 pictures gives 8x8 pictures, in tiles of 9 pixels, beside its file. A pixel of
    28x28 is drawn 4 wide, in an animation 2; those of smaller pictures are wider, so that the grid
    is about as large.
    """
    config = train.Config(epochs=1, batch_size=8, T=20, schedule="cosine", out=str(tmp_path),
                          device="cpu")
    train.train(config, images=(pictures(8, size=size), pictures(8, size=size)),
                network=functools.partial(UNet, channels=(8, 8, 8)))
    gif = tmp_path / "a.gif"
    picture = draw(tmp_path / "model.pt", "--seeds", "0-8", "--gif", str(gif))
    tile = size + 1
    assert picture.shape == (scale * (2 * tile + 1), scale * (8 * tile + 1))
    with Image.open(gif) as animation:
        assert animation.size == (scale // 2 * (8 * tile + 1), scale // 2 * (2 * tile + 1))


def test_command_writes_an_animation(tiny_run, tmp_path, capsys):
    """--gif: a frame for each of about 50 levels from T to 0, the last the finished images."""
    gif = tmp_path / "new" / "chain.gif"
    draw(tiny_run / "model.pt", "--seeds", "5,9", "--gif", str(gif), folder=tmp_path)
    assert capsys.readouterr().out.splitlines()[-1].endswith(f" {gif}")
    checkpoint = script.load_checkpoint(tiny_run / "model.pt")
    chain = list(sample(checkpoint.model, checkpoint.schedule, [5, 9]))
    with Image.open(gif) as animation:
        assert animation.n_frames == len(chain) == 21
        assert animation.info["loop"] == 0
        for frame, (t, images, _) in enumerate(chain):
            animation.seek(frame)
            assert animation.info["duration"] == (3000 if t == 0 else 80)
            picture = pil_to_tensor(animation.convert("L"))[0]
            assert torch.equal(picture[2:58:2, 2:58:2], to_uint8(images)[0, 0])


def test_options_reach_the_sampler(tiny_run, tmp_path):
    """--seeds, --sampler, --eta, --variance, --steps and --no-clip: the picture is what sample()
    gives for them, and not what it gives if one of them is another."""
    checkpoint = script.load_checkpoint(tiny_run / "model.pt")

    def off(picture, **options) -> int:
        """By how many grey levels a pixel of the picture differs from sample() at most."""
        digit = last(sample(checkpoint.model, checkpoint.schedule, [5, 9], **options))
        return (first_digit(picture).int() - to_uint8(digit)[0, 0].int()).abs().max().item()

    common = [tiny_run / "model.pt", "--seeds", "5,9"]
    picture = draw(*common, "--variance", "zero", "--steps", "5", "--no-clip", folder=tmp_path)
    wanted = {"variance": "zero", "steps": 5, "clip": False}
    assert off(picture, **wanted) <= 1
    for name, other in (("variance", "beta"), ("steps", 6), ("clip", True)):
        assert off(picture, **{**wanted, name: other}) > 1

    for sampler, eta in (("ddim", 0.5), ("dpm++", 0.0), ("sde-dpm++", 0.0)):
        picture = draw(*common, "--sampler", sampler, "--eta", str(eta), "--steps", "6",
                       folder=tmp_path)
        assert off(picture, sampler=sampler, eta=eta, steps=6) <= 1
        assert off(picture, sampler="ddpm", steps=6) > 1


def draw_guided(model_file: Path, guide: Path, guidance: float, interval=None,
                **options) -> torch.Tensor:
    """The images of seeds 5 and 9, as bytes, that sample() gives for a model guided by another."""
    checkpoint = script.load_checkpoint(model_file)
    network = Guided(checkpoint.model, script.load_checkpoint(guide).model, guidance, interval)
    return to_uint8(last(sample(network, checkpoint.schedule, [5, 9], **options)))


def far(picture: torch.Tensor, images: torch.Tensor) -> int:
    """By how many grey levels the first digit of a picture differs at most from the first image."""
    return (first_digit(picture).int() - images[0, 0].int()).abs().max().item()


def test_command_guides_the_shipped_model_by_its_epoch_2(tmp_path, capsys):
    """--guidance: what is drawn is what sample() gives for the model guided by epoch-2.pt, whose
    place early.pt would have in a run of your own. The file says how it was drawn."""
    shipped = script.load_checkpoint(script.SHIPPED)
    guide = script.SHIPPED.with_name("epoch-2.pt")
    assert find_guide(script.SHIPPED, shipped) == guide
    assert len(script.load_checkpoint(guide).history["step_loss"]) == round(train.EARLY * 7020)

    picture = draw(script.SHIPPED, "--seeds", "5,9", "--sampler", "sde-dpm++", "--steps", "3",
                   "--guidance", "2.5", folder=tmp_path)
    guided_by = functools.partial(draw_guided, script.SHIPPED, sampler="sde-dpm++", steps=3)
    assert far(picture, guided_by(guide, 2.5)) <= 1
    assert far(picture, guided_by(guide, 1.0)) > 1
    assert far(picture, guided_by(guide.with_name("epoch-3.pt"), 2.5)) > 1
    with Image.open(tmp_path / "digits.png") as file:
        assert "sde-dpm++, 3 steps, guidance 2.5" in file.text["Description"]


def test_guide_is_early_pt_beside_the_model_before_any_epoch(tiny_run, tmp_path):
    """early.pt beside the model; without it, the file of the epoch that is nearest to two
    fifteenths of all; without that, an error that says what to do. Another folder has other
    guides."""
    model = tmp_path / "any name.pt"
    checkpoint = script.load_checkpoint(tiny_run / "model.pt")
    for epochs, name in ((15, "epoch-2.pt"), (1, "epoch-1.pt"), (30, "epoch-4.pt")):
        checkpoint.config.epochs = epochs
        with pytest.raises(OSError, match=f"no early.pt and no {name} beside {model} .*--guide"):
            find_guide(model, checkpoint)
        (tmp_path / name).touch()
        assert find_guide(model, checkpoint) == tmp_path / name
    (tmp_path / "early.pt").touch()
    assert find_guide(model, checkpoint) == tmp_path / "early.pt"
    assert find_guide(tiny_run / "model.pt", checkpoint) == tiny_run / "early.pt"


def test_options_of_guidance_reach_the_sampler(tiny_run, tmp_path):
    """--guidance, --guide and --interval: the picture is what sample() gives for the model guided
    in this way, and not what it gives if one of them is another. Without --guide it is early.pt.
    """
    model_file = tiny_run / "model.pt"
    state = torch.load(tiny_run / "early.pt", weights_only=True)
    other = tmp_path / "other.pt"
    weights = {name: weight * 1.1 for name, weight in state["average"].items()}
    torch.save(state | {"average": weights}, other)
    common = [model_file, "--seeds", "5,9", "--steps", "10"]

    def expected(guide: Path = other, guidance: float = 20.0, interval=(6, 13)) -> torch.Tensor:
        return draw_guided(model_file, guide, guidance, interval, steps=10)

    options = ["--guidance", "20", "--guide", str(other), "--interval", "6-13"]
    picture = draw(*common, *options, folder=tmp_path)
    assert far(picture, expected()) <= 1
    for change in ({"guide": tiny_run / "early.pt"}, {"guidance": 10.0}, {"interval": None},
                   {"interval": (7, 13)}, {"interval": (6, 11)}):
        assert far(picture, expected(**change)) > 1, change
    picture = draw(*common, "--guidance", "20", folder=tmp_path)
    assert far(picture, expected(tiny_run / "early.pt", interval=None)) <= 1
    picture = draw(*common, "--guidance", "0", "--guide", str(other), folder=tmp_path)
    worse = script.load_checkpoint(other)
    assert far(picture, to_uint8(last(sample(worse.model, worse.schedule, [5], steps=10)))) <= 1


@pytest.mark.parametrize("options", [[], ["--no-clip"], ["--guidance", "20"]])
def test_command_restarts_the_digits(options, tiny_run, tmp_path):
    """--restarts: the picture is what restart() makes of the digits of the chain, with the same
    network and clipping. An animation shows it last, after the digits of the chain."""
    checkpoint = script.load_checkpoint(tiny_run / "model.pt")
    network = checkpoint.model
    if "--guidance" in options:
        network = Guided(network, script.load_checkpoint(tiny_run / "early.pt").model, 20.0)
    clip = "--no-clip" not in options
    x = last(sample(network, checkpoint.schedule, [5, 9], steps=10, clip=clip))
    again = restart(network, checkpoint.schedule, x, [5, 9], clip=clip)

    gif = tmp_path / "chain.gif"
    picture = draw(tiny_run / "model.pt", "--seeds", "5,9", "--steps", "10", "--restarts", "--gif",
                   str(gif), *options, folder=tmp_path)
    assert far(picture, to_uint8(again)) <= 1 < far(picture, to_uint8(x))
    with Image.open(tmp_path / "digits.png") as file:
        assert file.text["Description"].endswith(", 6 restarts")
    with Image.open(gif) as animation:
        assert animation.n_frames == 12
        for frame, images in ((10, x), (11, again)):
            animation.seek(frame)
            assert animation.info["duration"] == (3000 if frame == 11 else 80)
            shown = pil_to_tensor(animation.convert("L"))[0, 2:58:2, 2:58:2]
            assert (shown.int() - to_uint8(images)[0, 0].int()).abs().max() <= 1


def test_guide_must_be_an_earlier_state_of_the_same_network(tiny_run, tmp_path, capsys):
    """guided() refuses another network, another schedule, another data set and a state that is not
    earlier; it names both files and says which of these it is. It takes an earlier state, in half
    precision, too, and says so.
    """
    path = tiny_run / "model.pt"
    checkpoint = script.load_checkpoint(path)
    state = torch.load(path, weights_only=True)
    other = tmp_path / "other.pt"
    with torch.random.fork_rng(devices=[]):
        network = UNet(**state["network"] | {"groups": 4})
    torch.save(state | {"network": network.config, "average": network.state_dict()}, other)
    with pytest.raises(ValueError, match=f"{other} has another network than {path}; a guide must"):
        guided(checkpoint, path, 2.0, str(other))
    for betas in (state["betas"] * 0.99, state["betas"][1:]):
        torch.save(state | {"betas": betas}, other)
        with pytest.raises(ValueError, match=f"{other} has another schedule than {path}; a guide"):
            guided(checkpoint, path, 2.0, str(other))

    torch.save(state | {"config": state["config"] | {"dataset": "fashion"}}, other)
    with pytest.raises(ValueError, match=f"{other} has learned other images than {path}; a guide"):
        guided(checkpoint, path, 2.0, str(other))
    with pytest.raises(ValueError, match=f"{path} was not trained for fewer steps than {path}; a"):
        guided(checkpoint, path, 2.0, str(path))

    halves = {name: weight.half() for name, weight in state["average"].items()}
    history = state["history"] | {"step_loss": state["history"]["step_loss"][:1]}
    torch.save(state | {"average": halves, "history": history}, other)
    capsys.readouterr()
    network = guided(checkpoint, path, 2.0, str(other), (3, 5))
    assert network.model is checkpoint.model
    assert (network.guidance, network.interval) == (2.0, (3, 5))
    for name, weight in network.worse.state_dict().items():
        assert torch.equal(weight, halves[name].float())
    assert capsys.readouterr().out == f"guided by {other}, w = 2\n"


def test_interval_without_a_level_of_the_chain_is_refused(tmp_path):
    """Guidance that would act nowhere is an error, before anything is drawn."""
    argv = ["--checkpoint", str(script.SHIPPED), "--sampler", "sde-dpm++", "--steps", "5",
            "--guidance", "2", "--interval", "250-390", "--out", str(tmp_path / "digits.png")]
    with pytest.raises(SystemExit) as exit_:
        script.main(argv)
    assert "no noise level of this chain, 1000 to 200, lies in --interval" in exit_.value.code
    assert not list(tmp_path.iterdir())


def test_intervals_are_two_levels():
    """'150-700' is (150, 700); both may be the same; anything else is refused."""
    assert parse_interval("150-700") == (150, 700)
    assert parse_interval("1-1") == (1, 1)
    for text in ("", "5", "5-", "-5", "7-5", "1-2-3", "1.5-2", "a-b", "5--7", " 1-2", "1-2\n",
                 "\u0661-\u0662", "1-1234567890"):
        with pytest.raises(argparse.ArgumentTypeError, match="is not an interval of t such as"):
            parse_interval(text)


def test_own_finished_run_comes_before_the_shipped_model(tiny_run, tmp_path, monkeypatch, capsys):
    """No run of your own, or one with epochs left: the shipped model. A finished run: that run.
    With finished=False, also one with epochs left. Which it is, is printed."""
    monkeypatch.setattr(script, "HERE", tmp_path)
    path, checkpoint = script.open_checkpoint(None)
    assert path == script.SHIPPED
    assert sum(p.numel() for p in checkpoint.model.parameters()) == 324_705
    loss = checkpoint.history["held_out"][-1]
    assert capsys.readouterr().out == f"{path}: MNIST, 15 epochs, held-out loss {loss:.4f}\n"

    own = tmp_path / "runs" / "mnist" / "model.pt"
    own.parent.mkdir(parents=True)
    state = torch.load(tiny_run / "model.pt", weights_only=True)
    torch.save({**state, "config": {**state["config"], "epochs": 2}}, own)
    assert script.open_checkpoint(None)[0] == script.SHIPPED
    assert "is not finished yet" in capsys.readouterr().err
    assert script.open_checkpoint(None, finished=False)[0] == own
    assert script.open_checkpoint(str(own))[0] == own

    torch.save(state, own)
    assert script.open_checkpoint(None)[0] == own
    assert str(own) in capsys.readouterr().out.splitlines()[-1]

    # Stopped within its first epoch, a run has no held-out loss yet.
    torch.save({**state, "history": {"loss": [], "held_out": [], "step_loss": [1.0]}}, own)
    capsys.readouterr()
    script.open_checkpoint(str(own))
    assert capsys.readouterr().out == f"{own}: MNIST, 0 epochs\n"


def test_pictures_of_the_shipped_model_are_not_put_among_shipped_files(tmp_path, monkeypatch):
    """They go to runs/pretrained/. Those of another model go beside its file, all others where
    --out says. What cannot be written is named before anything is sampled."""
    monkeypatch.setattr(script, "HERE", tmp_path)
    folder = tmp_path / "runs" / "pretrained"
    assert script.files_to_write(None, None, script.SHIPPED) == [folder / "samples.png"]
    assert folder.is_dir()
    assert script.files_to_write(None, None, script.SHIPPED_LABELS) == [folder / "samples.png"]
    own = tmp_path / "model.pt"
    assert script.files_to_write(None, "a.gif", own) == [tmp_path / "samples.png", Path("a.gif")]
    assert script.files_to_write("b.png", None, own) == [Path("b.png")]
    with pytest.raises(OSError, match="is a folder; name another file by --out"):
        script.files_to_write(str(folder), None, own)


@contextmanager
def ctrl_c_in_the_fifth_call() -> Iterator[list[UNet]]:
    """Send SIGINT in the fifth call of a network; gives the networks that were called."""
    calls = []

    def press_ctrl_c(module, arguments, output) -> None:
        """What torch calls after each layer: in the fifth call of the network, send the signal."""
        if isinstance(module, UNet):
            calls.append(module)
            if len(calls) == 5:
                signal.raise_signal(signal.SIGINT)

    usual = signal.signal(signal.SIGINT, signal.default_int_handler)
    hook = register_module_forward_hook(press_ctrl_c)
    try:
        yield calls
    finally:
        hook.remove()
        signal.signal(signal.SIGINT, usual)


def test_interrupt_leaves_no_picture(tiny_run, tmp_path, capsys):
    """Ctrl-C in the middle of sampling exits with 130, says so, and writes nothing."""
    with ctrl_c_in_the_fifth_call() as calls, pytest.raises(SystemExit) as exit_:
        draw(tiny_run / "model.pt", "--gif", str(tmp_path / "a.gif"), folder=tmp_path)
    assert exit_.value.code == 130
    assert "stopped; pictures that were there are kept" in capsys.readouterr().err
    assert len(calls) == 5
    assert list(tmp_path.iterdir()) == []


# ------------------------------------------------------------------- labels on the command line

def write_labelled(folder: Path, classes=tuple("0123456789")) -> Path:
    """A model file of the little network, T = 20, that knows these classes; early.pt beside it has
    other weights and fewer steps.
    """
    folder.mkdir(parents=True, exist_ok=True)
    model = little(len(classes)).float()
    config = train.Config(T=20, schedule="cosine", epochs=1, labels=True, out="nowhere")
    options = {name: value for name, value in vars(config).items()
               if name not in ("data", "out", "device")}
    for name, size, steps in (("model.pt", 1.0, 2), ("early.pt", 0.5, 1)):
        train.save(folder / name, {
            "config": options, "network": model.config, "classes": list(classes),
            "betas": NoiseSchedule(20, "cosine").beta[1:],
            "average": {key: size * weight for key, weight in model.state_dict().items()},
            "history": {"loss": [1.0], "held_out": [0.5], "seconds": [1.0],
                        "step_loss": [1.0] * steps}})
    return folder / "model.pt"


def cells(picture: torch.Tensor, columns: int) -> torch.Tensor:
    """All images of a grid of 8x8 images, (rows * columns, 8, 8) bytes."""
    small = picture[7::14, 7::14].int()  # the middle of each enlarged pixel
    tiles = small[1:, 1:].unfold(0, 9, 9).unfold(1, 9, 9)[:, :, :8, :8]
    assert tiles.shape[1] == columns
    return tiles.flatten(0, 1)


def expected(model_file: Path, seeds: list[int], labels: list[int], w: float = 1.0,
             interval=None, worse: torch.nn.Module | None = None) -> torch.Tensor:
    """The bytes that sample() gives, each image drawn alone."""
    checkpoint = script.load_checkpoint(model_file)
    model = checkpoint.model
    images = []
    for seed, label in zip(seeds, labels):
        network = Labelled(model, torch.tensor([label]))
        if w != 1:
            other = model if worse is None else Labelled(worse, torch.tensor([label]))
            network = Guided(network, other, w, interval)
        images.append(last(sample(network, checkpoint.schedule, [seed], shape=(1, 8, 8))))
    return to_uint8(torch.cat(images))[:, 0].int()


def test_command_draws_digits_to_order(tmp_path):
    """--digits 0-9: seed k draws the digit k mod 10, in ten columns; so the digits of a column are
    of one kind. The file says which were asked for.
    """
    model_file = write_labelled(tmp_path)
    picture = draw(model_file, "--digits", "0-9", "--seeds", "0-11")
    got = cells(picture, columns=10)[:12]
    wanted = expected(model_file, list(range(12)), [*range(10), 0, 1])
    assert (got - wanted).abs().max() <= 1
    others = expected(model_file, [0, 11], [1, 0])
    assert (got[[0, 11]] - others).abs().amax(dim=(1, 2)).min() > 20
    with Image.open(tmp_path / "samples.png") as file:
        assert "classes 0,1,2,3,4,5,6,7,8,9, ddpm, 20 steps" in file.text["Description"]


def test_command_draws_classes_by_name(tmp_path):
    """--classes takes names, in upper or lower case, in turn for the seeds; eight to a row."""
    model_file = write_labelled(tmp_path, ("Ankle boot", "bag", "T-shirt/top"))
    picture = draw(model_file, "--classes", "t-SHIRT/top,BAG", "--seeds", "5-7")
    got = cells(picture, columns=3)
    assert (got - expected(model_file, [5, 6, 7], [2, 1, 2])).abs().max() <= 1


def test_command_guides_digits(tmp_path):
    """--guidance with --digits: away from the network without labels; with --guide, away from an
    earlier state, which is told the digit, too. At the t of --interval alone, if it is given.
    """
    model_file = write_labelled(tmp_path)
    early = tmp_path / "early.pt"
    worse = script.load_checkpoint(early).model
    for options, choice in (([], {}), (["--interval", "3-14"], {"interval": (3, 14)}),
                            (["--guide", str(early)], {"worse": worse})):
        picture = draw(model_file, "--digits", "7,2", "--seeds", "4-5", "--guidance", "2", *options)
        got = cells(picture, columns=2)
        wanted = expected(model_file, [4, 5], [7, 2], 2.0, **choice)
        assert (got - wanted).abs().max() <= 1
        assert (got - expected(model_file, [4, 5], [7, 2])).abs().max() > 20


def test_guide_of_digits_is_printed(tmp_path, capsys):
    """It is the network itself without labels, or the file that is named, with the same labels."""
    model_file = write_labelled(tmp_path)
    checkpoint = script.load_checkpoint(model_file)
    labels = torch.tensor([7, 2])
    itself = guided(checkpoint, model_file, 2.0, labels=labels)
    assert itself.worse is itself.model.network is checkpoint.model
    assert capsys.readouterr().out == "guided by itself without labels, w = 2\n"
    early = str(tmp_path / "early.pt")
    other = guided(checkpoint, model_file, 2.0, early, labels=labels)
    assert other.worse.network is not checkpoint.model
    assert torch.equal(other.worse.labels, labels) and torch.equal(other.model.labels, labels)
    assert capsys.readouterr().out == f"guided by {early}, w = 2\n"


def test_digits_are_digits_and_ranges():
    """'0-3,7' asks for 0, 1, 2, 3 and 7; anything else is refused."""
    assert parse_digits("0-3,7") == ["0", "1", "2", "3", "7"]
    assert parse_digits("5") == ["5"] and parse_digits("4-4,4") == ["4", "4"]
    assert parse_digits("0-9") == list("0123456789")
    for text in ("", "a", "10", "-", "1-", "-3", "3-1", "5,3-1", "1.5", "1,,2", "0-10", " 1", "1\n",
                 "\u0661"):
        with pytest.raises(argparse.ArgumentTypeError, match="is not a digit or a range such as"):
            parse_digits(text)


def test_labels_are_dealt_to_the_seeds_in_turn():
    """Label k is that of name k, the first name again after the last; names may differ in case."""
    known = SimpleNamespace(classes=["cat", "Dog", "ape"])
    labels = labels_for([9, 8, 7, 6, 5], ["DOG", "cat"], known, Path("model.pt"))
    assert labels.tolist() == [1, 0, 1, 0, 1] and labels.dtype == torch.int64
    assert labels_for([1], ["ape", "cat"], known, Path("model.pt")).tolist() == [2]


@pytest.mark.parametrize("classes, name, message", [
    ([], "7", "model.pt was trained without labels and cannot be asked for a class; "
              "python train.py --labels makes a model that can"),
    (["cat", "dog"], "7", "model.pt knows no class '7'; give --classes some of cat,dog"),
    (["cat", "dog"], "", "model.pt knows no class ''; give --classes some of cat,dog")])
def test_classes_that_a_model_does_not_know_are_refused(classes, name, message):
    """The message says what the model knows, or that it knows none."""
    with pytest.raises(ValueError) as error:
        labels_for([0], [name], SimpleNamespace(classes=classes), Path("model.pt"))
    assert str(error.value) == message


def test_command_refuses_what_a_model_cannot_draw(tiny_run, tmp_path, capsys):
    """A model without labels, a class that it does not know: one line, and no picture. Digits that
    are none, and both options together, are refused before any model is read.
    """
    told = write_labelled(tmp_path / "told", ("cat", "dog"))
    out = tmp_path / "digits.png"
    for file, options, message in (
            (tiny_run / "model.pt", ["--digits", "7"], "was trained without labels"),
            (told, ["--digits", "0-9"], "knows no class '0'; give --classes some of cat,dog"),
            (told, ["--classes", "cat,cow"], "knows no class 'cow'")):
        with pytest.raises(SystemExit) as exit_:
            script.main(["--checkpoint", str(file), "--out", str(out), *options])
        assert exit_.value.code.startswith(f"sample.py: {file} ") and message in exit_.value.code
        assert "\n" not in exit_.value.code
    capsys.readouterr()
    for options, message in ((["--digits", "0-10"], "'0-10' is not a digit or a range such as 0-9"),
                             (["--digits", "1", "--classes", "1"], "not allowed with argument")):
        with pytest.raises(SystemExit) as exit_:
            script.main(options)
        assert exit_.value.code == 2 and message in capsys.readouterr().err
    assert not out.exists()


def test_digits_to_order_come_from_a_model_with_labels(tmp_path, monkeypatch, capsys):
    """With labels, the default is your own finished run in runs/mnist-labels, else the shipped
    model with labels; a run in runs/mnist is passed over. Without either, one line says so.
    """
    monkeypatch.setattr(script, "HERE", tmp_path)
    monkeypatch.setattr(script, "SHIPPED_LABELS", tmp_path / "pretrained" / "labels" / "model.pt")
    write_labelled(tmp_path / "runs" / "mnist")
    with pytest.raises(OSError, match="no model file .*labels"):
        script.open_checkpoint(None, labels=True)

    shipped = write_labelled(tmp_path / "pretrained" / "labels")
    assert script.open_checkpoint(None, labels=True)[0] == shipped
    own = write_labelled(tmp_path / "runs" / "mnist-labels")
    assert script.open_checkpoint(None, labels=True)[0] == own
    assert script.open_checkpoint(None)[0] == tmp_path / "runs" / "mnist" / "model.pt"

    state = torch.load(own, weights_only=True)
    torch.save({**state, "config": {**state["config"], "epochs": 2}}, own)
    capsys.readouterr()
    assert script.open_checkpoint(None, labels=True)[0] == shipped
    assert "is not finished yet" in capsys.readouterr().err
    assert script.open_checkpoint(None, finished=False, labels=True)[0] == own


# ------------------------------------------------------------------------------ digits as files

def files_of(folder: Path) -> dict[str, torch.Tensor]:
    """The pictures in a folder by their names, (28, 28) bytes each."""
    pictures = {}
    for file in sorted(folder.iterdir()):
        with Image.open(file) as picture:
            assert picture.mode == "L"
            pictures[file.name] = pil_to_tensor(picture)[0]
    return pictures


def cell(grid: torch.Tensor, k: int, columns: int = 8) -> torch.Tensor:
    """Image k of a grid, (28, 28) bytes."""
    top = 4 + 116 * (k // columns)
    left = 4 + 116 * (k % columns)
    return grid[top:top + 112:4, left:left + 112:4]


@pytest.fixture(scope="module")
def labelled_model(tiny_run, tmp_path_factory) -> Path:
    """The model of tiny_run with labels: three classes with awkward names, which it tells apart."""
    state = torch.load(tiny_run / "model.pt", weights_only=True)
    state["network"] = {**state["network"], "classes": 3}
    state["classes"] = ["T-shirt/top", "T-shirt top", "7"]
    table = 20 * normal(1, 3, 20, dtype=torch.float32)
    gain = normal(2, 2, 20, dtype=torch.float32)
    state["average"] = {**state["average"], "table": table, "gain.weight": gain}
    path = tmp_path_factory.mktemp("labelled") / "model.pt"
    torch.save(state, path)
    return path


@pytest.mark.parametrize("options", [
    ("--sampler", "sde-dpm++", "--steps", "5"),
    ("--steps", "4", "--restarts"),
    ("--sampler", "ddim", "--steps", "4", "--guidance", "3"),
], ids=lambda options: options[-1])
def test_digits_in_files_are_those_of_the_grid(options, tiny_run, tmp_path):
    """--out FOLDER/ writes a grey PNG of 28x28 pixels for each seed, named by the seed. In whatever
    batches they are drawn, image k is image k of the grid, within one grey level."""
    model = tiny_run / "model.pt"
    grid = draw(model, "--seeds", "40-49,123456", *options, folder=tmp_path)
    script.main(["--checkpoint", str(model), "--device", "cpu", "--seeds", "40-49,123456",
                 *options, "--out", f"{tmp_path}/new/digits/", "--batch-size", "4"])
    digits = files_of(tmp_path / "new" / "digits")
    assert list(digits) == [*(f"000{seed}.png" for seed in range(40, 50)), "123456.png"]
    for k, digit in enumerate(digits.values()):
        assert digit.shape == (28, 28)
        assert (digit.int() - cell(grid, k).int()).abs().max() <= 1
        assert (digit.int() - cell(grid, (k + 1) % 11).int()).abs().max() > 50


@pytest.mark.parametrize("options", [(), ("--guidance", "2")], ids=["plain", "guided"])
def test_digits_to_order_in_files_have_their_class_in_the_name(options, labelled_model, tmp_path):
    """Seed 3 in class 7 is 00003-7.png. Other signs than letters, digits and _.-~ are written as
    %2F and the like, so that each class has a file of its own. Each batch is told its own labels:
    the images are those of the grid."""
    names = "7,T-shirt/top,t-shirt top"
    common = ["--sampler", "sde-dpm++", "--steps", "5", "--seeds", "0-6", "--classes", names]
    grid = draw(labelled_model, *common, *options, folder=tmp_path)
    script.main(["--checkpoint", str(labelled_model), "--device", "cpu", *common, *options,
                 "--out", f"{tmp_path}/digits/", "--batch-size", "2"])
    digits = files_of(tmp_path / "digits")
    kinds = ["7", "T-shirt%2Ftop", "T-shirt%20top"]
    assert list(digits) == [f"0000{k}-{kinds[k % 3]}.png" for k in range(7)]
    for k, digit in enumerate(digits.values()):  # three classes have two columns each
        assert (digit.int() - cell(grid, k, columns=6).int()).abs().max() <= 1
    other = draw(labelled_model, *common[:-1], "7", *options, folder=tmp_path)
    difference = cell(grid, 1, columns=6).int() - cell(other, 1).int()
    assert difference.abs().max() > 1  # labels do matter
    with Image.open(tmp_path / "digits" / "00001-T-shirt%2Ftop.png") as picture:
        assert picture.info["Description"].startswith("seed 1, class T-shirt/top, model.pt, MNIST")


def into_folder(model: Path, folder: Path, *options: str) -> None:
    script.main(["--checkpoint", str(model), "--device", "cpu", "--sampler", "ddim", "--steps", "3",
                 "--out", f"{folder}/", *options])


def test_digits_that_are_there_are_not_drawn_again(tiny_run, tmp_path, capsys):
    """The same command again draws what is missing, was cut short or is damaged, and no more.
    Other pictures and seeds in the folder are left alone."""
    model = tiny_run / "model.pt"
    into_folder(model, tmp_path, "--seeds", "0-5")
    complete = files_of(tmp_path)
    cut = (tmp_path / "00001.png").read_bytes()[:-40]
    (tmp_path / "00001.png").write_bytes(cut)
    (tmp_path / "00002.png").write_bytes(b"")
    (tmp_path / "00003.png").unlink()
    Image.new("L", (5, 5)).save(tmp_path / "notes.png")
    times = [(tmp_path / f"0000{k}.png").stat().st_mtime_ns for k in (0, 4, 5)]
    capsys.readouterr()

    into_folder(model, tmp_path, "--seeds", "1-6,0,1")
    assert "3 of 7 digits are there already" in capsys.readouterr().out
    assert times == [(tmp_path / f"0000{k}.png").stat().st_mtime_ns for k in (0, 4, 5)]
    now = files_of(tmp_path)
    assert list(now) == [*complete, "00006.png", "notes.png"]
    for name, digit in complete.items():
        assert (digit.int() - now[name].int()).abs().max() <= 1

    into_folder(model, tmp_path, "--seeds", "0-6")
    out = capsys.readouterr().out
    assert "7 of 7 digits are there already" in out and "wrote" not in out


@pytest.mark.parametrize("options", [
    ("--steps", "4"), ("--sampler", "ddpm"), ("--eta", "0.5"), ("--no-clip",), ("--restarts",),
    ("--sampler", "ddpm", "--variance", "beta"), ("--guidance", "2"),
], ids=" ".join)
def test_digits_drawn_otherwise_are_not_mixed(options, tiny_run, tmp_path, capsys):
    """A folder with digits of other settings is refused, in one line that names one of them, before
    anything is drawn; even if their seeds are others. So is a digit of unknown origin."""
    model = tiny_run / "model.pt"
    into_folder(model, tmp_path, "--seeds", "7")
    names = [file.name for file in tmp_path.iterdir()]
    with pytest.raises(SystemExit) as exit_:
        into_folder(model, tmp_path, "--seeds", "8,9", *options)
    message = exit_.value.code
    settings = "(seed 7, model.pt, MNIST, ddim, 3 steps"
    assert f"00007.png was drawn with other settings {settings}" in message
    assert message.endswith("; name another folder") and "\n" not in message
    assert [file.name for file in tmp_path.iterdir()] == names

    Image.new("L", (28, 28)).save(tmp_path / "00007.png")
    with pytest.raises(SystemExit, match="nothing is known of how"):
        into_folder(model, tmp_path, "--seeds", "8,9")


def test_digits_of_another_model_of_the_same_name_are_not_mixed(tiny_run, tmp_path):
    """A run that was trained anew is another model, although its file is again model.pt; and so is
    the same model with another guide."""
    state = torch.load(tiny_run / "model.pt", weights_only=True)
    state["average"]["stem.bias"][0] += 1e-3
    (tmp_path / "other").mkdir()
    torch.save(state, tmp_path / "other" / "model.pt")
    into_folder(tiny_run / "model.pt", tmp_path / "digits", "--seeds", "7")
    with pytest.raises(SystemExit, match="was drawn with other settings"):
        into_folder(tmp_path / "other" / "model.pt", tmp_path / "digits", "--seeds", "7")

    for name, shift in (("early.pt", 0.0), ("early-2.pt", 1e-3)):
        early = torch.load(tiny_run / "early.pt", weights_only=True)
        early["average"]["stem.bias"][0] += shift
        (tmp_path / name[:-3]).mkdir()
        torch.save(early, tmp_path / name[:-3] / "early.pt")
    guided_by = [("--guidance", "2", "--guide", str(tmp_path / name / "early.pt"))
                 for name in ("early", "early-2")]
    into_folder(tiny_run / "model.pt", tmp_path / "guided", "--seeds", "7", *guided_by[0])
    into_folder(tiny_run / "model.pt", tmp_path / "guided", "--seeds", "8", *guided_by[0])
    with pytest.raises(SystemExit, match="was drawn with other settings"):
        into_folder(tiny_run / "model.pt", tmp_path / "guided", "--seeds", "8", *guided_by[1])


def test_interrupted_folder_keeps_its_digits_and_says_how_to_go_on(tiny_run, tmp_path, capsys):
    """Ctrl-C in the second of three batches exits with 130. The digits of the first are there,
    complete, and none of the second. The message says that the same command draws the rest, and it
    does."""
    options = ("--seeds", "0-5", "--batch-size", "2")
    with ctrl_c_in_the_fifth_call(), pytest.raises(SystemExit) as exit_:
        into_folder(tiny_run / "model.pt", tmp_path, *options)
    assert exit_.value.code == 130
    assert f"the digits in {tmp_path}/ are complete; the same command draws the rest" in \
        capsys.readouterr().err
    assert list(files_of(tmp_path)) == ["00000.png", "00001.png"]

    into_folder(tiny_run / "model.pt", tmp_path, *options)
    assert list(files_of(tmp_path)) == [f"0000{k}.png" for k in range(6)]
    into_folder(tiny_run / "model.pt", tmp_path / "whole", *options)
    (tmp_path / "whole").rename(tmp_path.with_name(tmp_path.name + "-whole"))
    whole = files_of(tmp_path.with_name(tmp_path.name + "-whole"))
    assert all(torch.equal(digit, whole[name]) for name, digit in files_of(tmp_path).items())


# ------------------------------------------------------------------------------ the fast layout

@pytest.mark.parametrize("sampler, guidance", [
    ("sde-dpm++", 1), ("sde-dpm++", 2), pytest.param("ddpm", 1, marks=pytest.mark.slow)])
def test_layout_of_the_weights_changes_no_picture(sampler, guidance):
    """On a CPU the command line lays the weights out with the channels last, where sampling is
    faster. The digits of the shipped model are the same within one grey level, and on other devices
    the layout stays as it was."""
    path = script.SHIPPED
    seeds = [0, 1, 2, 3]

    def network() -> tuple[torch.nn.Module, NoiseSchedule]:
        checkpoint = script.load_checkpoint(path)
        if guidance == 1:
            return checkpoint.model, checkpoint.schedule
        return guided(checkpoint, path, guidance), checkpoint.schedule

    model, schedule = network()
    usual = to_uint8(last(sample(model, schedule, seeds, sampler)))
    placed = script.place_network(network()[0], torch.device("cpu"))
    wide = [weight for weight in placed.parameters() if weight.dim() == 4 and weight.shape[1] > 1
            and weight.shape[2] > 1]
    assert len(wide) > 10
    assert all(weight.is_contiguous(memory_format=torch.channels_last) for weight in wide)
    fast = to_uint8(last(sample(placed, schedule, seeds, sampler)))
    assert same_images(usual, fast)
    meta = script.place_network(network()[0], torch.device("meta"))
    assert all(weight.is_contiguous() for weight in meta.parameters())
