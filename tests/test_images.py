"""Folders and data sets of images: all that is there is used, with its label, or one error says what is wrong."""

import hashlib
import os
import re
import shutil
import sys
import unicodedata
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace

import datasets
import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from PIL import Image

from pytorch_example_low_level import images, pixels, sources
from pytorch_example_low_level.config import UserError
from tests.conftest import load_module
from tests.grid import PROJECT, typed_config

BINARY = ["cat", "dog"]
IMAGE = datasets.Image()
LABEL = datasets.ClassLabel(names=BINARY)
TEXT, NUMBER = datasets.Value("string"), datasets.Value("int64")


def server(dataset, **overrides) -> images.Split:
    return images.load_test_split(typed_config(dataset=str(dataset), **overrides))


def node(path, number: int = 0, shape=None, **overrides) -> dict[str, images.Split]:
    return images.load_folder(str(path), number, typed_config(**overrides), shape)


def load(dataset, partition: int = 0, of: int = 4, how: str = "iid", alpha: float = 1.0, seed: int = 42, **more):
    config = typed_config(dataset=str(dataset), partitioner=how, dirichlet_alpha=alpha, seed=seed, **more)
    return images.load_partition(partition, of, config)


def draw(path: Path, shade: int = 7, mode: str = "L", size: tuple[int, int] = (28, 28)) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new(mode, size, shade if mode == "L" else (shade, 1, 2)).save(path)


def fill(root: Path, *names: str) -> Path:
    """Draw an image for each name; its shade is the number of the name, from 1."""
    for shade, name in enumerate(names, 1):
        draw(root / name, shade)
    return root


def used(*splits: images.Split) -> dict[int, str]:
    """The class of each image, by its shade."""
    return {
        int(image[0, 0, 0]): split.class_names[label]
        for split in splits
        for image, label in zip(split.images, split.labels.tolist(), strict=True)
    }


# ------------------------------------------------------------------------ A node's folder

# Folders as people have them: what is in them, and the class of each image in the order of the names.
GOOD = {
    "a class called like a split": (["bus/1.png", "car/1.png", "train/1.png", "train/2.png"], "bus car train train"),
    "a file called like a split": (["a/1.png", "a/eval-3.png", "b/test.png"], "a a b"),
    "breeds below a class": (["cat/persian/1.png", "cat/siamese/1.png", "dog/1.png"], "cat cat dog"),
    "patients below a class": (["sick/patient1/x/1.png", "well/patient7/1.png", "sick/2.png"], "sick well sick"),
    "splits below a class": (["a/val/1.png", "a/train/2.png", "b/dev/3.png"], "a a b"),
    "capitals and endings": (["A/1.PNG", "b/2.bmp", "b/3.gif", "b/4.tif", "c/5.PGM"], "A b b b c"),
    "hidden files": (["a/1.png", "b/2.png"], "a b"),
    "one class": (["only/1.png", "only/2.png"], "only only"),
    "a class with one image": (["a/1.png", "a/2.png", "b/1.png"], "a a b"),
    "dots and brackets": (["v2.0/1.x.png", "[v2]/1.png", "c::d/1 2.png"], "v2.0 [v2] c::d"),
}


@pytest.mark.parametrize("kind", GOOD)
def test_a_folder_is_read_as_it_is(tmp_path, kind):
    names, classes = GOOD[kind][0], GOOD[kind][1].split()
    folder = fill(tmp_path / "data [1]", *names)
    if kind == "hidden files":
        for extra in (".DS_Store", "a/.hidden.png", "__MACOSX/a/1.png", "b/Thumbs.db", ".git/x/1.png"):
            (folder / extra).parent.mkdir(parents=True, exist_ok=True)
            (folder / extra).write_bytes(b"junk")
    assert used(*node(folder).values()) == dict(enumerate(classes, 1))


def test_a_class_folder_or_a_file_may_be_a_link(tmp_path):
    elsewhere = fill(tmp_path / "elsewhere", "1.png", "2.png")
    folder = tmp_path / "data"
    draw(folder / "b" / "own.png", 9)
    (folder / "a").symlink_to(elsewhere)
    (folder / "b" / "linked.png").symlink_to(elsewhere / "1.png")
    splits = node(folder)
    assert sum(map(len, splits.values())) == 4
    assert used(*splits.values())[2] == "a"


def test_an_empty_class_folder_has_no_images(tmp_path):
    folder = fill(tmp_path, "a/1.png", "b/2.png")
    (folder / "rare").mkdir()
    assert node(folder)["train"].class_names == ["a", "b", "rare"]


def loop(folder: Path) -> None:
    (folder / "a" / "again").symlink_to(folder)


def forbid(folder: Path) -> None:
    (folder / "a" / "nowhere.png").symlink_to(folder / "no such file")


def write(name: str, data: bytes = b"x") -> Callable[[Path], object]:
    return lambda folder: (folder / name).write_bytes(data)


def truncate(folder: Path) -> None:
    noise = np.random.default_rng(0).integers(0, 256, (99, 99), dtype=np.uint8)
    Image.fromarray(noise).save(folder / "a" / "2.png")
    (folder / "a" / "2.png").write_bytes((folder / "a" / "2.png").read_bytes()[:5000])


def deepen(folder: Path) -> None:
    Image.fromarray(np.full((9, 9), 4000, np.uint16)).save(folder / "a" / "2.png")


def animate(folder: Path) -> None:
    first, second = grey(1, 5)
    first.save(folder / "a" / "2.gif", save_all=True, append_images=[second])


BAD: dict[str, tuple[list[str], Callable[[Path], object], str]] = {
    "an image beside the classes": (["a/1.png", "b.png"], str, r"1 of them outside a class folder .*: \['b.png'\]"),
    "a table of labels": (["images/1.png", "images/2.png"], write("labels.csv"), r"labels\.csv"),
    "an archive": (["a/1.png"], lambda f: shutil.make_archive(str(f / "b"), "zip", f / "a"), r"b\.zip"),
    "a note in a class": (["a/1.png"], write("a/notes.txt"), r"a/notes\.txt"),
    "an unknown kind of image": (["a/1.png"], write("a/2.heic"), r"a/2\.heic"),
    "a truncated image": (["a/1.png"], truncate, r"a/2\.png cannot be decoded: .*truncated"),
    "an empty file": (["a/1.png"], write("a/2.png", b""), r"a/2\.png cannot be read: cannot identify image file"),
    "16 bits": (["a/1.png"], deepen, r"a/2\.png cannot be decoded: its mode is I;16"),
    "an animation": (["a/1.png"], animate, r"a/2\.gif cannot be decoded: it has 2 frames"),
    "a link in a circle": (["a/1.png"], loop, "again is a link to a folder that it is in"),
    "a link to nowhere": (["a/1.png"], forbid, "nowhere.png"),
    "a pipe": (["a/1.png"], lambda f: os.mkfifo(f / "a" / "2.png"), r"2\.png is not a file"),  # opening it would wait
    "splits": (["train/a/1.png", "test/a/2.png"], str, "Its folders are splits: give data-path the folder train"),
    "nothing": ([], Path.mkdir, "has 0 files"),
    "only empty classes": ([], lambda f: (f / "a").mkdir(parents=True), "has 0 files"),
    "names of two forms": (["café/1.png", "cafe\u0301/1.png"], str, "differ only in Unicode's normal form"),
}


@pytest.mark.parametrize("kind", BAD)
def test_what_cannot_be_read_is_one_error_that_shows_it(tmp_path, kind):
    names, change, said = BAD[kind]
    folder = tmp_path / "data"
    fill(folder, *names)
    change(folder)
    with pytest.raises(UserError, match=said) as error:
        node(folder)
    assert str(error.value).startswith(f"Cannot use data-path '{folder}': ")
    assert len(str(error.value).splitlines()) == 1


def test_a_data_path_is_never_looked_up_on_the_hub(monkeypatch):
    monkeypatch.setattr(datasets, "load_dataset", lambda *args: pytest.fail("it was"))
    for path in ("uoft-cs/cifar10", "misspelt", sources.BUNDLED):
        with pytest.raises(UserError, match=f"Cannot use data-path '{path}': there is no folder /"):
            node(path)


def test_a_name_on_the_hub_that_is_a_folder_too_is_refused(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    folder = fill(
        tmp_path / "owner" / "name", "train/a/1.png", "train/b/2.png", "train/b/3.png", "test/a/4.png", "test/b/5.png"
    )
    with pytest.raises(UserError, match=r"'owner/name' may be on the Hub, and .* has a folder of this name"):
        server("owner/name")
    assert len(server(str(folder))) == len(server("./owner/name")) == 2


@pytest.mark.skipif(sys.platform != "linux", reason="other systems have no such names")
def test_a_name_that_is_not_utf8_is_refused(tmp_path):
    fill(tmp_path, "train/a/1.png", "train/b/2.png", "train/b/3.png", "test/a/4.png", "test/b/5.png")
    (tmp_path / "test" / "a").rename(tmp_path / "test" / os.fsdecode(b"caf\xe9"))
    with pytest.raises(UserError, match=r"rename \[.*caf\\udce9.*these names are not in UTF-8"):
        server(tmp_path)


LETTERS = st.characters(exclude_characters="/\0", exclude_categories=("Cs", "Cc"))
NAMES = st.text(LETTERS, min_size=1, max_size=12).filter(sources.is_visible)


@settings(max_examples=25, deadline=None, derandomize=True, suppress_health_check=list(HealthCheck))
@given(st.lists(st.tuples(NAMES, st.lists(NAMES, max_size=2), NAMES), min_size=1, max_size=12))
def test_the_images_used_are_the_images_made(tmp_path_factory, made):
    """Any names of classes, folders and files, at any depth."""
    folder = tmp_path_factory.mktemp("made")
    expected = {}
    for shade, (kind, below, name) in enumerate(made, 1):
        path = folder.joinpath(kind, *(f"{part}-" for part in below), f"{name}.png")
        if not path.exists():
            draw(path, shade)
            expected[shade] = unicodedata.normalize("NFC", kind)
    kinds = {kind for kind, _, _ in made}
    nested = all(below for _, below, _ in made) and all(kind.lower() in sources.SPLITS for kind in kinds)
    if nested or len({unicodedata.normalize("NFC", kind) for kind in kinds}) < len(kinds):
        with pytest.raises(UserError):
            node(folder)
    else:
        assert used(*node(folder).values()) == expected


# ------------------------------------------------------------------- A data set of folders


def data_set(root: Path, *more: str) -> Path:
    return fill(
        root, "train/cat/1.png", "train/cat/2.png", "train/dog/3.png", "test/cat/1.png", "test/dog/2.png", *more
    )


def test_classes_without_training_images_are_named(tmp_path, caplog):
    names = ["train/cat/1.png", "train/cat/2.png", "train/dog/3.png", "test/cats/4.png", "test/dog/5.png"]
    assert server(fill(tmp_path, *names)).class_names == ["cat", "cats", "dog"]
    assert caplog.messages[-1] == "Classes in split test without training images, so they cannot be learned: ['cats']"


@pytest.mark.parametrize("names", [("Train", "TEST"), ("train", "val"), ("train", "valid"), ("TRAIN", "Validation")])
def test_a_data_set_of_class_folders_with_splits_in_any_case(tmp_path, names):
    folder = data_set(tmp_path / "data")
    for old, new in zip(("train", "test"), names, strict=True):
        (folder / old).rename(folder / f"{old}-")
        (folder / f"{old}-").rename(folder / new)
    assert used(server(folder)) == {4: "cat", 5: "dog"}


def test_what_was_read_is_logged_and_another_image_is_other_data(tmp_path, caplog):
    caplog.set_level("INFO", logger="flwr")
    folder = data_set(tmp_path / "data")
    before = server(folder).fingerprint()
    said = "class folders; images: 2 test, 3 train; 2 classes (cat, dog); 28x28 grey"
    assert caplog.messages == [f"📖 Read {folder}: {said}"]
    shutil.copytree(folder, tmp_path / "elsewhere")
    assert server(tmp_path / "elsewhere").fingerprint() == before
    (tmp_path / "elsewhere" / "train" / "cat" / "2.png").unlink()  # a training image
    sources.read.cache_clear()
    assert server(tmp_path / "elsewhere").fingerprint() != before
    node(fill(tmp_path / "own", *(f"{letter}/1.png" for letter in "abcdefghijkl")))
    assert "class folders; images: 12 train; 12 classes (a, b, c, d, e, f, g, h, i, j, ...); 28x28 grey" in caplog.text


def test_a_class_called_test_stays_in_its_split(tmp_path):
    folder = data_set(tmp_path / "data", "train/test/1.png", "train/test/2.png", "test/test/3.png")
    assert used(server(folder)) == {4: "cat", 5: "dog", 8: "test"}
    source, _ = images.opened(typed_config(dataset=str(folder)))
    assert {split: len(rows) for split, rows in source.splits.items()} == {"test": 3, "train": 5}


@pytest.mark.parametrize(
    ("names", "said"),
    [
        (["train/1.png", "train/2.png", "test/3.png"], "3 of them outside a class folder or not an image"),
        (
            ["train/a/1.png", "train/b/2.png", "test/a/3.png", "overview.png"],
            r"\['overview.png'\].* and test/<class>/2\.png$",
        ),
        (["train/a/1.png", "test/a/2.png"], "2 images and 1 classes .*; expected: at least 2 classes"),
        (["train/a/1.png", "test/b/2.png"], "2 images and 2 classes .*, and more images than classes"),
        (["train/a/1.png", "train/b/2.png", "train/overview.png", "test/a/3.png"], r"\['train/overview.png'\]"),
        (
            ["train/a/1.png", "train/b/2.png", "other/a/3.png"],
            r"Only images .* such as train/<class>/1\.png .* Its folders must be .*; they are \['other', ",
        ),
        (["cat/1.png", "dog/2.png", "dog/3.png"], r"must be train, test, .*; they are \['cat', 'dog'\]"),
        (
            ["train/a/1.png", "train/b/2.png", "valid/a/3.png", "val/a/4.png"],
            r"must be train, test, validation \(or valid, val\); they are .*'valid'",
        ),
    ],
)
def test_a_data_set_that_cannot_be_read_is_one_error(tmp_path, names, said):
    with pytest.raises(UserError, match=said):
        server(fill(tmp_path / "data", *names))


def test_class_names_are_compared_in_one_unicode_form(tmp_path):
    mac, linux = "cafe\u0301", "café"
    split = node(fill(tmp_path, f"{mac}/1.png", "tea/2.png"))["train"]
    assert sorted(split.numbered_as(["tea", linux]).labels.tolist()) == [0, 1]
    of_mac = images.Split(split.images, split.labels, [mac, "tea"])
    assert of_mac.numbered_as([linux, "tea"]).class_names == [linux, "tea"]


# --------------------------------------------------------------------- Tables and columns


def table(features: dict, columns: dict) -> datasets.Dataset:
    return datasets.Dataset.from_dict(columns, features=datasets.Features(features))


def saved(folder, train: datasets.Dataset, test: datasets.Dataset | None = None) -> str:
    datasets.DatasetDict(train=train, test=test or train).save_to_disk(folder / "saved")
    return str(folder / "saved")


def grey(*shades: int, size: tuple[int, int] = (28, 28)) -> list[Image.Image]:
    return [Image.new("L", size, shade) for shade in shades]


def photos(*shades: int, **columns) -> datasets.Dataset:
    """A table of images with more columns: name=(feature, values)."""
    features = {"photo": IMAGE} | {name: feature for name, (feature, _) in columns.items()}
    return table(features, {"photo": grey(*shades)} | {name: values for name, (_, values) in columns.items()})


def test_columns_are_found_by_type_and_name(tmp_path):
    """Of two columns of the same type, the usual name decides, wherever it is."""
    assert used(server(saved(tmp_path / "a", photos(10, 20, id=(NUMBER, [1, 2]), kind=(LABEL, [0, 1]))))) == {
        10: "cat", 20: "dog"
    }  # fmt: skip
    other = datasets.ClassLabel(names=["x", "y"])
    rows = table(
        {"mask": IMAGE, "image": IMAGE, "site": other, "label": LABEL},
        {"mask": grey(1, 2), "image": grey(10, 20), "site": [1, 0], "label": [0, 1]},
    )
    assert used(server(saved(tmp_path, rows))) == {10: "cat", 20: "dog"}
    assert used(server(tmp_path / "saved", image_column="mask", label_column="site")) == {1: "y", 2: "x"}


GOOD_LABEL = {"label": (LABEL, [0, 1])}


@pytest.mark.parametrize(
    ("columns", "wanted", "said"),
    [
        ({"a": (LABEL, [0, 1]), "b": (LABEL, [1, 0])}, "", r"set it to one of \['a', 'b'\]"),
        ({"a": (TEXT, ["x", "x"]), "b": (NUMBER, [1, 1])}, "", r"set it to one of \['a', 'b'\]"),
        ({"mask": (IMAGE, grey(1, 2)), **GOOD_LABEL}, "", r"set it to one of \['photo', 'mask'\]"),
        ({"label": (datasets.Value("float64"), [0.0, 1.0])}, "", r"no column has the type that it needs.*float64"),
        ({"file": (TEXT, ["1.png", "2.png"])}, "", "column 'file' has a value for each of "),
        ({}, "", r"no column has the type that it needs"),
        (GOOD_LABEL, "image_column", r"image-column is 'foo'; set it to one of \['photo'\]\. The columns are"),
        (GOOD_LABEL, "label_column", r"label-column is 'foo'; set it to one of \['label'\]\. The columns are"),
    ],
)
def test_columns_are_never_guessed(tmp_path, columns, wanted, said):
    rows = photos(3, 4, **columns)
    other = photos(5, file=(TEXT, ["3.png"])) if "file" in columns else rows
    with pytest.raises(UserError, match=said):
        server(saved(tmp_path, rows, other), **({wanted: "foo"} if wanted else {}))


@pytest.mark.parametrize(
    ("feature", "values", "names"),
    [(TEXT, ["dog", "cat", "dog"], ["cat", "dog"]), (NUMBER, [70, 9, 70], ["9", "70"])],
)
def test_a_lone_column_of_text_or_numbers_is_the_label(tmp_path, feature, values, names):
    data = server(saved(tmp_path, photos(1, 2, 3, kind=(feature, values))))
    assert (data.class_names, data.labels.tolist()) == (names, [1, 0, 1])


def test_a_class_may_be_missing_in_the_test_split(tmp_path):
    rows = photos(1, 2, 3, kind=(TEXT, ["dog", "cat", "eel"]))
    data = server(saved(tmp_path, rows, photos(5, 6, kind=(TEXT, ["eel", "cat"]))))
    assert (data.class_names, data.labels.tolist()) == (["cat", "dog", "eel"], [2, 0])


@pytest.mark.parametrize("label", [-1, None])
def test_an_image_without_a_label_is_refused(tmp_path, label):
    """The Hub has data sets whose test split has the label -1 throughout."""
    with pytest.raises(UserError, match="some images have no label, the first is number 1 of test"):
        server(saved(tmp_path, photos(1, 2, kind=(LABEL, [0, label]))))


def test_images_as_bytes_or_paths_and_a_row_without_one(tmp_path):
    encoded = [IMAGE.encode_example(image)["bytes"] for image in grey(5, 6)]
    as_bytes = [{"bytes": each, "path": None} for each in encoded]
    rows = table({"kind": LABEL, "photo": datasets.Image(decode=False)}, {"kind": [0, 1], "photo": as_bytes})
    assert used(server(saved(tmp_path / "a", rows))) == {5: "cat", 6: "dog"}
    draw(tmp_path / "1.png", 7)
    paths = table({"kind": TEXT, "photo": TEXT}, {"kind": ["x", "y"], "photo": [str(tmp_path / "1.png")] * 2})
    assert server(saved(tmp_path / "b", paths.cast_column("photo", IMAGE))).images.unique().tolist() == [7]
    none = table({"kind": LABEL, "photo": IMAGE}, {"kind": [0, 1], "photo": [grey(5)[0], None]})
    with pytest.raises(UserError, match="row 1 of train has no image"):
        server(saved(tmp_path / "c", none))
    gap = table({"kind": LABEL, "photo": IMAGE}, {"kind": [0, 1, 1], "photo": [grey(5)[0], None, grey(6)[0]]})
    with pytest.raises(UserError, match="row 1 of train has no image"):  # not the two images in the cache
        server(saved(tmp_path / "d", gap))


def test_a_saved_data_set_with_files_that_would_be_left_out(tmp_path):
    rows = table({"kind": LABEL, "photo": IMAGE}, {"kind": [0, 1], "photo": grey(5, 6)})
    folder = Path(saved(tmp_path, rows))
    (folder / "README.md").write_text("About these images.")
    (folder / "train" / "cache-0123.arrow").touch()  # of `datasets`
    assert used(server(folder)) == {5: "cat", 6: "dog"}
    for more in ("train/7.png", "a/8.png", "labels.csv", "validation"):
        sources.read.cache_clear()
        if more == "validation":
            rows.save_to_disk(folder / more)  # dataset_dict.json does not name it
        else:
            (folder / more).parent.mkdir(exist_ok=True)
            (folder / more).touch()
        with pytest.raises(UserError, match=rf"would be left out; remove them: \['.*{more}"):
            server(folder)
        shutil.rmtree(folder / more) if more == "validation" else (folder / more).unlink()


def test_tables_with_files_that_would_be_left_out(tmp_path, tiny_dataset):
    shutil.copytree(tiny_dataset, tmp_path / "data")
    assert len(server(tmp_path / "data")) == 40
    more = [tmp_path / "data" / f"more-{number}.parquet" for number in range(6)]
    for path in more:
        shutil.copy(tmp_path / "data" / "data" / "train.parquet", path)
    with pytest.raises(
        UserError, match=r"files that would be left out; remove them: \['.*more-\d\.parquet'\]"
    ) as error:
        sources.read.cache_clear()
        server(tmp_path / "data")
    assert str(error.value).count("more-") == 5
    for path in more:
        path.unlink()
    draw(tmp_path / "data" / "a" / "1.png")
    with pytest.raises(UserError, match=r"files that would be left out; remove them: \['.*1\.png'\]"):
        sources.read.cache_clear()
        server(tmp_path / "data")
    shutil.copytree(tiny_dataset, tmp_path / "[v2] set")
    with pytest.raises(UserError, match=r"rename .*\[v2\] set: `datasets` reads brackets"):
        server(tmp_path / "[v2] set")


@pytest.mark.parametrize("dataset", ["/no/such/folder", "./none", "nobody/no-such-data-set", "a b/c"])
def test_a_data_set_that_is_not_there_is_one_clear_error(dataset):
    with pytest.raises(UserError, match=r"Cannot use dataset.*Allowed.*fashion-mnist-sample.*Hub") as error:
        server(dataset)
    assert len(str(error.value).splitlines()) == 1
    assert "HF_HUB_OFFLINE=1" in str(error.value)


def test_a_configuration_on_the_hub(monkeypatch, tmp_path):
    asked = []
    rows = datasets.DatasetDict(train=photos(1, 2, label=(LABEL, [0, 1])), test=photos(3, label=(LABEL, [0])))
    monkeypatch.setattr(datasets, "load_dataset", lambda *args: asked.append(args) or rows)
    assert used(server("owner/name:small")) == {3: "cat"}
    server("owner/name")
    assert asked == [("owner/name", "small"), ("owner/name",)]


def test_a_missing_split_is_named_with_those_there_are(tmp_path, tiny_dataset):
    rows = datasets.load_dataset(tiny_dataset, split="test")
    datasets.DatasetDict({"train": rows}).save_to_disk(tmp_path / "a")
    datasets.DatasetDict({"test": rows}).save_to_disk(tmp_path / "b")
    with pytest.raises(UserError, match=r"it needs a split test or .* that has labels; it has \['train'\]"):
        server(tmp_path / "a")
    with pytest.raises(UserError, match=r"no split train; the splits are \['test'\]"):
        load(tmp_path / "b")


@pytest.mark.parametrize("name", ["validation", "valid"])
def test_a_split_without_labels_is_not_used_for_the_central_evaluation(tmp_path, name):
    hidden, train, shown = (photos(n, b=(LABEL, [label])) for n, label in ((9, -1), (7, 0), (5, 1)))
    datasets.DatasetDict({"train": train, "test": hidden, name: shown}).save_to_disk(tmp_path / "saved")
    assert used(server(tmp_path / "saved")) == {5: "dog"}


def test_a_nodes_own_folder_is_split_like_a_partition(tmp_path, tiny_dataset):
    rows = datasets.load_dataset(tiny_dataset, split="train").select(range(20))
    rows.save_to_disk(tmp_path / "mine")
    rows.to_parquet(tmp_path / "files" / "train.parquet")
    first = node(tmp_path / "mine", 3)
    assert [len(part) for part in first.values()] == [16, 4]
    other = node(tmp_path / "files", 3)
    assert all(torch.equal(first[part].images, other[part].images) for part in first)
    datasets.DatasetDict(test=rows.select([0]), train=rows).save_to_disk(tmp_path / "both")
    with pytest.raises(
        UserError, match=r"it has the splits \['test', 'train'\], and needs one: save only the training images"
    ):
        node(tmp_path / "both", 3)


# ------------------------------------------------------------------------------ The bundle


def test_the_bundled_images_are_real_and_balanced():
    data = server(sources.BUNDLED)
    assert data.images.shape == (2000, 1, 28, 28)
    assert data.class_names[:2] == ["T - shirt / top", "Trouser"]
    assert data.labels.bincount().tolist() == [200] * 10
    digest = hashlib.sha256(data.images.numpy().tobytes() + data.labels.to(torch.uint8).numpy().tobytes())
    assert digest.hexdigest() in (PROJECT / "fashion_mnist_sample" / "README.md").read_text()


@pytest.mark.parametrize("missing", ["the package", "its images"])
def test_without_the_bundled_images_those_on_the_hub_are_taken(monkeypatch, tmp_path, caplog, missing):
    """There is no network here: the error names both ways out."""
    caplog.set_level("INFO", logger="flwr")
    asked = []
    real = datasets.load_dataset
    monkeypatch.setattr(datasets, "load_dataset", lambda name: asked.append(name) or real(name))
    spec = None if missing == "the package" else SimpleNamespace(origin=str(tmp_path / "__init__.py"))
    monkeypatch.setattr(sources, "find_spec", lambda name: spec)
    sources.read.cache_clear()
    with pytest.raises(UserError, match=r"`pip install \.` in a clone .*Hub.*network; with HF_HUB_OFFLINE"):
        server(sources.BUNDLED)
    assert asked == ["zalando-datasets/fashion_mnist"]
    (line,) = [r.getMessage() for r in caplog.records if r.name == "flwr"]
    assert line == f"The bundled images are not installed; taking {asked[0]} from the Hugging Face Hub"


# ---------------------------------------------------------------------------------- Pixels


RGB = [Image.new("RGB", (28, 28), (1, 2, 3))]


@pytest.mark.parametrize(
    ("train", "test", "shape"),
    [
        ([*grey(*[5] * 299), *RGB], None, (300, 3, 28, 28)),  # one image of colour anywhere
        ([*grey(9), *RGB], grey(9, 7), (2, 3, 28, 28)),  # or in another split
        ([*grey(9, size=(32, 32)), *grey(7), Image.new("1", (64, 64), 1)], None, (3, 1, 32, 32)),
        ([*grey(60, size=(9, 30)), Image.new("RGB", (50, 40))], None, (2, 3, 32, 32)),
    ],
)
def test_images_of_all_splits_get_the_same_format(tmp_path, train, test, shape):
    def rows(pictures: list | None) -> datasets.Dataset | None:
        return pictures and table({"a": IMAGE, "b": LABEL}, {"a": pictures, "b": [n % 2 for n in range(len(pictures))]})

    data = server(saved(tmp_path, rows(train), rows(test)))
    assert data.images.shape == shape
    if shape[1] == 1:
        assert [image.unique().tolist() for image in data.images] == [[9], [7], [255]]


@pytest.mark.parametrize("size", [16, 512])
def test_the_size_that_is_asked_for(tmp_path, size):
    data = server(data_set(tmp_path / "data"), image_size=size)
    assert data.images.shape == (2, 1, size, size)
    assert data.facts["image-shape"] == [1, size, size]
    part = node(fill(tmp_path / "own", "cat/1.png", "dog/2.png"), shape=(1, size, size))["train"]
    assert part.images.shape == (2, 1, size, size)


def test_a_photo_keeps_its_shape_and_loses_its_sides():
    """Twice as wide as high: the middle half is used."""
    wide = np.zeros((64, 128, 3), np.uint8)
    wide[:, 32:96] = 200
    assert (pixels.to_pixels(Image.fromarray(wide), (3, 32, 32))[:, 3:-3] == 200).all()
    stripes = np.tile(np.array([0, 255], np.uint8), (64, 32))
    assert abs(pixels.to_pixels(Image.fromarray(stripes), (1, 16, 16)).astype(int) - 127).max() < 20  # antialiased


@pytest.mark.parametrize(("mode", "channels"), [("L", 1), ("RGB", 3)])
@pytest.mark.parametrize("size", [28, 32])
def test_an_image_keeps_its_rows_columns_and_channels(tmp_path, mode, channels, size):
    values = np.random.default_rng(0).integers(0, 256, (size, size, channels), dtype=np.uint8)
    image = Image.fromarray(values[:, :, 0] if channels == 1 else values)
    assert np.array_equal(pixels.to_pixels(image, (channels, size, size)), values)
    (tmp_path / "a").mkdir()
    image.save(tmp_path / "a" / "1.png")
    assert np.array_equal(node(tmp_path, image_size=size)["train"].images[0].permute(1, 2, 0).numpy(), values)


@pytest.mark.parametrize("mode", ["RGBA", "LA", "P", "RGB"])
def test_transparency_is_laid_on_white(mode):
    """Black ink on a transparent ground."""
    image = Image.new("RGBA", (28, 28), (0, 0, 0, 0))
    image.paste((0, 0, 0, 255), (0, 0, 14, 28))
    if mode == "P":
        image = image.convert("RGB").quantize(2)
        image = Image.new("P", (28, 28), 1)
        image.putpalette([0, 0, 0, 90, 90, 90])
        image.paste(0, (0, 0, 14, 28))
        image.info["transparency"] = 1
    elif mode == "RGB":
        image = Image.new("RGB", (28, 28), (90, 90, 90))
        image.paste((0, 0, 0), (0, 0, 14, 28))
        image.info["transparency"] = (90, 90, 90)
    else:
        image = image.convert(mode)
    values = pixels.to_pixels(image, (1, 28, 28))[:, :, 0]
    assert (values[:, :14] == 0).all()
    assert (values[:, 14:] == 255).all()


@pytest.mark.parametrize("orientation", [1, 6])
def test_a_photo_is_turned_upright(tmp_path, orientation):
    from PIL import ImageOps

    values = np.arange(28 * 28, dtype=np.uint8).reshape(28, 28)
    image = Image.fromarray(values)
    image.getexif()[0x0112] = orientation
    image.save(tmp_path / "1.png", exif=image.getexif())
    upright = np.asarray(ImageOps.exif_transpose(Image.open(tmp_path / "1.png")))
    assert np.array_equal(pixels.to_pixels(Image.open(tmp_path / "1.png"), (1, 28, 28))[:, :, 0], upright)
    assert (orientation == 1) == np.array_equal(upright, values)


def test_a_node_converts_to_what_the_server_has(tmp_path, caplog):
    caplog.set_level("INFO", logger="flwr")
    fill(tmp_path / "grey", "a/1.png", "b/2.png")
    draw(tmp_path / "rgb" / "a" / "1.png", 100, "RGB")
    assert node(tmp_path / "grey", shape=(3, 28, 28))["train"].images.shape == (2, 3, 28, 28)
    assert "are RGB and the server's are grey" not in caplog.text
    assert node(tmp_path / "rgb", shape=(1, 28, 28))["train"].images.shape == (1, 1, 28, 28)
    assert f"The images of {tmp_path / 'rgb'} are RGB and the server's are grey: they are converted." in caplog.text


# ----------------------------------------------------------------------------------- Cache


def test_images_are_decoded_once_a_machine_with_progress(tmp_path, monkeypatch, caplog):
    caplog.set_level("INFO", logger="flwr")
    count = []
    real = pixels.to_pixels
    monkeypatch.setattr(pixels, "to_pixels", lambda *args: count.append(1) or real(*args))
    monkeypatch.setattr(pixels.inspect, "getsource", lambda _: "x")
    monkeypatch.setattr(pixels, "PROGRESS_EVERY", -1)
    folder = fill(tmp_path, "a/1.png", "b/2.png")
    for _ in range(2):
        images.load_folder.cache_clear()
        sources.read.cache_clear()
        assert len(node(folder)["train"]) == 2
    assert len(count) == 2
    assert re.search(r"\.\.\. 1/2 images of train decoded, about \d s left", caplog.text)
    draw(folder / "a" / "1.png", 99)  # another content, and another time
    images.load_folder.cache_clear()
    sources.read.cache_clear()
    assert used(node(folder)["train"]) == {99: "a", 2: "b"}


@pytest.fixture
def cached(tmp_path, monkeypatch) -> SimpleNamespace:
    """Images with the shades 9 and 7, and a cache of their own; `read` reads them as another process would."""
    monkeypatch.setattr(pixels, "cache_folder", lambda: tmp_path / "cache")
    source, shape = images.opened(typed_config(dataset=saved(tmp_path, photos(9, 7, b=(LABEL, [0, 1])))))

    def read(module=pixels) -> list[int]:
        module.decoded.cache_clear()
        return module.decoded(source, "test", shape)[:, 0, 0, 0].tolist()

    return SimpleNamespace(folder=tmp_path / "cache", source=source, shape=shape, read=read)


def test_a_changed_conversion_of_images_is_not_taken_from_the_cache(cached, tmp_path, monkeypatch):
    assert cached.read() == [9, 7]
    text = Path(pixels.__file__).read_text()
    inverted = text.replace("return np.asarray(image)", "return 255 - np.asarray(image)")
    assert inverted != text
    (tmp_path / "pixels.py").write_text(inverted)
    changed = load_module(tmp_path / "pixels.py", "changed_pixels", monkeypatch)
    monkeypatch.setattr(changed, "cache_folder", lambda: cached.folder)
    assert cached.read(changed) == [246, 248]


@pytest.mark.parametrize("damage", [b"", b"\0" * 200, "cut"])
def test_a_damaged_file_of_the_cache_is_made_again(cached, damage):
    assert cached.read() == [9, 7]
    for path in cached.folder.glob("*.npy"):
        path.write_bytes(path.read_bytes()[:-1] if damage == "cut" else damage)
    for path in cached.folder.glob("*.json"):
        path.write_text("3")
    assert cached.read() == [9, 7]
    assert pixels.common_shape(cached.source, 0) == cached.shape


def test_without_a_cache_that_can_be_written_images_are_decoded_in_memory(cached, monkeypatch, caplog):
    def full(descriptor: int) -> None:
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(pixels.os, "fsync", full)
        assert cached.read() == [9, 7]
    assert "No space left" in caplog.text
    assert not list(cached.folder.glob("*.part"))
    (cached.folder / "file").touch()
    monkeypatch.setattr(pixels, "cache_folder", lambda: cached.folder / "file" / "below")
    assert cached.read() == [9, 7]
    assert f"cannot be kept in {cached.folder / 'file' / 'below'}: " in caplog.text


def test_without_the_lock_the_half_written_file_of_another_process_stays(cached, monkeypatch):
    cached.read()
    (made,) = cached.folder.glob("*.npy")
    theirs = made.rename(made.with_suffix(".part"))

    def denied(path: Path) -> None:
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(pixels, "FileLock", denied)
    assert cached.read() == [9, 7]  # in memory
    assert theirs.exists()


def test_files_that_keep_their_size_and_time_are_read_again(tmp_path):
    """Mislabelled images that are swapped, and a table that is replaced, with the times of a reproducible archive."""

    def reread(folder: Path) -> dict[int, str]:
        for path in folder.rglob("*.*"):
            os.utime(path, (10**9, 10**9))
        for cached in (sources.read, images.load_folder, pixels.decoded, sources.labels_of, pixels.key_of):
            cached.cache_clear()
        return used(*node(folder).values())

    folder = fill(tmp_path / "own", "cat/1.bmp", "dog/1.bmp")
    assert reread(folder) == {1: "cat", 2: "dog"}
    (folder / "cat" / "1.bmp").rename(tmp_path / "1.bmp")
    (folder / "dog" / "1.bmp").rename(folder / "cat" / "1.bmp")
    (tmp_path / "1.bmp").rename(folder / "dog" / "1.bmp")
    assert reread(folder) == {2: "cat", 1: "dog"}
    tables = tmp_path / "tables"
    photos(1, 2, label=(LABEL, [0, 1])).to_parquet(tables / "train.parquet")
    assert reread(tables) == {1: "cat", 2: "dog"}
    photos(3, 4, 5, label=(LABEL, [0, 1, 1])).to_parquet(tables / "train.parquet")
    assert reread(tables) == {3: "cat", 4: "dog", 5: "dog"}


def test_tables_with_other_names_of_the_classes_are_refused(tmp_path):
    """`datasets` would read the numbers of both with the names of the first."""
    other = datasets.ClassLabel(names=["dog", "eel"])
    photos(1, 2, label=(LABEL, [0, 1])).to_parquet(tmp_path / "train.parquet")
    photos(3, 4, label=(other, [0, 1])).to_parquet(tmp_path / "test.parquet")
    with pytest.raises(UserError, match=r"different classes: .*test\.parquet: .*dog.*eel.*train\.parquet: .*cat.*dog"):
        server(tmp_path)


def test_labels_that_can_be_read_in_two_ways_are_refused(tmp_path):
    def read(name: str, feature, labels: list) -> images.Split:
        return server(saved(tmp_path / name, photos(*range(1, len(labels) + 1), label=(feature, labels))))

    assert read("signs", NUMBER, [-1, 1, 1]).class_names == ["-1", "1"]
    with pytest.raises(UserError, match="column 'label' has -1, which may be a class or mean that there is none"):
        read("hidden", NUMBER, [-1, 0, 1, 1])
    with pytest.raises(UserError, match="names differ only in Unicode's normal form"):
        read("unicode", TEXT, ["café", "cafe\u0301", "tea", "tea"])


def test_a_label_beyond_the_classes_is_named():
    rows = datasets.Dataset.from_dict({"image": [None] * 3, "label": [0, 5, 1]})
    with pytest.raises(UserError, match="image number 1 of train has the label 5, and there are 2 classes"):
        sources.labels_of(sources.Source("", {"train": rows}, BINARY), "train")


# ------------------------------------------------------------------------------ Partitions


@pytest.mark.parametrize("how", ["iid", "dirichlet"])
def test_partitions_share_out_all_images_once_with_their_labels_in_80_to_20(tiny_dataset, how):
    whole = datasets.load_dataset(tiny_dataset, split="train")
    found = []
    for partition in range(4):
        train, validation = load(tiny_dataset, partition, how=how).values()
        assert len(validation) == int(0.2 * (len(train) + len(validation)))
        assert train.class_names == whole.features["label"].names
        for part in (train, validation):
            found += [(i.numpy().tobytes(), n) for i, n in zip(part.images, part.labels.tolist(), strict=True)]
    assert sorted(found) == sorted((np.asarray(row["image"]).tobytes(), row["label"]) for row in whole)


def test_the_split_of_a_partition_is_random_and_repeatable(tiny_dataset):
    first = load(tiny_dataset)["validation"].images
    assert torch.equal(first, load(tiny_dataset)["validation"].images)
    # IID partitions are dealt with the same seed, so what differs here is the split.
    config = typed_config(dataset=tiny_dataset, partitioner="iid")
    rows, (source, shape) = images.rows_of_partition(config, 4, 0), images.opened(config)
    everything = pixels.decoded(source, "train", shape)
    places = [int((everything[rows] == image.numpy()).all((1, 2, 3)).nonzero()[0][0]) for image in first]
    assert sorted(places) != places  # neither the first rows nor the last
    other = images.train_and_validation(everything, source, "train", rows, 42, 1)["validation"].images
    assert not torch.equal(first, other)


def test_iid_partitions_are_not_cut_from_sorted_rows(tmp_path, tiny_dataset):
    rows = datasets.load_dataset(tiny_dataset, split="train").sort("label")
    rows.to_parquet(tmp_path / "data" / "train.parquet")
    first = load(tmp_path)["train"]
    assert len(first.labels.unique()) > 5
    assert not torch.equal(first.images, load(tmp_path, seed=1)["train"].images)


def test_the_partition_is_that_of_flwr_datasets(tiny_dataset):
    from flwr_datasets.partitioner import DirichletPartitioner

    plain = DirichletPartitioner(4, partition_by="label", alpha=0.7, seed=7, min_partition_size=5)
    plain.dataset = datasets.load_dataset(tiny_dataset, split="train")
    for partition in range(4):
        parts = load(tiny_dataset, partition, 4, "dirichlet", 0.7, 7).values()
        assert sorted(plain.load_partition(partition)["label"][:]) == sorted(
            torch.cat([p.labels for p in parts]).tolist()
        )


def test_each_node_has_the_number_of_classes_asked_for(tiny_dataset):
    classes = []
    for partition in range(10):
        parts = load(tiny_dataset, partition, 10, "pathological", classes_per_node=2).values()
        classes.append(set(torch.cat([part.labels for part in parts]).tolist()))
    assert {len(each) for each in classes} == {2}
    assert set.union(*classes) == set(range(10))


def test_a_site_is_a_node(tmp_path):
    def sites(name: str, *where: str) -> str:
        rows = photos(*range(1, 18), label=(LABEL, [0, 1, 1] * 5 + [0, 1]), hospital=(TEXT, where))
        return saved(tmp_path / name, rows)

    folder, how = sites("a", *["south", "north"] * 6, *["east"] * 5), {"partition_column": "hospital"}
    found = [sorted(used(*load(folder, number, 3, "natural", **how).values())) for number in range(3)]
    assert found == [[13, 14, 15, 16, 17], [2, 4, 6, 8, 10, 12], [1, 3, 5, 7, 9, 11]]  # east, north, south
    data = server(folder, partitioner="natural", **how)
    assert data.node_names == ["east", "north", "south"]
    other = server(sites("b", *["north", "south"] * 6, *["east"] * 5), partitioner="natural", **how)
    assert torch.equal(data.images, other.images)
    assert data.fingerprint() != other.fingerprint()
    with pytest.raises(UserError, match=r"the data is that of 3 nodes \(east, north, south\), not of 2"):
        load(folder, 0, 2, "natural", **how)
    with pytest.raises(UserError, match=r"no partition-column 'ward'; the columns are \['photo', 'label', 'hos"):
        load(folder, 0, 3, "natural", partition_column="ward")
    with pytest.raises(UserError, match="has no tables, so it has no partition-column"):
        server(data_set(tmp_path / "folders"), partitioner="natural", **how)


@pytest.mark.parametrize(
    ("how", "partition", "of", "said"),
    [
        ("pathological", 0, 4, r"4 nodes with classes-per-node=2 cannot hold all 10 classes; use more"),
        ("iid", 5, 4, r"partition-id is 5; allowed are 0 to 3"),
        ("dirichlet", 4, 4, r"partition-id is 4; allowed are 0 to 3"),
        ("iid", 3, 25, r"120 training images are too few for 25 nodes \(5 each\)"),
        ("dirichlet", 3, 25, r"120 training images are too few for 25 nodes \(5 each\)"),
        ("iid", 3, 24, None),
    ],
)
def test_partitions_that_cannot_be_are_refused(tiny_dataset, how, partition, of, said):
    if said is None:
        assert len(load(tiny_dataset, partition, of, how)["train"]) == 4
        return
    with pytest.raises(UserError, match=said):
        load(tiny_dataset, partition, of, how, classes_per_node=2)


def test_labels_are_renumbered_by_the_names_of_the_classes():
    data = images.Split(torch.arange(3, dtype=torch.uint8).view(3, 1, 1, 1), torch.tensor([0, 1, 1]), ["dog", "cat"])
    renumbered = data.numbered_as(["bird", "cat", "dog"])
    assert renumbered.labels.tolist() == [2, 1, 1]
    assert renumbered.class_names == ["bird", "cat", "dog"]
    assert torch.equal(renumbered.images, data.images)
    assert data.labels.tolist() == [0, 1, 1]
    assert data.numbered_as(["dog", "cat"]).labels.tolist() == [0, 1, 1]


def test_a_class_that_the_server_does_not_know_names_both():
    black = images.Split(torch.zeros(2, 1, 28, 28, dtype=torch.uint8), torch.tensor([0, 1]), BINARY)
    with pytest.raises(UserError) as error:
        black.numbered_as(["dog", "cow"])
    for words in ("['cat', 'dog']", "['dog', 'cow']", "not among them: ['cat']", "rows.cast_column('label'"):
        assert words in str(error.value)


def test_a_data_set_is_read_once_a_process(tiny_dataset, monkeypatch):
    sources.read.cache_clear()
    asked = []
    real = datasets.load_dataset
    monkeypatch.setattr(datasets, "load_dataset", lambda *args, **more: asked.append(args) or real(*args, **more))
    for partition in range(4):
        load(tiny_dataset, partition)
    server(tiny_dataset)
    assert len(asked) == 1
