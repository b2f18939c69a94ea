"""The same bits in two runs on a GPU, which gives nearly the CPU's result. Skipped without CUDA."""

import pytest
import torch
from torch import nn

from pytorch_example_low_level import task
from tests.conftest import App, model, results, same_bits

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="there is no CUDA here")
make_model = task.make_model


@pytest.fixture
def run(app, quick_plot, monkeypatch):
    """Run the loop with server and nodes on a device, with augmentation; return the rows and the final model."""

    def run(app: App, device: str, dropout: float) -> tuple[list[dict], dict[str, torch.Tensor]]:
        monkeypatch.setattr(task, "make_model", lambda facts: nn.Sequential(make_model(facts), nn.Dropout(dropout)))
        monkeypatch.setattr(task, "pick_device", lambda name="auto": torch.device(device))
        directory = app.run(augment=True, opt_in_probability=1.0)
        return results(directory), model(directory)

    return lambda *args: run(app, *args)


def test_two_runs_with_one_seed_have_the_same_bits(run):
    rows, final = run("cuda", 0.1)
    assert [row["train_received"] for row in rows[1:]] == [3, 3]
    again, final_again = run("cuda", 0.1)
    assert same_bits(final, final_again)
    assert rows == again


def test_the_losses_are_those_of_the_cpu(run):
    """Without dropout, whose random numbers a GPU draws in another way."""
    rows, _ = run("cpu", 0.0)
    there, _ = run("cuda", 0.0)
    for key in ("centralized_loss", "federated_evaluate_loss"):
        assert [row[key] for row in there[1:]] == pytest.approx([row[key] for row in rows[1:]], abs=1e-3)
