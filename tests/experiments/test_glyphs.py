"""The glyphs that the built-in digits are made of: ten digits a row, and those of matplotlib."""

import numpy
import pytest
import torch
from einops import rearrange
from PIL import Image, ImageChops

import train
from tests.experiments import glyphs
from tests.experiments.glyphs import GLYPHS, SIZE, draw_glyphs, software, tile

pytestmark = pytest.mark.slow


def cells() -> torch.Tensor:
    """The committed picture, cut into its cells: uint8 (fonts, 10, 28, 28)."""
    picture = torch.from_numpy(numpy.array(Image.open(GLYPHS)))
    return rearrange(picture, "(r h) (c w) -> r c h w", h=SIZE, w=SIZE)


def test_picture_is_ten_digits_wide():
    """Greyscale, 21 fonts with ten digits of 28x28 pixels each."""
    with Image.open(GLYPHS) as picture:
        assert picture.mode == "L" and picture.size == (10 * 28, 21 * 28)


def test_each_cell_holds_one_digit_in_its_middle():
    """36 to 200 pixels are more white than black. From the first to the last row of them it is at
    least 14, and their middle is at most 3.5 from the middle of the cell, whose rim is black.
    """
    for glyph in cells().flatten(0, 1):
        lit = glyph > 127
        rows = lit.any(dim=1).nonzero().flatten().tolist()
        columns = lit.any(dim=0).nonzero().flatten().tolist()
        assert 36 <= lit.sum() <= 200 and rows[-1] - rows[0] >= 13
        assert not (glyph[[0, -1]].any() or glyph[:, [0, -1]].any())
        for places in (rows, columns):
            assert abs((places[0] + places[-1]) / 2 - 13.5) <= 3.5


def test_each_column_is_one_digit_in_many_fonts():
    """Nine of ten glyphs are most like another glyph of their own column; by chance, one of ten
    would be. And no two fonts draw a digit in the same way.
    """
    glyph = cells().flatten(0, 1).flatten(1).double()
    glyph = torch.nn.functional.normalize(glyph - glyph.mean(dim=1, keepdim=True))
    likeness = (glyph @ glyph.T).fill_diagonal_(-1)
    assert likeness.max() < 1 - 1e-6
    digit = torch.arange(len(glyph)) % 10
    most_like = digit[likeness.argmax(dim=1)]
    assert (most_like == digit).sum() > 0.9 * len(glyph)


def test_picture_is_what_the_experiment_draws():
    """Byte for byte, where the versions of the libraries are those that drew it."""
    with Image.open(GLYPHS) as picture:
        if picture.text["Software"] != software():
            pytest.skip(f"drawn by {picture.text['Software']}, here is {software()}")
        assert ImageChops.difference(picture, draw_glyphs()).getbbox() is None


def test_tiles_are_put_in_rows():
    """Six images of one grey each, three a row, in reading order."""
    images = torch.arange(6, dtype=torch.uint8).view(6, 1, 1, 1).repeat(1, 1, 2, 2)
    small = numpy.array(tile(images, columns=3))[::2, ::2]
    assert small.tolist() == [[0, 1, 2], [3, 4, 5]]


def test_command_shows_built_in_digits(tmp_path):
    """400 of them, in 20 rows, and the first is the first of train.builtin_digits."""
    glyphs.main(["--sample", str(tmp_path / "digits.png")])
    with Image.open(tmp_path / "digits.png") as picture:
        pixels = torch.from_numpy(numpy.array(picture))
    assert pixels.shape == (20 * 28, 20 * 28)
    assert torch.equal(pixels[:28, :28], train.builtin_digits(400, seed=0)[0][0, 0])


def test_command_draws_the_same_picture_again(tmp_path, monkeypatch, capsys):
    """It writes the glyphs with the versions that drew them."""
    monkeypatch.setattr(glyphs, "GLYPHS", tmp_path / "glyphs.png")
    glyphs.main([])
    assert str(tmp_path / "glyphs.png") in capsys.readouterr().out
    with Image.open(tmp_path / "glyphs.png") as picture:
        assert picture.text["Software"] == software()
        assert ImageChops.difference(picture, draw_glyphs()).getbbox() is None
