"""Part 2. The network: it looks at a noisy image and says what the noise was.

Given x_t and t, the network returns ε_θ(x_t, t), its guess at the noise ε inside x_t. Any trainable
function of an image and t that returns an image will do; a UNet is the common choice.

    python unet.py        the network as a table: output shape, parameters, multiply-adds

The plan, with the size of the image at each stage:

    x_t   28x28 ─ stem ─ block ───────────────── keep ──────────────── merge ─ block ─ head ─ ε_θ
                           │ half the size                               │ twice the size
                  14x14    └─ block ──────────── keep ──────────── merge ─ block
                                │ half the size                      │ twice the size
                   7x7          └─ 2 blocks ─ keep ─ attention ─ merge ─ 2 blocks ─ attention

The stem and the head are the first and the last convolution; "merge" stacks two images and mixes
them. Each way down and up begins at the end of its row. An "image" inside the network has many
channels, one for each filter of the layer before.

Each part answers a need:

  * Whether a bright spot is noise or a bit of a stroke depends on what is around it. At 7x7 a 3x3
    convolution sees a large part of the digit at little cost. Hence the way down to 7x7, and the
    way back up to the size of the noise. The size is halved twice, not three times: 7 is odd.
  * Noise is a matter of single pixels, and halving destroys these. So the image of each size is
    kept on the way down and given to the way up, stacked as further channels ("skip connection").
  * How much of x_t is noise depends on t, and what to do at each size depends on that. So every
    block is told t. (A network for labels is told in the same way which digit is in the image.)
  * Strokes in opposite corners belong to the same digit. Attention at 7x7 lets every place look
    at every other place.
  * At large t the noise is nearly x_t itself. A shortcut, not drawn above, adds a multiple of x_t
    to the output; t decides how much (see the end of UNet.forward).

How much do they contribute? We trained without some of them for 3 epochs and compared the loss on
test digits (the mean squared error of the predicted noise). If only the blocks at 7x7 are told t,
it is 3.0 % higher; without the normalisation of ResidualBlock, 4.8 %, and then far fewer digits can
be read. Without attention it is the same, and the digits that it draws are as good: the eight
convolutions at 7x7 reach across the image, too. Attention stays because most UNets have it. (One
run each; two seeds differ by 0.3 %. The design itself was chosen earlier, by the loss on training
digits held out for the purpose.)

The default network has exactly 324,705 parameters, as many as that of the blog series
"Deconstructing Diffusion Models", whose figures these five scripts redraw. It matters where they
are. A weight of a convolution is used 784 times at 28x28, but only 49 times at 7x7, where it costs
a sixteenth of the arithmetic. So 7x7 has two blocks each way, the other sizes one, and most of the
weights are there. The few at 28x28, 13 % of all, still take 61 % of the arithmetic.

CONTENTS. 1. How the network is told t. 2. The residual block. 3. Attention. 4. Halving the image.
5. The UNet. Below the line: the device, and the table.

Sources: [UNet] Ronneberger, Fischer and Brox 2015, arXiv 1505.04597, for the shape. [Attention]
Vaswani et al. 2017, arXiv 1706.03762. [FiLM] Perez et al. 2018, arXiv 1709.07871. [DDPM] Ho et al.
2020, arXiv 2006.11239, appendix B, for residual blocks and attention in the UNet.
"""

import ctypes
import math
import os
import sys

import torch
import torch.nn.functional as F
from einops import einsum, rearrange
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

# ------------------------------------------------------------- 1. How the network is told t
#
# If the network were given the single number t/1000, then t = 10 and t = 11 would look almost the
# same to it. A clock solves this problem with several hands: the second hand tells neighbouring
# seconds apart, the hour hand tells one o'clock from six. The embedding of t is a clock with dim/2
# hands, from one that goes round every 2π steps to one that takes 20,000π, each slower than the one
# before by the same factor. The sine and the cosine of its angle say where a hand points.

def timestep_embedding(t: torch.Tensor, dim: int) -> torch.Tensor:
    """Turn a step number into `dim` smooth features.                   [Attention section 3.5]

    t    (B,) integers or floats, the t of schedule.py, 1..T (not divided by T)
    dim  even, at least 4

    Returns (B, dim) float32: sines in the first half, cosines in the second. Raises ValueError if
    dim is odd or below 4.
    """
    if dim < 4 or dim % 2:
        raise ValueError(f"an embedding needs an even dimension of at least 4, not {dim}")
    half = dim // 2
    i = torch.arange(half, dtype=torch.float32, device=t.device)
    frequency = torch.exp(-math.log(10_000) * i / (half - 1))  # (dim/2,) from 1 to 1/10,000
    angle = t.float()[:, None] * frequency[None, :]  # (B, dim/2)
    return torch.cat([angle.sin(), angle.cos()], dim=1)  # (B, dim)


# ---------------------------------------------------------------------- 2. The residual block
#
# A residual block adds a correction to its input: x + f(x). It has to learn only the correction,
# and since x passes through unchanged, gradients reach the early layers of a deep network without
# getting weaker at each block.
#
# If the last layer of f starts at zero, the block at first hands on its input, as if it were not
# there, and training begins with a simple network. A weight of zero still learns: its gradient is
# its input times the gradient that arrives from the next layer, and the weight itself occurs in
# neither. Zeros pass no gradient on to the layers before them, so these learn a step or two later,
# once the zeros have moved. The head and the shortcut of the network start at zero, too. So the
# first answer is 0 for every image, and the first loss is mean(ε²), about 1.

def zero(layer: nn.Conv2d | nn.Linear) -> nn.Conv2d | nn.Linear:
    """Set the weights and the bias of a layer to zero, and return it."""
    nn.init.zeros_(layer.weight)
    nn.init.zeros_(layer.bias)
    return layer


class ResidualBlock(nn.Module):
    """Two 3x3 convolutions that know t, added to their input.

    channels    C, in and out, a multiple of groups
    time_width  width of the time features
    groups      number of groups of each GroupNorm
    """

    def __init__(self, channels: int, time_width: int, groups: int):
        super().__init__()
        # GroupNorm divides the channels into groups, brings each group to mean 0 and variance 1
        # over its channels and all pixels of one image, then scales and shifts every channel by
        # learned numbers. BatchNorm, the other usual choice, takes mean and variance over all
        # images of a batch. It would mix images of different t, which differ in their noise.
        self.norm1 = nn.GroupNorm(groups, channels)
        self.conv1 = nn.Conv2d(channels, channels, 3, padding=1)
        self.norm2 = nn.GroupNorm(groups, channels)
        self.conv2 = zero(nn.Conv2d(channels, channels, 3, padding=1))
        self.film = nn.Linear(time_width, 2 * channels)

    def forward(self, x: torch.Tensor, time: torch.Tensor) -> torch.Tensor:
        """x (B, C, H, W), time (B, time_width) -> (B, C, H, W)"""
        # SiLU, x/(1 + exp(-x)), is not linear. Without it, two convolutions in a row could do no
        # more than a single one.
        h = self.conv1(F.silu(self.norm1(x)))

        # t sets a scale and a shift for every channel ("feature-wise linear modulation", FiLM), so
        # that a channel can be loud at some noise levels and silent at others.           [FiLM]
        #
        # einops moves dimensions about as a pattern says: on the left of the arrow those of the
        # input, on the right those of the output. Brackets join several into one. Here the layer
        # gives 2C numbers for each image. They are split into C scales and C shifts, with two
        # dimensions of size 1 added, so that each applies to a whole channel.
        scale, shift = rearrange(self.film(time), "b (two c) -> two b c 1 1", two=2)
        h = self.norm2(h) * (1 + scale) + shift  # a scale of 0 leaves the channel as it is

        return x + self.conv2(F.silu(h))


# ------------------------------------------------------------------------------ 3. Attention
#
# A convolution sees only neighbours. In attention every place of the image emits a query (what it
# looks for), a key (what it offers) and a value (what it passes on). It receives the average of all
# values, weighted by how well its query fits the keys. The softmax turns these scores into positive
# weights that sum to 1. Several attention heads (not to be confused with the head of the network)
# do this side by side, each on a part of the channels.

class Attention(nn.Module):
    """Every place in the image looks at every other place.         [Attention section 3.2]

    channels  C, a multiple of heads and of groups
    heads     number of independent attentions, each on C/heads of the channels
    groups    number of groups of the GroupNorm
    """

    def __init__(self, channels: int, heads: int, groups: int):
        super().__init__()
        self.heads = heads
        self.norm = nn.GroupNorm(groups, channels)
        # A 1x1 convolution applies the same small matrix at every place.
        self.query = nn.Conv2d(channels, channels, 1)
        # The keys have no bias b. A query q would score key k as q·(k + b) = q·k + q·b, and q·b is
        # the same for all keys, so it cancels in the softmax. b would never get a gradient.
        self.key = nn.Conv2d(channels, channels, 1, bias=False)
        self.value = nn.Conv2d(channels, channels, 1)
        self.out = zero(nn.Conv2d(channels, channels, 1))

    def weights(self, normed: torch.Tensor) -> torch.Tensor:
        """(B, C, H, W) -> (B, heads, HW, HW); row i says where place i looks, and sums to 1."""
        # Split the channels into heads of d channels each, and join rows and columns into one list
        # of places.
        split = "b (head d) h w -> b head (h w) d"
        q = rearrange(self.query(normed), split, head=self.heads)
        k = rearrange(self.key(normed), split, head=self.heads)
        # For every pair of places i and j: the sum over d of query times key.
        score = einsum(q, k, "b head i d, b head j d -> b head i j")
        # The standard deviation of a sum of d independent products grows as √d. Divided by √d the
        # scores are of order 1 for any d. Much larger ones would make all weights nearly 0 or 1,
        # and then no gradients would pass.
        return (score / math.sqrt(q.shape[-1])).softmax(dim=-1)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """(B, C, H, W) -> (B, C, H, W)"""
        normed = self.norm(x)
        v = rearrange(self.value(normed), "b (head d) h w -> b head (h w) d", head=self.heads)
        # For every place i: the sum over all places j of weight times value.
        received = einsum(self.weights(normed), v, "b head i j, b head j d -> b head i d")
        received = rearrange(received, "b head (h w) d -> b (head d) h w", h=x.shape[2])
        return x + self.out(received)


# ---------------------------------------------------------------------- 4. Halving the image
#
# A convolution of stride 2 computes every other place only. Unlike pooling, which takes a mean or a
# maximum, it can learn what to keep. But a convolution does the same at every place and does not
# know where in the image that is; only at the border does it notice the zeros of the padding. Yet
# strokes are likely in the middle and rare in the corners. So a learned image, the same for every
# input, is added to the halved one and tells each place where it is.

class Halve(nn.Module):
    """Halve the image, and let each place know where it is.

    before, after  channels before and after
    size           side of the learned image; for images of another size it is stretched
    """

    def __init__(self, before: int, after: int, size: int):
        super().__init__()
        # No bias: it would add a constant to each channel, which the learned image can do as well.
        self.conv = nn.Conv2d(before, after, 3, stride=2, padding=1, bias=False)
        self.place = nn.Parameter(torch.zeros(after, size, size))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """(B, before, H, W) -> (B, after, H/2, W/2)"""
        x = self.conv(x)
        return x + F.interpolate(self.place[None], x.shape[2:], mode="nearest")


# ------------------------------------------------------------------------------- 5. The UNet

class UNet(nn.Module):
    """The noise predictor ε_θ(x_t, t).

    channels     channels at each size, largest image first; multiples of groups
    blocks       residual blocks at each size, on the way down and again on the way up
    embedding    dimension of the sinusoidal embedding of t
    time_hidden  hidden width of the two-layer perceptron (MLP) that follows it
    time_width   width of the time features that every block receives
    heads        attention heads at the smallest size
    groups       groups of every GroupNorm
    size         side of the images; others can be given, see Halve
    classes      number of classes that the images may have labels of; 0 for images without labels

    The defaults make 324,705 parameters, and ten classes 200 more. Other choices work too; a model
    file remembers them. Raises ValueError for sizes that do not fit together.
    """

    def __init__(self, channels: tuple[int, ...] = (32, 32, 48),
                 blocks: tuple[int, ...] = (1, 1, 2), embedding: int = 80, time_hidden: int = 90,
                 time_width: int = 20, heads: int = 4, groups: int = 8, size: int = 28,
                 classes: int = 0):
        super().__init__()
        check_sizes(channels, blocks, embedding, heads, groups, size, classes)
        # What a model file needs to build this network again.
        self.config = dict(channels=list(channels), blocks=list(blocks), embedding=embedding,
                           time_hidden=time_hidden, time_width=time_width, heads=heads,
                           groups=groups, size=size, classes=classes)

        # A two-layer perceptron turns the sinusoids into what the blocks need to know about t.
        self.time_mlp = nn.Sequential(
            nn.Linear(embedding, time_hidden), nn.SiLU(),
            nn.Linear(time_hidden, time_width), nn.SiLU())

        # For labels: a row for each class, which is added to the time features, so that every block
        # is told the class in the same way as t. The rows start at zero, as if nothing were told.
        if classes > 0:
            self.table = nn.Parameter(torch.zeros(classes, time_width))

        # The first convolution turns one grey channel into many.
        self.stem = nn.Conv2d(1, channels[0], 3, padding=1)

        # Residual blocks for each size, largest first: on the way down, and as many on the way up,
        # with weights of their own.
        def stage(width: int, count: int) -> nn.ModuleList:
            return nn.ModuleList(ResidualBlock(width, time_width, groups) for _ in range(count))

        # By default these are stage(32, 1), stage(32, 1) and stage(48, 2).
        self.encoder = nn.ModuleList(map(stage, channels, blocks))
        self.decoder = nn.ModuleList(map(stage, channels, blocks))

        # From each size to the next smaller one.
        self.down = nn.ModuleList()
        for level in range(1, len(channels)):
            self.down.append(Halve(channels[level - 1], channels[level], size // 2**level))

        # At the smallest size: attention before the way up begins, and after its first stage.
        smallest = channels[-1]
        self.attention = nn.ModuleList(Attention(smallest, heads, groups) for _ in range(2))

        # At each size, what comes from the next smaller one and what was kept are stacked and mixed
        # by a 1x1 convolution. At the smallest size nothing comes from below; the output of
        # attention is used instead.
        self.merge = nn.ModuleList()
        from_below = [*channels[1:], smallest]
        for below, width in zip(from_below, channels):
            self.merge.append(nn.Conv2d(below + width, width, 1))

        # Back to one grey channel.
        self.head = nn.Sequential(
            nn.GroupNorm(groups, channels[0]), nn.SiLU(),
            zero(nn.Conv2d(channels[0], 1, 3, padding=1)))

        # Two numbers, computed from the time features, for the shortcut from x_t to the output.
        self.gain = zero(nn.Linear(time_width, 2))

    def forward(self, xt: torch.Tensor, t: torch.Tensor,
                label: torch.Tensor | None = None) -> torch.Tensor:
        """Guess the noise in a batch of noisy images.

        xt     (B, 1, H, W) noisy images; H and W multiples of 4, 28 for MNIST
        t      (B,) integers in 1..T, the noise level of each image
        label  (B,) integers, the class of each image, 0..classes-1, or -1 if it is not told; None
               tells none

        Returns ε_θ, (B, 1, H, W). Raises ValueError for shapes that do not fit, and for labels that
        the network has no table for; IndexError for a label out of range (on a CPU).
        """
        check_inputs(xt, t, label, 2**len(self.down), self.config["classes"])

        # Tell the network t.
        embedding = timestep_embedding(t, self.config["embedding"]).to(xt.dtype)
        time = self.time_mlp(embedding)  # (B, time_width)

        # Tell it the class of each image, if there are labels. With a row of zeros in front of the
        # table, label -1 adds nothing. (pad puts 0 columns left and right, 1 row above, 0 below.)
        if label is not None:
            with_none = F.pad(self.table, (0, 0, 1, 0))  # (1 + classes, time_width)
            time = time + F.embedding(label + 1, with_none)

        # The way down. The shapes are those of the default network.
        x = self.stem(xt)  # (B, 32, 28, 28)
        kept = []
        for level, blocks in enumerate(self.encoder):
            if level > 0:
                x = self.down[level - 1](x)  # (B, 32, 14, 14), then (B, 48, 7, 7)
            for block in blocks:
                x = block(x, time)
            kept.append(x)

        # The way up, from the smallest size.
        smallest = len(kept) - 1
        x = self.attention[0](x)  # (B, 48, 7, 7)
        for level in reversed(range(len(kept))):
            if level < smallest:
                x = F.interpolate(x, scale_factor=2.0, mode="nearest")  # 7 -> 14, then 14 -> 28
            x = self.merge[level](torch.cat([x, kept[level]], dim=1))
            for block in self.decoder[level]:
                x = block(x, time)  # (B, 48, 7, 7), (B, 32, 14, 14), (B, 32, 28, 28)
            if level == smallest:
                x = self.attention[1](x)

        # The shortcut. At large t the noise is nearly x_t itself, and the layers would have to pass
        # on every pixel of it unharmed through all the normalisations. Instead, t sets two numbers:
        # how much of x_t is added at the end, and by how much the answer of the head is scaled.
        echo, scale = rearrange(self.gain(time), "b two -> two b 1 1 1")
        return echo * xt + (1 + scale) * self.head(x)  # (B, 1, 28, 28)


# =========================================================================================
# Below this line is plumbing: arguments that do not fit, the device, and the table.
# =========================================================================================

def check_sizes(channels, blocks, embedding: int, heads: int, groups: int, size: int,
                classes: int) -> None:
    """Raise ValueError if the arguments of UNet do not fit together."""
    if len(blocks) != len(channels):
        raise ValueError("channels and blocks need one number for each resolution, "
                         f"not {len(channels)} and {len(blocks)}")
    if any(width % groups for width in channels):
        raise ValueError(f"channels {tuple(channels)} must be multiples of groups = {groups}")
    if channels[-1] % heads:
        raise ValueError(f"the last of the channels {tuple(channels)} must be a multiple of "
                         f"heads = {heads}")
    halvings = len(channels) - 1
    if size % 2**halvings:
        raise ValueError(f"size must halve {halvings} times, which {size} does not")
    if embedding % 2 or embedding < 4:
        raise ValueError(f"embedding must be even and at least 4, not {embedding}")
    if classes < 0:
        raise ValueError(f"classes must be a number of classes, or 0 for none, not {classes}")


def check_inputs(xt: torch.Tensor, t: torch.Tensor, label: torch.Tensor | None, multiple: int,
                 classes: int) -> None:
    """Raise ValueError if the arguments of UNet.forward do not fit the network or each other.

    multiple  H and W must be multiples of it
    classes   the number of classes that the network knows
    """
    if xt.dim() != 4 or xt.shape[1] != 1 or xt.shape[2] % multiple or xt.shape[3] % multiple:
        raise ValueError(f"images must be (B, 1, H, W) with H and W multiples of {multiple}, "
                         f"not {tuple(xt.shape)}")
    if t.shape != xt.shape[:1]:
        raise ValueError(f"t must be ({len(xt)},), one for each image, not {tuple(t.shape)}")
    if label is not None and label.shape != t.shape:
        raise ValueError(f"label must be ({len(xt)},), one for each image, "
                         f"not {tuple(label.shape)}")
    if label is not None and classes == 0:
        raise ValueError("this network knows no labels; build it with classes=10, say")


def pick_device(name: str) -> torch.device:
    """The device of that name; "auto" is the first of cuda, mps and cpu that is there.

    Raises ValueError if there is no such device.
    """
    available = ["cpu"]
    if torch.backends.mps.is_available():
        available = ["mps", *available]
    if torch.cuda.is_available():
        numbered = [f"cuda:{i}" for i in range(torch.cuda.device_count())]
        available = ["cuda", *numbered, *available]

    if name == "auto":
        name = available[0]
    if name not in available:
        raise ValueError(f"device {name!r} is not available; "
                         f"here: auto, {', '.join(available)}")
    return torch.device(name)


def prepare_device(device: torch.device) -> None:
    """Set what must be set before a network computes on a device."""
    # GPUs should compute in float32, not with the 10 bits of TensorFloat-32 in convolutions.
    torch.backends.cudnn.allow_tf32 = False

    # On a CPU, the C library would give the memory of each layer back to Linux, and then get it
    # again, zeroed, for the next. Keeping it makes sampling on two cores 1.5 times as fast.
    if device.type == "cpu" and sys.platform == "linux":
        c_library = ctypes.CDLL(None)
        c_library.mallopt(-1, 2**31 - 1)  # M_TRIM_THRESHOLD: keep up to 2 GiB
        c_library.mallopt(-3, 2**30)  # M_MMAP_THRESHOLD: ask the heap, not Linux


def describe(model: UNet) -> list[tuple[str, tuple[int, ...], int, int]]:
    """What each stage does to one image, in the order of execution.

    Returns for each stage its name, its output shape without the batch, its number of parameters
    and its multiply-adds in convolutions, linear layers and matrix products.
    """
    # A stage is a part of the model, or of one of its lists.
    names = {}
    for name, module in model.named_modules():
        parent = model.get_submodule(name.rpartition(".")[0])
        is_part = isinstance(parent, UNet | nn.ModuleList)
        if is_part and not isinstance(module, UNet | nn.ModuleList):
            names[module] = name

    # Send one image through, and note the shape of what each stage returns.
    shapes = {}  # in the order of execution

    def note_shape(stage, inputs, output):
        shapes[stage] = tuple(output.shape[1:])

    hooks = [stage.register_forward_hook(note_shape) for stage in names]
    size = model.config["size"]
    with torch.no_grad(), FlopCounterMode(display=False) as counter:
        model(torch.zeros(1, 1, size, size), torch.ones(1, dtype=torch.long))
    for hook in hooks:
        hook.remove()

    # PyTorch counts a multiplication and an addition as two operations.
    operations = counter.get_flop_counts()
    rows = []
    for stage, shape in shapes.items():
        parameters = sum(p.numel() for p in stage.parameters())
        multiply_adds = sum(operations[f"UNet.{names[stage]}"].values()) // 2
        rows.append((names[stage].replace(".", " "), shape, parameters, multiply_adds))
    return rows


def main() -> None:
    print(f"{'stage':<12} {'output':>14} {'parameters':>11} {'multiply-adds':>14}")
    all_parameters = 0
    all_multiply_adds = 0
    for name, shape, parameters, multiply_adds in describe(UNet()):
        output = " x ".join(map(str, shape))
        print(f"{name:<12} {output:>14} {parameters:11,} {multiply_adds:14,}")
        all_parameters += parameters
        all_multiply_adds += multiply_adds
    print(f"{'total':<12} {'':>14} {all_parameters:11,} {all_multiply_adds:14,}")


if __name__ == "__main__":
    try:
        main()
        print(end="", flush=True)
    except BrokenPipeError:  # the reader has left, as in `| head -1`; say nothing about it
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
