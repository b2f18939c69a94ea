"""What is learned: the model, its data, training and testing. To learn something else, replace this module.

The other modules know data with a length, facts with names, tensors with names, and metrics with names.
"""

from __future__ import annotations

import time
from collections.abc import Mapping
from math import ceil, inf
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from pytorch_example_low_level import images
from pytorch_example_low_level.config import Purpose, RunConfig, UserError, explained, log, random_stream

Data = images.Split  # has a length, `facts` and a `fingerprint`
Facts = Mapping[str, Any]  # what server and nodes must agree on: scalars and lists, sent with each model
Metrics = dict[str, float | list[float | None] | None]  # None: there is no value
StateDict = dict[str, Tensor]

SCORE = "accuracy"  # the metric by which the best model is chosen: more is better, so for an error take its negative


# ---------------------------------------------------------------------------------- Model


class Net(nn.Module):
    """A small CNN with 80,298 parameters for 28x28 grey images.

    With GroupNorm (Wu and He 2018, arXiv:1803.08494), one learning rate suits grey and colour images.
    Unlike BatchNorm, it keeps no statistics of the data, which differ between nodes.
    """

    def __init__(self, in_channels: int, num_classes: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(in_channels, 16, 5)
        self.norm1 = nn.GroupNorm(4, 16)
        self.conv2 = nn.Conv2d(16, 32, 5)
        self.norm2 = nn.GroupNorm(4, 32)
        self.fc1 = nn.Linear(32 * 4 * 4, 128)
        self.fc2 = nn.Linear(128, num_classes)

    def forward(self, x: Tensor) -> Tensor:
        """Map float images (N, in_channels, H, W), at least 16x16, to logits (N, num_classes)."""
        # This memory format makes convolutions on a CPU about twice as fast. With one channel, `contiguous` would
        # return `x` unchanged. https://docs.pytorch.org/tutorials/intermediate/memory_format_tutorial.html
        x = x.clone(memory_format=torch.channels_last)
        # After the pooling, normalisation and ReLU process a quarter of the values.
        x = F.relu(self.norm1(F.max_pool2d(self.conv1(x), 2)))
        x = F.relu(self.norm2(F.max_pool2d(self.conv2(x), 2)))
        x = F.adaptive_avg_pool2d(x, 4)  # to 4x4, which it is already for 28x28 images
        x = F.relu(self.fc1(x.flatten(1)))
        logits: Tensor = self.fc2(x)
        return logits


def make_model(facts: Facts) -> nn.Module:
    """Create the model, which maps float32 images to logits. To use another one, change only this function."""
    in_channels, _, _ = facts["image-shape"]
    return Net(in_channels, len(facts["class-names"]))


def initial_model(facts: Facts, seed: int) -> nn.Module:
    """Create the model with random weights that depend only on `seed`."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(int(random_stream(seed, Purpose.WEIGHTS).integers(2**63)))
        return make_model(facts)


def make_gpu_repeatable() -> None:
    """Let cuDNN choose only deterministic kernels, and compute in float32.

    Without it, two runs with one seed differ. https://docs.pytorch.org/docs/stable/notes/randomness.html
    """
    torch.backends.cudnn.deterministic = True
    torch.backends.cudnn.allow_tf32 = False


def pick_device(name: str = "auto") -> torch.device:
    """Return the device `name`; "auto" prefers CUDA, then MPS, then the CPU. Raises UserError if it is not usable."""
    what = "device" if name == "auto" else "server-device"
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "mps" if torch.backends.mps.is_available() else "cpu"
    allowed = "; allowed: 'auto', 'cpu', and any other device that PyTorch has here"
    with explained(f"{what}: {name!r} is not usable here", allowed):
        torch.zeros(1, device=name).item()
    return torch.device(name)


# ----------------------------------------------------------------------------------- Data


def load_test_data(config: RunConfig) -> Data:
    """Load the data of the central evaluation. Raises UserError."""
    data = images.load_test_split(config)
    present = set(data.labels.tolist())
    if missing := [name for number, name in enumerate(data.class_names) if number not in present]:
        counts = f"{len(missing)} of {len(data.class_names)}"
        log.warning("No test images for %s classes, so the central accuracy ignores them: %s", counts, missing[:10])
    return data


def load_node_data(node_config: Mapping[str, object], number: int, config: RunConfig, facts: Facts) -> dict[str, Data]:
    """Load a node's "train" and "validation" data, from its own folder if `node_config` names one. Raises UserError.

    `number` identifies the node in every run. `facts` are the server's; other ServerApps send none.
    """
    shape = tuple(facts["image-shape"]) if "image-shape" in facts else None
    if "data-path" in node_config:
        splits = images.load_folder(str(node_config["data-path"]), number, config, shape)
    elif "partition-id" in node_config and "num-partitions" in node_config:
        splits = images.load_partition(number, int(str(node_config["num-partitions"])), config)
    else:
        raise UserError("a node needs --node-config 'data-path=\"…\"' or 'partition-id=… num-partitions=…'")
    names = facts.get("class-names")
    return {part: split.numbered_as(names) for part, split in splits.items()} if isinstance(names, list) else splits


# ------------------------------------------------------------------- Training and testing


def train(
    net: nn.Module, data: Data, config: RunConfig, *, lr: float, seed: int, device: torch.device, deadline: float = inf
) -> float:
    """Train `net` in place with SGD; return the mean training loss over all examples and epochs.

    Shuffling and augmentation derive from `seed`. `deadline` is in seconds since the epoch. Raises
    UserError without images, and TimeoutError when the deadline passes.
    """
    if not len(data):
        raise UserError("the training split is empty")
    generator = torch.Generator().manual_seed(seed)
    net.to(device).train()
    fused = device.type in ("cpu", "cuda") and all(p.is_floating_point() for p in net.parameters())  # one kernel a step
    optimizer = torch.optim.SGD(net.parameters(), lr=lr, momentum=config.momentum, fused=fused)
    inputs, labels = data.images.to(device), data.labels.to(device)

    # Logit adjustment (Menon et al. 2021, arXiv:2007.07314; for federated learning Zhang et al.
    # 2022, arXiv:2209.00189). A node with few classes would mostly learn which classes are frequent.
    # The logarithm of the label counts is added to the logits and accounts for the frequencies, so
    # the model learns what distinguishes the classes. Evaluation uses the plain logits.
    counts = torch.bincount(labels, minlength=len(data.class_names))
    adjustment = config.logit_adjustment * torch.log(counts + 1.0)

    losses, sizes = [], []
    with torch.random.fork_rng(devices=[device] if device.type == "cuda" else []):
        torch.manual_seed(seed + 1)  # for layers that draw from the global generator, such as Dropout
        for _ in range(config.local_epochs):
            order = torch.randperm(len(data), generator=generator).to(device)
            # Batches of nearly equal size: BatchNorm cannot train on a last batch of one image.
            for rows in order.tensor_split(ceil(len(data) / config.batch_size)):
                if time.time() > deadline:
                    raise TimeoutError("the deadline passed during training")
                batch = random_crop_and_flip(inputs[rows], generator) if config.augment else inputs[rows]
                optimizer.zero_grad()
                loss = F.cross_entropy(net(normalise(batch)) + adjustment, labels[rows])
                loss.backward()  # type: ignore[no-untyped-call]
                optimizer.step()
                losses.append(loss.detach())
                sizes.append(len(rows))
    return float(np.average(torch.stack(losses).cpu().double(), weights=sizes))


@torch.no_grad()
def test(net: nn.Module, data: Data, device: torch.device, batch_size: int = 500) -> Metrics:
    """Return the metrics of the model: numbers, or lists in the order of a fact. Raises UserError without images.

    "loss" must be among them, and SCORE. Each further one is recorded like these, centrally and over the nodes.
    """
    if not len(data):
        raise UserError("the split to evaluate on is empty; a node needs at least 5 images")
    was_training = net.training
    net.to(device).eval()
    height, width = data.images.shape[-2:]
    batch_size = max(1, batch_size * 32 * 32 // max(32 * 32, height * width))  # as much memory for large images
    logits = torch.cat([net(normalise(inputs.to(device))).cpu() for inputs in data.images.split(batch_size)])  # type: ignore[no-untyped-call]
    net.train(was_training)
    if logits.shape != (expected := (len(data), len(data.class_names))):
        raise UserError(f"the model returned {tuple(logits.shape)} logits; expected (images, classes): {expected}")
    losses = F.cross_entropy(logits, data.labels, reduction="none").double()
    hit = logits.argmax(1) == data.labels
    total, right = (torch.bincount(each, minlength=len(data.class_names)) for each in (data.labels, data.labels[hit]))
    per_class = [r / t if t else None for r, t in zip(right.tolist(), total.tolist(), strict=True)]
    return {
        "loss": losses.mean().item(),
        "accuracy": hit.double().mean().item(),
        "accuracy_per_class": per_class,
    }


def normalise(images: Tensor) -> Tensor:
    """Convert uint8 images (N, C, H, W) to floats, and normalise each image to mean 0 and variance 1.

    No node knows the mean of the whole data set. The result is contiguous, so that a model may use `view`.
    """
    floats = images.to(torch.float32, memory_format=torch.contiguous_format)
    floats.sub_(floats.mean((1, 2, 3), keepdim=True))
    variance = floats.square().mean((1, 2, 3), keepdim=True)  # twice as fast as torch.var
    return floats.mul_(torch.rsqrt(variance + 1))  # + 1: one grey level, to avoid division by 0


def random_crop_and_flip(images: Tensor, generator: torch.Generator, padding: int = 4) -> Tensor:
    """Shift each image (N, C, H, W) by up to `padding` pixels, fill with black, and mirror half of them on average."""
    n, _, height, width = images.shape
    shift = torch.randint(0, 2 * padding + 1, (2, n, 1), generator=generator)
    flip = torch.randint(0, 2, (n, 1), generator=generator).bool()
    columns = torch.arange(width).expand(n, width)
    columns = torch.where(flip, columns.flip(1), columns) + shift[1]
    rows = torch.arange(height) + shift[0]
    index = (torch.arange(n)[:, None, None], slice(None), rows[:, :, None], columns[:, None, :])
    return F.pad(images, (padding,) * 4)[index].permute(0, 3, 1, 2)  # the slice between index tensors goes last
