"""Photographs to one normalised batch.

Every image is resized so that its short side is 256/224 of the crop (256 for 224, as torchvision's
evaluation transform), then cropped to size x size and normalised with ImageNet's mean and standard
deviation. The first copy of each photograph is the plain centre crop; the copies that fill the
batch are random crops, every other one flipped, drawn from `seed`.
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from fastres.bench.options import UsageError

if TYPE_CHECKING:
    from torch import Tensor

IMAGENET_MEAN = (0.485, 0.456, 0.406)
IMAGENET_STD = (0.229, 0.224, 0.225)
SUFFIXES = (".jpg", ".jpeg", ".png")
MAX_PHOTOGRAPHS = 64  # more than any batch needs to be varied


def load_photographs(folder: str | None) -> list[tuple[str, Tensor]]:
    """(name, uint8 tensor (3, H, W)) for each image: scikit-learn's two, or those of `folder`."""
    return _sample_photographs() if folder is None else _folder_photographs(Path(folder))


def _sample_photographs() -> list[tuple[str, Tensor]]:
    import torch

    try:
        from sklearn.datasets import load_sample_images
    except ImportError as error:
        raise UsageError(
            "the sample photographs come with scikit-learn, which is not installed: "
            "pip install scikit-learn, or give --images DIR"
        ) from error
    bunch = load_sample_images()
    names = [Path(name).name for name in bunch.filenames]
    return [
        (name, torch.from_numpy(image.copy()).permute(2, 0, 1))
        for name, image in zip(names, bunch.images, strict=True)
    ]


def _folder_photographs(folder: Path) -> list[tuple[str, Tensor]]:
    import numpy as np
    import torch
    from PIL import Image

    files = sorted(p for p in folder.iterdir() if p.suffix.lower() in SUFFIXES and p.is_file())
    if not files:
        raise UsageError(f"argument --images: no {', '.join(SUFFIXES)} file in '{folder}'")
    photographs = []
    for file in files[:MAX_PHOTOGRAPHS]:
        try:
            with Image.open(file) as image:
                pixels = np.asarray(image.convert("RGB")).copy()
        except (OSError, ValueError, SyntaxError, Image.DecompressionBombError) as error:
            reason = str(error).replace(str(file), "it").splitlines()[0]
            raise UsageError(
                f"argument --images: '{file}' is not a readable image ({reason})"
            ) from error
        photographs.append((file.name, torch.from_numpy(pixels).permute(2, 0, 1)))
    return photographs


def resize_short_side(image: Tensor, side: int) -> Tensor:
    """Image (3, H, W) resized so that min(H, W) == side: bilinear, antialiased, values as given."""
    from torchvision.transforms.v2 import functional as tvf

    return tvf.resize(image, [side], interpolation=tvf.InterpolationMode.BILINEAR, antialias=True)


def normalise(image: Tensor) -> Tensor:
    """uint8 (3, H, W) -> fp32 (v / 255 - mean) / std, per channel."""
    from torchvision.transforms.v2 import functional as tvf

    return tvf.normalize(image.float() / 255.0, list(IMAGENET_MEAN), list(IMAGENET_STD))


def make_batch(photographs: list[tuple[str, Tensor]], batch: int, size: int, seed: int) -> Tensor:
    """fp32 (batch, 3, size, size), channels_last: photographs in turn, centre crops first."""
    import torch

    generator = torch.Generator().manual_seed(seed)
    resized = [resize_short_side(image, round(size * 256 / 224)) for _, image in photographs]
    crops = []
    for i in range(batch):
        image = resized[i % len(resized)]
        spare_h, spare_w = image.shape[1] - size, image.shape[2] - size
        copy = i // len(resized)
        if copy == 0:
            top, left = round(spare_h / 2), round(spare_w / 2)
        else:
            top = int(torch.randint(spare_h + 1, (1,), generator=generator))
            left = int(torch.randint(spare_w + 1, (1,), generator=generator))
        crop = image[:, top : top + size, left : left + size]
        crops.append(normalise(crop.flip(2) if copy % 2 else crop))
    return torch.stack(crops).contiguous(memory_format=torch.channels_last)
