"""The model, the data and the training, without Flower. test_client_app.py has SGD as one would write it."""

import math

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from pytorch_example_low_level import images as image_module
from pytorch_example_low_level import task
from pytorch_example_low_level.config import RunConfig, UserError
from tests.grid import FACTS, typed_config

CPU = torch.device("cpu")
DIGITS = [str(digit) for digit in range(10)]
BINARY = ["cat", "dog"]


def config(**overrides) -> RunConfig:
    """Plain SGD without momentum in batches of four, unless told otherwise."""
    return typed_config(**{"batch_size": 4, "momentum": 0.0, "logit_adjustment": 0.0} | overrides)


def train(net: nn.Module, data: image_module.Split, lr: float = 0.1, seed: int = 1, **overrides) -> float:
    return task.train(net, data, config(**overrides), lr=lr, seed=seed, device=CPU)


def split(n: int, channels: int = 1, size: int = 28, classes: int = 10) -> image_module.Split:
    generator = torch.Generator().manual_seed(n)
    images = torch.randint(0, 256, (n, channels, size, size), dtype=torch.uint8, generator=generator)
    return image_module.Split(images, torch.randint(0, classes, (n,), generator=generator), DIGITS[:classes])


def black(labels: list[int], names: list[str] = BINARY) -> image_module.Split:
    return image_module.Split(torch.zeros(len(labels), 1, 28, 28, dtype=torch.uint8), torch.tensor(labels), names)


def equal(a: nn.Module, b: nn.Module) -> bool:
    return all(torch.equal(x, y) for x, y in zip(a.state_dict().values(), b.state_dict().values(), strict=True))


class Constant(nn.Module):
    """Logits that do not depend on the image: the softmax of (0, log 3) is (1/4, 3/4)."""

    def __init__(self, logits: tuple[float, ...] = (0.0, math.log(3))) -> None:
        super().__init__()
        self.logits = nn.Parameter(torch.tensor(logits))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.logits.expand(len(x), -1)


def test_classes_without_test_images_are_named(monkeypatch, caplog):
    for labels, said in (
        ([0, 1], []),
        ([1, 1], ["No test images for 1 of 2 classes, so the central accuracy ignores"]),
    ):
        monkeypatch.setattr(image_module, "load_test_split", lambda config, labels=labels: black(labels))
        assert task.load_test_data(config()).labels.tolist() == labels
        assert [message[: len(said[0])] for message in caplog.messages] == said
    assert caplog.text.rstrip().endswith("['cat']")


# ---------------------------------------------------------------------------------- Model


@pytest.mark.parametrize(("channels", "size"), [(1, 28), (3, 32), (1, 32), (3, 28)])
def test_the_net_takes_grey_and_rgb_images_of_both_sizes(channels, size):
    net = task.make_model({"image-shape": [channels, 28, 28], "class-names": list("abcdefg")})
    assert net(torch.zeros(2, channels, size, size)).shape == (2, 7)


def test_the_net_has_as_many_parameters_as_it_says():
    count = sum(p.numel() for p in task.Net(1, 10).parameters())
    assert f"{count:,} parameters" in task.Net.__doc__


def test_the_net_is_the_one_of_its_layers():
    net = task.initial_model(FACTS, seed=0)
    x = torch.randn(3, 1, 28, 28, generator=torch.Generator().manual_seed(0))
    h = x
    for conv, norm in ((net.conv1, net.norm1), (net.conv2, net.norm2)):
        pooled = F.max_pool2d(F.conv2d(h, conv.weight, conv.bias), 2)
        groups = pooled.unflatten(1, (4, -1))
        mean, variance = groups.mean((2, 3, 4), keepdim=True), groups.var((2, 3, 4), keepdim=True, correction=0)
        h = ((groups - mean) / (variance + norm.eps).sqrt()).flatten(1, 2).clamp(min=0)
    expected = net.fc2(net.fc1(h.flatten(1)).clamp(min=0))
    assert torch.allclose(net(x), expected, atol=1e-5)


def test_initial_weights_depend_on_the_seed_alone():
    torch.manual_seed(1)
    before = torch.random.get_rng_state()
    first = task.initial_model(FACTS, seed=5)
    assert torch.equal(torch.random.get_rng_state(), before)
    torch.manual_seed(2)
    assert equal(first, task.initial_model(FACTS, seed=5))
    assert not equal(first, task.initial_model(FACTS, seed=6))


def test_a_device_that_is_not_there_is_one_clear_error():
    assert task.pick_device("cpu").type == "cpu"
    assert task.pick_device().type in ("cpu", "cuda", "mps")
    for name in ("cuda:77", "nonsense", "vulkan"):
        with pytest.raises(UserError, match=rf"server-device: '{name}' is not usable .*; allowed: 'auto', 'cpu'"):
            task.pick_device(name)


def test_auto_takes_cuda_then_mps_then_the_cpu(monkeypatch):
    monkeypatch.setattr(torch, "zeros", lambda shape, device: torch.ones(shape))
    for cuda, mps, expected in [(True, True, "cuda"), (False, True, "mps"), (False, False, "cpu")]:
        monkeypatch.setattr(torch.cuda, "is_available", lambda cuda=cuda: cuda)
        monkeypatch.setattr(torch.backends.mps, "is_available", lambda mps=mps: mps)
        assert task.pick_device().type == expected


# ------------------------------------------------------------------- Training and testing


@pytest.mark.parametrize("batch_size", [1, 2, 5, 100])  # 2: the last batch is short and must not weigh more
def test_train_and_test_give_the_exact_mean_whatever_the_batches(batch_size):
    data, expected = black([1, 1, 1, 1, 0]), (4 * -math.log(3 / 4) - math.log(1 / 4)) / 5
    metrics = task.test(Constant(), data, CPU, batch_size)
    assert metrics == {"loss": pytest.approx(expected, rel=1e-6), "accuracy": 0.8, "accuracy_per_class": [0.0, 1.0]}
    loss = train(Constant(), data, lr=0.0, local_epochs=2, batch_size=batch_size)
    assert loss == pytest.approx(expected, rel=1e-6)


def test_the_accuracy_of_each_class_worked_out_by_hand():
    """The net says class 1 where the first pixel is dark, and class 0 elsewhere."""

    class Brightness(nn.Module):
        def forward(self, x):
            return F.one_hot((x[:, 0, 0, 0] < 0).long(), 4).float()

    images = torch.full((6, 1, 28, 28), 100, dtype=torch.uint8)
    images[:, 0, 0, 0] = torch.tensor([255, 0, 0, 0, 255, 255])
    data = image_module.Split(images, torch.tensor([0, 0, 1, 1, 1, 2]), ["a", "b", "c", "d"])
    for batch_size in (2, 500):
        result = task.test(Brightness(), data, CPU, batch_size)
        assert result["accuracy_per_class"] == [1 / 2, 2 / 3, 0.0, None]  # class d has no image
        assert result["accuracy"] == 1 / 2


def test_test_and_train_on_the_same_net_go_together():
    net = nn.Sequential(nn.Flatten(), nn.Dropout(0.5), nn.Linear(784, 10))
    data = split(20)
    for training in (True, False):
        net.train(training)
        first = task.test(net, data, CPU)
        assert net.training is training  # and it was evaluated without Dropout:
        assert first == task.test(net, data, CPU)
        assert all(p.grad is None and p.requires_grad for p in net.parameters())
    before = [p.clone() for p in net.parameters()]
    train(net, data)
    assert net.training
    assert not any(torch.equal(a, b) for a, b in zip(before, net.parameters(), strict=True))
    assert task.test(net, data, CPU)["loss"] < first["loss"]


@pytest.mark.parametrize("outputs", [1, 3])
def test_a_model_with_another_number_of_logits_is_refused(outputs):
    """Training would add the adjustment to a single logit, and go on."""
    net = torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(28 * 28, outputs))
    with pytest.raises(UserError, match=rf"returned \(2, {outputs}\) logits; expected \(images, classes\): \(2, 2\)"):
        task.test(net, black([0, 1]), CPU)


def test_training_stops_when_nobody_waits_any_more(monkeypatch):
    moments = iter([9.0, 9.5, 10.0, 10.1])
    monkeypatch.setattr(task.time, "time", lambda: next(moments))
    with pytest.raises(TimeoutError, match="deadline passed"):
        task.train(Constant(), split(20, classes=2), config(), lr=0.1, seed=1, device=CPU, deadline=10.0)
    assert list(moments) == []


@pytest.mark.parametrize("function", ["train", "test"])
def test_nothing_to_train_or_test_on_is_an_error(function):
    with pytest.raises(UserError, match="empty"):
        train(Constant(), split(0)) if function == "train" else task.test(Constant(), split(0), CPU)


# ---------------------------------------------------------------------------- Any nn.Module


def test_a_network_that_needs_contiguous_activations_works():
    """As that of PyTorch's tutorial, which uses `view`; augmented images are not contiguous."""

    class Viewing(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv, self.head = nn.Conv2d(3, 2, 5), nn.Linear(2 * 28 * 28, 10)

        def forward(self, x):
            return self.head(self.conv(x).view(len(x), -1))

    for augment in (False, True):
        net, data = Viewing(), split(8, channels=3, size=32)
        assert math.isfinite(train(net, data, augment=augment))
        assert math.isfinite(task.test(net, data, CPU)["loss"])


def test_dropout_is_repeatable_and_leaves_the_global_generator_alone():
    # All images are alike, so that no order matters.
    alike = image_module.Split(split(1).images.repeat(8, 1, 1, 1), torch.full((8,), 3), DIGITS)

    def run(seed: int, drawn: int) -> nn.Module:
        torch.manual_seed(0)
        net = nn.Sequential(nn.Flatten(), nn.Linear(784, 32), nn.Dropout(0.5), nn.Linear(32, 10))
        torch.rand(drawn)  # whatever else the process draws
        before = torch.random.get_rng_state()
        train(net, alike, seed=seed, batch_size=8)
        assert torch.equal(torch.random.get_rng_state(), before)
        return net

    assert equal(run(1, 1), run(1, 2))
    assert not equal(run(1, 1), run(2, 1))


# ------------------------------------------------------------------------- Images to floats


def test_normalise_gives_each_image_mean_0_and_variance_1():
    images = torch.tensor([[0, 0, 200, 200], [7, 7, 7, 7]], dtype=torch.uint8).view(2, 1, 2, 2)
    one = 100 / math.sqrt(100**2 + 1)  # half the pixels 100 below the mean, half above
    assert task.normalise(images).flatten(1).tolist() == [pytest.approx([-one, -one, one, one]), [0, 0, 0, 0]]
    assert images[0].tolist() == [[[0, 0], [200, 200]]]


@pytest.mark.parametrize("padding", [{"padding": 2}, {}])
def test_augmentation_shifts_and_mirrors_whole_images(padding):
    image = torch.zeros(1, 1, 13, 13, dtype=torch.uint8)
    image[0, 0, 6, 6], image[0, 0, 6, 7] = 100, 200  # a pair of pixels: its order shows a mirror
    seen = set()
    for moved in task.random_crop_and_flip(image.expand(3000, 1, 13, 13), torch.Generator().manual_seed(0), **padding):
        assert moved.shape == (1, 13, 13)
        assert moved.long().sum() == 300  # nothing is lost: the pair stays inside
        (row, first), (row2, second) = (moved[0] == 100).nonzero()[0], (moved[0] == 200).nonzero()[0]
        assert row == row2
        seen.add((int(row), int(first), int(second - first)))
    side = 2 * padding.get("padding", 4) + 1
    assert len(seen) == side * side * 2  # all shifts in both directions, mirrored or not


def test_augmentation_keeps_the_channels_of_a_pixel_together():
    images = torch.arange(2 * 3 * 8 * 8, dtype=torch.int16).remainder(251).to(torch.uint8).view(2, 3, 8, 8)
    moved = task.random_crop_and_flip(images, torch.Generator().manual_seed(3), padding=2)
    columns = {tuple(images[n, :, y, x].tolist()) for n in range(2) for y in range(8) for x in range(8)}
    assert {tuple(c) for c in moved.permute(0, 2, 3, 1).reshape(-1, 3).tolist()} <= columns | {(0, 0, 0)}
