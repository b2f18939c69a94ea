"""Model, data, training and testing: PyTorch and data sets, nothing of Flower's messages.

Images are kept as `uint8` tensors, decoded once, and turned into floats a batch at a time.
That is what makes a round cheap: decoding and transforming image by image costs more than
the training itself.
"""

from __future__ import annotations

import math
import os
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import lru_cache, partial
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any
from urllib.error import HTTPError
from urllib.request import urlopen

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.optim.sgd import sgd

from pytorch_example_low_level.config import UserError, first_line

if TYPE_CHECKING:
    import datasets
    from flwr_datasets import FederatedDataset

StateDict = dict[str, Tensor]

BUNDLED = "fashion-mnist-sample"
PARTS = ("train", "validation")
VALIDATION_SHARE = 0.2  # of a node's images; the rest is for training
TEST_SPLITS = ("test", "validation", "valid")  # the first that a data set has
NATIVE_SIZES = ((28, 28), (32, 32))  # images of other sizes are resized to 32x32
MIN_PARTITION = 5  # images: four to train, one to validate


class DataError(UserError):
    """A data set that cannot be used; the message says why and what can be."""


# ---------------------------------------------------------------------------------- Model


class Net(nn.Module):
    """A small CNN: two 5x5 convolutions, two linear layers; 80,202 parameters for 28x28 grey.

    Maps float images (N, in_channels, H, W), 28x28 or 32x32, to logits (N, num_classes).
    """

    def __init__(self, in_channels: int = 1, num_classes: int = 10) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(in_channels, 16, 5)
        self.conv2 = nn.Conv2d(16, 32, 5)
        self.fc1 = nn.Linear(32 * 4 * 4, 128)
        self.fc2 = nn.Linear(128, num_classes)

    def forward(self, x: Tensor) -> Tensor:
        """Return the logits."""
        # ReLU commutes with max-pooling, and has four times less to do behind it.
        x = F.relu(F.max_pool2d(self.conv1(x), 2))
        x = F.relu(F.max_pool2d(self.conv2(x), 2))
        if x.shape[-2:] != (4, 4):  # 28x28 images give 4x4 by themselves, 32x32 give 5x5
            x = F.adaptive_avg_pool2d(x, 4)
        x = F.relu(self.fc1(x.flatten(1)))
        logits: Tensor = self.fc2(x)
        return logits

    @property
    def in_channels(self) -> int:
        """1 for grey, 3 for RGB images."""
        return self.conv1.in_channels

    @classmethod
    def initial(cls, in_channels: int, num_classes: int, seed: int) -> Net:
        """Make a net with random weights that depend on `seed` alone."""
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            return cls(in_channels, num_classes)

    @classmethod
    def from_state_dict(cls, state_dict: StateDict) -> Net:
        """Make the net that `state_dict` belongs to: a node needs to be told nothing else.

        Raises KeyError or RuntimeError when it belongs to another model.
        """
        net = cls(state_dict["conv1.weight"].shape[1], state_dict["fc2.bias"].shape[0])
        net.load_state_dict(state_dict)
        return net


def pick_device(name: str = "auto") -> torch.device:
    """Return the device called `name`; "auto" is the first of CUDA and CPU that is there.

    Raises UserError when this machine does not have it.
    """
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    try:
        torch.empty(0, device=name)
    except (RuntimeError, AssertionError) as error:
        raise UserError(
            f"server-device: {name!r} is not usable on this machine ({first_line(error)}); allowed: 'auto', 'cpu'"
        ) from error
    return torch.device(name)


# ----------------------------------------------------------------------------------- Data


@dataclass(frozen=True)
class Split:
    """Decoded images (N, C, H, W) as uint8, and their labels (N,) as int64."""

    images: Tensor
    labels: Tensor

    def __len__(self) -> int:
        """Return N."""
        return len(self.labels)

    def __getitem__(self, rows: Tensor) -> Split:
        """Return a copy of some of the rows."""
        return Split(self.images[rows], self.labels[rows])


@lru_cache(maxsize=256)
def load_partition(
    in_channels: int,
    partition_id: int,
    num_partitions: int,
    dataset: str,
    partitioner: str,
    alpha: float,
    seed: int,
) -> dict[str, Split]:
    """Load the "train" (80 %) and the "validation" (20 %) part of one partition of a data set.

    A process keeps the 256 partitions that it used last. Where there are more nodes than that,
    partitions are small; so about one copy of the training images is held at most.

    Raises DataError when the data set cannot be loaded, or not be split that often.
    """
    with _explained(f"partition {partition_id} of {num_partitions} of dataset {dataset!r}"):
        fds = federated_dataset(dataset, partitioner, num_partitions, alpha, seed, in_channels)
        data = _to_split(fds.load_partition(partition_id), in_channels)
        return {part: data[torch.from_numpy(_rows_of(part, len(data), seed, partition_id))] for part in PARTS}


@lru_cache(maxsize=4)
def load_folder(part: str, in_channels: int, path: str, partition_id: int, seed: int) -> Split:
    """Load the "train" or the "validation" part of a node's own data (`Dataset.save_to_disk`).

    Only one part: a SuperNode starts a process for each message, which needs no other.
    Raises DataError when the folder does not hold an image-classification data set.
    """
    import datasets

    with _explained(f"data-path {path!r}"):
        rows = datasets.load_from_disk(path)
        rows = _canonical(rows["train"] if isinstance(rows, datasets.DatasetDict) else rows)
        rows = rows.select(_rows_of(part, len(rows), seed, partition_id))
        return _to_split(_decode(rows, in_channels, in_memory=True), in_channels)


def load_test_split(dataset: str) -> tuple[Split, int]:
    """Load the images for the central evaluation, and the number of classes.

    They stay grey where the first hundred are; else all become RGB. Raises DataError.
    """
    with _explained(f"dataset {dataset!r}"):
        location = _locate(dataset)  # before the import, which reads the environment
        import datasets  # alone: flwr-datasets takes as long again, and the server needs no partitions

        datasets.disable_progress_bars()
        splits = datasets.load_dataset(location)
        name = next((name for name in TEST_SPLITS if name in splits), None)
        if name is None:
            raise DataError(f"there is no split {' or '.join(TEST_SPLITS)}; the splits are {list(splits)}")
        rows = _canonical(splits[name])
        first = rows.with_format(None)[:100]["image"]
        in_channels = 1 if all(image.mode == "L" for image in first) else 3
        return _to_split(_decode(rows, in_channels), in_channels), rows.features["label"].num_classes


@lru_cache(maxsize=1)  # one a process: to make it and to partition it takes seconds
def federated_dataset(
    dataset: str, partitioner: str, num_partitions: int, alpha: float, seed: int, in_channels: int | None = None
) -> FederatedDataset:
    """Return flwr-datasets' view of a data set, "train" in partitions; decoded, if `in_channels` is given.

    https://flower.ai/docs/datasets/ref-api/flwr_datasets.FederatedDataset.html
    """
    location = _locate(dataset)  # before the imports, which read the environment
    import datasets
    from flwr_datasets import FederatedDataset
    from flwr_datasets.partitioner import DirichletPartitioner, IidPartitioner

    datasets.disable_progress_bars()
    iid = partitioner == "iid"
    # Label skew after Hsu et al. 2019, "Measuring the effects of non-identical data
    # distribution for federated visual classification" (arXiv:1909.06335).
    skewed = partial(DirichletPartitioner, partition_by="label", alpha=alpha, min_partition_size=MIN_PARTITION)
    partition = IidPartitioner(num_partitions) if iid else skewed(num_partitions, seed=seed)

    def prepare(splits: datasets.DatasetDict) -> datasets.DatasetDict:
        if "train" in splits:
            rows = _canonical(splits["train"]).with_format("arrow")
            rows = rows if in_channels is None else _decode(rows, in_channels)
            # IID partitions are cut from the rows as they lie, which may be sorted by label;
            # the Dirichlet partitioner draws its rows itself.
            splits["train"] = rows.shuffle(seed=seed) if iid else rows
        return splits

    return FederatedDataset(dataset=location, partitioners={"train": partition}, shuffle=False, preprocessor=prepare)


def _locate(dataset: str) -> str:
    """Return the folder or the Hub's name that `dataset` stands for."""
    if dataset == BUNDLED:
        spec = find_spec("fashion_mnist_sample")
        folder = Path(spec.origin).parent if spec and spec.origin else None
        if folder is None or not (folder / "data").is_dir():
            raise DataError("the bundled images are not installed: run `pip install .` in the app's folder")
        return str(folder)
    path = Path(dataset).expanduser()
    if path.is_dir():
        return str(path.resolve())
    if dataset.startswith(("/", ".", "~")):
        raise DataError(f"there is no folder {path.absolute()}")
    _go_offline_without_network()
    return dataset


def _go_offline_without_network() -> None:
    """Tell Hugging Face's libraries when the Hub is out of reach.

    Then they take what their cache holds, or give up; by themselves they would first ask six
    times. https://huggingface.co/docs/huggingface_hub/package_reference/environment_variables
    """
    if "HF_HUB_OFFLINE" in os.environ:
        return
    try:
        urlopen(os.environ.get("HF_ENDPOINT", "https://huggingface.co"), timeout=5).close()
    except HTTPError:
        pass  # an answer, if not a friendly one
    except OSError:
        os.environ["HF_HUB_OFFLINE"] = "1"


def _canonical(rows: datasets.Dataset) -> datasets.Dataset:
    """Find the image and the label column by their types; call them "image" and "label"."""
    import datasets

    features = rows.features
    image = next((k for k, f in features.items() if isinstance(f, datasets.Image)), None)
    label = next((k for k, f in features.items() if isinstance(f, datasets.ClassLabel)), None)
    if image is None or label is None:
        missing = "Image" if image is None else "ClassLabel"
        raise DataError(f"no column of type {missing}; the columns are {dict(features)}")
    rows = rows.select_columns([image, label])
    return rows.rename_columns({old: new for old, new in ((image, "image"), (label, "label")) if old != new})


def _decode(rows: datasets.Dataset, in_channels: int, *, in_memory: bool = False) -> datasets.Dataset:
    """Replace the column "image" by "pixels": the bytes (H, W, C) of the decoded image.

    The library keeps the result in Hugging Face's cache, from where all processes and later
    runs map it into memory: an image is decoded once, and not once a worker.
    """
    to_pixels = partial(_to_pixels, mode="L" if in_channels == 1 else "RGB")
    decoded = rows.with_format(None).map(to_pixels, batched=True, remove_columns=["image"], keep_in_memory=in_memory)
    # Arrow columns become NumPy arrays forty times as fast as Python lists, which is most
    # of the time that a Dirichlet partitioning takes.
    return decoded.with_format("arrow")


def _to_pixels(batch: dict[str, list[Any]], mode: str) -> dict[str, list[bytes]]:
    """Decode a batch of images into bytes; resize those that are neither 28x28 nor 32x32."""
    images = [image.convert(mode) for image in batch["image"]]
    if any(image.size not in NATIVE_SIZES for image in images):
        from torchvision.transforms.v2.functional import resize  # slow to import, seldom needed

        images = [i if i.size in NATIVE_SIZES else resize(i, [32, 32], antialias=True) for i in images]
    return {"pixels": [image.tobytes() for image in images]}


def _rows_of(part: str, count: int, seed: int, partition_id: int) -> np.ndarray:
    """Choose which of a node's `count` images are in a part, at random but always the same."""
    order = np.random.default_rng((seed, partition_id)).permutation(count)
    cut = int(count * VALIDATION_SHARE)
    return order[cut:] if part == "train" else order[:cut]


def _to_split(rows: datasets.Dataset, in_channels: int) -> Split:
    """Turn decoded rows into tensors. Raises DataError for a label that is missing."""
    columns = rows.with_format("arrow")[:]
    pixels, labels = columns["pixels"].to_pylist(), columns["label"].to_pylist()
    if any(label is None or label < 0 for label in labels):
        raise DataError("some images have no label")
    sizes = {len(image) for image in pixels}
    side = math.isqrt(max(sizes, default=28 * 28 * in_channels) // in_channels)
    if len(sizes) > 1:  # 28x28 among 32x32: a black frame makes them equal
        pixels = [_frame(image, side, in_channels) for image in pixels]
    images = np.frombuffer(b"".join(pixels), np.uint8).reshape(-1, side, side, in_channels)
    return Split(
        torch.from_numpy(images.transpose(0, 3, 1, 2).copy(order="C")),
        torch.tensor(labels, dtype=torch.int64),
    )


def _frame(image: bytes, side: int, in_channels: int) -> bytes:
    """Centre a smaller image on a black one of `side` x `side`."""
    array = np.frombuffer(image, np.uint8).reshape(-1, math.isqrt(len(image) // in_channels), in_channels)
    margin = (side - len(array)) // 2
    return np.pad(array, [(margin, margin), (margin, margin), (0, 0)]).tobytes()


@contextmanager
def _explained(what: str) -> Iterator[None]:
    """Turn whatever goes wrong with `what` into one DataError that says what is allowed."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # retries of the partitioner: noise, or an error below
            yield
    except Exception as error:
        reason = str(error).strip() or first_line(error)
        raise DataError(
            f"Cannot use {what}: {reason}\n"
            f"Allowed: dataset={BUNDLED!r} (bundled, needs no network), the absolute path of a folder that "
            "datasets.load_dataset can read, or the name of an image-classification data set on the "
            "Hugging Face Hub (needs network)."
        ) from error


# ------------------------------------------------------------------- Training and testing


def train(
    net: nn.Module,
    data: Split,
    *,
    epochs: int,
    batch_size: int,
    lr: float,
    momentum: float,
    augment: bool,
    seed: int,
    device: torch.device,
    overdue: Callable[[], bool] = lambda: False,
) -> float:
    """Train `net` in place with SGD; return the mean loss over all examples and epochs.

    Shuffling and augmentation derive from `seed`. Raises DataError when there are no images,
    TimeoutError as soon as `overdue()` says that nobody waits for the result any more.
    """
    if not len(data):
        raise DataError("the training split is empty")
    generator = torch.Generator().manual_seed(seed)
    net.to(device).to(memory_format=torch.channels_last).train()
    images, labels = data.images.to(device), data.labels.to(device)
    parameters = [parameter for parameter in net.parameters() if parameter.requires_grad]
    momenta: list[Tensor | None] = [None] * len(parameters)
    total_loss = torch.zeros((), dtype=torch.float64, device=device)
    with torch.random.fork_rng(devices=[device] if device.type == "cuda" else []):
        torch.manual_seed(seed)  # for layers that draw from the global state, such as Dropout
        for _ in range(epochs):
            order = torch.randperm(len(data), generator=generator).to(device)
            for start in range(0, len(data), batch_size):
                if overdue():
                    raise TimeoutError("training went on past the deadline of its message")
                rows = order[start : start + batch_size]
                batch = random_crop_and_flip(images[rows], generator) if augment else images[rows]
                loss = F.cross_entropy(net(normalise(batch)), labels[rows])
                step(parameters, torch.autograd.grad(loss, parameters), momenta, lr, momentum)
                total_loss += loss.detach().double() * len(rows)  # the last batch may be short
    return total_loss.item() / (len(data) * epochs)


@torch.no_grad()
def step(
    parameters: Sequence[Tensor], gradients: Sequence[Tensor], momenta: list[Tensor | None], lr: float, momentum: float
) -> None:
    """Update `parameters` and `momenta` in place: one step of SGD with momentum, in one kernel.

    It is the function inside `torch.optim.SGD(..., fused=True)`, with the same bits. The class
    itself, like every optimizer, imports PyTorch's compiler when it is first used: 1.6 s in
    every process, which over a network is every message. For another optimizer that is a fair
    price: make it where `momenta` are made, and call its `step` instead of this.
    https://docs.pytorch.org/docs/stable/generated/torch.optim.SGD.html
    """
    sgd(
        list(parameters),
        list(gradients),
        momenta,
        lr=lr,
        momentum=momentum,
        weight_decay=0.0,
        dampening=0.0,
        nesterov=False,
        maximize=False,
        fused=True,
    )


@torch.inference_mode()
def test(net: nn.Module, data: Split, device: torch.device, batch_size: int = 500) -> tuple[float, float]:
    """Return the exact mean loss and the accuracy of `net` on `data`.

    Batches are large since nothing is learnt from them. Raises DataError without images.
    """
    if not len(data):
        raise DataError("the split to evaluate on is empty")
    net.to(device).to(memory_format=torch.channels_last).eval()
    loss = torch.zeros((), dtype=torch.float64, device=device)
    correct = torch.zeros((), dtype=torch.int64, device=device)
    for start in range(0, len(data), batch_size):
        rows = slice(start, start + batch_size)
        target = data.labels[rows].to(device)
        logits = net(normalise(data.images[rows].to(device)))
        loss += F.cross_entropy(logits, target, reduction="none").double().sum()
        correct += (logits.argmax(1) == target).sum()
    return loss.item() / len(data), correct.item() / len(data)


def normalise(images: Tensor) -> Tensor:
    """Turn uint8 images (N, C, H, W) into floats, each image with mean 0 and variance 1.

    Each image by itself, as in https://www.tensorflow.org/api_docs/python/tf/image/per_image_standardization:
    so no figure of the whole data set is needed, which no node knows. An image of one colour
    becomes 0. The memory format channels_last makes convolutions and pooling on a CPU about
    twice as fast: https://docs.pytorch.org/tutorials/intermediate/memory_format_tutorial.html
    """
    floats = images.to(torch.float32, memory_format=torch.channels_last)
    floats.sub_(floats.mean((1, 2, 3), keepdim=True))
    variance = floats.square().mean((1, 2, 3), keepdim=True)  # twice as fast as torch.var
    return floats.mul_(torch.rsqrt(variance + 1))  # + 1: a grey level, against dividing by 0


def random_crop_and_flip(images: Tensor, generator: torch.Generator, padding: int = 4) -> Tensor:
    """Shift each image (N, C, H, W) by up to `padding` pixels, and mirror half of them.

    What is shifted in is black. One gather moves the whole batch.
    """
    n, _, height, width = images.shape
    shift = torch.randint(0, 2 * padding + 1, (2, n, 1), generator=generator)
    flip = torch.randint(0, 2, (n, 1), generator=generator).bool()
    columns = torch.arange(width).expand(n, width)
    columns = torch.where(flip, columns.flip(1), columns) + shift[1]
    rows = torch.arange(height) + shift[0]
    padded = F.pad(images, (padding,) * 4)
    index = (torch.arange(n)[:, None, None], slice(None), rows[:, :, None], columns[:, None, :])
    return padded[index].permute(0, 3, 1, 2)  # the slice between index tensors goes last
