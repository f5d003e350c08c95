"""What the tests draw: schedules, steps, and tensors made from drawn integer seeds.

Hypothesis does not know torch's generators. So it draws an integer, which seeds a generator, which
makes the tensors: the same integer always gives the same tensors, and a failing example can be
replayed and shrunk.
"""

import copy
import struct
from pathlib import Path

import torch
from hypothesis import assume, settings
from hypothesis import strategies as st

from schedule import NoiseSchedule

SEED = st.integers(0, 2**32 - 1)
# For laws that take long to check.
FEW = settings(max_examples=settings.default.max_examples // 5)


@st.composite
def schedules(draw, max_T: int = 40) -> NoiseSchedule:
    """Any betas in [1e-5, 0.5], as long as some signal is left at the end: alpha_bar_T >= 1e-8."""
    betas = draw(st.lists(st.floats(1e-5, 0.5), min_size=2, max_size=max_T))
    schedule = NoiseSchedule.from_betas(betas, allow_signal=True)
    assume(schedule.alpha_bar[-1] >= 1e-8)
    return schedule


@st.composite
def schedules_and_t(draw, lowest: int = 1) -> tuple[NoiseSchedule, int]:
    """A schedule and one of its steps, lowest <= t <= T."""
    schedule = draw(schedules())
    return schedule, draw(st.integers(lowest, schedule.T))


def normal(seed: int, *shape: int, dtype=torch.float64) -> torch.Tensor:
    """Standard normal numbers that depend on the seed alone."""
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=dtype)


def pictures(count: int, size: int = 28, seed: int = 0) -> torch.Tensor:
    """uint8 (count, 1, size, size): in each, a white rectangle somewhere on black."""
    generator = torch.Generator().manual_seed(seed)
    images = torch.zeros(count, 1, size, size, dtype=torch.uint8)
    for image in images:
        top, left = torch.randint(0, size // 2, (2,), generator=generator).tolist()
        height, width = torch.randint(2, size // 2, (2,), generator=generator).tolist()
        image[0, top:top + height, left:left + width] = 255
    return images


def same_state(a: Path, b: Path) -> bool:
    """Whether two model files hold the same, apart from the seconds that the runs took."""
    def equal(x, y) -> bool:
        if isinstance(x, dict):
            keys = [key for key in x if key != "seconds"]
            if keys != [key for key in y if key != "seconds"]:
                return False
            return all(equal(x[key], y[key]) for key in keys)
        if isinstance(x, list | tuple):
            return len(x) == len(y) and all(map(equal, x, y))
        if isinstance(x, torch.Tensor):
            return torch.equal(x, y)
        return x == y

    return equal(torch.load(a, weights_only=True), torch.load(b, weights_only=True))


def write_mnist(folder: Path, images: torch.Tensor, labels: torch.Tensor,
                splits: tuple[str, ...] = ("train", "t10k")) -> None:
    """Write images and labels as both splits of MNIST, or as one, in its own file format (IDX).

    images, labels  uint8 (N, 1, H, W) and integers (N,)
    """
    raw = folder / "MNIST" / "raw"
    raw.mkdir(parents=True, exist_ok=True)
    for split in splits:
        head = struct.pack(">IIII", 0x803, len(images), images.shape[2], images.shape[3])
        (raw / f"{split}-images-idx3-ubyte").write_bytes(head + images.numpy().tobytes())
        head = struct.pack(">II", 0x801, len(labels))
        (raw / f"{split}-labels-idx1-ubyte").write_bytes(
            head + labels.to(torch.uint8).numpy().tobytes())


def with_changes(original, **attributes):
    """A copy of an object, but with other attributes."""
    other = copy.copy(original)
    vars(other).update(attributes)
    return other


def same_images(a: torch.Tensor, b: torch.Tensor) -> bool:
    """Whether two sets of bytes are the same up to rounding, which depends on the batch."""
    return (a.int() - b.int()).abs().max().item() <= 1
