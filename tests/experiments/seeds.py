"""Train the reference run with three seeds, and collect their histories.

    python -m tests.experiments.seeds --data DIR             about four hours on two CPU cores
    python -m tests.experiments.seeds --data DIR --seeds 1   only this seed
    python -m tests.experiments.seeds --data DIR --seeds     none, but the very start: 4 minutes
    python -m tests.experiments.seeds --table                only print what has been measured

Each run is `python train.py --seed N`, into runs/seed-N. Ctrl-C saves it, and the same command goes
on with it. Seed 0 is the shipped model. At the end, the start of seed 0 is trained once more and
evaluated every ten steps: after how many steps is the held-out loss below the blog's last loss?

The losses and seconds of each epoch go to pretrained/seeds.json; the runs of other seeds in it are
kept. With OMP_NUM_THREADS=1, two processes with one seed each keep to one core each, and together
they are faster than one run after the other.
"""

import argparse
import json
import statistics
import tempfile
from pathlib import Path

import torch

import train
from plots import fingerprint
from sample import SHIPPED

RESULTS = SHIPPED.parent / "seeds.json"


def collect(folders: list[Path]) -> list[dict]:
    """The histories of the runs that are finished, without the loss of each step.

    The number of threads and the version of torch are those of this process. They are those of the
    run if this process has trained it.
    """
    runs = []
    for folder in folders:
        checkpoint = train.load_checkpoint(folder / "model.pt")
        history = checkpoint.history
        if len(history["loss"]) < checkpoint.config.epochs:
            continue
        run = {"seed": checkpoint.config.seed, "torch": torch.__version__,
               "threads": torch.get_num_threads()}
        for name in ("loss", "held_out", "seconds"):
            run[name] = [float(f"{value:.6g}") for value in history[name]]
        runs.append(run)
    return runs


def merged(old: list[dict], new: list[dict]) -> list[dict]:
    """All runs, sorted by seed. A new run replaces an old one of the same seed, unless it is the
    same run, read once more.
    """
    runs = {run["seed"]: run for run in old}
    for run in new:
        known = runs.get(run["seed"])
        if known is None or known["seconds"] != run["seconds"]:
            runs[run["seed"]] = run
    return sorted(runs.values(), key=lambda run: run["seed"])


def start(config: train.Config, below: float, every: int = 10,
          images: tuple[torch.Tensor, torch.Tensor] | None = None) -> dict:
    """Train until the held-out loss, measured after every few steps, is below a number.

    Returns the numbers of steps, the losses after them, and the number of steps of an epoch. The
    run is the first part of the one that config describes, with the learning rates of a long run.
    """
    if images is None:
        images = tuple(train.load_images(config.data, part, config.dataset)[0]
                       for part in (True, False))
    training, held_out = images
    record = {"steps": [], "held_out": []}

    def evaluate(run: train.Run) -> bool:
        """Record the loss of the averaged weights; true, which stops the run, if it is below."""
        if run.step % every:
            return False
        loss = train.evaluate(run.average, run.schedule, held_out)
        record["steps"].append(run.step)
        record["held_out"].append(loss)
        return loss < below

    train.train(config, images=images, after_step=evaluate)
    return record | {"epoch": len(training) // config.batch_size}


def table(runs: list[dict]) -> str:
    """The held-out loss after several epochs with its mean and standard deviation, and the minutes
    that each run took.
    """
    epochs = [n for n in (1, 2, 3, 5, 10, 15) if n <= len(runs[0]["held_out"])]
    lines = ["| seed | " + " | ".join(f"epoch {n}" for n in epochs) + " | minutes |",
             "|---" + "|---:" * (len(epochs) + 1) + "|"]
    rows = [[run["held_out"][n - 1] for n in epochs] for run in runs]
    for run, row in zip(runs, rows):
        threads = f"{run['threads']} thread" if run["threads"] == 1 else f"{run['threads']} threads"
        losses = " | ".join(f"{loss:.4f}" for loss in row)
        minutes = sum(run["seconds"]) / 60
        lines.append(f"| {run['seed']} | {losses} | {minutes:.0f} ({threads}) |")
    if len(runs) > 1:
        for name, digits, function in (("mean", 4, statistics.mean),
                                       ("standard deviation", 5, statistics.stdev)):
            numbers = " | ".join(f"{function(column):.{digits}f}" for column in zip(*rows))
            lines.append(f"| {name} | {numbers} | |")
    return "\n".join(lines)


def add_to_results(**parts) -> None:
    """Add "runs" or "start" to the file; what was measured with another model is dropped."""
    # The file is read each time, because another process may have written in the meantime.
    results = {"runs": []}
    if RESULTS.exists():
        results = json.loads(RESULTS.read_text())
    model = fingerprint(SHIPPED)
    if results.get("model", model) != model:
        results = {"runs": []}
    parts["runs"] = merged(results["runs"], parts.get("runs", []))
    parts["model"] = model
    RESULTS.write_text(json.dumps(results | parts, indent=1) + "\n")


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description="Train the reference run with three seeds.")
    parser.add_argument("--data", default=str(train.HERE / "data"),
                        help="folder that holds MNIST/raw (default: %(default)s)")
    parser.add_argument("--seeds", type=int, nargs="*", default=[0, 1, 2],
                        help="seeds to train with (default: 0 1 2)")
    parser.add_argument("--table", action="store_true", help="print the table, train nothing")
    args = parser.parse_args(argv)

    if not args.table:
        for seed in args.seeds:
            folder = train.HERE / "runs" / f"seed-{seed}"
            command = ["--data", args.data, "--dataset", "mnist", "--seed", str(seed),
                       "--out", str(folder)]
            if (folder / "last.pt").exists():
                command.append("--resume")
            train.main(command)  # exits if it is stopped
            add_to_results(runs=collect([folder]))
        if not args.seeds or 0 in args.seeds:
            with tempfile.TemporaryDirectory() as folder:
                config = train.Config(data=args.data, dataset="mnist", out=folder)
                add_to_results(start=start(config, train.BLOG_LOSS[-1]))

    results = json.loads(RESULTS.read_text())
    print(table(results["runs"]))
    if "start" in results:
        for step, loss in zip(results["start"]["steps"], results["start"]["held_out"]):
            print(f"step {step} of {results['start']['epoch']}: {loss:.4f}")


if __name__ == "__main__":
    main()
