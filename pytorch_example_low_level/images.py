"""Folders and data sets of images, their classes and columns, and the partitions of the nodes.

What a folder holds decides how it is read, never what its files are called. An image is used, or an error names it.
"""

from __future__ import annotations

import json
import os
import re
import unicodedata
import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor

from pytorch_example_low_level.config import Purpose, RunConfig, UserError, explained, log, random_stream
from pytorch_example_low_level.pixels import (
    Source,
    cache_folder,
    common_shape,
    decoded,
    digest_of,
    digest_of_files,
    labels_of,
)

if TYPE_CHECKING:
    import datasets
    from flwr_datasets.partitioner import Partitioner

BUNDLED = "fashion-mnist-sample"
ON_THE_HUB = "zalando-datasets/fashion_mnist"  # used if the bundled images are not installed
VALIDATION_SHARE = 0.2  # of a node's images; the rest is for training
SPLITS = {"train": "train", "test": "test", "validation": "validation", "valid": "validation", "val": "validation"}
TEST_SPLITS = ("test", "validation", "valid")  # the first of these that has labels is used
MIN_PARTITION = 5  # images: four to train on, one to validate on
SUFFIXES = {".jpg", ".jpeg", ".png", ".bmp", ".gif", ".ppm", ".pgm", ".tif", ".tiff", ".webp"}
LEFT_OUT = {"__MACOSX", "Thumbs.db", "desktop.ini"}  # with hidden files: what systems add to folders
BESIDE_TABLES = {".md", ".json", ".py", ".txt", ".yaml", ".yml", ""}  # documentation, as data sets on the Hub have it
ALLOWED = (
    f" -- Allowed: dataset={BUNDLED!r} (its images come with `pip install .` in a clone of the app; without them it is "
    f"{ON_THE_HUB} on the Hub), the absolute path of a folder (class folders in train and test, a folder of "
    "save_to_disk, or Parquet files), or owner/name or owner/name:configuration on the Hugging Face Hub (needs "
    "network; with HF_HUB_OFFLINE=1 what is in the cache is used at once)."
)


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
                f"{unknown} is not among them. Rename: rows.cast_column('label', datasets.ClassLabel(names=[...]))"
            )
        return Split(self.images, torch.tensor([known[name] for name in mine])[self.labels], class_names)


# ------------------------------------------------------------------ What the task asks for


def load_test_split(config: RunConfig) -> Split:
    """Load the images for the central evaluation, and log what the data set holds. Raises UserError."""
    with explained(f"Cannot use dataset {config.dataset!r}", ALLOWED):
        source, shape = opened(config)
        splits = source.splits
        name = next((n for n in TEST_SPLITS if n in splits and set(splits[n].unique("label")) - {None, -1}), None)
        if name is None:
            raise UserError(f"there is no split {' or '.join(TEST_SPLITS)} with labels; the splits are {list(splits)}")
        images, labels = decoded(source, name, shape), labels_of(source, name)
        names = site_names(source) if config.partitioner == "natural" else []
        sites = "\n".join(splits["train"]["site"][:]) if names else ""
        parts = [decoded(source, "train", shape), labels_of(source, "train")] if "train" in splits else []
        training = digest_of(*parts, np.frombuffer(sites.encode(), np.uint8)) if parts else ""
        log.info("📖 Read %s: %s", config.dataset, summary(source, shape))
        return Split(torch.from_numpy(np.array(images)), torch.from_numpy(labels), source.class_names, training, names)


def load_partition(number: int, num_partitions: int, config: RunConfig) -> dict[str, Split]:
    """Load the "train" (80 %) and the "validation" (20 %) part of one partition of a data set. Raises UserError."""
    with explained(f"Cannot use dataset {config.dataset!r} for {num_partitions} nodes", ALLOWED):
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
            raise UserError(f"it has the splits {list(source.splits)}, and a node's images are in one; save only that")
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


# --------------------------------------------------------- Reading folders and data sets


def opened(config: RunConfig) -> tuple[Source, tuple[int, int, int]]:
    """Return the data set of the run configuration, and the shape that all of its images get."""
    site_column = config.partition_column if config.partitioner == "natural" else ""
    source = read(config.dataset, config.image_column, config.label_column, site_column)
    return source, common_shape(source, config.image_size)


@lru_cache(maxsize=4)  # reading takes a second
def read(name: str, image_column: str, label_column: str, site_column: str, *, of_node: bool = False) -> Source:
    """Find out what a folder or data set holds. Nothing is decoded. Raises UserError if it is of no known kind."""
    import datasets

    datasets.disable_progress_bars()
    name = bundled() if name == BUNDLED and not of_node else name
    folder = Path(name).expanduser()
    if folder.is_dir():
        files = files_below(folder)
        if any((folder / file).exists() for file in ("dataset_dict.json", "state.json")):
            kind, loaded = "a saved data set", datasets.load_from_disk(str(folder))
        elif any(file.suffix == ".parquet" for file in files):
            kind, loaded = "tables", load_tables(folder, files)
        else:
            return class_folders(folder, files, of_node=of_node)
    elif of_node or name.startswith(("/", ".", "~")) or not re.fullmatch(r"[\w.-]+/[\w.-]+(:[\w.-]+)?", name):
        raise UserError(f"there is no folder {folder.absolute()}")
    else:
        kind, (hub, *configuration) = "on the Hub", name.split(":")
        loaded = datasets.load_dataset(hub, *configuration)
    splits = dict(loaded) if isinstance(loaded, datasets.DatasetDict) else {"train": loaded}
    return with_columns(kind, splits, image_column, label_column, site_column)


def bundled() -> str:
    """Return the folder of the bundled images, or the whole data set on the Hub: the app from Flower Hub has none."""
    spec = find_spec("fashion_mnist_sample")
    if spec and spec.origin and Path(spec.origin).with_name("data").is_dir():
        return str(Path(spec.origin).parent)
    log.info("The bundled images are not installed; taking %s from the Hugging Face Hub", ON_THE_HUB)
    return ON_THE_HUB


def files_below(folder: Path) -> list[Path]:
    """Return the files in a folder, at any depth and behind links. Raises UserError for a link to a folder above it."""
    found = []

    def fail(error: OSError) -> None:
        raise error  # os.walk would leave out a folder that it cannot read

    for at, folders, files in os.walk(folder, followlinks=True, onerror=fail):
        here = Path(at)
        if here.is_symlink() and here.resolve() in {parent.resolve() for parent in here.parents}:
            raise UserError(f"{here} is a link to a folder that it is in")
        folders[:] = sorted(name for name in folders if is_visible(name))
        found += [here / name for name in sorted(files) if is_visible(name)]
    if other := next((path for path in found if not path.is_file()), None):
        raise UserError(f"{other} is not a file, or a link to nothing")
    return found


def is_visible(name: str) -> bool:
    """Return whether a file or folder is the user's: hidden ones, and some with fixed names, are added by systems."""
    return not name.startswith(".") and name not in LEFT_OUT


def class_folders(folder: Path, files: list[Path], *, of_node: bool) -> Source:
    """Read ROOT/<class>/** of a node, or ROOT/<split>/<class>/** of a data set. Raises UserError for anything else."""
    import datasets

    tops = sorted(entry for entry in folder.iterdir() if is_visible(entry.name))
    are_splits = bool(tops) and all(entry.is_dir() and entry.name.lower() in SPLITS for entry in tops)
    depth = 2 if of_node else 3
    odd = [f for f in files if f.suffix.lower() not in SUFFIXES or len(f.relative_to(folder).parts) < depth]
    roots = {"train": folder} if of_node else {SPLITS.get(entry.name.lower(), ""): entry for entry in tops}
    nested = are_splits and all(len(file.relative_to(folder).parts) > depth for file in files)
    if not files or odd or (nested if of_node else not are_splits or len(roots) != len(tops)):
        example = "<class>/1.png" if of_node else "train/<class>/1.png and test/<class>/2.png"
        some = [file.relative_to(folder).as_posix() for file in (odd or files)[:5]]
        of_which = f", {len(odd)} of them outside a class folder or not an image" if odd else ""
        hint = ". Its folders are splits: give data-path the folder train" if of_node and nested else ""
        raise UserError(
            f"{folder} has {len(files)} files{of_which}: {some}. Expected are only images "
            f"({', '.join(sorted(SUFFIXES))}) in folders named by their class, such as {example}{hint}"
        )
    found = [(root.name, entry.name) for root in roots.values() for entry in root.iterdir() if entry.is_dir()]
    found = [(root, unicodedata.normalize("NFC", name)) for root, name in found if is_visible(name)]
    names = sorted({name for _, name in found})
    if len(found) != len(set(found)):
        raise UserError(f"{folder} has two class folders whose names differ only in Unicode's normal form")
    if not of_node and not 1 < len(names) < len(files):
        raise UserError(f"{folder} has {len(files)} images and {len(names)} classes: {names[:10]}")
    splits = {}
    for split, root in roots.items():
        mine = [file for file in files if root in file.parents]
        labels = [names.index(unicodedata.normalize("NFC", file.relative_to(root).parts[0])) for file in mine]
        columns = {"image": [{"path": str(file), "bytes": None} for file in mine], "label": labels}
        features = {"image": datasets.Image(decode=False), "label": datasets.Value("int64")}
        splits[split] = datasets.Dataset.from_dict(columns, features=datasets.Features(features))
    return Source("class folders", splits, names)


def load_tables(folder: Path, files: list[Path]) -> datasets.DatasetDict:
    """Load Parquet files as the Hub lays them out. Raises UserError if some of the files would be left out."""
    import datasets

    if re.search(r"[\[\]*?]|::", str(folder.absolute())):
        raise UserError(f"rename {folder}: `datasets` reads brackets, *, ? and :: in a path as patterns")
    others = [str(file) for file in files if file.suffix not in {*BESIDE_TABLES, ".parquet"}]
    used = {
        Path(file).resolve()
        for files in datasets.load_dataset_builder(str(folder)).config.data_files.values()
        for file in files
    }
    others += [str(file) for file in files if file.suffix == ".parquet" and file.resolve() not in used]
    if others:
        raise UserError(f"beside its tables, {folder} has files that would be left out: {others[:5]}")
    with_classes = {json.dumps(classes_in(file), sort_keys=True): file for file in files if file.suffix == ".parquet"}
    if len(with_classes) > 1:  # `datasets` would read the numbers of all with the names of the first
        found = [f"{file}: {names}" for names, file in with_classes.items()][:5]
        raise UserError(f"the tables have different classes: {'; '.join(found)}")
    # `datasets` recognises a file in its cache by its path and time alone.
    return datasets.load_dataset(str(folder), cache_dir=str(cache_folder() / f"tables-{digest_of_files(files)}"))


def classes_in(table: Path) -> dict[str, Any]:
    """Return the names of the classes of each ClassLabel column in a Parquet file."""
    import pyarrow.parquet

    about = json.loads((pyarrow.parquet.read_schema(table).metadata or {}).get(b"huggingface", b"{}"))
    features = about.get("info", {}).get("features", {})
    return {name: of["names"] for name, of in features.items() if isinstance(of, dict) and "names" in of}


def with_columns(
    kind: str, splits: dict[str, datasets.Dataset], image_column: str, label_column: str, site_column: str
) -> Source:
    """Find the image, the label and the partition column. Raises UserError where there is a choice."""
    import datasets

    features = next(iter(splits.values())).features
    if any(rows.features != features for rows in splits.values()):
        raise UserError(
            f"the splits have different columns: { {name: rows.features for name, rows in splits.items()} }"
        )
    images = [name for name, feature in features.items() if isinstance(feature, datasets.Image)]
    named = [name for name, feature in features.items() if isinstance(feature, datasets.ClassLabel)]
    plain = [
        n
        for n, f in features.items()
        if isinstance(f, datasets.Value) and re.match("u?int|bool|(large_)?string", f.dtype)
    ]
    image = choose("image-column", image_column, ("image", "img"), images, images, features)
    label = choose("label-column", label_column, ("label",), named or plain, named + plain, features)
    total = sum(len(rows) for rows in splits.values())
    values = sorted({value for rows in splits.values() for value in rows.unique(label)} - {None})
    if label in plain and -1 in values and values != [-1, 1]:
        raise UserError(
            f"column {label!r} has -1, which may be a class or mean that there is none: make it a ClassLabel"
        )
    names = list(features[label].names) if label in named else [str(value) for value in values]
    if len({unicodedata.normalize("NFC", name) for name in names}) < len(names):
        raise UserError(f"column {label!r} has classes whose names differ only in Unicode's normal form")
    numbers = {value: value if label in named else number for number, value in enumerate(values)}
    if label in plain and len(values) == total:
        raise UserError(f"column {label!r} has as many values as there are images ({total}), so it cannot be the label")
    result = {}
    for split, rows in splits.items():
        kept = rows.select_columns([image]).cast_column(image, datasets.Image(decode=False))
        kept = kept if image == "image" else kept.rename_column(image, "image")
        kept = kept.add_column("label", [numbers.get(value) for value in rows[label][:]])
        if site_column and site_column not in features:
            raise UserError(f"there is no partition-column {site_column!r}; the columns are {list(features)}")
        if site_column:
            sites = rows[site_column][:]
            if None in sites:
                raise UserError(f"row {sites.index(None)} of {split} has no {site_column!r}")
            kept = kept.add_column("site", [str(site) for site in sites])
        result[split] = kept
    return Source(f"{kind}, columns {image!r} and {label!r}", result, names)


def choose(
    key: str, wanted: str, usual: Sequence[str], candidates: list[str], allowed: list[str], features: dict[str, Any]
) -> str:
    """Return the column that is wanted, has a usual name, or is the only candidate. Raises UserError."""
    found = [wanted] if wanted else [name for name in usual if name in features] or candidates
    if len(found) != 1 or found[0] not in allowed:
        types = {name: getattr(feature, "dtype", feature) for name, feature in features.items()}
        choice = f"set it to one of {candidates or allowed}" if allowed else "no column has the type that it needs"
        raise UserError(f"{key} is {wanted!r}; {choice}. The columns are {types}")
    return found[0]
