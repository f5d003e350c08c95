"""How much do guidance and restarts help, and at what price?

    python -m tests.experiments.guidance --data DIR choose    which guide, w and interval are best
    python -m tests.experiments.guidance --data DIR report    those chosen, against the test images
    python -m tests.experiments.guidance --table              only print what has been measured

`choose` draws 500 digits in 20 steps of sde-dpm++ with each of 32 settings: the averaged weights of
epochs 1, 2, 3 and 5 as the guide, w = 1.5, 2, 2.5 and 3, at all t or only at t from 150 to 700. To
these come fourteen with restarts. It compares them with 10,000 of the first 55,000 training images.
The last 5,000 are left out, because the recipe of the network was chosen by them, and the test
images, because they are for the report alone. `report` measures the settings in REPORTED, which
were chosen from that table, once, against the 10,000 test images. It also draws one seed at
growing w.

The results go to claims.pt beside the model, as "guidance_choice" and "guidance". The samples are
kept in runs/samples/, so a run that was stopped goes on where it was. With OMP_NUM_THREADS=1 and
`--rows`, two processes can draw at the same time, one on each core.
"""

import argparse
import time
from pathlib import Path
from typing import NamedTuple

import torch

from sample import RESTARTS, Guided, restart, sample, to_uint8
from tests.experiments.measure import (
    Bench, add_common_arguments, add_result, kept_samples, open_model, read_results, results_file,
    spread)
from tests.experiments.yardstick import look, real_floor
from train import from_uint8, load_checkpoint

GUIDES = (1, 2, 3, 5)  # epochs
WEIGHTS = (1.5, 2.0, 2.5, 3.0)
INTERVAL = (150, 700)
SHOWN_WEIGHTS = (0.0, 1.0, 1.5, 2.0, 3.0, 5.0)  # of the figure of one seed per column
CHOSEN_FROM = 55_000  # the first so many training images


class Setting(NamedTuple):
    """One way to draw digits."""
    guide: int | None = None  # the epoch of the worse network; None for no guidance
    weight: float = 1.0
    interval: tuple[int, int] | None = None
    restarts: tuple[float, ...] = ()
    sampler: str = "sde-dpm++"
    steps: int = 20

    @property
    def name(self) -> str:
        words = [f"{self.sampler} {self.steps}"]
        if self.guide is not None:
            words.append(f"epoch {self.guide}, w = {self.weight:g}")
        if self.interval is not None:
            words.append(f"t of {self.interval[0]} to {self.interval[1]}")
        if self.restarts:
            words.append(f"{len(self.restarts)} restarts")
        return ", ".join(words)


CHOICES = [Setting(guide, weight, interval)
           for guide in GUIDES for weight in WEIGHTS for interval in (None, INTERVAL)]
FOUR = (0.4, 0.4, 0.3, 0.3)
CHOICES += [Setting(restarts=FOUR), Setting(restarts=RESTARTS)]
CHOICES += [Setting(guide, weight, INTERVAL, FOUR)
            for guide in (2, 3) for weight in (1.5, 2.0, 2.5)]
CHOICES += [Setting(2, 1.5, None, RESTARTS), Setting(2, 1.5, None, FOUR),
            Setting(2, 2.0, None, FOUR)]
CHOICES += [Setting(2, 2.0, INTERVAL, RESTARTS), Setting(2, 1.5, INTERVAL, RESTARTS),
            Setting(3, 2.5, INTERVAL, RESTARTS)]

# What is reported, and with how many images.
REPORTED = {
    Setting(): 2000,
    Setting(2, 2.0): 2000,
    Setting(2, 2.0, INTERVAL): 2000,
    Setting(restarts=RESTARTS): 2000,
    Setting(2, 1.5, INTERVAL, RESTARTS): 2000,
    Setting(2, 2.0, INTERVAL, sampler="ddpm", steps=1000): 500,
}


class Counted(torch.nn.Module):
    """A network that counts how many images it has looked at."""

    def __init__(self, model: torch.nn.Module):
        super().__init__()
        self.model = model
        self.images = 0

    def forward(self, xt: torch.Tensor, t: torch.Tensor, *label: torch.Tensor) -> torch.Tensor:
        self.images += len(xt)
        return self.model(xt, t, *label)


def guided_model(bench: Bench, setting: Setting, wrap=lambda model: model) -> torch.nn.Module:
    """The network of a setting. `wrap` is put around each network that it consists of."""
    model = wrap(bench.model)
    if setting.guide is None:
        return model
    worse = load_checkpoint(bench.files_of_epochs()[setting.guide]).model.to(bench.device)
    return Guided(model, wrap(worse), setting.weight, setting.interval)


def draw(bench: Bench, setting: Setting, model: torch.nn.Module, seeds: list[int]) -> torch.Tensor:
    """The images of these seeds, uint8 (N, 1, 28, 28)."""
    schedule = bench.checkpoint.schedule
    for _, _, x0 in sample(model, schedule, seeds, setting.sampler, steps=setting.steps):
        images = x0
    if setting.restarts:
        images = restart(model, schedule, images, seeds, setting.restarts)
    return to_uint8(images.cpu())


def samples(bench: Bench, setting: Setting, count: int) -> torch.Tensor:
    """The images of seeds 0..count-1; those drawn earlier are read from a file."""
    file = bench.scratch / f"{setting.name.replace(',', '')}.pt"
    model = guided_model(bench, setting)
    return kept_samples(file, count, lambda seeds: draw(bench, setting, model, list(seeds)))


def judge(bench: Bench, images: torch.Tensor) -> dict:
    """The numbers of the yardstick, the mean pixel in [-1, 1], and the spread."""
    return bench.judge(images) | {"brightness": from_uint8(images).mean().item(),
                                  "spread": spread(images)}


def cost(bench: Bench, setting: Setting, count: int = 32) -> dict:
    """Seconds for so many images, and how often a network looks at each.

    The seconds are the best of three, but for chains of 1,000 steps.
    """
    model = guided_model(bench, setting, wrap=Counted)
    seconds = []
    for _ in range(1 if setting.steps >= 1000 else 3):
        begun = time.perf_counter()
        draw(bench, setting, model, list(range(count)))
        seconds.append(time.perf_counter() - begun)
    looks = sum(part.images for part in model.modules() if isinstance(part, Counted))
    return {"seconds": min(seconds), "evaluations": looks / (len(seconds) * count)}


def with_training_reference(bench: Bench) -> None:
    """Let the bench compare with training images that no earlier choice has seen."""
    generator = torch.Generator().manual_seed(0)
    order = torch.randperm(CHOSEN_FROM, generator=generator)[:len(bench.real)]
    bench.reference = look(bench.classifier, bench.known[order])


def real_digits(bench: Bench, images: torch.Tensor, sets: torch.Tensor) -> dict:
    """The numbers of real digits, in the form of judge().

    images  what is judged, but for the distance, which would be 0 for the reference itself
    sets    digits that are divided into up to ten sets of 500 and of 2,000, whose mean distances
            are given
    """
    row = judge(bench, images)
    row["distances"] = {}
    for count in (500, 2000):
        generator = torch.Generator().manual_seed(0)
        floor = real_floor(bench.classifier, sets, bench.reference, count, generator)
        if len(floor):
            row["distances"][count] = floor.mean().item()
    return row


def choose(bench: Bench, rows: list[int], count: int) -> dict:
    """The numbers of each setting in CHOICES, against training images. Of some rows the samples are
    only drawn, for another process to measure.
    """
    with_training_reference(bench)
    for row in rows:
        samples(bench, CHOICES[row], count)
        print(f"{CHOICES[row].name}: drawn", flush=True)
    if len(rows) < len(CHOICES):
        return {}
    measured = {}
    for setting in [Setting(), *CHOICES]:
        measured[setting.name] = setting._asdict() | judge(bench, samples(bench, setting, count))
        print(line(setting.name, measured[setting.name]), flush=True)
    others = bench.known[CHOSEN_FROM:]
    return {"rows": measured, "real": real_digits(bench, others, others)}


def report(bench: Bench, rows: list[int], count: int) -> dict:
    """The numbers of each setting in REPORTED, against the test images, and what each costs."""
    settings = list(REPORTED)
    for row in rows:
        samples(bench, settings[row], min(count, REPORTED[settings[row]]))
        print(f"{settings[row].name}: drawn", flush=True)
    if len(rows) < len(settings):
        return {}
    measured = {}
    images = {}
    for setting, number in REPORTED.items():
        drawn = samples(bench, setting, min(count, number))
        row = judge(bench, drawn) | cost(bench, setting)
        measured[setting.name] = setting._asdict() | row
        images[setting.name] = drawn[:32].clone()
        print(line(setting.name, measured[setting.name]), flush=True)
    real = real_digits(bench, bench.real, bench.known)
    print(line("real digits", real), flush=True)

    # One seed per column, at growing w.
    ladder = {}
    for weight in SHOWN_WEIGHTS:
        setting = Setting(2, weight)
        model = guided_model(bench, setting)
        ladder[weight] = draw(bench, setting, model, list(range(8)))
    return {"rows": measured, "images": images, "ladder": ladder, "real": real}


def line(name: str, row: dict) -> str:
    """One row of the table, in Markdown."""
    distances = row["distances"]
    cells = [name, f"{row['count']:,}", f"{100 * row['confident']:.1f} %",
             *[f"{distances[n]:.2f}" if n in distances else "" for n in (500, 2000)],
             f"{row['chi2']:.0f}", f"{row['nearest']:.3f}", f"{row['brightness']:.3f}",
             f"{row['spread']:.3f}",
             f"{row['evaluations']:.0f}" if "evaluations" in row else "",
             f"{row['seconds']:.1f} s" if "seconds" in row else ""]
    return "| " + " | ".join(cells) + " |"


def table(results: dict) -> str:
    """The table of the README, in Markdown."""
    head = ("| how | N | clear | distance of 500 | distance of 2,000 | χ² of classes | nearest | "
            "mean pixel | spread | evaluations | 32 digits take |")
    lines = [head, "|---" + "|---:" * 10 + "|"]
    lines += [line(name, row) for name, row in results["rows"].items()]
    if "real" in results:
        lines.append(line("real digits", results["real"]))
    return "\n".join(lines)


PARTS = {"choose": (choose, "guidance_choice", len(CHOICES)),
         "report": (report, "guidance", len(REPORTED))}


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description="Measure guidance and restarts.")
    parser.add_argument("parts", nargs="*", metavar="PART",
                        help=f"{', '.join(PARTS)} (default: both)")
    add_common_arguments(parser)
    parser.add_argument("--count", type=int, help="images of each setting, at most (default: 500 "
                        "to choose, 2000 to report)")
    parser.add_argument("--rows", type=int, nargs="+",
                        help="draw the samples of these settings only, and measure nothing")
    args = parser.parse_args(argv)
    out = results_file(args)
    if args.table:
        for _, key, _ in PARTS.values():
            print(table(read_results(out)[key]) + "\n")
        return

    # Refuse what cannot work before anything takes time.
    if args.rows is not None and len(args.parts) != 1:
        parser.error("--rows is for one part; name it")
    path, checkpoint = open_model(parser, args, PARTS)

    # Measure each part, and save it at once.
    for name in args.parts or PARTS:
        part, key, number = PARTS[name]
        bench = Bench(checkpoint, path, args.data, (0, 0, 0), args.device, out, Path(args.scratch))
        rows = args.rows if args.rows is not None else list(range(number))
        count = args.count or {"choose": 500, "report": 2000}[name]
        result = part(bench, rows, count)
        if result:
            add_result(out, key, result, path)


if __name__ == "__main__":
    main()
