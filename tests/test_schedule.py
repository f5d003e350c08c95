"""The laws of the forward process and of its exact reversal.

Read this beside schedule.py: each test states one law in words and symbols and checks it against
something that is not the code under test: a plain loop, an integral, or an identity.

How to read a test. `@given(schedules(), st.floats(-1, 1))` calls the function below it many times,
each time with another schedule and another number between -1 and 1, which the library Hypothesis
draws. If one of them breaks the law, Hypothesis looks for the simplest that does and shows it.

Tolerances. Everything is computed in float64, which rounds each result by up to u = 2.2e-16 of its
size. A product of T factors is off by at most about T u. The relative error of 1 - alpha_bar, which
is at least beta_1 >= 1e-5, is u / 1e-5 = 2.2e-11, and so is that of the factors of the posterior,
which divide by it. Recovering x_0 divides by sqrt(alpha_bar) >= 1e-4 and magnifies the error by as
much. Each bound below is such an estimate, made 3 to 100 times wider.

Random tests allow a number of standard errors. A normal number is off by more than 5.5 of them with
probability 3.8e-8, so a test of ten such numbers gives a false alarm less than once in a million.
"""

import importlib
import itertools
import math
import re

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import schedule as script
from schedule import NoiseSchedule
from strategies import FEW, SEED, normal, schedules, schedules_and_t

SHIPPED = [NoiseSchedule(), NoiseSchedule(kind="cosine")]
on_shipped = pytest.mark.parametrize("schedule", SHIPPED, ids=["linear", "cosine"])
ONE = torch.ones(1, 1, 1, 1, dtype=torch.float64)
ZERO = torch.zeros(1, 1, 1, 1, dtype=torch.float64)


def close(a, b, tolerance: float) -> None:
    """|a - b| <= tolerance * max(1, |b|), element by element; no signs that could cancel."""
    a = torch.as_tensor(a, dtype=torch.float64)
    b = torch.as_tensor(b, dtype=torch.float64)
    worst = ((a - b).abs() / b.abs().clamp(min=1)).max().item()
    assert worst <= tolerance, f"off by {worst:.3g}, allowed {tolerance:.3g}"


# ----------------------------------------------------------------- the convention and the arrays

def test_index_is_the_subscript_of_the_papers():
    """beta[0] = 0, alpha_bar[0] = 1; beta[1] and beta[T] are the given ends; lengths are T+1.

    Between them the linear schedule rises evenly. [DDPM section 4]
    """
    schedule = NoiseSchedule(T=1000, beta_start=1e-4, beta_end=0.02)
    assert schedule.T == 1000
    for array in (schedule.beta, schedule.alpha, schedule.alpha_bar, schedule.beta_tilde):
        assert array.shape == (1001,) and array.dtype == torch.float64
    assert schedule.beta[0] == 0 and schedule.alpha_bar[0] == 1 and schedule.beta_tilde[0] == 0
    assert schedule.beta[1] == 1e-4 and schedule.beta[1000] == 0.02
    for t in range(2, 1000):
        assert abs(schedule.beta[t].item() - (1e-4 + (t - 1) * (0.02 - 1e-4) / 999)) < 1e-16
    from_list = NoiseSchedule.from_betas([0.3, 0.9, 0.999])
    assert from_list.beta.tolist() == [0, 0.3, 0.9, 0.999]


def test_golden_end_of_the_default_schedule():
    """alpha_bar_1000 = 4.035829765e-5, computed elsewhere with 50 digits by the product."""
    product = math.exp(math.fsum(math.log1p(-(1e-4 + (0.02 - 1e-4) * i / 999))
                                 for i in range(1000)))
    assert abs(product - 4.035829765e-5) < 1e-14
    assert abs(SHIPPED[0].alpha_bar[1000].item() / product - 1) < 1e-12


def test_what_is_left_of_the_image_at_the_end():
    """The default schedule leaves alpha_bar_1000 = 4.04e-5, which is 0.6 % of the image. The same
    betas in 200 steps leave 36 %, which is refused; the limit is 2 %.

    An error in the noise becomes 157 times as large in x_0 at t = 1000.
    """
    left = SHIPPED[0].alpha_bar[1000].item()
    assert f"{left:.3g}" == "4.04e-05"
    assert f"{math.sqrt(left):.1%}" == "0.6%"
    few = NoiseSchedule(T=200, allow_signal=True)
    assert f"{few.alpha_bar[200].sqrt().item():.0%}" == "36%"
    with pytest.raises(ValueError, match="36.4% of the image is left"):
        NoiseSchedule(T=200)
    assert script.MAX_SIGNAL == 0.02

    right = SHIPPED[0].predict_x0(ZERO, 1000, ZERO)
    wrong = SHIPPED[0].predict_x0(ZERO, 1000, ONE)
    assert f"{abs(wrong - right).item():.0f}" == "157"


@given(schedules() | st.sampled_from(SHIPPED))
def test_alpha_bar_is_the_product(schedule):
    """alpha_bar_t = (1 - beta_1) ... (1 - beta_t), by a plain loop; strictly falling in (0, 1]."""
    product = 1.0
    for t in range(1, schedule.T + 1):
        product *= 1 - schedule.beta[t].item()
        assert abs(schedule.alpha_bar[t].item() / product - 1) < 1e-13
        assert schedule.alpha_bar[t] < schedule.alpha_bar[t - 1]


def test_cosine_follows_the_squared_cosine():
    """alpha_bar_t = f(t)/f(0), f(t) = cos^2(...), wherever beta is below its cap. [IDDPM Eq. 17]"""
    cosine = SHIPPED[1]
    f = [math.cos((t / 1000 + 0.008) / 1.008 * math.pi / 2) ** 2 for t in range(1001)]
    for t in range(1, 1001):
        if cosine.beta[t] < 0.999:
            assert abs(cosine.alpha_bar[t].item() - f[t] / f[0]) < 1e-12
    assert cosine.beta.max() == 0.999 and (cosine.beta == 0.999).sum() == 1


def test_cosine_keeps_the_image_longer():
    """At t = 750 the linear schedule has left 6 % of the image, the cosine 38 %. Without the offset
    beta_1 would be 17 times smaller, 2.5e-6; without the cap on beta nothing would be left at T.
    """
    for schedule, left in zip(SHIPPED, ("6%", "38%")):
        assert f"{schedule.alpha_bar[750].sqrt().item():.0%}" == left
    first_without_offset = 1 - math.cos(math.pi / 2 / 1000) ** 2
    assert f"{first_without_offset:.1e}" == "2.5e-06"
    assert f"{SHIPPED[1].beta[1].item() / first_without_offset:.0f}" == "17"
    assert math.cos(math.pi / 2) ** 2 < 1e-32


# ------------------------------------------------- closed form against iterated noising, exactly

@given(schedules_and_t())
def test_one_step_keeps_unit_variance(drawn):
    """q_step multiplies the image by g and the noise by s, and g^2 + s^2 = 1.

    So a pixel of variance 1 has variance 1 again after the step.
    """
    schedule, t = drawn
    g = schedule.q_step(ONE, t, ZERO).item()
    s = schedule.q_step(ZERO, t, ONE).item()
    close(g**2 + s**2, 1, 1e-15)


@given(schedules(), SEED)
def test_two_steps_written_out(schedule, seed):
    """x_2 = sqrt(alpha_1 alpha_2) x_0 + sqrt(alpha_2 beta_1) eps_1 + sqrt(beta_2) eps_2 is what two
    calls of q_step give, and alpha_2 beta_1 + beta_2 = 1 - alpha_1 alpha_2.
    """
    x0, eps1, eps2 = (normal(seed + k, 2, 1, 3, 3) for k in range(3))
    beta1, beta2 = schedule.beta[1:3].tolist()
    alpha1, alpha2 = 1 - beta1, 1 - beta2
    x2 = (math.sqrt(alpha1 * alpha2) * x0 + math.sqrt(alpha2 * beta1) * eps1
          + math.sqrt(beta2) * eps2)
    x1 = schedule.q_step(x0, 1, eps1)
    close(schedule.q_step(x1, 2, eps2), x2, 1e-14)
    close(alpha2 * beta1 + beta2, 1 - alpha1 * alpha2, 1e-15)
    close(schedule.q_sample(ZERO, 2, ONE).item() ** 2, 1 - alpha1 * alpha2, 1e-14)


def iterated(schedule: NoiseSchedule) -> list[tuple[float, float]]:
    """(mean, variance) of x_t for x_0 = 1, t = 0..T, by composing single steps.

    q_step is affine in the image and in the noise. Feeding it (1, 0) and (0, 1) reads off the two
    factors; the moments then follow from x_t = g x_{t-1} + s eps: m -> g m, v -> g^2 v + s^2.
    """
    moments = [(1.0, 0.0)]
    for t in range(1, schedule.T + 1):
        g = schedule.q_step(ONE, t, ZERO).item()
        s = schedule.q_step(ZERO, t, ONE).item()
        mean, variance = moments[-1]
        moments.append((g * mean, g * g * variance + s * s))
    return moments


def compare_all_t(schedule: NoiseSchedule) -> None:
    """q_sample against the moments of t single steps, for every t."""
    tolerance = 1e-13 + 1e-14 * schedule.T
    for t, (mean, variance) in enumerate(iterated(schedule)):
        close(schedule.q_sample(ONE, t, ZERO).item() / mean, 1, tolerance)
        close(schedule.q_sample(ZERO, t, ONE).item() ** 2, variance, tolerance)


@given(schedules())
def test_closed_form_equals_iterated_noising(schedule):
    """t single steps have the mean and variance of the closed form, at every t. [DDPM Eq. 2]

    Mean sqrt(alpha_bar_t) x_0, variance 1 - alpha_bar_t. [DDPM Eq. 4]
    """
    compare_all_t(schedule)


@on_shipped
def test_closed_form_equals_iterated_noising_on_shipped_schedules(schedule):
    """x_t is distributed as sqrt(alpha_bar_t) x_0 + sqrt(1 - alpha_bar_t) eps, both at T = 1000.

    [DDPM Eq. 2] [DDPM Eq. 4]
    """
    compare_all_t(schedule)


def compare_chains(schedule: NoiseSchedule, x0: float, seed: int, count: int) -> None:
    """Mean and variance of many random chains, all begun at x0, against the closed form."""
    x = torch.full((count, 1, 1, 1), x0, dtype=torch.float64)
    for t in range(1, schedule.T + 1):
        x = schedule.q_step(x, t, normal(seed + t, count, 1, 1, 1))
    mean = schedule.alpha_bar[-1].sqrt().item() * x0
    variance = 1 - schedule.alpha_bar[-1].item()
    assert abs(x.mean().item() - mean) < 5.5 * math.sqrt(variance / count)
    assert abs(x.var().item() / variance - 1) < 5.5 * math.sqrt(2 / count)


@settings(max_examples=10)
@given(schedules(), st.floats(-1, 1), SEED)
def test_closed_form_equals_iterated_noising_by_monte_carlo(schedule, x0, seed):
    """40,000 random chains end with mean sqrt(alpha_bar_T) x_0, variance 1 - alpha_bar_T.

    [DDPM Eq. 4] The mean of N numbers has the standard error sigma/sqrt(N). The square of a
    standard normal number has variance 2, so their variance has sigma^2 sqrt(2/N). Allowed are 5.5
    of them, a false alarm with probability 3.8e-8 a number, 7.6e-7 for the 20 numbers of all
    examples. A mean wrong by 4.3 % of sigma or a variance wrong by 6.1 % is noticed with 99.9 %.
    """
    compare_chains(schedule, x0, seed, 40_000)


@on_shipped
def test_closed_form_equals_iterated_noising_by_monte_carlo_on_shipped_schedules(schedule):
    """10,000 chains of 1,000 steps, as above: sqrt(alpha_bar_T) x_0 and 1 - alpha_bar_T.

    [DDPM Eq. 4] A mean wrong by 8.6 % of sigma or a variance wrong by 12.2 % is noticed. The four
    numbers give a false alarm with probability 1.5e-7.
    """
    compare_chains(schedule, 0.7, 0, 10_000)


def compare_jump(schedule: NoiseSchedule, s: int, t: int) -> None:
    """The steps s+1..t, composed one by one, against the single step of step_beta(t, s).

    And put after x_s of the closed form, they must give x_t of the closed form.
    """
    # Mean and variance of x_t, if x_s = 1.
    mean = 1.0
    variance = 0.0
    for k in range(s + 1, t + 1):
        g = schedule.q_step(ONE, k, ZERO).item()
        sigma = schedule.q_step(ZERO, k, ONE).item()
        mean = g * mean
        variance = g * g * variance + sigma * sigma

    # Each is a product or sum of at most T rounded numbers, or 1 minus a quotient of two such.
    tolerance = 1e-14 + 1e-15 * schedule.T
    beta = schedule.step_beta(t, s).item()
    close(mean**2, 1 - beta, tolerance)
    close(variance, beta, tolerance)

    mean_s = schedule.q_sample(ONE, s, ZERO).item()
    variance_s = schedule.q_sample(ZERO, s, ONE).item() ** 2
    close(mean * mean_s, schedule.q_sample(ONE, t, ZERO).item(), tolerance)
    close(mean**2 * variance_s + variance, schedule.q_sample(ZERO, t, ONE).item() ** 2, tolerance)


@given(schedules(), st.data())
def test_any_two_jumps_compose(schedule, data):
    """From 0 to s at once, then step by step to t, is from 0 to t, for any s < t. [DDPM Eq. 4]

    And the steps from s to t are one step of beta = step_beta(t, s).
    """
    t = data.draw(st.integers(1, schedule.T))
    s = data.draw(st.integers(0, t - 1))
    compare_jump(schedule, s, t)


@on_shipped
def test_jumps_compose_on_shipped_schedules(schedule):
    """alpha_bar_t = alpha_bar_s (alpha_{s+1} ... alpha_t) at T = 1000, a grid of s < t.

    [DDPM Eq. 4]
    """
    for s, t in itertools.combinations([0, 1, 10, 300, 900, 999, 1000], 2):
        compare_jump(schedule, s, t)


def compare_two_jumps(schedule: NoiseSchedule, r: int, s: int, t: int) -> None:
    first = schedule.step_beta(s, r).item()
    second = schedule.step_beta(t, s).item()
    both = schedule.step_beta(t, r).item()
    tolerance = 1e-14 + 1e-15 * schedule.T
    close(1 - both, (1 - first) * (1 - second), tolerance)
    close(both, (1 - second) * first + second, tolerance)


@given(schedules(), st.data())
def test_jumps_are_associative(schedule, data):
    """From r to s to t is from r to t, for any r < s < t, in one jump or in two. [DDPM Eq. 4]

    A jump of b = step_beta keeps 1 - b of the variance that was there and adds b. So
    1 - b(t,r) = (1 - b(s,r)) (1 - b(t,s)), and b(t,r) = (1 - b(t,s)) b(s,r) + b(t,s).
    """
    three = st.lists(st.integers(0, schedule.T), min_size=3, max_size=3, unique=True)
    r, s, t = sorted(data.draw(three))
    compare_two_jumps(schedule, r, s, t)


@on_shipped
def test_jumps_are_associative_on_shipped_schedules(schedule):
    """1 - b(t,r) = (1 - b(s,r)) (1 - b(t,s)) at T = 1000, a grid of r < s < t. [DDPM Eq. 4]"""
    for r, s, t in itertools.combinations([0, 1, 10, 300, 900, 999, 1000], 3):
        compare_two_jumps(schedule, r, s, t)


def test_noise_level_zero_is_the_image():
    """alpha_bar_0 = 1: x_0 comes back untouched from q_sample and predict_x0 at t = 0."""
    x0 = normal(0, 3, 1, 4, 4)
    eps = normal(1, 3, 1, 4, 4)
    assert torch.equal(SHIPPED[0].q_sample(x0, 0, eps), x0)
    assert torch.equal(SHIPPED[0].predict_x0(x0, 0, eps), x0)


# ------------------------------------------------------------------------ the exact step back

def posterior_weights(schedule: NoiseSchedule, t: int, t_prev: int | None = None):
    """The factors of x_0 and x_t in the posterior mean, and the variance, read off the code."""
    c0, variance = schedule.q_posterior(ONE, ZERO, t, t_prev)
    ct, _ = schedule.q_posterior(ZERO, ONE, t, t_prev)
    return c0.item(), ct.item(), variance.item()


@given(schedules_and_t(), st.data())
def test_posterior_leads_back_into_the_forward_process(drawn, data):
    """Noise to t, then one exact step back to s, is as noising to s. [DDPM Eq. 7]

    Mean: c_0 + c_t sqrt(alpha_bar_t) = sqrt(alpha_bar_s). Variance: c_t^2 (1 - alpha_bar_t) +
    variance = 1 - alpha_bar_s. For s = t-1 and for any smaller s.
    """
    schedule, t = drawn
    now = schedule.alpha_bar[t]
    for s in (t - 1, data.draw(st.integers(0, t - 1))):
        then = schedule.alpha_bar[s]
        c0, ct, variance = posterior_weights(schedule, t, s)
        close(c0 + ct * now.sqrt(), then.sqrt(), 1e-10)
        close(ct**2 * (1 - now) + variance, 1 - then, 1e-10)
    assert posterior_weights(schedule, t) == posterior_weights(schedule, t, t - 1)


@given(schedules_and_t(), SEED)
def test_both_forms_of_the_posterior_mean_agree(drawn, seed):
    """c_0 x_0 + c_t x_t = (x_t - beta_t/sqrt(1-alpha_bar_t) eps)/sqrt(alpha_t). [DDPM Eq. 11]

    For any x_t and eps, with the x_0 that they imply; x_0 is up to 1/sqrt(alpha_bar_t) large.
    """
    schedule, t = drawn
    xt, eps = (normal(seed + k, 2, 1, 3, 3) for k in range(2))
    mean, _ = schedule.q_posterior(schedule.predict_x0(xt, t, eps), xt, t)
    beta = schedule.beta[t].item()
    alpha_bar = schedule.alpha_bar[t].item()
    by_noise = (xt - beta / math.sqrt(1 - alpha_bar) * eps) / math.sqrt(1 - beta)
    close(mean, by_noise, 1e-9)


def compare_with_bayes(schedule: NoiseSchedule, t: int, x0: float, xt: float) -> None:
    """q_posterior against the product of two densities on a fine grid, by summation."""
    beta = schedule.beta[t].item()
    before = schedule.alpha_bar[t - 1].item()
    # Both densities as functions of y = x_{t-1}: q(x_t | y) has its top at a and the variance va,
    # q(y | x_0) has b and vb. Their product is narrower than each, which tells where to put the
    # grid: 12 standard deviations around, 120 points in each. A sum over so fine a grid equals the
    # integral of a Gaussian to rounding.
    a = xt / math.sqrt(1 - beta)
    va = beta / (1 - beta)
    b = math.sqrt(before) * x0
    vb = 1 - before
    width = math.sqrt(min(va, vb))
    middle = a if va < vb else b
    reach = abs(a - b) + 12 * width
    y = torch.linspace(middle - reach, middle + reach, 1 + int(120 * 2 * reach / width),
                       dtype=torch.float64)
    log = -(xt - math.sqrt(1 - beta) * y) ** 2 / (2 * beta) - (y - b) ** 2 / (2 * vb)
    weight = (log - log.max()).exp()
    mean = (weight * y).sum() / weight.sum()
    variance = (weight * (y - mean) ** 2).sum() / weight.sum()
    code_mean, code_variance = schedule.q_posterior(x0 * ONE, xt * ONE, t)
    # The logarithms are as large as x_t^2/beta <= 4e5, and rounded as much: 1e-10.
    close(code_mean.item(), mean, 1e-8)
    close(code_variance.item() / variance, 1, 1e-8)
    close(code_variance.item() / schedule.beta_tilde[t].item(), 1, 1e-10)


@FEW
@given(schedules_and_t(lowest=2), st.floats(-1, 1), st.floats(-2, 2))
def test_posterior_is_bayes_rule(drawn, x0, xt):
    """q(x_{t-1} | x_t, x_0) = q(x_t | x_{t-1}) q(x_{t-1} | x_0) / q(x_t | x_0). [DDPM Eq. 6]

    Checked by brute force: mean and variance of the product on the right, summed on a grid.
    """
    compare_with_bayes(*drawn, x0, xt)


@on_shipped
@pytest.mark.parametrize("t", [2, 10, 500, 1000])
def test_posterior_is_bayes_rule_on_shipped_schedules(schedule, t):
    """q(x_{t-1} | x_t, x_0) ~ q(x_t | x_{t-1}) q(x_{t-1} | x_0) at T = 1000. [DDPM Eq. 6]"""
    compare_with_bayes(schedule, t, 0.8, -0.3)


@given(schedules())
def test_posterior_variance_lies_between_zero_and_beta(schedule):
    """beta_tilde_1 = 0 and the mean at t = 1 is x_0; 0 < beta_tilde_t < beta_t for t > 1.

    [DDPM Eq. 7]
    """
    assert schedule.beta_tilde[1] == 0
    c0, ct, variance = posterior_weights(schedule, 1)
    assert (c0, ct, variance) == (1, 0, 0)
    assert (schedule.beta_tilde[2:] > 0).all()
    assert (schedule.beta_tilde[1:] < schedule.beta[1:]).all()


def half_a_digit(number: str) -> float:
    """Half a unit of the last digit that is given."""
    return 0.5 * 10.0 ** -len(number.split(".")[1])


def test_golden_ratio_of_the_two_variances():
    """beta/beta_tilde of the default schedule at t = 2, 10, 100, 1000, computed elsewhere.

    So beta exceeds beta_tilde by 17 % at t = 10 and by 2 % at t = 100; it falls all the way.
    """
    ratio = SHIPPED[0].beta / SHIPPED[0].beta_tilde
    assert (ratio[3:] < ratio[2:-1]).all()
    for t, golden in ((2, "2.1991"), (10, "1.1725"), (100, "1.0184"), (1000, "1.0000008")):
        assert abs(ratio[t].item() - float(golden)) < half_a_digit(golden)


# ------------------------------------------------------------------- image, noise, and their ratio

@given(schedules_and_t(), SEED)
def test_image_and_noise_convert_into_each_other(drawn, seed):
    """x_0 -> x_t -> x_0 and eps -> x_t -> eps are identities. [DDPM Eq. 4]

    The first divides by sqrt(alpha_bar_t) >= 1e-4, the second by sqrt(1 - alpha_bar_t) >= 3e-3.
    """
    schedule, t = drawn
    x0, eps = (normal(seed + k, 2, 1, 3, 3) for k in range(2))
    xt = schedule.q_sample(x0, t, eps)
    close(schedule.predict_x0(xt, t, eps), x0, 1e-14 / schedule.alpha_bar[t].sqrt().item())
    close(schedule.predict_eps(xt, t, x0), eps, 1e-12)


@given(schedules())
def test_signal_to_noise_ratio_falls(schedule):
    """SNR_t = alpha_bar_t/(1 - alpha_bar_t), infinite at 0 and strictly falling. [VDM Eq. 2]

    The weight of step t in the bound, beta_t^2/(2 beta_tilde_t alpha_t (1 - alpha_bar_t)), is
    (SNR_{t-1}/SNR_t - 1)/2. [DDPM Eq. 12]
    """
    snr = schedule.snr(torch.arange(schedule.T + 1))
    assert snr[0] == math.inf and (snr[1:] < snr[:-1]).all()
    last = schedule.alpha_bar[-1].item()
    close(schedule.snr(schedule.T).item() * (1 - last) / last, 1, 1e-15)
    for t in range(2, schedule.T + 1):
        weight = schedule.beta[t]**2 / (2 * schedule.beta_tilde[t] * schedule.alpha[t]
                                        * (1 - schedule.alpha_bar[t]))
        close(weight, (snr[t - 1] / snr[t] - 1) / 2, 1e-9)


@on_shipped
def test_all_these_laws_hold_at_every_t_of_the_shipped_schedules(schedule):
    """T = 1000, linear and cosine: each image of a batch of 1000 has its own t = 1..1000.

    Posterior: mean and variance lead back to q(x_{t-1} | x_0) [DDPM Eq. 7], both forms of the mean
    agree [DDPM Eq. 11], 0 <= beta_tilde_t < beta_t. Image and noise convert into each other
    [DDPM Eq. 4]. SNR falls [VDM Eq. 2], and the weight of the bound follows from it.
    1 - alpha_bar_t is off by about u relative to alpha_bar_{t-1}: t u/(1 - alpha_bar_t) < 1e-11.
    """
    t = torch.arange(1, 1001)
    ones = ONE.expand(1000, 1, 1, 1)
    zeros = ZERO.expand(1000, 1, 1, 1)
    alpha_bar = schedule.alpha_bar[1:]
    before = schedule.alpha_bar[:-1]  # alpha_bar of the step before
    c0, variance = (v.flatten() for v in schedule.q_posterior(ones, zeros, t))
    ct = schedule.q_posterior(zeros, ones, t)[0].flatten()
    close(c0 + ct * alpha_bar.sqrt(), before.sqrt(), 1e-11)
    close(ct**2 * (1 - alpha_bar) + variance, 1 - before, 1e-11)
    close(variance, schedule.beta_tilde[1:], 1e-11)
    assert variance[0] == 0 and (variance[1:] > 0).all() and (variance < schedule.beta[1:]).all()

    x0, xt, eps = (normal(k, 1000, 1, 2, 2) for k in range(3))
    by_image, _ = schedule.q_posterior(schedule.predict_x0(xt, t, eps), xt, t)
    beta = schedule.beta[1:].reshape(-1, 1, 1, 1)
    noise = (1 - alpha_bar).sqrt().reshape(-1, 1, 1, 1)
    by_noise = (xt - beta / noise * eps) / (1 - beta).sqrt()
    close(by_image, by_noise, 1e-10)
    noisy = schedule.q_sample(x0, t, eps)
    error = (schedule.predict_x0(noisy, t, eps) - x0).abs().amax(dim=(1, 2, 3))
    assert (error < 1e-14 / alpha_bar.sqrt()).all()
    close(schedule.predict_eps(noisy, t, x0), eps, 1e-12)

    snr = schedule.snr(torch.arange(1001))
    assert (snr[1:] < snr[:-1]).all()
    weight = schedule.beta[2:]**2 / (2 * schedule.beta_tilde[2:] * schedule.alpha[2:]
                                     * (1 - schedule.alpha_bar[2:]))
    close(weight, (snr[1:-1] / snr[2:] - 1) / 2, 1e-10)


# --------------------------------------------------------------------------------- the bound

# The bound is a sum of Kullback-Leibler divergences, KL(q || p) = integral of q ln(q/p): how much a
# wrong p costs, in nats, which are bits times ln 2. For two Gaussians of mean m, m' and variance
# v, v' the integral is (r - 1 - ln r)/2 + (m - m')^2/(2 v'), with r = v/v'.

def log_density(y: torch.Tensor, mean: float, variance: float) -> torch.Tensor:
    """Logarithm of the density of N(mean, variance) at y."""
    return -(y - mean) ** 2 / (2 * variance) - math.log(2 * math.pi * variance) / 2


@FEW
@given(schedules_and_t(lowest=2), st.floats(-1, 1), st.floats(-2, 2), st.floats(-2, 2),
       st.floats(1, 3))
def test_term_of_the_bound_is_a_weighted_error_of_the_noise(drawn, x0, eps, eps_hat, ratio):
    """KL(q(x_{t-1}|x_t,x_0) || p) = weight (eps - eps_hat)^2 + (r - 1 - ln r)/2.

    [DDPM Eq. 8] for the left side, an integral by summation on a fine grid; [DDPM Eq. 12] for the
    weight beta_t^2/(2 sigma^2 alpha_t (1 - alpha_bar_t)). The network's step has the variance
    sigma^2, the exact one beta_tilde_t, and r = beta_tilde_t/sigma^2 = 1/ratio.
    """
    schedule, t = drawn
    xt = schedule.q_sample(x0 * ONE, t, eps * ONE)
    exact, variance = (v.item() for v in schedule.q_posterior(x0 * ONE, xt, t))
    guess = schedule.q_posterior(schedule.predict_x0(xt, t, eps_hat * ONE), xt, t)[0].item()
    sigma2 = ratio * variance
    # The grid covers 12 standard deviations of q with 100 points in each.
    y = exact + math.sqrt(variance) * torch.linspace(-12, 12, 2401, dtype=torch.float64)
    log_q = log_density(y, exact, variance)
    integral = (log_q.exp() * (log_q - log_density(y, guess, sigma2))).sum() * (y[1] - y[0])
    beta = schedule.beta[t].item()
    alpha_bar = schedule.alpha_bar[t].item()
    weight = beta**2 / (2 * sigma2 * (1 - beta) * (1 - alpha_bar))
    spread = (1 / ratio - 1 + math.log(ratio)) / 2
    close(integral, weight * (eps - eps_hat) ** 2 + spread, 2e-9)


def bound(schedule: NoiseSchedule, mu: float, lam: float, sigma2) -> float:
    """The three kinds of terms of the bound for data N(mu, lam) and the best network, in nats.

    The best guess at x_0 has the error Var(x_0 | x_t) = lam (1 - alpha_bar_t)/v_t, with
    v_t = alpha_bar_t lam + 1 - alpha_bar_t. sigma2(t) is the variance of the model's step. That of
    t = 1 says how well x_1 tells x_0, and must not be 0 here: a density is wanted. (The sampler,
    which wants an image, adds no noise there.)
    """
    alpha_bar = schedule.alpha_bar.tolist()
    end = alpha_bar[-1]
    # KL(q(x_T | x_0) || N(0, 1)), of which the mean over x_0 is taken: E x_0^2 = mu^2 + lam.
    total = (end * (mu**2 + lam) + (1 - end) - 1 - math.log(1 - end)) / 2
    for t in range(1, schedule.T + 1):
        c0, _, variance = posterior_weights(schedule, t)
        error = lam * (1 - alpha_bar[t]) / (alpha_bar[t] * lam + 1 - alpha_bar[t])
        if t == 1:  # -ln p(x_0 | x_1), with the mean squared error in place of (x_0 - x0_hat)^2
            total += math.log(2 * math.pi * sigma2(1)) / 2 + error / (2 * sigma2(1))
        else:
            r = variance / sigma2(t)
            total += (r - 1 - math.log(r)) / 2 + c0**2 * error / (2 * sigma2(t))
    return total


def exact_step(schedule: NoiseSchedule, lam: float):
    """Variance of x_{t-1} given x_t for data N(mu, lam): v_{t-1} - alpha_t v_{t-1}^2/v_t."""
    v = [a * lam + 1 - a for a in schedule.alpha_bar.tolist()]
    # As v_t = alpha_t v_{t-1} + beta_t, it is v_{t-1} beta_t/v_t, without a difference.
    return lambda t: v[t - 1] * schedule.beta[t].item() / v[t]


def closed_bound(schedule: NoiseSchedule, mu: float, lam: float) -> float:
    """Entropy of the data plus KL(q(x_T) || N(0, 1)): what no model of the chain can beat.

    N(mu, lam) has the entropy ln(2 pi e lam)/2; x_T has mean sqrt(alpha_bar_T) mu and variance v.
    """
    end = schedule.alpha_bar[-1].item()
    v = end * lam + 1 - end
    return (math.log(2 * math.pi * math.e * lam) + v + end * mu**2 - 1 - math.log(v)) / 2


@given(schedules(), st.floats(-1, 1), st.floats(0.01, 2))
def test_bound_closes_for_gaussian_data(schedule, mu, lam):
    """With the exact steps back, the bound is H(x_0) + KL(q(x_T) || p(x_T)), nothing lost.

    [DDPM Eq. 3] is the bound, [DDPM Eq. 5] its split into the terms that are added up here. A wrong
    factor of x_0 or a wrong variance in the posterior leaves a gap. The terms hold 1 - alpha_bar
    in denominators, so 2e-11 times their sum, of order T, is the rounding to be expected.
    """
    close(bound(schedule, mu, lam, exact_step(schedule, lam)), closed_bound(schedule, mu, lam),
          1e-9)


@pytest.mark.parametrize("lam, variance, golden", [
    (1, "beta", "0.00000000"), (1, "beta_tilde", "0.46489"), (0.27, "beta", "0.00096605"),
    (0.27, "beta_tilde", "0.45697"), (0.01, "beta", "0.019564"), (0.01, "beta_tilde", "0.39158")])
def test_price_of_another_variance(lam, variance, golden):
    """The bound exceeds its closed form by the sum of (r - 1 - ln r)/2, r = exact/sigma^2.

    [DDPM section 3.2] Nats per pixel over the steps t = 2..1000 of the default schedule. The golden
    numbers were computed elsewhere and are compared to the last digit given.
    """
    schedule = SHIPPED[0]
    exact = exact_step(schedule, lam)
    chosen = getattr(schedule, variance)

    def sigma2(t):
        return chosen[t].item() if t > 1 else exact(1)

    excess = bound(schedule, 0.3, lam, sigma2) - closed_bound(schedule, 0.3, lam)
    by_ratio = sum((r - 1 - math.log(r)) / 2
                   for r in (exact(t) / sigma2(t) for t in range(2, 1001)))
    assert abs(excess - by_ratio) < 1e-9
    assert abs(excess - float(golden)) < half_a_digit(golden)


# ---------------------------------------------------------------------------- shapes and refusals

@given(st.integers(1, 5), SEED)
def test_each_image_has_its_own_t(batch, seed):
    """A batch with a t for each image equals the images one by one, in float32 and float64."""
    schedule = SHIPPED[0]
    t = torch.randint(1, 1001, (batch,), generator=torch.Generator().manual_seed(seed))
    for dtype in (torch.float32, torch.float64):
        x, eps = (normal(seed + i, batch, 1, batch, batch, dtype=dtype) for i in (0, 1))
        for method in (schedule.q_step, schedule.q_sample, schedule.predict_x0,
                       schedule.predict_eps):
            together = method(x, t, eps)
            assert together.dtype == dtype and together.shape == x.shape
            for i in range(batch):
                assert torch.equal(together[i:i + 1], method(x[i:i + 1], int(t[i]), eps[i:i + 1]))
        mean, variance = schedule.q_posterior(x, eps, t)
        assert mean.shape == x.shape and variance.shape == (batch, 1, 1, 1)


@on_shipped
def test_float32_factors_are_rounded_once(schedule):
    """For images in float32 the factors are those of float64, cast at the end: off by 6e-8.

    The difference 1 - alpha_bar_1 = 1e-4 taken in float32 would be off by 0.02 % of itself.
    """
    in_float32 = 1 - torch.tensor(1 - 1e-4, dtype=torch.float32)
    assert f"{abs(in_float32.item() / 1e-4 - 1):.2%}" == "0.02%"
    one, zero = ONE.float(), ZERO.float()
    for t in (1, 2, 3, 10, 500, 998):
        pairs = []  # the factor in float64, and in float32
        for method in (schedule.q_step, schedule.q_sample):
            pairs.append((method(ONE, t, ZERO), method(one, t, zero)))
            pairs.append((method(ZERO, t, ONE), method(zero, t, one)))
        pairs += zip(schedule.q_posterior(ONE, ZERO, t), schedule.q_posterior(one, zero, t))
        pairs += zip(schedule.q_posterior(ZERO, ONE, t), schedule.q_posterior(zero, one, t))
        for exact, rounded in pairs:
            assert rounded.dtype == torch.float32
            assert abs(rounded.item() - exact.item()) <= 6e-8 * exact.item()


@pytest.mark.parametrize("make, message", [
    (lambda: NoiseSchedule(T=1), "at least 2 steps"),
    (lambda: NoiseSchedule(T=-5), "at least 2 steps"),
    (lambda: NoiseSchedule(kind="quadratic"), "known are linear, cosine"),
    (lambda: NoiseSchedule(beta_end=1.0), "between 0 and 1"),
    (lambda: NoiseSchedule(beta_start=0.0), "between 0 and 1"),
    (lambda: NoiseSchedule(beta_start=math.nan), "between 0 and 1"),
    (lambda: NoiseSchedule.from_betas([0.5, 1e-17]), "between 0 and 1"),
    (lambda: NoiseSchedule.from_betas([0.9999]), "at least 2 steps"),
    (lambda: NoiseSchedule.from_betas([[0.9, 0.99]]), "list of at least 2"),
    (lambda: NoiseSchedule.from_betas([1 - 1e-12] * 40), "too small"),
    (lambda: NoiseSchedule(20_000), "too small"),
    (lambda: NoiseSchedule(T=200), "36.4% of the image is left"),
    (lambda: NoiseSchedule(T=770), "of the image is left"),
])
def test_schedules_that_cannot_work_are_refused(make, message):
    """Each refusal is one line that says what is wrong and what to do."""
    with pytest.raises(ValueError, match=message.replace("(", r"\(")) as error:
        make()
    assert "\n" not in str(error.value)


def test_advice_on_leftover_signal_works():
    """Following the advice makes the schedule acceptable; allow_signal accepts it as it is.

    The limit is sqrt(alpha_bar_T) = 0.02. Betas a little larger than advised leave less and are
    accepted; smaller ones leave more and are refused.
    """
    assert NoiseSchedule(T=200, allow_signal=True).alpha_bar[-1].sqrt() > 0.3
    with pytest.raises(ValueError) as error:
        NoiseSchedule(T=200)
    factor = float(re.search(r"about ([0-9.]+) times", str(error.value))[1])
    for scale, accepted in ((1.05, True), (0.9, False)):
        ends = {"beta_start": 1e-4 * factor * scale, "beta_end": 0.02 * factor * scale}
        left = NoiseSchedule(T=200, **ends, allow_signal=True).alpha_bar[-1].sqrt()
        assert (left < 0.02) == accepted
        if accepted:
            NoiseSchedule(T=200, **ends)
        else:
            with pytest.raises(ValueError, match="is left"):
                NoiseSchedule(T=200, **ends)
    NoiseSchedule(T=780)  # 1.9 %; with T = 770, above, it is 2.03 %
    NoiseSchedule(T=200, kind="cosine")


def test_impossible_arguments_are_errors():
    """No t wraps around, no noise is sought in a clean image, no image of bytes is used."""
    schedule = SHIPPED[0]
    x = normal(0, 2, 1, 4, 4)
    for t in (-1, 1001, torch.tensor([1, 1001])):
        for method in (schedule.q_step, schedule.q_sample, schedule.predict_x0,
                       schedule.predict_eps):
            with pytest.raises(ValueError, match="t must lie in"):
                method(x, t, x)
        with pytest.raises(ValueError, match="t must lie in"):
            schedule.q_posterior(x, x, t)
        with pytest.raises(ValueError, match="t must lie in"):
            schedule.snr(t)
    for method in (schedule.q_step, schedule.predict_eps):
        with pytest.raises(ValueError, match="t must lie in 1..1000"):
            method(x, 0, x)
    with pytest.raises(ValueError, match="t_prev must be below t"):
        schedule.q_posterior(x, x, 5, 5)
    for call in (lambda: schedule.step_beta(0), lambda: schedule.step_beta(5, -1),
                 lambda: schedule.q_posterior(x, x, 5, -1)):
        with pytest.raises(ValueError, match="t must lie in"):
            call()
    with pytest.raises(ValueError, match="3 values of t for a batch of 2"):
        schedule.q_sample(x, torch.tensor([1, 2, 3]), x)
    with pytest.raises(TypeError, match="floating point"):
        schedule.q_sample(x.to(torch.uint8), 1, x)
    for t in (0.5, torch.tensor([1.0, 2.0]), True, torch.tensor([[1, 2]])):
        with pytest.raises(TypeError, match="ints"):
            schedule.q_sample(x, t, x)


def numbers(line: str) -> list[float]:
    """The numbers of a line of a printed table."""
    return [float(word) for word in line.split()]


def test_script_prints_table_and_comparison(capsys):
    """python schedule.py shows t = 0, 1 and T, and refuses a T that leaves the image visible."""
    script.main([])
    lines = capsys.readouterr().out.splitlines()

    # The table: a line of titles, then t = 0, which has no decibels, then t = 1, 100, ..., 1000.
    assert lines[1].split()[:3] == ["0", "0.000000", "1"] and "inf" in lines[1]
    assert lines[12].split()[:3] == ["1000", "0.020000", "4.036e-05"]
    betas = SHIPPED[0].beta.tolist()
    for line in lines[2:13]:
        t, beta, alpha_bar, decibel, beta_tilde = numbers(line)
        signal = math.prod(1 - b for b in betas[1:int(t) + 1])
        before = math.prod(1 - b for b in betas[1:int(t)])
        assert abs(alpha_bar / signal - 1) < 1e-3
        assert abs(decibel - 10 * math.log(signal / (1 - signal), 10)) < 0.051
        assert abs(beta_tilde - beta * (1 - before) / (1 - signal)) < 1.1e-6

    # The comparison. The script's seed is fixed, so this cannot fail by chance; with 20,000 chains
    # 4.5 standard errors are allowed.
    assert "20,000 chains" in lines[14]
    assert [numbers(line)[0] for line in lines[16:]] == [200, 400, 600, 800, 1000]
    for line in lines[16:]:
        t, mean, closed_mean, std, closed_std = numbers(line)
        alpha_bar = math.prod(1 - b for b in betas[1:int(t) + 1])
        assert abs(closed_mean - alpha_bar**0.5 / 2) < 1e-4
        assert abs(closed_std - (1 - alpha_bar) ** 0.5) < 1e-4
        assert abs(mean - closed_mean) < 0.032
        assert abs(std - closed_std) < 0.023

    with pytest.raises(SystemExit) as exit_:
        script.main(["--T", "100"])
    assert exit_.value.code == 2


@pytest.mark.parametrize("name, options, defaults", [
    ("schedule", "--T --kind", "1000, linear"),
    ("train", "--epochs --batch-size --lr --dataset --labels --resume --quick",
     "15, 128, 0.003, mnist"),
    ("sample", "--seeds --sampler --eta --variance --steps --digits --classes --guidance --guide "
     "--interval --restarts --no-clip --checkpoint --out --gif",
     "0-31, ddpm, 0.0, beta_tilde, 1.0, all, auto"),
    ("plots", "--checkpoint --out --device", "auto")])
def test_help_shows_usage_and_defaults(name, options, defaults, capsys, monkeypatch):
    """--help of each script shows the usage, then each option; if the option takes a value, its
    default stands beside it. A mistake is answered in one line, without all that.
    """
    monkeypatch.setenv("COLUMNS", "1000")  # so that no text is broken into lines
    module = importlib.import_module(name)
    with pytest.raises(SystemExit) as exit_:
        module.main(["--help"])
    assert exit_.value.code == 0
    text = capsys.readouterr().out
    assert text.startswith("usage: ")
    for default in defaults.split(", "):
        assert f"(default: {default})" in text

    # From the name of each option to what is said about it.
    shown = {"-" + entry.split()[0]: entry for entry in text.split("\n  -")[1:]}
    assert set(options.split()) <= set(shown)
    # A flag such as --resume takes no value; and without --gif no animation is written.
    without = {option for option, entry in shown.items() if "(default: " not in entry}
    assert without <= {"-h,", "--resume", "--quick", "--labels", "--no-clip", "--gif", "--restarts",
                       "--digits", "--classes"}

    for mistake in (["--colour"], ["--device"]):
        with pytest.raises(SystemExit) as exit_:
            module.main(mistake)
        assert exit_.value.code == 2
        assert len(capsys.readouterr().err.splitlines()) == 1
