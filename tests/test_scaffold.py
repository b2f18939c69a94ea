"""The recipe SCAFFOLD beside a run of the algorithm that is written down once more, on a convex problem."""

from types import SimpleNamespace

import numpy as np
import pytest
import torch
from torch import nn

from tests.grid import InProcessGrid
from tests.recipes import changed_app
from tests.test_recipes import trained, try_out

__all__ = ["try_out"]  # a fixture
pytestmark = pytest.mark.e2e

CURVATURE, MINIMUM = np.array([1.0, 2.0, 0.5, 1.5]), np.array([4.0, -1.0, 2.0, 0.0])  # of the nodes' losses
STEPS, RATE = 3, 0.1


class Data:
    """The loss a / 2 (w - b)² of one node."""

    node_names = ()

    def __init__(self, a: float, b: float) -> None:
        self.a, self.b, self.facts = a, b, {"dimensions": 1}

    def __len__(self) -> int:
        return 1

    def fingerprint(self) -> str:
        return ""


class Point(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.w = nn.Parameter(torch.zeros(1))


def descend(net, data, config, *, lr, seed, device, deadline=0.0) -> float:
    optimizer = torch.optim.SGD(net.parameters(), lr=lr)
    for _ in range(config.local_epochs):
        optimizer.zero_grad()
        loss = data.a / 2 * (net.w - data.b).square().sum()
        loss.backward()
        optimizer.step()
    return loss.item()


@pytest.fixture
def app() -> SimpleNamespace:
    app = changed_app("scaffold")
    nodes = [Data(a, b) for a, b in zip(CURVATURE, MINIMUM, strict=True)]
    app.task.load_test_data = lambda config: Data(1.0, 0.0)
    app.task.load_node_data = lambda node_config, number, config, facts: {"train": nodes[number]}
    app.task.make_model = lambda facts: Point()
    app.task.train = descend
    app.task.test = lambda net, data, device: {"loss": 0.0, "accuracy": 0.0}
    return app


SETTINGS = {
    "local_epochs": STEPS,
    "learning_rate": RATE,
    "lr_decay_every": 0,
    "opt_in_probability": 0.0,
}


def by_hand(cohorts: list[list[int]], resumed_after: int = 0) -> tuple[float, float]:
    """The paper's algorithm 1, option II, with a global rate of 1. When it is resumed, the nodes take the server's."""
    x, c, own = 0.0, 0.0, np.zeros(4)
    for number, cohort in enumerate(cohorts):
        own = np.full(4, c) if number == resumed_after else own
        ends, changes = [], []
        for i in cohort:
            mine, y = own[i], x
            for _ in range(STEPS):
                y -= RATE * (CURVATURE[i] * (y - MINIMUM[i]) - mine + c)
            own[i] = mine - c + (x - y) / (STEPS * RATE)
            ends.append(y - x)
            changes.append(own[i] - mine)
        x += np.mean(ends)
        c += len(cohort) / 4 * np.mean(changes)
    assert c == pytest.approx(own.mean())
    return x, c


@pytest.mark.parametrize("fraction", [1.0, 0.5])
def test_it_is_the_algorithm_of_the_paper(app, try_out, fraction):
    grid = InProcessGrid(app.client_app.app, {}, 4)
    done = try_out(app, grid, fraction_clients_train=fraction, num_server_rounds=20, **SETTINGS)
    cohorts = list(trained(grid).values())
    assert {len(cohort) for cohort in cohorts} == {4 * fraction}
    x, _ = by_hand(cohorts)
    assert done.model["w"].item() == pytest.approx(x, abs=1e-5)
    last = [m for m in grid.sent if m.metadata.message_type == "train"][-1]  # it has c before the last round
    before = by_hand(cohorts[:-1])[1]
    assert last.content["arrays"]["control/w"].numpy().item() == pytest.approx(before, abs=1e-5)
    # In the end, it is at the minimum of the sum of all losses, which FedAvg with three steps misses.
    x, _ = by_hand(cohorts * 10)
    assert x == pytest.approx((CURVATURE * MINIMUM).sum() / CURVATURE.sum(), abs=1e-3)


def test_momentum_is_refused(app, try_out):
    with pytest.raises(app.config.UserError, match="momentum"):
        try_out(app, InProcessGrid(app.client_app.app, {}, 4), momentum=0.9, **SETTINGS)


def test_a_resumed_run_keeps_the_server_s_variate_and_the_nodes_begin_there(app, try_out):
    more = {"fraction_clients_train": 0.5, **SETTINGS}
    grids = [InProcessGrid(app.client_app.app, {}, 4) for _ in range(2)]
    done = try_out(app, grids[0], num_server_rounds=5, **more)
    done = try_out(app, grids[1], num_server_rounds=20, resume_from=str(done.directory), **more)
    cohorts = [list(trained(grid).values()) for grid in grids]
    assert [len(rounds) for rounds in cohorts] == [5, 15]
    x, _ = by_hand(cohorts[0] + cohorts[1], resumed_after=5)
    assert done.model["w"].item() == pytest.approx(x, abs=1e-5)
    last = [m for m in grids[1].sent if m.metadata.message_type == "train"][-1]
    before = by_hand(cohorts[0] + cohorts[1][:-1], resumed_after=5)[1]
    assert last.content["arrays"]["control/w"].numpy().item() == pytest.approx(before, abs=1e-5)


def test_the_model_of_the_app_learns_and_a_resumed_run_begins_with_the_variate_of_the_checkpoint(try_out):
    app = changed_app("scaffold")
    done = try_out(app, num_server_rounds=2, opt_in_probability=1.0)
    assert [row["train_received"] for row in done.rows[1:]] == [3, 3]
    assert done.rows[2]["centralized_loss"] < done.rows[0]["centralized_loss"]
    of_round = {m.metadata.group_id: m for m in done.grid.sent if m.metadata.message_type == "train"}
    assert variate(of_round["1"]) == 0 < variate(of_round["2"])
    saved = torch.load(done.directory / "checkpoints" / "last.pt", weights_only=True)["control"]
    assert variate(of_round["2"]) != max(tensor.abs().max().item() for tensor in saved.values()) > 0
    more = try_out(app, num_server_rounds=3, opt_in_probability=1.0, resume_from=str(done.directory))
    assert [row["train_received"] for row in more.rows[1:]] == [3, 3, 3]
    first = more.grid.sent[0].content["arrays"].to_torch_state_dict()
    assert all(torch.equal(first[name], tensor) for name, tensor in saved.items())


def variate(message) -> float:
    """The largest number of the server's control variate in a TRAIN message."""
    arrays = message.content["arrays"].to_torch_state_dict()
    return max(tensor.abs().max().item() for name, tensor in arrays.items() if name.startswith("control/"))
