"""From encoded images to tensors: the shape that all get, their conversion, and a cache of the decoded ones."""

from __future__ import annotations

import contextlib
import hashlib
import inspect
import io
import json
import os
import time
from collections.abc import Iterator
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np
from filelock import FileLock
from PIL import Image, ImageOps

from pytorch_example_low_level.config import UserError, explained, log
from pytorch_example_low_level.sources import Source, cache_folder, digest_of_files

PROGRESS_EVERY = 10  # seconds


def common_shape(source: Source, image_size: int) -> tuple[int, int, int]:
    """Return the shape (C, H, W) for all images: grey if all are, and `image_size`, or 28 if all are 28x28, else 32."""
    path = cache_folder() / f"{'-'.join(key_of(source, split) for split in source.splits)}.json"
    try:
        channels, size = json.loads(path.read_text())
    except (OSError, ValueError, TypeError):
        headers = set()
        for split in source.splits:
            for data, name in encoded(source, split):
                with explained(f"the image {name} cannot be read"), Image.open(data) as image:
                    headers.add((image.mode, image.size))
        channels = 1 if {mode for mode, _ in headers} <= {"1", "L", "LA"} else 3
        size = 28 if {size for _, size in headers} == {(28, 28)} else 32
        with contextlib.suppress(OSError):
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(json.dumps([channels, size]))
    return channels, image_size or size, image_size or size


@lru_cache(maxsize=8)
def decoded(source: Source, split: str, shape: tuple[int, int, int]) -> np.ndarray:
    """Return the images of a split as uint8 (N, C, H, W), in memory that all processes of the machine share.

    They are decoded once a machine, into a file in the cache of Hugging Face's `datasets`, and without a
    cache that can be written once a process.
    """
    size = (len(source.splits[split]), *shape)
    code = hashlib.sha256(inspect.getsource(to_pixels).encode()).hexdigest()[:8]
    path = cache_folder() / f"{key_of(source, split)}-{'x'.join(map(str, shape))}-{code}.npy"
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with FileLock(path.with_suffix(".lock")):
            if (images := in_cache(path)) is None:
                beside = path.with_suffix(".part")
                try:
                    with beside.open("wb") as file:
                        header = {"descr": "|u1", "fortran_order": False, "shape": size}
                        np.lib.format.write_array_header_1_0(file, header)
                        file.writelines(image.tobytes() for image in decode(source, split, shape))
                        file.flush()
                        os.fsync(file.fileno())
                    beside.replace(path)
                finally:
                    beside.unlink(missing_ok=True)  # by the process that has the lock, and no other
                images = np.load(path, mmap_mode="r")
        return images
    except OSError as error:
        log.warning("The decoded images of %s cannot be kept in %s: %s", split, path.parent, error)
        return np.fromiter(decode(source, split, shape), np.dtype((np.uint8, shape)), size[0])


def in_cache(path: Path) -> np.ndarray | None:
    """Return the images in a file of the cache; None if there is none, or if it is damaged."""
    try:
        images: np.ndarray = np.load(path, mmap_mode="r")
    except (OSError, ValueError, EOFError):
        return None
    return images


def decode(source: Source, split: str, shape: tuple[int, int, int]) -> Iterator[np.ndarray]:
    """Yield each image of a split as uint8 (C, H, W). Raises UserError that names an image that fails."""
    began, total = time.monotonic(), len(source.splits[split])
    logged = began
    for number, (data, name) in enumerate(encoded(source, split), start=1):
        with explained(f"the image {name} cannot be decoded"), Image.open(data) as image:
            pixels = to_pixels(image, shape).transpose(2, 0, 1)
        yield pixels
        if (now := time.monotonic()) > logged + PROGRESS_EVERY:
            logged, left = now, (now - began) * (total / number - 1)
            log.info("... %s/%s images of %s decoded, about %.0f s left", number, total, split, left)


def to_pixels(image: Image.Image, shape: tuple[int, int, int]) -> np.ndarray:
    """Convert an image to uint8 (H, W, C) for a shape (C, H, W): upright, on white, grey or RGB, cut to the shape.

    The short side is resized, with antialiasing, and the middle of the long side is used.
    """
    if image.mode.startswith(("I", "F")):  # 16 bits or more: `convert` would clip at 255
        raise UserError(f"its mode is {image.mode}; convert the images to 8 bits a channel")
    if (frames := getattr(image, "n_frames", 1)) > 1 and image.format != "MPO":  # a phone's MPO holds a preview, too
        raise UserError(f"it has {frames} frames, and one is expected")
    image = ImageOps.exif_transpose(image)
    if image.has_transparency_data:
        image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image.convert("RGBA"))
    channels, height, width = shape
    image = ImageOps.fit(image.convert("L" if channels == 1 else "RGB"), (width, height), Image.Resampling.BICUBIC)
    return np.asarray(image).reshape(height, width, channels)


def rows_of(source: Source, split: str) -> Iterator[dict[str, Any]]:
    """Yield "bytes" and "path" of each image of a split, as they are stored. Arrow is much faster than single rows."""
    for batch in source.splits[split].select_columns(["image"]).with_format("arrow").iter(1000):
        yield from (row or {"bytes": None, "path": None} for row in batch["image"].to_pylist())


def encoded(source: Source, split: str) -> Iterator[tuple[io.BytesIO | str, str]]:
    """Yield each image of a split as a file or a path, with its name. Raises UserError for a row without an image."""
    for number, row in enumerate(rows_of(source, split)):
        data, path = row["bytes"], row["path"]
        if data is not None:
            yield io.BytesIO(data), f"number {number} of {split}" + f" ({path})" * bool(path)
        elif path:
            yield path, path
        else:
            raise UserError(f"row {number} of {split} has no image")


@lru_cache(maxsize=8)
def key_of(source: Source, split: str) -> str:
    """Return a digest of the encoded images of a split: of their bytes, or of their files' paths and states."""
    digest = hashlib.sha256()
    for row in rows_of(source, split):
        if row["bytes"] is None and row["path"]:
            digest.update(digest_of_files([Path(row["path"])]).encode())
        else:
            digest.update(repr(row["bytes"] and len(row["bytes"])).encode())  # a row without an image counts, too
            digest.update(row["bytes"] or b"")
    return digest.hexdigest()[:20]


def digest_of(*arrays: np.ndarray) -> str:
    """Return a digest of arrays. A memory map is read from its file: its pages would stay in this process's memory."""
    digest = hashlib.sha256()
    for array in arrays:
        if isinstance(array, np.memmap) and array.filename:
            with Path(array.filename).open("rb") as file:
                file.seek(array.offset)
                while block := file.read(2**20):
                    digest.update(block)
        else:
            digest.update(np.ascontiguousarray(array).data)
    return digest.hexdigest()[:16]
