"""How fast the network trains and samples, beside the blog's plain network, in the same run.

    python -m tests.experiments.benchmark            about two minutes on two CPU cores

The blog's network has as many parameters as ours, so it is a yardstick that everyone can run: the
ratio of the two times says more than seconds, which depend on the machine and on what else runs on
it. Both networks are measured in turn, many times; the median and the best time are printed. A
matrix product of 2048 x 2048 in float32, the precision in which both networks compute, shows how
fast the machine itself is. "Of peak" is the share of that speed which the multiply-adds of a
network reach (a backward pass counts as two forward passes). Sampling is counted in image-steps: 32
digits in 1,000 steps are 32,000 of them. Sampling is measured once more with the weights laid out
as sample.py has them on a CPU, the channels of a pixel next to each other ("channels last").
"""

import argparse
import copy
import statistics
import sys
import time
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from unet import UNet, pick_device, prepare_device, timestep_embedding

PRODUCT_FLOP = 2 * 2048**3  # floating-point operations of the matrix product
BATCH = 128


class BlogNet(nn.Module):
    """The blog's network, rebuilt from its description.

    It has one 3x3 convolution a level, GELU, max pooling and transposed convolutions. t is added
    once, at 7x7. There are no norms, no residual connections and no attention.
    """

    def __init__(self):
        super().__init__()
        self.time = nn.Sequential(nn.Linear(256, 256), nn.GELU(), nn.Linear(256, 128))
        self.down = nn.ModuleList(nn.Conv2d(a, b, 3, padding=1)
                                  for a, b in ((1, 32), (32, 64), (64, 128)))
        self.enlarge = nn.ModuleList(nn.ConvTranspose2d(a, b, 2, stride=2)
                                     for a, b in ((128, 64), (64, 32)))
        self.up = nn.ModuleList(nn.Conv2d(a, b, 3, padding=1) for a, b in ((128, 64), (64, 32)))
        self.out = nn.Conv2d(32, 1, 1)

    def forward(self, xt: torch.Tensor, t: torch.Tensor) -> torch.Tensor:
        first = F.gelu(self.down[0](xt))  # (B, 32, 28, 28)
        second = F.gelu(self.down[1](F.max_pool2d(first, 2)))  # (B, 64, 14, 14)
        x = F.gelu(self.down[2](F.max_pool2d(second, 2)))  # (B, 128, 7, 7)
        x = x + self.time(timestep_embedding(t, 256))[:, :, None, None]
        x = F.gelu(self.up[0](torch.cat([self.enlarge[0](x), second], dim=1)))
        x = F.gelu(self.up[1](torch.cat([self.enlarge[1](x), first], dim=1)))
        return self.out(x)


@torch.no_grad()
def multiply_adds(model: nn.Module) -> int:
    """The multiply-adds of one image of 28x28 pixels."""
    with FlopCounterMode(display=False) as counter:
        model(torch.zeros(1, 1, 28, 28), torch.ones(1, dtype=torch.long))
    return counter.get_total_flops() // 2  # a multiplication and an addition are two operations


def trainer(model: nn.Module, xt: torch.Tensor, t: torch.Tensor) -> Callable[[], None]:
    """A function that trains the model for one step."""
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-4, fused=True)

    def step() -> None:
        optimizer.zero_grad()
        F.mse_loss(model(xt, t), xt).backward()
        optimizer.step()
    return step


def predictor(model: nn.Module, xt: torch.Tensor, t: torch.Tensor) -> Callable[[], None]:
    """A function that predicts the noise once, as in sampling."""
    @torch.no_grad()
    def predict() -> None:
        model(xt, t)
    return predict


def time_jobs(jobs: dict[str, Callable[[], None]], rounds: int,
              device: torch.device) -> dict[str, list[float]]:
    """The seconds that each job takes, in each round; all jobs take turns."""
    def wait() -> None:
        if device.type != "cpu":  # a GPU is still busy when Python goes on
            getattr(torch, device.type).synchronize()

    seconds = {name: [] for name in jobs}
    for k in range(rounds + 1):
        for name, job in jobs.items():
            wait()
            begun = time.perf_counter()
            for _ in range(3):
                job()
            wait()
            if k > 0:  # the first round warms up
                seconds[name].append((time.perf_counter() - begun) / 3)
    return seconds


def peak_memory(device: torch.device) -> int | None:
    """The most bytes that this process has held at a time, of the GPU if there is one."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated()
    if sys.platform == "win32":
        return None
    import resource  # which Windows does not have
    unit = 1 if sys.platform == "darwin" else 2**10  # bytes on a Mac, KiB elsewhere
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description="Measure the speed of both networks.")
    parser.add_argument("--device", default="auto",
                        help="cuda, mps or cpu (default: the first that is there)")
    parser.add_argument("--rounds", type=int, default=20,
                        help="measurements of each (default: %(default)s)")
    args = parser.parse_args(argv)
    device = pick_device(args.device)
    prepare_device(device)

    # Build both networks, and what they work on.
    generator = torch.Generator().manual_seed(0)
    xt = torch.randn(BATCH, 1, 28, 28, generator=generator).to(device)
    t = torch.randint(1, 1001, (BATCH,), generator=generator).to(device)
    square = torch.randn(2048, 2048, generator=generator).to(device)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        models = {"ours": UNet(), "the blog's": BlogNet()}
    macs = {name: multiply_adds(model) for name, model in models.items()}

    # Measure.
    jobs = {}
    for name, model in models.items():
        model.to(device)
        jobs[f"training, {name}"] = trainer(model, xt, t)
    for name, model in models.items():
        jobs[f"sampling, {name}"] = predictor(model, xt, t)
    channels_last = copy.deepcopy(models["ours"]).to(memory_format=torch.channels_last)
    jobs["sampling, channels last"] = predictor(channels_last, xt, t)
    jobs["product"] = lambda: square @ square
    seconds = time_jobs(jobs, args.rounds, device)

    # Print.
    def line(label: str, job: str, amount: float, flop: float) -> str:
        times = seconds[job]
        share = statistics.median((flop / a) / (PRODUCT_FLOP / b)
                                  for a, b in zip(times, seconds["product"]))
        return (f"{label:35} median {amount / statistics.median(times):7,.0f}   best "
                f"{amount / min(times):7,.0f}   of peak {share:4.0%}")

    print(f"torch {torch.__version__}, {device.type}, {torch.get_num_threads()} threads, float32")
    print(line("2048 x 2048 product, GFLOP/s", "product", PRODUCT_FLOP / 1e9, PRODUCT_FLOP))
    for task, passes, unit in (("training", 3, "images/s"), ("sampling", 1, "image-steps/s")):
        for name in models:
            flop = BATCH * passes * 2 * macs[name]
            print(line(f"{task}, {name}, {unit}", f"{task}, {name}", BATCH, flop))
        ratios = [a / b for a, b in zip(seconds[f"{task}, ours"], seconds[f"{task}, the blog's"])]
        print(f"{task}: ours takes {statistics.median(ratios):.2f} times the blog's time")
    ratios = [a / b for a, b in zip(seconds["sampling, channels last"], seconds["sampling, ours"])]
    print(f"sampling: channels last takes {statistics.median(ratios):.2f} times the time of the "
          "usual layout")
    print("multiply-adds: " + ", ".join(f"{name} {n / 1e6:.1f} M" for name, n in macs.items()))
    peak = peak_memory(device)
    if peak is not None:
        print(f"peak memory of all this: {peak / 2**30:.2f} GiB")


if __name__ == "__main__":
    main()
