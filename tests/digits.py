"""The built-in digits, for machines without MNIST and for the tests: printed numerals, bent a little.

    python tests/digits.py FILE.png        the first 400 of them, as a picture

train.py --dataset builtin learns them. They are drawn from the text fonts that come with matplotlib,
and look like MNIST from afar: white on black, 28x28, 20 pixels in the longer direction.
"""

import sys
from pathlib import Path

import matplotlib
import torch
import torch.nn.functional as F
from PIL import Image, ImageDraw, ImageFont
from torchvision.transforms.functional import to_pil_image, to_tensor
from torchvision.utils import make_grid

# Not the fonts that have no digits, or those of another: symbols, sizes of brackets, last resort.
FONTS = ("DejaVuSans", "DejaVuSans-*", "DejaVuSansMono*", "DejaVuSerif", "DejaVuSerif-*",
         "STIXGeneral*", "cmb10", "cmr10", "cmss10", "cmti10", "cmtt10")


def draw_glyphs() -> torch.Tensor:
    """The ten digits of each font, upright: (fonts * 10, 1, 28, 28) in [0, 1]."""
    folder = Path(matplotlib.get_data_path(), "fonts", "ttf")
    glyphs = []
    for path in (path for name in FONTS for path in sorted(folder.glob(name + ".ttf"))):
        face = ImageFont.truetype(str(path), 24)
        for digit in "0123456789":
            glyph = Image.new("L", (28, 28))
            ImageDraw.Draw(glyph).text((14, 14), digit, 255, face, anchor="mm")
            glyphs.append(to_tensor(glyph))
    return torch.stack(glyphs)


def builtin_digits(count: int, seed: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Random digits, the same for the same seed: uint8 (count, 1, 28, 28), and their labels.

    Strokes are thickened, and the whole is turned, sheared and stretched, at random. As in MNIST a
    digit is 20 pixels high or wide, whichever is more, with its centre of mass in the middle.
    """
    glyphs = draw_glyphs()
    generator = torch.Generator().manual_seed(seed)
    labels = torch.randint(10, (count,), generator=generator)
    axis = (torch.arange(28) - 13.5) / 14  # where pixels are, from -1 to 1
    images = []
    for digit in labels.split(2000):
        n = len(digit)
        glyph = glyphs[torch.randint(len(glyphs) // 10, (n,), generator=generator) * 10 + digit]
        thick = F.max_pool2d(glyph, 3, stride=1, padding=1)
        glyph = glyph.lerp(thick, torch.rand(n, 1, 1, 1, generator=generator) / 3)
        # e to the power of a small matrix turns, shears and stretches a little, and never flips.
        A = torch.matrix_exp((torch.rand(n, 2, 2, generator=generator) - 0.5) / 2)
        scale, shift = torch.ones(n, 1, 1), torch.zeros(n, 2, 1)
        for _ in range(2):  # draw, measure, and draw again as it should be
            where = F.affine_grid(torch.cat([A * scale, shift], dim=2), glyph.shape, False)
            image = F.grid_sample(glyph, where, align_corners=False)  # (n, 1, 28, 28)
            lit = image > 0.3
            scale = torch.maximum(lit.any(2).sum(2), lit.any(3).sum(2))[:, :, None] / 20
            mass = torch.stack([image.sum(2) @ axis, image.sum(3) @ axis], dim=1)  # (n, 2, 1)
            shift = A @ mass / image.sum((2, 3))[:, :, None]
        images.append((image * 1.3).clamp(max=1).mul(255).to(torch.uint8))
    return torch.cat(images), labels


if __name__ == "__main__":
    grid = make_grid(builtin_digits(400, seed=0)[0], nrow=20)
    to_pil_image(grid).save(sys.argv[1] if len(sys.argv) > 1 else "digits.png")
