"""Kill a real run twenty times, resume it each time, and compare it with one that was left alone.

    python tests/kill_and_resume.py --data DIR        DIR holds MNIST/raw; about ten minutes

Signals are SIGINT, SIGTERM and SIGKILL in turn, at random moments: while images are read, within a
step, while files are written. The two runs must end with the same bits: weights, average, Adam's
moments, generator, order of the images and history. SIGINT and SIGTERM must exit with 130 and 143,
and lose no step. After SIGKILL the run begins its epoch anew. Exit status 1 if anything differs.
"""

import argparse
import random
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path

HERE = Path(__file__).resolve().parent
sys.path[:0] = [str(HERE), str(HERE.parent)]

from strategies import same_state  # noqa: E402
from train import load_checkpoint  # noqa: E402


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--data", required=True, help="folder that holds MNIST/raw")
    parser.add_argument("--kills", type=int, default=20)
    parser.add_argument("--seed", type=int, default=0, help="of the random moments")
    args = parser.parse_args()
    rng = random.Random(args.seed)
    with tempfile.TemporaryDirectory() as folder:
        whole, parts = Path(folder, "whole"), Path(folder, "parts")
        # 30 epochs of 20 steps of 32 images: about 100 seconds of training on two cores.
        command = [sys.executable, str(HERE.parent / "train.py"), "--data", args.data, "--dataset",
                   "mnist", "--batch-size", "32", "--images", "640", "--val-images", "200",
                   "--epochs", "30", "--device", "cpu"]
        begin = time.perf_counter()
        subprocess.run([*command, "--out", str(whole)], check=True, stdout=subprocess.DEVNULL)
        unbroken = time.perf_counter() - begin

        done, bad = 0, 0
        for kill in range(args.kills):
            number = (signal.SIGINT, signal.SIGTERM, signal.SIGKILL)[kill % 3]
            resume = ["--resume"] if (parts / "last.pt").exists() else []
            run = subprocess.Popen([*command, "--out", str(parts), *resume], text=True,
                                   stdout=subprocess.PIPE, stderr=subprocess.PIPE)
            run.stdout.readline()  # imports are over
            wait = rng.uniform(0, 1.4 * unbroken / args.kills)  # so that some work is left at the end
            time.sleep(wait)
            run.send_signal(number)
            _, err = run.communicate()
            if not (parts / "last.pt").exists():  # killed before the first file was complete
                print(f"{kill + 1:2d}  {number.name} after {wait:4.1f} s: no file yet", flush=True)
                continue
            steps = len(load_checkpoint(parts / "last.pt").history["step_loss"])
            load_checkpoint(parts / "model.pt")
            expected = {signal.SIGINT: 130, signal.SIGTERM: 143, signal.SIGKILL: -9}[number]
            fine = run.returncode == expected and "Traceback" not in err and steps >= done
            print(f"{kill + 1:2d}  {number.name} after {wait:4.1f} s: exit {run.returncode}, "
                  f"{steps} steps kept" + ("" if fine else f"  WRONG: {err}"), flush=True)
            done, bad = steps, bad + (not fine)
        subprocess.run([*command, "--out", str(parts), "--resume"], check=True,
                       stdout=subprocess.DEVNULL)
        same = [same_state(whole / name, parts / name) for name in ("last.pt", "model.pt")]
        print(f"last.pt {'is the same' if same[0] else 'DIFFERS'}, model.pt "
              f"{'is the same' if same[1] else 'DIFFERS'}; {bad} wrong exits")
    sys.exit(0 if all(same) and not bad else 1)


if __name__ == "__main__":
    main()
