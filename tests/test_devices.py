"""What a device other than the CPU demands: no float64 on it, contiguous images, the same digits.

Torch's "meta" device computes shapes, strides and types without numbers. So it stands in for a
device that has no float64, as Apple's MPS: whatever is made on it is looked at here.
"""

import pytest
import torch
import torch.nn.functional as F
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from sample import SHIPPED, VARIANCES, sample, to_uint8
from schedule import NoiseSchedule
from train import load_checkpoint, update_average
from unet import UNet, pick_device

# Gradients of these were wrong on MPS for images that are not contiguous (PyTorch issues 175188,
# 180984, 192212).
DELICATE = ("convolution", "silu", "sigmoid", "tanh", "gelu")


class Watch(TorchDispatchMode):
    """Notes what is made on the meta device in float64, and delicate operations on odd strides."""

    def __init__(self):
        super().__init__()
        self.double, self.strided, self.operations = [], [], set()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        name = func.name()
        for tensor in tree_leaves(result):
            if isinstance(tensor, torch.Tensor) and tensor.device.type == "meta":
                self.operations.add(name)
                if tensor.dtype == torch.float64:
                    self.double.append(name)
        if any(word in name for word in DELICATE):
            # The gradient that a convolution is given may be a slice of channels, from torch.cat.
            # Its images and weights may not.
            given = args[1:] if name == "aten::convolution_backward" else args
            self.strided += [name for tensor in tree_leaves((given, kwargs))
                             if isinstance(tensor, torch.Tensor) and not tensor.is_contiguous()]
        return result


def test_watch_sees_what_it_should():
    """The watcher notices a float64 tensor and a transposed image on the device."""
    with Watch() as watch:
        torch.zeros(2, 3, device="meta", dtype=torch.float64)
        F.silu(torch.zeros(2, 3, device="meta").T)
    assert watch.double and watch.strided


def test_sampling_makes_no_float64_on_the_device():
    """A chain of every sampler and variance, with and without clipping: float32 alone, contiguous."""
    with torch.device("meta"):
        model = UNet()
    chains = [dict(variance=variance, clip=variance == "beta") for variance in VARIANCES]
    chains += [dict(sampler="ddim", eta=0.5), dict(sampler="dpm++"), dict(sampler="sde-dpm++", clip=False)]
    with Watch() as watch:
        for options in chains:
            for _ in sample(model, NoiseSchedule(6, "cosine"), [0, 1], steps=4, **options):
                pass
    assert "aten::convolution" in watch.operations and not watch.double and not watch.strided


def test_training_makes_no_float64_on_the_device():
    """One step forward and back, clipping and averaging: float32 alone, contiguous."""
    with torch.device("meta"):
        model, average = UNet(), UNet().requires_grad_(False)
    schedule, generator = NoiseSchedule(), torch.Generator().manual_seed(0)
    x0 = torch.rand(4, 1, 28, 28, generator=generator) * 2 - 1
    eps, t = torch.randn(x0.shape, generator=generator), torch.tensor([1, 2, 500, 1000])
    with Watch() as watch:
        xt = schedule.q_sample(x0, t, eps)
        loss = F.mse_loss(model(xt.to("meta"), t.to("meta")), eps.to("meta"))
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        update_average(average, model, 0, 0.999)
    assert "aten::convolution_backward" in watch.operations
    assert not watch.double and not watch.strided


@pytest.mark.skipif(not (torch.cuda.is_available() or torch.backends.mps.is_available()),
                    reason="needs a GPU")
def test_same_seed_same_digit_on_a_gpu():
    """In float32 a GPU draws the digits of the CPU, to within one grey level."""
    drawn = []
    for device in ("cpu", "cuda" if torch.cuda.is_available() else "mps"):
        checkpoint = load_checkpoint(SHIPPED)
        model = checkpoint.model.to(pick_device(device))
        for _, images, _ in sample(model, checkpoint.schedule, [0, 1, 2, 3], steps=100):
            pass
        drawn.append(to_uint8(images.cpu()).int())
    assert (drawn[0] - drawn[1]).abs().max() <= 1
