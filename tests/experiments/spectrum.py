"""Write pretrained/spectrum.json: mean and variance of MNIST along its principal axes.

    python -m tests.experiments.spectrum --data DIR        some seconds

Take a normal distribution with the mean and the covariance of the 60,000 training images, pixels in
[-1, 1]. Expressed along the eigenvectors of the covariance (the principal axes), it consists of 784
independent numbers, and the best noise predictor for each of them is known exactly. So the tests
can ask how well a sampler does on data whose spectrum is that of digits, without a network and
without MNIST.
"""

import argparse
import json

import torch

from train import HERE, from_uint8, load_images

RESULTS = HERE / "pretrained" / "spectrum.json"


def spectrum(images: torch.Tensor) -> dict[str, list[float]]:
    """uint8 (N, 1, H, W) -> "mean" and "variance" along each axis, the largest variance first.

    An axis has no direction, so the sign of the mean along it is arbitrary; it is made positive.
    """
    x = from_uint8(images).flatten(1).double()
    mean = x.mean(dim=0)
    covariance = (x - mean).T @ (x - mean) / len(x)
    variance, axes = torch.linalg.eigh(covariance)  # the smallest variance first
    along = {"mean": (mean @ axes).abs(), "variance": variance.clamp(min=0)}
    return {name: [float(f"{value:.7g}") for value in values.flip(0).tolist()]
            for name, values in along.items()}


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description="Write the spectrum of the training images.")
    parser.add_argument("--data", default=str(HERE / "data"),
                        help="folder that holds MNIST/raw (default: %(default)s)")
    args = parser.parse_args(argv)
    images, _ = load_images(args.data)
    numbers = spectrum(images)
    RESULTS.write_text(json.dumps(numbers) + "\n")
    mean_variance = sum(numbers["variance"]) / len(numbers["variance"])
    print(f"wrote {RESULTS}: {len(numbers['mean'])} axes, mean variance of a pixel "
          f"{mean_variance:.4f}")


if __name__ == "__main__":
    main()
