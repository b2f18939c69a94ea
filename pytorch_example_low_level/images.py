"""The decoded images of the server and of the nodes, and the partitions of a data set for the nodes."""

from __future__ import annotations

import unicodedata
import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor

from pytorch_example_low_level.config import Purpose, RunConfig, UserError, explained, log, random_stream
from pytorch_example_low_level.pixels import common_shape, decoded, digest_of
from pytorch_example_low_level.sources import Source, labels_of, read

if TYPE_CHECKING:
    from flwr_datasets.partitioner import Partitioner

VALIDATION_SHARE = 0.2  # of a node's images; the rest is for training
TEST_SPLITS = ("test", "validation", "valid")  # the first of these that has labels is used
MIN_PARTITION = 5  # images: four to train on, one to validate on


@dataclass(frozen=True)
class Split:
    """Decoded images (N, C, H, W) as uint8, with C = 1 or 3, their labels (N,) as int64, and the class names."""

    images: Tensor
    labels: Tensor
    class_names: Sequence[str]
    training: str = ""  # of the server's data: a digest of the training images, if there are any
    node_names: Sequence[str] = ()  # of the server's data: the nodes for which the training images are split

    def __len__(self) -> int:
        """Return N."""
        return len(self.labels)

    @property
    def facts(self) -> dict[str, Any]:
        """Return what the server and the nodes must agree on."""
        return {"class-names": list(self.class_names), "image-shape": list(self.images.shape[1:])}

    def fingerprint(self) -> str:
        """Return a digest of the images and labels, by which a resumed run recognises its data."""
        return digest_of(self.images.numpy(), self.labels.numpy()) + self.training

    def numbered_as(self, class_names: Sequence[str]) -> Split:
        """Return the split with its labels numbered as in `class_names`. Raises UserError for a class not in there.

        Names are compared in Unicode's form NFC: a Mac writes é as two characters, and Linux as one.
        """
        known = {unicodedata.normalize("NFC", name): number for number, name in enumerate(class_names)}
        mine = [unicodedata.normalize("NFC", name) for name in self.class_names]
        unknown = [name for name in mine if name not in known]
        if unknown:
            raise UserError(
                f"this node's classes are {list(self.class_names)}, and the server's are {list(class_names)}: "
                f"not among them: {unknown}. Rename the class folders, or the classes of a data set "
                "(rows.cast_column('label', datasets.ClassLabel(names=[...])))"
            )
        return Split(self.images, torch.tensor([known[name] for name in mine])[self.labels], class_names)


# ------------------------------------------------------------------ What the task asks for


def load_test_split(config: RunConfig) -> Split:
    """Load the images for the central evaluation, and log what the data set holds. Raises UserError."""
    with explained(f"Cannot use dataset {config.dataset!r}"):
        source, shape = opened(config)
        splits = source.splits
        name = next((n for n in TEST_SPLITS if n in splits and set(splits[n].unique("label")) - {None, -1}), None)
        if name is None:
            raise UserError(f"it needs a split {' or '.join(TEST_SPLITS)} that has labels; it has {list(splits)}")
        images, labels = decoded(source, name, shape), labels_of(source, name)
        names = site_names(source) if config.partitioner == "natural" else []
        sites = "\n".join(splits["train"]["site"][:]) if names else ""
        parts = [decoded(source, "train", shape), labels_of(source, "train")] if "train" in splits else []
        training = digest_of(*parts, np.frombuffer(sites.encode(), np.uint8)) if parts else ""
        log.info("📖 Read %s: %s", config.dataset, summary(source, shape))
        if parts and (unseen := [source.class_names[label] for label in np.setdiff1d(labels, parts[1])]):
            log.warning("Classes in split %s without training images, so they cannot be learned: %s", name, unseen[:10])
        return Split(torch.from_numpy(np.array(images)), torch.from_numpy(labels), source.class_names, training, names)


def load_partition(number: int, num_partitions: int, config: RunConfig) -> dict[str, Split]:
    """Load the "train" (80 %) and the "validation" (20 %) part of one partition of a data set. Raises UserError."""
    with explained(f"Cannot use dataset {config.dataset!r} for {num_partitions} nodes"):
        source, shape = opened(config)
        rows = rows_of_partition(config, num_partitions, number)
        return train_and_validation(decoded(source, "train", shape), source, "train", rows, config.seed, number)


@lru_cache(maxsize=4)
def load_folder(path: str, number: int, config: RunConfig, shape: tuple[int, int, int] | None) -> dict[str, Split]:
    """Load the "train" and the "validation" part of a node's own folder, in the server's shape. Raises UserError."""
    with explained(
        f"Cannot use data-path {path!r}",
        " -- Allowed: a folder of class folders, one of save_to_disk, or Parquet files.",
    ):
        source = read(path, config.image_column, config.label_column, "", of_node=True)
        found = common_shape(source, config.image_size)
        if len(source.splits) > 1:
            raise UserError(f"it has the splits {list(source.splits)}, and needs one: save only the training images")
        (split,) = source.splits
        if shape and shape[0] < found[0]:
            log.info("The images of %s are RGB and the server's are grey: they are converted.", path)
        log.info("📖 Read %s: %s", path, summary(source, shape or found))
        pixels = decoded(source, split, shape or found)
        return train_and_validation(pixels, source, split, np.arange(len(pixels)), config.seed, number)


def train_and_validation(
    pixels: np.ndarray, source: Source, split: str, rows: np.ndarray, seed: int, number: int
) -> dict[str, Split]:
    """Split a node's rows at random; the same seed and number give the same split."""
    order = rows[random_stream(seed, Purpose.SPLIT, partition=number).permutation(len(rows))]
    cut, labels = int(len(rows) * VALIDATION_SHARE), labels_of(source, split)
    parts = {"train": order[cut:], "validation": order[:cut]}
    return {
        part: Split(torch.from_numpy(pixels[chosen]), torch.from_numpy(labels[chosen]), source.class_names)
        for part, chosen in parts.items()
    }


def partitions(config: RunConfig, num_partitions: int) -> Partitioner:
    """Return the partitioner of flwr-datasets for the training images, whose column "row" has their numbers."""
    source, _ = opened(config)
    how = (config.partitioner, config.dirichlet_alpha, config.classes_per_node, config.seed)
    return _partitions(source, num_partitions, *how)


@lru_cache(maxsize=1)  # it takes seconds
def _partitions(
    source: Source, num_partitions: int, partitioner: str, alpha: float, classes_per_node: int, seed: int
) -> Partitioner:
    import datasets
    from flwr_datasets import partitioner as how

    if "train" not in source.splits:
        raise UserError(f"there is no split train; the splits are {list(source.splits)}")
    labels = labels_of(source, "train")
    if len(labels) < MIN_PARTITION * num_partitions:
        raise UserError(f"{len(labels)} training images are too few for {num_partitions} nodes ({MIN_PARTITION} each)")
    features = {"row": datasets.Value("int64"), "label": datasets.ClassLabel(names=source.class_names)}
    columns: dict[str, Any] = {"row": np.arange(len(labels)), "label": labels}
    if partitioner == "natural":
        features["site"], columns["site"] = datasets.Value("string"), source.splits["train"]["site"][:]
        if len(names := site_names(source)) != num_partitions:
            raise UserError(
                f"the data is that of {len(names)} nodes ({', '.join(names[:10])}), not of {num_partitions}"
            )
    rows = datasets.Dataset.from_dict(columns, features=datasets.Features(features))
    if partitioner == "iid":
        dealt: Partitioner = how.IidPartitioner(num_partitions)
        rows = rows.shuffle(seed=seed)  # IidPartitioner takes consecutive rows, which may be sorted by label
    elif partitioner == "natural":
        dealt = how.NaturalIdPartitioner("site")
    elif partitioner == "pathological":
        if num_partitions * classes_per_node < len(source.class_names):
            raise UserError(
                f"{num_partitions} nodes with classes-per-node={classes_per_node} cannot hold all "
                f"{len(source.class_names)} classes; use more nodes or a larger classes-per-node"
            )
        mode = "first-deterministic"  # each class is on a node, if there are enough nodes
        dealt = how.PathologicalPartitioner(num_partitions, "label", classes_per_node, mode, seed=seed)
    else:
        # Label skew after Yurochkin et al. 2019 (arXiv:1905.12022).
        dealt = how.DirichletPartitioner(num_partitions, "label", alpha, MIN_PARTITION, seed=seed)
        rows = rows.with_format("arrow")  # 40 times as fast
    dealt.dataset = rows
    return dealt


def rows_of_partition(config: RunConfig, num_partitions: int, number: int) -> np.ndarray:
    """Return the numbers of the training images of one partition. Raises UserError."""
    if not 0 <= number < num_partitions:
        raise UserError(f"partition-id is {number}; allowed are 0 to {num_partitions - 1}")
    with warnings.catch_warnings(action="ignore"):  # the partitioner warns of each retry, and raises if all fail
        return _rows(partitions(config, num_partitions), number)


@lru_cache(maxsize=1024)  # 8 bytes an image; asking the partitioner takes about as long as evaluating a small node
def _rows(dealt: Partitioner, number: int) -> np.ndarray:
    return np.asarray(dealt.load_partition(number).with_format("numpy")["row"][:], dtype=np.int64)


def site_names(source: Source) -> list[str]:
    """Return the sites of the training images, in the order of the partitions."""
    return sorted(set(source.splits["train"]["site"])) if "train" in source.splits else []


def summary(source: Source, shape: tuple[int, int, int]) -> str:
    """Say what was read: kind, images of each split, classes, size and colours."""
    counts = ", ".join(f"{len(rows):,} {split}" for split, rows in source.splits.items())
    names = ", ".join(source.class_names[:10]) + (", ..." if len(source.class_names) > 10 else "")
    colours = f"{shape[2]}x{shape[1]} {'grey' if shape[0] == 1 else 'RGB'}"
    return f"{source.kind}; images: {counts}; {len(source.class_names)} classes ({names}); {colours}"


def opened(config: RunConfig) -> tuple[Source, tuple[int, int, int]]:
    """Return the data set of the run configuration, and the shape that all of its images get."""
    site_column = config.partition_column if config.partitioner == "natural" else ""
    source = read(config.dataset, config.image_column, config.label_column, site_column)
    return source, common_shape(source, config.image_size)
