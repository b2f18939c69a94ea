"""Images in, tensors out: data sets and folders, their columns and pixels, and the partitions of the nodes."""

from __future__ import annotations

import hashlib
import os
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import lru_cache
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor

from pytorch_example_low_level.config import Purpose, UserError, explained, log, random_stream

if TYPE_CHECKING:
    import datasets
    from flwr_datasets.partitioner import Partitioner
    from PIL import Image

BUNDLED = "fashion-mnist-sample"
ON_THE_HUB = "zalando-datasets/fashion_mnist"  # used if the bundled images are not installed
VALIDATION_SHARE = 0.2  # of a node's images; the rest is for training
TEST_SPLITS = ("test", "validation", "valid")  # the first of these that has labels is used
MIN_PARTITION = 5  # images: four to train on, one to validate on
ALLOWED = (
    f" -- Allowed: dataset={BUNDLED!r} (its images come with `pip install .` in a clone of the app; without them it is "
    f"{ON_THE_HUB} on the Hub), the absolute path of a folder that datasets.load_dataset or datasets.load_from_disk "
    "can read, or the name of an image-classification data set on the Hugging Face Hub (needs network; with "
    "HF_HUB_OFFLINE=1 what is in the cache is used at once)."
)


@dataclass(frozen=True)
class Split:
    """Decoded images (N, C, H, W) as uint8, with C = 1 or 3, their labels (N,) as int64, and the class names."""

    images: Tensor
    labels: Tensor
    class_names: Sequence[str]

    def __len__(self) -> int:
        """Return N."""
        return len(self.labels)

    @property
    def facts(self) -> dict[str, Any]:
        """Return what the server and the nodes must agree on."""
        return {"class-names": list(self.class_names), "image-shape": list(self.images.shape[1:])}

    def fingerprint(self) -> str:
        """Return a digest of the images and labels, by which a resumed run recognises its data."""
        return hashlib.sha256(self.images.numpy().tobytes() + self.labels.numpy().tobytes()).hexdigest()[:16]

    def numbered_as(self, class_names: Sequence[str]) -> Split:
        """Return the split with its labels numbered as in `class_names`. Raises UserError for a class not in there."""
        unknown = [name for name in self.class_names if name not in class_names]
        if unknown:
            raise UserError(
                f"this node's classes are {list(self.class_names)}, and the server's are {list(class_names)}: "
                f"{unknown} is not among them. Rename: rows.cast_column('label', datasets.ClassLabel(names=[...]))"
            )
        labels = torch.tensor([class_names.index(name) for name in self.class_names])[self.labels]
        return Split(self.images, labels, class_names)


@lru_cache(maxsize=256)
def load_partition(
    partition_id: int, num_partitions: int, dataset: str, partitioner: str, alpha: float, seed: int
) -> dict[str, Split]:
    """Load the "train" (80 %) and the "validation" (20 %) part of one partition of a data set. Raises UserError.

    A process caches the last 256 partitions it used, which take at most about one copy of the training images.
    """
    what = f"Cannot use dataset {dataset!r} for {num_partitions} nodes"
    # The partitioner warns of each retry, and raises if all fail.
    with explained(what, ALLOWED), warnings.catch_warnings(action="ignore"):
        rows = partitions(dataset, partitioner, num_partitions, alpha, seed).load_partition(partition_id)
        return _train_and_validation(_to_split(rows), seed, partition_id)


@lru_cache(maxsize=4)
def load_folder(path: str, partition_id: int, seed: int) -> dict[str, Split]:
    """Load the "train" and the "validation" part of a node's own folder of images. Raises UserError."""
    with explained(f"Cannot use data-path {path!r}", ALLOWED):
        splits = _load(path)
        rows = _decode(splits, "train" if "train" in splits else next(iter(splits)), in_memory=True)
        return _train_and_validation(_to_split(rows), seed, partition_id)


def load_test_split(dataset: str) -> Split:
    """Load the images for the central evaluation. Raises UserError."""
    with explained(f"Cannot use dataset {dataset!r}", ALLOWED):
        splits = _load(dataset)
        name = next((n for n in TEST_SPLITS if n in splits and set(splits[n].unique("label")) - {None, -1}), None)
        if name is None:
            raise UserError(f"there is no split {' or '.join(TEST_SPLITS)} with labels; the splits are {list(splits)}")
        return _to_split(_decode(splits, name))


@lru_cache(maxsize=1)  # one per process: loading and partitioning take seconds
def partitions(
    dataset: str, partitioner: str, num_partitions: int, alpha: float, seed: int, *, decoded: bool = True
) -> Partitioner:
    """Return the partitioner of flwr-datasets that holds the training split of a data set."""
    from flwr_datasets.partitioner import DirichletPartitioner, IidPartitioner

    splits = _load(dataset)
    if "train" not in splits:
        raise UserError(f"there is no split train; the splits are {list(splits)}")
    rows = (_decode(splits, "train") if decoded else splits["train"]).with_format("arrow")  # 40 times as fast
    if len(rows) < MIN_PARTITION * num_partitions:
        raise UserError(f"{len(rows)} training images are too few for {num_partitions} nodes ({MIN_PARTITION} each)")
    if partitioner == "iid":
        dealt: Partitioner = IidPartitioner(num_partitions)
        rows = rows.shuffle(seed=seed)  # IidPartitioner takes consecutive rows, which may be sorted by label
    else:
        # Label skew after Yurochkin et al. 2019 (arXiv:1905.12022).
        dealt = DirichletPartitioner(num_partitions, "label", alpha, min_partition_size=MIN_PARTITION, seed=seed)
    dealt.dataset = rows
    return dealt


def _train_and_validation(data: Split, seed: int, partition_id: int) -> dict[str, Split]:
    """Split a node's images at random; the same seed and partition give the same split."""
    order = random_stream(seed, Purpose.SPLIT, partition=partition_id).permutation(len(data))
    cut = int(len(data) * VALIDATION_SHARE)
    parts = {"train": order[cut:], "validation": order[:cut]}
    return {part: Split(data.images[rows], data.labels[rows], data.class_names) for part, rows in parts.items()}


def _load(dataset: str) -> datasets.DatasetDict:
    """Load all splits of a data set, with the columns "image" and "label"."""
    import datasets

    datasets.disable_progress_bars()
    if dataset == BUNDLED:
        spec = find_spec("fashion_mnist_sample")  # the app from Flower Hub has no images
        if spec and spec.origin and Path(spec.origin).with_name("data").is_dir():
            dataset = str(Path(spec.origin).parent)
        else:
            log.info("The bundled images are not installed; taking %s from the Hugging Face Hub", ON_THE_HUB)
            dataset = ON_THE_HUB
    path = Path(dataset).expanduser()
    if (path / "dataset_dict.json").exists() or (path / "state.json").exists():
        splits = datasets.load_from_disk(path)  # a folder of `save_to_disk`
    elif dataset.startswith(("/", ".", "~")) and not path.is_dir():
        raise UserError(f"there is no folder {path.absolute()}")
    else:
        splits = datasets.load_dataset(str(path.resolve()) if path.is_dir() else dataset)
        if path.is_dir() and next(iter(splits.values())).column_names == ["image"]:  # a folder with only one class
            splits = datasets.load_dataset("imagefolder", data_dir=str(path.resolve()), drop_labels=False)
    return _canonical(splits if isinstance(splits, datasets.DatasetDict) else datasets.DatasetDict(train=splits))


def _canonical(splits: datasets.DatasetDict) -> datasets.DatasetDict:
    """Find the image and the label column by type, or take the only other column as label; rename both."""
    import datasets

    features = next(iter(splits.values())).features
    images = [name for name, feature in features.items() if isinstance(feature, datasets.Image)]
    labels = [name for name, feature in features.items() if isinstance(feature, datasets.ClassLabel)]
    others = [name for name in features if name not in images[:1]]
    columns = f"the columns are {dict(features)}"
    if not images:
        raise UserError(f"no Image column; {columns}. For bytes or paths: rows.cast_column('...', datasets.Image())")
    if not labels:
        lone = len(others) == 1 and isinstance(features[others[0]], datasets.Value)
        if not lone or len({frozenset(rows.unique(others[0])) for rows in splits.values()}) > 1:
            raise UserError(
                f"no ClassLabel column; {columns}. Make one, in all splits alike: rows.class_encode_column("
                f"{[*others, 'label'][0]!r}) or rows.cast_column('label', datasets.ClassLabel(names=[...]))"
            )
        labels, splits = others, splits.class_encode_column(others[0])
    splits = splits.select_columns([images[0], labels[0]])
    return splits.rename_columns({o: n for o, n in ((images[0], "image"), (labels[0], "label")) if o != n})


def _decode(splits: datasets.DatasetDict, name: str, *, in_memory: bool = False) -> datasets.Dataset:
    """Replace the column "image" of a split by "pixels", the bytes (H, W, C). Hugging Face caches the result.

    All splits get the same format. Images become RGB unless about a hundred of each split are all grey, and 32x32
    unless these are all 28x28.
    """
    splits = splits.with_format(None)
    sampled = (rows[i]["image"] for rows in splits.values() for i in range(0, len(rows), max(1, len(rows) // 100)))
    formats = {(image.mode, image.size) for image in sampled}
    in_channels = 1 if {mode for mode, _ in formats} <= {"1", "L"} else 3
    to_pixels = pixel_converter(in_channels, 28 if {size for _, size in formats} == {(28, 28)} else 32)

    def to_bytes(batch: dict[str, list[Any]]) -> dict[str, list[bytes]]:
        return {"pixels": [to_pixels(image).tobytes() for image in batch["image"]]}

    rows = splits[name]
    in_memory = in_memory or not all(os.access(Path(file["filename"]).parent, os.W_OK) for file in rows.cache_files)
    # Batches are small because photos are decoded at their full size.
    return rows.map(to_bytes, batched=True, batch_size=50, remove_columns=["image"], keep_in_memory=in_memory)


def pixel_converter(in_channels: int, size: int) -> Callable[[Image.Image], np.ndarray]:
    """Return a function that converts an image to uint8 (size, size, in_channels): grey or RGB, resized if necessary.

    Hugging Face's cache notices a change in a nested function; it knows other functions only by their names.
    """

    def to_pixels(image: Image.Image) -> np.ndarray:
        if image.mode.startswith(("I", "F")):  # 16 bits or more: `convert` would clip at 255
            raise UserError(f"an image has mode {image.mode}; convert the images to 8 bits a channel")
        image = image.convert("L" if in_channels == 1 else "RGB").resize((size, size))
        return np.asarray(image).reshape(size, size, in_channels)

    return to_pixels


def _to_split(rows: datasets.Dataset) -> Split:
    """Convert decoded rows to tensors. Raises UserError for a missing label."""
    columns = rows.with_format("arrow")[:]
    pixels, labels = columns["pixels"].to_pylist(), columns["label"].to_pylist()
    if any(label is None or label < 0 for label in labels):
        raise UserError("some images have no label")
    size = 28 if not pixels or len(pixels[0]) % 28 == 0 else 32  # 32 * 32 * C is not a multiple of 28
    array = np.frombuffer(b"".join(pixels), np.uint8).reshape(len(labels), size, size, -1)
    images = torch.from_numpy(array.transpose(0, 3, 1, 2).copy(order="C"))
    return Split(images, torch.tensor(labels, dtype=torch.int64), rows.features["label"].names)
