"""What goes wrong is told in one line, with what to do, and nothing is lost or half written.

The table below runs each script in this process, as `script.main(argv)`. A row is a script, its
arguments, its exit status, and words that the one line on standard error must contain. Status 2
means that the command can never work as it is written, 1 that something else is missing or damaged.

The slow tests try the same with real commands: six rows of the table, a disk that is full, signals,
terminals that are closed, and several processes.
"""

import gzip
import importlib
import io
import os
import pickle
import runpy
import signal
import socket
import struct
import subprocess
import sys
import threading
from dataclasses import make_dataclass
from hashlib import sha256
from pathlib import Path
from urllib.error import URLError

import pytest
import torch
from matplotlib import rc_context
from PIL import Image

import plots
import sample
import train
from strategies import pictures, same_state, write_mnist
from train import HERE, load_checkpoint
from unet import UNet


def no_network(monkeypatch) -> None:
    """Let every download fail, as on a machine without a network."""
    def refuse(*args, **kwargs):
        raise URLError("no route to host")
    monkeypatch.setattr("torchvision.datasets.mnist.download_and_extract_archive", refuse)


def little(**sizes) -> UNet:
    """A UNet that is faster than the default one."""
    few = {"channels": (8, 8), "blocks": (1, 1), "embedding": 8, "time_hidden": 8, "time_width": 4,
           "heads": 2, "groups": 4}
    return UNet(**few | sizes)


class Code:
    """Pickled, it would run a command when it is read."""

    def __reduce__(self):
        return os.system, ("echo a model file was run as a program",)


def damaged(images: bytes) -> dict[str, bytes]:
    """A file of images in MNIST's format, damaged in six ways."""
    return {"cut": images[:-100], "none": b"", "html": b"<html></html>",
            "float": struct.pack(">I", 0xD03) + images[4:], "zeros": bytes(len(images)),
            "dims": struct.pack(">IIII", 0x803, 2**30, 28, 28) + images[16:]}


@pytest.fixture(scope="module")
def place(tmp_path_factory, tiny_run):
    """A folder with everything that the table needs: good, damaged and foreign files."""
    place = tmp_path_factory.mktemp("place")
    for name in ("empty", "void", "dirs.gif"):
        (place / name).mkdir()

    # Model files.
    good = (tiny_run / "model.pt").read_bytes()
    files = {"good.pt": good, "half.pt": good[:len(good) // 2], "gz.pt": gzip.compress(good[:1000]),
             "empty.pt": b"", "text.pt": b"hello", "page.pt": b"<html>404</html>" * 99,
             "zip.pt": b"PK\x03\x04" + bytes(200), "code.pt": pickle.dumps(Code()), "file": b""}
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

    # Models whose answers are not numbers, or so large that an image without clipping is infinite.
    for name, value in (("nan", float("nan")), ("huge", 1e38)):
        average = dict(state["average"])
        average["head.2.bias"] = torch.full_like(average["head.2.bias"], value)
        torch.save({**state, "average": average}, place / f"{name}.pt")

    # Guides that do not fit good.pt, beside which there is none: of another network, and of another
    # schedule.
    with torch.random.fork_rng(devices=[]):
        other = little()
    torch.save({**state, "network": other.config, "average": other.state_dict()},
               place / "network.pt")
    torch.save({**state, "betas": state["betas"] * 0.99}, place / "schedule.pt")

    # Folders of runs: one that is finished, and three that cannot go on.
    (place / "run").mkdir()
    for name in ("model.pt", "last.pt"):
        (place / "run" / name).write_bytes((tiny_run / name).read_bytes())
    (place / "copied").mkdir()
    (place / "copied" / "last.pt").write_bytes(good)
    (place / "broken").mkdir()
    (place / "broken" / "last.pt").write_bytes(good[:5000])
    (place / "dirs" / "last.pt").mkdir(parents=True)

    # A folder of digits, of which no one knows how they were drawn.
    (place / "drawn").mkdir()
    Image.new("L", (28, 28)).save(place / "drawn" / "00000.png")

    # Images.
    labels = torch.arange(16) % 10
    write_mnist(place / "mnist", pictures(16), labels)
    for name in damaged(b""):
        write_mnist(place / name, pictures(16), labels)
        for path in (place / name).rglob("*-images-*"):
            path.write_bytes(damaged(path.read_bytes())[name])
    write_mnist(place / "odd", pictures(16, size=30), labels)
    write_mnist(place / "few", pictures(16), labels[:7])
    (place / "images" / "a").mkdir(parents=True)
    (place / "images" / "a" / "x.png").write_bytes(b"no image")
    (place / "one" / "a").mkdir(parents=True)
    picture = Image.fromarray(pictures(1)[0, 0].numpy())
    picture.save(place / "one" / "a" / "x.png")

    # Images of which many are blank, as a copy that broke off leaves them, or all are alike.
    half_blank = pictures(16)
    half_blank[8:] = 0
    write_mnist(place / "half_blank", half_blank, labels)
    write_mnist(place / "alike", pictures(1).repeat(16, 1, 1, 1), labels)

    # Folders of images: one file broken off among good ones, and parts with other classes.
    for name in ("good/a", "cut_png/a", "parts/train/a", "parts/train/b", "parts/test/a"):
        (place / name).mkdir(parents=True)
        for i in range(3):
            picture.save(place / name / f"{i}.png")
    whole = (place / "cut_png" / "a" / "1.png").read_bytes()
    (place / "cut_png" / "a" / "1.png").write_bytes(whole[:len(whole) // 2])
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
    *[("train", f"--T {T}", 2, "give another --T (1000 is usual) or --schedule cosine")
      for T in (2, 100, 200_000)],
    ("train", "--seed x", 2, "invalid int value: 'x'"),
    ("train", "--seed -1", 2, "seed must be between 0"),
    ("train", "--schedule square", 2, "known are linear, cosine"),
    ("train", "--dataset cifar", 2, "known are mnist, fashion, kmnist, builtin, folder"),
    ("train", "--device abacus", 2, "here: auto, "),
    ("train", "--device cuda:99", 2, "cuda"),
    ("train", "--images -1", 2, "images must be between"),
    ("train", "--val-images -1", 2, "val_images must be between"),
    ("train", "--size -4", 2, "size must be between"),
    ("train", "--size 257", 2, "size must be between 0 and 256"),
    ("train", "--dataset folder", 2, "name the folder of your images by --data"),
    ("train", "--colour", 2, "unrecognized arguments: --colour"),
    ("train", "--labels yes", 2, "unrecognized arguments: yes"),
    ("sample", "--seeds x", 2, "'x' is not a seed or a range such as 0-31"),
    ("sample", "--seeds 3-1", 2, "'3-1' is not a seed"),
    ("sample", "--seeds 0-99999", 2, "more than 10,000 seeds"),
    ("sample", "--variance huge", 2, "choose from"),
    ("sample", "--steps few", 2, "invalid int value"),
    ("sample", "--out digits", 2, "ends in .png"),
    ("sample", "--gif a.png", 2, "ends in .gif"),
    ("sample", "--out digits.jpg", 2, "or a folder that ends in /, not digits.jpg"),
    ("sample", "--out {p}/empty/ --gif a.gif", 2, "--gif shows a grid on its way"),
    ("sample", "--out {p}/empty --gif a.gif", 2, "--gif shows a grid on its way"),
    ("sample", "--out {p}/empty/ --batch-size 0", 2, "--batch-size must be at least 1, not 0"),
    ("sample", "--batch-size 64", 2, "--batch-size is for a folder as --out"),
    ("sample", "--device abacus", 2, "here: auto, "),
    ("sample", "--guidance nan", 2, "--guidance must be between 0 and 100, not nan"),
    ("sample", "--guidance inf", 2, "--guidance must be between 0 and 100, not inf"),
    ("sample", "--guidance -1", 2, "--guidance must be between 0 and 100, not -1"),
    ("sample", "--guidance much", 2, "invalid float value: 'much'"),
    ("sample", "--guide {p}/good.pt", 2, "--guide and --interval are for --guidance"),
    ("sample", "--interval 1-5", 2, "--guide and --interval are for --guidance"),
    ("sample", "--guidance 1 --guide {p}/good.pt", 2, "are for --guidance; 2 is usual"),
    ("sample", "--guidance 2 --interval some", 2, "'some' is not an interval of t such as 150-700"),
    ("sample", "--guidance 2 --interval 700-150", 2, "'700-150' is not an interval"),
    ("sample", "--digits 10", 2, "'10' is not a digit or a range such as 0-9"),
    ("sample", "--digits 9-0", 2, "'9-0' is not a digit or a range such as 0-9"),
    ("sample", "--digits 1 --classes 1", 2, "not allowed with argument --digits"),
    ("plots", "losses", 2, "known are forward, embedding, loss, trajectory, grid"),
    ("plots", "loss --device abacus", 2, "here: auto, "),
    *[(name, "--device cpu:x", 2, "cpu:x") for name in ("train", "sample", "plots")],
    ("schedule", "--T 1", 2, "at least 2 steps"),
    ("schedule", "--T 100", 2, "give another --T (1000 is usual) or --kind cosine"),
    ("schedule", "--kind square", 2, "choose from"),
    # Data that is missing, damaged or does not fit.
    ("train", "--data {p}/empty --dataset mnist", 1, "train-images-idx3-ubyte"),
    ("train", "--data {p}/empty --dataset kmnist", 1, "no KMNIST in"),
    ("train", "--data {p}/empty --dataset fashion", 1, "no FashionMNIST in"),
    *[("train", f"--data {{p}}/{name}", 1, "is damaged")
      for name in ("cut", "none", "html", "float", "zeros", "dims", "few")],
    *[("train", f"--data {{p}}/nowhere {dataset}", 1, "there is no folder {p}/nowhere")
      for dataset in ("", "--dataset mnist", "--dataset kmnist")],
    ("train", "--data {p}/dirs", 1, "no MNIST in {p}/dirs/MNIST/raw, and it is not downloaded"),
    *[("train", f"--data {{p}}/{name}", 1,
       f"no MNIST in {{p}}/{name}, but image files; to learn these, add --dataset folder")
      for name in ("good", "good/a", "parts")],
    ("train", "--data {p}/half_blank", 1, "8 of the training images in {p}/half_blank (16) are bl"),
    ("train", "--data {p}/alike", 1, "the training images in {p}/alike are all alike"),
    ("train", f"--data {{p}}/odd {BATCH}", 1, "size must halve 2 times"),
    ("train", "--data {p}/mnist --batch-size 17", 1, "too few for batches of 17"),
    ("train", "--data {p}/mnist --val-images 16", 1, "leaves none of 16 images to train on"),
    ("train", "--data {p}/void --dataset folder", 1, "class folder"),
    ("train", "--data {p}/nowhere --dataset folder", 1, "nowhere"),
    ("train", "--data {p}/images --dataset folder", 1, "cannot identify image"),
    ("train", "--data {p}/cut_png --dataset folder", 1, "cannot read {p}/cut_png/a/1.png (image"),
    ("train", "--data {p}/parts --dataset folder", 1,
     "{p}/parts/train and {p}/parts/test must have the same classes; one of them lacks b"),
    ("train", "--data {p}/mnist --dataset folder", 1, "a folder of images for each class"),
    ("train", f"--data {{p}}/one --dataset folder {BATCH}", 1, "too few for batches of 8"),
    ("plots", "bits --checkpoint {p}/good.pt", 1, "not measured beside {p}/good.pt: bits"),
    # Model files that are missing, damaged, foreign or of another network.
    *[("sample", f"--checkpoint {{p}}/{name}.pt", 1, "is damaged, or no model file")
      for name in ("empty", "half", "text", "code", "code2", "page", "zip", "gz", "tensor",
                   "foreign", "size", "keys", "config")],
    ("sample", "--checkpoint {p}/nowhere.pt", 1, "python train.py makes one"),
    ("sample", "--checkpoint {p}/empty", 1, "no model file"),
    ("sample", "--checkpoint {p}/good.pt --steps 0", 1, "steps must be between 1 and 20"),
    ("sample", "--checkpoint {p}/good.pt --steps 21", 1, "steps must be between 1 and 20"),
    ("plots", "loss --checkpoint {p}/half.pt", 1, "is damaged, or no model file"),
    # Models of which no digit can come.
    ("sample", "--checkpoint {p}/nan.pt", 1,
     "the prediction is not finite at t = 20; take another model file"),
    ("sample", "--checkpoint {p}/nan.pt --sampler dpm++ --steps 5", 1, "not finite at t = 20"),
    ("sample", "--checkpoint {p}/nan.pt --no-clip", 1, "not finite at t = 20"),
    ("sample", "--checkpoint {p}/huge.pt --no-clip", 1,
     "not finite at t = 20; clip the predicted images (no --no-clip)"),
    ("plots", "grid --checkpoint {p}/nan.pt", 1, "not finite at t = 20"),
    *[("sample", options, 1, "{p}/good.pt was trained without labels and cannot be asked for a "
       "class; python train.py --labels makes a model that can")
      for options in ("--digits 7", "--classes 7", "--digits 0-9 --guidance 2")],
    # Guides that are missing, damaged or do not fit.
    ("sample", "--guidance 2", 1, "no early.pt and no epoch-1.pt beside {p}/good.pt to guide it; "
     "name an earlier state of the same network by --guide"),
    ("sample", "--guidance 2 --guide {p}/nowhere.pt", 1, "no model file {p}/nowhere.pt"),
    ("sample", "--guidance 2 --guide {p}/empty", 1, "no model file {p}/empty"),
    *[("sample", f"--guidance 2 --guide {{p}}/{name}.pt", 1,
       f"{{p}}/{name}.pt is damaged, or no model file") for name in ("half", "code", "size")],
    ("sample", "--guidance 2 --guide {p}/network.pt", 1,
     "{p}/network.pt has another network than {p}/good.pt"),
    ("sample", "--guidance 2 --guide {p}/schedule.pt", 1,
     "{p}/schedule.pt has another schedule than {p}/good.pt"),
    # Folders and files that cannot be written.
    ("train", f"--data {{p}}/mnist {BATCH} --out {{p}}/file", 1, "file"),
    ("train", f"--data {{p}}/mnist {BATCH} --out /proc/nowhere", 1, "/proc/nowhere"),
    ("train", f"--data {{p}}/mnist {BATCH} --out /proc/nowhere", 1, "name another place by --out"),
    ("sample", "--checkpoint {p}/good.pt --out /proc/nowhere/a.png", 1,
     "name another place by --out"),
    ("sample", "--checkpoint {p}/good.pt --gif /proc/nowhere/a.gif", 1,
     "name another place by --gif"),
    ("plots", "loss --checkpoint {p}/good.pt --out /proc/nowhere", 1,
     "name another place by --out"),
    ("train", f"--data {{p}}/mnist {BATCH} --out {{p}}/dirs", 1, "holds a run; go on by --resume"),
    ("sample", "--checkpoint {p}/good.pt --out {p}/file/a.png", 1, "{p}/file"),
    ("sample", "--checkpoint {p}/good.pt --gif {p}/dirs.gif", 1, "dirs.gif"),
    ("sample", "--checkpoint {p}/good.pt --out {p}/file/", 1, "{p}/file"),
    ("sample", "--checkpoint {p}/good.pt --out {p}/drawn/", 1,
     "00000.png was drawn with other settings"),
    ("plots", "loss --checkpoint {p}/good.pt --out {p}/file", 1, "{p}/file"),
    # Runs that cannot go on, or should not be overwritten.
    ("train", "--data {p}/mnist --out {p}/run", 1, "--resume"),
    ("train", "--out {p}/run --resume --seed 5", 1, "has seed = 0, not 5"),
    ("train", "--out {p}/run --resume --labels", 1, "has labels = False, not True"),
    ("train", "--out {p}/run --resume --epochs 3 --batch-size 4", 1, "has batch_size = 8, not 4"),
    ("train", "--out {p}/run --resume --epochs 0", 2, "epochs must be between 1 and"),
    ("train", "--out {p}/run --resume --lr 2", 2, "lr must be between"),
    ("train", "--out {p}/copied --resume", 1, "holds no run"),
    ("train", "--out {p}/broken --resume", 1, "is damaged, or no model file"),
    ("train", "--out {p}/nowhere --resume", 1, "no model file"),
]
COMMANDS = [row for row in TABLE if row[1] in (
    "--epochs 0", "--data {p}/cut", "--checkpoint {p}/code2.pt", "--checkpoint {p}/half.pt",
    "losses", "--kind square")]


def contents(folder: Path) -> str:
    """A fingerprint of all files in a folder, and the names of the folders in it."""
    paths = sorted(folder.rglob("*"))
    files = [path for path in paths if path.is_file()]
    folders = [path.name for path in paths if path.is_dir()]
    return " ".join([f"{f.name}:{sha256(f.read_bytes()).hexdigest()[:8]}" for f in files] + folders)


def check(status, err: str, row, place) -> None:
    assert status == row[2]
    lines = err.splitlines()
    assert len(lines) == 1 and row[3].format(p=place) in lines[0], err
    assert "Traceback" not in err and len(lines[0]) < 700


@pytest.mark.parametrize("row", TABLE, ids=lambda row: f"{row[0]} {row[1]}")
def test_one_line_and_nothing_written(row, place, tmp_path, monkeypatch, capsys):
    """One line on standard error, the exit status of the table, and no file new or changed."""
    name = row[0]
    argv = [word.format(p=place) for word in row[1].split()]  # {p} may contain a space
    no_network(monkeypatch)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "argv", [f"{name}.py"])
    if "--out" not in argv and name == "train":
        argv += ["--out", str(tmp_path / "new")]
    if "--checkpoint" not in argv and name in ("sample", "plots"):
        argv += ["--checkpoint", str(place / "good.pt")]
    written = contents(place)
    with pytest.raises(SystemExit) as exit_:
        importlib.import_module(name).main(argv)
    status = exit_.value.code
    out, err = capsys.readouterr()
    if isinstance(status, str):
        # Given a text, Python prints it to standard error and exits with 1.
        err += status
        status = 1
    check(status, err, row, place)
    assert contents(place) == written and not any(tmp_path.iterdir())
    assert "run as a program" not in out + err


@pytest.mark.slow
@pytest.mark.parametrize("row", COMMANDS, ids=lambda row: f"{row[0]} {row[1]}")
def test_the_same_as_real_commands(row, place, tmp_path):
    """Six rows of the table as a user would type them."""
    argv = [word.format(p=place) for word in row[1].split()]  # {p} may contain a space
    done = subprocess.run([sys.executable, str(HERE / f"{row[0]}.py"), *argv], cwd=tmp_path,
                          capture_output=True, text=True, timeout=120)
    check(done.returncode, done.stderr, row, place)
    assert not list(tmp_path.rglob("*")) and "run as a program" not in done.stdout


def test_table_is_long_enough():
    """At least forty rows, six of which are tried as real commands."""
    assert len(TABLE) >= 40 and len(COMMANDS) == 6


# ------------------------------------------------------------------------------ a disk that is full

def begun_run(out: Path) -> str:
    """Begin a run of two epochs and stop it after one step; the contents of its folder."""
    config = train.Config(batch_size=8, epochs=2, out=str(out), device="cpu")
    train.train(config, images=(pictures(16), pictures(16)), after_step=lambda run: True)
    return contents(out)


def test_failed_write_keeps_the_old_files(place, tmp_path, monkeypatch):
    """If no file can be written, the command says so in one line, and the old files are whole."""
    written = begun_run(tmp_path)

    def full(state, file):
        file.write(b"half")
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(torch, "save", full)
    with pytest.raises(SystemExit) as exit_:
        train.main(["--data", str(place / "mnist"), "--out", str(tmp_path), "--resume"])
    line = exit_.value.code
    assert line.startswith("train.py: cannot write") and "No space left" in line
    assert "is kept" in line and "\n" not in line
    assert contents(tmp_path) == written


@pytest.mark.slow
def test_full_disk_keeps_the_old_files(place, tmp_path):
    """A real command whose files may not exceed 1 MB: one line, and the old files are whole."""
    resource = pytest.importorskip("resource")  # not on Windows
    written = begun_run(tmp_path)
    done = subprocess.run(
        [sys.executable, str(HERE / "train.py"), "--data", str(place / "mnist"), "--out",
         str(tmp_path), "--resume"], capture_output=True, text=True, timeout=120,
        preexec_fn=lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (10**6, 10**6)))
    assert done.returncode == 1 and len(done.stderr.splitlines()) == 1, done.stderr
    assert "cannot write" in done.stderr and "is kept" in done.stderr
    assert contents(tmp_path) == written


def draw_pictures(place: Path, folder: Path) -> None:
    """Draw into the folder with sample.py, which writes digits.png and way.gif."""
    sample.main(["--checkpoint", str(place / "good.pt"), "--out", str(folder / "digits.png"),
                 "--gif", str(folder / "way.gif"), "--seeds", "0-3", "--steps", "3"])


def draw_figures(place: Path, folder: Path) -> None:
    """Draw into the folder with plots.py, which writes loss.png and animation.gif."""
    plots.main(["loss", "animation", "--checkpoint", str(place / "good.pt"), "--out", str(folder)])


@pytest.mark.parametrize("command", [draw_pictures, draw_figures])
@pytest.mark.parametrize("file_number", [1, 2])
def test_failed_write_keeps_the_old_pictures(command, file_number, place, tmp_path, monkeypatch):
    """If the disk is full at the first or the second picture, the command says so in one line, the
    old picture is whole, and no other file is left.
    """
    command(place, tmp_path)
    old = {path.name: path.read_bytes() for path in tmp_path.iterdir()}
    assert len(old) == 2
    for path in tmp_path.iterdir():
        path.write_bytes(b"old")
    calls = []

    def full(file):
        calls.append(file)
        if len(calls) == file_number:
            raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(SystemExit) as exit_:
        command(place, tmp_path)
    line = exit_.value.code
    assert "cannot write" in line and "No space left" in line and "\n" not in line
    new = {path.name: path.read_bytes() for path in tmp_path.iterdir()}
    assert new.keys() == old.keys()
    assert list(new.values()).count(b"old") == 3 - file_number
    assert all(new[name] in (b"old", old[name]) for name in new)


@pytest.mark.slow
@pytest.mark.parametrize("script, name", [("sample", "digits.png"), ("plots", "loss.png")])
def test_full_disk_keeps_the_old_pictures(script, name, place, tmp_path):
    """Real commands whose files may not exceed 1 kB: one line, and the old picture is whole."""
    resource = pytest.importorskip("resource")  # not on Windows
    (tmp_path / name).write_bytes(b"old")
    argv = [str(HERE / f"{script}.py"), "--checkpoint", str(place / "good.pt"), "--out"]
    argv += [str(tmp_path / name)] if script == "sample" else [str(tmp_path), "loss"]
    done = subprocess.run(
        [sys.executable, *argv], capture_output=True, text=True, timeout=120,
        preexec_fn=lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (1000, 1000)))
    assert done.returncode == 1 and len(done.stderr.splitlines()) == 1, done.stderr
    assert "cannot write" in done.stderr
    assert [path.read_bytes() for path in tmp_path.iterdir()] == [b"old"]


def test_folder_of_someone_else_is_named_with_advice(tmp_path, monkeypatch):
    """Where one may not write, or make a folder, the message says to name another place."""
    def refuse(*args, **kwargs):
        raise PermissionError(13, "Permission denied")

    with monkeypatch.context() as patch, pytest.raises(OSError, match="name another .* by --out"):
        patch.setattr(os, "access", lambda path, mode: mode != os.W_OK)
        train.make_folder(tmp_path)
    with monkeypatch.context() as patch, pytest.raises(OSError, match="Perm.*place by --gif"):
        patch.setattr(Path, "mkdir", refuse)
        train.make_folder(tmp_path / "runs", "--gif")


# ------------------------------------------------------------------------------------------ signals

def command(place: Path, out: Path, *options: str) -> list[str]:
    """The arguments of train.py for the sixteen pictures, two steps an epoch."""
    return ["--data", str(place / "mnist"), "--device", "cpu", "--batch-size", "8", "--out",
            str(out), *options]


def signal_after(step: int, *numbers: int):
    """An after_step that sends signals to this process when so many steps are finished."""
    def send(run):
        if run.step == step:
            for number in numbers:
                os.kill(os.getpid(), number)
    return send


STATUS = {signal.SIGINT: 130, signal.SIGTERM: 143, signal.SIGHUP: 129}  # 128 + the number
SIGNALS = pytest.mark.parametrize("number, status", STATUS.items())


@SIGNALS
def test_signal_saves_and_resume_ends_as_if_unbroken(number, status, place, tmp_path, capsys):
    """A signal stops the run after the step under way; the command says in one line how to go on,
    and exits with the status of the signal. Resumed, the run ends as if it had not been stopped.
    """
    whole = tmp_path / "whole"
    parts = tmp_path / "parts"
    handler = signal.getsignal(number)
    train.main(command(place, whole, "--epochs", "3"), network=little)
    capsys.readouterr()
    with pytest.raises(SystemExit) as exit_:
        train.main(command(place, parts, "--epochs", "3"), network=little,
                   after_step=signal_after(3, number))
    err = capsys.readouterr().err
    assert exit_.value.code == status
    assert err == f"stopped at step 3; to go on, add --resume --out {parts}\n"
    assert len(load_checkpoint(parts / "last.pt").history["step_loss"]) == 3
    assert signal.getsignal(number) is handler
    train.main(command(place, parts, "--resume"), network=little)
    assert "done; now type" in capsys.readouterr().out
    assert same_state(whole / "last.pt", parts / "last.pt")


@pytest.fixture(scope="module")
def unbroken(place) -> Path:
    """The folder of a real command that trained twelve epochs."""
    out = place.parent / "unbroken"
    subprocess.run([sys.executable, str(HERE / "train.py"), *command(place, out, "--epochs", "12")],
                   check=True, capture_output=True)
    return out


@pytest.mark.slow
@SIGNALS
def test_real_command_is_stopped_and_resumed(number, status, place, unbroken, tmp_path):
    """A real command is stopped by a signal at any moment, says how to go on, and does, bit for
    bit.
    """
    script = [sys.executable, str(HERE / "train.py")]
    run = subprocess.Popen([*script, *command(place, tmp_path, "--epochs", "12")], text=True,
                           stderr=subprocess.PIPE, stdout=subprocess.PIPE)
    while not run.stdout.readline().startswith("epoch  2/"):
        assert run.poll() is None
    run.send_signal(number)
    _, err = run.communicate(timeout=60)
    assert run.returncode == status and "add --resume" in err and len(err.splitlines()) == 1
    assert 2 <= len(load_checkpoint(tmp_path / "last.pt").history["loss"]) < 12
    subprocess.run([*script, *command(place, tmp_path, "--resume")], check=True,
                   capture_output=True)
    assert same_state(unbroken / "last.pt", tmp_path / "last.pt")


def test_signal_in_the_last_step_comes_too_late(place, tmp_path, capsys):
    """The run is finished, so it says so, and exits as usual."""
    train.main(command(place, tmp_path, "--epochs", "1"), network=little,
               after_step=signal_after(2, signal.SIGTERM))
    out, err = capsys.readouterr()
    assert "done; now type" in out and "stopped" not in out + err
    assert len(load_checkpoint(tmp_path / "last.pt").history["loss"]) == 1


def test_signal_while_images_are_read_stops_after_one_step(tmp_path, monkeypatch, capsys):
    """Ctrl-C while the images are downloaded: they are read, one step is taken and saved, and the
    run stops.
    """
    asked = []
    data = tmp_path / "data"
    data.mkdir()

    def download(url, *args, **kwargs):
        if not asked:
            os.kill(os.getpid(), signal.SIGINT)
        asked.append(url)
        write_mnist(data, pictures(16), torch.zeros(16))

    monkeypatch.setattr("torchvision.datasets.mnist.download_and_extract_archive", download)
    with pytest.raises(SystemExit) as exit_:
        train.main(["--data", str(data), "--out", str(tmp_path / "run"), "--device", "cpu",
                    "--batch-size", "8"], network=little)
    assert exit_.value.code == 130 and "stopped at step 1;" in capsys.readouterr().err
    assert len(asked) == 4  # files of MNIST
    saved = load_checkpoint(tmp_path / "run" / "last.pt")
    assert saved.config.dataset == "mnist" and len(saved.history["step_loss"]) == 1


@pytest.mark.parametrize("number, status", [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_second_signal_acts_at_once(number, status, monkeypatch, tmp_path):
    """While images are read, a signal is noted; the second one ends the program with its status."""
    noted = []
    data = tmp_path / "data"
    data.mkdir()

    def slow(*args, **kwargs):
        for _ in range(2):
            os.kill(os.getpid(), number)
            noted.append(number)
        raise AssertionError("not reached")

    monkeypatch.setattr("torchvision.datasets.mnist.download_and_extract_archive", slow)
    handler = signal.getsignal(number)
    with pytest.raises(SystemExit) as exit_:
        train.main(["--data", str(data), "--out", str(tmp_path / "run")])
    assert exit_.value.code == status and noted == [number]
    assert signal.getsignal(number) is handler
    assert list(tmp_path.iterdir()) == [data] and not list(data.iterdir())


def test_terminal_that_hangs_up_twice_cuts_no_step(place, tmp_path):
    """Of a closing terminal a program may get SIGHUP twice. It finishes the step and saves."""
    with pytest.raises(SystemExit) as exit_:
        train.main(command(place, tmp_path), network=little,
                   after_step=signal_after(2, signal.SIGHUP, signal.SIGHUP))
    assert exit_.value.code == 129
    assert len(load_checkpoint(tmp_path / "last.pt").history["step_loss"]) == 2


@pytest.mark.parametrize("number", STATUS)
def test_ignored_signal_stays_ignored(number, place, tmp_path, capsys):
    """A signal that is ignored, as SIGHUP is under nohup, does not stop the run."""
    usual = signal.signal(number, signal.SIG_IGN)
    try:
        train.main(command(place, tmp_path, "--epochs", "2"), network=little,
                   after_step=signal_after(2, number))
        assert signal.getsignal(number) == signal.SIG_IGN
    finally:
        signal.signal(number, usual)
    assert "done; now type" in capsys.readouterr().out
    assert len(load_checkpoint(tmp_path / "last.pt").history["loss"]) == 2


def test_run_in_a_thread_trains_without_signals(place, tmp_path):
    """Only the main thread may handle signals. In another one a run trains to its end."""
    raised = []

    def target():
        try:
            train.main(command(place, tmp_path, "--epochs", "1"), network=little)
        except BaseException as error:
            raised.append(error)

    handlers = [signal.getsignal(number) for number in STATUS]
    thread = threading.Thread(target=target)
    thread.start()
    thread.join()
    assert raised == []
    assert len(load_checkpoint(tmp_path / "last.pt").history["loss"]) == 1
    assert handlers == [signal.getsignal(number) for number in STATUS]


# ------------------------------------------------------------- one run at a time in a folder

@pytest.mark.parametrize("options", [[], ["--resume"]])
def test_second_run_in_a_folder_is_refused(options, place, tmp_path, capsys):
    """While a run is going on, a new run and --resume in its folder are refused in one line. The
    first ends as if nothing had happened; after that, the folder is free again.
    """
    refused = []

    def start_another(run) -> bool:
        if run.step == 2:
            with pytest.raises(SystemExit) as exit_:
                train.main(command(place, tmp_path / "run", *options), network=little)
            refused.append(exit_.value.code)
        return run.step == 3

    with pytest.raises(SystemExit):
        train.main(command(place, tmp_path / "run", "--epochs", "2"), network=little,
                   after_step=start_another)
    assert refused == [f"train.py: another process is training into {tmp_path / 'run'}; wait until "
                       "it has finished, or name another folder by --out"]
    train.main(command(place, tmp_path / "run", "--resume"), network=little)
    train.main(command(place, tmp_path / "whole", "--epochs", "2"), network=little)
    assert same_state(tmp_path / "whole" / "last.pt", tmp_path / "run" / "last.pt")
    assert sorted(path.name for path in (tmp_path / "run").iterdir()) == [
        "early.pt", "epoch-1.pt", "epoch-2.pt", "history.csv", "last.pt", "model.pt"]


@pytest.mark.slow
def test_killed_run_leaves_no_lock(place, tmp_path):
    """A real command is refused while another one trains into the folder. When that one has been
    killed, it goes on at once.
    """
    script = [sys.executable, str(HERE / "train.py")]
    run = subprocess.Popen([*script, *command(place, tmp_path, "--epochs", "500")], text=True,
                           stderr=subprocess.PIPE, stdout=subprocess.PIPE)
    while not run.stdout.readline().startswith("epoch  2/"):
        assert run.poll() is None
    resume = [*script, "--out", str(tmp_path), "--resume"]
    second = subprocess.run(resume, capture_output=True, text=True)
    assert run.poll() is None
    run.kill()
    run.communicate()
    assert second.returncode == 1 and "another process is training" in second.stderr
    assert len(second.stderr.splitlines()) == 1
    third = subprocess.Popen([*script, *command(place, tmp_path, "--resume")], text=True,
                             stderr=subprocess.PIPE, stdout=subprocess.PIPE)
    while not third.stdout.readline().startswith("epoch "):
        assert third.poll() is None
    third.kill()
    third.communicate()


# ------------------------------------------------------------- streams that no one reads

def argv_of(name: str, place: Path, folder: Path) -> list[str]:
    """A short command for each script; those that write files write them into the folder."""
    model = ["--checkpoint", str(place / "good.pt"), "--device", "cpu", "--out"]
    return {"schedule": [], "unet": [],
            "train": command(place, folder, "--epochs", "1"),
            "sample": [*model, str(folder / "digits.png"), "--steps", "3"],
            "plots": ["loss", *model, str(folder)]}[name]


WRITTEN = {"schedule": None, "unet": None, "train": "last.pt", "sample": "digits.png",
           "plots": "loss.png"}


def run_script(name: str, place: Path, folder: Path, monkeypatch) -> None:
    """Run a script in this process as if it was typed, and see that it has written its file."""
    path = str(HERE / f"{name}.py")
    monkeypatch.setattr(sys, "argv", [path, *argv_of(name, place, folder)])
    monkeypatch.setenv("MPLBACKEND", "agg")  # so that a change of it is undone
    with torch.random.fork_rng(devices=[]):
        runpy.run_path(path, run_name="__main__")
    assert WRITTEN[name] is None or (folder / WRITTEN[name]).stat().st_size > 1000


@pytest.mark.parametrize("name", WRITTEN)
def test_reader_that_leaves_is_no_error(name, place, tmp_path, monkeypatch, capfd):
    """As in `| head -1`: each script does its work and says nothing of it."""
    reader, writer = os.pipe()
    os.close(reader)
    with monkeypatch.context() as patch, open(writer, "w") as stream:
        patch.setattr(sys, "stdout", stream)
        run_script(name, place, tmp_path, patch)
    assert capfd.readouterr() == ("", "")


@pytest.mark.parametrize("name", WRITTEN)
def test_closed_streams_are_no_error(name, place, tmp_path, monkeypatch):
    """In a daemon and under pythonw both streams are None: each script works silently."""
    monkeypatch.setattr(sys, "stdout", None)
    monkeypatch.setattr(sys, "stderr", None)
    run_script(name, place, tmp_path, monkeypatch)


@pytest.mark.parametrize("encoding", ["ascii", "cp1252"])
@pytest.mark.parametrize("name", ["train", "sample", "plots"])
def test_letters_that_the_terminal_lacks_are_replaced(name, encoding, place, tmp_path, monkeypatch):
    """A folder with a Japanese name is printed with question marks, and the work is done."""
    stream = io.TextIOWrapper(io.BytesIO(), encoding=encoding)
    monkeypatch.setattr(sys, "stdout", stream)
    (tmp_path / "数字").mkdir()
    run_script(name, place, tmp_path / "数字", monkeypatch)
    assert f"{tmp_path}/??/{WRITTEN[name]}".replace("last", "model") in (
        stream.buffer.getvalue().decode(encoding))


def test_other_errors_of_a_stream_are_raised(monkeypatch):
    """A full disk under standard output is an error as everywhere else."""
    class Full(io.StringIO):
        def write(self, text):
            raise OSError(28, "No space left on device")

    monkeypatch.setattr(sys, "stdout", Full())
    with pytest.raises(OSError, match="No space left"):
        importlib.import_module("schedule").main([])


@pytest.mark.slow
@pytest.mark.parametrize("closed", [(2,), (0, 1, 2)])
@pytest.mark.parametrize("name", WRITTEN)
def test_real_command_with_closed_streams(name, closed, place, tmp_path):
    """Started as by a daemon, each script works; what it writes can be read."""
    def close():
        for number in closed:
            os.close(number)

    done = subprocess.run([sys.executable, "-W", "error", str(HERE / f"{name}.py"),
                           *argv_of(name, place, tmp_path)], preexec_fn=close)
    assert done.returncode == 0
    if name == "train":
        assert len(load_checkpoint(tmp_path / "last.pt").history["loss"]) == 1
    elif WRITTEN[name] is not None:
        with Image.open(tmp_path / WRITTEN[name]) as picture:
            picture.load()


@pytest.mark.slow
@pytest.mark.parametrize("name", WRITTEN)
def test_real_command_whose_reader_leaves(name, place, tmp_path):
    """Exit status 0, and nothing on standard error, even where Python tells of what it ignores."""
    reader, writer = os.pipe()
    os.close(reader)
    done = subprocess.run([sys.executable, "-X", "dev", str(HERE / f"{name}.py"),
                           *argv_of(name, place, tmp_path)], stdout=writer, stderr=subprocess.PIPE)
    os.close(writer)
    assert done.returncode == 0 and done.stderr == b""
    assert WRITTEN[name] is None or (tmp_path / WRITTEN[name]).exists()


@pytest.mark.slow
def test_closed_terminal_saves_the_run(place, unbroken, tmp_path):
    """A run in a terminal that is closed finishes its step, saves and exits with 129. Resumed, it
    ends bit for bit as if it had not been stopped.
    """
    pty = pytest.importorskip("pty")  # neither of them is on Windows
    termios = pytest.importorskip("termios")
    fcntl = pytest.importorskip("fcntl")
    terminal, inside = pty.openpty()

    def move_in():
        os.setsid()
        fcntl.ioctl(0, termios.TIOCSCTTY, 0)

    script = [sys.executable, str(HERE / "train.py")]
    run = subprocess.Popen([*script, *command(place, tmp_path, "--epochs", "12")], stdin=inside,
                           stdout=inside, stderr=inside, preexec_fn=move_in)
    os.close(inside)
    shown = b""
    while b"epoch  2/" not in shown:
        shown += os.read(terminal, 1000)
    os.close(terminal)
    assert run.wait(timeout=60) == 129
    assert 2 <= len(load_checkpoint(tmp_path / "last.pt").history["loss"]) < 12
    subprocess.run([*script, *command(place, tmp_path, "--resume")], check=True,
                   capture_output=True)
    assert same_state(unbroken / "last.pt", tmp_path / "last.pt")


# ------------------------------------------------------ what a user's machine brings along

def test_home_folder_is_understood(place, tmp_path, monkeypatch):
    """~ is the home folder in every option that names a file, also where a shell leaves it as it
    is, as in --out=~/run.
    """
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setenv("USERPROFILE", str(tmp_path))  # on Windows
    monkeypatch.chdir(place)
    write_mnist(tmp_path / "data", pictures(16), torch.zeros(16))
    train.main(["--data=~/data", "--out=~/run", "--batch-size", "8", "--epochs", "1", "--device",
                "cpu", "--T", "20", "--schedule", "cosine"])
    assert (tmp_path / "run" / "last.pt").exists()
    options = ["--checkpoint=~/run/model.pt", "--device", "cpu"]
    sample.main([*options, "--out=~/a.png", "--gif=~/a.gif", "--steps", "2", "--guidance", "2",
                 "--guide=~/run/early.pt"])
    plots.main([*options, "--out=~/figures", "loss"])
    for name in ("a.png", "a.gif", "figures/loss.png"):
        assert (tmp_path / name).exists()
    assert not (place / "~").exists()


def test_figures_do_not_depend_on_the_users_settings(place, tmp_path):
    """Whatever the user's matplotlibrc says, a figure has the same bytes."""
    settings = {"text.usetex": True, "font.family": "none of the kind", "axes.facecolor": "red",
                "savefig.dpi": 30, "savefig.bbox": "tight", "lines.linestyle": "--"}
    options = ["loss", "--checkpoint", str(place / "good.pt"), "--out"]
    plots.main([*options, str(tmp_path / "usual")])
    with rc_context(settings):
        plots.main([*options, str(tmp_path / "other")])
    assert contents(tmp_path / "usual") == contents(tmp_path / "other") != ""


@pytest.mark.slow
def test_figures_need_no_window(place, tmp_path):
    """A backend of matplotlib that is not installed is not asked for."""
    done = subprocess.run(
        [sys.executable, str(HERE / "plots.py"), *argv_of("plots", place, tmp_path)],
        env=os.environ | {"MPLBACKEND": "nothing"}, capture_output=True)
    assert done.returncode == 0 and done.stderr == b"" and (tmp_path / "loss.png").exists()


@pytest.mark.slow
@pytest.mark.parametrize("name", WRITTEN)
def test_script_runs_in_safe_path_mode(name, place, tmp_path):
    """python -P does not look for modules beside the script; the scripts find each other."""
    done = subprocess.run([sys.executable, "-P", str(HERE / f"{name}.py"),
                           *argv_of(name, place, tmp_path)], cwd=tmp_path, capture_output=True)
    assert done.returncode == 0 and done.stderr == b""
    assert WRITTEN[name] is None or (tmp_path / WRITTEN[name]).exists()


@pytest.fixture
def float64_by_default():
    """Let torch make float64 unless it is told otherwise, as some users do."""
    torch.set_default_dtype(torch.float64)
    yield
    torch.set_default_dtype(torch.float32)


def numbers(place: Path, out: Path) -> list:
    """What each part computes: digits, samples, a prediction, a run and its files."""
    checkpoint = load_checkpoint(place / "good.pt")
    digits, labels = train.builtin_digits(24, seed=3)
    samples = []
    for sampler in sample.SAMPLERS:
        samples += [x for _, *pair in sample.sample(checkpoint.model, checkpoint.schedule, [0, 1],
                                                    sampler, steps=3) for x in pair]
    samples.append(sample.restart(checkpoint.model, checkpoint.schedule, samples[-1], [0, 1],
                                  (0.4,), steps=2))
    samples.append(sample.draw_digit(checkpoint.model, checkpoint.schedule, 0))
    assert all(x.dtype == torch.float32 for x in samples)
    config = train.Config(batch_size=8, epochs=1, T=20, schedule="cosine", out=str(out),
                          device="cpu")
    history = train.train(config, images=(digits[:16], digits[16:]), network=little)
    weights = list(load_checkpoint(out / "last.pt", little).state["weights"].values())
    assert all(weight.dtype == torch.float32 for weight in weights)
    return [digits, labels, *samples, *weights,
            *(torch.tensor(history[name], dtype=torch.float64)
              for name in ("loss", "held_out", "step_loss"))]


def test_default_dtype_changes_nothing(place, tmp_path, request):
    """Noise, weights, images and losses are float32, with the same values, if torch makes float64
    by default.
    """
    usual = numbers(place, tmp_path / "usual")
    request.getfixturevalue("float64_by_default")
    other = numbers(place, tmp_path / "other")
    assert torch.get_default_dtype() == torch.float64
    assert len(usual) == len(other)
    assert all(map(torch.equal, usual, other))


# -------------------------------------------------------------------------------- training longer

def test_command_trains_longer(place, tmp_path, capsys):
    """--resume --epochs 3 goes on with a finished run of two epochs of two steps. It says after
    which step the plan changes and with which learning rate it goes on: with 6 steps, 5 of them on
    the way down, that is lr 2/5 in the fifth. Once more, the run is finished, and says so. Fewer
    epochs are refused in one line. Neither changes a file.
    """
    train.main(command(place, tmp_path, "--epochs", "2", "--lr", "0.001"), network=little)
    capsys.readouterr()
    train.main(command(place, tmp_path, "--resume", "--epochs", "3"), network=little)
    lines = capsys.readouterr().out.splitlines()[-3:]
    assert lines[0] == "a new plan after step 4: 3 epochs; the learning rate goes on at 0.0004"
    assert lines[1].startswith("epoch  3/3   loss ") and lines[2].startswith("done; now type")
    written = contents(tmp_path)

    for options in (["--epochs", "3"], ["--lr", "0.01"], []):
        train.main(command(place, tmp_path, "--resume", *options), network=little)
        lines = capsys.readouterr().out.splitlines()[-2:]
        assert lines[0] == "3 epochs are finished; to train longer, give more --epochs"
        assert lines[1].startswith("done; now type")
    with pytest.raises(SystemExit) as exit_:
        train.main(command(place, tmp_path, "--resume", "--epochs", "2"), network=little)
    assert exit_.value.code == (f"train.py: the run in {tmp_path} has already come to epoch 3; "
                                "--epochs must be at least 3")
    assert contents(tmp_path) == written


def test_quick_does_not_change_the_plan_of_a_run(place, tmp_path, capsys):
    """--quick --resume finds the run that --quick began, and goes on as planned then: --quick alone
    would now plan one epoch.
    """
    quick = ["--quick", *command(place, tmp_path, "--images", "16", "--val-images", "0")]
    with pytest.raises(SystemExit):
        train.main([*quick, "--epochs", "2"], network=little, after_step=lambda run: run.step == 1)
    train.main([*quick, "--resume"], network=little)
    assert "a new plan" not in capsys.readouterr().out
    saved = load_checkpoint(tmp_path / "last.pt", network=little)
    assert saved.config.epochs == 2 and len(saved.history["loss"]) == 2


# ------------------------------------------------------------------------------ the built-in digits

def move_default_folder(monkeypatch, data: Path) -> None:
    """Let --data have another default than the folder of the project."""
    field = ("data", str, train.option(str(data), "as in Config"))
    moved = make_dataclass("Config", [field], bases=(train.Config,))
    monkeypatch.setattr(train, "Config", moved)


def test_without_mnist_the_builtin_digits_are_learned(monkeypatch, tmp_path, capsys):
    """Without MNIST and without a network the command takes the built-in digits, if it names
    neither a folder nor a data set. It says so before and after training, and it does not show the
    blog's losses, which are those of MNIST. The download that failed leaves no folder behind.
    """
    no_network(monkeypatch)
    move_default_folder(monkeypatch, tmp_path / "data")
    train.main(["--out", str(tmp_path / "run"), "--device", "cpu",
                "--images", "16", "--val-images", "8", "--batch-size", "8", "--epochs", "1"],
               network=little)
    lines = capsys.readouterr().out.splitlines()
    assert lines[0] == f"looking for MNIST in {tmp_path / 'data'}" and len(lines) == 6
    assert not (tmp_path / "data").exists()
    assert "these are built-in digits" in lines[1] and lines[-2] == lines[1]
    assert lines[2] == f"built-in digits, on cpu, into {tmp_path / 'run'}"
    assert lines[-1].startswith("done; now type") and "blog" not in "".join(lines)
    assert load_checkpoint(tmp_path / "run" / "model.pt").config.dataset == "builtin"


def test_builtin_digits_have_a_folder_of_their_own(monkeypatch, tmp_path, capsys):
    """A run with them goes into runs/builtin, so that a run with MNIST can follow, and keeps the
    other options. If MNIST or a folder was named, nothing else takes its place.
    """
    no_network(monkeypatch)
    move_default_folder(monkeypatch, tmp_path / "data")
    given = {"images": 16, "epochs": 2}
    config, notice = train.with_builtin_digits_if_needed(train.Config(**given), given)
    assert config == train.Config(dataset="builtin", **given)
    assert config.out == str(HERE / "runs" / "builtin-16") and config.images == 16
    assert notice in capsys.readouterr().out and "built-in digits" in notice
    assert train.Config(**given).out == str(HERE / "runs" / "mnist-16")
    for name, value in (("dataset", "mnist"), ("data", str(tmp_path))):
        named = given | {name: value}
        config, notice = train.with_builtin_digits_if_needed(train.Config(**named), named)
        assert config == train.Config(**named) and notice == "" == capsys.readouterr().out


@pytest.mark.parametrize("content, allowed", [
    ((), True), (("MNIST",), True), (("KMNIST", "notes"), True),
    (("notes",), False), (("a", "a/x.jpg"), False), (("MNIST", "x.PNG"), False)])
def test_only_a_folder_of_ours_is_downloaded_into(content, allowed, tmp_path, monkeypatch):
    """A named folder is downloaded into if it is empty or holds one of the data sets, but not if it
    holds other things or images. A download that fails leaves it as it was.
    """
    data = tmp_path / "data"
    data.mkdir()
    for name in content:
        if "." in name:
            (data / name).write_bytes(b"image")
        else:
            (data / name).mkdir()
    written = contents(data)
    asked = []

    def refuse(url, *args, **kwargs):
        asked.append(url)
        raise URLError("no route to host")

    monkeypatch.setattr("torchvision.datasets.mnist.download_and_extract_archive", refuse)
    with pytest.raises(FileNotFoundError, match="the download failed" if allowed else "files"):
        train.load_images(data)
    assert bool(asked) == allowed and contents(data) == written


# -------------------------------------------------------------------------------- several processes

def torchrun(script: Path, *options) -> subprocess.CompletedProcess:
    """Run a script in two processes, by a port that is free."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    return subprocess.run([sys.executable, "-m", "torch.distributed.run", "--nproc-per-node=2",
                           f"--master-port={port}", str(script), *map(str, options)],
                          capture_output=True, text=True, timeout=200,
                          env=os.environ | {"PYTHONPATH": str(HERE)})


def test_second_signal_of_torchrun_is_not_obeyed_at_once(place, tmp_path, monkeypatch, capsys):
    """torchrun sends each signal twice. With it in charge (here of a single process) a run still
    finishes the step under way and saves, and exits with the status of the signal.
    """
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    for name, value in (("RANK", 0), ("LOCAL_RANK", 0), ("WORLD_SIZE", 1),
                        ("MASTER_ADDR", "127.0.0.1"), ("MASTER_PORT", port)):
        monkeypatch.setenv(name, str(value))
    with pytest.raises(SystemExit) as exit_:
        train.main(command(place, tmp_path), network=little,
                   after_step=signal_after(2, signal.SIGTERM, signal.SIGTERM))
    assert exit_.value.code == 143 and "stopped at step 2" in capsys.readouterr().err
    assert len(load_checkpoint(tmp_path / "last.pt").history["step_loss"]) == 2
    assert not torch.distributed.is_initialized()


@pytest.mark.parametrize("options, status", [
    ("--epochs 0", 2), ("--epochs many", 2), ("--batch-size 17", 1), ("--out {p}/run", 1)])
def test_one_of_several_processes_complains(options, status, place, tmp_path, monkeypatch, capsys):
    """What fails in the same way in all processes is told by the first process of a machine. The
    others end with the same status and say nothing.
    """
    messages = []
    for local_rank in (0, 1):
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            port = free.getsockname()[1]
        for name, value in (("RANK", 0), ("LOCAL_RANK", local_rank), ("WORLD_SIZE", 1),
                            ("MASTER_ADDR", "127.0.0.1"), ("MASTER_PORT", port)):
            monkeypatch.setenv(name, str(value))
        with pytest.raises(SystemExit) as exit_:
            train.main(command(place, tmp_path, *options.format(p=place).split()), network=little)
        text = exit_.value.code if isinstance(exit_.value.code, str) else ""
        assert (1 if text else exit_.value.code) == status
        messages.append(capsys.readouterr().err + text)
    assert len(messages[0].splitlines()) == 1 and messages[1] == ""


@pytest.mark.slow
def test_two_processes_stop_together(place, tmp_path):
    """If only the second process is told to stop, in its third step, both stop after that step, and
    the first one saves.
    """
    script = tmp_path / "script.py"
    script.write_text("""
import os, signal, sys
import train

def stop_the_second_process(run):
    if run.step == 3 and os.environ["RANK"] == "1":
        os.kill(os.getpid(), signal.SIGTERM)

train.main(sys.argv[1:], after_step=stop_the_second_process)
""")
    done = torchrun(script, *command(place, tmp_path / "run", "--epochs", "50"))
    assert done.returncode != 0 and "--resume" in done.stdout + done.stderr
    state = torch.load(tmp_path / "run" / "last.pt", weights_only=True)
    assert len(state["history"]["step_loss"]) == 3


@pytest.mark.slow
def test_two_processes_give_the_weights_of_one(place, tmp_path):
    """torchrun with two gloo processes: the losses and weights of a single one, to rounding.

    Adam divides by the root of a gradient's mean square, so a weight whose gradient is almost zero
    may move by the full learning rate either way; weights are compared by their median difference,
    against 0.1 % of the sum of the learning rates of all steps.
    """
    done = torchrun(HERE / "train.py", *command(place, tmp_path / "two", "--epochs", "3"))
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("epoch  1/3") == 1 and done.stdout.count("done") == 1
    train.main(command(place, tmp_path / "one", "--epochs", "3"))
    two = load_checkpoint(tmp_path / "two" / "last.pt")
    one = load_checkpoint(tmp_path / "one" / "last.pt")
    assert len(two.history["step_loss"]) == 6
    for a, b in zip(two.history["step_loss"], one.history["step_loss"]):
        assert abs(a - b) < 1e-4
    rates = sum(train.learning_rate(i, 6, one.config) for i in range(6))
    for name, weight in one.state["weights"].items():
        assert (weight - two.state["weights"][name]).abs().median() < 1e-3 * rates
    assert torch.equal(one.state["generator"], two.state["generator"])


@pytest.mark.slow
def test_two_processes_go_on_with_a_run_of_two(place, tmp_path):
    """A run of two processes is stopped and resumed by two processes: it ends bit for bit as a run
    of two processes that was not stopped.
    """
    torchrun(HERE / "train.py", *command(place, tmp_path / "whole", "--epochs", "2"))
    script = tmp_path / "script.py"
    script.write_text("""
import sys
import train
train.main(sys.argv[1:], after_step=lambda run: run.step == 3)
""")
    torchrun(script, *command(place, tmp_path / "parts", "--epochs", "2"))
    assert len(load_checkpoint(tmp_path / "parts" / "last.pt").history["step_loss"]) == 3
    done = torchrun(HERE / "train.py", *command(place, tmp_path / "parts", "--resume"))
    assert done.returncode == 0, done.stderr
    assert same_state(tmp_path / "whole" / "last.pt", tmp_path / "parts" / "last.pt")
