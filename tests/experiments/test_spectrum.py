"""The spectrum that spectrum.py writes: other axes keep all lengths and the total variance."""

import json

import pytest
import torch

from tests.experiments.spectrum import RESULTS, spectrum
from tests.strategies import normal

pytestmark = pytest.mark.slow


def test_axes_are_those_of_a_known_covariance():
    """Images of two independent pixels: the variances along the axes are theirs, largest first.

    Pixel values k on 0..255 become 2k/255 - 1, so variances and means are scaled accordingly.
    """
    images = torch.full((400, 1, 2, 2), 128, dtype=torch.uint8)
    images[::2, 0, 0, 0] = 0
    images[1::2, 0, 0, 0] = 200
    images[:200, 0, 1, 1] = 10
    images[200:, 0, 1, 1] = 50
    numbers = spectrum(images)
    scale = (2 / 255) ** 2
    assert torch.allclose(torch.tensor(numbers["variance"]),
                          torch.tensor([100**2 * scale, 20**2 * scale, 0, 0]), atol=1e-6)
    first, second = (abs(2 * k / 255 - 1) for k in (100, 30))
    assert torch.allclose(torch.tensor(numbers["mean"][:2]), torch.tensor([first, second]),
                          atol=1e-6)


def test_total_variance_and_length_of_the_mean_are_kept():
    """Other axes change neither the sum of all variances nor the length of the mean."""
    images = (normal(0, 50, 1, 4, 4) * 40 + 100).clamp(0, 255).to(torch.uint8)
    numbers = spectrum(images)
    x = images.double().flatten(1) / 127.5 - 1
    assert abs(sum(numbers["variance"]) - x.var(dim=0, correction=0).sum().item()) < 1e-5
    assert abs(sum(m * m for m in numbers["mean"]) - x.mean(dim=0).square().sum().item()) < 1e-5
    assert numbers["variance"] == sorted(numbers["variance"], reverse=True)


def test_file_is_of_mnist():
    """784 axes; a mean variance of 0.269 a pixel; the mean of no pixel lies outside [-1, 1]."""
    numbers = json.loads(RESULTS.read_text())
    assert len(numbers["mean"]) == len(numbers["variance"]) == 784
    assert abs(sum(numbers["variance"]) / 784 - 0.269) < 0.001
    assert sum(m * m for m in numbers["mean"]) <= 784
