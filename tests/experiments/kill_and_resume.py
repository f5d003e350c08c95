"""Kill a real run twenty times, resume it each time, and compare it with one that was left alone.

    python -m tests.experiments.kill_and_resume --data DIR      about ten minutes

DIR holds MNIST/raw. The signals are SIGINT, SIGTERM and SIGKILL in turn, sent at random moments:
while images are read, within a step, while files are written. SIGINT and SIGTERM must lead to the
exit statuses 130 and 143 and lose no step; after SIGKILL the run starts its epoch again. The two
runs must end with the same bits: weights, average, moments of Adam, generator, order of the images
and history. The exit status is 1 if anything differs.
"""

import argparse
import random
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from tests.strategies import same_state
from train import HERE, load_checkpoint

# The signals, and the exit statuses that must follow them.
EXIT_STATUS = {signal.SIGINT: 130, signal.SIGTERM: 143, signal.SIGKILL: -9}
# 30 epochs of 20 steps of 32 images: about 100 seconds of training on two cores.
SIZES = ["--dataset", "mnist", "--batch-size", "32", "--images", "640", "--val-images", "200",
         "--epochs", "30", "--device", "cpu"]


def kill(command: list[str], number: signal.Signals, seconds: float) -> tuple[int, str]:
    """Start a run, send it a signal after so many seconds of work, and wait until it ends.

    Returns its exit status and what it wrote to the standard error.
    """
    process = subprocess.Popen(command, text=True, stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    process.stdout.readline()  # it speaks as soon as its imports are over
    time.sleep(seconds)
    process.send_signal(number)
    _, errors = process.communicate()
    return process.returncode, errors


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--data", required=True, help="folder that holds MNIST/raw")
    parser.add_argument("--kills", type=int, default=20,
                        help="number of kills (default: %(default)s)")
    parser.add_argument("--seed", type=int, default=0,
                        help="seed of the random moments (default: %(default)s)")
    args = parser.parse_args(argv)
    rng = random.Random(args.seed)
    command = [sys.executable, str(HERE / "train.py"), "--data", args.data, *SIZES]

    with tempfile.TemporaryDirectory() as folder:
        whole = Path(folder, "whole")
        parts = Path(folder, "parts")

        # The run that is left alone.
        begun = time.perf_counter()
        subprocess.run([*command, "--out", str(whole)], check=True, stdout=subprocess.DEVNULL)
        unbroken = time.perf_counter() - begun

        # The run that is killed and resumed.
        steps_kept = 0
        wrong_exits = 0
        for k in range(args.kills):
            number = list(EXIT_STATUS)[k % 3]
            seconds = rng.uniform(0, 1.4 * unbroken / args.kills)  # some work is left at the end
            resume = ["--resume"] if (parts / "last.pt").exists() else []
            status, errors = kill([*command, "--out", str(parts), *resume], number, seconds)
            label = f"{k + 1:2d}  {number.name} after {seconds:4.1f} s"
            if not (parts / "last.pt").exists():
                print(f"{label}: no file yet", flush=True)
                continue
            load_checkpoint(parts / "model.pt")  # raises an error if it is damaged
            steps = len(load_checkpoint(parts / "last.pt").history["step_loss"])
            correct = (status == EXIT_STATUS[number] and "Traceback" not in errors
                       and steps >= steps_kept)
            complaint = "" if correct else f"  WRONG: {errors}"
            print(f"{label}: exit {status}, {steps} steps kept{complaint}", flush=True)
            steps_kept = steps
            if not correct:
                wrong_exits += 1
        subprocess.run([*command, "--out", str(parts), "--resume"], check=True,
                       stdout=subprocess.DEVNULL)

        # The comparison.
        verdicts = {name: "is the same" if same_state(whole / name, parts / name) else "DIFFERS"
                    for name in ("last.pt", "model.pt")}
    print(", ".join(f"{name} {verdict}" for name, verdict in verdicts.items())
          + f"; {wrong_exits} wrong exits")
    sys.exit(1 if "DIFFERS" in verdicts.values() or wrong_exits else 0)


if __name__ == "__main__":
    main()
