"""The laws of the yardstick: what a distance between sets of images must and must not see."""

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from tests.experiments import yardstick
from tests.experiments.yardstick import (
    frechet_distance, load_classifier, look, measure, nearest, quality, resized)
from tests.strategies import FEW, SEED, normal, pictures
from train import builtin_digits

pytestmark = pytest.mark.slow


@given(SEED, st.integers(1, 6), st.integers(10, 40))
def test_distance_of_a_set_to_itself_is_zero_and_symmetric(seed, width, count):
    """d(a, a) = 0, d(a, b) = d(b, a), and the order of the rows does not matter."""
    a = normal(seed, count, width)
    b = normal(seed + 1, count + 3, width) * 2 + 1
    assert abs(frechet_distance(a, a)) < 1e-10
    assert math.isclose(frechet_distance(a, b), frechet_distance(b, a), rel_tol=1e-8)
    assert math.isclose(frechet_distance(a, b), frechet_distance(a.flip(0), b), rel_tol=1e-8)


@given(SEED, st.floats(0.1, 10), st.floats(-5, 5))
def test_distance_in_one_dimension_is_known(seed, stretch, shift):
    """In one dimension it is (μ_a - μ_b)² + (σ_a - σ_b)². (Heusel et al., equation 6)"""
    a = normal(seed, 30, 1)
    b = a * stretch + shift
    expected = (a.mean() - b.mean()) ** 2 + (a.std() - b.std()) ** 2
    assert math.isclose(frechet_distance(a, b), expected.item(), rel_tol=1e-9, abs_tol=1e-11)


@given(SEED)
def test_distance_equals_the_general_formula(seed):
    """The trace of (C_a C_b)^½ is the sum of the roots of the eigenvalues of C_a C_b, as a solver
    for matrices that are not symmetric computes them.
    """
    a = normal(seed, 50, 4) @ normal(seed + 1, 4, 4)
    b = normal(seed + 2, 50, 4) @ normal(seed + 3, 4, 4)
    eigenvalues = torch.linalg.eigvals(a.T.cov() @ b.T.cov())
    expected = ((a.mean(0) - b.mean(0)).square().sum() + a.T.cov().trace() + b.T.cov().trace()
                - 2 * eigenvalues.real.clamp(min=0).sqrt().sum())
    # Eigenvalues near 0 are exact to about 1e-16 of the largest one, and their roots to 1e-8 of its
    # root.
    scale = (a.T.cov().trace() + b.T.cov().trace()).item()
    assert abs(frechet_distance(a, b) - expected.item()) < 1e-6 * scale


@given(SEED, st.floats(0.3, 0.9))
def test_distance_sees_covariance_alone(seed, correlation):
    """Two sets of standard normal pairs with the same means and variances, the second with a
    correlation of ρ: the distance is 2 (2 - √(1 + ρ) - √(1 - ρ)), because (C_a C_b)^½ has the
    eigenvalues √(1 ± ρ).
    """
    x = normal(seed, 200, 2)
    x = x - x.mean(0)
    white = x @ torch.linalg.inv(torch.linalg.cholesky(x.T.cov())).T  # covariance 1, exactly
    mix = torch.tensor([[1, 0], [correlation, math.sqrt(1 - correlation**2)]], dtype=torch.float64)
    expected = 2 * (2 - math.sqrt(1 + correlation) - math.sqrt(1 - correlation))
    assert math.isclose(frechet_distance(white, white @ mix.T), expected, rel_tol=1e-8)


@FEW
@given(SEED)
def test_nearest_equals_a_plain_loop(seed):
    """It is the smallest root of the mean square of the difference, with the index of that image;
    it is 0 if the image itself is among the others.
    """
    images = pictures(5, 8, seed)
    others = pictures(7, 8, seed + 1)
    loop = [[((a - b) ** 2).mean().sqrt().item() for b in others.double() / 127.5]
            for a in images.double() / 127.5]
    distance, index = nearest(images, others)
    # The squares cancel in float32: 64 products of size 1, each rounded to 6e-8, give errors of
    # 64 * 6e-8 / 64 in the mean square, and of its root near zero.
    assert distance.tolist() == pytest.approx([min(row) for row in loop], abs=1e-3)
    assert all(row[k] <= min(row) + 1e-3 for row, k in zip(loop, index.tolist()))
    assert nearest(images, torch.cat([others, images]))[0].amax() < 1e-3


def test_training_teaches_the_classifier_and_measure_sees_what_was_drawn():
    """After six passes over 400 built-in digits it is far better than chance on others, to which
    noise has a much larger distance than digits have.
    """
    images, labels = builtin_digits(400, seed=0)
    others, truth = builtin_digits(200, seed=1)
    classifier = yardstick.train_classifier(images, labels, epochs=6, batch_size=25)
    reference = look(classifier, others)
    assert reference[0].dtype == reference[1].dtype == torch.float64
    assert torch.allclose(reference[1].sum(1), torch.ones(200, dtype=torch.float64))
    assert (reference[1].argmax(1) == truth).double().mean() > 0.6  # chance is 0.1
    real = measure(classifier, images[:200], reference, images)
    static = torch.randint(256, (200, 1, 28, 28), generator=torch.Generator().manual_seed(0),
                           dtype=torch.uint8)
    noise = measure(classifier, static, reference, images)
    assert sum(real["classes"]) == real["count"] == 200
    assert real["nearest"] < 1e-3 < noise["nearest"]
    assert 10 * real["distance"] < noise["distance"]
    same = measure(classifier, others, reference, images)
    assert same["chi2"] == 0 and abs(same["distance"]) < 1e-6 * real["distance"]


def test_shipped_classifier_fits_the_script():
    """pretrained/yardstick.pt holds the network of build_classifier, in plain tensors."""
    classifier = yardstick.load_classifier()
    images, labels = builtin_digits(300, seed=2)
    right = (look(classifier, images)[1].argmax(1) == labels).double().mean()
    assert right > 0.5  # trained on handwriting, it can read print


@FEW
@given(SEED, st.sampled_from([8, 16, 20, 32]))
def test_resizing_keeps_what_an_image_shows(seed, size):
    """A constant stays constant, and a ramp stays the same ramp away from its ends. A mirrored or
    transposed image gives the mirrored or transposed result, so nothing is shifted. Images of 28x28
    pixels stay as they are.
    """
    images = pictures(3, size=size, seed=seed)
    result = resized(images)
    assert result.shape == (3, 1, 28, 28) and result.dtype == torch.uint8
    for turn in (lambda x: x.flip(3), lambda x: x.transpose(2, 3)):
        assert (resized(turn(images)).int() - turn(result).int()).abs().max() <= 1
    assert resized(result) is result

    grey = torch.full((1, 1, size, size), seed % 256, dtype=torch.uint8)
    assert (resized(grey) == seed % 256).all()

    def ramp(count: int) -> torch.Tensor:
        return 20 + 200 * (torch.arange(count) + 0.5) / count

    slope = ramp(size).round().to(torch.uint8).expand(1, 1, size, size)
    inner = slice(8, 20)
    assert (resized(slope)[0, 0, 0].float() - ramp(28))[inner].abs().max() < 1.5


def test_quality_is_the_share_of_clear_images_and_their_distance():
    """Of digits and of noise, the one by counting, the other by the function that is tested above;
    digits of 16x16 pixels are judged at 28x28.
    """
    classifier = load_classifier()
    digits, _ = builtin_digits(30, seed=4)
    noise = torch.randint(256, (30, 1, 28, 28), generator=torch.Generator().manual_seed(0))
    images = torch.cat([digits, noise.to(torch.uint8)])
    reference = normal(1, 20, 64)
    features, probabilities = look(classifier, images)
    clear = sum(max(row) > 0.9 for row in probabilities.tolist())
    assert 0 < clear < 60
    assert quality(classifier, images, reference) == {
        "clear": clear / 60, "distance": frechet_distance(features, reference)}
    small = images[:, :, 6:22, 6:22]
    assert quality(classifier, small, reference) == quality(classifier, resized(small), reference)
