"""The model, the data and the training, without Flower."""

import math
import os
import subprocess
import sys

import datasets
import numpy as np
import pytest
import torch
from PIL import Image
from torch import nn

from pytorch_example_low_level import task
from pytorch_example_low_level.config import UserError

CPU = torch.device("cpu")
TRAINING = {"epochs": 1, "batch_size": 4, "lr": 0.1, "momentum": 0.0, "augment": False, "seed": 1, "device": CPU}


def split(n: int, channels: int = 1, size: int = 28, classes: int = 10) -> task.Split:
    generator = torch.Generator().manual_seed(n)
    images = torch.randint(0, 256, (n, channels, size, size), dtype=torch.uint8, generator=generator)
    return task.Split(images, torch.randint(0, classes, (n,), generator=generator))


class Constant(nn.Module):
    """Logits that do not depend on the image: the softmax of (0, log 3) is (1/4, 3/4)."""

    def __init__(self) -> None:
        super().__init__()
        self.logits = nn.Parameter(torch.tensor([0.0, float(np.log(3))]))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.logits.expand(len(x), 2)


@pytest.mark.parametrize(("channels", "size"), [(1, 28), (3, 32), (1, 32), (3, 28)])
def test_the_net_takes_grey_and_rgb_images_of_both_sizes(channels, size):
    net = task.Net(channels, 7)
    assert net(torch.zeros(2, channels, size, size)).shape == (2, 7)


def test_the_net_has_the_number_of_parameters_that_its_docstring_says():
    assert sum(p.numel() for p in task.Net().parameters()) == 80_202


def test_initial_weights_depend_on_the_seed_alone():
    torch.manual_seed(1)
    before = torch.random.get_rng_state()
    first = task.Net.initial(1, 10, seed=5).state_dict()
    assert torch.equal(torch.random.get_rng_state(), before)
    torch.manual_seed(2)
    second, other = task.Net.initial(1, 10, seed=5).state_dict(), task.Net.initial(1, 10, seed=6).state_dict()
    assert all(torch.equal(first[k], second[k]) for k in first)
    assert not torch.equal(first["fc1.weight"], other["fc1.weight"])


def test_a_node_learns_channels_and_classes_from_the_model():
    net = task.Net.from_state_dict(task.Net(3, 100).state_dict())
    assert net.in_channels == 3
    assert net.fc2.out_features == 100


def test_test_gives_the_exact_mean_over_examples_whatever_the_batches():
    data = task.Split(torch.zeros(5, 1, 28, 28, dtype=torch.uint8), torch.tensor([1, 1, 1, 1, 0]))
    expected = (4 * -np.log(3 / 4) - np.log(1 / 4)) / 5
    for batch_size in (1, 2, 5, 100):  # 2: the last batch is short and must not weigh more
        loss, accuracy = task.test(Constant(), data, CPU, batch_size)
        assert loss == pytest.approx(expected, rel=1e-6)
        assert accuracy == 0.8


def test_train_reports_the_mean_loss_over_examples_and_uses_the_short_last_batch():
    data = task.Split(torch.zeros(5, 1, 28, 28, dtype=torch.uint8), torch.tensor([1, 1, 1, 1, 0]))
    loss = task.train(Constant(), data, **TRAINING | {"lr": 0.0})
    assert loss == pytest.approx((4 * -np.log(3 / 4) - np.log(1 / 4)) / 5, rel=1e-6)


def test_one_step_of_sgd_is_the_gradient_times_the_rate():
    data = task.Split(torch.zeros(4, 1, 28, 28, dtype=torch.uint8), torch.tensor([1, 1, 1, 1]))
    net = Constant()
    task.train(net, data, **TRAINING)  # d loss / d logits = softmax - one-hot = (1/4, -1/4)
    assert net.logits.tolist() == pytest.approx([-0.025, float(np.log(3)) + 0.025], rel=1e-6)


@pytest.mark.parametrize("momentum", [0.9, 0.0])
def test_steps_of_sgd_have_the_bits_of_the_optimizer_of_pytorch(momentum):
    nets = [task.Net.initial(1, 10, seed=0).to(memory_format=torch.channels_last) for _ in range(2)]
    ours, theirs = ([*net.parameters()] for net in nets)
    optimizer = torch.optim.SGD(theirs, lr=0.05, momentum=momentum, fused=True)
    momenta = [None] * len(ours)
    for seed in range(3):
        torch.manual_seed(seed)
        gradients = [torch.randn_like(parameter) for parameter in ours]
        task.step(ours, gradients, momenta, 0.05, momentum)
        for parameter, gradient in zip(theirs, gradients, strict=True):
            parameter.grad = gradient
        optimizer.step()
        assert all(torch.equal(a, b) for a, b in zip(ours, theirs, strict=True))


def test_frozen_layers_stay_as_they_are_and_the_others_learn():
    net = task.Net.initial(1, 10, seed=0)
    before = {name: tensor.clone() for name, tensor in net.state_dict().items()}
    net.conv1.requires_grad_(False)
    task.train(net, split(20), **TRAINING)
    same = {name for name, tensor in net.state_dict().items() if torch.equal(tensor, before[name])}
    assert same == {"conv1.weight", "conv1.bias"}


def test_training_has_the_same_bits_for_the_same_seed_and_leaves_the_global_state_alone():
    data = split(30)

    def run(seed: int, augment: bool) -> dict:
        net = task.Net.initial(1, 10, 0)
        torch.rand(3)  # whatever else the process draws
        before = torch.random.get_rng_state()
        task.train(net, data, **TRAINING | {"seed": seed, "augment": augment})
        assert torch.equal(torch.random.get_rng_state(), before)
        return net.state_dict()

    for augment in (False, True):
        first, second, other = run(1, augment), run(1, augment), run(2, augment)
        assert all(torch.equal(first[k], second[k]) for k in first)
        assert not torch.equal(first["fc2.bias"], other["fc2.bias"])


def test_training_stops_when_nobody_waits_any_more():
    calls = iter([False, False, True])
    with pytest.raises(TimeoutError):
        task.train(Constant(), split(20, classes=2), **TRAINING | {"overdue": lambda: next(calls)})


@pytest.mark.parametrize("function", ["train", "test"])
def test_nothing_to_train_or_test_on_is_an_error(function):
    with pytest.raises(task.DataError, match="empty"):
        task.train(Constant(), split(0), **TRAINING) if function == "train" else task.test(Constant(), split(0), CPU)


def test_normalise_gives_each_image_mean_0_and_variance_1():
    images = torch.tensor([[0, 0, 200, 200], [7, 7, 7, 7]], dtype=torch.uint8).view(2, 1, 2, 2)
    one = 100 / math.sqrt(100**2 + 1)  # half the pixels 100 below the mean, half above
    assert task.normalise(images).flatten(1).tolist() == [pytest.approx([-one, -one, one, one]), [0, 0, 0, 0]]
    assert task.normalise(split(3, channels=3, size=32).images).is_contiguous(memory_format=torch.channels_last)


def test_augmentation_shifts_and_mirrors_whole_images():
    image = torch.zeros(1, 1, 9, 9, dtype=torch.uint8)
    image[0, 0, 4, 4], image[0, 0, 4, 5] = 100, 200  # a pair of pixels: its order shows a mirror
    seen = set()
    generator = torch.Generator().manual_seed(0)
    for moved in task.random_crop_and_flip(image.expand(2000, 1, 9, 9), generator, padding=2):
        assert moved.shape == (1, 9, 9)
        assert moved.long().sum() == 300  # nothing is lost: the pair stays inside
        (row, first), (row2, second) = (moved[0] == 100).nonzero()[0], (moved[0] == 200).nonzero()[0]
        assert row == row2
        seen.add((int(row), int(first), int(second - first)))
    assert len(seen) == 5 * 5 * 2  # all shifts of -2..2 in both directions, mirrored or not


def test_augmentation_keeps_the_channels_of_a_pixel_together():
    images = torch.arange(2 * 3 * 8 * 8, dtype=torch.int16).remainder(251).to(torch.uint8).view(2, 3, 8, 8)
    moved = task.random_crop_and_flip(images, torch.Generator().manual_seed(3), padding=2)
    columns = {tuple(images[n, :, y, x].tolist()) for n in range(2) for y in range(8) for x in range(8)}
    assert {tuple(c) for c in moved.permute(0, 2, 3, 1).reshape(-1, 3).tolist()} <= columns | {(0, 0, 0)}


def test_every_device_that_is_not_there_is_one_clear_error():
    assert task.pick_device("cpu").type == "cpu"
    if not torch.cuda.is_available():
        with pytest.raises(UserError, match="server-device"):
            task.pick_device("cuda:7")


# ----------------------------------------------------------------------------------- Data


def load(dataset: str, partition: int = 0, of: int = 4, how: str = "iid", alpha: float = 1.0):
    return task.load_partition(1, partition, of, dataset, how, alpha, 42)


@pytest.mark.parametrize("how", ["iid", "dirichlet"])
def test_partitions_share_out_all_images_once_in_80_to_20(tiny_dataset, how):
    whole = datasets.load_dataset(tiny_dataset, split="train")
    images = []
    for partition in range(4):
        train, validation = load(tiny_dataset, partition, how=how).values()
        n = len(train) + len(validation)
        assert len(validation) == int(0.2 * n)
        images += [*train.images, *validation.images]
    assert sorted(i.numpy().tobytes() for i in images) == sorted(np.asarray(i).tobytes() for i in whole["image"])


def test_iid_partitions_are_not_cut_from_sorted_rows(tmp_path, tiny_dataset):
    rows = datasets.load_dataset(tiny_dataset, split="train").sort("label")
    rows.to_parquet(tmp_path / "data" / "train.parquet")
    assert len(load(str(tmp_path))["train"].labels.unique()) > 5


def test_a_small_alpha_gives_a_node_few_labels(tiny_dataset):
    def labels(alpha: float) -> float:
        return np.mean([len(load(tiny_dataset, p, 4, "dirichlet", alpha)["train"].labels.unique()) for p in range(4)])

    assert labels(0.05) < labels(1000.0)


def test_arrow_columns_give_the_same_dirichlet_partition_as_plain_ones(tiny_dataset):
    from flwr_datasets.partitioner import DirichletPartitioner

    plain = DirichletPartitioner(4, partition_by="label", alpha=1.0, seed=42, min_partition_size=5)
    plain.dataset = datasets.load_dataset(tiny_dataset, split="train")
    ours = task.federated_dataset(tiny_dataset, "dirichlet", 4, 1.0, 42)
    for partition in range(4):
        expected = plain.load_partition(partition)["label"][:]
        assert ours.load_partition(partition)["label"].to_pylist() == expected


def test_the_bundled_images_are_real_and_balanced():
    data, classes = task.load_test_split(task.BUNDLED)
    assert data.images.shape == (2000, 1, 28, 28)
    assert classes == 10
    assert data.labels.bincount().tolist() == [200] * 10
    import hashlib

    digest = hashlib.sha256(data.images.numpy().tobytes() + data.labels.to(torch.uint8).numpy().tobytes())
    card = (task.Path(task._locate(task.BUNDLED)) / "README.md").read_text()
    assert digest.hexdigest() in card


def test_a_test_split_may_be_called_validation_and_its_absence_is_named(tmp_path, tiny_dataset):
    rows = datasets.load_dataset(tiny_dataset, split="test")
    for folder in ("without", "with"):
        rows.to_parquet(tmp_path / folder / "train.parquet")
    rows.to_parquet(tmp_path / "with" / "validation.parquet")
    assert len(task.load_test_split(str(tmp_path / "with"))[0]) == 40
    with pytest.raises(task.DataError, match=r"no split test or validation"):
        task.load_test_split(str(tmp_path / "without"))


def test_a_hub_out_of_reach_is_asked_once_and_not_again_and_again():
    """In a process of its own: the libraries read HF_HUB_OFFLINE when they are imported."""
    env = {k: v for k, v in os.environ.items() if k != "HF_HUB_OFFLINE"} | {"HF_ENDPOINT": "http://127.0.0.1:9"}
    script = "from pytorch_example_low_level import task; task.load_test_split('nobody/no-such-data-set')"
    done = subprocess.run([sys.executable, "-c", script], env=env, capture_output=True, text=True, check=False)
    assert done.returncode == 1
    assert "Cannot use dataset 'nobody/no-such-data-set'" in done.stderr
    assert "fashion-mnist-sample" in done.stderr
    assert "Retrying" not in done.stderr


def write(folder, features: dict, columns: dict) -> str:
    rows = datasets.Dataset.from_dict(columns, features=datasets.Features(features))
    for name in ("train", "test"):
        rows.to_parquet(folder / f"{name}.parquet")
    return str(folder)


def picture(mode: str, size: tuple[int, int], colour) -> Image.Image:
    return Image.new(mode, size, colour)


LABEL = datasets.ClassLabel(names=["cat", "dog"])


def test_columns_are_found_by_their_types_whatever_they_are_called(tmp_path):
    columns = {"id": [1, 2], "kind": [0, 1], "photo": [picture("L", (28, 28), c) for c in (10, 20)]}
    folder = write(tmp_path, {"id": datasets.Value("int64"), "kind": LABEL, "photo": datasets.Image()}, columns)
    data, classes = task.load_test_split(folder)
    assert classes == 2
    assert data.images[:, 0, 0, 0].tolist() == [10, 20]
    assert data.labels.tolist() == [0, 1]


def test_a_missing_label_column_is_named_with_the_columns_there_are(tmp_path):
    features = {"photo": datasets.Image(), "age": datasets.Value("int64")}
    folder = write(tmp_path, features, {"photo": [picture("L", (28, 28), 1)], "age": [3]})
    with pytest.raises(task.DataError, match=r"no column of type ClassLabel.*age"):
        task.load_test_split(folder)


def test_images_of_varying_size_and_mode_become_32x32_rgb(tmp_path):
    images = [picture("L", (28, 28), 7), picture("RGB", (50, 40), (1, 2, 3)), picture("RGBA", (9, 9), (1, 2, 3, 255))]
    features = {"image": datasets.Image(), "label": LABEL}
    data, _ = task.load_test_split(write(tmp_path, features, {"image": images, "label": [0, 1, 0]}))
    assert data.images.shape == (3, 3, 32, 32)
    assert data.images[1, :, 16, 16].tolist() == [1, 2, 3]


def test_28x28_among_32x32_gets_a_black_frame(tmp_path):
    features = {"image": datasets.Image(), "label": LABEL}
    images = [picture("L", (28, 28), 7), picture("L", (32, 32), 9)]
    data, _ = task.load_test_split(write(tmp_path, features, {"image": images, "label": [0, 1]}))
    assert data.images.shape == (2, 1, 32, 32)
    assert data.images[0, 0, 2:-2, 2:-2].unique().tolist() == [7]
    assert data.images[0].sum() == 7 * 28 * 28


def test_a_nodes_own_folder_is_split_like_a_partition(tmp_path, tiny_dataset):
    rows = datasets.load_dataset(tiny_dataset, split="train").select(range(20))
    rows.save_to_disk(tmp_path / "mine")
    train, validation = (task.load_folder(part, 1, str(tmp_path / "mine"), 3, 42) for part in task.PARTS)
    assert (len(train), len(validation)) == (16, 4)
    with pytest.raises(task.DataError, match="data-path"):
        task.load_folder("train", 1, str(tmp_path / "nothing"), 3, 42)


@pytest.mark.parametrize("dataset", ["/no/such/folder", "./none", "nobody/no-such-data-set"])
def test_a_data_set_that_is_not_there_is_one_error_that_says_what_can_be_used(dataset):
    with pytest.raises(task.DataError, match=r"(?s)Cannot use dataset.*Allowed.*fashion-mnist-sample.*folder.*Hub"):
        task.load_test_split(dataset)


def test_missing_bundled_images_say_how_to_install_them(monkeypatch):
    monkeypatch.setattr(task, "find_spec", lambda name: None)
    with pytest.raises(task.DataError, match="pip install"):
        task._locate(task.BUNDLED)


def test_more_nodes_than_images_is_an_error_that_names_both(tiny_dataset):
    with pytest.raises(task.DataError, match="partition 3 of 1000 of dataset"):
        load(tiny_dataset, 3, 1000, "dirichlet")


def test_partitions_smaller_than_a_batch_train_and_single_images_have_no_validation_split(tiny_dataset):
    data, validation = load(tiny_dataset, 0, 120).values()
    assert len(data) == 1
    assert len(validation) == 0
    assert task.train(task.Net(), data, **TRAINING) > 0
