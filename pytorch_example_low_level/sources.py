"""Folders and data sets: which images they hold, their classes and columns. Nothing is decoded here.

What a folder holds decides how it is read, never what its files are called. An image is used, or an error names it.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
import unicodedata
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import lru_cache
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from pytorch_example_low_level.config import UserError, explained, log

if TYPE_CHECKING:
    import datasets

BUNDLED = "fashion-mnist-sample"
ON_THE_HUB = "zalando-datasets/fashion_mnist"  # used if the bundled images are not installed
SPLITS = {"train": "train", "test": "test", "validation": "validation", "valid": "validation", "val": "validation"}
SUFFIXES = {".jpg", ".jpeg", ".png", ".bmp", ".gif", ".ppm", ".pgm", ".tif", ".tiff", ".webp"}
LEFT_OUT = {"__MACOSX", "Thumbs.db", "desktop.ini"}  # with hidden files: what systems add to folders
BESIDE_TABLES = {".md", ".json", ".py", ".txt", ".yaml", ".yml", ""}  # documentation, as data sets on the Hub have it
ALLOWED = (
    f" -- Allowed: dataset={BUNDLED!r} (its images come with `pip install .` in a clone of the app; without them it is "
    f"{ON_THE_HUB} on the Hub), the absolute path of a folder (class folders in train and test, a folder of "
    "save_to_disk, or Parquet files), or owner/name or owner/name:configuration on the Hugging Face Hub (needs "
    "network; with HF_HUB_OFFLINE=1 what is in the cache is used at once)."
)


@dataclass(frozen=True, eq=False)  # compared by identity, so that it can be the key of a cache
class Source:
    """What a folder or data set holds: undecoded images, their labels, and perhaps the sites that they come from."""

    kind: str
    splits: dict[str, datasets.Dataset]  # columns "image" (bytes or path), "label" (ClassLabel or int), perhaps "site"
    class_names: list[str]


@lru_cache(maxsize=4)  # reading takes a second
def read(name: str, image_column: str, label_column: str, site_column: str, *, of_node: bool = False) -> Source:
    """Find out what a folder or data set holds. Nothing is decoded. Raises UserError if it is of no known kind."""
    import datasets

    datasets.disable_progress_bars()
    name = bundled() if name == BUNDLED and not of_node else name
    folder = Path(name).expanduser()
    on_the_hub = not of_node and re.fullmatch(r"[\w-][\w.-]*/[\w.-]+(:[\w.-]+)?", name)
    if on_the_hub and folder.is_dir():
        raise UserError(
            f"{name!r} may be on the Hub, and {Path.cwd()} has a folder of this name: rename it or give its "
            "absolute path"
        )
    if folder.is_dir():
        files = files_below(folder)
        if any((folder / file).exists() for file in ("dataset_dict.json", "state.json")):
            kind, loaded = "a saved data set", load_saved(folder, files)
        elif any(file.suffix == ".parquet" for file in files):
            kind, loaded = "tables", load_tables(folder, files)
        elif site_column:
            raise UserError(f"{folder} has no tables, so it has no partition-column, which partitioner='natural' needs")
        else:
            return class_folders(folder, files, of_node=of_node)
    elif on_the_hub:
        kind, (hub, *configuration) = "on the Hub", name.split(":")
        with explained("it cannot be loaded from the Hub", ALLOWED):
            loaded = datasets.load_dataset(hub, *configuration)
    else:
        raise UserError(f"there is no folder {folder.absolute()}{'' if of_node else ALLOWED}")
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
    if unreadable := [path for path in found if os.fsencode(path) != str(path).encode(errors="replace")]:
        raise UserError(f"rename {unreadable[:5]}: these names are not in UTF-8")
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
        folders = [entry.name for entry in tops if entry.is_dir()]
        if not of_node and ({name.lower() for name in folders} - SPLITS.keys() or len(roots) != len(tops)):
            hint = f". Its folders must be train, test, validation (or valid, val); they are {folders[:5]}"
        raise UserError(
            f"{folder} has {len(files)} files{of_which}: {some}. Only images ({', '.join(sorted(SUFFIXES))}) "
            f"in folders named after their class are expected, such as {example}{hint}"
        )
    found = [(root.name, entry.name) for root in roots.values() for entry in root.iterdir() if entry.is_dir()]
    found = [(root, unicodedata.normalize("NFC", name)) for root, name in found if is_visible(name)]
    names = sorted({name for _, name in found})
    if len(found) != len(set(found)):
        raise UserError(f"{folder} has two class folders whose names differ only in Unicode's normal form")
    if not of_node and not 1 < len(names) < len(files):
        expected = "expected: at least 2 classes, and more images than classes"
        raise UserError(f"{folder} has {len(files)} images and {len(names)} classes ({names[:10]}); {expected}")
    splits = {}
    for split, root in roots.items():
        mine = [file for file in files if root in file.parents]
        labels = [names.index(unicodedata.normalize("NFC", file.relative_to(root).parts[0])) for file in mine]
        columns = {"image": [{"path": str(file), "bytes": None} for file in mine], "label": labels}
        features = {"image": datasets.Image(decode=False), "label": datasets.Value("int64")}
        splits[split] = datasets.Dataset.from_dict(columns, features=datasets.Features(features))
    return Source("class folders", splits, names)


def load_saved(folder: Path, files: list[Path]) -> datasets.Dataset | datasets.DatasetDict:
    """Load a data set of `save_to_disk`. Raises UserError if some of the files would be left out."""
    import datasets

    loaded = datasets.load_from_disk(str(folder))
    homes = [folder / split for split in loaded] if isinstance(loaded, datasets.DatasetDict) else [folder]
    used = {file for file in files if file.suffix == ".arrow" and file.parent in homes}
    refuse(folder, [file for file in files if file.suffix not in BESIDE_TABLES and file not in used])
    return loaded


def refuse(folder: Path, others: list[Path]) -> None:
    """Raise UserError if there are other files beside the tables in a folder."""
    if others:
        raise UserError(
            f"beside its tables, {folder} has files that would be left out; remove them: {[str(f) for f in others[:5]]}"
        )


def load_tables(folder: Path, files: list[Path]) -> datasets.DatasetDict:
    """Load Parquet files as the Hub lays them out. Raises UserError if some of the files would be left out."""
    import datasets

    if re.search(r"[\[\]*?]|::", str(folder.absolute())):
        raise UserError(f"rename {folder}: `datasets` reads brackets, *, ? and :: in a path as patterns")
    others = [file for file in files if file.suffix not in BESIDE_TABLES | {".parquet"}]
    used = {
        Path(file).resolve()
        for files in datasets.load_dataset_builder(str(folder)).config.data_files.values()
        for file in files
    }
    refuse(folder, others + [file for file in files if file.suffix == ".parquet" and file.resolve() not in used])
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
        raise UserError(f"column {label!r} has a value for each of {total} images, so it is no label; set label-column")
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


@lru_cache(maxsize=8)
def labels_of(source: Source, split: str) -> np.ndarray:
    """Return the labels (N,) of a split as int64. Raises UserError if some are missing."""
    column = source.splits[split].with_format("arrow")[:]["label"]
    labels = np.array([-1 if label is None else label for label in column.to_pylist()], dtype=np.int64)
    if (labels < 0).any():
        raise UserError(f"some images have no label, the first is number {int((labels < 0).argmax())} of {split}")
    if (beyond := labels >= len(source.class_names)).any():
        first, count = int(beyond.argmax()), len(source.class_names)
        raise UserError(f"image number {first} of {split} has the label {labels[first]}, and there are {count} classes")
    return labels


def digest_of_files(paths: Iterable[Path]) -> str:
    """Return a digest of paths and what changes with a file: a copy or a rename may keep its size and time."""
    states = [(str(path), path.stat()) for path in paths]
    about = [(path, s.st_size, s.st_mtime_ns, s.st_ctime_ns, s.st_ino) for path, s in states]
    return hashlib.sha256(repr(about).encode()).hexdigest()[:20]


def cache_folder() -> Path:
    """Return the folder for decoded images."""
    import datasets

    return Path(datasets.config.HF_DATASETS_CACHE) / "pytorch_example_low_level"
