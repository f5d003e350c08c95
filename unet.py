"""Part 2. The network: it looks at a noisy image and says what the noise was.

Given x_t and t, the network returns ε_θ(x_t, t), its guess at the noise ε inside x_t. Any
trainable function of an image and t that returns an image will do; a UNet is the common choice.

    python unet.py        the network as a table: output shape, parameters, multiply-adds

The plan, with the size of the image at each stage:

    x_t   28x28 ─ stem ─ block ───────────────── keep ──────────────── merge ─ block ─ head ─ ε_θ
                           │ half the size                               │ twice the size
                  14x14    └─ block ──────────── keep ──────────── merge ─ block
                                │ half the size                      │ twice the size
                   7x7          └─ 2 blocks ─ keep ─ attention ─ merge ─ 2 blocks ─ attention

The stem and the head are the first and the last convolution, "merge" stacks two images and mixes
them. An "image" inside the network has many channels, one for each filter of the layer before.

Each part answers a need:

  * Whether a bright spot is noise or a bit of a stroke depends on what is around it. At 7x7 a 3x3
    convolution sees a large part of the digit at little cost. Hence the way down, and the way up.
  * Noise is a matter of single pixels, and halving destroys these. So the image of each size is
    kept on the way down and given to the way up, stacked as further channels ("skip connection").
  * How much noise to expect depends on t, at every depth. So every block is told t.
  * Strokes in opposite corners belong to the same digit. Attention at 7x7 lets every place look
    at every other place.

The default network has 324,705 parameters, as many as the plain network of the blog that this book
follows (README.md). Where they stand matters: a weight of a convolution is used 784 times at 28x28
but 49 times at 7x7. So 7x7 has two blocks each way, not one, and most of the weights. The few at
28x28, 13 % of all, still take 61 % of the arithmetic.

What parts are worth, by the loss on test digits after 3 epochs without (tests/ablations.py): it is
4.7 % higher without GroupNorm (see ResidualBlock), 3.0 % if t is told at 7x7 alone. Without
attention it is the same: eight convolutions at 7x7 reach across it, too. It is in most UNets.

Sources: [UNet] Ronneberger, Fischer and Brox 2015, arXiv 1505.04597, for the shape. [Attention]
Vaswani et al. 2017, arXiv 1706.03762. [FiLM] Perez et al. 2018, arXiv 1709.07871. [DDPM] Ho et al.
2020, arXiv 2006.11239, appendix B, for residual blocks and attention in it.
"""

import ctypes
import math
import sys

import torch
import torch.nn.functional as F
from einops import einsum, rearrange
from torch import nn
from torch.utils.flop_counter import FlopCounterMode


def timestep_embedding(t: torch.Tensor, dim: int) -> torch.Tensor:
    """Turn a step number into `dim` smooth features.                   [Attention section 3.5]

    t    (B,) integers or floats, the t of schedule.py, 1..T (not divided by T)
    dim  even, at least 4

    Returns (B, dim) float32: sines in the first half, cosines in the second, whose wavelengths
    grow from 2π to 20,000π steps. The short waves tell t from t + 1, the long ones small t from
    large t. A single number t/1000 would leave the network to invent such features itself.
    Raises ValueError if dim is odd or below 4."""
    if dim < 4 or dim % 2:
        raise ValueError(f"an embedding needs an even dimension of at least 4, not {dim}")
    half = dim // 2
    i = torch.arange(half, dtype=torch.float32, device=t.device)
    frequency = torch.exp(-math.log(10_000) * i / (half - 1))  # (dim/2,) from 1 to 1/10,000
    angle = t.float()[:, None] * frequency[None, :]  # (B, dim/2)
    return torch.cat([angle.sin(), angle.cos()], dim=1)  # (B, dim)


def zero(layer: nn.Conv2d | nn.Linear) -> nn.Conv2d | nn.Linear:
    """Set a layer's weights to zero.

    A block whose last layer is zero adds nothing, so the network starts as a simple one. A zero
    weight still learns, since its gradient depends on its input, not on itself. With the head and
    the gain (the end of UNet.forward) at zero too, the first answer is 0, the loss mean(ε²) = 1."""
    nn.init.zeros_(layer.weight)
    nn.init.zeros_(layer.bias)
    return layer


class ResidualBlock(nn.Module):
    """Two 3x3 convolutions that know t, added to their input.

    Because of the addition the block has to learn only a correction, and gradients reach the early
    layers of a deep network without getting weaker at each block.

    channels    C, in and out, a multiple of groups
    time_width  width of the time features
    groups      GroupNorm brings each of this many groups of channels to mean 0 and variance 1,
                then rescales. It works on one image at a time. BatchNorm would mix images of
                different t, whose statistics differ.

    SiLU, x/(1 + exp(-x)), bends the values between two convolutions. Without such a bend they
    could be multiplied out to a single one."""

    def __init__(self, channels: int, time_width: int, groups: int):
        super().__init__()
        self.norm1 = nn.GroupNorm(groups, channels)
        self.conv1 = nn.Conv2d(channels, channels, 3, padding=1)
        self.norm2 = nn.GroupNorm(groups, channels)
        self.conv2 = zero(nn.Conv2d(channels, channels, 3, padding=1))
        self.film = nn.Linear(time_width, 2 * channels)

    def forward(self, x: torch.Tensor, time: torch.Tensor) -> torch.Tensor:
        """x (B, C, H, W), time (B, time_width) -> (B, C, H, W)"""
        h = self.conv1(F.silu(self.norm1(x)))
        # t sets a scale and a shift for every channel ("feature-wise linear modulation"), so that
        # a channel can be loud at some noise levels and silent at others.                [FiLM]
        # einops splits the 2C numbers into two groups of C: first all scales, then all shifts.
        scale, shift = rearrange(self.film(time), "b (two c) -> two b c 1 1", two=2)
        h = self.norm2(h) * (1 + scale) + shift
        return x + self.conv2(F.silu(h))


class Attention(nn.Module):
    """Every place in the image looks at every other place.         [Attention section 3.2]

    Each place emits a query (what do I look for), a key (what do I offer) and a value (what do I
    pass on). It receives the average of all values, weighted by how well its query fits the keys.
    The softmax makes these fits positive weights that sum to 1.

    channels  C, a multiple of heads and of groups
    heads     number of independent attentions, each on C/heads of the channels
    groups    of the GroupNorm
    """

    def __init__(self, channels: int, heads: int, groups: int):
        super().__init__()
        self.heads = heads
        self.norm = nn.GroupNorm(groups, channels)
        # 1x1 convolutions: the same small matrix at every place.
        self.query = nn.Conv2d(channels, channels, 1)
        # No bias for the keys: it would add the same number to all scores of a query, which the
        # softmax cancels. Such a parameter would never get a gradient.
        self.key = nn.Conv2d(channels, channels, 1, bias=False)
        self.value = nn.Conv2d(channels, channels, 1)
        self.out = zero(nn.Conv2d(channels, channels, 1))

    def weights(self, normed: torch.Tensor) -> torch.Tensor:
        """(B, C, H, W) -> (B, heads, HW, HW); row i says where place i looks, and sums to 1."""
        split = "b (head d) h w -> b head (h w) d"
        q = rearrange(self.query(normed), split, head=self.heads)
        k = rearrange(self.key(normed), split, head=self.heads)
        score = einsum(q, k, "b head i d, b head j d -> b head i j")
        # The standard deviation of a sum of d independent products grows as √d. Divided by √d the
        # scores are of order 1 for any d, where the softmax is soft and passes gradients.
        return (score / math.sqrt(q.shape[-1])).softmax(dim=-1)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """(B, C, H, W) -> (B, C, H, W)"""
        normed = self.norm(x)
        v = rearrange(self.value(normed), "b (head d) h w -> b head (h w) d", head=self.heads)
        seen = einsum(self.weights(normed), v, "b head i j, b head j d -> b head i d")
        seen = rearrange(seen, "b head (h w) d -> b (head d) h w", h=x.shape[2])
        return x + self.out(seen)


class Halve(nn.Module):
    """Halve the image, and let each place know where it is. [compare Attention, section 3.5]

    A convolution does the same at every place. From the zeros around the image it can tell the rim,
    but hardly the middle, where strokes are likely. So a learned image is added to the halved one.
    `size` is the side of the learned image; for images of another size it is stretched."""

    def __init__(self, before: int, after: int, size: int):
        super().__init__()
        # A convolution of stride 2 can choose what to keep; pooling cannot. A bias would be a
        # learned image that is the same everywhere, so it needs none.
        self.conv = nn.Conv2d(before, after, 3, stride=2, padding=1, bias=False)
        self.place = nn.Parameter(torch.zeros(after, size, size))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """(B, before, H, W) -> (B, after, H/2, W/2)"""
        x = self.conv(x)
        return x + F.interpolate(self.place[None], x.shape[2:], mode="nearest")


class UNet(nn.Module):
    """The noise predictor ε_θ(x_t, t).

    channels     channels at each size, largest image first; multiples of groups
    blocks       residual blocks at each size, on the way down and again on the way up
    embedding    dimension of the sinusoidal embedding of t
    time_hidden  hidden width of the perceptron that follows it
    time_width   width of the time features that every block receives
    heads        attention heads at the smallest size
    groups       groups of every GroupNorm
    size         side of the images; others can be given, see Halve

    The defaults make 324,705 parameters. Other choices work too; a model file remembers them.
    Raises ValueError for sizes that do not fit together.
    """

    def __init__(self, channels: tuple[int, ...] = (32, 32, 48),
                 blocks: tuple[int, ...] = (1, 1, 2), embedding: int = 80, time_hidden: int = 90,
                 time_width: int = 20, heads: int = 4, groups: int = 8, size: int = 28):
        super().__init__()
        if any(c % groups for c in channels) or channels[-1] % heads:
            raise ValueError(f"channels {tuple(channels)} must be multiples of groups = {groups}, "
                             f"and the last one of heads = {heads}")
        if len(blocks) != len(channels) or size % 2**(len(channels) - 1) or embedding % 2:
            raise ValueError("channels and blocks need one number for each resolution, size must "
                             f"halve {len(channels) - 1} times, embedding must be even")
        # What a model file needs to build this network again.
        self.config = dict(channels=list(channels), blocks=list(blocks), embedding=embedding,
                           time_hidden=time_hidden, time_width=time_width, heads=heads,
                           groups=groups, size=size)
        levels = range(len(channels))

        # A two-layer perceptron turns the sinusoids into what the blocks need to know about t.
        self.time_mlp = nn.Sequential(
            nn.Linear(embedding, time_hidden), nn.SiLU(),
            nn.Linear(time_hidden, time_width), nn.SiLU())

        self.stem = nn.Conv2d(1, channels[0], 3, padding=1)
        # As many blocks on the way up as on the way down, each with weights of its own.
        self.encoder, self.decoder = (nn.ModuleList(
            nn.ModuleList(ResidualBlock(channels[i], time_width, groups) for _ in range(blocks[i]))
            for i in levels) for _ in range(2))
        self.down = nn.ModuleList(
            Halve(channels[i], channels[i + 1], size // 2 ** (i + 1)) for i in levels[:-1])
        # At the smallest size: attention before the way up begins, and after its first stage.
        self.attention = nn.ModuleList(Attention(channels[-1], heads, groups) for _ in range(2))
        # What comes from below and what was kept are stacked and mixed by a 1x1 convolution. At the
        # smallest size, "below" is the output of attention, with as many channels.
        self.merge = nn.ModuleList(
            nn.Conv2d(channels[min(i + 1, levels[-1])] + channels[i], channels[i], 1)
            for i in levels)
        self.head = nn.Sequential(
            nn.GroupNorm(groups, channels[0]), nn.SiLU(),
            zero(nn.Conv2d(channels[0], 1, 3, padding=1)))
        self.gain = zero(nn.Linear(time_width, 2))

    def forward(self, xt: torch.Tensor, t: torch.Tensor) -> torch.Tensor:
        """Guess the noise in a batch of noisy images.

        xt  (B, 1, H, W) noisy images; H and W multiples of 4, 28 for MNIST
        t   (B,) integers in 1..T, the noise level of each image

        Returns ε_θ, (B, 1, H, W). Raises ValueError for shapes that do not fit.
        """
        step = 2 ** len(self.down)  # the image is halved this many times
        if xt.dim() != 4 or xt.shape[1] != 1 or xt.shape[2] % step or xt.shape[3] % step:
            raise ValueError(f"images must be (B, 1, H, W) with H and W multiples of {step}, "
                             f"not {tuple(xt.shape)}")
        if t.shape != xt.shape[:1]:
            raise ValueError(f"t must be ({len(xt)},), one for each image, not {tuple(t.shape)}")

        embedding = timestep_embedding(t, self.config["embedding"]).to(xt.dtype)
        time = self.time_mlp(embedding)  # (B, time_width)

        # The way down. Shapes are those of the default network.
        x = self.stem(xt)  # (B, 32, 28, 28)
        kept = []
        for i, blocks in enumerate(self.encoder):
            if i > 0:
                x = self.down[i - 1](x)  # (B, 32, 14, 14), then (B, 48, 7, 7)
            for block in blocks:
                x = block(x, time)
            kept.append(x)

        # The way up, from the smallest size.
        x = self.attention[0](x)  # (B, 48, 7, 7)
        for i in reversed(range(len(kept))):
            if i + 1 < len(kept):
                x = F.interpolate(x, scale_factor=2.0, mode="nearest")  # 7 -> 14, then 14 -> 28
            x = self.merge[i](torch.cat([x, kept[i]], dim=1))
            for block in self.decoder[i]:
                x = block(x, time)  # (B, 48, 7, 7), (B, 32, 14, 14), (B, 32, 28, 28)
            if i + 1 == len(kept):
                x = self.attention[1](x)

        # At large t the noise is nearly x_t itself, and the layers above would have to carry every
        # pixel of it unharmed through their normalisations. Instead, t sets two numbers: how much
        # of x_t is added at the end, and by how much the answer of the layers is scaled.
        echo, scale = rearrange(self.gain(time), "b two -> two b 1 1 1")
        return echo * xt + (1 + scale) * self.head(x)  # (B, 1, 28, 28)


def pick_device(name: str) -> torch.device:
    """The device of that name, or ValueError; "auto" is the first of cuda, mps, cpu there is."""
    gpus = ["cuda", *(f"cuda:{i}" for i in range(torch.cuda.device_count()))]
    there = gpus * torch.cuda.is_available() + ["mps"] * torch.backends.mps.is_available() + ["cpu"]
    name = there[0] if name == "auto" else name
    if name not in there:
        raise ValueError(f"device {name!r} is not available; here: auto, {', '.join(there)}")
    torch.backends.cudnn.allow_tf32 = False  # float32 on every device, not 10 bits of it on GPUs
    if name == "cpu" and sys.platform == "linux":
        # The C library would give the memory of each layer back to Linux and then get it again,
        # zeroed, for the next. Keeping it makes sampling on two cores 1.5 times as fast.
        ctypes.CDLL(None).mallopt(-1, 2**31 - 1)  # M_TRIM_THRESHOLD: keep up to 2 GiB
        ctypes.CDLL(None).mallopt(-3, 2**30)  # M_MMAP_THRESHOLD: ask the heap, not Linux
    return torch.device(name)


def describe(model: UNet) -> list[tuple[str, tuple[int, ...], int, int]]:
    """What each stage does to one image: (name, output shape, parameters, multiply-adds), in the
    order of execution. Convolutions, linear layers and matrix products are what is counted."""
    # A stage is a child of the model, or of one of its lists.
    names = {stage: name for name, stage in model.named_modules()
             if not isinstance(stage, UNet | nn.ModuleList)
             and isinstance(model.get_submodule(name.rpartition(".")[0]), UNet | nn.ModuleList)}
    shapes = {}  # in the order of execution
    hooks = [stage.register_forward_hook(
        lambda stage, _, output: shapes.update({stage: tuple(output.shape[1:])}))
        for stage in names]
    size = model.config["size"]
    with torch.no_grad(), FlopCounterMode(display=False) as counter:
        model(torch.zeros(1, 1, size, size), torch.ones(1, dtype=torch.long))
    for hook in hooks:
        hook.remove()
    flops = counter.get_flop_counts()  # a multiplication and an addition are two of them
    return [(names[stage].replace(".", " "), shape, sum(p.numel() for p in stage.parameters()),
             sum(flops[f"UNet.{names[stage]}"].values()) // 2) for stage, shape in shapes.items()]


def main() -> None:
    rows = describe(UNet())
    print(f"{'stage':<12} {'output':>14} {'parameters':>11} {'multiply-adds':>14}")
    for name, shape, parameters, macs in rows:
        print(f"{name:<12} {' x '.join(map(str, shape)):>14} {parameters:11,} {macs:14,}")
    total = [sum(column) for column in zip(*[row[2:] for row in rows])]
    print(f"{'total':<12} {'':>14} {total[0]:11,} {total[1]:14,}")


if __name__ == "__main__":
    main()
