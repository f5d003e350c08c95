"""Draw pretrained/glyphs.png: the ten digits in the text fonts of matplotlib.

    python -m tests.experiments.glyphs                       a second
    python -m tests.experiments.glyphs --sample FILE.png     400 built-in digits, to look at

The picture has one font a row and ten digits a row, each in a cell of 28x28 pixels. It is all that
`train.py --dataset builtin` needs: train.builtin_digits thickens, turns, shears and stretches these
glyphs at random, so that machines without MNIST have something to train on. The picture is
committed, because another version of matplotlib may come with other fonts, or draw them
differently, and the same seed must always give the same digits. Its text field "Software" names the
versions that drew it.
"""

import argparse
from pathlib import Path

import matplotlib
import PIL
import torch
from einops import rearrange
from PIL import Image, ImageDraw, ImageFont, features
from PIL.PngImagePlugin import PngInfo

import train

GLYPHS = train.HERE / "pretrained" / "glyphs.png"
# All fonts of matplotlib that have digits of their own. The others hold symbols or brackets.
FONTS = ("DejaVuSans", "DejaVuSans-*", "DejaVuSansMono*", "DejaVuSerif", "DejaVuSerif-*",
         "STIXGeneral*", "cmb10", "cmr10", "cmss10", "cmti10", "cmtt10")
SIZE = 28  # height and width of a cell, as in MNIST


def software() -> str:
    """The versions of the libraries on which the pixels depend."""
    freetype = features.version("freetype2")
    return f"matplotlib {matplotlib.__version__}, Pillow {PIL.__version__}, FreeType {freetype}"


def draw_glyphs() -> Image.Image:
    """The ten digits of each font, upright and white on black: greyscale, one font a row."""
    folder = Path(matplotlib.get_data_path(), "fonts", "ttf")
    files = [file for name in FONTS for file in sorted(folder.glob(name + ".ttf"))]
    picture = Image.new("L", (10 * SIZE, len(files) * SIZE))
    for row, file in enumerate(files):
        font = ImageFont.truetype(str(file), 24)
        for digit in range(10):
            cell = Image.new("L", (SIZE, SIZE))
            middle = (SIZE // 2, SIZE // 2)
            ImageDraw.Draw(cell).text(middle, str(digit), 255, font, anchor="mm")
            picture.paste(cell, (digit * SIZE, row * SIZE))
    return picture


def tile(images: torch.Tensor, columns: int = 20) -> Image.Image:
    """uint8 images (N, 1, H, W) as one picture; N must be a multiple of the number of columns."""
    return Image.fromarray(rearrange(images, "(r c) 1 h w -> (r h) (c w)", c=columns).numpy())


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description="Draw the glyphs of the built-in digits.")
    parser.add_argument("--sample", metavar="FILE.png",
                        help="draw 400 built-in digits into this file, and leave the glyphs alone")
    args = parser.parse_args(argv)
    if args.sample:
        images, _ = train.builtin_digits(400, seed=0)
        tile(images).save(args.sample)
        print("wrote", args.sample)
        return

    versions = PngInfo()
    versions.add_text("Software", software())
    draw_glyphs().save(GLYPHS, optimize=True, pnginfo=versions)
    print("wrote", GLYPHS)


if __name__ == "__main__":
    main()
