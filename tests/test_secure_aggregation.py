"""The recipe of secure aggregation: the sum, missing nodes in each phase, what a masked update shows, and lies."""

import numpy as np
import pytest
import torch
from flwr.app import Array, ArrayRecord, ConfigRecord, Message, RecordDict

from tests.conftest import same_bits
from tests.grid import FACTS, make_context
from tests.recipes import PacedGrid, changed_app
from tests.test_recipes import try_out

__all__ = ["try_out"]  # a fixture
pytestmark = pytest.mark.e2e

NODES = 5  # with a threshold of 3
PHASES = ["query.keys", "query.shares", "train", "query.open"]


class Round:
    """The TRAIN phase of one round, with 5 nodes."""

    def __init__(self, app, dataset: str) -> None:
        self.app = app
        self.settings = app.defaults | {"dataset": dataset, "partitioner": "iid", "use-wandb": False}
        self.settings |= {"server-device": "cpu"}
        self.grid = PacedGrid(app, self.settings, [0.0] * NODES)  # waiting for missing nodes takes no time
        self.mailbox = app.messaging.Mailbox(self.grid)
        self.cohort = app.messaging.connected_nodes(self.grid)
        self.model = app.task.initial_model(FACTS, 7).state_dict()

    def run(self, server_round: int = 1):
        config = self.app.config.RunConfig.from_context(make_context(self.settings))
        instructions = {"server-round": server_round, "lr": 0.05}
        return self.app.server_app.train(self.mailbox, self.cohort, self.model, instructions, config)

    def without(self, partitions, phase: str) -> None:
        """Let nodes not answer in a phase."""

        def silent(message: Message, context):
            return None if message.metadata.message_type == phase else self.app.client_app.app(message, context)

        self.grid.handlers = dict.fromkeys(partitions, silent)

    def changed(self, partition: int, phase: str, change) -> None:
        """Let a node change its answers in a phase."""

        def lie(message: Message, context):
            reply = self.app.client_app.app(message, context)
            if message.metadata.message_type == phase:
                change(reply.content)
            return reply

        self.grid.handlers = {partition: lie}


@pytest.fixture(scope="module")
def app():
    return changed_app("secure-sum")


@pytest.fixture
def one_round(app, tiny_dataset) -> Round:
    return Round(app, tiny_dataset)


@pytest.fixture(scope="module")
def plain(tiny_dataset) -> list[tuple[np.ndarray, int, float]]:
    """Of each partition: its update times its examples, rounded to 2^-20, the number of examples, and the loss."""
    app = changed_app()
    again = Round(app, tiny_dataset)
    arrays, config = app.messaging.to_array_record(again.model), ConfigRecord({"server-round": 1, "lr": 0.05})
    batch = again.mailbox.send(again.cohort, "train", RecordDict({"arrays": arrays, "config": config}), 1, 9.0)
    sums = []
    for _, reply in again.mailbox.collect(batch, lambda content: content):
        trained, metrics = reply["arrays"].to_torch_state_dict(), reply["metrics"]
        examples = metrics["num-examples"]
        update = np.concatenate(
            [(trained[n].double() - t.double()).flatten().numpy() * examples for n, t in again.model.items()]
        )
        sums.append((np.rint(update * 2**20).astype(np.int64), examples, metrics["train_loss"]))
    return sums


def expected(plain, partitions, model: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """The mean of the models, from the plain sum of the same rounded updates."""
    examples = sum(plain[p][1] for p in partitions)
    change = sum(plain[p][0] for p in partitions) / 2**20 / examples
    parts = torch.from_numpy(change).split([t.numel() for t in model.values()])
    return {n: (t.double() + c.view(t.shape)).float() for (n, t), c in zip(model.items(), parts, strict=True)}


def test_the_sum_is_the_plain_sum(one_round, plain):
    batch, model, loss = one_round.run()
    assert batch.received == NODES
    assert same_bits(model, expected(plain, range(NODES), one_round.model))
    mean = sum(n * loss for _, n, loss in plain) / sum(n for _, n, _ in plain)
    assert loss == pytest.approx(mean, abs=1e-6)


@pytest.mark.parametrize("phase", PHASES)
def test_the_sum_is_that_of_the_nodes_that_replied(app, tiny_dataset, plain, phase):
    for missing in ({0}, {3}, {4}, {1, 3}):
        one_round = Round(app, tiny_dataset)
        one_round.without(missing, phase)
        batch, model, _ = one_round.run()
        rest = range(NODES) if phase == "query.open" else [p for p in range(NODES) if p not in missing]
        assert batch.received == len(rest)
        assert same_bits(model, expected(plain, rest, one_round.model)), missing


@pytest.mark.parametrize("phase", PHASES)
def test_with_fewer_than_the_threshold_the_model_stays(one_round, phase, caplog):
    one_round.without([0, 2, 4], phase)
    batch, model, loss = one_round.run()
    assert (batch.received, batch.failed, loss) == (0, NODES, None)
    assert same_bits(model, one_round.model)
    assert (
        "no secure sum, so the global model stays as it is: too few nodes are left: 2; at least 3 are needed"
        in caplog.text
    )
    one_round.grid.handlers = {}
    assert one_round.run(server_round=2)[0].received == NODES  # the next round works


def test_complex_numbers_are_refused(one_round, app):
    """Only their real part would be summed."""
    one_round.model["phase"] = torch.zeros(1, dtype=torch.complex64)
    with pytest.raises(app.config.UserError, match=r"these tensors are complex: \['phase'\]"):
        one_round.run()
    assert not one_round.grid.sent


def masked_updates(one_round: Round, server_round: int) -> dict[int, np.ndarray]:
    """The masked updates of a round, by partition."""
    seen = {}
    pull = one_round.grid.pull_messages

    def spy(ids):
        replies = list(pull(ids))
        for reply in replies:
            if reply.has_content() and "arrays" in reply.content:
                seen[one_round.grid.partition(reply.metadata.src_node_id)] = reply.content["arrays"]["masked"].numpy()
        return replies

    one_round.grid.pull_messages = spy
    assert one_round.run(server_round)[0].received == NODES
    one_round.grid.pull_messages = pull
    return seen


def test_a_masked_update_is_uniform_and_shares_nothing_with_another(one_round):
    first, second = masked_updates(one_round, 1), masked_updates(one_round, 2)
    update = next(iter(first.values()))
    counts = np.bincount(update.view(np.uint8), minlength=256)
    mean = counts.sum() / 256
    chi_square = ((counts - mean) ** 2 / mean).sum()
    assert 160 < chi_square < 370  # 255 ± 22.6: five standard deviations
    for key in first.keys() & second.keys():
        equal = (first[key].view(np.uint8) == second[key].view(np.uint8)).mean()
        assert equal == pytest.approx(1 / 256, rel=0.1)


def test_no_secret_is_used_in_two_rounds(one_round):
    seen = []
    for server_round in (1, 2):
        one_round.without([4], "query.open")  # so that its secrets stay
        one_round.run(server_round)
        (context,) = (c for c in one_round.grid.contexts.values() if c.node_config["partition-id"] == 4)
        seen.append({context.state["secrets"][name] for name in ("seal", "mask", "seed")})
        others = [c for c in one_round.grid.contexts.values() if c is not context]
        assert not any("secrets" in other.state for other in others)  # opened, and forgotten
    assert not seen[0] & seen[1]


def test_a_node_opens_either_the_seed_or_the_key_of_a_node(one_round, app):
    """A server that asks twice, with other survivors, gets nothing."""
    asked = []

    def twice(message: Message, context):
        reply = app.client_app.app(message, context)
        if message.metadata.message_type == "query.open":
            message.content["config"]["replied"] = message.content["config"]["replied"][:3]
            asked.append(app.client_app.app(message, context))
        return reply

    one_round.grid.handlers = {0: twice}
    one_round.run()
    assert asked[0].has_error()
    assert "no secrets for this round" in asked[0].error.reason


def forge(name: str, position: int, value: bytes):
    def change(content) -> None:
        values = list(content["config"][name])
        values[position] = value if value else bytes(len(values[position]))
        content["config"][name] = values

    return change


# What a node does in a phase, which nodes' updates are in the sum, and what the log says.
ALL, OTHERS = [0, 1, 2, 3, 4], [0, 1, 3, 4]
LIES = {
    "short keys": ("query.keys", forge("keys", 0, b"short"), OTHERS, "partition 2 (query.keys): keys is not"),
    "weak keys": ("query.keys", forge("keys", 1, b""), OTHERS, "partition 2 (query.keys): a key has a low order"),
    "broken share": ("query.shares", forge("sealed", 3, b""), [0, 1, 2, 4], "share of node 2 cannot be opened"),
    "digest of a share": ("query.shares", forge("digests", 6, b""), [0, 1, 2, 4], "share of node 2 cannot be opened"),
    "digest of the seed": ("query.shares", forge("digest", 0, b""), None, "partition 2 has shared another secret"),
    "short shares": ("query.open", forge("shares", 1, b"x"), ALL, "partition 2 (query.open): shares is not"),
    "wrong share": ("query.open", forge("shares", 1, b""), ALL, "partition 2 (query.open): a share that it"),
}


@pytest.mark.parametrize("name", LIES)
def test_a_lie_ends_at_most_the_round(one_round, plain, name, caplog):
    phase, change, in_the_sum, said = LIES[name]
    one_round.changed(2, phase, change)
    batch, model, _ = one_round.run()
    batch.log_faults()
    assert same_bits(model, expected(plain, in_the_sum, one_round.model) if in_the_sum else one_round.model)
    assert said in caplog.text
    one_round.grid.handlers = {}
    assert one_round.run(server_round=2)[0].received == NODES


def test_masked_updates_of_another_kind_are_left_out(one_round, plain):
    def change(content) -> None:
        content["arrays"] = ArrayRecord({"masked": Array(np.zeros(4, dtype=np.int32))})

    one_round.changed(1, "train", change)
    batch, model, _ = one_round.run()
    assert (batch.received, batch.rejected) == (4, 1)
    assert same_bits(model, expected(plain, [0, 2, 3, 4], one_round.model))


@pytest.mark.parametrize("seed", range(2))
def test_noise_in_the_place_of_a_masked_update_ends_the_round(one_round, seed, caplog):
    def change(content) -> None:
        masked = content["arrays"]["masked"].numpy()
        noise = np.random.default_rng(seed).integers(-(2**31), 2**31, len(masked), dtype=np.int32)
        content["arrays"] = ArrayRecord({"masked": Array(noise)})

    one_round.changed(1, "train", change)
    batch, model, loss = one_round.run()
    assert (batch.received, loss) == (0, None)
    assert same_bits(model, one_round.model)
    assert "the sum is noise" in caplog.text


def refused(app, one_round, phase: str, change) -> str:
    """The error of node 0 to a second question in a phase, which a server has changed."""
    errors = []

    def handle(message: Message, context):
        if message.metadata.message_type == phase:
            before = dict(message.content["config"])
            change(message.content)
            errors.append(app.client_app.app(message, context).error.reason)
            message.content["config"].update(before)
        return app.client_app.app(message, context)

    one_round.grid.handlers = {0: handle}
    assert one_round.run()[0].received == NODES  # the question as it should be is answered
    return errors[0]


@pytest.mark.parametrize(
    ("phase", "change", "said"),
    [
        ("query.open", lambda c: c["config"].update({"replied": [0, 0, 0]}), "too few nodes have replied"),
        ("query.open", lambda c: c["config"].update({"replied": [1, 2, 3]}), "others than those that take part"),
        ("query.open", lambda c: c["config"].update({"server-round": 9}), "no secrets for this round"),
        ("query.shares", lambda c: c["config"].update({"threshold": 2}), "must be more than half"),
        ("query.shares", lambda c: c["config"].update({"threshold": 6}), "must be more than half"),
    ],
)
def test_a_node_refuses_what_would_open_one_update(app, one_round, phase, change, said):
    assert said in refused(app, one_round, phase, change)


def test_the_loop_learns_with_secure_sums(try_out):
    done = try_out(changed_app("secure-sum"), num_server_rounds=2, fraction_clients_train=1.0, opt_in_probability=1.0)
    assert [row["train_received"] for row in done.rows[1:]] == [5, 5]
    plain = try_out(changed_app(), num_server_rounds=2, fraction_clients_train=1.0, opt_in_probability=1.0)
    assert done.rows[2]["centralized_loss"] == pytest.approx(plain.rows[2]["centralized_loss"], abs=1e-3)
