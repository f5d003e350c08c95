"""How much does each part of the recipe contribute? Train without it, and compare.

    python -m tests.experiments.ablations --data DIR              four hours on two CPU cores
    python -m tests.experiments.ablations --data DIR --rows 0 3   only the first and the fourth row
    python -m tests.experiments.ablations --speed                 only time a training step of each
    python -m tests.experiments.ablations --table                 only print what has been measured

Each row makes one change to `python train.py` and trains for 3 epochs on all 60,000 images, with
seed 0. The learning rate falls to 0 within these 3 epochs, except where it is constant. The blog's
network with the blog's recipe is trained for 15 epochs, because measure.py draws samples from it.
Then 2,000 digits are drawn in 20 steps of sde-dpm++ and judged by yardstick.py, because two
networks with the same loss need not draw equally well.

--speed is for a machine that does nothing else: the networks of the rows take turns, and the median
of the ratios to the time of the recipe is kept. It takes two minutes on two CPU cores.

The results go to pretrained/ablations.json, the runs to runs/ablations/. A run that was stopped is
resumed, and a row that is in the file already is not measured again. With --rows, two processes can
share the work. With OMP_NUM_THREADS=1 each of them keeps to one core, and together they are faster
than a single process on both cores.
"""

import argparse
import json
import re
import statistics
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import nn

import train
from tests.experiments.benchmark import BATCH, BlogNet, multiply_adds, time_jobs, trainer
from tests.experiments.yardstick import draw_samples, load_classifier, look, loss_by_t, quality
from unet import Attention, UNet, prepare_device, timestep_embedding

RESULTS = train.HERE / "pretrained" / "ablations.json"
COUNT = 2000  # digits that are judged
DECISIVE = (131, 600)  # the t between which a digit takes shape


def without(kind: type) -> Callable[..., UNet]:
    """A function that builds a UNet in which every layer of a kind returns its input unchanged."""
    def build(**sizes) -> UNet:
        model = UNet(**sizes)
        for module in list(model.modules()):
            for name, child in module.named_children():
                if isinstance(child, kind):
                    setattr(module, name, nn.Identity())
        return model
    return build


def time_at_the_bottleneck(**sizes) -> UNet:
    """A UNet that is told t only in the blocks at the smallest size; the others get zeros."""
    def forget_time(_, inputs: tuple) -> tuple:
        *images, time = inputs  # blocks are called with (x, time), the gain with (time,)
        return *images, torch.zeros_like(time)

    model = UNet(**sizes)
    for stage in [*model.encoder[:-1], *model.decoder[:-1]]:
        for block in stage:
            block.register_forward_pre_hook(forget_time)
    model.gain.register_forward_pre_hook(forget_time)
    return model


def without_learned_images(**sizes) -> UNet:
    """A UNet that halves the image by a convolution alone and adds no learned image to it."""
    model = UNet(**sizes)
    model.down = nn.ModuleList(halve.conv for halve in model.down)
    return model


def slim(**sizes) -> UNet:
    """A UNet with fewer channels at 28x28, more at 14x14, and no attention before the way up.

    The other sizes are such that it has as many parameters as the default network.
    """
    sizes |= dict(channels=(24, 40, 48), embedding=120, time_hidden=86, time_width=16)
    model = UNet(**sizes)
    model.attention[0] = nn.Identity()
    return model


class FirstPass(nn.Module):
    """In front of the blocks of the smallest size: all that happens at this size, once.

    The parts of the model are kept in a tuple, so that they do not count as parts of this one.
    """

    def __init__(self, model: UNet):
        super().__init__()
        self.parts = (list(model.encoder[-1]), model.merge[-1], list(model.decoder[-1]),
                      list(model.attention))

    def forward(self, x: torch.Tensor, time: torch.Tensor) -> torch.Tensor:
        """x (B, C, H, W), time (B, time_width) -> (B, C, H, W)"""
        encoder, merge, decoder, (before, after) = self.parts
        for block in encoder:
            x = block(x, time)
        x = merge(torch.cat([before(x), x], dim=1))
        for block in decoder:
            x = block(x, time)
        return after(x)


def twice_at_the_bottleneck(**sizes) -> UNet:
    """A UNet that goes through all layers of the smallest size twice, with the same weights."""
    model = UNet(**sizes)
    model.encoder[-1].insert(0, FirstPass(model))
    return model


class EarlyMerge(UNet):
    """A UNet that merges before it enlarges: the same function, in fewer operations.

    A 1x1 convolution of two images on top of each other is the sum of a 1x1 convolution of each. It
    sees one pixel at a time, so the lower image can go through it first and be enlarged afterwards:
    it has a quarter of the pixels then. The weights are those of UNet.
    """

    def forward(self, xt: torch.Tensor, t: torch.Tensor) -> torch.Tensor:
        time = self.time_mlp(timestep_embedding(t, self.config["embedding"]).to(xt.dtype))
        x = self.stem(xt)
        kept = []
        for level, blocks in enumerate(self.encoder):
            if level > 0:
                x = self.down[level - 1](x)
            for block in blocks:
                x = block(x, time)
            kept.append(x)

        smallest = len(kept) - 1
        x = self.attention[0](x)
        for level in reversed(range(len(kept))):
            merge = self.merge[level]
            for_x, for_kept = merge.weight.split([x.shape[1], kept[level].shape[1]], dim=1)
            x = F.conv2d(x, for_x)
            if level < smallest:
                x = F.interpolate(x, scale_factor=2.0, mode="nearest")
            x = x + F.conv2d(kept[level], for_kept, merge.bias)
            for block in self.decoder[level]:
                x = block(x, time)
            if level == smallest:
                x = self.attention[1](x)

        echo, scale = rearrange(self.gain(time), "b two -> two b 1 1 1")
        return echo * xt + (1 + scale) * self.head(x)


def blog_network(**sizes) -> BlogNet:
    """The blog's network, which fits any size of image and so has no sizes of its own."""
    model = BlogNet()
    model.config = sizes  # train.py keeps it in the model file
    return model


def independent(count: int, T: int, generator: torch.Generator) -> torch.Tensor:
    """In place of train.draw_t: each t is uniform on 1..T, whatever the others are."""
    return torch.randint(1, T + 1, (count,), generator=generator)


def constant(step: int, steps: int, config: train.Config) -> float:
    """In place of train.learning_rate: the blog's learning rate, the same in every step."""
    return 2e-4


@dataclass(frozen=True)
class Change:
    """What a row does differently from `python train.py`.

    seams    arguments of train.train: network, draw_t, learning_rate
    options  arguments of train.Config
    epochs   passes over the training images, if it is not the number that all rows have
    """

    seams: dict = field(default_factory=dict)
    options: dict = field(default_factory=dict)
    epochs: int | None = None

    @property
    def network(self) -> Callable[..., nn.Module]:
        """The function that builds the network of this row."""
        return self.seams.get("network", UNet)


CHANGES = {
    "the recipe": Change(),
    "t told only at the bottleneck": Change({"network": time_at_the_bottleneck}),
    "no GroupNorm": Change({"network": without(nn.GroupNorm)}),
    "no attention": Change({"network": without(Attention)}),
    "no learned images": Change({"network": without_learned_images}),
    "learning rate 2e-4 throughout": Change({"learning_rate": constant}),
    "independent t": Change({"draw_t": independent}),
    "no average of the weights": Change(options={"ema": 0.0}),
    "another seed": Change(options={"seed": 1}),
    "fewer channels at 28x28": Change({"network": slim}),
    "fewer channels at 28x28, another seed": Change({"network": slim}, {"seed": 1}),
    "7x7 layers twice": Change({"network": twice_at_the_bottleneck}),
    "7x7 layers twice, another seed": Change({"network": twice_at_the_bottleneck}, {"seed": 1}),
    "1x1 convolutions before enlarging": Change({"network": EarlyMerge}),
    "the blog's network": Change({"network": blog_network}),
    "the blog's network and recipe": Change(
        {"network": blog_network, "learning_rate": constant, "draw_t": independent},
        {"ema": 0.0}, epochs=15),
}


def folder(name: str, epochs: int) -> Path:
    """The folder that keeps the run of a row."""
    plain_name = re.sub(r"[^a-z0-9]+", "-", name.lower())
    return train.HERE / "runs" / "ablations" / f"{plain_name}-{epochs}"


def load(name: str, path: Path) -> train.Checkpoint:
    """Read the model file of a row, with the network of this row."""
    return train.load_checkpoint(path, network=CHANGES[name].network)


def train_row(name: str, data: str, epochs: int, out: Path, images: tuple | None = None,
              after_step: Callable[[train.Run], bool] | None = None, **options) -> dict:
    """Train one row and return its numbers.

    data, images  where the images are, or the images themselves, as for train.train
    out           the folder of the run; if it holds a run already, that is resumed
    after_step    is called after every step, as in train.train
    options       more arguments of train.Config
    """
    change = CHANGES[name]
    config = train.Config(data=data, out=str(out), epochs=epochs, dataset="mnist",
                          **change.options, **options)
    with torch.random.fork_rng(devices=[]):
        model = change.network()
    row = {"name": name, "epochs": epochs, "threads": torch.get_num_threads(),
           "macs": multiply_adds(model),
           "parameters": sum(p.numel() for p in model.parameters())}
    try:
        history = train.train(config, resume=(out / "last.pt").exists(), images=images,
                              after_step=after_step, **change.seams)
    except FloatingPointError as error:
        return row | {"held_out": [], "seconds": [], "error": str(error)}
    return row | {"held_out": history["held_out"], "seconds": history["seconds"]}


@torch.no_grad()
def judge(checkpoint: train.Checkpoint, real: torch.Tensor, count: int = COUNT) -> dict:
    """How well a trained network draws: the numbers of so many digits, seeds 0..count-1.

    real  the test images, uint8 (N, 1, 28, 28)

    Returns the share of clear digits, their Fréchet distance from the test images (both as in
    yardstick.py), and the mean loss on test images at the t of DECISIVE.
    """
    classifier = load_classifier()
    samples = draw_samples(checkpoint, range(count), torch.device("cpu"), sampler="sde-dpm++",
                           steps=20)
    reference, _ = look(classifier, real)
    losses = loss_by_t(checkpoint.model, checkpoint.schedule, real)
    low, high = DECISIVE
    return {"count": count, **quality(classifier, samples, reference),
            "decisive_loss": losses[low:high + 1].mean().item()}


def step_times(xt: torch.Tensor, rounds: int) -> dict[str, float]:
    """How long a training step of each row's network takes, with the recipe as the unit.

    xt      a batch of noisy images
    rounds  how often each network takes its turn
    """
    t = torch.linspace(1, 1000, len(xt)).long()
    with torch.random.fork_rng(devices=[]):
        jobs = {change.network: trainer(change.network(), xt, t) for change in CHANGES.values()}
    seconds = time_jobs(jobs, rounds, xt.device)

    unit = seconds[CHANGES["the recipe"].network]
    return {name: statistics.median(a / b for a, b in zip(seconds[change.network], unit))
            for name, change in CHANGES.items()}


def measured() -> list[dict]:
    """The rows in the file, in the order of CHANGES."""
    if not RESULTS.exists():
        return []
    names = list(CHANGES)
    return sorted(json.loads(RESULTS.read_text()), key=lambda row: names.index(row["name"]))


def write(rows: list[dict]) -> None:
    """Put these rows into the file, in the place of those that are there."""
    with train.replacement_of(RESULTS) as file:
        file.write((json.dumps(rows, indent=1) + "\n").encode())


def table(rows: list[dict]) -> str:
    """The table of README.md, in Markdown."""
    lines = ["| one change | held-out loss | at t of {} to {} | clear | distance | time of a step "
             "| parameters | multiply-adds |".format(*DECISIVE), "|---" + "|---:" * 7 + "|"]
    for row in rows:
        losses = row["held_out"]
        loss = "diverged"
        if losses:
            loss = f"{losses[:3][-1]:.4f}"
        if len(losses) > 3:
            loss += f" ({losses[-1]:.4f} after epoch {len(losses)})"
        step = ""
        if "step" in row:
            step = f"{row['step']:.2f}"
        samples = ["", "", ""]
        if "clear" in row:
            samples = [f"{row['decisive_loss']:.4f}", f"{100 * row['clear']:.1f} %",
                       f"{row['distance']:.1f}"]
        cells = [row["name"], loss, *samples, step, f"{row['parameters']:,}",
                 f"{row['macs'] / 1e6:.1f} M"]
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines)


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description="Train without one part of the recipe at a time.")
    parser.add_argument("--data", default=str(train.HERE / "data"),
                        help="folder that holds MNIST/raw (default: %(default)s)")
    parser.add_argument("--epochs", type=int, default=3,
                        help="passes over the training images (default: %(default)s)")
    parser.add_argument("--rows", type=int, nargs="+", default=range(len(CHANGES)),
                        choices=range(len(CHANGES)), metavar="N",
                        help="numbers of the rows to measure (default: all)")
    parser.add_argument("--speed", action="store_true",
                        help="time a training step of each network, train nothing")
    parser.add_argument("--table", action="store_true", help="print the table, measure nothing")
    args = parser.parse_args(argv)

    if args.speed:
        prepare_device(torch.device("cpu"))
        xt = torch.randn(BATCH, 1, 28, 28, generator=torch.Generator().manual_seed(0))
        times = step_times(xt, rounds=10)
        write([row | {"step": times[row["name"]]} for row in measured()])
    elif not args.table:
        for number in args.rows:
            name = list(CHANGES)[number]
            epochs = CHANGES[name].epochs or args.epochs
            if any(row["name"] == name and row["epochs"] == epochs
                   and ("clear" in row or "error" in row) for row in measured()):
                continue
            out = folder(name, epochs)
            row = train_row(name, args.data, epochs, out)
            if row["held_out"]:
                real, _ = train.load_images(args.data, train=False)
                row |= judge(load(name, out / "model.pt"), real)
            print(table([row]), flush=True)
            # Read the file now: another process may have added rows in the meantime.
            others = [other for other in measured() if other["name"] != name]
            write([*others, row])
    print(table(measured()))


if __name__ == "__main__":
    main()
