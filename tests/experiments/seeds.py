"""Train the reference run with three seeds, and collect their histories.

    python tests/seeds.py --data DIR               about four hours on two CPU cores
    python tests/seeds.py --data DIR --seeds 1     only that seed
    python tests/seeds.py --data DIR --seeds       none, but the very start once more: 4 minutes
    python tests/seeds.py --table                  only print what has been measured

Each run is `python train.py --seed N`, into runs/seed-N. Ctrl-C saves; the same command goes on. The
losses and seconds of each epoch go to pretrained/seeds.json, where runs of other seeds are kept. Seed
0 is the model that is shipped. With OMP_NUM_THREADS=1, two processes with a seed each keep to one core
each; together they are faster than one after the other. At the end comes the start of seed 0 once
more: after how many steps is the held-out loss below the blog's last?
"""

import argparse
import json
import statistics
import sys
import tempfile
from pathlib import Path

import torch

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

import train as script  # noqa: E402
from plots import fingerprint  # noqa: E402
from sample import SHIPPED  # noqa: E402

RESULTS = ROOT / "pretrained" / "seeds.json"


def collect(folders: list[Path]) -> list[dict]:
    """What each finished run says of itself, without the loss of each step; and the threads and the
    version of this process, which are those of the run if it comes from here."""
    runs = []
    for folder in folders:
        config, history = script.load_checkpoint(folder / "model.pt")[2:4]
        if len(history["loss"]) == config.epochs:
            runs.append({"seed": config.seed, "torch": torch.__version__,
                         "threads": torch.get_num_threads()} | {
                name: [float(f"{value:.6g}") for value in history[name]]
                for name in ("loss", "held_out", "seconds")})
    return runs


def merged(old: list[dict], new: list[dict]) -> list[dict]:
    """All runs by seed; a new one takes the place of an old one, if it is not the same once more."""
    kept = {run["seed"]: run for run in old}
    kept |= {run["seed"]: run for run in new
             if run["seconds"] != kept.get(run["seed"], {}).get("seconds")}
    return sorted(kept.values(), key=lambda run: run["seed"])


def start(config: script.Config, below: float, every: int = 10, images: tuple | None = None) -> dict:
    """Train until the held-out loss, looked at after every few steps, is below a number.

    Returns the numbers of steps, the losses after them, and the steps of an epoch. The run is the
    one that config describes, up to there: its learning rate is that of a long run.
    """
    images = images or [script.load_images(config.data, part, config.dataset)[0]
                        for part in (True, False)]
    found, stop, update = {"steps": [], "held_out": []}, [], script.update_average
    schedule = script.NoiseSchedule(config.T, config.schedule)

    def update_and_look(average, model, step, decay):
        update(average, model, step, decay)
        if (step + 1) % every == 0:
            found["steps"].append(step + 1)
            found["held_out"].append(script.evaluate(average, schedule, images[1]))
            if found["held_out"][-1] < below:
                stop.append(True)  # as Ctrl-C does

    script.update_average = update_and_look
    try:
        script.train(config, images=images, stop=stop)
    finally:
        script.update_average = update
    return found | {"epoch": len(images[0]) // config.batch_size}


def table(runs: list[dict]) -> str:
    """Held-out loss after some epochs and minutes in all, with mean and standard deviation."""
    epochs = [n for n in (1, 2, 3, 5, 10, 15) if n <= len(runs[0]["held_out"])]
    lines = ["| seed | " + " | ".join(f"epoch {n}" for n in epochs) + " | minutes |",
             "|---" + "|---:" * (len(epochs) + 1) + "|"]
    columns = [[run["held_out"][n - 1] for n in epochs] for run in runs]
    for run, column in zip(runs, columns):
        threads = f"{run['threads']} thread{'s' * (run['threads'] > 1)}"
        lines.append(f"| {run['seed']} | " + " | ".join(f"{x:.4f}" for x in column)
                     + f" | {sum(run['seconds']) / 60:.0f} ({threads}) |")
    if len(runs) > 1:
        for name, digits, function in (("mean", 4, statistics.mean),
                                       ("standard deviation", 5, statistics.stdev)):
            lines.append(f"| {name} | " + " | ".join(
                f"{function(column):.{digits}f}" for column in zip(*columns)) + " | |")
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description="Train the reference run with three seeds.")
    parser.add_argument("--data", default=str(ROOT / "data"), help="folder that holds MNIST/raw")
    parser.add_argument("--seeds", type=int, nargs="*", default=[0, 1, 2])
    parser.add_argument("--table", action="store_true", help="print the table, train nothing")
    args = parser.parse_args()

    def note(**new):  # read anew each time, as another process may have written meanwhile
        old = json.loads(RESULTS.read_text()) if RESULTS.exists() else {"runs": []}
        if old.get("model", fingerprint(SHIPPED)) != fingerprint(SHIPPED):
            old = {"runs": []}  # of another network
        new["runs"] = merged(old["runs"], new.get("runs", []))
        new["model"] = fingerprint(SHIPPED)
        RESULTS.write_text(json.dumps(old | new, indent=1) + "\n")

    for seed in [] if args.table else args.seeds:
        folder = ROOT / "runs" / f"seed-{seed}"
        resume = ["--resume"] if (folder / "last.pt").exists() else []
        script.main(["--data", args.data, "--dataset", "mnist", "--seed", str(seed), "--out",
                     str(folder), *resume])  # leaves by itself if it is stopped
        note(runs=collect([folder]))
    if not args.table and (not args.seeds or 0 in args.seeds):
        with tempfile.TemporaryDirectory() as folder:
            config = script.Config(data=args.data, dataset="mnist", out=folder)
            note(start=start(config, script.BLOG_LOSS[-1]))
    measured = json.loads(RESULTS.read_text())
    print(table(measured["runs"]))
    if "start" in measured:
        for step, loss in zip(measured["start"]["steps"], measured["start"]["held_out"]):
            print(f"step {step} of {measured['start']['epoch']}: {loss:.4f}")


if __name__ == "__main__":
    main()
