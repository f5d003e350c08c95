"""How long must one train? Complete runs of several lengths, judged by the digits that they draw.

    python -m tests.experiments.lengths --data DIR    35 minutes on two CPU cores
    python -m tests.experiments.lengths --table       only print what has been measured

It trains `train.py --quick` and runs of 1, 3 and 5 epochs, into runs/length-N, and takes the
shipped model as the run of 15. In each, the learning rate falls to 0 at the end. Of each, 2,000
digits are drawn in 20 steps of sde-dpm++ without guidance, and as many guided by early.pt at t from
150 to 700, and judged by yardstick.py against the test images. The digits of --quick, which have
16x16 pixels, are enlarged for it, and real digits are shrunk and enlarged likewise. Ctrl-C saves
the run under way, and the same command goes on with it; what has been measured is not measured
again.

The minutes are those of the epochs, without the start of Python, the reading of the images and the
drawing of digits. The shipped model was trained on another machine; its minutes are those that 15
epochs take at the pace of the longest of the other runs.

The results go to pretrained/lengths.json.
"""

import argparse
import json
import math
from pathlib import Path

import torch

import train
from sample import SHIPPED, Guided, find_guide
from tests.experiments.yardstick import draw_samples, load_classifier, look, quality

RESULTS = SHIPPED.parent / "lengths.json"
COUNT = 2000  # digits of each kind
INTERVAL = (150, 700)  # the t at which guidance acts
SHARES = (0.5, 0.75, 0.9)  # of clear digits: after how many minutes are they reached?

# The weight w of guidance: 2 was chosen for the shipped model (see guidance.py), and 3 for shorter
# runs. Of 400 digits each, 40 % were clear after 1 epoch with w = 2 and 46 % with w = 3; after 3
# epochs, 69 and 79 %.
WEIGHT = 2.0
WEIGHT_OF_SHORT_RUNS = 3.0

# The runs: the name, and what it adds to `train.py`.
SMALL = "--quick"
RUNS = {SMALL: ["--quick"], "1 epoch": ["--epochs", "1"], "3 epochs": ["--epochs", "3"],
        "5 epochs": ["--epochs", "5"]}
LONGEST = "15 epochs, the shipped model"
REAL = {"real digits": 28, "real digits, shrunk to 16x16": train.QUICK["size"]}  # their size


def folder(name: str) -> Path:
    """The folder that keeps a run."""
    return train.HERE / "runs" / f"length-{name.split()[0].strip('-')}"


def judge(checkpoint: train.Checkpoint, earlier: torch.nn.Module, weight: float,
          reference: torch.Tensor, count: int = COUNT) -> dict:
    """The share of clear digits of a model and their distance, without guidance and with it.

    earlier    the network that guides it
    weight     w of the guidance
    reference  the classifier's features of the test images, float64 (N, 64)
    """
    classifier = load_classifier()
    size = checkpoint.model.config["size"]
    networks = {"unguided": checkpoint.model,
                "guided": Guided(checkpoint.model, earlier, weight, INTERVAL)}
    row = {"count": count, "weight": weight}
    for how, network in networks.items():
        samples = draw_samples(checkpoint._replace(model=network), range(count),
                               torch.device("cpu"), sampler="sde-dpm++", steps=20,
                               shape=(1, size, size))
        row[how] = quality(classifier, samples, reference)
    return row


def row_of(path: Path, weight: float, reference: torch.Tensor, count: int = COUNT) -> dict:
    """All numbers of a finished run, of which path is the model file."""
    checkpoint = train.load_checkpoint(path)
    earlier = train.load_checkpoint(find_guide(path, checkpoint)).model
    history = checkpoint.history
    return judge(checkpoint, earlier, weight, reference, count) | {
        "images": len(history["step_loss"]) * checkpoint.config.batch_size,
        "seconds": sum(history["seconds"]), "held_out": history["held_out"][-1]}


def measured() -> dict[str, dict]:
    """The rows in the file, by name."""
    return json.loads(RESULTS.read_text()) if RESULTS.exists() else {}


def add(name: str, row: dict) -> None:
    """Put a row into the file."""
    text = json.dumps(measured() | {name: row}, indent=1) + "\n"
    with train.replacement_of(RESULTS) as file:
        file.write(text.encode())


def in_order(rows: dict[str, dict]) -> list[tuple[str, dict]]:
    """The rows from the shortest run to the longest, and after them those of real digits."""
    return sorted(rows.items(), key=lambda item: item[1].get("seconds", math.inf))


def minutes_to(share: float, how: str, rows: list[dict]) -> str:
    """After how many minutes of training such a share of the digits is clear, in words.

    share  of clear digits
    how    "guided" or "unguided"
    rows   from the shortest run to the longest

    Between two runs, the share is taken to grow linearly with the logarithm of the time.
    """
    times = [row["seconds"] / 60 for row in rows]
    shares = [row[how]["clear"] for row in rows]
    if shares[0] >= share:
        return f"less than {times[0]:.1f}"
    for k in range(1, len(rows)):
        if shares[k] >= share:
            part = (share - shares[k - 1]) / (shares[k] - shares[k - 1])
            logarithm = math.log(times[k - 1]) + part * math.log(times[k] / times[k - 1])
            return f"{math.exp(logarithm):.1f}"
    return "not reached"


def table(rows: dict[str, dict]) -> str:
    """Both tables of README.md, in Markdown: each run, and the minutes to each of SHARES."""
    lines = ["| run | images seen | minutes | held-out loss | clear | distance | clear, guided | "
             "distance, guided |", "|---" + "|---:" * 7 + "|"]
    for name, row in in_order(rows):
        cells = [name, "", "", ""]
        if "seconds" in row:
            cells = [name, f"{row['images']:,}", f"{row['seconds'] / 60:.1f}",
                     f"{row['held_out']:.4f}"]
        for how in ("unguided", "guided"):
            judged = ["", ""]
            if how in row:
                judged = [f"{100 * row[how]['clear']:.1f} %", f"{row[how]['distance']:.1f}"]
            cells += judged
        lines.append("| " + " | ".join(cells) + " |")
    lines += ["", "| minutes of training until so many digits are clear | "
              + " | ".join(f"{100 * share:.0f} %" for share in SHARES) + " |",
              "|---" + "|---:" * len(SHARES) + "|"]
    of_full_size = [row for name, row in in_order(rows) if name != SMALL and "seconds" in row]
    for how in ("unguided", "guided"):
        cells = [how, *(minutes_to(share, how, of_full_size) for share in SHARES)]
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines)


def measure_all(data: str) -> None:
    """Measure the rows that are not in the file yet."""
    real, _ = train.load_images(data, train=False)
    reference, _ = look(load_classifier(), real)

    # Real digits: the first training images, as many as are drawn of each model.
    known, _ = train.load_images(data, train=True)
    for name, size in REAL.items():
        if name not in measured():
            images = train.scaled(known[:COUNT], size)
            add(name, {"unguided": quality(load_classifier(), images, reference)})

    # The runs that are trained here, the shortest first.
    for name, options in RUNS.items():
        if name in measured():
            continue
        out = folder(name)
        command = ["--data", data, "--dataset", "mnist", "--device", "cpu", "--out", str(out),
                   *options]
        if (out / "last.pt").exists():
            command.append("--resume")
        train.main(command)  # exits if it is stopped
        add(name, row_of(out / "model.pt", WEIGHT_OF_SHORT_RUNS, reference))

    # The shipped model.
    if LONGEST not in measured():
        longest = measured()[list(RUNS)[-1]]
        row = row_of(SHIPPED, WEIGHT, reference)
        row["seconds"] = row["images"] * longest["seconds"] / longest["images"]
        add(LONGEST, row)


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description="Measure how digits improve with training.")
    parser.add_argument("--data", default=str(train.HERE / "data"),
                        help="folder that holds MNIST/raw (default: %(default)s)")
    parser.add_argument("--table", action="store_true", help="print the tables, measure nothing")
    args = parser.parse_args(argv)

    if not args.table:
        measure_all(args.data)
    print(table(measured()))


if __name__ == "__main__":
    main()
