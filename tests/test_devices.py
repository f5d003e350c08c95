"""What a device other than the CPU demands: no float64 on it, contiguous images, the same digits.

Torch's "meta" device computes shapes, strides and types, but no numbers. Here it stands in for a
device without float64, such as Apple's MPS: the tests look at everything that is made on it.
"""

from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from sample import SHIPPED, VARIANCES, sample, to_uint8
from schedule import NoiseSchedule
from train import Config, draw_t, learning_rate, load_checkpoint, training_step
from unet import UNet, pick_device, prepare_device

# Gradients of these were wrong on MPS for images that are not contiguous (PyTorch issues 175188,
# 180984, 192212).
DELICATE = ("convolution", "silu", "sigmoid", "tanh", "gelu")


class Watch(TorchDispatchMode):
    """Notes the operations on the meta device: all of them, those that make float64, and delicate
    ones on images that are not contiguous.
    """

    def __init__(self):
        super().__init__()
        self.operations = set()
        self.double = []
        self.strided = []

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


def test_sampling_makes_no_float64_on_the_device(monkeypatch):
    """A chain of every sampler and variance, clipped and not, makes float32 alone, and all images
    are contiguous.
    """
    # There are no numbers on the meta device, so none can be looked at.
    monkeypatch.setattr("sample.check_finite", lambda *arguments: None)
    with torch.device("meta"):
        model = UNet()
    chains = [dict(variance=variance, clip=variance == "beta") for variance in VARIANCES]
    chains += [dict(sampler="ddim", eta=0.5), dict(sampler="dpm++"),
               dict(sampler="sde-dpm++", clip=False)]
    with Watch() as watch:
        for options in chains:
            for _ in sample(model, NoiseSchedule(6, "cosine"), [0, 1], steps=4, **options):
                pass
    assert "aten::convolution" in watch.operations and not watch.double and not watch.strided


def test_training_makes_no_float64_on_the_device():
    """A training step with its gradients, their clipping, Adam and the average makes float32 alone,
    and all images are contiguous.
    """
    with torch.device("meta"):
        model = UNet()
        average = UNet().requires_grad_(False)
    run = SimpleNamespace(
        config=Config(), model=model, network=model, average=average, device=torch.device("meta"),
        adam=torch.optim.Adam(model.parameters(), foreach=False), schedule=NoiseSchedule(),
        generator=torch.Generator().manual_seed(0), draw_t=draw_t, learning_rate=learning_rate,
        step=0, steps=10)
    x0 = torch.rand(4, 1, 28, 28, generator=run.generator) * 2 - 1
    with Watch() as watch:
        loss = training_step(run, x0)
    assert run.step == 1 and loss.device.type == "meta" and loss.dtype == torch.float32
    assert {"aten::convolution_backward", "aten::addcdiv_"} <= watch.operations
    assert not watch.double and not watch.strided


@pytest.mark.skipif(not (torch.cuda.is_available() or torch.backends.mps.is_available()),
                    reason="needs a GPU")
def test_same_seed_same_digit_on_a_gpu():
    """In float32 a GPU draws the digits of the CPU, to within one grey level."""
    drawn = []
    for name in ("cpu", "auto"):
        device = pick_device(name)
        prepare_device(device)
        checkpoint = load_checkpoint(SHIPPED)
        model = checkpoint.model.to(device)
        for _, images, _ in sample(model, checkpoint.schedule, [0, 1, 2, 3], steps=100):
            pass
        drawn.append(to_uint8(images.cpu()).int())
    assert (drawn[0] - drawn[1]).abs().max() <= 1
