"""What does each part of the recipe gain? Train without it, and compare.

    python tests/ablations.py --data DIR              about four hours on two CPU cores
    python tests/ablations.py --data DIR --rows 0 3   only the first and the fourth row
    python tests/ablations.py --table                 only print what has been measured

Each row is one change from `python train.py`, trained for 3 epochs on all 60,000 images, with seed 0,
the learning rate falling to 0 within these 3 epochs (but where it is constant). The blog's network
with its own recipe goes on to epoch 15, as tests/measure.py draws samples from it. The numbers go to
pretrained/ablations.json, and runs to runs/ablations/. A run that was stopped goes on where it was;
a row that is in the file already is not measured again. With --rows, two processes can share the
work; with OMP_NUM_THREADS=1, each of them keeps to one core, and together they are faster than one.
"""

import argparse
import json
import re
import sys
from collections.abc import Callable
from pathlib import Path

import torch
from torch import nn

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "tests")]

import train as script  # noqa: E402
from benchmark import BlogNet, multiply_adds  # noqa: E402
from unet import Attention, UNet  # noqa: E402

RESULTS = ROOT / "pretrained" / "ablations.json"


def without(kind: type) -> Callable:
    """A UNet in which every layer of a kind hands on what it gets."""
    def build(**sizes) -> UNet:
        model = UNet(**sizes)
        for module in list(model.modules()):
            for name, child in module.named_children():
                if isinstance(child, kind):
                    setattr(module, name, nn.Identity())
        return model
    return build


def time_at_the_bottleneck(**sizes) -> UNet:
    """A UNet that is told t in the blocks of the smallest size alone; the rest sees zeros for it."""
    model = UNet(**sizes)
    for blocks in [*model.encoder[:-1], *model.decoder[:-1]]:
        for block in blocks:
            block.register_forward_pre_hook(lambda _, given: (given[0], torch.zeros_like(given[1])))
    model.gain.register_forward_pre_hook(lambda _, given: (torch.zeros_like(given[0]),))
    return model


def every_place_alike(**sizes) -> UNet:
    """A UNet whose halving adds no learned image."""
    model = UNet(**sizes)
    model.down = nn.ModuleList(halve.conv for halve in model.down)
    return model


def blog_network(**sizes) -> BlogNet:
    model = BlogNet()
    model.config = sizes  # train.py keeps it in the model file
    return model


def independent(count: int, T: int, generator: torch.Generator) -> torch.Tensor:
    return torch.randint(1, T + 1, (count,), generator=generator)


def constant(step: int, steps: int, config: script.Config) -> float:
    return 2e-4


# Each change: what is put in place of functions of train.py, and options of its Config.
CHANGES: dict[str, dict] = {
    "the recipe": {},
    "t told only at the bottleneck": {"UNet": time_at_the_bottleneck},
    "no GroupNorm": {"UNet": without(nn.GroupNorm)},
    "no attention": {"UNet": without(Attention)},
    "no learned images": {"UNet": every_place_alike},
    "learning rate 2e-4 throughout": {"learning_rate": constant},
    "independent t": {"draw_t": independent},
    "no average of the weights": {"ema": 0.0},
    "the blog's network": {"UNet": blog_network},
    "the blog's network and recipe": {"UNet": blog_network, "learning_rate": constant,
                                      "draw_t": independent, "ema": 0.0, "epochs": 15},
}


def folder(name: str, epochs: int) -> Path:
    """Where the run of a row is kept."""
    return ROOT / "runs" / "ablations" / f"{re.sub(r'[^a-z0-9]+', '-', name.lower())}-{epochs}"


def load(name: str, path: Path) -> script.Checkpoint:
    """The model file of a row; load_checkpoint alone would build our network for it."""
    before = script.UNet
    try:
        script.UNet = CHANGES[name].get("UNet", before)
        return script.load_checkpoint(path)
    finally:
        script.UNet = before


def run(name: str, data: str, epochs: int, out: Path, images: tuple | None = None,
        **options) -> dict:
    """Train one row and return its numbers. The scripts are as before afterwards."""
    change = CHANGES[name]
    before = {key: getattr(script, key) for key in change if hasattr(script, key)}
    try:
        for key in before:
            setattr(script, key, change[key])
        others = {k: v for k, v in change.items() if k not in before and k != "epochs"}
        config = script.Config(data=data, out=str(out), epochs=epochs, dataset="mnist", **others,
                               **options)
        with torch.random.fork_rng(devices=[]):
            model = script.UNet()
        row = {"name": name, "epochs": epochs, "threads": torch.get_num_threads(),
               "macs": multiply_adds(model),
               "parameters": sum(p.numel() for p in model.parameters())}
        history = script.train(config, resume=(out / "last.pt").exists(), images=images)
        return row | {"held_out": history["held_out"], "seconds": history["seconds"]}
    except FloatingPointError as error:
        return row | {"held_out": [], "seconds": [], "error": str(error)}
    finally:
        for key, value in before.items():
            setattr(script, key, value)


def measured() -> list[dict]:
    """The rows in the file, in the order of CHANGES."""
    rows = json.loads(RESULTS.read_text()) if RESULTS.exists() else []
    return sorted(rows, key=lambda row: list(CHANGES).index(row["name"]))


def table(rows: list[dict]) -> str:
    """The README's table, in Markdown."""
    lines = ["| one change | held-out loss | seconds per epoch | parameters | multiply-adds |",
             "|---|---:|---:|---:|---:|"]
    for row in rows:
        loss = f"{row['held_out'][:3][-1]:.4f}" if row["held_out"] else "diverged"
        if len(row["held_out"]) > 3:
            loss += f" ({row['held_out'][-1]:.4f} after epoch {len(row['held_out'])})"
        seconds = sum(row["seconds"]) / len(row["seconds"]) if row["seconds"] else 0
        lines.append(f"| {row['name']} | {loss} | {f'{seconds:.0f}' if seconds else ''} | "
                     f"{row['parameters']:,} | {row['macs'] / 1e6:.1f} M |")
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description="Train without one part of the recipe at a time.")
    parser.add_argument("--data", default=str(ROOT / "data"), help="folder that holds MNIST/raw")
    parser.add_argument("--epochs", type=int, default=3)
    parser.add_argument("--rows", type=int, nargs="+", default=range(len(CHANGES)),
                        choices=range(len(CHANGES)), metavar="N", help="rows to measure (all)")
    parser.add_argument("--table", action="store_true", help="print the table, measure nothing")
    args = parser.parse_args()
    for name in [] if args.table else [list(CHANGES)[n] for n in args.rows]:
        epochs = CHANGES[name].get("epochs", args.epochs)
        if (name, epochs) not in [(row["name"], row["epochs"]) for row in measured()]:
            row = run(name, args.data, epochs, folder(name, epochs))
            others = [other for other in measured() if other["name"] != name]
            RESULTS.write_text(json.dumps([*others, row], indent=1) + "\n")
    print(table(measured()))


if __name__ == "__main__":
    main()
