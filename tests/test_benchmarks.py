"""The figures of the README come from programs; what those compute is checked here."""

import numpy as np
import pytest
from flwr.app import MessageType

from benchmarks.convergence import table
from benchmarks.federated_figure import evaluate_nodes
from benchmarks.network_round import look_figures
from benchmarks.round_time import cohorts
from tests.conftest import results


def test_the_floor_does_the_work_of_the_rounds_of_the_app(app):
    grid = app.grid(num_nodes=50)
    app.run(grid, fraction_clients_train=0.2, num_server_rounds=2)
    asked = {MessageType.TRAIN: "train", MessageType.EVALUATE: "validation"}
    for server_round, pieces in enumerate(cohorts(app.defaults["dataset"], 2), start=1):
        sent = [
            (asked[m.metadata.message_type], grid.partition(m.metadata.dst_node_id))
            for m in grid.sent
            if m.metadata.group_id == str(server_round) and m.metadata.message_type in asked
        ]
        assert [piece for piece in pieces if piece[0] != "test"] == sent
        assert [number for part, number in pieces if part == "test"] == [0, 1, 2, 3]


def test_the_federated_figure_of_all_nodes_is_that_of_a_round_in_which_all_opt_in(app):
    directory = app.run(opt_in_probability=1.0, num_server_rounds=1)
    accuracies, sizes, _ = evaluate_nodes(directory, 5)
    assert np.average(accuracies, weights=sizes) == pytest.approx(
        results(directory)[1]["federated_evaluate_accuracy"], abs=1e-12
    )


def test_replies_are_matched_with_what_their_node_had_sent():
    log = """
    LOOK query 10.0
    LOOK query 10.2
    LOOK query 10.5
    PICKED query 7 11.0
    PICKED query 8 11.0
    LOOK train 20.0
    LOOK train 20.4
    PICKED train 8 21.4
    LOOK evaluate 30.0
    PICKED evaluate 7 32.0
    """
    figures = look_figures(log, {7: [10.7, 31.0], 8: [10.9, 21.0]})
    # The gaps are 0.2 and 0.3 s in QUERY and 0.4 s in TRAIN.
    assert figures["from one look for replies to the next, s (median)"] == pytest.approx(0.3)
    assert figures["from a reply sent to a reply in hand, QUERY, s (median)"] == pytest.approx(0.2)
    assert figures["from a reply sent to a reply in hand, TRAIN, s (median)"] == pytest.approx(0.4)
    assert figures["from a reply sent to a reply in hand, EVALUATE, s (median)"] == pytest.approx(1.0)
    assert figures["from a reply sent to a reply in hand, s (worst)"] == pytest.approx(1.0)


def test_the_table_of_seeds_has_mean_deviation_and_worst():
    def run(central: float, federated: float | None) -> list[dict]:
        row = {"centralized_accuracy": central, "federated_evaluate_accuracy": federated}
        return [row, row]

    seeds = [run(0.2, 0.5), run(0.4, 0.7), run(0.6, None)]
    assert table(seeds).splitlines()[-1] == "| 1 | 0.400 ± 0.163 | 0.200 | 0.600 ± 0.100 | 0.500 |"
