"""Weighted means, by numbers that can be worked out by hand."""

import math
from collections.abc import Iterator

import pytest
import torch

from pytorch_example_low_level.server_app import weighted_mean
from pytorch_example_low_level.utils import to_array_record, weighted_mean_std


def test_the_mean_is_weighted_by_the_number_of_examples():
    a, b = {"w": torch.tensor([1.0, 2.0])}, {"w": torch.tensor([5.0, 10.0])}
    mean = weighted_mean([(a, 1), (b, 3)], like=a)
    assert mean["w"].tolist() == [4.0, 8.0]  # (1*1 + 3*5) / 4, (1*2 + 3*10) / 4
    assert a["w"].tolist() == [1.0, 2.0]  # no reply is changed, or counted twice
    assert b["w"].tolist() == [5.0, 10.0]


def test_a_cohort_of_one_comes_back_bit_by_bit():
    torch.manual_seed(0)
    model = {"w": torch.randn(100), "half": torch.randn(100).to(torch.bfloat16), "n": torch.tensor(7)}
    mean = weighted_mean([(model, 13)], like=model)
    assert all(torch.equal(mean[k], model[k]) and mean[k].dtype == model[k].dtype for k in model)
    assert mean["w"] is not model["w"]


def test_no_reply_gives_no_mean():
    assert weighted_mean([], like={"w": torch.zeros(2)}) is None


def test_integer_buffers_keep_their_dtype_and_are_rounded():
    like = torch.nn.BatchNorm1d(2).state_dict()
    assert like["num_batches_tracked"].dtype == torch.int64
    replies = [({**like, "num_batches_tracked": torch.tensor(n)}, w) for n, w in ((10, 1), (20, 2))]
    mean = weighted_mean(replies, like=like)
    assert mean["num_batches_tracked"].dtype == torch.int64
    assert mean["num_batches_tracked"].item() == 17  # 50 / 3 = 16.67
    assert mean["num_batches_tracked"].shape == ()


def test_bfloat16_is_summed_exactly_and_rounded_once():
    like = {"w": torch.zeros(1, dtype=torch.bfloat16)}
    # 256 + 1 is 256 in bfloat16: a sum kept in that type would never leave 256.
    replies = [({"w": torch.tensor([v], dtype=torch.bfloat16)}, 1) for v in [256.0] + [1.0] * 255]
    mean = weighted_mean(replies, like=like)
    assert mean["w"].dtype == torch.bfloat16
    assert mean["w"].item() == torch.tensor((256 + 255) / 256).to(torch.bfloat16).item()


def test_bfloat16_travels_as_float32_which_holds_it_exactly():
    model = {"w": torch.randn(10).to(torch.bfloat16), "v": torch.randn(3), "n": torch.tensor(3)}
    received = to_array_record(model).to_torch_state_dict()
    assert received["w"].dtype == torch.float32
    assert torch.equal(received["w"].to(torch.bfloat16), model["w"])
    assert received["n"].dtype == torch.int64


def test_updates_are_added_one_by_one_and_never_held():
    alive = 0
    peak = 0

    class Update(dict):
        def __init__(self, value: float) -> None:
            nonlocal alive, peak
            super().__init__(w=torch.full((4,), value))
            alive += 1
            peak = max(peak, alive)

        def __del__(self) -> None:
            nonlocal alive
            alive -= 1

    def updates() -> Iterator[tuple[Update, int]]:
        for value in range(50):
            yield Update(float(value)), 2

    mean = weighted_mean(updates(), like={"w": torch.zeros(4)})
    assert mean["w"].tolist() == [24.5] * 4
    assert peak <= 2  # the one that is added, and the one that comes


def test_mean_and_standard_deviation_are_weighted():
    mean, std = weighted_mean_std([1.0, 4.0], [2, 1])
    assert mean == 2.0  # (2*1 + 1*4) / 3
    assert std == pytest.approx(math.sqrt(2))  # (2*1 + 1*4) / 3 = 2
    assert weighted_mean_std([0.7], [5]) == (0.7, 0.0)
    assert weighted_mean_std([], []) == (None, None)
