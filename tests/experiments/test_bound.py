"""The laws of the bound on the bits of an image: it is exact where the best model is known, what is
drawn at random is right on average, and the error that is stated is the error that is made.

The oracle is Gaussian data. If the pixels of x_0 are independent N(mu, lam), the best network is
linear, all terms have closed forms, and their sum must be the entropy of x_0 plus the KL divergence
of x_T from pure noise.
"""

import json
import math
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from sample import SHIPPED, p_step
from schedule import NoiseSchedule
from tests.experiments import bound as script
from tests.experiments.bound import (
    BITS, VARIANCES, bound_terms, decoder, divergence, draw_levels, fit_decoder, look,
    mean_by_level, measure, optimal_variance, prior, probabilities)
from tests.strategies import FEW, SEED, normal, pictures, schedules, write_mnist
from tests.test_schedule import closed_bound
from train import load_checkpoint

pytestmark = pytest.mark.slow

DEFAULT = NoiseSchedule()
SHORT = NoiseSchedule(T=25, kind="cosine")


def number(x: float) -> torch.Tensor:
    return torch.tensor(x, dtype=torch.float64)


def gaussian(schedule: NoiseSchedule, lam: float) -> tuple[torch.Tensor, torch.Tensor]:
    """For pixels N(mu, lam), at each t: the variance of x_{t-1} given x_t, and the mean of
    (mu_tilde - mu_theta)^2 for the best network. Both (T+1,), with 0 at t = 0.

    x_t has the variance v_t = alpha_bar_t lam + 1 - alpha_bar_t, and x_0 given x_t has
    lam (1 - alpha_bar_t)/v_t. The first is v_{t-1} - alpha_t v_{t-1}^2/v_t = v_{t-1} beta_t/v_t.
    """
    exact = [0.0]
    error = [0.0]
    beta = schedule.beta.tolist()
    alpha_bar = schedule.alpha_bar.tolist()
    v = [a * lam + 1 - a for a in alpha_bar]
    for t in range(1, schedule.T + 1):
        exact.append(v[t - 1] * beta[t] / v[t])
        weight = math.sqrt(alpha_bar[t - 1]) * beta[t] / (1 - alpha_bar[t])  # of x_0 in mu_tilde
        error.append(weight**2 * lam * (1 - alpha_bar[t]) / v[t])
    return torch.tensor(exact, dtype=torch.float64), torch.tensor(error, dtype=torch.float64)


def gaussian_bound(schedule, mu: float, lam: float, variance: torch.Tensor) -> float:
    """The functions of bound.py put together, for such data, in nats.

    Data without grey levels need a density as their decoder: ln(2 pi sigma^2)/2 +
    error/(2 sigma^2) at t = 1.
    """
    _, error = gaussian(schedule, lam)
    first = (2 * math.pi * variance[1]).log() / 2 + error[1] / (2 * variance[1])
    same_square = torch.full((1, 1, 1, 1), math.sqrt(mu**2 + lam), dtype=torch.float64)
    terms = bound_terms(schedule, variance, error, first)
    return (prior(schedule, same_square) + terms.sum()).item()


# -------------------------------------------------------------------------------- the bound closes

@pytest.mark.parametrize("mu", [0, -0.7])
@pytest.mark.parametrize("lam", [0.001, 0.01, 0.27, 1, 4])
@pytest.mark.parametrize("schedule", [DEFAULT, NoiseSchedule(kind="cosine")],
                         ids=["linear", "cosine"])
def test_bound_closes_on_shipped_schedules(schedule, lam, mu):
    """With the best network and the exact variance of each step back, nothing is lost: the bound is
    H(x_0) + KL(q(x_T) || N(0, I)), to 1e-10, at T = 1000. (DDPM, equations 3 and 5)
    """
    exact, _ = gaussian(schedule, lam)
    assert abs(gaussian_bound(schedule, mu, lam, exact) - closed_bound(schedule, mu, lam)) < 1e-10


@given(schedules(), st.floats(-1, 1), st.floats(0.01, 2))
def test_bound_closes_on_any_schedule(schedule, mu, lam):
    """The same. The ratios are of numbers 1 - alpha_bar_t, which are at least 1e-5 and rounded by
    1e-16, or 1e-11 of their value. So much may the logarithm of a ratio be off, in few of at most
    40 terms.
    """
    exact, _ = gaussian(schedule, lam)
    assert abs(gaussian_bound(schedule, mu, lam, exact) - closed_bound(schedule, mu, lam)) < 1e-10


@pytest.mark.parametrize("lam, beta, beta_tilde", [
    (1, "0.00000000", "0.46489"), (0.27, "0.00096605", "0.45697"), (0.01, "0.019564", "0.39158"),
    (0, "0.33716", "0.00000000")])
def test_price_of_another_variance(lam, beta, beta_tilde):
    """It exceeds the closed form by the sum of (r - 1 - ln r)/2, r = exact/sigma^2, over t >= 2.

    Golden numbers for the default schedule, in nats, computed elsewhere: to the last digit given.
    """
    exact, error = gaussian(DEFAULT, lam)
    for name, golden in (("beta", beta), ("beta_tilde", beta_tilde)):
        chosen = getattr(DEFAULT, name)
        excess = (bound_terms(DEFAULT, chosen, error, number(0.0))
                  - bound_terms(DEFAULT, exact, error, number(0.0)))
        r = exact[2:] / chosen[2:]
        assert (excess[2:] - (r - 1 - r.log()) / 2).abs().max() < 1e-12
        assert abs(excess.sum().item() - float(golden)) < 0.5 * 10.0 ** -len(golden.split(".")[1])


@given(st.integers(2, 1000), st.floats(0.2, 5), st.floats(-3, 3))
def test_divergence_is_that_of_two_gaussians(t, ratio, distance):
    """KL(N(m, beta_tilde_t) || N(m', sigma^2)), as torch.distributions has it."""
    q = torch.distributions.Normal(number(0.3), DEFAULT.beta_tilde[t].sqrt())
    p = torch.distributions.Normal(0.3 + distance * q.scale, q.scale * math.sqrt(ratio))
    kl = divergence(DEFAULT, torch.tensor([t]), p.variance, (q.mean - p.mean).square())
    assert math.isclose(kl.item(), torch.distributions.kl_divergence(q, p).item(), abs_tol=1e-13)


@given(schedules(), SEED)
def test_prior_is_that_of_two_gaussians(schedule, seed):
    """KL(q(x_T|x_0) || N(0, 1)), each image for itself, as torch.distributions has it."""
    x0 = normal(seed, 3, 1, 2, 2).clamp(-1, 1)
    end = schedule.alpha_bar[-1]
    q = torch.distributions.Normal(end.sqrt() * x0, (1 - end).sqrt())
    noise = torch.distributions.Normal(number(0), number(1))
    expected = torch.distributions.kl_divergence(q, noise)
    assert torch.allclose(prior(schedule, x0), expected.mean(dim=(1, 2, 3)), rtol=1e-9, atol=1e-13)


# ------------------------------------------------------------------------------------- the decoder

ALL = torch.arange(256, dtype=torch.uint8)[:, None]  # each byte an image of one pixel


@given(st.floats(-1, 1), st.floats(-16, 1))
def test_probabilities_of_all_bytes_sum_to_one(mean, log_variance):
    """The 256 intervals cover the line without gap or overlap. And an image with black and white
    exchanged costs the same if the mean changes its sign.
    """
    nats = decoder(ALL, torch.full((256, 1), mean, dtype=torch.float64), number(log_variance).exp())
    assert abs(nats.neg().exp().sum().item() - 1) < 1e-12 and (nats >= 0).all()
    mirrored = decoder(ALL, torch.full((256, 1), -mean, dtype=torch.float64),
                       number(log_variance).exp())
    assert torch.allclose(nats, mirrored.flip(0), rtol=1e-9, atol=1e-13)


@given(st.integers(0, 255), st.floats(-1, 1), st.floats(0.005, 1))
def test_decoder_is_the_integral_of_the_density(k, mean, sigma):
    """Simpson's rule over [x - 1/255, x + 1/255] with x = 2k/255 - 1, open at the ends of the
    range, gives the same for intervals within 6 standard deviations (for others, see below).
    """
    x = 2 * k / 255 - 1
    low = x - 1 / 255 if k > 0 else min(mean, x) - 12 * sigma
    high = x + 1 / 255 if k < 255 else max(mean, x) + 12 * sigma
    if min(abs(x - mean), abs(low - mean), abs(high - mean)) > 6 * sigma:
        return
    n = 4000
    y = torch.linspace(low, high, n + 1, dtype=torch.float64)
    weight = torch.ones(n + 1, dtype=torch.float64)
    weight[1:-1:2] = 4
    weight[2:-1:2] = 2
    density = (-(y - mean) ** 2 / (2 * sigma**2)).exp() / (sigma * math.sqrt(2 * math.pi))
    integral = (weight * density).sum().item() * (high - low) / n / 3
    nats = decoder(torch.tensor([[k]], dtype=torch.uint8), number(mean)[None, None],
                   number(sigma**2))
    assert math.isclose(nats.item(), -math.log(integral), rel_tol=1e-9, abs_tol=1e-9)


@pytest.mark.parametrize("k, mean", [(0, 1.0), (255, -1.0), (100, 1.0), (200, -1.0), (1, 0.9)])
@pytest.mark.parametrize("sigma", [1e-4, 1e-3, 0.01])
def test_decoder_of_a_far_value_is_exact(k, mean, sigma):
    """Where the probability is too small for float64, its negative logarithm is that of the tail of
    a Gaussian, z^2/2 + ln(z sqrt(2 pi)) - ln(1 - 1/z^2 + 3/z^4 - 15/z^6), with z the near end of
    the interval in standard deviations. The far end cuts off a share of less than exp(-z/129) for
    sigma <= 0.01.
    """
    x = 2 * k / 255 - 1
    z = (abs(x - mean) - 1 / 255) / sigma
    tail = z**2 / 2 + math.log(z * math.sqrt(2 * math.pi))
    tail -= math.log1p(-z**-2 + 3 * z**-4 - 15 * z**-6)
    if 0 < k < 255:  # the interval ends: a share is cut off
        wide = z + 2 / 255 / sigma
        tail -= math.log1p(-math.exp((z - wide) * (z + wide) / 2) * z / wide)
    nats = decoder(torch.tensor([[k]], dtype=torch.uint8), number(mean)[None, None],
                   number(sigma**2))
    assert math.isclose(nats.item(), tail, rel_tol=1e-8)


def test_price_of_a_decoder_that_knows_the_pixel():
    """With sigma_1^2 = beta_1 = 1e-4, half an interval is 0.392 standard deviations. So an exact
    mean costs 0.62 bits for black or white and 1.71 bits for grey: erf gives the probabilities.
    """
    nats = decoder(ALL, ALL.double() / 127.5 - 1, DEFAULT.beta[1])
    inside = math.erf(1 / 255 / 0.01 / math.sqrt(2))
    assert torch.allclose(nats[1:255].exp() * inside, number(1.0))
    assert torch.allclose(nats[[0, 255]].exp() * (1 + inside) / 2, number(1.0))
    assert round(nats[0].item() * BITS, 2) == 0.62 and round(nats[9].item() * BITS, 2) == 1.71


@FEW
@given(SEED, st.floats(math.log(0.003), math.log(0.3)))
def test_fitted_decoder_is_the_best_and_near_the_truth(seed, log_sigma):
    """No variance of a fine grid does better. And if pixels are their means plus noise of variance
    s^2, rounded, the fit gives back s^2, within 5.5 standard errors of sqrt(2/N) of it, if the
    noise is wide compared with a grey level. The 1/12 of a squared level that rounding adds is
    allowed on top.
    """
    sigma = math.exp(log_sigma)
    mean = normal(seed, 50, 1, 8, 8).clamp(-2, 2) / 4
    pixels = ((mean + sigma * normal(seed + 1, *mean.shape) + 1) * 127.5).round().clamp(0, 255)
    pixels = pixels.to(torch.uint8)
    variance = fit_decoder(pixels, mean)
    least = decoder(pixels, mean, variance).mean()
    for log in torch.linspace(math.log(1e-7), 0, 60, dtype=torch.float64):
        assert least <= decoder(pixels, mean, log.exp()).mean() + 1e-6
    if sigma < 0.15:  # else some noise is cut off at black and white
        allowed = 5.5 * math.sqrt(2 / mean.numel()) * (1 + 2 / 255 / sigma) + 0.004
        assert abs(variance.item() / sigma**2 - 1) < allowed


# -------------------------------------------------------------------------------- the best variance

@given(schedules() | st.just(DEFAULT), st.floats(0.01, 2))
def test_optimal_variance_is_the_analytic_one_for_a_perfect_network(schedule, lam):
    """beta_tilde_t + E error = beta_tilde_t + f^2 (1 - E eps_hat^2), f = beta_t/sqrt(alpha_t
    (1 - alpha_bar_t)), the formula of Bao et al. It is also the exact variance of the step back.

    The best guess is eps_hat = sqrt(1 - alpha_bar_t) (x_t - sqrt(alpha_bar_t) mu)/v_t, so
    E eps_hat^2 is (1 - alpha_bar_t)/v_t.
    """
    exact, error = gaussian(schedule, lam)
    variance = optimal_variance(schedule, error)[2:]
    a = schedule.alpha[2:]
    alpha_bar = schedule.alpha_bar[2:]
    factor = schedule.beta[2:] / (a * (1 - alpha_bar)).sqrt()
    square = (1 - alpha_bar) / (alpha_bar * lam + 1 - alpha_bar)
    bao = schedule.beta_tilde[2:] + factor**2 * (1 - square)
    assert torch.allclose(variance, bao, rtol=1e-9, atol=0)
    assert torch.allclose(variance, exact[2:], rtol=1e-9, atol=0)


@given(schedules(), SEED, st.floats(0.01, 2))
def test_optimal_variance_is_a_minimum(schedule, seed, step):
    """Whatever the mean errors of a network are, any other variance, larger or smaller, costs more
    at every t; and at the minimum, ln(sigma^2/beta_tilde)/2 is left.
    """
    error = schedule.beta_tilde * normal(seed, schedule.T + 1).square() + 1e-9
    best = optimal_variance(schedule, error)
    t = torch.arange(2, schedule.T + 1)
    least = divergence(schedule, t, best[t], error[t])
    assert torch.allclose(least, (best[t] / schedule.beta_tilde[t]).log() / 2, atol=1e-12)
    for sign in (-1, 1):
        assert (divergence(schedule, t, best[t] * math.exp(sign * step), error[t]) > least).all()


# -------------------------------------------------------------- what is drawn, and what it is worth

@given(st.lists(st.integers(1, 20), min_size=1, max_size=30), st.integers(1, 6), SEED)
def test_estimate_is_unbiased_exactly(weights, K, seed):
    """The mean of term/(K p_t) over all draws is the sum of the terms, with no chance involved.

    p_t is weights_t/n. Each of the K slices of the probability is entered at n evenly spaced
    points, one for each of n rows. Then t comes up K weights_t times among the K n draws.
    """
    n = sum(weights)
    p = torch.tensor([0, 0, *weights], dtype=torch.float64) / n
    u = ((torch.arange(n, dtype=torch.float64) + 0.5) / n)[:, None].repeat(1, K)
    t = draw_levels(p, u)
    assert t.shape == (n, K) and torch.allclose(
        t.flatten().bincount(minlength=len(p)).double(), K * n * p)
    terms = normal(seed, len(p))
    assert math.isclose((terms[t] / (K * p[t])).sum(1).mean().item(), terms[2:].sum().item(),
                        rel_tol=1e-9, abs_tol=1e-9)


@given(schedules(), SEED, st.integers(1, 8))
def test_levels_are_drawn_within_range_one_in_each_slice(schedule, seed, K):
    """p sums to 1 over t = 2..T, no t has less than a fifth of the average, and small terms are
    drawn less often than large ones. The draws lie in 2..T, also at the ends of [0, 1), and rise
    along a row.
    """
    terms = normal(seed, schedule.T + 1).square()
    p = probabilities(terms)
    assert abs(p.sum().item() - 1) < 1e-12 and p[0] == p[1] == 0
    assert (p[2:] > 0.19999 / (schedule.T - 1)).all()
    assert (p[2:].argsort() == terms[2:].argsort()).all()
    u = torch.rand(20, K, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    lowest = torch.zeros(1, K, dtype=torch.float64)
    highest = torch.full((1, K), 1 - 2**-53, dtype=torch.float64)
    for numbers in (u, lowest, highest):
        t = draw_levels(p, numbers)
        assert t.min() >= 2 and t.max() <= schedule.T and (t.diff(dim=1) >= 0).all()


@given(SEED)
def test_mean_of_each_level_equals_a_plain_loop(seed):
    """Mean and standard error of the values at each t; NaN at a t that has too few values."""
    generator = torch.Generator().manual_seed(seed)
    t = torch.randint(1, 8, (15,), generator=generator)
    values = normal(seed, 15)
    mean, error = mean_by_level(values, t, 8)
    for k in range(9):
        at = values[t == k]
        assert torch.allclose(mean[k], at.mean(), equal_nan=True)
        expected = at.std() / math.sqrt(len(at)) if len(at) > 1 else number(math.nan)
        assert torch.allclose(error[k], expected, equal_nan=True)


# ------------------------------------------------------------------------------------ all of it

class Linear(torch.nn.Module):
    """The best network for pixels N(mu, lam): eps_hat = sqrt(1 - alpha_bar_t)
    (x_t - sqrt(alpha_bar_t) mu)/v_t. It answers in float64 and keeps what it was asked.
    """

    def __init__(self, schedule: NoiseSchedule, mu: float, lam: float):
        super().__init__()
        self.unused = torch.nn.Parameter(torch.zeros(1))  # tells look() the device
        alpha_bar = schedule.alpha_bar
        self.k = (1 - alpha_bar).sqrt() / (alpha_bar * lam + 1 - alpha_bar)
        self.shift = alpha_bar.sqrt() * mu
        self.asked = []

    def forward(self, xt, t):
        self.asked.append((xt, t))
        return self.k[t].view(-1, 1, 1, 1) * (xt - self.shift[t].view(-1, 1, 1, 1))


def expected_terms(schedule, images, mu: float, lam: float, variance: torch.Tensor) -> torch.Tensor:
    """The terms of each image with the network above, without clipping, averaged over the noise in
    closed form: nats, (N, T+1).

    eps_hat - eps = (k s - 1) eps + k sqrt(alpha_bar) (x_0 - mu), with s = sqrt(1 - alpha_bar), has
    the mean square (k s - 1)^2 + k^2 alpha_bar (x_0 - mu)^2, and mu_tilde - mu_theta is
    beta/(sqrt(alpha) s) times it. At t = 1 x0_hat is a Gaussian, and the decoder is averaged over
    it by a sum on a grid of 8 standard deviations.
    """
    x0 = images.double().flatten(1) / 127.5 - 1
    beta = schedule.beta.tolist()
    alpha_bar = schedule.alpha_bar.tolist()
    terms = []
    for t in range(1, schedule.T + 1):
        a, s2 = alpha_bar[t], 1 - alpha_bar[t]
        k = math.sqrt(s2) / (a * lam + s2)
        if t == 1:
            bias = -math.sqrt(s2) / math.sqrt(a) * k * math.sqrt(a) * (x0 - mu)
            spread = abs(math.sqrt(s2) / math.sqrt(a) * (1 - k * math.sqrt(s2)))
            z = torch.linspace(-8, 8, 401, dtype=torch.float64)
            weight = (-z**2 / 2).exp() / (-z**2 / 2).exp().sum()
            terms.append(sum(w * decoder(images, (x0 + bias + spread * point).view(images.shape),
                                         variance[1]) for w, point in zip(weight, z)))
        else:
            square = (k * math.sqrt(s2) - 1) ** 2 + k**2 * a * (x0 - mu).square().mean(1)
            error = beta[t] ** 2 / ((1 - beta[t]) * s2) * square
            r = schedule.beta_tilde[t] / variance[t]
            terms.append((r - 1 - r.log()) / 2 + error / (2 * variance[t]))
    return torch.stack([torch.zeros_like(terms[0]), *terms], dim=1)


def test_measured_bound_is_the_expected_one_and_its_error_is_honest():
    """200 images, dark grey or light grey all over, are drawn anew 100 times and measured with the
    best linear network. The truth is the mean of the closed forms of the two greys.

    The mean of 100 measurements must be within 5 standard errors of the truth, in all and in each
    group: a false alarm with probability 6e-7 a number, for 3 x 5 numbers, and the seed is fixed. A
    bias of a standard error of one measurement is 10 of these. The standard deviation of the 100,
    which is known to 1/sqrt(200) = 7 %, must be the error that is stated, within 4 times that.
    """
    greys = torch.tensor([60, 180], dtype=torch.uint8).view(2, 1, 1, 1).repeat(1, 1, 4, 4)
    variances = torch.stack([SHORT.beta, SHORT.beta_tilde, (SHORT.beta + SHORT.beta_tilde) / 2])
    variances[:, 1] = torch.tensor([1e-3, 3e-3, 1e-2])
    model = Linear(SHORT, -0.1, 0.3)
    generator = torch.Generator().manual_seed(1)
    expected = torch.stack([expected_terms(SHORT, greys, -0.1, 0.3, v).mean(0) for v in variances])
    first = prior(SHORT, greys.double() / 127.5 - 1).mean().item() * BITS
    p = probabilities(expected.mean(0))
    runs = []
    for _ in range(100):
        images = greys[torch.randint(2, (200,), generator=generator)]
        runs.append(measure(model, SHORT, images, variances, p, 5, generator, clip=False))
        assert sum(runs[-1]["draws"]) == 1000 and runs[-1]["draws"][1] == 200
    for name, terms in zip(VARIANCES, expected * BITS):
        truth = {"prior": first, "t = 1": terms[1].item(), "t = 2-10": terms[2:11].sum().item(),
                 "t = 11-25": terms[11:].sum().item()}
        assert list(runs[0][name]["groups"]) == list(truth)
        measured = {key: torch.tensor([run[name]["groups"][key] for run in runs])
                    for key in truth}
        truth["total"] = sum(truth.values())
        measured["total"] = torch.tensor([run[name]["total"] for run in runs])
        for key, numbers in measured.items():  # (100, 2): the number and its error
            deviation = numbers[:, 0].std()
            assert abs(numbers[:, 0].mean() - truth[key]) < 5 * deviation / 10, (name, key)
            assert abs(deviation / numbers[:, 1].mean() - 1) < 4 * 0.07, (name, key)
        for t in range(1, 26):
            numbers = torch.tensor([[run[name]["terms"][t], run[name]["errors"][t]] for run in runs
                                    if run[name]["errors"][t] is not None])
            deviation = numbers[:, 0].std()
            assert abs(numbers[:, 0].mean() - terms[t]) < 5 * deviation / len(numbers) ** 0.5
            assert 0.5 < numbers[:, 1].square().mean().sqrt() / deviation < 1.5, (name, t)


@pytest.mark.parametrize("clip", [True, False])
def test_the_mean_is_that_of_the_sampler(clip):
    """error is the squared distance of the exact mean from that of p_step, clipped or not; x0_hat
    is what p_step makes of x_1. The network is called with the t of the paper and float32 images.
    """
    images = pictures(6, 8)
    t = torch.tensor([1, 25, 7, 1, 2, 13])
    model = Linear(SHORT, 0.5, 3.0)  # a bad guess, so that clipping matters
    rows = torch.tensor([5, 0, 1, 2, 2, 3])
    error, last = look(model, SHORT, images, rows, t, torch.Generator().manual_seed(0), clip)
    (xt, asked), = model.asked
    assert torch.equal(asked, t) and xt.dtype == torch.float32
    x0 = images[rows].double() / 127.5 - 1
    eps_hat = model(xt, t).double()
    mean = p_step(SHORT, xt.double(), t, eps_hat, torch.zeros_like(x0), variance="zero", clip=clip)
    exact, _ = SHORT.q_posterior(x0, xt.double(), t)
    assert torch.allclose(error, (mean - exact).square().mean(dim=(1, 2, 3)), rtol=1e-4)
    assert torch.allclose(last, mean[t == 1], atol=1e-5)
    assert (last.abs().max() > 1) != clip


def test_fit_finds_the_variance_of_the_best_network():
    """For grey pixels N(mu, lam), rounded, and the best network, the fitted variance of each t >= 2
    is that of the exact step back. Each t has at least 20 images of 64 pixels; the mean of 1280
    squares has a standard error of sqrt(2/1280) = 4 %, and five of these are allowed. With the
    fitted variance the terms are least.
    """
    mu = 0.1
    lam = 0.02
    pixels = (mu + math.sqrt(lam) * normal(3, 400, 1, 8, 8) + 1) * 127.5
    images = pixels.round().clamp(0, 255).to(torch.uint8)
    variances, terms = script.fit(Linear(SHORT, mu, lam), SHORT, images, 500,
                                  torch.Generator().manual_seed(0), clip=False)
    exact, _ = gaussian(SHORT, lam)
    assert torch.equal(variances[0], SHORT.beta)
    assert torch.equal(variances[1, 2:], SHORT.beta_tilde[2:])
    assert variances[1, 1] == SHORT.beta_tilde[2]
    assert ((variances[2] / exact)[2:] - 1).abs().max() < 0.2
    assert torch.allclose(variances[2, 1], exact[1], rtol=0.1)
    assert (terms[2, 1:] <= terms[:2, 1:] + 1e-6).all() and terms.shape == (3, 26)


def test_command_measures_and_prints(tmp_path, tiny_run, capsys):
    """A tiny run from end to end: the file holds all numbers, the table shows them, --table shows
    the same again, and the same command measures the same numbers.
    """
    write_mnist(tmp_path, pictures(16), torch.arange(16) % 10)
    argv = ["--data", str(tmp_path), "--checkpoint", str(tiny_run / "model.pt"), "--count", "12",
            "--draws", "4", "--fit", "25", "--device", "cpu", "--out", str(tmp_path / "b.json")]
    script.main(argv)
    printed = capsys.readouterr().out
    results = json.loads((tmp_path / "b.json").read_text())
    check(results)
    assert results["count"] == 12 and sum(results["draws"]) == 48 and results["draws"][1] == 12
    assert len(results["optimal_variance"]) == 21 and results["clip"] is True
    assert "{:.4f} ± {:.4f}".format(*results["optimal"]["total"]) in printed
    script.main(["--table", "--out", str(tmp_path / "b.json")])
    assert capsys.readouterr().out in printed
    script.main(argv)
    again = json.loads((tmp_path / "b.json").read_text())
    assert {**results, "seconds": 0} == {**again, "seconds": 0}
    for option in ("--count", "--draws"):
        with pytest.raises(SystemExit) as exit_:
            script.main([option, "1"])
        assert exit_.value.code == 2


def check(results: dict) -> None:
    """Groups add up to the total, curves have an entry for each t, and errors are positive."""
    T = len(results["draws"]) - 1
    assert results["draws"][1] == results["count"]
    assert sum(results["draws"]) == results["count"] * results["draws_per_image"]
    for name in VARIANCES:
        number, error = results[name]["total"]
        groups = results[name]["groups"]
        terms = results[name]["terms"]
        assert math.isclose(number, sum(value for value, _ in groups.values()), rel_tol=1e-9)
        assert error > 0 and all(error >= 0 for _, error in groups.values())
        assert len(terms) == len(results[name]["errors"]) == T + 1
        assert terms[0] is None and terms[1] is not None
        assert math.isclose(terms[1], groups["t = 1"][0], rel_tol=1e-3)
        lines = script.table(results).splitlines()
        assert len(lines) == len(groups) + 3 and all(line.count("|") == 5 for line in lines)


@pytest.mark.skipif(not script.RESULTS.exists(), reason="not measured yet")
def test_what_is_shipped_was_measured_well():
    """pretrained/bound.json is of the shipped model: all 10,000 test images, with errors of at most
    0.01 bits, of the whole bound and of each group. The prior is 2.695e-5, which was computed
    elsewhere, and the optimal variance is the best of the three. README.md has the table.
    """
    results = json.loads(script.RESULTS.read_text())
    check(results)
    shipped = load_checkpoint(SHIPPED)
    assert results["held_out"] == shipped.history["held_out"] and results["count"] == 10_000
    for name in VARIANCES:
        numbers = [results[name]["total"], *results[name]["groups"].values()]
        assert all(error <= 0.01 for _, error in numbers)
        assert abs(results[name]["groups"]["prior"][0] - 2.695e-5) < 1e-8
        # The curve, summed, is another estimate of the same from the same draws.
        assert abs(sum(results[name]["terms"][1:]) - results[name]["total"][0]) < 0.03
    totals = {name: results[name]["total"][0] for name in VARIANCES}
    assert min(totals, key=totals.get) == "optimal"
    readme = Path(__file__).with_name("README.md").read_text(encoding="utf-8")
    assert script.table(results) in readme
