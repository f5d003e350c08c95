"""The laws of training: what a step sees, what is measured, and that stopping loses nothing."""

import copy
import csv
import hashlib
import math
import os
import pickle
import re
import shlex
import shutil
import signal
import time
from collections import Counter
from dataclasses import fields
from urllib.error import URLError

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image
from torch.utils._pytree import tree_flatten

import train
from sample import SHIPPED, to_uint8
from sample import main as sample_main
from schedule import NoiseSchedule
from strategies import FEW, SEED, pictures, same_state, write_mnist
from train import (
    BLOG_LOSS, DROPPED, HERE, QUICK, Config, Examples, Run, builtin_digits, class_names, draw_t,
    drop_labels, evaluate, from_uint8, learning_rate, load_checkpoint, load_images, next_batch,
    options_for_samples, own_share, read_picture, save, save_history, scaled, split_images,
    told_to_stop, training_step, update_average)
from unet import UNet


def small(out, **changes) -> Config:
    """The options of a run of less than a second: three epochs of four steps on 8x8 pixels."""
    options = {"epochs": 3, "batch_size": 8, "lr": 1e-3, "out": str(out), "device": "cpu"}
    return Config(**options | changes)


# 32 images to train on and 24 that are held out.
IMAGES = (pictures(32, size=8), pictures(24, size=8, seed=1))


def marked(count: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Images that can be told apart, and labels: image i has the grey level 8 i all over, and the
    label 7 i mod 5.
    """
    number = torch.arange(count)
    images = (8 * number).to(torch.uint8).reshape(-1, 1, 1, 1).expand(count, 1, 8, 8)
    return images.contiguous(), 7 * number % 5


# The same number of images as above, with labels.
MARKED = (marked(32), marked(24))


def little(**sizes) -> UNet:
    """A UNet that is faster than the default one, for the many laws that hold for any network."""
    few = {"channels": (8, 8), "blocks": (1, 1), "embedding": 8, "time_hidden": 8, "time_width": 4,
           "heads": 2, "groups": 4}
    return UNet(**few | sizes)


def learn(config: Config, **arguments) -> dict[str, list[float]]:
    """Train a little network on the 32 images, if the arguments of train() say nothing else."""
    return train.train(config, **{"images": IMAGES, "network": little} | arguments)


class Plain(torch.nn.Module):
    """A network that is no UNet: two convolutions, with t as a third channel.

    All that train.py asks of a network is in it: it is called with (xt, t), and .config holds the
    arguments that build it again.
    """

    def __init__(self, size: int, width: int = 4):
        super().__init__()
        self.config = {"size": size, "width": width}
        self.first = torch.nn.Conv2d(2, width, 3, padding=1)
        self.last = torch.nn.Conv2d(width, 1, 3, padding=1)

    def forward(self, xt, t):
        level = (t / 1000).reshape(-1, 1, 1, 1).expand_as(xt)
        return self.last(torch.tanh(self.first(torch.cat([xt, level], dim=1))))


def noting(shown: list) -> type[Plain]:
    """A network that notes what it is called with: whether it is in training mode, xt and t."""
    class Noting(Plain):
        def forward(self, xt, t):
            shown.append((self.training, xt.detach().clone(), t.clone()))
            return super().forward(xt, t)
    return Noting


def stop_after(*steps: int):
    """An after_step that stops the run when so many steps are finished."""
    return lambda run: run.step in steps


def files(folder) -> dict[str, bytes]:
    """The names of all files in a folder, and what they hold."""
    return {path.name: path.read_bytes() for path in sorted(folder.iterdir())}


def no_network(monkeypatch) -> None:
    """Let every download fail, as on a machine without a network."""
    def refuse(*args, **kwargs):
        raise URLError("no route to host")
    monkeypatch.setattr("torchvision.datasets.mnist.download_and_extract_archive", refuse)


def processes(count: int, monkeypatch, rank: int = 0) -> None:
    """Let torch say that so many processes share the work, and that this is one of them."""
    monkeypatch.setattr(torch.distributed, "is_initialized", lambda: count > 1)
    monkeypatch.setattr(torch.distributed, "get_world_size", lambda: count)
    monkeypatch.setattr(torch.distributed, "get_rank", lambda: rank)


# -------------------------------------------------------------------------------------- the images

def test_bytes_and_floats_convert_into_each_other():
    """to_uint8(from_uint8(k)) = k for all 256 bytes; 0 is exactly -1 and 255 exactly +1."""
    k = torch.arange(256, dtype=torch.uint8).reshape(256, 1, 1, 1)
    x = from_uint8(k)
    assert torch.equal(to_uint8(x), k)
    assert x[0] == -1 and x[255] == 1 and x.dtype == torch.float32


@given(st.lists(st.floats(-10, 10), min_size=2, max_size=2))
def test_to_uint8_rises_and_saturates(pair):
    """a <= b implies to_uint8(a) <= to_uint8(b); beyond [-1, 1] it stays at 0 and 255."""
    low, high = to_uint8(torch.tensor(sorted(pair))).tolist()
    assert low <= high
    for x, byte in zip(sorted(pair), (low, high)):
        if abs(x) <= 1:  # the nearest of the 256 levels, which are 2/255 apart
            assert abs(from_uint8(torch.tensor(byte)).item() - x) < 1 / 255 + 1e-6
    assert low == 0 or min(pair) > -1
    assert high == 255 or max(pair) < 1


def test_images_are_read_as_they_are(tmp_path):
    """What was written in MNIST's format is what load_images returns, byte by byte."""
    images = pictures(5)
    labels = torch.tensor([3, 1, 4, 1, 5])
    write_mnist(tmp_path, images, labels)
    for part in (True, False):
        got, got_labels = load_images(tmp_path, part)
        assert torch.equal(got, images) and torch.equal(got_labels, labels)
        assert got.dtype == torch.uint8


def test_missing_mnist_is_one_line_of_advice(tmp_path, monkeypatch):
    """Without files and network the error names the four files, where to get and to put them."""
    no_network(monkeypatch)
    with pytest.raises(FileNotFoundError) as error:
        load_images(tmp_path)
    text = str(error.value)
    assert "\n" not in text and "download" in text and str(tmp_path) in text
    for part in ("train-images-idx3-ubyte", "t10k-labels-idx1-ubyte", "https://", "--data"):
        assert part in text


def test_truncated_mnist_is_one_line(tmp_path, monkeypatch):
    """A file that was cut off is an error, not a shorter data set."""
    no_network(monkeypatch)
    write_mnist(tmp_path, pictures(5), torch.arange(5))
    path = tmp_path / "MNIST" / "raw" / "train-images-idx3-ubyte"
    path.write_bytes(path.read_bytes()[:-100])
    with pytest.raises(ValueError, match="is damaged") as error:
        load_images(tmp_path)
    assert "\n" not in str(error.value)


def write_halves(path, left: int) -> None:
    """Write a colour picture of 40x40 pixels: a grey level on the left half, white on the right."""
    path.parent.mkdir(parents=True, exist_ok=True)
    picture = Image.new("RGB", (40, 40), (255, 255, 255))
    picture.paste((left, left, left), (0, 0, 20, 40))
    picture.save(path)


def test_any_folder_of_images_can_be_learned(tmp_path):
    """A folder of images for each class, of any size and colour. A tenth is held out, no image is
    in both parts, and the order is random, so that the first N images, or the last, are a fair
    choice of all classes.
    """
    for kind in ("cat", "dog"):
        (tmp_path / kind).mkdir()
        for i in range(10):
            write_halves(tmp_path / kind / f"{i}.png", 10 * i)
    images, labels = load_images(tmp_path, True, "folder")
    held_out, held_out_labels = load_images(tmp_path, False, "folder")
    assert images.shape == (18, 1, 28, 28) and images.dtype == torch.uint8
    assert len(held_out) == 2 and held_out.dtype == torch.uint8

    # Each has another grey level on the left, so its label and a pixel tell which one it is.
    all_labels = torch.cat([labels, held_out_labels]).tolist()
    all_greys = torch.cat([images, held_out])[:, 0, 5, 5].tolist()
    assert sorted(zip(all_labels, all_greys)) == [(k, 10 * i) for k in (0, 1) for i in range(10)]
    assert 3 < labels[:9].sum() < 7 and labels.tolist() != sorted(labels)

    # A single image is held out, and none is left to train on.
    shutil.rmtree(tmp_path / "dog")
    for i in range(1, 10):
        (tmp_path / "cat" / f"{i}.png").unlink()
    images, labels = load_images(tmp_path, True, "folder")
    assert images.shape == (0, 1, 28, 28) and labels.shape == (0,)
    assert len(load_images(tmp_path, False, "folder")[0]) == 1


@pytest.mark.parametrize("names", [("train", "test"), ("training", "testing"), ("train", "val")])
def test_images_that_are_split_already_stay_so(names, tmp_path):
    """DIR/train/CLASS/* are the training images and DIR/test/CLASS/* those that are held out."""
    for name, greys in zip(names, ([0, 10, 20, 30], [40, 50])):
        for kind in ("cat", "dog"):
            for grey in greys:
                write_halves(tmp_path / name / kind / f"{grey}.png", grey)
    for part, greys in ((True, [0, 10, 20, 30]), (False, [40, 50])):
        images, labels = load_images(tmp_path, part, "folder")
        pairs = zip(labels.tolist(), images[:, 0, 5, 5].tolist())
        assert sorted(pairs) == [(k, grey) for k in (0, 1) for grey in greys]


def test_folder_of_training_images_alone_is_no_class(tmp_path):
    """DIR/train/CLASS/* without a folder of test images: one of ten images is held out. But if
    DIR/train holds images itself, as DIR/plane does, it is a class.
    """
    for kind in ("cat", "dog"):
        for grey in range(0, 100, 10):
            write_halves(tmp_path / "split" / "train" / kind / f"{grey}.png", grey)
    images, labels = load_images(tmp_path / "split", True, "folder")
    assert len(images) == 18 and set(labels.tolist()) == {0, 1}
    assert len(load_images(tmp_path / "split", False, "folder")[0]) == 2

    for kind in ("plane", "train"):
        for grey in range(0, 100, 10):
            write_halves(tmp_path / "classes" / kind / f"{grey}.png", grey)
    config = Config(dataset="folder", data=str(tmp_path / "classes"))
    assert class_names(config) == ["plane", "train"]


# A dark picture with a frame in which nothing is, 28x28, so that no pixel has to be scaled.
LEVELS = (pictures(1)[0, 0].int() * 200 // 255).numpy().astype("uint8")
SHAPE = (pictures(1)[0, 0] > 0).numpy()


def see_through(colour: int, mode: str) -> Image.Image:
    """The rectangle in LEVELS with this grey level, on a ground that is transparent."""
    picture = Image.new("LA", (28, 28), (colour, 0))
    picture.putalpha(Image.fromarray(SHAPE.astype("uint8") * 255))
    return picture.convert(mode)


def write_pgm(path, highest: int) -> None:
    """LEVELS as a binary PGM with 16 bits a pixel, of which `highest` is white."""
    numbers = (LEVELS / 255 * highest).round().astype(">u2")
    path.write_bytes(f"P5 28 28 {highest}\n".encode() + numbers.tobytes())


PICTURES = {
    "grey.png": lambda path: Image.fromarray(LEVELS).save(path),
    "colour.png": lambda path: Image.fromarray(LEVELS).convert("RGB").save(path),
    "palette.png": lambda path: Image.fromarray(LEVELS).convert("P").save(path),
    "four_inks.tif": lambda path: Image.fromarray(LEVELS).convert("RGB").convert("CMYK").save(path),
    "16_bits.png": lambda path: Image.fromarray(LEVELS.astype("uint16") * 257).save(path),
    "16_bits.tif": lambda path: Image.fromarray(LEVELS.astype("uint16") * 257).save(path),
    "16_bits.pgm": lambda path: write_pgm(path, 65535),
    "12_bits.pgm": lambda path: write_pgm(path, 4095),
    "float.tif": lambda path: Image.fromarray(LEVELS.astype("float32") / 255).save(path)}


@pytest.mark.parametrize("name", PICTURES)
def test_grey_levels_are_scaled_by_the_range_of_the_format(name, tmp_path):
    """The same picture in any format gives the same 256 grey levels, to within one."""
    PICTURES[name](tmp_path / name)
    got = read_picture(str(tmp_path / name))
    assert got.shape == (1, 28, 28) and got.dtype == torch.uint8
    assert (got[0].int() - torch.tensor(LEVELS).int()).abs().max() <= 1


def test_pictures_of_a_folder_are_scaled_once(tmp_path):
    """With size=64, pictures of 64x64 pixels are read as they are, not by way of 28x28."""
    images = pictures(20, size=64)
    for k, image in enumerate(images):
        path = tmp_path / "data" / "class" / f"{k:02}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(image[0].numpy()).save(path)
    config = small(tmp_path, dataset="folder", data=str(tmp_path / "data"), size=64)
    training, held_out = split_images(config)
    read = torch.cat([training.images, held_out.images])
    assert sorted(read.flatten(1).tolist()) == sorted(images.flatten(1).tolist())


@pytest.mark.parametrize("kind, factor, message", [
    ("int32", 1, "32 bits"), ("float32", 1, "not between 0 and 1"),
    ("float32", float("nan"), "not between 0 and 1"), ("float32", -1 / 255, "not between 0 and 1")])
def test_levels_of_unknown_range_are_refused_by_name(kind, factor, message, tmp_path):
    """32-bit integers, and floats that are not between 0 and 1, could mean anything."""
    path = tmp_path / "x.tif"
    with np.errstate(invalid="ignore"):
        Image.fromarray((LEVELS * factor).astype(kind)).save(path)
    with pytest.raises(ValueError, match=f"^cannot read {path} .*{message}"):
        read_picture(str(path))


@pytest.mark.parametrize("mode", ["LA", "RGBA"])
@pytest.mark.parametrize("colour", [0, 90, 160, 255])
def test_what_is_transparent_gets_the_colour_that_the_digit_is_not(colour, mode, tmp_path):
    """A dark digit on nothing is read on white, a light one on black."""
    see_through(colour, mode).save(tmp_path / "x.png")
    got = read_picture(str(tmp_path / "x.png"))[0].numpy()
    ground = 255 if colour < 128 else 0
    assert (got[SHAPE] == colour).all() and (got[~SHAPE] == ground).all()


def test_transparent_colour_of_a_palette_is_seen(tmp_path):
    """A file may also say that one of its colours is transparent: here black, around white."""
    Image.fromarray(SHAPE.astype("uint8") * 255).convert("P").save(
        tmp_path / "x.png", transparency=255)
    got = read_picture(str(tmp_path / "x.png"))[0].numpy()
    assert (got[SHAPE] == 255).all() and (got[~SHAPE] == 0).all()


# The upper half is white: how a viewer turns it, by the number in the file (EXIF 0x112).
@pytest.mark.parametrize("number, white", [
    (1, "top"), (3, "bottom"), (4, "bottom"), (6, "right"), (8, "left")])
def test_photographs_are_turned_as_viewers_turn_them(number, white, tmp_path):
    """The camera notes how it was held; EXIF orientation 6, for example, is a quarter to the right.
    """
    picture = Image.new("L", (28, 28))
    picture.paste(255, (0, 0, 28, 14))
    note = Image.Exif()
    note[0x112] = number
    picture.save(tmp_path / "x.png", exif=note)
    got = read_picture(str(tmp_path / "x.png"))[0]
    halves = {"top": got[:14], "bottom": got[14:], "left": got[:, :14], "right": got[:, 14:]}
    assert (halves[white] == 255).all() and got.double().mean() == 127.5


@pytest.mark.parametrize("width, height", [(112, 56), (56, 112), (112, 28), (300, 100)])
@pytest.mark.parametrize("ground", [0, 200, 255])
def test_wide_and_tall_pictures_keep_their_shape(width, height, ground, tmp_path):
    """A square in the middle of a wide or tall picture is still a square, and what is added has the
    grey level of the picture's border.
    """
    side = min(width, height) // 2
    left = (width - side) // 2
    top = (height - side) // 2
    picture = Image.new("L", (width, height), ground)
    picture.paste(100, (left, top, left + side, top + side))
    picture.save(tmp_path / "x.png")
    got = read_picture(str(tmp_path / "x.png"))[0].int()
    inside = (got - ground).abs() > abs(100 - ground) / 2
    across = inside.any(dim=0).sum().item()
    down = inside.any(dim=1).sum().item()
    assert abs(across - down) <= 1 and abs(across - 28 * side / max(width, height)) <= 1
    edge = torch.cat([got[0], got[-1], got[:, 0], got[:, -1]])
    assert (edge == ground).all()


@pytest.mark.parametrize("ending", ["jpg", "jpeg", "png", "ppm", "bmp", "pgm", "tif", "webp"])
def test_broken_file_is_named(ending, tmp_path):
    """One file that was cut off, whatever its format, is named, with the reason."""
    for i in range(5):
        write_halves(tmp_path / "a" / f"{i}.{ending}", 10 * i)
    path = tmp_path / "a" / f"3.{ending}"
    for share in (0, 0.1, 0.5):
        Image.open(tmp_path / "a" / f"2.{ending}").save(path)
        whole = path.read_bytes()
        path.write_bytes(whole[:int(len(whole) * share)])
        with pytest.raises(ValueError, match=f"^cannot read {path} \\(.+\\)$") as error:
            for part in (True, False):
                load_images(tmp_path, part, "folder")
        assert "\n" not in str(error.value)


def test_published_mnist_is_known_by_its_checksums(tmp_path, monkeypatch):
    """Files with the published checksums are read without a word; of others, one line names those
    that differ. The checksums are those of MNIST's four files, unpacked.
    """
    assert sorted(train.CHECKSUMS) == [f"{split}-{kind}-ubyte" for split in ("t10k", "train")
                                       for kind in ("images-idx3", "labels-idx1")]
    write_mnist(tmp_path, pictures(5), torch.arange(5))
    sums = {path.name: hashlib.md5(path.read_bytes()).hexdigest()
            for path in (tmp_path / "MNIST" / "raw").iterdir()}
    note = train.note_on_files(tmp_path, "mnist")
    assert all(name in note for name in sums) and note.count("\n") == 1
    monkeypatch.setattr(train, "CHECKSUMS", sums)
    assert train.note_on_files(tmp_path, "mnist") == ""
    monkeypatch.setitem(sums, "train-images-idx3-ubyte", "0" * 32)
    note = train.note_on_files(tmp_path, "mnist")
    assert "train-images-idx3-ubyte" in note and "t10k" not in note and "labels" not in note
    assert train.note_on_files(tmp_path, "kmnist") == ""


@pytest.mark.parametrize("blank, refused", [(0, False), (1, False), (3, False), (4, True),
                                            (150, True)])
def test_many_blank_images_are_refused(blank, refused):
    """A file that was not copied to its end may have the right length and end in zeros. More than
    one image in a hundred of a single grey level, black or not, is too many.
    """
    images = pictures(300)
    images[len(images) - blank:] = 7
    if refused:
        with pytest.raises(ValueError, match=rf"^{blank} of the digits \(300\) are blank"):
            train.check_content(images, "the digits")
    else:
        train.check_content(images, "the digits")


def test_images_that_are_all_alike_are_refused():
    """From one image, seen again and again, there is nothing to learn. Two images may be alike."""
    images = pictures(1).repeat(24, 1, 1, 1)
    with pytest.raises(ValueError, match="^the digits are all alike"):
        train.check_content(images, "the digits")
    train.check_content(images[:2], "the digits")


@pytest.mark.parametrize("change, message", [
    (lambda images: from_uint8(images), "torch.uint8 (N, 1, H, H), not torch.float32"),
    (lambda images: images.int(), "must be a tensor of bytes"),
    (lambda images: images[:, 0], "not torch.uint8 (24, 8, 8)"),
    (lambda images: images.permute(0, 2, 3, 1), "not torch.uint8 (24, 8, 8, 1)")])
def test_images_that_are_given_must_be_bytes(change, message, tmp_path):
    """Images for train() are bytes in the shape (N, 1, H, H), in both parts. Floats in [-1, 1] are
    refused; they would be scaled once more.
    """
    good = pictures(24, size=8)
    for images in ((change(good), good), (good, change(good))):
        with pytest.raises(ValueError, match=f"^the images given .*{re.escape(message)}"):
            learn(small(tmp_path), images=images)
    with pytest.raises(ValueError, match="^training and held-out images differ in size$"):
        learn(small(tmp_path), images=(good, pictures(24, size=12)))
    assert not list(tmp_path.iterdir())


# ------------------------------------------------------------------------------ the built-in digits

def test_builtin_digits_are_as_many_as_in_mnist_and_none_is_in_both_parts():
    """60,000 digits of seed 0 to train on and 10,000 of seed 1 that are held out; no two of all are
    the same. The labels are the first numbers that are drawn with a seed.
    """
    different = set()
    for part, count, seed in ((True, 60_000, 0), (False, 10_000, 1)):
        images, labels = load_images("", part, "builtin")
        assert images.shape == (count, 1, 28, 28) and images.dtype == torch.uint8
        first = torch.randint(10, (count,), generator=torch.Generator().manual_seed(seed))
        assert torch.equal(labels, first) and labels.dtype == torch.int64
        different |= {image.tobytes() for image in images.numpy()}
    assert len(different) == 70_000


def test_builtin_digits_of_a_seed_are_the_same_everywhere():
    """The digits of seed 0 are known: on every machine, with every version of every library.

    Glyphs and labels are known to the bit. The pixels of a digit are sums of floats, which another
    processor may round differently, so that a pixel may differ by one level. Therefore each of six
    digits is compared by the mean grey level of its four quarters, to within a tenth of a level.
    Digits of another seed differ by more than ten times as much.
    """
    with Image.open(HERE / "pretrained" / "glyphs.png") as picture:
        glyphs = hashlib.sha256(picture.tobytes()).hexdigest()
    assert glyphs == "85ce6549cee3eb076c0e1261f387b4e95544c098623db159fb82b959b8cc4931"
    images, labels = builtin_digits(200, seed=0)
    assert hashlib.sha256(labels.numpy().tobytes()).hexdigest() == (
        "7b6545af666c8a3cca92e75172a137f83461185b934eee6625391af6be0d54b4")
    quarters = F.avg_pool2d(images[[0, 1, 2, 3, 198, 199]].double(), 14).reshape(6, 4)
    expected = [[67.8, 60.44, 50.13, 86.53], [52.95, 50.85, 51.73, 59.07],
                [31.82, 32.67, 24.52, 38.06], [60.31, 58.54, 58.94, 59.69],
                [12.74, 43.22, 41.88, 15.28], [34.36, 38.56, 36.97, 49.54]]
    assert (quarters - torch.tensor(expected)).abs().max() < 0.1


def test_builtin_digits_are_sized_and_centred_as_mnist():
    """White strokes on black, 20 pixels in the longer direction, centre of mass in the middle."""
    images, labels = builtin_digits(1000, seed=3)
    again, labels_again = builtin_digits(1000, seed=3)
    assert torch.equal(images, again) and torch.equal(labels, labels_again)
    assert not torch.equal(images, builtin_digits(1000, seed=4)[0])
    assert images.shape == (1000, 1, 28, 28) and images.dtype == torch.uint8
    assert set(labels.tolist()) == set(range(10)) and (torch.bincount(labels) > 60).all()

    # The edge is black and the strokes are white.
    edge = torch.cat([images[..., 0], images[..., -1], images[:, :, 0], images[:, :, -1]])
    assert (edge == 0).float().mean() > 0.99
    assert (images.amax((1, 2, 3)) > 150).all()

    # The centre of mass is less than 0.6 pixels from the middle, in both directions.
    ink = images[:, 0].double()
    axis = torch.arange(28, dtype=torch.float64) - 13.5
    for dim in (1, 2):
        centre = (ink.sum(3 - dim) @ axis) / ink.sum((1, 2))
        assert centre.abs().max() < 0.6

    # The longer side is 20 pixels.
    lit = images[:, 0] > 100
    sizes = torch.maximum(lit.any(1).sum(1), lit.any(2).sum(1))
    assert sizes.min() >= 17 and sizes.max() <= 22 and abs(sizes.double().mean() - 20) < 0.5


# ----------------------------------------------------------------------------------- the two parts

def test_images_are_split_as_the_options_say():
    """val_images=N holds out the last N training images instead of the test images; then images=M
    takes the first M of the rest. With labels, each image keeps its own; without, all are left out.
    """
    images, test_images = IMAGES
    names = torch.arange(56)  # a label that no other image has
    for options, expected, expected_held_out in (
            ({}, images, test_images),
            ({"images": 20}, images[:20], test_images),
            ({"images": 99}, images, test_images),
            ({"val_images": 10}, images[:22], images[22:]),
            ({"val_images": 10, "images": 9}, images[:9], images[22:])):
        pairs = ((images, names[:32]), (test_images, names[32:]))
        for labels, given in ((False, IMAGES), (False, pairs), (True, pairs)):
            training, held_out = split_images(small("", labels=labels, **options), given)
            assert torch.equal(training.images, expected)
            assert torch.equal(held_out.images, expected_held_out)
            for part in (training, held_out):
                if labels:
                    assert torch.equal(torch.cat(IMAGES)[part.labels], part.images)
                    assert len(part.labels.unique()) == len(part) == len(part.images)
                else:
                    assert part.labels is None


@FEW
@given(SEED, st.sampled_from([(28, 16), (28, 14), (28, 20), (8, 12), (12, 8), (10, 10)]))
def test_scaled_images_are_weighted_averages(seed, sizes):
    """Each pixel of the new image is an average of those around it in the old one, along each axis
    with weights that fall linearly to 0: over the width of one new pixel if the image shrinks, of
    one old pixel if it grows. A plain loop in float64 gives the same to half a grey level.
    """
    before, after = sizes
    images = pictures(3, size=before, seed=seed)
    matrix = torch.zeros(after, before, dtype=torch.float64)
    ratio = before / after
    for i in range(after):
        for j in range(before):
            away = abs((j + 0.5) - (i + 0.5) * ratio) / max(1, ratio)
            matrix[i, j] = max(0, 1 - away)
    matrix /= matrix.sum(dim=1, keepdim=True)
    expected = matrix @ images.double() @ matrix.T
    result = scaled(images, after)
    assert result.dtype == torch.uint8 and result.shape == (3, 1, after, after)
    assert (result - expected).abs().max() < 0.5 + 1e-3


@pytest.mark.parametrize("val_images", [0, 10])
def test_training_at_another_size(val_images, tmp_path):
    """With size=12 the network is made for images of 12x12 and held-out images are measured at that
    size. Both parts are scaled, their labels stay, and so do the images that were given.
    """
    given_images = tuple(part.clone() for part in IMAGES)
    config = small(tmp_path, size=12, epochs=1, val_images=val_images)
    training, held_out = split_images(config, given_images)
    expected = IMAGES
    if val_images:
        expected = IMAGES[0][:-val_images], IMAGES[0][-val_images:]
    for part, original in zip((training, held_out), expected):
        assert torch.equal(part.images, scaled(original, 12))
    told, _ = split_images(small("", size=12, labels=True, val_images=val_images), MARKED)
    assert torch.equal(told.labels, MARKED[0][1][:len(told)])

    history = learn(config, images=given_images, network=Plain)
    checkpoint = load_checkpoint(tmp_path / "model.pt", network=Plain)
    assert checkpoint.model.config["size"] == 12 and checkpoint.config.size == 12
    assert history["held_out"] == [evaluate(checkpoint.model, checkpoint.schedule, held_out.images)]
    assert all(torch.equal(a, b) for a, b in zip(given_images, IMAGES))


@pytest.mark.parametrize("options, held_out, count, message", [
    ({"batch_size": 33}, 24, 1, "32 images are too few for batches of 33; lower --batch-size"),
    ({"images": 7}, 24, 1, "7 images are too few for batches of 8; lower --batch-size"),
    ({"val_images": 40}, 24, 1, "--val-images 40 leaves none of 32 images to train on"),
    ({}, 0, 1, "no image is held out to measure the loss on; give --val-images"),
    ({}, 24, 3, "a batch of 8 cannot be shared equally by 3 processes")])
def test_images_that_do_not_fit_are_refused(options, held_out, count, message, monkeypatch):
    """The message blames one thing: too few images, none held out, or a batch that is no multiple
    of the number of processes.
    """
    processes(count, monkeypatch)
    with pytest.raises(ValueError, match=f"^{re.escape(message)}$"):
        split_images(small("", **options), (IMAGES[0], IMAGES[1][:held_out]))


def test_validation_images_are_kept_out_of_training(tmp_path):
    """A run with val_images=8 evaluates on the last 8 training images and trains on none of them.

    Those 8 are white squares, in which one pixel is a little darker, as images of a single grey
    level are refused. At low noise levels the network sees whether an image is one.
    """
    images = pictures(32, size=8)
    images[-8:] = 255
    images[-8:, :, 0, 0] = 254
    shown = []
    learn(small(tmp_path, epochs=1, val_images=8), images=(images, IMAGES[1]),
          network=noting(shown), draw_t=lambda count, T, generator: torch.ones(count).long())
    for training, count in ((True, 24), (False, 8)):
        seen = torch.cat([xt for mode, xt, _ in shown if mode == training])
        white = seen.amin(dim=(1, 2, 3)) > 0
        assert white.tolist() == [not training] * count


# ------------------------------------------------------------------------------- several processes

@pytest.mark.parametrize("count", [1, 2, 4])
def test_shares_of_all_processes_make_up_the_batch(count, monkeypatch):
    """Each image is in the share of one process, with its own t; all shares are equally large."""
    images = torch.arange(8) * 10
    t = torch.arange(8)
    shares = []
    for rank in range(count):
        processes(count, monkeypatch, rank)
        share, share_t, nothing = own_share(images, t, None)  # labels that there are not
        assert torch.equal(share, 10 * share_t) and len(share) == 8 // count and nothing is None
        shares += share_t.tolist()
    assert sorted(shares) == list(range(8))


@pytest.mark.parametrize("own, others, expected", [
    (False, 0, False), (True, 0, True), (False, 1, True), (True, 1, True)])
def test_if_one_process_must_stop_all_do(own, others, expected, monkeypatch):
    """told_to_stop is true if after_step says so here, or in any other process."""
    processes(2, monkeypatch)
    monkeypatch.setattr(torch.distributed, "all_reduce", lambda stop: stop.add_(others))
    assert told_to_stop(None, lambda run: own) is expected
    assert told_to_stop(None, None) is (others > 0)


# ----------------------------------------------------------------------------------------- options

def test_limits_of_the_options_leave_room():
    """MNIST whole, with its usual 5,000 held out, long runs, and no clipping are allowed."""
    config = Config(images=60_000, val_images=5_000, epochs=1_000, batch_size=60_000, T=4_000,
                    lr=1, warmup=1, ema=0.9999, clip=math.inf, seed=2**63 - 1)
    assert config.images == 60_000


@pytest.mark.parametrize("name, last, beyond", [
    ("epochs", 10**6, 10**6 + 1), ("batch_size", 10**6, 10**6 + 1), ("T", 10**6, 10**6 + 1),
    ("lr", 1, 1.001), ("lr", 1e-9, 0.999e-9), ("clip", 1e-9, 0.999e-9), ("warmup", 1, 1.001),
    ("ema", 0.999999, 0.9999999), ("images", 10**9, 10**9 + 1), ("val_images", 10**6, 10**6 + 1),
    ("seed", 2**63 - 1, 2**63)])
def test_last_value_of_an_option_is_allowed_and_the_next_is_not(name, last, beyond):
    """The limits of an option belong to its range, and a value beyond them is refused."""
    assert getattr(Config(**{name: last}), name) == last
    with pytest.raises(ValueError, match=f"{name} must be between"):
        Config(**{name: beyond})


# --------------------------------------------------------------------------- the parts of a step

@given(st.integers(1, 300), st.integers(2, 2000), SEED)
def test_draws_of_t_have_one_in_each_stratum(count, T, seed):
    """Sorted, the k-th draw lies in the k-th of `count` equal parts of 1..T."""
    t = draw_t(count, T, torch.Generator().manual_seed(seed)).sort().values
    assert t.dtype == torch.int64 and t.min() >= 1 and t.max() <= T
    for k in range(count):
        # u T with u in [k/count, (k+1)/count) has integer part floor(k T/count) .. ceil(...) - 1.
        assert k * T // count + 1 <= t[k] <= -(-(k + 1) * T // count)


def test_greatest_draw_of_t_is_T(monkeypatch):
    """The greatest number below 1 that a generator can give is rounded up to 1 by the sum with the
    stratum. The draw is T, not T + 1, which no schedule has.
    """
    monkeypatch.setattr(torch, "rand", lambda *shape, **kinds: torch.full(
        shape[0] if isinstance(shape[0], tuple) else shape, 1 - 2**-53, dtype=torch.float64))
    t = draw_t(128, 1000, torch.Generator().manual_seed(0))
    assert t.max() == 1000 and t.min() >= 1


def test_draws_of_t_are_uniform_for_every_image():
    """The t of one place in the batch is uniform on 1..T: chi-square over 50 bins, 20,000 batches.

    With 49 degrees of freedom a value above 120 has probability 7e-8; two places make 1.4e-7. It
    notices, with 99.9 %, one bin that is 62 % too full, or a ripple of 8.8 % (its root mean square)
    over all. The first and the last t must occur at all.
    """
    generator = torch.Generator().manual_seed(0)
    draws = torch.stack([draw_t(8, 100, generator) for _ in range(20_000)])
    for place in (0, 7):
        counts = torch.bincount((draws[:, place] - 1) // 2, minlength=50).double()
        assert ((counts - 400) ** 2 / 400).sum() < 120
    assert set(draws.flatten().tolist()) == set(range(1, 101))


def test_draws_of_t_are_independent_of_the_place_in_the_batch():
    """Each of 8 strata is dealt to each of 8 places equally often: chi-square, 16,000 batches.

    A batch deals a permutation, so the cells of a table of N batches are not independent: they vary
    by N/7 instead of N/8 on the 49 directions that fixed sums of rows and columns leave. Scaled by
    7/8 the statistic is chi-square, above 120 with probability 7e-8. Sorted draws would tie small t
    to the first images and make it 784,000.
    """
    generator = torch.Generator().manual_seed(1)
    table = torch.zeros(8, 8, dtype=torch.float64)
    for _ in range(16_000):
        stratum = (draw_t(8, 800, generator) - 1) // 100
        table[torch.arange(8), stratum] += 1
    assert (table.sum(0) == 16_000).all()
    assert 7 / 8 * ((table - 2000) ** 2 / 2000).sum() < 120


def test_draws_of_t_within_their_strata_are_independent():
    """The places of two draws within their strata are uncorrelated: 16,000 pairs.

    The correlation has a standard error of 1/sqrt(16,000); 5.5 of them have probability 4e-8. One
    common offset for all strata would make it 1.
    """
    generator = torch.Generator().manual_seed(2)
    draws = torch.stack([draw_t(2, 2000, generator).sort().values for _ in range(16_000)])
    assert abs(torch.corrcoef(draws.T.double())[0, 1].item()) < 5.5 / math.sqrt(16_000)


@given(st.integers(1, 500), st.floats(0, 1))
def test_learning_rate_rises_then_falls(steps, warmup):
    """A straight rise to lr over the given share of the steps, then a straight fall to 0.

    Step i of n rising ones has lr (i+1)/n; a share f of the way down it is lr (1 - f).
    """
    config = Config(lr=0.5, warmup=warmup)
    rates = [learning_rate(i, steps, config) for i in range(steps)]
    rising = max(1, round(warmup * steps))
    for i, rate in enumerate(rates):
        way = max(0, i - rising) / max(1, steps - rising)
        expected = 0.5 * (i + 1) / rising if i < rising else 0.5 * (1 - way)
        assert abs(rate - expected) < 1e-12 and rate > 0
    top = rising - 1
    assert all(a < b for a, b in zip(rates[:top], rates[1:top + 1]))
    # After the step of the peak, which may come twice, the rate only falls.
    assert all(a > b for a, b in zip(rates[top + 1:], rates[top + 2:]))
    if warmup < 0.5 and steps >= 100:
        assert rates[-1] < 0.0101  # one step of the 50 or more that fall is left


@given(st.lists(st.floats(-1, 1), min_size=1, max_size=40), st.floats(0, 0.9999))
def test_average_equals_its_closed_form(weights, decay):
    """mean_n = sum_i w_i (1 - d_i) d_{i+1} ... d_n + start d_0 ... d_n, d_i = min(d, (1+i)/(10+i)).

    So the shares of all weights and the start sum to 1, and a constant is a fixed point.
    """
    with torch.random.fork_rng(devices=[]):
        model = torch.nn.Linear(1, 1, bias=False).double()
        average = torch.nn.Linear(1, 1, bias=False).double()
    start = 0.25
    torch.nn.init.constant_(average.weight, start)
    expected = start
    shares = [1.0]
    for step, weight in enumerate(weights):
        torch.nn.init.constant_(model.weight, weight)
        update_average(average, model, step, decay)
        d = min(decay, (1 + step) / (10 + step))
        shares = [share * d for share in shares] + [1 - d]
        expected = sum(share * w for share, w in zip(shares, [start, *weights]))
        assert abs(average.weight.item() - expected) < 1e-12
    assert abs(sum(shares) - 1) < 1e-12
    torch.nn.init.constant_(model.weight, expected)
    update_average(average, model, len(weights), decay)
    assert abs(average.weight.item() - expected) < 1e-12


# ------------------------------------------------------------------------------------ evaluation

class Guess(torch.nn.Module):
    """A stand-in for the network: half of x_t, plus t/1000, plus a tenth of the label if there is
    one. It remembers the t that it was shown.
    """

    def __init__(self):
        super().__init__()
        self.weight = torch.nn.Parameter(torch.tensor(0.5))
        self.seen = []

    def forward(self, xt, t, label=None):
        assert not self.training
        self.seen += t.tolist()
        told = 0 if label is None else label.reshape(-1, 1, 1, 1) / 10
        return self.weight * xt + t.reshape(-1, 1, 1, 1) / 1000 + told


@pytest.mark.parametrize("batch_size", [7, 500])
@pytest.mark.parametrize("told", [False, True])
def test_evaluate_equals_a_plain_loop(batch_size, told):
    """Image i at t = 1 + i mod T, eps one randn from a generator seeded 0. [DDPM Eq. 14] If labels
    are told, each image is seen with its own.
    """
    schedule = NoiseSchedule(50, "cosine")
    images = pictures(60, size=8)
    model = Guess().train()
    labels = torch.arange(60) * 7 % 10
    loss = evaluate(model, schedule, images, batch_size, labels if told else None)

    eps = torch.randn(60, 1, 8, 8, generator=torch.Generator().manual_seed(0)).double()
    total = 0.0
    for i in range(60):
        t = 1 + i % 50
        alpha_bar = math.prod(1 - b for b in schedule.beta[1:t + 1].tolist())
        x0 = images[i].double() / 127.5 - 1
        xt = math.sqrt(alpha_bar) * x0 + math.sqrt(1 - alpha_bar) * eps[i]
        answer = xt / 2 + t / 1000 + (7 * i % 10 / 10 if told else 0)
        total += (eps[i] - answer).square().mean().item() / 60
    assert abs(loss - total) < 1e-6
    assert model.seen == [1 + i % 50 for i in range(60)]
    assert model.training  # left as it was found


def test_evaluation_shows_every_t_equally_often():
    """t = 1 + i mod T: with N = 3 T images each of 1..T is seen three times."""
    model = Guess()
    evaluate(model, NoiseSchedule(20, "cosine"), pictures(60, size=8), batch_size=7)
    assert Counter(model.seen) == {t: 3 for t in range(1, 21)}


# ------------------------------------------------------------------------------------- whole runs

def test_run_learns_the_training_images_and_is_held_to_the_test_images(tmp_path):
    """MNIST's two parts, 24 and 8 images: three steps of 8, and the loss that evaluate() finds for
    the other 8. The seconds are those that passed.
    """
    begun = time.perf_counter()
    test_images = pictures(8, size=8, seed=1)
    write_mnist(tmp_path, pictures(24, size=8), torch.zeros(24))
    write_mnist(tmp_path, test_images, torch.zeros(8), splits=("t10k",))
    history = learn(small(tmp_path / "run", data=str(tmp_path), epochs=2), images=None)
    assert len(history["step_loss"]) == 6
    saved = load_checkpoint(tmp_path / "run" / "model.pt")
    held_out_loss = evaluate(saved.model, saved.schedule, test_images)
    assert math.isclose(history["held_out"][1], held_out_loss, rel_tol=1e-6)
    assert min(history["seconds"]) > 0
    assert sum(history["seconds"]) < time.perf_counter() - begun


def test_loss_falls(tmp_path):
    """200 steps on generated pictures bring the training loss from 1 to below 0.1.

    The best rescaling of x_t alone, without looking at neighbours, cannot get below 0.27 on MNIST,
    and these pictures are no easier for it.
    """
    def larger(**sizes):
        return little(channels=(16, 24), embedding=16, time_hidden=16, time_width=8, **sizes)

    history = learn(small(tmp_path, epochs=5, batch_size=32, lr=5e-3), network=larger,
                    images=(pictures(1280, 8), IMAGES[1]))
    assert abs(history["step_loss"][0] - 1) < 0.1
    assert history["loss"][-1] < 0.1 and history["held_out"][-1] < 0.3
    assert len(history["step_loss"]) == 200 and len(history["seconds"]) == 5


def test_steps_are_those_of_the_algorithm(tmp_path):
    """Two epochs equal a plain loop: draw x_0, t, eps; descend on |eps - eps_hat|^2.

    [DDPM Algorithm 1] The loop writes out the order of the images, the noisy image, the mean of the
    squares [DDPM Eq. 14], the learning rate and the moving average, in float64. Adam and the
    clipping of the gradient are torch's own, in float64, too. Some steps are clipped and some are
    not. The code under test is in float32. Where a gradient is 0 but for rounding, Adam may move a
    weight by the full learning rate either way; so weights are compared by their median difference,
    against 0.1 % of the sum of all learning rates.
    """
    config = small(tmp_path, epochs=2, batch_size=8, clip=3.31, seed=5, T=50, schedule="cosine",
                   ema=0.2)  # which is reached within these steps
    images = pictures(26, size=8, seed=3)  # three batches, and two images that are left over
    learn(config, images=(images, IMAGES[1]), network=UNet)
    got = load_checkpoint(tmp_path / "model.pt")

    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(config.seed)
        model = UNet(size=8).double()
    average = {name: p.detach().clone() for name, p in model.named_parameters()}
    adam = torch.optim.Adam(model.parameters(), betas=(0.9, 0.99), foreach=False, fused=False)
    f = [math.cos((k / 50 + 0.008) / 1.008 * math.pi / 2)**2 for k in range(51)]
    betas = torch.tensor([min(1 - b / a, 0.999) for a, b in zip(f, f[1:])], dtype=torch.float64)
    generator = torch.Generator().manual_seed(config.seed)
    norms = []
    rates = []
    for step in range(6):
        if step % 3 == 0:
            order = torch.randperm(26, generator=generator)
        x0 = images[order[8 * (step % 3):8 * (step % 3) + 8]].double() / 127.5 - 1
        t = draw_t(8, 50, generator)
        eps = torch.randn(8, 1, 8, 8, generator=generator).double()
        alpha_bar = torch.stack([torch.prod(1 - betas[:k]) for k in t]).reshape(8, 1, 1, 1)
        eps_hat = model(alpha_bar.sqrt() * x0 + (1 - alpha_bar).sqrt() * eps, t)
        loss = ((eps - eps_hat) ** 2).sum() / eps.numel()
        assert abs(got.history["step_loss"][step] - loss.item()) < 1e-5

        adam.zero_grad()
        loss.backward()
        norms.append(torch.nn.utils.clip_grad_norm_(model.parameters(), config.clip).item())
        rates.append(1e-3 * min(1, (6 - step) / 5))  # one step of rise, five of fall
        adam.param_groups[0]["lr"] = rates[-1]
        adam.step()
        d = min(0.2, (1 + step) / (10 + step))
        for name, p in model.named_parameters():
            average[name] = d * average[name] + (1 - d) * p.detach()

    assert min(norms) < config.clip < max(norms)
    for name, p in got.model.named_parameters():
        assert (p - average[name]).abs().median() < 1e-3 * sum(rates)
    for epoch in range(2):
        mean = sum(got.history["step_loss"][3 * epoch:3 * epoch + 3]) / 3
        assert abs(got.history["loss"][epoch] - mean) < 1e-12
    assert got.history["held_out"][-1] == evaluate(got.model, got.schedule, IMAGES[1])


def check_resumed_run(stops: list[int], folder, labels: bool = False) -> None:
    """Stop a run after each of these steps, resume it, and compare it with one left alone."""
    def go(name: str, **arguments) -> dict[str, list[float]]:
        return learn(small(folder / name, labels=labels), **arguments,
                     images=MARKED if labels else IMAGES)

    whole = go("whole")
    parts = go("parts", after_step=stop_after(*stops))
    for count in stops:
        assert len(parts["step_loss"]) == count and len(parts["loss"]) == count // 4
        parts = go("parts", resume=True, after_step=stop_after(*stops))
    assert ("held_out_untold" in whole) == labels
    for name in whole.keys() - {"seconds"}:
        assert whole[name] == parts[name]
    assert same_state(folder / "whole" / "last.pt", folder / "parts" / "last.pt")


@pytest.mark.parametrize("stops", [[1], [4], [7, 11]])
@pytest.mark.parametrize("labels", [False, True])
def test_resumed_run_equals_unbroken_run_bit_for_bit(stops, labels, tmp_path):
    """A run that is stopped after any steps, also within an epoch of four steps, and resumed, ends
    as if it had not been stopped, with labels and without.

    Weights, average, Adam's moments, generator, order of the images and history are the same, bit
    for bit on one machine with one number of threads; elsewhere sums are rounded differently.
    """
    check_resumed_run(stops, tmp_path, labels)


@pytest.mark.slow
@pytest.mark.parametrize("stops", [*([step] for step in range(1, 13)), [6, 7, 8],
                                   list(range(1, 12)), list(range(1, 13))])
def test_run_can_be_stopped_after_every_step(stops, tmp_path):
    """The same law for a stop after each of the twelve steps, and after all of them in turn."""
    check_resumed_run(stops, tmp_path)


def test_killed_run_goes_on_from_its_last_file(tmp_path):
    """Killed in epoch 2, without a chance to save: epoch 2 begins anew and ends as if unbroken."""
    whole = learn(small(tmp_path / "whole"))

    class Killed(Exception):
        pass

    def kill(run):
        if run.step == 7:
            raise Killed

    with pytest.raises(Killed):
        learn(small(tmp_path / "parts"), after_step=kill)
    parts = learn(small(tmp_path / "parts"), resume=True)
    assert whole["step_loss"] == parts["step_loss"]
    assert same_state(tmp_path / "whole" / "last.pt", tmp_path / "parts" / "last.pt")


# ------------------------------------------------------------------------------ training longer

def without_plan(path):
    """Write a model file anew without its options and plans; its path."""
    state = torch.load(path, weights_only=True)
    del state["config"], state["history"]["plans"]
    torch.save(state, path)
    return path


@pytest.mark.parametrize("old, new, change", [
    ({"epochs": 3}, {"epochs": 6}, 12),  # which is finished
    ({"epochs": 3}, {"epochs": 6}, 7),
    ({"epochs": 6}, {"epochs": 3}, 7),
    ({"epochs": 3}, {"lr": 5e-4}, 6),
    ({"epochs": 2}, {"epochs": 5, "lr": 2e-3}, 1)])
def test_resumed_run_follows_a_new_plan_from_there_on(old, new, change, tmp_path):
    """Resumed with other epochs, or another lr, a run takes its further steps with the learning
    rate that a run of the new plan has at these steps; nothing else is different.

    The learning rate is written out: warm-up is one step long in all these runs, so step i of S has
    lr (S - i)/(S - 1), and at most lr. It never rises after the first step of the new plan. A run
    with this learning rate, never stopped, ends with the same bits.
    """
    options = [{"epochs": 3, "lr": 1e-3} | old, {"epochs": 3, "lr": 1e-3} | old | new]
    rates = []

    def by_hand(step, steps, config):
        plan = options[0] if step < change else options[1]
        S = 4 * plan["epochs"]
        rates.append(plan["lr"] * min(1, (S - step) / (S - 1)))
        return rates[-1]

    whole = learn(small(tmp_path / "whole", **options[1]), learning_rate=by_hand)
    learn(small(tmp_path / "parts", **options[0]), after_step=stop_after(change))
    parts = learn(small(tmp_path / "parts", **options[1]), resume=True)
    assert len(rates) == 4 * options[1]["epochs"] and rates[change:] == sorted(rates[change:])[::-1]
    for name in ("loss", "held_out", "step_loss"):
        assert whole[name] == parts[name]

    # The files know both plans, and that the second is now that of the run.
    plans = [{"step": step, "steps": 4 * plan["epochs"], **plan}
             for step, plan in zip((0, change), options)]
    for name in ("model.pt", "last.pt"):
        saved = load_checkpoint(tmp_path / "parts" / name)
        assert saved.history["plans"] == parts["plans"] == plans
        assert (saved.config.epochs, saved.config.lr) == (plans[1]["epochs"], plans[1]["lr"])
    for epoch in range(1, options[1]["epochs"] + 1):
        assert (tmp_path / "parts" / f"epoch-{epoch}.pt").exists()
    assert same_state(without_plan(tmp_path / "whole" / "last.pt"),
                      without_plan(tmp_path / "parts" / "last.pt"))


def test_new_plan_is_saved_after_its_first_step(tmp_path):
    """Killed after the first step of a new plan, in the middle of an epoch, a run goes on with that
    plan, although --resume does not name it again.
    """
    class Killed(Exception):
        pass

    def kill(run):
        if run.step == 7:
            raise Killed

    learn(small(tmp_path), network=Plain, after_step=stop_after(5))
    with pytest.raises(Killed):
        learn(small(tmp_path, epochs=6), network=Plain, resume=True, after_step=kill)
    saved = load_checkpoint(tmp_path / "last.pt", network=Plain)
    assert saved.config.epochs == 6 and len(saved.history["step_loss"]) == 6
    assert [plan["step"] for plan in saved.history["plans"]] == [0, 5]


@pytest.mark.parametrize("epochs", [3, 6])
def test_run_without_plans_goes_on(epochs, tmp_path):
    """The model files of earlier versions hold no plans. Such a run ends with the same bits as one
    that holds its first plan, with the same number of epochs and with another.
    """
    for name in ("old", "new"):
        learn(small(tmp_path / name), after_step=stop_after(7))
    for name in ("model.pt", "last.pt"):
        path = tmp_path / "old" / name
        state = torch.load(path, weights_only=True)
        del state["history"]["plans"]
        save(path, state)
        load_checkpoint(path)
    for name in ("old", "new"):
        learn(small(tmp_path / name, epochs=epochs), resume=True)
    assert same_state(tmp_path / "old" / "last.pt", tmp_path / "new" / "last.pt")


@pytest.mark.parametrize("plans, early", [
    ([(3, 12), (6, 24)], 2),            # written after 2 of 12 steps; 3 of 24 come too late
    ([(15, 9), (30, 20)], 8),           # written after 8 of 60 steps
    ([(15, 8), (30, 20)], 8),           # and even then in the last step of the old plan
    ([(15, 7), (30, 20)], 16),          # not yet written: after 16 of 120 steps
    ([(15, 7), (6, 20)], 8),            # 3 of 24 steps have passed: at once
    ([(15, 7), (30, 10), (15, 20)], 11)])
def test_early_state_stays_and_follows_a_new_plan_only_until_it_is_written(plans, early, tmp_path):
    """early.pt is written once: if it is there when the plan changes, it stays, and otherwise it is
    that of two fifteenths of the new plan, or of its first step if that is later. Each pair is the
    epochs that are planned, of four steps, and the step after which the run is stopped.
    """
    written = set()
    for number, (epochs, stop) in enumerate(plans):
        learn(small(tmp_path, epochs=epochs), network=Plain, resume=number > 0,
              after_step=stop_after(stop))
        if (tmp_path / "early.pt").exists():
            written.add((tmp_path / "early.pt").stat().st_mtime_ns)
    file = torch.load(tmp_path / "early.pt", weights_only=True)
    assert len(file["history"]["step_loss"]) == early and len(written) == 1


def test_fewer_epochs_than_are_done_are_refused(tmp_path):
    """A run in its third epoch cannot become one of two. As many as are done are finished. Nothing
    is written in either case.
    """
    learn(small(tmp_path, epochs=6), network=Plain, after_step=stop_after(9))
    written = files(tmp_path)
    message = f"^the run in {tmp_path} has already come to epoch 3; --epochs must be at least 3$"
    for epochs in (1, 2):
        with pytest.raises(ValueError, match=message):
            learn(small(tmp_path, epochs=epochs), network=Plain, resume=True)
    assert files(tmp_path) == written

    learn(small(tmp_path, epochs=6), network=Plain, resume=True, after_step=stop_after(12))
    written = files(tmp_path)
    history = learn(small(tmp_path, epochs=3), network=Plain, resume=True)
    assert len(history["loss"]) == 3 and len(history["plans"]) == 1
    assert files(tmp_path) == written


@pytest.mark.parametrize("poisoned, noticed, kept", [(3, 9, 1), (10, 20, 9), (31, 40, 9)])
def test_divergence_is_noticed_within_twenty_steps(poisoned, noticed, kept, tmp_path):
    """A loss that turns to nan in the middle of a long epoch stops the run at the next look.

    The losses of 64 steps are looked at after the first one, after the ninth, when early.pt is
    written, and after every twentieth. So all files are left as they were after the first step or
    after the ninth, the last time that they were written.
    """
    seen = []

    def poison(run):
        seen.append(run.step)
        if run.step == poisoned:
            torch.nn.init.constant_(run.model.stem.bias, math.nan)

    with pytest.raises(FloatingPointError, match=f"finite in epoch 1, step {noticed};"):
        learn(small(tmp_path, epochs=1, batch_size=2), after_step=poison,
              images=(pictures(128, 8), IMAGES[1]))
    assert seen == list(range(1, noticed + 1))
    assert (tmp_path / "early.pt").exists() == (kept == 9)
    for path in tmp_path.iterdir():
        saved = load_checkpoint(path, network=little)
        assert len(saved.history["step_loss"]) == kept
        assert all(w.isfinite().all() for w in saved.state["average"].values())
    last = load_checkpoint(tmp_path / "last.pt", network=little)
    assert all(w.isfinite().all() for w in last.state["weights"].values())


@pytest.mark.parametrize("poisoned, where, kept", [
    (2, "epoch 1, step 2", 1),  # of 12 steps, early.pt is written after 2
    (7, "epoch 2, step 3", 4),  # the run is told to stop after this one
    (8, "epoch 2, step 4", 4)])
def test_average_that_is_not_finite_is_noticed_before_it_is_saved(poisoned, where, kept, tmp_path):
    """The losses may be finite and the averaged weights are not: nothing is saved, neither in the
    middle of an epoch nor at its end, where it is the held-out loss that is not finite."""
    def poison(run):
        if run.step == poisoned:
            torch.nn.init.constant_(run.average.stem.bias, math.nan)
        return run.step == poisoned == 7

    with pytest.raises(FloatingPointError, match=f"finite in {where};"):
        learn(small(tmp_path), after_step=poison)
    for name in ("model.pt", "last.pt"):
        saved = load_checkpoint(tmp_path / name, network=little)
        assert len(saved.history["step_loss"]) == kept
        assert saved.model.stem.bias.isfinite().all()
    assert (tmp_path / "early.pt").exists() == (kept == 4)


def test_same_seed_same_run_other_seed_other_run(tmp_path):
    """A run is decided by its options."""
    losses = []
    for i, seed in enumerate((5, 5, 6)):
        history = learn(small(tmp_path / str(i), epochs=1, seed=seed))
        losses.append(history["step_loss"])
    assert losses[0] == losses[1] != losses[2]


def test_existing_run_is_not_overwritten(tmp_path, tiny_run):
    """A new run into the folder of another is refused; so is resuming with another option."""
    for folder, file in ((tmp_path / "a", "last.pt"), (tmp_path / "b", "model.pt")):
        folder.mkdir()
        (folder / file).write_bytes((tiny_run / file).read_bytes())  # one of the two is enough
        with pytest.raises(ValueError, match=f"--resume --out {folder}"):
            learn(small(folder))
        assert [path.name for path in folder.iterdir()] == [file]
    with pytest.raises(ValueError, match="has T = 20, not 1000"):
        learn(Config(epochs=1, batch_size=8, schedule="cosine", out=str(tiny_run),
                           device="cpu"), resume=True)
    with pytest.raises(OSError, match="no model file"):
        learn(small(tmp_path), resume=True)


def test_older_run_goes_on_at_its_own_size_alone(tmp_path):
    """A run from before there were labels and sizes goes on as if it had been told none; at another
    size it would be another run, and is refused.
    """
    learn(small(tmp_path / "old"), after_step=lambda run: run.step == 2)
    state = torch.load(tmp_path / "old" / "last.pt", weights_only=True)
    for name in ("labels", "size"):
        del state["config"][name]
    torch.save(state, tmp_path / "old" / "last.pt")
    with pytest.raises(ValueError, match="has size = 0, not 12"):
        learn(small(tmp_path / "old", size=12), resume=True)
    history = learn(small(tmp_path / "old"), resume=True)
    assert history["step_loss"] == learn(small(tmp_path / "new"))["step_loss"]


def test_resuming_with_other_images_is_refused(tmp_path):
    """A run stopped in the middle of an epoch has its order of the images; another number of them
    would not fit it. Nothing is written.
    """
    learn(small(tmp_path), after_step=stop_after(1))
    written = files(tmp_path)
    for images in (pictures(16, size=8), pictures(64, size=8)):
        with pytest.raises(ValueError, match=f"had 32 images, not {len(images)}"):
            learn(small(tmp_path), resume=True, images=(images, IMAGES[1]))
    assert files(tmp_path) == written


def test_diverged_run_keeps_the_last_good_files(tmp_path):
    """A loss that is not finite stops the run, names epoch and step, and saves nothing."""
    learn(small(tmp_path, epochs=1))
    state = load_checkpoint(tmp_path / "last.pt").state
    state["config"]["epochs"] = 2
    state["weights"]["stem.bias"].fill_(math.nan)
    save(tmp_path / "last.pt", state)
    written = files(tmp_path)
    with pytest.raises(FloatingPointError, match="finite in epoch 2, step 4"):
        learn(small(tmp_path, epochs=2), resume=True)
    assert files(tmp_path) == written


# ---------------------------------------------------------------------------- a run as an object

def advance(run: Run, steps: int) -> None:
    """Take steps as the loop of train() does, but write no files."""
    for _ in range(steps):
        batch = next_batch(run, Examples(IMAGES[0]))
        run.record(training_step(run, from_uint8(batch.images)))
        run.read_losses()
        if run.epoch_is_complete:
            run.finish_epoch(Examples(IMAGES[1]))


def without_seconds(state: dict) -> dict:
    """A copy of what Run.state_dict() returned, but for the options and the times."""
    state = {name: value for name, value in state.items() if name not in ("config", "seconds")}
    state["history"] = {k: v for k, v in state["history"].items() if k != "seconds"}
    return copy.deepcopy(state)


@pytest.mark.parametrize("finished", [1, 4, 6])
def test_state_of_a_run_is_all_that_it_needs(finished):
    """A run of another seed that takes over the state of a run goes on as that one does, bit for
    bit, from the middle of an epoch as from its end.
    """
    original = Run(small("", seed=5), NoiseSchedule(), 32, {"size": 8})
    advance(original, finished)
    state = copy.deepcopy(original.state_dict())
    copied = Run(small("", seed=6), NoiseSchedule(), 32, {"size": 8})
    copied.load_state_dict(state)
    assert copied.step == finished
    for run in (original, copied):
        advance(run, 5)
        assert run.step == finished + 5
    assert original.history["step_loss"] == copied.history["step_loss"]

    leaves, structure = tree_flatten(without_seconds(original.state_dict()))
    other_leaves, other_structure = tree_flatten(without_seconds(copied.state_dict()))
    assert structure == other_structure and len(leaves) > 100
    for a, b in zip(leaves, other_leaves):
        assert torch.equal(a, b) if isinstance(a, torch.Tensor) else a == b


def test_state_of_a_run_is_not_that_of_another():
    """The test above can fail: a run of another seed goes another way if it takes no state over."""
    losses = []
    for seed in (5, 6):
        run = Run(small("", seed=seed), NoiseSchedule(), 32, {"size": 8})
        advance(run, 2)
        losses.append(run.history["step_loss"])
    assert losses[0][0] != losses[1][0] and losses[0][1] != losses[1][1]


def test_state_of_a_run_can_be_taken_after_any_step(tmp_path):
    """state_dict() in after_step holds all losses up to that step, whether or not the loop has read
    them yet: loaded into a fresh run, state k is that of k finished steps. Reading the losses once
    more changes nothing.
    """
    states = []

    def take(run):
        states.append(copy.deepcopy(run.state_dict()))
        run.read_losses()

    history = learn(small(tmp_path), network=Plain, after_step=take)
    for k, state in enumerate(states, start=1):
        run = Run(small(tmp_path), NoiseSchedule(), 32, {"size": 8}, Plain)
        run.load_state_dict(state)
        assert run.step == k and run.history["step_loss"] == history["step_loss"][:k]


def test_average_takes_over_what_a_layer_counts():
    """Buffers, such as the running mean of a BatchNorm, are copied, not averaged."""
    model = torch.nn.BatchNorm1d(3)
    average = copy.deepcopy(model)
    model(torch.arange(12.0).reshape(4, 3))
    update_average(average, model, step=5, decay=0.999)
    for (name, kept), (_, current) in zip(average.named_buffers(), model.named_buffers()):
        assert torch.equal(kept, current), name
    assert average.num_batches_tracked == 1


# -------------------------------------------------------------------------------------- the seams

def test_caller_looks_in_after_every_step(tmp_path):
    """after_step is called with the run once for each step, whose number is run.step. Answers that
    are not true let the run go on, and nothing that it computes is changed by the looking.
    """
    steps = []

    def look(run):
        assert isinstance(run, Run) and run.model.training
        steps.append(run.step)
        return [None, False, 0, []][run.step % 4]

    watched = learn(small(tmp_path / "a"), after_step=look)
    alone = learn(small(tmp_path / "b"))
    assert steps == list(range(1, 13))
    assert watched["step_loss"] == alone["step_loss"]
    assert same_state(tmp_path / "a" / "last.pt", tmp_path / "b" / "last.pt")


def test_run_stops_and_is_saved_if_the_caller_says_so(tmp_path):
    """A true answer ends the run after this step, which is saved; the next is not begun."""
    steps = []

    def stop(run):
        steps.append(run.step)
        return run.step == 6

    history = learn(small(tmp_path), after_step=stop)
    assert steps == [1, 2, 3, 4, 5, 6] and len(history["step_loss"]) == 6
    assert load_checkpoint(tmp_path / "last.pt").history["step_loss"] == history["step_loss"]
    assert load_checkpoint(tmp_path / "model.pt").history["step_loss"] == history["step_loss"]
    learn(small(tmp_path), resume=True, after_step=stop)
    assert steps == list(range(1, 13))


def test_any_network_can_be_trained(tmp_path):
    """A network that is no UNet learns, is read from its file if it is named again, and resumes bit
    for bit. Without its name the file is refused in one line.
    """
    options = {"epochs": 6, "lr": 0.02}
    history = learn(small(tmp_path / "whole", **options), network=Plain)
    assert history["loss"][-1] < 0.8 * history["loss"][0]
    learn(small(tmp_path / "parts", **options), network=Plain, after_step=stop_after(7))
    learn(small(tmp_path / "parts", **options), network=Plain, resume=True)
    assert same_state(tmp_path / "whole" / "last.pt", tmp_path / "parts" / "last.pt")

    saved = load_checkpoint(tmp_path / "whole" / "model.pt", network=Plain)
    assert isinstance(saved.model, Plain) and saved.model.config == {"size": 8, "width": 4}
    assert evaluate(saved.model, saved.schedule, IMAGES[1]) == history["held_out"][-1]
    with pytest.raises(ValueError, match="no model file of ours"):
        load_checkpoint(tmp_path / "whole" / "model.pt")


def test_resumed_network_is_built_with_the_sizes_of_the_saved_one(tmp_path):
    """network(size=8) begins a run on images of 8x8 pixels, network(**model.config) resumes it."""
    sizes = []

    def build(**given):
        sizes.append(given)
        return Plain(**given | {"width": 6})

    learn(small(tmp_path), network=build, after_step=stop_after(1))
    assert sizes == [{"size": 8}]
    sizes.clear()
    learn(small(tmp_path), resume=True, network=build)
    assert sizes == [{"size": 8, "width": 6}] * 2  # to read the file, and for the run


def test_network_is_made_for_the_size_of_the_images(tmp_path):
    """Trained on 8x8 pictures, the UNet has learned images of 4x4 and 2x2, and its file says so."""
    learn(small(tmp_path, epochs=1), network=UNet)
    model = load_checkpoint(tmp_path / "model.pt").model
    assert model.config["size"] == 8
    assert [halve.place.shape[-1] for halve in model.down] == [4, 2]


def test_levels_can_be_drawn_in_another_way(tmp_path):
    """In training, the network sees the levels that draw_t returned, and the images with the noise
    of these levels. It is asked for one level for each image, in 1..T, from the run's generator.
    """
    shown = []
    drawn = []

    def coin(count, T, generator):
        # Either next to no noise, or nothing but noise.
        drawn.append(1 + (T - 1) * torch.randint(2, (count,), generator=generator))
        assert (count, T) == (8, 1000)
        return drawn[-1]

    learn(small(tmp_path, epochs=2), network=noting(shown), draw_t=coin)
    seen = [(xt, t) for training, xt, t in shown if training]
    assert len(drawn) == 8 and [t.tolist() for _, t in seen] == [t.tolist() for t in drawn]
    noisy = torch.cat([xt for xt, _ in seen])[torch.cat(drawn) == 1000]
    clean = torch.cat([xt for xt, _ in seen])[torch.cat(drawn) == 1]
    assert 10 < len(noisy) < 54 and abs(noisy.std() - 1) < 0.1
    assert ((clean.abs() - 1).abs() < 0.06).all()  # black or white, but for noise of 0.01


def test_levels_are_drawn_from_the_generator_of_the_run(tmp_path):
    """What is drawn with it is a part of the run: it is the same after a stop."""
    def independent(count, T, generator):
        return torch.randint(1, T + 1, (count,), generator=generator)

    seams = {"network": Plain, "draw_t": independent}
    learn(small(tmp_path / "whole"), **seams)
    learn(small(tmp_path / "parts"), **seams, after_step=stop_after(5))
    learn(small(tmp_path / "parts"), **seams, resume=True)
    assert same_state(tmp_path / "whole" / "last.pt", tmp_path / "parts" / "last.pt")


def test_learning_rate_can_be_another(tmp_path):
    """Adam takes each step with the learning rate that was given for it; with 0 no weight moves."""
    asked = []
    used = []
    weights = []

    def halving(step, steps, config):
        asked.append((step, steps, config.lr))
        return config.lr / 2**step if step < 9 else 0.0

    def look(run):
        used.append(run.adam.param_groups[0]["lr"])
        weights.append(run.model.first.weight.detach().clone())

    learn(small(tmp_path), network=Plain, learning_rate=halving, after_step=look)
    assert asked == [(step, 12, 1e-3) for step in range(12)]
    assert used == [1e-3 / 2**step for step in range(9)] + [0.0] * 3
    moved = [not torch.equal(a, b) for a, b in zip(weights, weights[1:])]
    assert moved == [True] * 8 + [False] * 3


# ------------------------------------------------------------------------------------- the labels

class Told(Plain):
    """The Plain network, which adds to its answer a number for each class."""

    def __init__(self, size: int, classes: int, width: int = 4):
        super().__init__(size, width)
        self.config["classes"] = classes
        self.table = torch.nn.Parameter(torch.zeros(classes + 1))  # the last one is for -1

    def forward(self, xt, t, label=None):
        answer = super().forward(xt, t)
        return answer if label is None else answer + self.table[label].reshape(-1, 1, 1, 1)


def listening(shown: list) -> type[Told]:
    """A network that notes what it is called with: its mode, xt and the labels."""
    class Listening(Told):
        def forward(self, xt, t, label=None):
            shown.append((self.training, xt.detach().clone(), label))
            return super().forward(xt, t, label)
    return Listening


def nearly_clean(count: int, T: int, generator: torch.Generator) -> torch.Tensor:
    """In place of draw_t: always t = 1, at which a grey level can be read off a noisy image."""
    return torch.ones(count, dtype=torch.int64)


def numbers(xt: torch.Tensor) -> torch.Tensor:
    """Which of the marked images these are, nearly clean. Their grey levels are 8 apart; the noise
    moves the mean of 64 pixels by 0.16.
    """
    return ((xt.mean(dim=(1, 2, 3)) + 1) * 127.5 / 8).round().long()


def test_labels_are_dropped_one_by_one_with_probability_a_tenth():
    """Each label is replaced by -1 with probability 0.1, whatever it is, wherever it stands in the
    batch, and whatever happens to the others. [CFG Algorithm 1] The rest are left as they are.

    Of N labels 0.1 N are dropped, with a standard error of sqrt(0.09 N); 5.5 of them have
    probability 4e-8, for each of 8 places and 10 classes. The number that is dropped in a batch of
    8 is 0, 1, 2, 3 or more with binomial probabilities: chi-square with 3 degrees of freedom, above
    36 with probability 8e-8. One draw for the whole batch would make it above 100,000.
    """
    generator = torch.Generator().manual_seed(0)
    labels = torch.randint(10, (10_000, 8), generator=generator)
    before = labels.clone()
    told = torch.stack([drop_labels(batch, generator) for batch in labels])
    assert torch.equal(labels, before) and told.dtype == torch.int64
    dropped = told == -1
    assert torch.equal(told[~dropped], labels[~dropped])

    for places in (*dropped.T, *(dropped[labels == digit] for digit in range(10))):
        off = places.sum().item() - 0.1 * len(places)
        assert abs(off) < 5.5 * math.sqrt(0.09 * len(places))
    counts = torch.bincount(dropped.sum(dim=1).clamp(max=3), minlength=4).double()
    share = [math.comb(8, k) * 0.1**k * 0.9**(8 - k) for k in range(3)]
    expected = 10_000 * torch.tensor([*share, 1 - sum(share)], dtype=torch.float64)
    assert ((counts - expected) ** 2 / expected).sum() < 36
    assert DROPPED == 0.1


def test_network_is_told_the_labels_of_its_images_or_none(tmp_path):
    """In a step the network sees the images of the step, in the order drawn for the epoch, each
    with its own label or with -1: that where a number drawn for it, uniform on [0, 1), is below
    0.1. The number is drawn after the noise, from the generator of the run. Held-out images are
    seen twice after each epoch, with all labels and without any.
    """
    shown = []
    learn(small(tmp_path, labels=True, seed=5), images=MARKED, draw_t=nearly_clean,
          network=listening(shown))
    steps = [call for call in shown if call[0]]
    assert len(steps) == 12

    generator = torch.Generator().manual_seed(5)
    kinds = set()
    for step, (_, xt, label) in enumerate(steps):
        if step % 4 == 0:
            order = torch.randperm(32, generator=generator)
        chosen = order[8 * (step % 4):8 * (step % 4) + 8]
        torch.randn(8, 1, 8, 8, generator=generator)
        dropped = torch.rand(8, generator=generator) < 0.1
        kinds |= set(dropped.tolist())
        assert torch.equal(numbers(xt), chosen)
        assert label.tolist() == [-1 if out else 7 * i % 5
                                  for out, i in zip(dropped.tolist(), chosen.tolist())]
    assert kinds == {True, False}

    told = [label for training, _, label in shown if not training]
    assert len(told) == 6  # 24 held-out images are one batch
    for label in told[::2]:
        assert torch.equal(label, 7 * torch.arange(24) % 5)
    assert told[1::2] == [None] * 3


@pytest.mark.parametrize("labels", [False, True])
def test_labels_change_no_draw_of_a_run_without_them(labels, tmp_path):
    """A step draws the levels (a permutation, then a number for each), then the noise, and with
    labels one number more for each image. So a run without labels is what it was before there were
    any: its generator is in the state in which these draws leave it.
    """
    states = []
    learn(small(tmp_path, labels=labels, seed=3), images=MARKED,
          after_step=lambda run: states.append(run.generator.get_state()))
    generator = torch.Generator().manual_seed(3)
    for step, state in enumerate(states):
        if step % 4 == 0:
            torch.randperm(32, generator=generator)
        torch.randperm(8, generator=generator)
        torch.rand(8, generator=generator, dtype=torch.float64)
        torch.randn(8, 1, 8, 8, generator=generator)
        if labels:
            torch.rand(8, generator=generator)
        assert torch.equal(state, generator.get_state())
    assert len(states) == 12


def test_labels_that_are_not_asked_for_are_not_told(tmp_path):
    """Pairs of images and labels without labels=True: bit for bit the run of the images alone."""
    learn(small(tmp_path / "pairs"), images=MARKED)
    learn(small(tmp_path / "images"), images=(MARKED[0][0], MARKED[1][0]))
    assert same_state(tmp_path / "pairs" / "last.pt", tmp_path / "images" / "last.pt")


def test_two_held_out_losses_are_those_with_and_without_labels(tmp_path, capsys):
    """history["held_out"] is what evaluate() finds when each label is told, "held_out_untold" when
    none is; here they differ. Both are printed, and no loss of the blog, which told no labels.
    """
    history = learn(small(tmp_path, labels=True, lr=0.02), images=MARKED)
    saved = load_checkpoint(tmp_path / "model.pt")
    images, labels = MARKED[1]
    told = evaluate(saved.model, saved.schedule, images, labels=labels)
    untold = evaluate(saved.model, saved.schedule, images)
    assert history["held_out"][-1] == told and history["held_out_untold"][-1] == untold
    assert abs(told - untold) > 1e-5 and len(history["held_out_untold"]) == 3
    line = capsys.readouterr().out.splitlines()[-1]
    assert f"held-out {told:.4f}" in line and line.endswith(f"without labels {untold:.4f}")


def test_names_of_the_classes_are_saved(tmp_path):
    """All files of a run hold the names, in the order of the labels, and the number of classes of
    the network. If images are given, the names are numbers, up to the highest label of both parts.
    """
    training, (images, labels) = MARKED
    learn(small(tmp_path, labels=True, epochs=1), images=(training, (images, labels + 2)))
    assert len(files(tmp_path)) == 5
    for path in tmp_path.glob("*.pt"):
        saved = load_checkpoint(path)
        assert saved.classes == ["0", "1", "2", "3", "4", "5", "6"]
        assert saved.model.config["classes"] == 7 and saved.model.table.shape == (7, 4)


def test_classes_of_a_data_set_have_names(tmp_path):
    """MNIST and the built-in digits have digits, in order; FashionMNIST and KMNIST have the ten
    names that their authors give them; a folder has the names of its folders, sorted.
    """
    for name in ("mnist", "builtin"):
        assert class_names(small("", dataset=name)) == list("0123456789")
    fashion = class_names(small("", dataset="fashion"))
    assert len(fashion) == 10 and (fashion[1], fashion[9]) == ("Trouser", "Ankle boot")
    assert class_names(small("", dataset="kmnist"))[:3] == ["o", "ki", "su"]
    for name in ("dog", "ape", "cat"):
        (tmp_path / name).mkdir()
        Image.new("L", (28, 28)).save(tmp_path / name / "1.png")
    assert class_names(small("", dataset="folder", data=str(tmp_path))) == ["ape", "cat", "dog"]


def test_command_learns_labels_of_a_folder(tmp_path):
    """--labels: the network sees each image with the number of its folder in the sorted names."""
    data = tmp_path / "data"
    for kind, grey in (("dog", 200), ("cat", 40)):
        (data / kind).mkdir(parents=True)
        for i in range(10):
            image = Image.new("L", (28, 28), grey)
            image.putpixel((i, 0), 100)  # a blank image would be refused
            image.save(data / kind / f"{i}.png")
    shown = []
    train.main(["--dataset", "folder", "--data", str(data), "--labels", "--epochs", "2",
                "--batch-size", "9", "--device", "cpu", "--out", str(tmp_path / "run")],
               draw_t=nearly_clean, network=listening(shown))
    seen = [(xt, label) for training, xt, label in shown if training]
    for xt, label in seen:
        light = (xt.mean(dim=(1, 2, 3)) > 0).long()
        assert ((light == label) | (label == -1)).all()
    assert {0, 1} <= set(torch.cat([label for _, label in seen]).tolist())
    saved = load_checkpoint(tmp_path / "run" / "model.pt", network=Told)
    assert saved.classes == ["cat", "dog"] and saved.config.labels


def test_runs_with_labels_have_a_folder_of_their_own():
    """--labels writes into runs/DATASET-labels, and with --images into runs/DATASET-labels-N. So
    has each size.
    """
    for options, name in (({}, "mnist"), ({"labels": True}, "mnist-labels"),
                          ({"size": 16}, "mnist-16x16"),
                          ({"size": 16, "labels": True, "images": 5}, "mnist-labels-16x16-5"),
                          ({"labels": True, "images": 500}, "mnist-labels-500"),
                          ({"labels": True, "dataset": "builtin"}, "builtin-labels")):
        assert Config(**options).out == str(HERE / "runs" / name)


@pytest.mark.parametrize("given", [IMAGES, (MARKED[0], IMAGES[1]), (IMAGES[0], MARKED[1])])
def test_labels_that_are_missing_are_one_line(given, tmp_path):
    """labels=True needs labels of both parts. Nothing is written."""
    with pytest.raises(ValueError, match="^labels=True needs images with labels: pairs "):
        learn(small(tmp_path, labels=True), images=given)
    assert not list(tmp_path.iterdir())


def test_resuming_with_other_classes_is_refused(tmp_path):
    """A table of five rows has none for a sixth class; nor does a run without labels go on with
    them, or one with labels without. Nothing is written.
    """
    for labels in (True, False):
        out = tmp_path / str(labels)
        learn(small(out, labels=labels), images=MARKED, after_step=stop_after(1))
        written = files(out)
        with pytest.raises(ValueError, match=f"has labels = {labels}, not {not labels}"):
            learn(small(out, labels=not labels), images=MARKED, resume=True)
        assert files(out) == written
    others = tuple((images, labels + 1) for images, labels in MARKED)
    with pytest.raises(ValueError, match="had the classes 0, 1, 2, 3, 4, not 0, 1, 2, 3, 4, 5$"):
        learn(small(tmp_path / "True", labels=True), images=others, resume=True)


def test_run_from_before_there_were_labels_goes_on(tmp_path):
    """Its files know of no labels: neither an option, nor classes, nor a size of the network. It
    goes on as if it had not been stopped.
    """
    learn(small(tmp_path / "whole"))
    learn(small(tmp_path / "parts"), after_step=stop_after(5))
    for name in ("last.pt", "model.pt"):
        state = torch.load(tmp_path / "parts" / name, weights_only=True)
        del state["classes"], state["config"]["labels"], state["network"]["classes"]
        save(tmp_path / "parts" / name, state)
    assert load_checkpoint(tmp_path / "parts" / "model.pt").classes == []
    learn(small(tmp_path / "parts"), resume=True)
    assert same_state(tmp_path / "whole" / "last.pt", tmp_path / "parts" / "last.pt")


@pytest.mark.slow
def test_network_learns_what_labels_mean(tmp_path):
    """Told one of ten labels, a trained network gives ten answers for the same noisy image. If the
    label says what is in the image, here its grey level, the error on held-out images is least with
    the right labels, and larger with wrong ones than with none.
    """
    def grey(count: int) -> tuple[torch.Tensor, torch.Tensor]:
        labels = torch.arange(count) % 10
        levels = (28 * labels).to(torch.uint8).reshape(-1, 1, 1, 1)
        return levels.repeat(1, 1, 8, 8), labels

    training, held_out = grey(1280), grey(500)
    learn(small(tmp_path, labels=True, epochs=6, batch_size=32, lr=1e-2),
          images=(training, held_out))
    saved = load_checkpoint(tmp_path / "model.pt")
    images, labels = held_out
    xt = torch.randn(1, 1, 8, 8, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        answers = saved.model(xt.expand(10, -1, -1, -1), torch.full((10,), 500), torch.arange(10))
    apart = torch.cdist(answers.flatten(1), answers.flatten(1)) + 9 * torch.eye(10)
    assert apart.min() > 0.01
    right, untold, wrong = (evaluate(saved.model, saved.schedule, images, labels=each)
                            for each in (labels, None, (labels + 5) % 10))
    assert right < untold < wrong


# ------------------------------------------------------------------------------------ model files

def test_files_of_a_run_hold_what_the_top_of_the_script_says(tmp_path):
    """model.pt holds what sample.py needs: averaged weights, options, losses, and what it takes to
    build network and schedule. last.pt holds all of model.pt, and what it takes to go on: the
    weights in training, Adam, the generator, the order of the images, the seconds of the epoch.
    epoch-N.pt is the model.pt of epoch N in half precision, and early.pt that of two fifteenths of
    all steps, here the first of eight. Beside them stands history.csv, and no other file.
    """
    averages = []  # after the first step and after both epochs
    kept = {}

    def look(run):
        if run.step == 1 or run.epoch_is_complete:
            averages.append(copy.deepcopy(run.average.state_dict()))
        kept["run"] = run

    config = small(tmp_path, epochs=2)
    history = learn(config, network=Plain, after_step=look)
    run = kept["run"]
    names = ["early.pt", "epoch-1.pt", "epoch-2.pt", "last.pt", "model.pt"]
    assert set(files(tmp_path)) == {*names, "history.csv"}
    early, first, second, last, model = (torch.load(tmp_path / name, weights_only=True)
                                         for name in names)

    # What sample.py needs.
    assert set(model) == {"config", "network", "classes", "history", "betas", "average"}
    assert model["classes"] == []  # without labels
    folders = ("data", "out", "device")
    assert model["config"] == {k: v for k, v in vars(config).items() if k not in folders}
    assert model["network"] == {"size": 8, "width": 4} and model["history"] == history
    assert torch.equal(model["betas"], NoiseSchedule().beta[1:])
    assert set(model["average"]) == {name for name, _ in run.model.named_parameters()}
    for name, weight in model["average"].items():
        assert torch.equal(weight, averages[2][name]) and weight.dtype == torch.float32

    # What --resume needs.
    assert set(last) - set(model) == {"weights", "adam", "order", "generator", "seconds"}
    for name, weight in run.model.state_dict().items():
        assert torch.equal(last["weights"][name], weight)
        assert torch.equal(last["average"][name], model["average"][name])
    for i, parameter in enumerate(run.model.parameters()):
        moments = run.adam.state[parameter]
        assert last["adam"]["state"][i].keys() == {"step", "exp_avg", "exp_avg_sq"}
        assert all(torch.equal(last["adam"]["state"][i][k], v) for k, v in moments.items())
    assert torch.equal(last["generator"], run.generator.get_state())
    assert torch.equal(last["order"], run.order)
    assert sorted(last["order"].tolist()) == list(range(32))

    # What there is to look back at.
    for file, average, step in zip((early, first, second), averages, (1, 4, 8), strict=True):
        assert set(file) == set(model) and len(file["history"]["step_loss"]) == step
        assert len(file["history"]["loss"]) == step // 4
        assert set(file["average"]) == set(average)
        for name, weight in file["average"].items():
            assert torch.equal(weight, average[name].half()) and weight.dtype == torch.float16
    for name in ("early.pt", "epoch-1.pt"):
        read = load_checkpoint(tmp_path / name, network=Plain).model
        assert all(p.dtype == torch.float32 for p in read.parameters())


def test_files_are_written_after_the_first_step_and_when_a_run_is_stopped(tmp_path):
    """So a full disk is noticed early. A file of the epoch is written only at its end, and early.pt
    after the second of twelve steps, never again."""
    def saved_steps() -> dict[str, int]:
        """The number of steps that each file of the folder knows of."""
        return {path.name: len(torch.load(path)["history"]["step_loss"])
                for path in tmp_path.glob("*.pt")}

    seen = []  # before anything is saved in this step

    def look(run):
        seen.append(saved_steps())
        return run.step == 7

    learn(small(tmp_path), network=Plain, after_step=look)
    after_step_1 = {"last.pt": 1, "model.pt": 1}
    after_step_2 = {"last.pt": 2, "model.pt": 2, "early.pt": 2}
    after_epoch_1 = {"last.pt": 4, "model.pt": 4, "early.pt": 2, "epoch-1.pt": 4}
    assert seen == [{}, after_step_1, *[after_step_2] * 2, *[after_epoch_1] * 3]
    assert saved_steps() == {"last.pt": 7, "model.pt": 7, "early.pt": 2, "epoch-1.pt": 4}


@pytest.mark.parametrize("epochs, batch_size, early", [(15, 8, 8), (1, 2, 2), (1, 8, 1)])
def test_early_state_is_that_of_two_fifteenths_of_the_steps(epochs, batch_size, early, tmp_path):
    """early.pt holds what model.pt held after round(2/15 of all steps) steps, and at least one, in
    half precision: of 15 epochs that is epoch 2, of 16 steps the second, of four the first. It does
    so whether or not the run is stopped before that step, in it or after it, and resumed.
    """
    averages = {}

    def look(run):
        averages[run.step] = copy.deepcopy(run.average.state_dict())

    for stop in (None, early - 1, early, early + 1):
        if stop == 0:
            continue
        config = small(tmp_path / str(stop), epochs=epochs, batch_size=batch_size)
        if stop is None:
            history = learn(config, network=Plain, after_step=look)
        else:
            learn(config, network=Plain, after_step=stop_after(stop))
            assert (tmp_path / str(stop) / "early.pt").exists() == (stop >= early)
            learn(config, network=Plain, resume=True)
        file = torch.load(tmp_path / str(stop) / "early.pt", weights_only=True)
        assert file["history"]["step_loss"] == history["step_loss"][:early]
        assert set(file["average"]) == set(averages[early])
        for name, weight in file["average"].items():
            assert torch.equal(weight, averages[early][name].half())
        if epochs == 15:
            epoch_2 = torch.load(tmp_path / str(stop) / "epoch-2.pt", weights_only=True)
            assert all(torch.equal(w, epoch_2["average"][name])
                       for name, w in file["average"].items())


def test_early_step_is_the_nearest_to_two_fifteenths():
    """Of the shipped model, whose 15 epochs have 468 steps each, it is the last of epoch 2; of
    --quick it is step 242 of 1,812. For any number of steps S it is the integer part of
    (4 S + 15)/30, which is 2 S/15 + 1/2, but at least 1, so that any run has such a state."""
    def early_step(steps_per_epoch: int, **options) -> int:
        config = Config(**{"out": "nowhere", "device": "cpu"} | options)
        run = Run(config, NoiseSchedule(), steps_per_epoch * config.batch_size, {"size": 8}, Plain)
        return run.early_step

    assert early_step(468) == 2 * 468
    assert early_step(1812, **QUICK) == 242
    for epochs in (1, 2, 7, 15, 30):
        for count in range(1, 40):
            expected = max(1, (4 * epochs * count + 15) // 30)
            assert early_step(count, epochs=epochs) == expected


def read_table(folder) -> dict[str, list[float]]:
    """The columns of history.csv."""
    with open(folder / "history.csv", newline="") as file:
        head, *rows = csv.reader(file)
    return {name: [float(row[i]) for row in rows] for i, name in enumerate(head)}


@pytest.mark.parametrize("labels", [False, True])
def test_table_holds_the_history_of_all_epochs(labels, tmp_path):
    """history.csv has a row for each finished epoch, whose numbers are exactly those of the history
    in model.pt; after a stop and with a new plan, too. The losses without labels are there only if
    the run has labels.
    """
    images = IMAGES
    columns = ["loss", "held_out", "seconds"]
    if labels:
        images = tuple((part, torch.arange(len(part)) % 3) for part in IMAGES)
        columns.append("held_out_untold")
    rows = []

    def look(run):
        # Before anything is saved in this step.
        if (tmp_path / "history.csv").exists():
            table = read_table(tmp_path)
            history = torch.load(tmp_path / "model.pt", weights_only=True)["history"]
            assert table == {"epoch": [*range(1, len(table["loss"]) + 1)],
                             **{name: history[name] for name in columns}}
            rows.append(len(table["loss"]))
        return run.step == 6

    learn(small(tmp_path, labels=labels), images=images, after_step=look)
    assert list(read_table(tmp_path)) == ["epoch", *columns]
    history = learn(small(tmp_path, labels=labels, epochs=4), images=images, resume=True,
                    after_step=lambda run: look(run) and False)
    assert rows == [1] * 4 + [2] * 4 + [3] * 4
    table = read_table(tmp_path)
    assert table["epoch"] == [1, 2, 3, 4]
    assert all(table[name] == history[name] for name in columns)


def test_failed_write_of_the_table_keeps_the_old_one(tmp_path, monkeypatch):
    """When the disk fills up, the table of the epoch before is whole and no half file stays."""
    path = tmp_path / "history.csv"
    history = {"loss": [0.5], "held_out": [0.25], "seconds": [2.0]}
    save_history(path, history)
    assert path.read_bytes() == b"epoch,loss,held_out,seconds\n1,0.5,0.25,2.0\n"

    def full(descriptor):
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch, pytest.raises(OSError, match="cannot write .*history.csv"):
        patch.setattr(os, "fsync", full)
        save_history(path, {name: numbers * 2 for name, numbers in history.items()})
    assert files(tmp_path) == {"history.csv": b"epoch,loss,held_out,seconds\n1,0.5,0.25,2.0\n"}


def test_model_file_holds_the_averaged_weights(tiny_run):
    """load_checkpoint gives the average in eval mode, the schedule, configuration and history."""
    checkpoint = load_checkpoint(tiny_run / "model.pt")
    last = load_checkpoint(tiny_run / "last.pt")
    assert not checkpoint.model.training
    for name, weight in checkpoint.model.state_dict().items():
        assert torch.equal(weight, last.state["average"][name])
    current = last.state["weights"]["stem.weight"]
    assert not torch.equal(last.state["average"]["stem.weight"], current)
    assert checkpoint.schedule.T == checkpoint.config.T == 20
    assert len(checkpoint.history["loss"]) == 1 and len(checkpoint.history["step_loss"]) == 2
    assert torch.equal(last.model.stem.weight, checkpoint.model.stem.weight)


def test_model_file_holds_its_schedule(tmp_path):
    """A model is sampled with the betas that it was trained with, and a stopped run goes on with
    them, also if schedule.py would make others now, or would refuse them.

    The betas in the file are changed by hand to 0.7 times those of the linear schedule. These leave
    3 % of the image at t = T, which is too much for a new schedule.
    """
    learn(small(tmp_path), after_step=stop_after(1))
    betas = 0.7 * NoiseSchedule().beta[1:]
    with pytest.raises(ValueError, match="of the image is left"):
        NoiseSchedule.from_betas(betas)
    for name in ("model.pt", "last.pt"):
        save(tmp_path / name, torch.load(tmp_path / name) | {"betas": betas})
        assert torch.equal(load_checkpoint(tmp_path / name).schedule.beta[1:], betas)

    used = []
    learn(small(tmp_path), resume=True,
          after_step=lambda run: used.append(run.schedule.beta[1:]))
    assert len(used) == 11 and all(torch.equal(each, betas) for each in used)
    assert torch.equal(load_checkpoint(tmp_path / "model.pt").schedule.beta[1:], betas)


def test_failed_save_leaves_the_old_file(tmp_path, monkeypatch):
    """When the disk fills up in the middle, the old file is whole and no half file stays."""
    path = tmp_path / "model.pt"
    save(path, {"format": 1})

    def full(state, file):
        file.write(b"half")
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch, pytest.raises(OSError, match="No space left"):
        patch.setattr(torch, "save", full)
        save(path, {"format": 2})
    assert torch.load(path) == {"format": 1}
    assert list(tmp_path.iterdir()) == [path]


class Evil:
    def __reduce__(self):
        return print, ("code from a model file was run",)


@pytest.mark.parametrize("damage", ["missing", "empty", "truncated", "hello", "start", "foreign",
                                    "tensor", "code", "other size", "other options"])
def test_damaged_model_files_are_refused(damage, tiny_run, tmp_path, capsys):
    """One line that names the file, whatever is wrong with it; code in it is never run."""
    path = tmp_path / "model.pt"
    good = (tiny_run / "model.pt").read_bytes()
    state = torch.load(tiny_run / "model.pt")
    if damage == "empty":
        path.write_bytes(b"")
    elif damage == "truncated":
        path.write_bytes(good[:len(good) // 2])
    elif damage in ("hello", "start"):
        path.write_bytes(damage.encode())
    elif damage == "foreign":
        torch.save({"weight": torch.zeros(3)}, path)
    elif damage == "tensor":
        torch.save(torch.zeros(3), path)
    elif damage == "code":
        path.write_bytes(pickle.dumps(Evil(), protocol=2))
    elif damage == "other size":
        state["network"]["channels"] = [16, 16, 16]
        save(path, state)
    elif damage == "other options":
        state["network"]["depth"] = 3
        save(path, state)
    with pytest.raises((ValueError, OSError)) as error:
        load_checkpoint(path)
    assert str(path) in str(error.value) and "\n" not in str(error.value)
    assert "code from" not in capsys.readouterr().out


def test_shipped_model_was_trained_with_the_defaults():
    """python train.py trains the shipped model again: its options and its network are the defaults.

    Its history is whole: 15 epochs of 468 steps.
    """
    checkpoint = load_checkpoint(SHIPPED)
    assert checkpoint.config == Config()
    with torch.device("meta"):
        assert checkpoint.model.config == UNet().config
    lengths = [len(checkpoint.history[k]) for k in ("loss", "held_out", "seconds", "step_loss")]
    assert lengths == [15, 15, 15, 15 * 468]


# ----------------------------------------------------------------------------- the command line

def test_blog_loss_has_the_ends_that_were_published():
    """Fifteen numbers that fall from 0.2203 to 0.0619."""
    assert len(BLOG_LOSS) == 15 and (BLOG_LOSS[0], BLOG_LOSS[-1]) == (0.2203, 0.0619)
    assert list(BLOG_LOSS) == sorted(BLOG_LOSS, reverse=True)


def test_command_trains_reports_and_says_what_comes_next(tmp_path, capsys):
    """One line an epoch with our loss and the blog's; at the end the command for samples."""
    write_mnist(tmp_path, pictures(16), torch.zeros(16))
    out = tmp_path / "run"
    train.main(["--data", str(tmp_path), "--out", str(out), "--epochs", "1", "--batch-size", "8",
                "--device", "cpu"])
    lines = capsys.readouterr().out.splitlines()
    assert lines[0] == f"MNIST, on cpu, into {out}"
    assert lines[1].startswith("note: not MNIST as it was published") and len(lines) == 4
    assert lines[2].startswith("epoch  1/1   loss ") and f"{BLOG_LOSS[0]:.4f}" in lines[2]
    assert lines[-1].endswith(f"python sample.py --checkpoint {out / 'model.pt'} "
                              "--sampler sde-dpm++ --guidance 3")
    # Resuming a finished run with the options it was begun with is no error and changes nothing.
    shutil.copy(out / "model.pt", tmp_path / "copy.pt")
    train.main(["--data", str(tmp_path), "--out", str(out), "--resume", "--batch-size", "8"])
    assert (tmp_path / "copy.pt").read_bytes() == (out / "model.pt").read_bytes()


@pytest.mark.parametrize("options, advice", [
    (["--images", "8"], ""), (["--images", "16"], " --guidance 3"),
    (["--images", "16", "--T", "10", "--schedule", "cosine"], " --guidance 3"),
    (["--labels"], " --digits 0-9 --guidance 1.5"), (["--size", "12"], " --guidance 3")])
def test_command_that_comes_next_draws_digits(options, advice, tmp_path, capsys):
    """The printed command works as it stands, for a folder with a space in its name, too. It guides
    the network by its earlier state, unless there is none: a run of one step has none.
    """
    write_mnist(tmp_path, pictures(24), torch.arange(24) % 10)
    out = tmp_path / "my run"
    train.main(["--data", str(tmp_path), "--out", str(out), "--epochs", "1", "--batch-size", "8",
                "--device", "cpu", *options])
    line = capsys.readouterr().out.splitlines()[-1]
    command = shlex.split(line.partition("now type: python sample.py ")[2])
    assert command == shlex.split(f"--checkpoint '{out / 'model.pt'}' --sampler sde-dpm++{advice}")
    sample_main([*command, "--seeds", "0-9", "--steps", "2"])
    assert (out / "samples.png").exists()


def test_long_runs_need_less_guidance():
    """w is 3 after up to 2,500 steps, about five epochs of MNIST, and 2 after more."""
    config = Config()
    for steps, weight in ((2, 3), (5 * 468, 3), (15 * 468, 2)):
        history = {"step_loss": [0.0] * steps, "plans": [{"step": 0, "steps": steps}]}
        assert options_for_samples(config, history).endswith(f" --guidance {weight}")


def test_run_cut_before_its_early_state_is_not_guided():
    """Planned for 15 steps, of which the second is the early one, and ended after one or two."""
    plans = [{"step": 0, "steps": 15}]
    for steps, is_guided in ((1, False), (2, False), (3, True)):
        history = {"step_loss": [0.0] * steps, "plans": plans}
        assert ("--guidance" in options_for_samples(Config(), history)) == is_guided


def test_help_shows_every_option_with_its_default(capsys, monkeypatch):
    """The usage, and for each field of Config its name, what it is and its default. A field that is
    true or false is a switch, which is off by default and has no value.
    """
    monkeypatch.setenv("COLUMNS", "500")  # no word is cut in two
    with pytest.raises(SystemExit) as exit_:
        train.main(["--help"])
    assert exit_.value.code == 0
    text = " ".join(capsys.readouterr().out.split())
    assert text.startswith("usage:") and "--resume" in text and "--quick" in text
    for option in fields(Config):
        name = "--" + option.name.replace("_", "-")
        meaning = option.metadata["help"]
        if option.type is bool:
            assert f" {name} {meaning} --" in text and option.default is False
            continue
        assert f"{name} {option.type.__name__} {meaning} (default: {option.default})" in text


def test_options_that_are_given_win_over_quick(tmp_path):
    """--quick is short for a few options; each of them can still be given."""
    write_mnist(tmp_path, pictures(24, size=8), torch.zeros(24))
    train.main(["--quick", "--data", str(tmp_path), "--out", str(tmp_path / "run"), "--device",
                "cpu", "--batch-size", "8", "--val-images", "16"])
    config = load_checkpoint(tmp_path / "run" / "model.pt").config
    expected = QUICK | {"batch_size": 8, "val_images": 16}
    assert {name: getattr(config, name) for name in QUICK} == expected
    assert config.T == 1000 and config.seed == 0


def test_resumed_command_keeps_the_options_of_the_run(tmp_path):
    """--resume alone goes on with the saved options, whatever the defaults are, and a seam of
    train() can be given to main(): the run ends as if it had not been stopped.
    """
    write_mnist(tmp_path, pictures(16, size=8), torch.zeros(16))
    seams = {"network": Plain, "draw_t": lambda count, T, generator: torch.arange(1, count + 1),
             "learning_rate": lambda step, steps, config: config.lr / 2}
    begin = ["--data", str(tmp_path), "--device", "cpu", "--batch-size", "4", "--epochs", "2",
             "--seed", "7", "--T", "900", "--lr", "0.01", "--out"]
    train.main([*begin, str(tmp_path / "whole")], **seams)
    with pytest.raises(SystemExit) as exit_:
        train.main([*begin, str(tmp_path / "parts")], after_step=stop_after(3), **seams)
    assert exit_.value.code == 128 + signal.SIGTERM
    train.main(["--data", str(tmp_path), "--device", "cpu", "--out", str(tmp_path / "parts"),
                "--resume"], **seams)
    assert same_state(tmp_path / "whole" / "last.pt", tmp_path / "parts" / "last.pt")
    assert load_checkpoint(tmp_path / "parts" / "last.pt", network=Plain).config.seed == 7
