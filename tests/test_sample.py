"""The laws of the sampler: what each step does to mean and variance, and what decides a digit.

The oracle is data whose best noise prediction is known exactly. If x_0 ~ N(mu, lam) in every
pixel, then x_t ~ N(sqrt(alpha_bar) mu, v) with v = alpha_bar lam + 1 - alpha_bar, and

    eps*(x_t) = sqrt(1 - alpha_bar) (x_t - sqrt(alpha_bar) mu) / v.

With this predictor and without clipping a step is affine in x_t and in the noise, so the mean and
variance of the whole chain follow by a plain loop: no network, no randomness, no tolerance for
luck. What the loop must give is known from theory.

Tolerances are derived as in test_schedule.py: the factors of a step are good to 2e-11, so a chain
of at most 40 steps is good to 1e-9. Tests that draw random numbers say how many standard errors
they allow, how likely a false alarm is, and which error they notice with 99.9 %. Such an error is
3.1 standard errors larger than what is allowed.
"""

import json
import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image
from torchvision.transforms.functional import pil_to_tensor
from torchvision.utils import make_grid

import sample as script
import train
from sample import (SAMPLERS, VARIANCES, ddim_step, dpm_step, p_step, parse_seeds, sample,
                    timesteps, to_uint8)
from schedule import NoiseSchedule
from strategies import FEW, SEED, normal, pictures, schedules, schedules_and_t


LINEAR = NoiseSchedule()
STEEP = NoiseSchedule.from_betas(torch.linspace(0.2, 0.8, 10, dtype=torch.float64),
                                 allow_signal=True)
ONE, ZERO = (torch.full((1, 1, 1, 1), v, dtype=torch.float64) for v in (1.0, 0.0))


class Gaussian(torch.nn.Module):
    """The exact noise predictor for data N(mu, lam) in every pixel; stands in for the network."""

    def __init__(self, schedule, mu: float, lam: float):
        super().__init__()
        self.schedule, self.mu, self.lam = schedule, mu, lam
        self.weight = torch.nn.Parameter(torch.zeros(()))  # so that it is on a device
        self.calls = []

    def forward(self, xt, t):
        self.calls.append(int(t[0]))
        alpha_bar = self.schedule.alpha_bar[t].reshape(-1, 1, 1, 1).to(xt.dtype)
        v = alpha_bar * self.lam + 1 - alpha_bar
        return (1 - alpha_bar).sqrt() * (xt - alpha_bar.sqrt() * self.mu) / v


def affine(schedule, t, lam, variance, t_prev=None):
    """(a, b) with x_{t-1} = a x_t + b noise for data N(0, lam), read off the real p_step."""
    t_ = torch.tensor([t])
    eps = Gaussian(schedule, 0.0, lam)(ONE, t_)
    a = p_step(schedule, ONE, t, eps, ZERO, t_prev, variance, clip=False).item()
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
    code = chain_variances(schedule, lam, variance)
    alpha_bar, V, M, mean = [1.0], 1.0, 0.0, 0.0
    for beta in schedule.beta[1:].tolist():
        alpha_bar.append(alpha_bar[-1] * (1 - beta))
    v = [a * lam + 1 - a for a in alpha_bar]
    for t in range(schedule.T, 0, -1):
        beta = schedule.beta[t].item()
        if v[t - 1] == 0:  # lam = 0 and t = 1: the chain lands on the point
            gain = 0.0
        else:
            gain = math.sqrt(1 - beta) * v[t - 1] / v[t]
        sigma2 = {"beta": beta, "zero": 0.0,
                  "beta_tilde": beta * (1 - alpha_bar[t - 1]) / (1 - alpha_bar[t])}[variance]
        V = gain**2 * V + (sigma2 if t > 1 else 0.0)
        assert abs(code[t - 1] - V) < 1e-9 * max(1, V)
        eps = Gaussian(schedule, mu, lam)(mean * ONE, torch.tensor([t]))
        mean = p_step(schedule, mean * ONE, t, eps, ZERO, variance=variance, clip=False).item()
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
    T, alpha_bar = schedule.T, schedule.alpha_bar
    v = chain_variances(schedule, 0.0, "beta_tilde", start=1 - alpha_bar[T].item())
    mean = alpha_bar[T].sqrt().item() * c
    for t in range(T, 0, -1):
        eps = Gaussian(schedule, c, 0.0)(mean * ONE, torch.tensor([t]))
        mean = p_step(schedule, mean * ONE, t, eps, ZERO, clip=False).item()
        assert abs(mean - alpha_bar[t - 1].sqrt().item() * c) < 1e-9
        assert abs(v[t - 1] - (1 - alpha_bar[t - 1].item())) < 1e-9
    wrong = chain_variances(schedule, 0.0, "beta", start=1 - alpha_bar[T].item())
    assert wrong[1] > v[1]


def test_no_other_variance_keeps_the_marginals_of_a_point():
    """Data a point, sigma^2 = beta: Var x_t > 1 - alpha_bar_t at every t from T-1 to 1. With
    sigma^2 = 0 it is smaller. [DDPM section 3.2]

    At t = 0 all three land on the point. Seen on the default schedule and on ten steep steps.
    """
    for schedule in (LINEAR, STEEP):
        start = 1 - schedule.alpha_bar[-1].item()
        beta, zero = (chain_variances(schedule, 0.0, name, start) for name in ("beta", "zero"))
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
    tilde, beta = (affine(schedule, t, lam, name)[1] ** 2 for name in ("beta_tilde", "beta"))

    def exact(lam):
        before, now = (schedule.alpha_bar[s].item() * lam + 1 - schedule.alpha_bar[s].item()
                       for s in (t - 1, t))
        return before - schedule.alpha[t].item() * before**2 / now

    assert tilde < beta
    assert tilde - 1e-12 <= exact(lam) <= beta + 1e-12
    assert abs(exact(0.0) - tilde) < 1e-12 and abs(exact(1.0) - beta) < 1e-12
    before, now = (1 + 3 * schedule.alpha_bar[s].item() for s in (t - 1, t))  # v for lam = 4
    assert before / now > 1
    assert abs(exact(4.0) - before / now * beta) < 1e-12


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


@given(schedules_and_t(), SEED, st.booleans())
def test_last_step_ignores_the_noise(drawn, seed, clip):
    """x_0 = x0_hat: a step that ends at t = 0 ignores the noise, whatever the variance.

    [DDPM Algorithm 2] With a step from t = 1, or a longer one that ends at 0.
    """
    schedule, t = drawn
    xt, eps_hat = normal(seed, 2, 1, 3, 3), normal(seed + 1, 2, 1, 3, 3)
    for variance in VARIANCES:
        results = [p_step(schedule, xt, t, eps_hat, normal(seed + k, 2, 1, 3, 3), 0, variance,
                          clip) for k in (2, 3)]
        assert torch.equal(*results)
        x0_hat = schedule.predict_x0(xt, t, eps_hat)
        expected = x0_hat.clamp(-1, 1) if clip else x0_hat
        assert (results[0] - expected).abs().max() <= 1e-12 * expected.abs().max()


@given(schedules_and_t(), SEED)
def test_unclipped_mean_is_the_papers(drawn, seed):
    """x_{t-1} = (x_t - beta_t/sqrt(1 - alpha_bar_t) eps_hat)/sqrt(alpha_t) + sigma_t z.

    [DDPM Eq. 11] for the mean, [DDPM Algorithm 2] for the step.
    """
    schedule, t = drawn
    xt, eps_hat, z = (normal(seed + k, 2, 1, 3, 3) for k in range(3))
    beta, alpha_bar = schedule.beta[t].item(), schedule.alpha_bar[t].item()
    mean = (xt - beta / math.sqrt(1 - alpha_bar) * eps_hat) / math.sqrt(1 - beta)
    for variance, sigma2 in (("beta", beta), ("beta_tilde", schedule.beta_tilde[t].item()),
                             ("zero", 0.0)):
        expected = mean + (math.sqrt(sigma2) if t > 1 else 0.0) * z
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


# --------------------------------------------------------------------- the chain, with real noise

def last(chain):
    for t, x, _ in chain:
        pass
    assert t == 0
    return x


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
    mean, expected = 0.0, {}
    for t in range(10, 0, -1):
        a, _ = affine(STEEP, t, lam, variance)
        # The fixed point of the mean is the forward process's: deviations from it shrink by a.
        mean = (STEEP.alpha_bar[t - 1].sqrt().item() * mu
                + a * (mean - STEEP.alpha_bar[t].sqrt().item() * mu))
        expected[t - 1] = mean, variances[t - 1]
    chain = sample(Gaussian(STEEP, mu, lam), STEEP, list(range(40)), variance=variance, clip=False)
    compare_at_every_t(chain, expected, count)


@pytest.mark.parametrize("sampler, steps", [("ddpm", None), ("ddpm", 7), ("ddpm", 3),
                                            ("sde-dpm++", 7), ("sde-dpm++", 3)])
def test_sampled_chain_keeps_the_marginals_of_a_point(sampler, steps):
    """Data always c, sigma^2 = beta_tilde, from q(x_T): N(sqrt(alpha_bar_t) c, 1 - alpha_bar_t).

    [DDPM section 3.2] Real sample(), at every t that it visits, with long steps too; at t = 0 every
    pixel is c. It notices a mean wrong by 5 % of the spread and a variance wrong by 7.1 %; 50
    numbers have a false alarm with probability 3.4e-7. With sigma^2 = beta the variance is wrong.
    """
    c, count = 0.7, 40 * 28 * 28
    # The seed of this noise must not be one of the chain's 0..39, nor so near to the start of one.
    noise = normal(1000, 40, 1, 28, 28, dtype=torch.float32)
    x_T = STEEP.q_sample(torch.full((40, 1, 28, 28), c), 10, noise)
    alpha_bar = STEEP.alpha_bar.tolist()
    expected = {t: (math.sqrt(alpha_bar[t]) * c, 1 - alpha_bar[t])
                for t in ({None: range(10), 7: (9, 7, 6, 4, 3, 1, 0), 3: (7, 3, 0)}[steps])}

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
    x = torch.linspace(-5, 5, 2501, dtype=torch.float64)
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
            mean, sigma = step(x, t, ZERO), (step(x[:1], t, ONE) - step(x[:1], t, ZERO)).item()
            # Row i: where the chain goes from x_i. The narrowest has 3 points in a sigma.
            moved = (-(x - mean[:, None]) ** 2 / (2 * sigma**2)).exp() / (
                math.sqrt(2 * math.pi) * sigma)
            density = density @ moved * (x[1] - x[0])
        else:  # the last step adds no noise
            end = step(x, t, ZERO)
    return (density * (end > 0)).sum().item() * (x[1] - x[0]).item()


@pytest.mark.parametrize("variance", VARIANCES)
def test_chain_lands_on_two_points(variance):
    """x_0 is +a or -a for every pixel, and P(+a) is what the steps make of it.

    The data are not Gaussian, so 20 Gaussian steps back keep the quarter of +a only nearly; what
    they keep is known by integration. Among 31,360 pixels the share has a standard error of at most
    0.0029; 5.5 of them have a false alarm with probability 3.8e-8, and a share wrong by 0.025 is
    noticed. Without injected noise all of them end on the more frequent point.
    """
    a, count = 0.6, 40 * 28 * 28
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
        self.schedule, self.points = schedule, points  # (K, C, H, W)
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


# --------------------------------------------------------------------------------- the generator

@FEW
@given(schedules(max_T=12), SEED)
def test_chain_visits_every_level_once(schedule, seed):
    """(t, x_t, x0_hat) come for t = T, T-1, ..., 0; the network sees T..1, the paper's count."""
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
    """Image k is the same alone, among others, and in any order: the noise bit for bit."""
    model = Gaussian(STEEP, 0.1, 0.3)
    together = last(sample(model, STEEP, seeds, shape=(1, 4, 4)))
    k = data.draw(st.integers(0, len(seeds) - 1))
    assert torch.equal(together[k], last(sample(model, STEEP, [seeds[k]], shape=(1, 4, 4)))[0])
    backwards = last(sample(model, STEEP, seeds[::-1], shape=(1, 4, 4)))
    assert torch.equal(together, backwards.flip(0))


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
    quiet = last(sample(Gaussian(STEEP, 0.0, 0.3), STEEP, [1], shape=(1, 4, 4)))
    for _, x, _ in sample(model, STEEP, [1], shape=(1, 4, 4)):
        assert model.training and not x.requires_grad
    assert torch.equal(x, quiet)
    assert torch.is_grad_enabled()


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
    bound = None
    for t, xt, x0_hat in sample(Wild(schedule, 0, 1), schedule, [seed], variance=variance,
                                shape=(1, 4, 4)):
        assert x0_hat.abs().max() <= 1
        if bound is not None:
            assert (xt[0].abs() <= bound * (1 + 1e-5)).all()
        if t > 0:
            before, now = schedule.alpha_bar[t - 1].item(), schedule.alpha_bar[t].item()
            beta = schedule.beta[t].item()
            c0 = math.sqrt(before) * beta / (1 - now)
            ct = math.sqrt(1 - beta) * (1 - before) / (1 - now)
            sigma2 = {"zero": 0, "beta": beta, "beta_tilde": beta * (1 - before) / (1 - now)}
            sigma = math.sqrt(sigma2[variance]) if t > 1 else 0.0
            z = torch.randn(1, 4, 4, generator=generator)
            bound = c0 + ct * xt[0].abs() + sigma * z.abs()


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
    """T = tau_S > ... > tau_0 = 0, tau_k the integer next to k T/S; with ddpm all of T..0 by
    default, with ddim 50 and with sde-dpm++ 20 steps, or T if that is less. Another T than the
    schedule's begins there.
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
    plain, given_ = (last(sample(model, STEEP, [1, 2], steps=steps, shape=(1, 4, 4)))
                     for steps in (None, 10))
    assert torch.equal(plain, given_)


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
    now, then = schedule.alpha_bar[t].item(), schedule.alpha_bar[s].item()
    x0_hat = (xt - math.sqrt(1 - now) * eps_hat) / math.sqrt(now)
    sigma = eta * math.sqrt((1 - then) / (1 - now)) * math.sqrt(1 - now / then)
    expected = (math.sqrt(then) * x0_hat + math.sqrt(max(0, 1 - then - sigma**2)) * eps_hat
                + sigma * z)
    got = ddim_step(schedule, xt, t, schedule.predict_x0(xt, t, eps_hat), z, s, eta)
    assert (got - expected).abs().max() < 1e-7


@given(long_steps(), SEED, st.booleans())
def test_ddim_with_fresh_noise_is_the_ancestral_step(drawn, seed, clip):
    """eta = 1 is the step of ddpm with beta_tilde, with the same noise, clipped or not.

    [DDIM Eq. 16] So is that of the solver, if x0_hat did not change since the step before.
    """
    schedule, t, s = drawn
    xt, eps_hat, z = (normal(seed + k, 2, 1, 3, 3) for k in range(3))
    x0_hat = script.predict_clean(schedule, xt, t, eps_hat, clip)
    ddim = ddim_step(schedule, xt, t, x0_hat, z, s, eta=1.0)
    ddpm = p_step(schedule, xt, t, eps_hat, z, s, clip=clip)
    assert (ddim - ddpm).abs().max() < 1e-8 * max(1, x0_hat.abs().max())
    before = (t + 1, x0_hat) if t < schedule.T else None
    assert torch.equal(dpm_step(schedule, xt, t, x0_hat, z, s, before, eta=1.0), ddim)


@pytest.mark.parametrize("t", [1, 2, 10])
def test_chain_with_all_fresh_noise_is_that_of_ddpm(t):
    """Real sample(), in as many steps from any t: ddim with eta = 1 is ddpm, [DDIM Eq. 16], and so is
    sde-dpm++ in one step, which has nothing to extrapolate from."""
    model, xt = Gaussian(STEEP, 0.2, 0.3), normal(7, 2, 1, 4, 4, dtype=torch.float32)
    for sampler, steps in (("ddim", 1), ("ddim", 5), ("sde-dpm++", 1)):
        def chain(name, eta):
            return list(sample(model, STEEP, [3, 4], name, steps=steps, eta=eta, start=(t, xt),
                               shape=(1, 4, 4)))
        one, other = chain("ddpm", 0.0), chain(sampler, 1.0 if sampler == "ddim" else 0.0)
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
    x_T, model = normal(seed, 1, 1, 4, 4), Constant(schedule, c, 0.0)
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
@given(schedules(), SEED, st.data())
def test_solver_follows_the_paper(schedule, seed, data):
    """x_s = sigma_s/sigma_t x_t - sqrt(alpha_bar_s) (e^-h - 1) D, sigma^2 = 1 - alpha_bar, and
    D = (1 + 1/(2r)) x0_hat - 1/(2r) (x0_hat of the step before), with the lengths h in u and
    r = h_before/h. [DPM-Solver++ Algorithm 2]

    The first step and the last have D = x0_hat, so x_0 = x0_hat at the end. With fresh noise, in
    SDE-DPM-Solver++(2M), x_s = sigma_s/sigma_t e^-h x_t + sqrt(alpha_bar_s) (1 - e^-2h) D
    + sigma_s sqrt(1 - e^-2h) z.
    """
    before, t, s = sorted(data.draw(st.lists(st.integers(1, schedule.T), min_size=3, max_size=3,
                                             unique=True)), reverse=True) if schedule.T > 2 else (
        None, 2, 1)
    xt, x0_hat, x0_before, z = (normal(seed + k, 2, 1, 3, 3) for k in range(4))
    alpha_bar = schedule.alpha_bar.tolist()

    def u(t):
        return math.log(alpha_bar[t] / (1 - alpha_bar[t])) / 2

    def move(D, eta):
        ratio, h = math.sqrt((1 - alpha_bar[s]) / (1 - alpha_bar[t])), u(s) - u(t)
        if eta == 0:
            return ratio * xt - math.sqrt(alpha_bar[s]) * math.expm1(-h) * D
        return (ratio * math.exp(-h) * xt - math.sqrt(alpha_bar[s]) * math.expm1(-2 * h) * D
                + math.sqrt(-(1 - alpha_bar[s]) * math.expm1(-2 * h)) * z)

    for eta in (0.0, 1.0):
        first = dpm_step(schedule, xt, t, x0_hat, z, s, None, eta)
        assert (first - move(x0_hat, eta)).abs().max() < 1e-9
        end = dpm_step(schedule, xt, t, x0_hat, z, 0, (schedule.T, x0_before), eta)
        assert torch.equal(end, x0_hat)
        if before is not None:
            r = (u(t) - u(before)) / (u(s) - u(t))
            D = (1 + 1 / (2 * r)) * x0_hat - 1 / (2 * r) * x0_before
            got = dpm_step(schedule, xt, t, x0_hat, z, s, (before, x0_before), eta)
            assert (got - move(D, eta)).abs().max() < 1e-9 * max(1, D.abs().max())


# Data with the mean and the variances of MNIST along its 784 principal axes: see spectrum.py.
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
    u = [math.log(a / (1 - a)) / 2 if a < 1 else math.inf for a in alpha_bar]
    p, q_before, before = torch.ones_like(LAM), None, None
    for t, s in zip(levels, levels[1:]):
        now, then = math.sqrt(alpha_bar[t]), math.sqrt(alpha_bar[s])
        q = now * LAM / (alpha_bar[t] * LAM + 1 - alpha_bar[t]) * p
        D = q
        if second_order and before is not None and s > 0:
            D = q + (u[s] - u[t]) / 2 * (q - q_before) / (u[t] - u[before])
        r = math.sqrt((1 - alpha_bar[s]) / (1 - alpha_bar[t]))
        p, q_before, before = r * p + (then - r * now) * D, q, t
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
    and the squares of what comes out are summed.
    """
    model, before = Gaussian(LINEAR, 0.0, LAM), None
    ones = torch.eye(len(levels), dtype=torch.float64)[:, :, None, None, None].expand(
        -1, -1, 1, 28, 28)  # noise j is ones[:, j]
    x = ones[:, 0]
    for j, (t, s) in enumerate(zip(levels, levels[1:]), start=1):
        x0_hat = LINEAR.predict_x0(x, t, model(x, torch.full((len(x),), t)))
        x, before = dpm_step(LINEAR, x, t, x0_hat, ones[:, j], s, before, eta=1.0), (
            (t, x0_hat) if solver else None)
    return x.square().sum(dim=0)[0]


@pytest.mark.parametrize("steps", [5, 10, 20, 50])
def test_variance_of_the_solver_with_noise_follows_its_recursion(steps):
    """Steps of sde-dpm++ on Gaussian data with MNIST's spectrum: the variance is that of x' = A x +
    B q + f z, where q is the x0_hat of the step before, to 1e-10.

    With P = Var x, C = Cov(x, q), Q = Var q and x0_hat = g x, a step makes of them
    A^2 P + 2 A B C + B^2 Q + f^2, g (A P + B C) and g^2 P. Its distance from the data is at most 0.75
    of that of as many steps of ddpm, where q has no part.
    """
    levels, alpha_bar = timesteps(LINEAR, "sde-dpm++", steps), LINEAR.alpha_bar.tolist()
    u = [math.log(a / (1 - a)) / 2 if a < 1 else math.inf for a in alpha_bar]
    P, C, Q, before = torch.ones_like(LAM), 0.0, 0.0, None
    for t, s in zip(levels, levels[1:]):
        now, then = alpha_bar[t], alpha_bar[s]
        g = math.sqrt(now) * LAM / (now * LAM + 1 - now)
        k = 0.0 if before is None or s == 0 else (u[s] - u[t]) / (u[t] - u[before]) / 2
        f2 = (1 - then) / (1 - now) * (1 - now / then)  # beta_tilde
        r = math.sqrt((1 - then - f2) / (1 - now)) if s > 0 else 0.0
        D = math.sqrt(then) - r * math.sqrt(now)
        A, B = r + D * g * (1 + k), -D * k
        P, C, Q = A**2 * P + 2 * A * B * C + B**2 * Q + f2, g * (A * P + B * C), g**2 * P
        before = t
    got = steps_with_noise(levels, solver=True)
    assert (got - P).abs().max() < 1e-10
    ours, plain = ((v.sqrt() - LAM.sqrt()).square().mean().sqrt().item()
                   for v in (got, steps_with_noise(levels, solver=False)))
    assert ours < 0.75 * plain


def test_order_of_the_samplers():
    """On one grid in u, the error of DDIM falls with the length of the steps, that of the solver
    with its square: by 2 and by 4 for twice as many steps.

    The error is that of a against a chain of infinitely many steps from T to 1, which multiplies
    deviations by sqrt(v_1/v_T), and the last step. A schedule of 20,000 small steps leaves room
    between the integers. The solver's chains are real ones; those of DDIM on this grid, which
    sample() does not offer, are made of its steps.
    """
    fine = NoiseSchedule.from_betas(LINEAR.beta[1:].repeat_interleave(20) / 20)
    first, end = fine.alpha_bar[1].item(), fine.alpha_bar[-1].item()
    v_1, v_T = first * LAM + 1 - first, end * LAM + 1 - end
    limit = (v_1 / v_T).sqrt() * math.sqrt(first) * LAM / v_1
    model = Gaussian(fine, MU, LAM)

    def by_ddim(levels: list[int]) -> torch.Tensor:
        x = torch.stack([torch.zeros(1, 28, 28), torch.ones(1, 28, 28)]).double()
        for t, s in zip(levels, levels[1:]):
            x0_hat = fine.predict_x0(x, t, model(x, torch.full((2,), t)))
            x = ddim_step(fine, x, t, x0_hat, x, s)
        return x[1, 0] - x[0, 0]

    errors = {order: [((real_map(fine, "dpm++", steps)[0] if order == 2 else by_ddim(
        timesteps(fine, "dpm++", steps))) - limit).square().mean().sqrt().item()
        for steps in (20, 40, 80, 160)] for order in (1, 2)}
    for order, low, high in ((1, 1.85, 2.15), (2, 3.4, 4.6)):
        for coarse, finer in zip(errors[order], errors[order][1:]):
            assert low < coarse / finer < high
    assert all(second < first for first, second in zip(*errors.values()))


@FEW
@given(schedules(max_T=12), SEED, st.sampled_from(list(SAMPLERS)), st.booleans(), st.data())
def test_few_steps_are_chained_with_the_noise_of_the_seed(schedule, seed, sampler, clip, data):
    """Each sampler's chain is its step, with the seed's draws of noise and the clipped x0_hat,
    bit for bit."""
    steps = data.draw(st.integers(1, schedule.T))
    eta = data.draw(st.floats(0, 1)) if sampler == "ddim" else 0.0
    model, generator = Gaussian(schedule, 0.2, 0.3), torch.Generator().manual_seed(seed)
    x, before = torch.randn(1, 4, 4, generator=generator)[None], None
    levels = timesteps(schedule, sampler, steps)
    chain = sample(model, schedule, [seed], sampler, steps=steps, clip=clip, shape=(1, 4, 4),
                   eta=eta)
    for (t, xt, x0_hat), s in zip(chain, [*levels[1:], None]):
        assert torch.equal(xt, x)
        if s is not None:
            z = torch.randn(1, 4, 4, generator=generator)[None]
            eps_hat = model(xt, torch.tensor([t]))
            implied = schedule.predict_x0(xt, t, eps_hat)
            assert torch.equal(x0_hat, implied.clamp(-1, 1) if clip else implied)
            x = {"ddpm": lambda: p_step(schedule, xt, t, eps_hat, z, s, clip=clip),
                 "ddim": lambda: ddim_step(schedule, xt, t, x0_hat, z, s, eta),
                 "dpm++": lambda: dpm_step(schedule, xt, t, x0_hat, z, s, before),
                 "sde-dpm++": lambda: dpm_step(schedule, xt, t, x0_hat, z, s, before, 1.0),
                 }[sampler]()
            before = t, x0_hat
    assert t == 0


# ------------------------------------------------------------------------- refusals, command line

@pytest.mark.parametrize("call, message", [
    (lambda: p_step(LINEAR, ONE, 5, ONE, ONE, variance="large"), "known are beta_tilde, beta"),
    (lambda: p_step(LINEAR, ONE, 0, ONE, ONE), "t must lie in 1..1000"),
    (lambda: next(sample(Wild(STEEP, 0, 1), STEEP, [0], sampler="euler")), "known are ddpm"),
    (lambda: next(sample(Wild(STEEP, 0, 1), STEEP, [0], "ddim", eta=1.5)), "eta is not between"),
    (lambda: next(sample(Wild(STEEP, 0, 1), STEEP, [0], variance="large")), "known are beta_t"),
    (lambda: next(sample(Wild(STEEP, 0, 1), STEEP, [0], eta=0.5)), "ddpm has no such choice"),
    (lambda: next(sample(Wild(STEEP, 0, 1), STEEP, [0], "dpm++", "zero")), "dpm.. has no such"),
    (lambda: next(sample(Wild(STEEP, 0, 1), STEEP, [0], "ddim", "beta")), "ddim has no such"),
    (lambda: next(sample(Wild(STEEP, 0, 1), STEEP, [0], "sde-dpm++", eta=0.5)), "sde-dpm.. has no"),
    (lambda: next(sample(Wild(STEEP, 0, 1), STEEP, [])), "no seeds"),
    (lambda: next(sample(Wild(STEEP, 0, 1), STEEP, [0], steps=11)), "between 1 and 10"),
    (lambda: next(sample(Wild(STEEP, 0, 1), STEEP, [0], start=(11, ONE))), "t in 1..10"),
    (lambda: next(sample(Wild(STEEP, 0, 1), STEEP, [0, 1], start=(5, ONE))), "one image for each"),
])
def test_impossible_arguments_are_errors(call, message):
    """Unknown names list the known ones; numbers out of range say the range."""
    with pytest.raises(ValueError, match=message):
        call()


def test_seeds_are_numbers_and_ranges():
    """'0-3,7' is 0, 1, 2, 3, 7; up to 10,000 of them; anything else is refused."""
    import argparse
    assert parse_seeds("7,0-9998") == [7, *range(9999)]
    assert parse_seeds("0-3,7") == [0, 1, 2, 3, 7] and parse_seeds("5") == [5]
    for text in ("", "a", "1-", "-3", "3-1", "5,3-1", "1.5", "1,,2", str(2**63), "0x1",
                 "0-10000", "7,0-9999"):
        with pytest.raises(argparse.ArgumentTypeError):
            parse_seeds(text)


@pytest.mark.parametrize("count, scale", [(2, 4), (8, 1), (13, 2), (16, 1)])
def test_grid_is_that_of_torchvision(count, scale):
    """Eight to a row, lines of one pixel of grey 64 between and around, each pixel enlarged."""
    images = normal(0, count, 1, 6, 5)
    expected = make_grid(to_uint8(images), nrow=8, padding=1, pad_value=64)[0]
    expected = expected.repeat_interleave(scale, 0).repeat_interleave(scale, 1)
    assert torch.equal(pil_to_tensor(script.draw_grid(images, scale))[0], expected)


def test_command_writes_a_picture(tiny_run, tmp_path, capsys):
    """python sample.py writes a grid, eight images to a row, and says where."""
    from matplotlib.image import imread
    out = tmp_path / "new" / "digits.png"
    script.main(["--checkpoint", str(tiny_run / "model.pt"), "--seeds", "0-9", "--out", str(out),
                 "--device", "cpu"])
    assert str(out) in capsys.readouterr().out.splitlines()[-1]
    picture = imread(out)
    assert picture.shape[:2] == (4 * (2 * 29 + 1), 4 * (8 * 29 + 1))
    # The first image of the grid is the image of seed 0, each pixel four by four.
    checkpoint = script.load_checkpoint(tiny_run / "model.pt")
    image = to_uint8(last(sample(checkpoint.model, checkpoint.schedule, [0])))[0, 0].float()
    tile = torch.from_numpy(picture[4:4 + 112:4, 4:4 + 112:4].copy()).float() * 255
    assert (tile - image).abs().max() <= 1.01


def test_command_draws_images_of_the_size_that_was_learned(tmp_path):
    """A model of 8x8 pictures gives 8x8 pictures, in tiles of 9 pixels."""
    from matplotlib.image import imread
    train.train(train.Config(epochs=1, batch_size=8, T=20, schedule="cosine", out=str(tmp_path),
                             device="cpu"), images=(pictures(8, size=8), pictures(8, size=8)))
    script.main(["--checkpoint", str(tmp_path / "model.pt"), "--seeds", "0-8", "--device", "cpu"])
    assert imread(tmp_path / "samples.png").shape[:2] == (4 * (2 * 9 + 1), 4 * (8 * 9 + 1))


def test_command_writes_an_animation(tiny_run, tmp_path, capsys):
    """--gif: a frame for each of about 50 levels from T to 0, the last the finished images."""
    gif = tmp_path / "new" / "chain.gif"
    script.main(["--checkpoint", str(tiny_run / "model.pt"), "--seeds", "5,9", "--out",
                 str(tmp_path / "a.png"), "--gif", str(gif), "--device", "cpu"])
    assert capsys.readouterr().out.splitlines()[-1].endswith(f" {gif}")
    checkpoint = script.load_checkpoint(tiny_run / "model.pt")
    chain = list(sample(checkpoint.model, checkpoint.schedule, [5, 9]))
    with Image.open(gif) as animation:
        assert animation.n_frames == len(chain) == 21 and animation.info["loop"] == 0
        for frame, (t, images, _) in enumerate(chain):
            animation.seek(frame)
            assert animation.info["duration"] == (3000 if t == 0 else 80)
            picture = pil_to_tensor(animation.convert("L"))[0]
            assert torch.equal(picture[2:58:2, 2:58:2], to_uint8(images)[0, 0])


def test_options_reach_the_sampler(tiny_run, tmp_path):
    """--variance, --steps, --no-clip, --seeds: the picture is what sample() gives for them."""
    from matplotlib.image import imread
    out = tmp_path / "digit.png"
    script.main(["--checkpoint", str(tiny_run / "model.pt"), "--seeds", "5,9", "--out", str(out),
                 "--device", "cpu", "--variance", "zero", "--steps", "5", "--no-clip"])
    checkpoint = script.load_checkpoint(tiny_run / "model.pt")

    def draw(**options):
        images = last(sample(checkpoint.model, checkpoint.schedule, [5, 9], **options))
        return to_uint8(images)[0, 0]

    tile = torch.from_numpy(imread(out)[4:4 + 112:4, 4:4 + 112:4].copy()).float() * 255
    wanted = dict(variance="zero", steps=5, clip=False)
    assert (tile - draw(**wanted).float()).abs().max() <= 1.01
    for name, other in (("variance", "beta"), ("steps", 6), ("clip", True)):
        assert (tile - draw(**{**wanted, name: other}).float()).abs().max() > 1.01
    for sampler, eta in (("ddim", 0.5), ("dpm++", 0.0), ("sde-dpm++", 0.0)):
        script.main(["--checkpoint", str(tiny_run / "model.pt"), "--seeds", "5,9", "--out",
                     str(out), "--device", "cpu", "--sampler", sampler, "--eta", str(eta),
                     "--steps", "6"])
        tile = torch.from_numpy(imread(out)[4:4 + 112:4, 4:4 + 112:4].copy()).float() * 255
        wanted = dict(sampler=sampler, eta=eta, steps=6)
        assert (tile - draw(**wanted).float()).abs().max() <= 1.01
        assert (tile - draw(sampler="ddpm", steps=6).float()).abs().max() > 1.01


def test_own_finished_run_comes_before_the_shipped_model(tiny_run, tmp_path, monkeypatch, capsys):
    """No run: the shipped model. A run with epochs left: the shipped model. A finished run: it."""
    monkeypatch.setattr(script, "HERE", tmp_path)
    assert script.open_checkpoint(None)[0] == script.SHIPPED
    assert sum(p.numel() for p in script.open_checkpoint(None)[1].model.parameters()) == 324_705
    own = tmp_path / "runs" / "mnist" / "model.pt"
    own.parent.mkdir(parents=True)
    state = torch.load(tiny_run / "model.pt", weights_only=True)
    torch.save({**state, "config": {**state["config"], "epochs": 2}}, own)
    assert script.open_checkpoint(None)[0] == script.SHIPPED
    torch.save(state, own)
    assert script.open_checkpoint(None)[0] == own
    assert str(own) in capsys.readouterr().out.splitlines()[-1]


def test_interrupt_leaves_no_picture(tiny_run, tmp_path, monkeypatch, capsys):
    """Ctrl-C in the middle of sampling exits with 130, says so, and writes nothing."""
    def stopped(*args, **options):
        yield 20, None, None
        raise KeyboardInterrupt
    monkeypatch.setattr(script, "sample", stopped)
    with pytest.raises(SystemExit) as exit_:
        script.main(["--checkpoint", str(tiny_run / "model.pt"), "--out", str(tmp_path / "a.png")])
    assert exit_.value.code == 130 and "stopped; pictures may be missing" in capsys.readouterr().err
    assert not (tmp_path / "a.png").exists()
