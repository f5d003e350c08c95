"""How fast the network trains and samples, beside the blog's plain network, in one run.

    python tests/benchmark.py            about two minutes on two CPU cores

The blog's network has as many parameters, so it is a yardstick that everybody can run: the ratio of
the two says more than seconds do, which depend on the machine and on what else runs on it. Both are
measured in turn, many times; given are the median and the best. A matrix product of 2048 x 2048 in
float32, in which both networks compute, tells how fast the machine itself is. "Of peak" is the share
of that speed which the multiply-adds of a network reach (backward counts as two forward passes).
Sampling is counted in image-steps: 32 digits in 1,000 steps are 32,000 of them.
"""

import argparse
import statistics
import sys
import time
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from train import pick_device  # noqa: E402
from unet import UNet, timestep_embedding  # noqa: E402


class BlogNet(nn.Module):
    """The blog's network, rebuilt from its description: one 3x3 convolution a level, GELU, max
    pooling, transposed convolutions, t added once, at 7x7; no norms, no residuals, no attention."""

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
    """Those of one image: a multiplication and an addition are two of the counter's operations."""
    with FlopCounterMode(display=False) as counter:
        model(torch.zeros(1, 1, 28, 28), torch.ones(1, dtype=torch.long))
    return counter.get_total_flops() // 2


def main() -> None:
    parser = argparse.ArgumentParser(description="Measure the speed of both networks.")
    parser.add_argument("--device", default="auto", help="cuda, mps or cpu (the first there is)")
    parser.add_argument("--rounds", type=int, default=20, help="measurements of each (20)")
    args = parser.parse_args()
    device = pick_device(args.device)
    generator = torch.Generator().manual_seed(0)
    xt = torch.randn(128, 1, 28, 28, generator=generator).to(device)
    t = torch.randint(1, 1001, (128,), generator=generator).to(device)
    square = torch.randn(2048, 2048, generator=generator).to(device)

    def wait() -> None:
        if device.type != "cpu":  # GPUs work on while Python goes ahead
            getattr(torch, device.type).synchronize()

    def trainer(model: nn.Module):
        optimizer = torch.optim.Adam(model.parameters(), lr=1e-4, fused=True)

        def step() -> None:
            optimizer.zero_grad()
            F.mse_loss(model(xt, t), xt).backward()
            optimizer.step()
        return step

    def predictor(model: nn.Module):
        @torch.no_grad()
        def predict() -> None:
            model(xt, t)
        return predict

    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        models = {"ours": UNet(), "the blog's": BlogNet()}
    macs = {name: multiply_adds(model) for name, model in models.items()}
    models = {name: model.to(device) for name, model in models.items()}
    jobs = {("training", name): trainer(model) for name, model in models.items()}
    jobs |= {("sampling", name): predictor(model) for name, model in models.items()}
    jobs["product", ""] = lambda: square @ square

    seconds = {job: [] for job in jobs}
    for round_ in range(args.rounds + 1):
        for job, work in jobs.items():
            wait()
            start = time.perf_counter()
            for _ in range(3):
                work()
            wait()
            if round_ > 0:  # the first round warms up
                seconds[job].append((time.perf_counter() - start) / 3)

    def line(what: str, job: tuple[str, str], amount: float, flop: float) -> str:
        times, peak = seconds[job], seconds["product", ""]
        share = statistics.median(flop / a / (2 * 2048**3 / b) for a, b in zip(times, peak))
        return (f"{what:35} median {amount / statistics.median(times):7,.0f}   best "
                f"{amount / min(times):7,.0f}   of peak {share:4.0%}")

    print(f"torch {torch.__version__}, {device.type}, {torch.get_num_threads()} threads, float32")
    print(line("2048 x 2048 product, GFLOP/s", ("product", ""), 2 * 2048**3 / 1e9, 2 * 2048**3))
    for what, passes, unit in (("training", 3, "images/s"), ("sampling", 1, "image-steps/s")):
        for name, model in models.items():
            flop = 128 * passes * 2 * macs[name]
            print(line(f"{what}, {name}, {unit}", (what, name), 128, flop))
        ratios = [a / b for a, b in zip(seconds[what, "ours"], seconds[what, "the blog's"])]
        print(f"{what}: ours takes {statistics.median(ratios):.2f} times the blog's time")
    print("multiply-adds: " + ", ".join(f"{name} {n / 1e6:.1f} M" for name, n in macs.items()))
    used = torch.cuda.max_memory_allocated() if device.type == "cuda" else None
    if used is None and sys.platform != "win32":
        import resource  # which counts in bytes on a Mac, elsewhere in KiB
        unit = 1 if sys.platform == "darwin" else 2**10
        used = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit
    if used is not None:
        print(f"peak memory of all this: {used / 2**30:.2f} GiB")


if __name__ == "__main__":
    main()
