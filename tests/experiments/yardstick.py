"""How good are the samples? A yardstick for MNIST: how close they are to real digits, in numbers.

    python -m tests.experiments.yardstick --data DIR           500 samples of your own or the
                                                               shipped model
    python -m tests.experiments.yardstick --data DIR --train   first train the classifier anew

A small classifier, trained on the 60,000 training images, looks at five sets of N images: training
images (the floor: real digits, but not those compared with), test images, samples, the same samples
with their pixels shuffled, and noise (the ceiling). Each set is compared with the 10,000 test
images.

distance    the Fréchet distance between two normal distributions: those with the means and the
            covariances of the classifier's 64 features on the two sets. It measures both quality
            and variety. It depends on N, on the classifier and on the set compared with, so compare
            only numbers that share all three. (The usual FID takes the features of a network that
            was trained on photographs.)
confident   the share of images that the classifier assigns to one digit with more than 90 %
classes     how many of each digit it sees, and χ², the sum of (seen - expected)²/expected over the
            ten classes, expected as in the test images. In a fair draw, χ² is 9 on average and
            exceeds 21.7 in 1 % of cases.
nearest     the median distance to the nearest of the 60,000 training images, as the root of the
            mean square over pixels in [-1, 1]; a value far below that of real test digits would
            mean that images are copied

The classifier is shipped as pretrained/yardstick.pt, so that all measure with the same one.

Source: Heusel et al. 2017, arXiv 1706.08500.
"""

import argparse
import json
import time
from pathlib import Path

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import nn
from tqdm import tqdm

from plots import fingerprint
from sample import SAMPLERS, SHIPPED, VARIANCES, open_checkpoint, sample, to_uint8
from schedule import NoiseSchedule
from train import HERE, from_uint8, load_images, save
from unet import pick_device, prepare_device

CLASSIFIER = SHIPPED.parent / "yardstick.pt"


def build_classifier() -> nn.Sequential:
    """Five convolutions, 64 features, ten scores. (N, 1, 28, 28) in [-1, 1] -> (N, 10)."""
    def layer(inputs: int, outputs: int, stride: int) -> list[nn.Module]:
        return [nn.Conv2d(inputs, outputs, 3, stride, padding=1, bias=False),
                nn.BatchNorm2d(outputs), nn.ReLU()]

    return nn.Sequential(
        *layer(1, 16, 1), *layer(16, 32, 2), *layer(32, 32, 1), *layer(32, 64, 2),
        *layer(64, 64, 1), nn.Flatten(), nn.Dropout(0.3), nn.Linear(64 * 7 * 7, 64), nn.ReLU(),
        nn.Linear(64, 10))


def train_classifier(images: torch.Tensor, labels: torch.Tensor, epochs: int = 8,
                     batch_size: int = 128) -> nn.Sequential:
    """Learn digits, uint8 (N, 1, 28, 28) with labels (N,); each batch is shifted a little."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)  # for the initial weights and for Dropout
        model = build_classifier().train()
        generator = torch.Generator().manual_seed(0)
        adam = torch.optim.Adam(model.parameters(), lr=2e-3)
        steps = epochs * (len(images) // batch_size)
        decay = torch.optim.lr_scheduler.LinearLR(adam, 1.0, 0.0, total_iters=steps)
        bar = tqdm(total=steps, unit=" steps", disable=None)
        for _ in range(epochs):
            order = torch.randperm(len(images), generator=generator)
            for rows in order.split(batch_size)[:steps // epochs]:
                shift = torch.randint(-2, 3, (2,), generator=generator).tolist()
                x = from_uint8(images[rows]).roll(shift, dims=(2, 3))
                loss = F.cross_entropy(model(x), labels[rows], label_smoothing=0.02)
                adam.zero_grad()
                loss.backward()
                adam.step()
                decay.step()
                bar.update()
        bar.close()
    return model.eval()


def load_classifier(path: Path = CLASSIFIER) -> nn.Sequential:
    """The shipped classifier, with which all measure."""
    with torch.device("meta"):  # shapes only: random weights would be overwritten at once
        model = build_classifier()
    model.load_state_dict(torch.load(path, weights_only=True), assign=True)
    return model.float().eval()


@torch.no_grad()
def look(classifier: nn.Sequential, images: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """uint8 (N, 1, H, H) -> features, float64 (N, 64), and probabilities, float64 (N, 10).

    Images that have not 28x28 pixels are shown to the classifier at this size.
    """
    features = torch.cat([classifier[:-1](from_uint8(part)) for part in resized(images).split(500)])
    return features.double(), classifier[-1](features).double().softmax(dim=1)


def resized(images: torch.Tensor, size: int = 28) -> torch.Tensor:
    """Images uint8 (N, 1, H, H) with smooth edges at another size, uint8 (N, 1, size, size)."""
    if images.shape[-1] == size:
        return images
    return to_uint8(F.interpolate(from_uint8(images), (size, size), mode="bicubic"))


def clear_share(probabilities: torch.Tensor) -> float:
    """The share of images that show one digit with a probability above 0.9; takes (N, 10)."""
    return (probabilities.amax(dim=1) > 0.9).double().mean().item()


def quality(classifier: nn.Sequential, images: torch.Tensor, reference: torch.Tensor) -> dict:
    """The share of clear images, and their Fréchet distance.

    reference  the features of the images to compare with, as look() returns them
    """
    features, probabilities = look(classifier, images)
    return {"clear": clear_share(probabilities),
            "distance": frechet_distance(features, reference)}


def frechet_distance(a: torch.Tensor, b: torch.Tensor) -> float:
    """|μ_a - μ_b|² + trace(C_a + C_b - 2 (C_a C_b)^½) of two sets of features.

    a, b  float64 (N, D) and (M, D), N and M at least 2

    The formula is equation 6 of Heusel et al. The root of C_a C_b has the same trace as the root of
    R C_b R with R = C_a^½. This matrix is symmetric, so its eigenvalues are real and can be
    computed exactly.
    """
    def root(matrix: torch.Tensor) -> torch.Tensor:
        values, vectors = torch.linalg.eigh(matrix)
        return vectors * values.clamp(min=0).sqrt() @ vectors.T

    width = a.shape[1]
    cov_a = a.T.cov().reshape(width, width)  # cov() of a single feature is a plain number
    cov_b = b.T.cov().reshape(width, width)
    half = root(cov_a)
    cross = torch.linalg.eigvalsh(half @ cov_b @ half).clamp(min=0).sqrt().sum()
    return ((a.mean(dim=0) - b.mean(dim=0)).square().sum()
            + cov_a.trace() + cov_b.trace() - 2 * cross).item()


def nearest(images: torch.Tensor, others: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Distance from each image to the nearest other image, (N,), and the index of that one, (N,).

    Both arguments are uint8 (.., 1, H, W). The distance is the root of the mean square over pixels
    in [-1, 1].
    """
    pool = [rearrange(from_uint8(part), "n c h w -> n (c h w)") for part in others.split(10_000)]
    squares = []
    indices = []
    for part in images.split(250):  # 60 MB at a time for 60,000 others
        x = rearrange(from_uint8(part), "n c h w -> n (c h w)")
        # |x - y|² = |x|² - 2 x·y + |y|²: matrix products, a hundred times faster than differences
        all_squares = torch.cat([x.square().sum(1)[:, None] - 2 * x @ y.T + y.square().sum(1)
                                 for y in pool], dim=1)
        least = all_squares.min(dim=1)
        squares.append(least.values.clamp(min=0) / x.shape[1])
        indices.append(least.indices)
    return torch.cat(squares).sqrt(), torch.cat(indices)


def measure(classifier: nn.Sequential, images: torch.Tensor,
            reference: tuple[torch.Tensor, torch.Tensor], known: torch.Tensor) -> dict:
    """All of the numbers above, of uint8 images (N, 1, 28, 28).

    reference  what look() returned for the real images to compare with
    known      the training images, uint8
    """
    features, probabilities = look(classifier, images)
    counts = probabilities.argmax(dim=1).bincount(minlength=10)
    expected = reference[1].argmax(dim=1).bincount(minlength=10) * len(images) / len(reference[1])
    return {"count": len(images), "distance": frechet_distance(features, reference[0]),
            "confident": clear_share(probabilities),
            "chi2": ((counts - expected).square() / expected).sum().item(),
            "classes": counts.tolist(),
            "nearest": nearest(images, known)[0].median().item()}


def real_floor(classifier: nn.Sequential, known: torch.Tensor,
               reference: tuple[torch.Tensor, torch.Tensor], count: int,
               generator: torch.Generator) -> torch.Tensor:
    """How much of a distance is chance: the distances of up to ten sets of `count` training images,
    no two with an image in common.
    """
    sets = known[torch.randperm(len(known), generator=generator)].split(count)
    complete = [part for part in sets if len(part) == count][:10]
    return torch.tensor([frechet_distance(look(classifier, part)[0], reference[0])
                         for part in complete])


def draw_samples(checkpoint, seeds: range, device: torch.device, **options) -> torch.Tensor:
    """The images of these seeds, uint8 (N, 1, H, H); options are those of sample.sample.

    H is the size of the network, or 28 if it names none.
    """
    model = checkpoint.model.to(device)
    size = getattr(model, "config", {}).get("size", 28)
    options = {"shape": (1, size, size)} | options
    images = []
    bar = tqdm(total=len(seeds), unit=" images", disable=None)
    for part in torch.tensor(seeds).split(100 if device.type == "cpu" else 1000):
        *_, (_, x0, _) = sample(model, checkpoint.schedule, part.tolist(), **options)
        images.append(to_uint8(x0.cpu()))
        bar.update(len(part))
    bar.close()
    return torch.cat(images)


@torch.no_grad()
def loss_by_t(model: torch.nn.Module, schedule: NoiseSchedule,
              images: torch.Tensor) -> torch.Tensor:
    """Mean squared error of the predicted noise at each t, float64 (T+1,); entry 0 is 0.

    This is the measurement of train.evaluate, whose value is the mean of these numbers if all t are
    seen equally often.
    """
    device = next(model.parameters()).device
    noise = torch.randn(images.shape, generator=torch.Generator().manual_seed(0))
    levels = 1 + torch.arange(len(images)) % schedule.T
    total = torch.zeros(schedule.T + 1, dtype=torch.float64)
    count = torch.zeros(schedule.T + 1, dtype=torch.float64)
    for x0, t, eps in zip(images.split(128), levels.split(128), noise.split(128)):
        xt = schedule.q_sample(from_uint8(x0), t, eps)
        eps_hat = model(xt.to(device), t.to(device)).cpu()
        error = (eps - eps_hat).double().square().mean((1, 2, 3))
        total.index_add_(0, t, error)
        count.index_add_(0, t, torch.ones_like(error))
    return total / count.clamp(min=1)


def sets_to_compare(samples: torch.Tensor, known: torch.Tensor, real: torch.Tensor,
                    generator: torch.Generator) -> dict[str, torch.Tensor]:
    """The samples, and as many images of each other kind, uint8, by their name in the table."""
    count = len(samples)
    shuffled = samples.flatten(1)[:, torch.randperm(28 * 28, generator=generator)]
    return {
        "training images": known[torch.randperm(len(known), generator=generator)[:count]],
        "test images": real[torch.randperm(len(real), generator=generator)[:count]],
        "samples": samples,
        "samples, pixels shuffled": shuffled.view_as(samples),
        "noise": torch.randint(256, samples.shape, generator=generator, dtype=torch.uint8)}


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description="Measure how good the samples of a model are.")
    parser.add_argument("--data", default=str(HERE / "data"),
                        help="folder that holds MNIST/raw (default: %(default)s)")
    parser.add_argument("--checkpoint",
                        help="model file (default: your own run, else the shipped model)")
    parser.add_argument("--count", type=int, default=500,
                        help="number N of images in a set (default: %(default)s)")
    parser.add_argument("--sampler", choices=SAMPLERS, default="ddpm",
                        help="(default: %(default)s)")
    parser.add_argument("--variance", choices=VARIANCES, default="beta_tilde",
                        help="(default: %(default)s)")
    parser.add_argument("--steps", type=int,
                        help="(default: all T for ddpm, 50 for ddim, 20 for the others)")
    parser.add_argument("--device", default="auto",
                        help="cuda, mps or cpu (default: the first that is there)")
    parser.add_argument("--train", action="store_true", help="train the classifier anew")
    parser.add_argument("--out",
                        help="append the numbers of the samples to this file, as a line of JSON")
    args = parser.parse_args(argv)
    device = pick_device(args.device)
    prepare_device(device)
    begun = time.perf_counter()

    # Ask the classifier about the test images.
    known, labels = load_images(args.data, True)
    real, real_labels = load_images(args.data, False)
    if args.train:
        save(CLASSIFIER, train_classifier(known, labels).half().state_dict())
    classifier = load_classifier()
    reference = look(classifier, real)
    right = (reference[1].argmax(dim=1) == real_labels).double().mean().item()
    print(f"classifier: {right:.2%} of the test images right, "
          f"{clear_share(reference[1]):.1%} confident; "
          f"{time.perf_counter() - begun:.0f} s")

    # Draw the samples.
    generator = torch.Generator().manual_seed(0)
    path, checkpoint = open_checkpoint(args.checkpoint)
    samples = draw_samples(checkpoint, range(args.count), device, sampler=args.sampler,
                           variance=args.variance, steps=args.steps)

    # Measure all sets.
    print(f"{'set of ' + str(args.count):26}{'distance':>9}{'confident':>11}{'chi2':>9}"
          f"{'nearest':>9}   classes 0 to 9")
    for name, images in sets_to_compare(samples, known, real, generator).items():
        row = measure(classifier, images, reference, known)
        if name == "training images":  # each is nearest to itself, which says nothing
            row["nearest"] = 0.0
        print(f"{name:26}{row['distance']:9.2f}{row['confident']:11.1%}{row['chi2']:9.1f}"
              f"{row['nearest']:9.3f}   {' '.join(map(str, row['classes']))}")
        if args.out and name == "samples":
            row |= {"model": fingerprint(path), "sampler": args.sampler, "variance": args.variance,
                    "steps": args.steps}
            with open(args.out, "a") as file:
                file.write(json.dumps(row) + "\n")
    floor = real_floor(classifier, known, reference, args.count, generator)
    print(f"{len(floor)} sets of {args.count} training images: distance {floor.mean():.2f}, "
          f"standard deviation {floor.std():.2f}; {time.perf_counter() - begun:.0f} s")


if __name__ == "__main__":
    main()
