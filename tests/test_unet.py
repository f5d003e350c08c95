"""The laws of the network: its size, its wiring, and what it must not depend on."""

import itertools

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.utils.flop_counter import FlopCounterMode

import unet as script
from strategies import SEED, normal
from unet import Attention, UNet, describe, timestep_embedding


def seeded(build, seed: int = 0, redraw: bool = False):
    """Build a module from a seed; redraw=True replaces the zeros that it starts with."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        module = build().double().eval()
        if redraw:
            for p in module.parameters():
                torch.nn.init.normal_(p, std=0.1)
    return module


MODEL = seeded(UNet, redraw=True)


def test_default_network_has_as_many_parameters_as_the_blogs():
    """324,705, all trainable; no buffers, so there is nothing that an average could miss."""
    model = seeded(UNet)
    assert sum(p.numel() for p in model.parameters()) == 324_705
    assert all(p.requires_grad for p in model.parameters())
    assert not list(model.buffers())


def test_untrained_network_answers_zero():
    """The head starts at zero, so eps_hat = 0 and the loss before the first step is mean(eps^2)."""
    model = seeded(UNet)
    eps = normal(0, 4, 1, 28, 28)
    eps_hat = model(normal(1, 4, 1, 28, 28), torch.tensor([1, 2, 500, 1000]))
    assert torch.equal(eps_hat, torch.zeros_like(eps))
    assert torch.equal((eps - eps_hat).square().mean(), eps.square().mean())


@pytest.mark.parametrize("name", [n for n, _ in MODEL.named_parameters()])
def test_every_parameter_is_used(name, gradients):
    """Once no weight is zero, each parameter tensor has a gradient in every one of its entries.

    A key bias would fail here: the softmax cancels it, and its gradient is rounding error, some
    1e-16 of the largest gradient.
    """
    gradient = gradients[name]
    assert (gradient.abs() > 1e-13 * gradients["largest"]).all()


@pytest.fixture(scope="module")
def gradients():
    model = seeded(UNet, redraw=True)
    model(normal(0, 8, 1, 28, 28), torch.arange(1, 1000, 125)).square().mean().backward()
    found = {name: p.grad for name, p in model.named_parameters()}
    found["largest"] = max(g.abs().max() for g in found.values())
    return found


@settings(max_examples=8)
@given(st.integers(1, 5) | st.just(28), st.sampled_from([(28, 28), (8, 12), (4, 4)]), SEED)
def test_output_has_the_shape_of_the_input(batch, size, seed):
    """eps_hat has the shape of x_t for any batch, 1 and 28 included, and sizes in fours."""
    xt = normal(seed, batch, 1, *size)
    t = torch.randint(1, 1001, (batch,), generator=torch.Generator().manual_seed(seed))
    with torch.no_grad():
        assert MODEL(xt, t).shape == xt.shape


@settings(max_examples=8)
@given(SEED, st.integers(2, 6))
def test_images_of_a_batch_do_not_see_each_other(seed, batch):
    """eps_hat(x, t)_i = eps_hat(x_i, t_i): the network treats each image alone."""
    xt = normal(seed, batch, 1, 12, 12)
    t = torch.randint(1, 1001, (batch,), generator=torch.Generator().manual_seed(seed))
    with torch.no_grad():
        together = MODEL(xt, t)
        for i in range(batch):
            alone = MODEL(xt[i:i + 1], t[i:i + 1])
            assert (together[i:i + 1] - alone).abs().max() < 1e-10


@settings(max_examples=8)
@given(SEED, st.lists(st.integers(1, 1000), min_size=2, max_size=2, unique=True))
def test_t_matters(seed, ts):
    """The same image at two values of t gives two answers, down to neighbouring t."""
    xt = normal(seed, 1, 1, 8, 8).expand(2, 1, 8, 8)
    with torch.no_grad():
        first, second = MODEL(xt, torch.tensor(ts))
    assert (first - second).abs().max() > 1e-6


def test_every_block_is_told_t():
    """Each residual block alone answers differently to two time features."""
    blocks = [m for m in MODEL.modules() if isinstance(m, script.ResidualBlock)]
    assert len(blocks) == 8
    for block in blocks:
        x = normal(0, 1, block.conv1.in_channels, 4, 4)
        a, b = (block(x, normal(seed, 1, block.film.in_features)) for seed in (1, 2))
        assert (a - b).abs().max() > 1e-3


@settings(max_examples=8)
@given(SEED, st.integers(1, 1000))
def test_gain_adds_a_multiple_of_the_input(seed, t):
    """eps_hat = echo(t) x_t + (1 + scale(t)) head: with the head at zero, a multiple of x_t."""
    model = seeded(UNet, seed)
    with torch.no_grad():
        for p in model.gain.parameters():
            p.copy_(normal(seed, *p.shape))
        xt, t = normal(seed, 1, 1, 8, 8), torch.tensor([t])
        time = model.time_mlp(timestep_embedding(t, 36).double())
        echo = (model.gain.weight[0] * time[0]).sum() + model.gain.bias[0]
        assert (model(xt, t) - echo * xt).abs().max() < 1e-12
        model.head[2].bias.fill_(0.7)
        scale = (model.gain.weight[1] * time[0]).sum() + model.gain.bias[1]
        assert (model(xt, t) - echo * xt
                - (1 + scale) * model.head[2].bias).abs().max() < 1e-12


# ---------------------------------------------------------------------------------- attention

ATTENTION = seeded(lambda: Attention(16, 4, 8), redraw=True)


@given(SEED)
def test_attention_weights_are_averages(seed):
    """Each row of the attention matrix is positive and sums to 1."""
    weights = ATTENTION.weights(normal(seed, 2, 16, 3, 3))
    assert weights.shape == (2, 4, 9, 9)
    assert (weights > 0).all() and (weights.sum(dim=-1) - 1).abs().max() < 1e-12


@given(SEED)
def test_attention_does_not_know_where_places_are(seed):
    """Permuting the places permutes the result: attention(x P) = attention(x) P."""
    x = normal(seed, 2, 16, 3, 3)
    order = torch.randperm(9, generator=torch.Generator().manual_seed(seed))

    def permute(y):
        return y.flatten(2)[:, :, order].reshape(y.shape)

    assert (ATTENTION(permute(x)) - permute(ATTENTION(x))).abs().max() < 1e-12


def test_attention_equals_plain_loops():
    """softmax(q k / sqrt(d)) v, head by head, place by place, in loops. [Attention section 3.2]"""
    x = normal(0, 1, 16, 2, 2)
    normed = ATTENTION.norm(x).flatten(2)[0]  # (16, 4)
    q, k, v = (torch.stack([m.weight[:, :, 0, 0] @ normed[:, i] + (m.bias if m.bias is not None
                                                                   else 0) for i in range(4)], 1)
               for m in (ATTENTION.query, ATTENTION.key, ATTENTION.value))
    seen = torch.zeros(16, 4, dtype=torch.float64)
    for head, i in itertools.product(range(4), range(4)):
        rows = slice(4 * head, 4 * head + 4)
        score = torch.stack([q[rows, i] @ k[rows, j] / 2 for j in range(4)])
        share = score.exp() / score.exp().sum()
        seen[rows, i] = sum(share[j] * v[rows, j] for j in range(4))
    out = ATTENTION.out.weight[:, :, 0, 0] @ seen + ATTENTION.out.bias[:, None]
    assert (ATTENTION(x) - x - out.reshape(1, 16, 2, 2)).abs().max() < 1e-12


# ---------------------------------------------------------------------------------- embedding

def test_embeddings_of_all_t_are_apart():
    """No two of t = 0..4000 share an embedding; all have the same length, sqrt(dim/2).

    t and t + 1 are at least 0.8 apart: the shortest wave has period 2 pi. Dividing t by T first, a
    known bug, would bring them to 0.001.
    """
    features = timestep_embedding(torch.arange(4001), 40)
    assert (features.norm(dim=1) - 20**0.5).abs().max() < 1e-4
    assert (features[1:] - features[:-1]).norm(dim=1).min() > 0.8
    distance = torch.cdist(features, features) + 9 * torch.eye(4001)
    assert distance.min() > 0.3


@given(st.integers(0, 10_000), st.sampled_from([4, 10, 40, 256]))
def test_embedding_equals_its_formula(t, dim):
    """sin(t w_i), then cos(t w_i), w_i = 10000^(-i/(dim/2 - 1)). [Attention section 3.5]"""
    import math
    half = dim // 2
    row = timestep_embedding(torch.tensor([t]), dim)[0]
    for i in range(half):
        angle = t * 10_000 ** (-i / (half - 1))
        # The angle is a float32 number of up to 10,000, so it is off by up to 1e-3.
        assert abs(row[i].item() - math.sin(angle)) < 1e-6 * max(angle, 1) + 1e-6
        assert abs(row[half + i].item() - math.cos(angle)) < 1e-6 * max(angle, 1) + 1e-6


# ---------------------------------------------------------------------------------- refusals, table

@pytest.mark.parametrize("call, message", [
    (lambda: MODEL(normal(0, 2, 1, 30, 28), torch.tensor([1, 2])), "multiples of 4"),
    (lambda: MODEL(normal(0, 2, 3, 28, 28), torch.tensor([1, 2])), "(B, 1, H, W)"),
    (lambda: MODEL(normal(0, 1, 28, 28), torch.tensor([1])), "(B, 1, H, W)"),
    (lambda: MODEL(normal(0, 2, 1, 28, 28), torch.tensor([1])), "one for each image"),
    (lambda: MODEL(normal(0, 2, 1, 28, 28), torch.tensor(1)), "one for each image"),
    (lambda: UNet(channels=(20, 32, 64)), "multiples of groups"),
    (lambda: UNet(channels=(24, 32, 60), groups=4, heads=8), "multiples of groups"),
    (lambda: UNet(channels=(8, 16)), "one number for each resolution"),
    (lambda: UNet(embedding=5)(torch.zeros(1, 1, 4, 4), torch.tensor([1])), "even dimension"),
])
def test_sizes_that_do_not_fit_are_refused(call, message):
    """A wrong shape is a ValueError that names the right one, not a crash in a deep layer."""
    import re
    with torch.random.fork_rng(devices=[]), pytest.raises(ValueError, match=re.escape(message)):
        call()


def test_table_counts_what_torch_counts():
    """Parameters and multiply-adds of the table, against torch's own counter (2 flops each)."""
    model = seeded(UNet).float()
    rows = describe(model)
    assert sum(row[2] for row in rows) == 324_705
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        model(torch.zeros(1, 1, 28, 28), torch.ones(1, dtype=torch.long))
    assert 2 * sum(row[3] for row in rows) == counter.get_total_flops()


def test_script_prints_the_table(capsys):
    """python unet.py ends with the total."""
    with torch.random.fork_rng(devices=[]):
        script.main()
    assert capsys.readouterr().out.splitlines()[-1].split()[:2] == ["total", "324,705"]
