"""What goes wrong is told in one line, with what to do, and nothing is lost or half written.

The table below runs each script in this process, as `script.main(argv)`; six of its rows are run
once more as real commands. A row is a script, its arguments, its exit status, and words that the
one line on standard error must contain. Status 2 means that the command can never work as it is
written, 1 that something else is missing or damaged.
"""

import gzip
import importlib
import os
import pickle
import shutil
import signal
import socket
import struct
import subprocess
import sys
import time
from hashlib import sha256
from pathlib import Path
from urllib.error import URLError

import pytest
import torch
from PIL import Image

import train
from strategies import pictures, same_state, write_mnist

HERE = Path(train.HERE)


class Code:
    """Pickled, it would run a command when it is read."""

    def __reduce__(self):
        return os.system, ("echo a model file was run as a program",)


@pytest.fixture(scope="module")
def place(tmp_path_factory, tiny_run):
    """A folder with everything that the table needs: good, damaged and foreign files."""
    place = tmp_path_factory.mktemp("place")
    for name in ("empty", "void", "dirs.gif"):
        (place / name).mkdir()
    good = (tiny_run / "model.pt").read_bytes()
    files = {"good.pt": good, "empty.pt": b"", "half.pt": good[:len(good) // 2], "text.pt": b"hello",
             "code.pt": pickle.dumps(Code()), "page.pt": b"<html>404</html>" * 99,
             "zip.pt": b"PK\x03\x04" + bytes(200), "gz.pt": gzip.compress(good[:1000]), "file": b""}
    for name, content in files.items():
        (place / name).write_bytes(content)
    state = torch.load(tiny_run / "model.pt", weights_only=True)
    torch.save(Code(), place / "code2.pt")
    torch.save(torch.zeros(3), place / "tensor.pt")
    torch.save({"model": torch.zeros(3)}, place / "foreign.pt")
    torch.save({**state, "network": {**state["network"], "channels": (16, 16, 16)}},
               place / "size.pt")
    torch.save({**state, "network": {"depth": 5}}, place / "keys.pt")
    torch.save({**state, "config": {**state["config"], "T": -1}}, place / "config.pt")
    for name in ("model.pt", "last.pt"):  # a finished run
        (place / "run").mkdir(exist_ok=True)
        (place / "run" / name).write_bytes((tiny_run / name).read_bytes())
    (place / "copied").mkdir()
    (place / "copied" / "last.pt").write_bytes(good)
    (place / "broken").mkdir()
    (place / "broken" / "last.pt").write_bytes(good[:5000])
    (place / "dirs" / "last.pt").mkdir(parents=True)

    labels = torch.arange(16) % 10
    write_mnist(place / "mnist", pictures(16), labels)
    for name, change in {
            "cut": lambda b: b[:-100], "none": lambda b: b"", "html": lambda b: b"<html></html>",
            "float": lambda b: struct.pack(">I", 0xD03) + b[4:], "zeros": lambda b: bytes(len(b)),
            "dims": lambda b: struct.pack(">IIII", 0x803, 2**30, 28, 28) + b[16:]}.items():
        write_mnist(place / name, pictures(16), labels)
        for path in (place / name).rglob("*-images-*"):
            path.write_bytes(change(path.read_bytes()))
    write_mnist(place / "odd", pictures(16, size=30), labels)
    write_mnist(place / "few", pictures(16), labels[:7])
    (place / "images" / "a").mkdir(parents=True)
    (place / "images" / "a" / "x.png").write_bytes(b"no image")
    (place / "one" / "a").mkdir(parents=True)
    Image.new("L", (28, 28)).save(place / "one" / "a" / "x.png")
    return place


BATCH = "--batch-size 8 --epochs 1 --device cpu"
TABLE = [
    # Options that can never work.
    ("train", "--epochs 0", 2, "epochs must be between 1 and"),
    ("train", "--epochs 1.5", 2, "invalid int value: '1.5'"),
    ("train", "--batch-size 0", 2, "batch_size must be between 1"),
    ("train", "--batch-size many", 2, "invalid int value"),
    ("train", "--lr 0", 2, "lr must be between"),
    ("train", "--lr nan", 2, "lr must be between"),
    ("train", "--lr -1", 2, "lr must be between"),
    ("train", "--warmup 2", 2, "warmup must be between 0 and 1"),
    ("train", "--ema 1", 2, "ema must be between"),
    ("train", "--clip 0", 2, "clip must be between"),
    ("train", "--T 1", 2, "T must be between 2"),
    ("train", "--T 100", 2, "more steps"),
    ("train", "--seed x", 2, "invalid int value: 'x'"),
    ("train", "--seed -1", 2, "seed must be between 0"),
    ("train", "--schedule square", 2, "known are linear, cosine"),
    ("train", "--dataset cifar", 2, "known are mnist, fashion, kmnist, builtin, folder"),
    ("train", "--device abacus", 2, "here: auto, "),
    ("train", "--device cuda:99", 2, "cuda"),
    ("train", "--images -1", 2, "images must be between"),
    ("train", "--val-images -1", 2, "val_images must be between"),
    ("train", "--colour", 2, "unrecognized arguments: --colour"),
    ("sample", "--seeds x", 2, "'x' is not a seed or a range such as 0-31"),
    ("sample", "--seeds 3-1", 2, "'3-1' is not a seed"),
    ("sample", "--seeds 0-99999", 2, "more than 10,000 seeds"),
    ("sample", "--variance huge", 2, "choose from"),
    ("sample", "--steps few", 2, "invalid int value"),
    ("sample", "--out digits", 2, "ends in .png"),
    ("sample", "--gif a.png", 2, "ends in .gif"),
    ("sample", "--device abacus", 2, "here: auto, "),
    ("plots", "losses", 2, "known are forward, embedding, loss, trajectory, grid"),
    ("plots", "loss --device abacus", 2, "here: auto, "),
    *[(name, "--device cpu:x", 2, "cpu:x") for name in ("train", "sample", "plots")],
    ("schedule", "--T 1", 2, "at least 2 steps"),
    ("schedule", "--kind square", 2, "choose from"),
    # Data that is missing, damaged or does not fit.
    ("train", "--data {p}/empty --dataset mnist", 1, "train-images-idx3-ubyte"),
    ("train", "--data {p}/empty --dataset kmnist", 1, "no KMNIST in"),
    ("train", "--data {p}/empty --dataset fashion", 1, "no FashionMNIST in"),
    *[("train", f"--data {{p}}/{name}", 1, "is damaged")
      for name in ("cut", "none", "html", "float", "zeros", "dims", "few")],
    ("train", f"--data {{p}}/odd {BATCH}", 1, "size must halve 2 times"),
    ("train", "--data {p}/mnist --batch-size 17", 1, "too few for batches of 17"),
    ("train", "--data {p}/mnist --val-images 16", 1, "too few for batches"),
    ("train", "--data {p}/void --dataset folder", 1, "class folder"),
    ("train", "--data {p}/nowhere --dataset folder", 1, "nowhere"),
    ("train", "--data {p}/images --dataset folder", 1, "cannot identify image"),
    ("train", f"--data {{p}}/one --dataset folder {BATCH}", 1, "too few for batches of 8"),
    ("plots", "bits --checkpoint {p}/good.pt", 1, "not measured beside {p}/good.pt: bits"),
    # Model files that are missing, damaged, foreign or of another network.
    *[("sample", f"--checkpoint {{p}}/{name}.pt", 1, "is damaged, or no model file")
      for name in ("empty", "half", "text", "code", "code2", "page", "zip", "gz", "tensor", "foreign",
                   "size", "keys", "config")],
    ("sample", "--checkpoint {p}/nowhere.pt", 1, "python train.py makes one"),
    ("sample", "--checkpoint {p}/empty", 1, "no model file"),
    ("sample", "--checkpoint {p}/good.pt --steps 0", 1, "steps must be between 1 and 20"),
    ("sample", "--checkpoint {p}/good.pt --steps 21", 1, "steps must be between 1 and 20"),
    ("plots", "loss --checkpoint {p}/half.pt", 1, "is damaged, or no model file"),
    # Folders and files that cannot be written.
    ("train", f"--data {{p}}/mnist {BATCH} --out {{p}}/file", 1, "file"),
    ("train", f"--data {{p}}/mnist {BATCH} --out /proc/nowhere", 1, "/proc/nowhere"),
    ("train", f"--data {{p}}/mnist {BATCH} --out {{p}}/dirs", 1, "holds a run; go on by --resume --out"),
    ("sample", "--checkpoint {p}/good.pt --out {p}/file/a.png", 1, "{p}/file"),
    ("sample", "--checkpoint {p}/good.pt --gif {p}/dirs.gif", 1, "dirs.gif"),
    ("plots", "loss --checkpoint {p}/good.pt --out {p}/file", 1, "{p}/file"),
    # Runs that cannot go on, or should not be overwritten.
    ("train", "--data {p}/mnist --out {p}/run", 1, "--resume"),
    ("train", "--out {p}/run --resume --seed 5", 1, "has seed = 0, not 5"),
    ("train", "--out {p}/copied --resume", 1, "holds no run"),
    ("train", "--out {p}/broken --resume", 1, "is damaged, or no model file"),
    ("train", "--out {p}/nowhere --resume", 1, "no model file"),
]
COMMANDS = [row for row in TABLE if row[1] in (
    "--epochs 0", "--data {p}/cut", "--checkpoint {p}/code2.pt", "--checkpoint {p}/half.pt", "losses",
    "--kind square")]


def contents(folder: Path) -> str:
    """A fingerprint of all files in a folder."""
    files = [path for path in sorted(folder.rglob("*")) if path.is_file()]
    return " ".join(f"{f.name}:{sha256(f.read_bytes()).hexdigest()[:8]}" for f in files)


def check(status, err: str, row, place) -> None:
    assert status == row[2]
    lines = err.splitlines()
    assert len(lines) == 1 and row[3].format(p=place) in lines[0], err
    assert "Traceback" not in err and len(lines[0]) < 700


@pytest.mark.parametrize("row", TABLE, ids=lambda row: f"{row[0]} {row[1]}")
def test_one_line_and_nothing_written(row, place, tmp_path, monkeypatch, capsys):
    """One line on standard error, the exit status of the table, and no file new or changed."""
    name, argv, status, _ = row
    def refuse(*args, **kwargs):
        raise URLError("no route to host")
    monkeypatch.setattr("torchvision.datasets.mnist.download_and_extract_archive", refuse)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "argv", [f"{name}.py"])
    argv = argv.format(p=place).split()
    if "--out" not in argv and name == "train":
        argv += ["--out", str(tmp_path / "new")]
    if "--checkpoint" not in argv and name in ("sample", "plots"):
        argv += ["--checkpoint", str(place / "good.pt")]
    before = contents(place)
    with pytest.raises(SystemExit) as exit_:
        importlib.import_module(name).main(argv)
    code = exit_.value.code
    out, err = capsys.readouterr()
    # Given a text, Python prints it to standard error and exits with 1.
    check(*((1, code) if isinstance(code, str) else (code, err)), row, place)
    assert contents(place) == before and not list(tmp_path.rglob("*.p*"))
    assert "run as a program" not in out + err


@pytest.mark.parametrize("row", COMMANDS, ids=lambda row: f"{row[0]} {row[1]}")
def test_the_same_as_real_commands(row, place, tmp_path):
    """Six rows of the table as a user would type them."""
    argv = row[1].format(p=place).split()
    done = subprocess.run([sys.executable, str(HERE / f"{row[0]}.py"), *argv], cwd=tmp_path,
                          capture_output=True, text=True, timeout=120)
    check(done.returncode, done.stderr, row, place)
    assert not list(tmp_path.rglob("*")) and "run as a program" not in done.stdout


def test_table_is_long_enough():
    assert len(TABLE) >= 40 and len(COMMANDS) == 6


# ---------------------------------------------------------------- a disk that is full, and signals

def test_full_disk_keeps_the_old_files(place, tmp_path):
    """A real command whose files may not grow beyond 1 MB: one line, and the old files are whole."""
    resource = pytest.importorskip("resource")  # not on Windows
    run = tmp_path / "run"
    images = [pictures(16), pictures(16)]
    config = dict(batch_size=8, out=str(run), device="cpu")
    train.train(train.Config(**config, epochs=2), images=images, stop=[1])
    before = contents(run)
    done = subprocess.run(
        [sys.executable, str(HERE / "train.py"), "--data", str(place / "mnist"), "--out", str(run),
         "--resume"], capture_output=True, text=True, timeout=120,
        preexec_fn=lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (10**6, 10**6)))
    assert done.returncode == 1 and len(done.stderr.splitlines()) == 1, done.stderr
    assert "cannot write" in done.stderr and "is kept" in done.stderr
    assert contents(run) == before


@pytest.fixture(scope="module")
def unbroken(place):
    """A command that trains twelve epochs of two steps, and the folder where it was run once."""
    command = [sys.executable, str(HERE / "train.py"), "--data", str(place / "mnist"), "--device",
               "cpu", "--batch-size", "8", "--epochs", "12", "--out"]
    subprocess.run([*command, str(place / "unbroken")], check=True, capture_output=True)
    return command, place / "unbroken"


@pytest.mark.parametrize("number, status", [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_signal_saves_and_resume_ends_as_if_unbroken(number, status, unbroken, tmp_path):
    """A real command is stopped by a signal, says how to go on, and does, bit for bit."""
    command, whole = unbroken
    run = subprocess.Popen([*command, str(tmp_path)], text=True, stderr=subprocess.PIPE,
                           stdout=subprocess.PIPE)
    while not run.stdout.readline().startswith("epoch  2/"):
        assert run.poll() is None
    run.send_signal(number)
    out, err = run.communicate(timeout=60)
    assert run.returncode == status and "add --resume" in err and len(err.splitlines()) == 1
    assert 2 <= len(train.load_checkpoint(tmp_path / "last.pt").history["loss"]) < 12
    subprocess.run([*command, str(tmp_path), "--resume"], check=True, capture_output=True)
    assert same_state(whole / "last.pt", tmp_path / "last.pt")


def test_signal_in_the_last_step_comes_too_late(place, tmp_path, monkeypatch, capsys):
    """The run is finished, so it says so, and exits as usual."""
    update = train.update_average

    def update_and_stop(average, model, step, decay):
        update(average, model, step, decay)
        if step == 1:
            os.kill(os.getpid(), signal.SIGTERM)

    monkeypatch.setattr(train, "update_average", update_and_stop)
    train.main(["--data", str(place / "mnist"), "--device", "cpu", "--batch-size", "8", "--epochs",
                "1", "--out", str(tmp_path / "run")])
    out, err = capsys.readouterr()
    assert "done; now type" in out and "stopped" not in out + err
    assert len(train.load_checkpoint(tmp_path / "run" / "last.pt").history["loss"]) == 1


def test_second_signal_acts_at_once(monkeypatch, tmp_path, place):
    """While images are read, Ctrl-C is noted; pressed again, it ends the program with 130."""
    seen = []

    def slow(*args, **kwargs):
        for _ in range(2):
            os.kill(os.getpid(), signal.SIGINT)
            seen.append(time.sleep(0.01))
        raise AssertionError("not reached")

    monkeypatch.setattr(train, "load_images", slow)
    before = signal.getsignal(signal.SIGINT)
    with pytest.raises(SystemExit) as exit_:
        train.main(["--out", str(tmp_path / "run")])
    assert exit_.value.code == 130 and seen == [None]
    assert signal.getsignal(signal.SIGINT) is before and not (tmp_path / "run").exists()


# ------------------------------------------------------------------------------ the built-in digits

def test_without_mnist_the_builtin_digits_are_learned(monkeypatch, tmp_path, capsys):
    """Said before training and after, into a folder of their own, without the blog's column."""
    from digits import builtin_digits

    def load(data, train_split=True, dataset="mnist", download=True):
        if dataset == "mnist":
            raise FileNotFoundError("no MNIST")
        assert dataset == "builtin"
        return builtin_digits(16, seed=0)

    monkeypatch.setattr(train, "load_images", load)
    monkeypatch.setattr(train, "HERE", tmp_path)
    train.main(["--batch-size", "8", "--epochs", "1", "--device", "cpu"])
    lines = capsys.readouterr().out.splitlines()
    assert lines[0].startswith("looking for MNIST") and len(lines) == 6
    assert "these are built-in digits" in lines[1] and lines[-2] == lines[1]
    assert "blog" not in "".join(lines)
    checkpoint = train.load_checkpoint(tmp_path / "runs" / "builtin" / "model.pt")
    assert checkpoint.config.dataset == "builtin"


def test_builtin_digits_are_sized_and_centred_as_mnist():
    """Black ground, white strokes, 20 pixels in the longer direction, centre of mass in the middle."""
    from digits import builtin_digits
    images, labels = builtin_digits(1000, seed=3)
    again = builtin_digits(1000, seed=3)
    assert torch.equal(images, again[0]) and torch.equal(labels, again[1])
    assert not torch.equal(images, builtin_digits(1000, seed=4)[0])
    assert images.shape == (1000, 1, 28, 28) and images.dtype == torch.uint8
    assert set(labels.tolist()) == set(range(10)) and (torch.bincount(labels) > 60).all()
    edge = torch.cat([images[..., 0], images[..., -1], images[:, :, 0], images[:, :, -1]])
    assert (edge == 0).float().mean() > 0.99
    assert (images.amax((1, 2, 3)) > 150).all()
    ink, axis = images[:, 0].double(), torch.arange(28, dtype=torch.float64) - 13.5
    for dim in (1, 2):
        centre = (ink.sum(3 - dim) @ axis) / ink.sum((1, 2))
        assert centre.abs().max() < 0.6
    lit = images[:, 0] > 100
    sizes = torch.maximum(lit.any(1).sum(1), lit.any(2).sum(1))
    assert sizes.min() >= 17 and sizes.max() <= 22 and abs(sizes.double().mean() - 20) < 0.5
    # About twenty faces make the same numeral look different.
    assert len({image.numpy().tobytes() for image in images}) == 1000


def test_any_folder_of_images_can_be_learned(tmp_path):
    """ImageFolder's layout, any size and colour. A tenth is held out, and the rest is in no order of
    the classes, so that the first N images, or the last, are a fair choice; no image is in both."""
    for kind in ("cat", "dog"):
        (tmp_path / kind).mkdir()
        for i in range(10):
            Image.new("RGB", (40, 20), (10 * i, 10 * i, 10 * i)).save(tmp_path / kind / f"{i}.png")
    images, labels = train.load_images(tmp_path, True, "folder")
    held, held_labels = train.load_images(tmp_path, False, "folder")
    assert images.shape == (18, 1, 28, 28) and images.dtype == torch.uint8 and len(held) == 2
    found = [*zip([*labels, *held_labels], torch.cat([images, held])[:, 0, 5, 5])]
    assert {(k.item(), grey.item()) for k, grey in found} == {
        (k, 10 * i) for k in (0, 1) for i in range(10)}
    assert 3 < labels[:9].sum() < 7 and labels.tolist() != sorted(labels)
    shutil.rmtree(tmp_path / "dog")
    for i in range(1, 10):  # of a single image none is left to train on
        (tmp_path / "cat" / f"{i}.png").unlink()
    assert train.load_images(tmp_path, True, "folder")[0].shape == (0, 1, 28, 28)


# -------------------------------------------------------------------------------- several processes

def torchrun(script: Path, *options) -> subprocess.CompletedProcess:
    """Run a script in two processes, by a port that is free."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    return subprocess.run([sys.executable, "-m", "torch.distributed.run", "--nproc-per-node=2",
                           f"--master-port={port}", str(script), *map(str, options)],
                          capture_output=True, text=True, timeout=200)


def test_two_processes_stop_together(place, tmp_path):
    """If only the second one is told to stop, in its third step, both do after that step, and the
    first one saves."""
    script = tmp_path / "script.py"
    script.write_text(f"""
import os, signal, sys
sys.path.insert(0, {str(HERE)!r})
import train
update = train.update_average
def update_and_stop(average, model, step, decay):
    update(average, model, step, decay)
    if step == 2 and os.environ["RANK"] == "1":
        os.kill(os.getpid(), signal.SIGTERM)
train.update_average = update_and_stop
train.main(sys.argv[1:])
""")
    done = torchrun(script, "--data", place / "mnist", "--device", "cpu", "--batch-size", "8",
                    "--epochs", "50", "--out", tmp_path / "run")
    assert done.returncode != 0 and "--resume" in done.stdout + done.stderr
    state = torch.load(tmp_path / "run" / "last.pt", weights_only=True)
    assert len(state["history"]["step_loss"]) == 3


def test_two_processes_give_the_weights_of_one(place, tmp_path):
    """torchrun with two gloo processes: the losses and weights of a single one, to rounding.

    Adam divides by the root of a gradient's mean square, so a weight whose gradient is almost zero
    may move by the full rate either way; weights are compared by their median difference, against
    0.1 % of what the rates of the steps add up to.
    """
    options = ["--data", str(place / "mnist"), "--device", "cpu", "--batch-size", "8", "--epochs",
               "3", "--out"]
    done = torchrun(HERE / "train.py", *options, tmp_path / "two")
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("epoch  1/3") == 1 and done.stdout.count("done") == 1
    subprocess.run([sys.executable, str(HERE / "train.py"), *options, str(tmp_path / "one")],
                   check=True, capture_output=True)
    two, one = (train.load_checkpoint(tmp_path / run / "last.pt") for run in ("two", "one"))
    assert len(two.history["step_loss"]) == 6
    for a, b in zip(two.history["step_loss"], one.history["step_loss"]):
        assert abs(a - b) < 1e-4
    rates = sum(train.learning_rate(i, 6, one.config) for i in range(6))
    for k, w in one.state["weights"].items():
        assert (w - two.state["weights"][k]).abs().median() < 1e-3 * rates
    assert torch.equal(one.state["generator"], two.state["generator"])
