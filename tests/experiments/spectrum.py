"""Write pretrained/spectrum.json: mean and variance of MNIST along its principal axes.

    python tests/spectrum.py --data DIR        some seconds

A normal distribution with the mean and covariance of the 60,000 training images, pixels in
[-1, 1], falls apart into 784 independent numbers if it is turned onto the eigenvectors of the
covariance. The best noise predictor for each of them is known exactly. So the tests can ask how
well a sampler does on data whose spectrum is that of digits, without a network and without MNIST.
"""

import argparse
import json
import sys
from pathlib import Path

import torch

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from train import from_uint8, load_images  # noqa: E402

RESULTS = ROOT / "pretrained" / "spectrum.json"


def spectrum(images: torch.Tensor) -> dict[str, list[float]]:
    """uint8 (N, 1, H, W) -> "mean" and "variance" along each axis, largest variance first.

    An axis has no direction: which sign its mean has is a matter of chance, so it is made positive.
    """
    x = from_uint8(images).flatten(1).double()
    mean = x.mean(dim=0)
    variance, axes = torch.linalg.eigh((x - mean).T @ (x - mean) / len(x))
    return {name: [float(f"{value:.7g}") for value in values.flip(0).tolist()] for name, values in
            (("mean", (mean @ axes).abs()), ("variance", variance.clamp(min=0)))}


def main() -> None:
    parser = argparse.ArgumentParser(description="Write the spectrum of the training images.")
    parser.add_argument("--data", default=str(ROOT / "data"), help="folder that holds MNIST/raw")
    found = spectrum(load_images(parser.parse_args().data)[0])
    RESULTS.write_text(json.dumps(found) + "\n")
    print(f"wrote {RESULTS}: {len(found['mean'])} axes, mean variance of a pixel "
          f"{sum(found['variance']) / len(found['variance']):.4f}")


if __name__ == "__main__":
    main()
