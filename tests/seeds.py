"""Train the reference run with three seeds, and collect their histories.

    python tests/seeds.py --data DIR             about four hours on two CPU cores
    python tests/seeds.py --data DIR --table     only print the table of what has been measured

Each run is `python train.py --seed N`, into runs/seed-N. Ctrl-C saves; the same command goes on. The
losses and seconds of each epoch go to pretrained/seeds.json. Seed 0 is the model that is shipped.
"""

import argparse
import json
import platform
import statistics
import sys
from pathlib import Path

import torch

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

import train as script  # noqa: E402

RESULTS = ROOT / "pretrained" / "seeds.json"


def collect(folders: list[Path]) -> list[dict]:
    """What each finished run says of itself, without the loss of each step."""
    runs = []
    for folder in folders:
        config, history = script.load_checkpoint(folder / "model.pt")[2:4]
        if len(history["loss"]) == config.epochs:
            runs.append({"seed": config.seed} | {
                name: [float(f"{value:.6g}") for value in history[name]]
                for name in ("loss", "held_out", "seconds")})
    return runs


def table(runs: list[dict]) -> str:
    """Held-out loss after some epochs and minutes in all, with mean and standard deviation."""
    epochs = [n for n in (1, 2, 3, 5, 10, 15) if n <= len(runs[0]["held_out"])]
    lines = ["| seed | " + " | ".join(f"epoch {n}" for n in epochs) + " | minutes |",
             "|---" + "|---:" * (len(epochs) + 1) + "|"]
    columns = [[run["held_out"][n - 1] for n in epochs] + [sum(run["seconds"]) / 60] for run in runs]
    for run, column in zip(runs, columns):
        lines.append(f"| {run['seed']} | " + " | ".join(f"{x:.4f}" for x in column[:-1])
                     + f" | {column[-1]:.0f} |")
    if len(runs) > 1:
        for name, digits, function in (("mean", 4, statistics.mean),
                                       ("standard deviation", 5, statistics.stdev)):
            values = [function(column) for column in zip(*columns)]
            lines.append(f"| {name} | " + " | ".join(f"{x:.{digits}f}" for x in values[:-1])
                         + f" | {values[-1]:.0f} |")
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description="Train the reference run with three seeds.")
    parser.add_argument("--data", default=str(ROOT / "data"), help="folder that holds MNIST/raw")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--table", action="store_true", help="print the table, train nothing")
    args = parser.parse_args()
    if not args.table:
        folders = [ROOT / "runs" / f"seed-{seed}" for seed in args.seeds]
        for seed, folder in zip(args.seeds, folders):
            resume = ["--resume"] if (folder / "last.pt").exists() else []
            script.main(["--data", args.data, "--dataset", "mnist", "--seed", str(seed), "--out",
                         str(folder), *resume])  # leaves by itself if it is stopped
        measured = {"torch": torch.__version__, "machine": platform.processor() or platform.machine(),
                    "threads": torch.get_num_threads(), "runs": collect(folders)}
        RESULTS.write_text(json.dumps(measured, indent=1) + "\n")
    print(table(json.loads(RESULTS.read_text())["runs"]))


if __name__ == "__main__":
    main()
