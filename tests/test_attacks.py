"""The recipes with hostile nodes, and the rules in the place of the mean, by hand."""

import pytest
import torch
from flwr.app import ConfigRecord, Message, MessageType, RecordDict

from tests.conftest import same_bits
from tests.grid import FACTS, InProcessGrid, typed_config
from tests.recipes import changed_app

pytestmark = pytest.mark.e2e

LIKE = {"w": torch.zeros(2), "n": torch.tensor(0)}


def models(*pairs: tuple[float, float]) -> list[tuple[dict[str, torch.Tensor], int]]:
    """Models of two numbers and a counter; the number of examples must not matter."""
    return [({"w": torch.tensor(pair), "n": torch.tensor(i)}, 10**i) for i, pair in enumerate(pairs)]


def rule(name: str, *pairs: tuple[float, float], like: dict[str, torch.Tensor] = LIKE) -> list[float]:
    mean = changed_app(name).server_app.weighted_mean(models(*pairs), like)
    assert mean.keys() == like.keys()
    assert [tensor.dtype for tensor in mean.values()] == [tensor.dtype for tensor in like.values()]
    return mean["w"].tolist()


RULES = ["median", "trimmed-mean", "multi-krum", "norm-clipping"]


def test_the_median_is_that_of_each_number():
    pairs = (1.0, 9.0), (2.0, 8.0), (1e30, -1e30)
    assert rule("median", *pairs) == [2.0, 8.0]
    assert rule("median", (9.0, 0.0), (1.0, 0.0), (3.0, 0.0), (2.0, 0.0)) == [2.5, 0.0]  # of the two in the middle
    counters = [({"n": torch.tensor(number)}, 1) for number in (1, 2, 5, 9)]
    assert changed_app("median").server_app.weighted_mean(counters, {"n": torch.tensor(0)})["n"].item() == 4


def test_the_trimmed_mean_leaves_out_both_ends_of_each_number():
    # Of five models, one is cut at each end: 2, 3, 4 and 1, 2, 30 are left.
    pairs = (100.0, 1.0), (2.0, 2.0), (3.0, 30.0), (4.0, -5.0), (-100.0, 40.0)
    assert rule("trimmed-mean", *pairs) == [3.0, 11.0]


def test_multi_krum_keeps_models_that_are_near_each_other():
    # n = 7, f = 2: the sum of the squared distances to the nearest 3 is 6 for (0, 0), 1 + 1 + 4 for (1, 0), ...
    near = (0.0, 0.0), (1.0, 0.0), (0.0, 1.0), (-1.0, 0.0), (0.0, -1.0)
    assert rule("multi-krum", *near, (50.0, 0.0), (50.0, 1.0)) == [0.0, 0.0]
    # n = 5, f = 1, two neighbours: the scores are 1 + 9, 1 + 4, 4 + 9, 9 + 25 and 10,000 or more.
    line = (0.0, 0.0), (1.0, 0.0), (3.0, 0.0), (6.0, 0.0), (106.0, 0.0)
    assert rule("multi-krum", *line) == [2.5, 0.0]


def test_updates_are_clipped_to_the_median_norm():
    # From (1, 1), the updates are (3, 4), (0, 10) and (0, 0.5): norms 5, 10 and 0.5.
    like = {"w": torch.ones(2), "n": torch.tensor(0)}
    expected = [1 + (3 + 0 + 0) / 3, 1 + (4 + 5 + 0.5) / 3]
    app = changed_app("norm-clipping")
    updates = [({"w": torch.tensor(pair)}, 1) for pair in ((4.0, 5.0), (1.0, 11.0), (1.0, 1.5))]
    mean = app.server_app.weighted_mean(updates, {"w": like["w"]})
    assert mean["w"].tolist() == pytest.approx(expected)
    # Of norms 1 and 3, the median is 2.
    two = [({"w": torch.tensor(pair)}, 1) for pair in ((2.0, 1.0), (1.0, 4.0))]
    assert app.server_app.weighted_mean(two, {"w": like["w"]})["w"].tolist() == [1.5, 2.0]
    same = [({"w": like["w"]}, 1)] * 3  # norms of 0
    assert app.server_app.weighted_mean(same, {"w": like["w"]})["w"].tolist() == [1.0, 1.0]


def test_norm_clipping_keeps_what_no_node_has_changed():
    """The difference of a mask of -inf would be NaN, and a double is too short for 2^53 + 1."""
    like = {"mask": torch.tensor([True, False]), "n": torch.tensor(2**53 + 1), "inf": torch.tensor([0.0, -torch.inf])}
    updates = [(like | {"w": torch.tensor(pair)}, 1) for pair in ((3.0, 4.0), (0.0, 5.0), (0.0, 50.0))]
    mean = changed_app("norm-clipping").server_app.weighted_mean(updates, like | {"w": torch.zeros(2)})
    assert same_bits({name: mean[name] for name in like}, like)
    assert mean["w"].tolist() == pytest.approx([1.0, 14 / 3])
    flipped = [({"mask": torch.tensor(values)}, 1) for values in ([True, True], [False, True], [True, False])]
    mean = changed_app("norm-clipping").server_app.weighted_mean(flipped, {"mask": like["mask"]})
    assert mean["mask"].tolist() == [True, True]


@pytest.mark.parametrize("name", RULES)
def test_a_rule_takes_what_there_is(name):
    app = changed_app(name)
    assert app.server_app.weighted_mean([], LIKE) is None
    assert rule(name, (1.0, 2.0)) == [1.0, 2.0]
    assert rule(name, (1.0, 2.0), (1.0, 2.0), (1.0, 2.0)) == [1.0, 2.0]


# ------------------------------------------------------------------------------- Attacks


def trained(app, config: dict, partition: int) -> dict[str, torch.Tensor]:
    """The model that a partition sends in round 3."""
    config = app.defaults | config
    grid = InProcessGrid(app.client_app.app, config, 5)
    (context,) = (c for c in grid.contexts.values() if c.node_config["partition-id"] == partition)
    net = app.task.initial_model(FACTS, 7)
    instructions = ConfigRecord({"server-round": 3, "lr": 0.05})
    content = RecordDict({"arrays": app.messaging.to_array_record(net.state_dict()), "config": instructions})
    reply = app.client_app.app(Message(content, context.node_id, MessageType.TRAIN, group_id="3"), context)
    assert reply.has_content(), reply.error
    return reply.content["arrays"].to_torch_state_dict()


@pytest.fixture
def config(tiny_dataset) -> dict:
    return {"dataset": tiny_dataset, "partitioner": "iid", "use-wandb": False}


def test_hostile_nodes_send_other_models(config):
    honest, app = changed_app(), changed_app("attack")
    received = honest.task.initial_model(FACTS, 7).state_dict()
    models = [trained(honest, config, partition) for partition in range(3)]
    for attack in ("none", "sign-flip", "scaled", "noise", "label-flip", "little"):
        assert same_bits(trained(app, config | {"attack": attack, "hostile-nodes": 2}, 2), models[2])  # not hostile
    sent = {a: trained(app, config | {"attack": a, "hostile-nodes": 2}, 1) for a in ("none", "sign-flip", "scaled")}
    assert same_bits(sent["none"], models[1])
    for name, before in received.items():
        update = models[1][name] - before
        assert torch.allclose(sent["sign-flip"][name], before - update, atol=1e-6)
        assert torch.allclose(sent["scaled"][name], before + 10 * update, atol=1e-5)
    noisy = trained(app, config | {"attack": "noise", "hostile-nodes": 2}, 1)
    noise = torch.cat([(noisy[name] - tensor).flatten() for name, tensor in models[1].items()])
    assert (noise.mean().item(), noise.std().item()) == (pytest.approx(0, abs=0.02), pytest.approx(1, abs=0.02))
    assert same_bits(noisy, trained(app, config | {"attack": "noise", "hostile-nodes": 2}, 1))


def test_a_tensor_with_two_names_is_attacked_once(config):
    def tie(app):
        make = app.task.make_model

        def tied(facts):
            net = make(facts)
            net.norm1.bias = net.norm1.weight
            return net

        app.task.make_model = tied
        return app

    honest, app = tie(changed_app()), tie(changed_app("attack"))
    before, after = honest.task.initial_model(FACTS, 7).state_dict(), trained(honest, config, 0)
    sent = trained(app, config | {"attack": "sign-flip", "hostile-nodes": 1}, 0)
    for name in ("norm1.weight", "norm1.bias"):
        assert not torch.equal(after[name], before[name])
        assert torch.allclose(sent[name], 2 * before[name] - after[name], atol=1e-6)


def test_a_little_is_mean_and_deviation_of_the_colluding_nodes(config):
    honest, app = changed_app(), changed_app("attack")
    first, second = (trained(honest, config, partition) for partition in range(2))
    sent = [trained(app, config | {"attack": "little", "hostile-nodes": 2}, partition) for partition in range(2)]
    assert same_bits(*sent)
    for name in first:  # of two values, the deviation is half of their difference
        expected = (first[name] + second[name]) / 2 - 1.5 * (first[name] - second[name]).abs() / 2
        assert torch.allclose(sent[0][name], expected, atol=1e-6)


def test_flipped_labels_are_the_classes_in_reverse_order(config):
    app = changed_app("attack")
    typed = typed_config(**{key.replace("-", "_"): value for key, value in config.items()})
    data = app.task.load_node_data({"partition-id": 0, "num-partitions": 5}, 0, typed, {})["train"]
    flipped = app.task.flip_labels(data)
    assert (flipped.labels + data.labels).tolist() == [9] * len(data)
    assert flipped.images is data.images
    settings = config | {"attack": "label-flip", "hostile-nodes": 1}
    assert not same_bits(trained(app, settings, 0), trained(changed_app(), config, 0))
