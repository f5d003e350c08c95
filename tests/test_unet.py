"""The laws of the network: its size, its wiring, and what it must not depend on."""

import ctypes
import inspect
import itertools
import math
import re
import sys

import pytest
import torch
import torch.nn.functional as F
from hypothesis import example, given
from hypothesis import strategies as st

import unet
from strategies import FEW, SEED, normal
from unet import (
    Attention, Halve, ResidualBlock, UNet, describe, pick_device, prepare_device,
    timestep_embedding)


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
    """The gradient of each parameter of a network without zeros, and their largest entry."""
    model = seeded(UNet, redraw=True)
    model(normal(0, 8, 1, 28, 28), torch.arange(1, 1000, 125)).square().mean().backward()
    gradients = {name: p.grad for name, p in model.named_parameters()}
    gradients["largest"] = max(gradient.abs().max() for gradient in gradients.values())
    return gradients


@FEW
@given(st.integers(1, 5), st.sampled_from([(28, 28), (8, 12), (4, 4)]), SEED)
@example(1, (28, 28), 0)
@example(28, (28, 28), 0)
def test_output_has_the_shape_of_the_input(batch, size, seed):
    """eps_hat has the shape of x_t for any batch, 1 and 28 included, and sizes in fours."""
    xt = normal(seed, batch, 1, *size)
    t = torch.randint(1, 1001, (batch,), generator=torch.Generator().manual_seed(seed))
    with torch.no_grad():
        assert MODEL(xt, t).shape == xt.shape


@FEW
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


@FEW
@given(SEED, st.lists(st.integers(1, 1000), min_size=2, max_size=2, unique=True))
def test_t_matters(seed, ts):
    """The same image at two values of t gives two answers, down to neighbouring t."""
    xt = normal(seed, 1, 1, 8, 8).expand(2, 1, 8, 8)
    with torch.no_grad():
        first, second = MODEL(xt, torch.tensor(ts))
    assert (first - second).abs().max() > 1e-6


def test_every_block_is_told_t():
    """Each residual block alone answers differently to two time features."""
    blocks = [m for m in MODEL.modules() if isinstance(m, ResidualBlock)]
    assert len(blocks) == 8
    for block in blocks:
        x = normal(0, 1, block.conv1.in_channels, 4, 4)
        answers = [block(x, normal(seed, 1, block.film.in_features)) for seed in (1, 2)]
        assert (answers[0] - answers[1]).abs().max() > 1e-3


@FEW
@given(SEED, st.integers(1, 1000))
def test_gain_adds_a_multiple_of_the_input(seed, t):
    """eps_hat = echo(t) x_t + (1 + scale(t)) head: with the head at zero, a multiple of x_t."""
    model = seeded(UNet, seed)
    with torch.no_grad():
        for p in model.gain.parameters():
            p.copy_(normal(seed, *p.shape))
        xt = normal(seed, 1, 1, 8, 8)
        t = torch.tensor([t])
        time = model.time_mlp(timestep_embedding(t, model.config["embedding"]).double())
        echo = (model.gain.weight[0] * time[0]).sum() + model.gain.bias[0]
        assert (model(xt, t) - echo * xt).abs().max() < 1e-12
        model.head[2].bias.fill_(0.7)
        scale = (model.gain.weight[1] * time[0]).sum() + model.gain.bias[1]
        assert (model(xt, t) - echo * xt
                - (1 + scale) * model.head[2].bias).abs().max() < 1e-12


def drawing(model: UNet, xt: torch.Tensor, t: torch.Tensor) -> torch.Tensor:
    """What the drawing at the top of unet.py says, with the weights of a default network but
    without its modules: each operation written out, each image enlarged pixel by pixel.
    """
    w = model.state_dict()
    groups = model.config["groups"]
    heads = model.config["heads"]

    def linear(name, x):
        return x @ w[name + ".weight"].T + w[name + ".bias"]

    def conv(name, x, stride=1):
        kernel = w[name + ".weight"]
        return F.conv2d(x, kernel, w.get(name + ".bias"), stride, padding=kernel.shape[-1] // 2)

    def norm(name, x):
        y = x.reshape(len(x), groups, -1)
        y = y - y.mean(2, keepdim=True)
        y = (y / (y.square().mean(2, keepdim=True) + 1e-5).sqrt()).reshape(x.shape)
        return y * w[name + ".weight"][:, None, None] + w[name + ".bias"][:, None, None]

    def silu(x):
        return x / (1 + torch.exp(-x))

    def block(name, x):
        h = norm(name + ".norm2", conv(name + ".conv1", silu(norm(name + ".norm1", x))))
        film = linear(name + ".film", time)[:, :, None, None]
        h = h * (1 + film[:, :h.shape[1]]) + film[:, h.shape[1]:]
        return x + conv(name + ".conv2", silu(h))

    def attention(name, x):
        y = norm(name + ".norm", x)
        q, k, v = (conv(f"{name}.{part}", y).flatten(2).chunk(heads, dim=1)
                   for part in ("query", "key", "value"))
        received = []
        for i in range(heads):
            fit = torch.exp(q[i].transpose(1, 2) @ k[i] / q[i].shape[1] ** 0.5)  # (B, HW, HW)
            received.append(v[i] @ (fit / fit.sum(2, keepdim=True)).transpose(1, 2))
        return x + conv(name + ".out", torch.cat(received, dim=1).reshape(x.shape))

    def halve(name, x):
        y = conv(name + ".conv", x, stride=2)
        place = w[name + ".place"]
        # Pixel i of n stands at i/n of the way, which is in pixel i/n * 14 of 14, rounded down.
        row, column = (torch.arange(n) * place.shape[-1] // n for n in y.shape[2:])
        return y + place[:, row][:, :, column]

    def twice(x):
        return x.repeat_interleave(2, dim=2).repeat_interleave(2, dim=3)

    half = model.config["embedding"] // 2
    angle = t[:, None] * torch.tensor([10_000 ** (-i / (half - 1)) for i in range(half)])
    time = torch.cat([angle.sin(), angle.cos()], dim=1).double()
    time = silu(linear("time_mlp.2", silu(linear("time_mlp.0", time))))
    kept28 = block("encoder.0.0", conv("stem", xt))
    kept14 = block("encoder.1.0", halve("down.0", kept28))
    kept7 = block("encoder.2.0", halve("down.1", kept14))
    kept7 = block("encoder.2.1", kept7)
    x = conv("merge.2", torch.cat([attention("attention.0", kept7), kept7], dim=1))
    x = block("decoder.2.1", block("decoder.2.0", x))
    x = conv("merge.1", torch.cat([twice(attention("attention.1", x)), kept14], dim=1))
    x = conv("merge.0", torch.cat([twice(block("decoder.1.0", x)), kept28], dim=1))
    x = conv("head.2", silu(norm("head.0", block("decoder.0.0", x))))
    echo, scale = linear("gain", time).T[..., None, None, None]
    return echo * xt + (1 + scale) * x


@FEW
@given(SEED)
def test_network_is_its_drawing(seed):
    """eps_hat equals the network written out operation by operation, for any weights.

    So the meaning of each weight is pinned, and a model file means the same tomorrow. The angles of
    the embedding are float32 numbers of up to 1,000, off by 6e-5, and the answer by about as much.
    """
    model = seeded(UNet, seed, redraw=True)
    xt = normal(seed, 3, 1, 12, 8)
    t = torch.randint(1, 1001, (3,), generator=torch.Generator().manual_seed(seed))
    with torch.no_grad():
        expected = drawing(model, xt, t)
        assert (model(xt, t) - expected).abs().max() < 1e-3 * expected.abs().max()


@FEW
@given(SEED, st.sampled_from([8, 14, 28]))
def test_only_halving_tells_where_a_place_is(seed, size):
    """From an image that is the same everywhere, the convolution of stride 2 makes one that is the
    same everywhere except at the border, where it meets zeros; the learned image makes the
    difference. (Attention, section 3.5, names learned positions as one of two ways.)
    """
    halve = seeded(lambda: Halve(4, 6, 7), seed, redraw=True)
    flat = normal(seed, 2, 4, 1, 1).expand(2, 4, size, size)
    with torch.no_grad():
        inside = halve(flat)[:, :, 1:-1, 1:-1]
        assert (inside - inside[:, :, :1, :1]).abs().max() > 1e-3
        halve.place.zero_()
        inside = halve(flat)[:, :, 1:-1, 1:-1]
        assert (inside - inside[:, :, :1, :1]).abs().max() < 1e-12


# ---------------------------------------------------------------------------------- attention

ATTENTION = seeded(lambda: Attention(24, 2, 8), redraw=True)


@given(SEED)
def test_attention_weights_are_averages(seed):
    """sum_j A_ij = 1 and A_ij > 0: each row of the attention matrix is an average."""
    weights = ATTENTION.weights(normal(seed, 2, 24, 3, 3))
    assert weights.shape == (2, 2, 9, 9)
    assert (weights > 0).all() and (weights.sum(dim=-1) - 1).abs().max() < 1e-12


@given(SEED)
def test_attention_does_not_know_where_places_are(seed):
    """Permuting the places permutes the result: attention(x P) = attention(x) P."""
    x = normal(seed, 2, 24, 3, 3)
    order = torch.randperm(9, generator=torch.Generator().manual_seed(seed))

    def permute(y):
        return y.flatten(2)[:, :, order].reshape(y.shape)

    assert (ATTENTION(permute(x)) - permute(ATTENTION(x))).abs().max() < 1e-12


def test_attention_equals_plain_loops():
    """softmax(q k / sqrt(d)) v, head by head, place by place, in loops. [Attention section 3.2]

    Two heads of d = 12 channels each, six places: no two of these numbers can be mixed up.
    """
    x = normal(0, 1, 24, 2, 3)
    normed = ATTENTION.norm(x).flatten(2)[0]  # (24, 6)

    def project(layer):
        matrix = layer.weight[:, :, 0, 0]
        columns = torch.stack([matrix @ normed[:, i] for i in range(6)], dim=1)
        return columns if layer.bias is None else columns + layer.bias[:, None]

    q = project(ATTENTION.query)
    k = project(ATTENTION.key)
    v = project(ATTENTION.value)
    received = torch.zeros(24, 6, dtype=torch.float64)
    for head, i in itertools.product(range(2), range(6)):
        rows = slice(12 * head, 12 * head + 12)
        score = torch.stack([q[rows, i] @ k[rows, j] / 12**0.5 for j in range(6)])
        share = score.exp() / score.exp().sum()
        received[rows, i] = sum(share[j] * v[rows, j] for j in range(6))
    out = ATTENTION.out.weight[:, :, 0, 0] @ received + ATTENTION.out.bias[:, None]
    assert (ATTENTION(x) - x - out.reshape(1, 24, 2, 3)).abs().max() < 1e-12


# ---------------------------------------------------------------------------------- embedding

def test_embeddings_of_all_t_are_apart():
    """No two of t = 0..4000 share an embedding of the network; all have the length sqrt(dim/2).

    The first wave alone, (sin t, cos t), keeps t and t + 1 2 sin(1/2) = 0.96 apart; others come
    near each other again, but no closer than 0.3. Rounding moves them by 2e-3 at most. Dividing t
    by T first, a known bug, would bring t and t + 1 to 0.003.
    """
    dim = MODEL.config["embedding"]
    features = timestep_embedding(torch.arange(4001), dim)
    assert (features.norm(dim=1) - (dim / 2)**0.5).abs().max() < 1e-4
    assert (features[1:] - features[:-1]).norm(dim=1).min() > 0.95
    distance = torch.cdist(features, features) + 9 * torch.eye(4001)
    assert distance.min() > 0.3


@given(st.integers(0, 10_000), st.sampled_from([4, 10, 40, 256]))
def test_embedding_equals_its_formula(t, dim):
    """sin(t w_i), then cos(t w_i), w_i = 10000^(-i/(dim/2 - 1)). [Attention section 3.5]"""
    half = dim // 2
    row = timestep_embedding(torch.tensor([t]), dim)[0]
    for i in range(half):
        exponent = math.log(10_000) * i / (half - 1)
        angle = t * math.exp(-exponent)
        # In float32 each operation is off by 6e-8 of its result: three make the exponent, whose
        # error is the relative error of its exponential, then come this and the product with t.
        tolerance = angle * (exponent * 1.8e-7 + 1.2e-7) + 1e-7
        assert abs(row[i].item() - math.sin(angle)) < tolerance
        assert abs(row[half + i].item() - math.cos(angle)) < tolerance


# ------------------------------------------------------------------------------------- labels

TOLD = seeded(lambda: UNet(classes=10), redraw=True)
LABELS = st.lists(st.integers(-1, 9), min_size=1, max_size=5)


def noisy(seed: int, count: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Noisy images of 8x8 pixels, and their t."""
    t = torch.randint(1, 1001, (count,), generator=torch.Generator().manual_seed(seed))
    return normal(seed, count, 1, 8, 8), t


def test_labels_cost_a_row_of_numbers_for_each_class():
    """Ten classes add a table of 10 x 20 numbers, which starts at zero, and change nothing else:
    all other initial weights are those of the network without classes, bit for bit.
    """
    plain = seeded(UNet).state_dict()
    told = seeded(lambda: UNet(classes=10)).state_dict()
    assert sum(weight.numel() for weight in told.values()) == 324_705 + 200
    table = told.pop("table")
    assert table.shape == (10, 20) and not table.any()
    assert told.keys() == plain.keys()
    assert all(torch.equal(told[name], plain[name]) for name in plain)


@FEW
@given(SEED, LABELS)
def test_image_without_a_label_is_answered_as_if_there_were_no_labels(seed, labels):
    """In one batch with others, bit for bit: -1 is no class, nor the last one. An image that has a
    label is answered otherwise.
    """
    xt, t = noisy(seed, len(labels))
    with torch.no_grad():
        told = TOLD(xt, t, torch.tensor(labels))
        untold = TOLD(xt, t)
    for i, label in enumerate(labels):
        assert torch.equal(told[i], untold[i]) == (label == -1)


@FEW
@given(SEED, LABELS, LABELS)
def test_answer_does_not_depend_on_the_labels_of_other_images(seed, labels, others):
    """The first image of a batch is answered in the same way, bit for bit, whatever label the rest
    have; and, up to rounding, as if it were alone.
    """
    xt, t = noisy(seed, 1 + len(others))
    first = torch.tensor(labels[:1])
    with torch.no_grad():
        answers = [TOLD(xt, t, torch.cat([first, torch.tensor(rest)]))[0]
                   for rest in (others, others[::-1], [-1] * len(others))]
        alone = TOLD(xt[:1], t[:1], first)[0]
    assert all(torch.equal(answers[0], answer) for answer in answers)
    assert (answers[0] - alone).abs().max() < 1e-10


@FEW
@given(SEED, LABELS)
def test_label_adds_its_row_to_the_time_features(seed, labels):
    """The network told class c is the network that is told nothing, but whose time features, those
    of the sinusoids and the perceptron, have row c of the table added by hand.
    """
    xt, t = noisy(seed, len(labels))
    rows = [torch.zeros(20).double() if label == -1 else TOLD.table[label] for label in labels]
    with torch.no_grad():
        told = TOLD(xt, t, torch.tensor(labels))
        hook = TOLD.time_mlp.register_forward_hook(
            lambda layer, inputs, time: time + torch.stack(rows))
        try:
            by_hand = TOLD(xt, t)
        finally:
            hook.remove()
    assert (told - by_hand).abs().max() < 1e-12


def test_only_the_rows_of_the_labels_that_are_told_learn():
    """The gradient of the table is zero, exactly, in the rows of classes that are not in the batch,
    and nowhere zero in those that are.
    """
    model = seeded(lambda: UNet(classes=10), redraw=True)
    model(*noisy(0, 4), torch.tensor([3, -1, 7, 3])).square().mean().backward()
    learning = model.table.grad != 0
    assert learning[[3, 7]].all()
    assert learning.sum() == 2 * 20


@pytest.mark.parametrize("label", [10, -2])
def test_label_out_of_range_is_an_error(label):
    """Classes are 0 to 9, and -1 is none; no other number is taken for one of them."""
    with pytest.raises(IndexError):
        TOLD(*noisy(0, 2), torch.tensor([0, label]))


# ---------------------------------------------------------------------------------- refusals, table

@pytest.mark.parametrize("call, message", [
    (lambda: MODEL(normal(0, 2, 1, 30, 28), torch.tensor([1, 2])), "multiples of 4"),
    (lambda: MODEL(normal(0, 2, 3, 28, 28), torch.tensor([1, 2])), "(B, 1, H, W)"),
    (lambda: MODEL(normal(0, 1, 28, 28), torch.tensor([1])), "(B, 1, H, W)"),
    (lambda: MODEL(normal(0, 2, 1, 28, 28), torch.tensor([1])), "one for each image"),
    (lambda: MODEL(normal(0, 2, 1, 28, 28), torch.tensor(1)), "one for each image"),
    (lambda: TOLD(*noisy(0, 2), torch.tensor([1])), "label must be (2,), one for each image"),
    (lambda: TOLD(*noisy(0, 2), torch.tensor(1)), "label must be (2,), one for each image"),
    (lambda: MODEL(*noisy(0, 2), torch.tensor([1, 2])),
     "this network knows no labels; build it with classes=10, say"),
    (lambda: timestep_embedding(torch.tensor([1]), 5), "even dimension"),
    (lambda: timestep_embedding(torch.tensor([1]), 2), "even dimension"),
])
def test_shapes_that_do_not_fit_are_refused(call, message):
    """A wrong shape is a ValueError that names the right one, not a crash in a deep layer."""
    with pytest.raises(ValueError, match=re.escape(message)):
        call()


@pytest.mark.parametrize("sizes, blamed, message", [
    ({"channels": (8, 16)}, "blocks, channels",
     "channels and blocks need one number for each resolution, not 2 and 3"),
    ({"blocks": (1, 1, 1, 1)}, "blocks, channels",
     "channels and blocks need one number for each resolution, not 3 and 4"),
    ({"channels": (20, 32, 64)}, "channels, groups",
     "channels (20, 32, 64) must be multiples of groups = 8"),
    ({"groups": 5}, "channels, groups", "channels (32, 32, 48) must be multiples of groups = 5"),
    ({"channels": (24, 32, 60), "groups": 4, "heads": 8}, "channels, heads",
     "the last of the channels (24, 32, 60) must be a multiple of heads = 8"),
    ({"heads": 5}, "channels, heads",
     "the last of the channels (32, 32, 48) must be a multiple of heads = 5"),
    ({"channels": (8, 8, 8, 8), "blocks": (1, 1, 1, 1)}, "size",
     "size must halve 3 times, which 28 does not"),
    ({"size": 30}, "size", "size must halve 2 times, which 30 does not"),
    ({"embedding": 5}, "embedding", "embedding must be even and at least 4, not 5"),
    ({"classes": -1}, "classes", "classes must be a number of classes, or 0 for none, not -1")])
def test_size_that_does_not_fit_is_blamed_alone(sizes, blamed, message):
    """If an argument of UNet does not fit, the message names it, the one that it does not fit to,
    and no other.
    """
    arguments = inspect.signature(UNet).parameters
    with torch.random.fork_rng(devices=[]), pytest.raises(ValueError) as error:
        UNet(**sizes)
    assert str(error.value) == message
    named = {name for name in arguments if re.search(rf"\b{name}\b", message)}
    assert ", ".join(sorted(named)) == blamed


@pytest.mark.parametrize("sizes", [
    dict(channels=(8, 16, 24)), dict(classes=3), dict(channels=(24, 16, 8), heads=2), dict(size=32),
    dict(channels=(8, 12), blocks=(2, 1), groups=4, size=14), dict(channels=(8,), blocks=(3,)),
    dict(channels=(8, 16, 16, 8), blocks=(1, 1, 1, 1), size=32, embedding=6, time_width=3)])
def test_networks_of_other_sizes_work(sizes):
    """Every size can be changed; what the network remembers of them makes the same network."""
    model = seeded(lambda: UNet(**sizes), redraw=True)
    again = seeded(lambda: UNet(**model.config))
    again.load_state_dict(model.state_dict())
    size = sizes.get("size", 28)
    x = normal(1, 2, 1, size, size)
    t = torch.tensor([1, 500])
    y = model(x, t)
    assert y.shape == x.shape and y.isfinite().all() and y.std() > 0
    assert torch.equal(again(x, t), y)


class Mallopt:
    """In place of the C library: notes the calls of mallopt, and makes them."""

    library = ctypes.CDLL(None) if sys.platform == "linux" else None

    def __init__(self):
        self.calls = []

    def mallopt(self, *call):
        self.calls.append(call)
        return self.library.mallopt(*call)


@pytest.fixture
def mallopt(monkeypatch) -> Mallopt:
    recorder = Mallopt()
    monkeypatch.setattr(ctypes, "CDLL", lambda name: recorder)
    return recorder


@pytest.mark.skipif(sys.platform != "linux", reason="the names are those of Linux's C library")
def test_memory_of_the_layers_is_kept(mallopt):
    """malloc.h: M_TRIM_THRESHOLD is -1, M_MMAP_THRESHOLD -3, each an int. For a CPU both are set to
    a gigabyte or more, which mallopt(3) accepts. For a GPU they are left alone.
    """
    prepare_device(torch.device("cuda"))
    assert mallopt.calls == []
    prepare_device(torch.device("cpu"))
    assert mallopt.calls == [(-1, 2**31 - 1), (-3, 2**30)]
    assert [Mallopt.library.mallopt(*call) for call in mallopt.calls] == [1, 1]


@pytest.mark.parametrize("name", ["cuda", "mps", "cpu"])
def test_only_preparing_a_device_changes_settings(name, mallopt, monkeypatch):
    """pick_device chooses and changes nothing; prepare_device has convolutions computed in float32
    and not in TensorFloat-32, whatever was set before.
    """
    monkeypatch.setattr(torch.cuda, "is_available", lambda: name == "cuda")
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    monkeypatch.setattr(torch.backends.mps, "is_available", lambda: name == "mps")
    for allowed in (True, False):
        monkeypatch.setattr(torch.backends.cudnn, "allow_tf32", allowed)
        device = pick_device("auto")
        assert device.type == name and pick_device(name) == device
        assert torch.backends.cudnn.allow_tf32 is allowed and mallopt.calls == []
    monkeypatch.setattr(torch.backends.cudnn, "allow_tf32", True)
    prepare_device(device)
    assert torch.backends.cudnn.allow_tf32 is False


@pytest.mark.parametrize("cuda, mps, first", [
    (True, True, "cuda"), (False, True, "mps"), (True, False, "cuda"), (False, False, "cpu")])
def test_auto_is_the_first_device_there_is(cuda, mps, first, monkeypatch):
    """cuda comes before mps and mps before cpu. A device that is not available is refused, and the
    message names those that are.
    """
    monkeypatch.setattr(torch.cuda, "is_available", lambda: cuda)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setattr(torch.backends.mps, "is_available", lambda: mps)
    assert pick_device("auto").type == first
    known = {"cuda": cuda, "cuda:1": cuda, "cuda:2": False, "mps": mps, "cpu": True,
             "abacus": False}
    for name, available in known.items():
        if available:
            assert pick_device(name) == torch.device(name)
        else:
            with pytest.raises(ValueError, match=f"{name}.*auto.*cpu"):
                pick_device(name)


def test_table_counts_every_product():
    """Multiply-adds: for each number that a layer puts out, the products that it is a sum of.

    A convolution sums kernel x kernel x channels of them, a linear layer its inputs. Attention
    takes two products of (places x channels) with (channels x places) numbers or the like.
    """
    model = seeded(UNet).float()
    rows = describe(model)
    shapes = {name: shape for name, shape, _, _ in rows}
    assert sum(parameters for _, _, parameters, _ in rows) == 324_705
    assert list(shapes)[:3] == ["time_mlp", "stem", "encoder 0 0"]
    assert shapes["encoder 2 1"] == (48, 7, 7)
    total = 0

    def count(layer, inputs, output):
        nonlocal total
        if isinstance(layer, torch.nn.Conv2d | torch.nn.Linear):
            total += output.numel() * layer.weight.numel() // layer.weight.shape[0]
        elif isinstance(layer, Attention):
            total += 2 * (output.shape[2] * output.shape[3]) ** 2 * output.shape[1]

    for layer in model.modules():
        layer.register_forward_hook(count)
    with torch.no_grad():
        model(torch.zeros(1, 1, 28, 28), torch.ones(1, dtype=torch.long))
    assert sum(multiply_adds for _, _, _, multiply_adds in rows) == total


def test_script_prints_the_table(capsys):
    """python unet.py ends with the total."""
    with torch.random.fork_rng(devices=[]):
        unet.main()
    assert capsys.readouterr().out.splitlines()[-1].split()[:2] == ["total", "324,705"]
