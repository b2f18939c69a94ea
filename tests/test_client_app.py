"""The handlers of a node, called through the ClientApp."""

import inspect
import math
import time

import datasets
import numpy as np
import pytest
import torch
import torch.nn.functional as F
from flwr.app import ArrayRecord, ConfigRecord, Message, MessageType, RecordDict
from PIL import Image
from torch import nn

from pytorch_example_low_level import client_app, images, task, utils
from pytorch_example_low_level.config import CODE, Purpose, RunConfig, random_stream
from pytorch_example_low_level.messaging import to_array_record
from tests.conftest import model, results, same_bits
from tests.grid import FACTS, InProcessGrid, make_context, run_config, typed_config

BOTH = pytest.mark.parametrize("message_type", [MessageType.TRAIN, MessageType.EVALUATE])
NODES = 3  # with partitions of 21 to 72 images
SETTINGS = {
    "partitioner": "dirichlet", "dirichlet_alpha": 0.5, "local_epochs": 3, "batch_size": 7, "momentum": 0.7,
    "learning_rate": 0.9,  # not what is to be used
    "logit_adjustment": 0.6, "seed": 5,
}  # fmt: skip


def ask(config: dict, message_type: str, content: RecordDict, partition: int = 0, **node_config) -> Message:
    """The reply of one of three nodes; `node_config` replaces that of the simulation."""
    grid = InProcessGrid(client_app.app, config, NODES)
    (context,) = (c for c in grid.contexts.values() if c.node_config["partition-id"] == partition)
    if node_config:
        context.node_config = {key.replace("_", "-"): value for key, value in node_config.items()}
    return client_app.app(Message(content, context.node_id, message_type, group_id="1"), context)


def instructions(net: nn.Module | None = None, **config) -> RecordDict:
    content = RecordDict({"config": ConfigRecord({key.replace("_", "-"): value for key, value in config.items()})})
    if net is not None:
        content["arrays"] = to_array_record(net.state_dict())
    return content


@pytest.fixture
def settings(tiny_dataset) -> dict:
    return run_config(dataset=tiny_dataset, **SETTINGS)


def local(dataset: str, partition: int) -> dict[str, images.Split]:
    return images.load_partition(partition, NODES, typed_config(dataset=dataset, dirichlet_alpha=0.5, seed=5))


def trained_by_hand(data: images.Split, server_round: int, partition: int, lr: float, augment: bool):
    """The training that SETTINGS ask for, written down once more."""
    net = task.initial_model(FACTS, seed=1)
    seed = int(random_stream(5, Purpose.TRAIN, server_round, partition).integers(2**63))
    generator = torch.Generator().manual_seed(seed)
    optimizer = torch.optim.SGD(net.parameters(), lr=lr, momentum=0.7, fused=True)
    frequencies = torch.stack([(data.labels == number).sum() + 1 for number in range(10)])
    total = 0.0
    for _ in range(3):
        for rows in torch.randperm(len(data), generator=generator).tensor_split((len(data) + 6) // 7):
            images = data.images[rows]
            if augment:
                images = task.random_crop_and_flip(images, generator)
            logits = net(task.normalise(images)) + 0.6 * frequencies.log()
            loss = F.cross_entropy(logits, data.labels[rows])
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            total += loss.item() * len(rows)
    return net, total / (3 * len(data))


@pytest.mark.parametrize("augment", [False, True])
def test_train_is_sgd_as_one_would_write_it(settings, tiny_dataset, augment):
    sizes = set()
    for server_round, partition in [(1, 0), (4, 2)]:
        data = local(tiny_dataset, partition)["train"]
        content = instructions(task.initial_model(FACTS, seed=1), server_round=server_round, lr=0.03)
        reply = ask(settings | {"augment": augment}, MessageType.TRAIN, content, partition)
        net, loss = trained_by_hand(data, server_round, partition, 0.03, augment)
        assert same_bits(reply.content["arrays"].to_torch_state_dict(), net.state_dict())
        assert reply.content.keys() == {"arrays", "metrics"}
        assert reply.content["metrics"] == {"train_loss": pytest.approx(loss, rel=1e-6), "num-examples": len(data)}
        sizes.add(len(data))
    assert len(sizes) == 2


def test_evaluate_takes_the_validation_split(settings, tiny_dataset):
    net = task.initial_model(FACTS, seed=1).eval()
    for partition in range(NODES):
        data = local(tiny_dataset, partition)["validation"]
        logits = net(task.normalise(data.images))
        reply = ask(settings, MessageType.EVALUATE, instructions(net, server_round=1), partition)
        assert reply.content.keys() == {"metrics"}
        assert len(per_class := reply.content["metrics"].pop("eval_accuracy_per_class")) == 10
        assert [math.isnan(value) for value in per_class] == [n not in data.labels for n in range(10)]
        assert reply.content["metrics"] == {
            "eval_loss": pytest.approx(F.cross_entropy(logits, data.labels).item(), rel=1e-5),
            "eval_acc": (logits.argmax(1) == data.labels).double().mean().item(),
            "num-examples": len(data),
        }


@BOTH
def test_a_node_works_in_one_thread_and_repeatably_on_a_gpu(settings, message_type, monkeypatch):
    torch.set_num_threads(2)
    monkeypatch.setattr(torch.backends.cudnn, "deterministic", False)
    monkeypatch.setattr(torch.backends.cudnn, "allow_tf32", True)
    try:
        ask(settings, message_type, instructions(task.Net(1, 10), server_round=1, lr=0.1))
        assert torch.get_num_threads() == 1
        assert torch.backends.cudnn.deterministic
        assert not torch.backends.cudnn.allow_tf32
    finally:
        torch.set_num_threads(1)


@BOTH
def test_a_node_that_runs_other_code_says_so(settings, message_type):
    content = instructions(task.Net(1, 10), server_round=1, lr=0.1, app="0123456789abcdef in /another/copy")
    reason = ask(settings, message_type, content).error.reason
    assert reason.startswith(
        f"this node runs different code from the server: the node {CODE}, the server 0123456789abcdef "
    )
    content = instructions(task.Net(1, 10), server_round=1, lr=0.1, app=CODE, deadline=time.time() + 1e9)
    assert ask(settings, message_type, content).has_content()


# ------------------------------------------------------------------------------- Deadlines


@BOTH
def test_work_that_nobody_waits_for_is_not_begun(settings, message_type, monkeypatch):
    for function in ("train", "test"):
        monkeypatch.setattr(task, function, lambda *args, **kwargs: pytest.fail("it was begun"))
    content = instructions(task.Net(1, 10), server_round=1, lr=0.1, deadline=time.time() - 0.01)
    late = "the deadline passed before the message was handled (is the clock of this machine right?)"
    assert ask(settings, message_type, content).error.reason == late


def test_training_ends_at_the_deadline(settings, monkeypatch):
    local_data, now = client_app.local_data, [1000.0]

    def load_until_late(*args):
        data = local_data(*args)
        now[0] = 1001.1
        return data

    monkeypatch.setattr(time, "time", lambda: now[0])
    monkeypatch.setattr(client_app, "local_data", load_until_late)
    content = instructions(task.Net(1, 10), server_round=1, lr=0.1, deadline=1001.0)
    assert ask(settings, MessageType.TRAIN, content).error.reason == "the deadline passed during training"


def test_a_random_buffer_that_is_not_sent_is_that_of_the_server(settings, monkeypatch):
    class Mixing(task.Net):
        def __init__(self, facts):
            super().__init__(1, 10)
            self.register_buffer("mix", torch.rand(10), persistent=False)

    monkeypatch.setattr(task, "make_model", Mixing)
    data = local(settings["dataset"], 0)["validation"]
    server = task.initial_model(FACTS, settings["seed"])
    msg = Message(instructions(server), 1, MessageType.TRAIN)
    node = client_app.received_model(msg, data, RunConfig.from_context(make_context(settings)))
    assert torch.equal(node.mix, server.mix)


def test_a_forward_that_is_a_function_of_its_layer_trains_that_layer(settings, monkeypatch):
    """The usual way to wrap a layer, for example with an adapter. A copy of the model would share the function."""

    def with_a_wrapped_layer(facts):
        net = task.Net(1, 10)
        net.fc2.forward = lambda x, layer=net.fc2: F.linear(x, layer.weight, layer.bias)
        return net

    monkeypatch.setattr(task, "make_model", with_a_wrapped_layer)
    server = task.initial_model(FACTS, settings["seed"])
    for server_round in (1, 2):
        reply = ask(settings, MessageType.TRAIN, instructions(server, server_round=server_round, lr=0.1))
        assert not torch.equal(reply.content["arrays"].to_torch_state_dict()["fc2.weight"], server.fc2.weight)


# ------------------------------------------------------------------------------------ QUERY


@pytest.fixture
def sleeps(monkeypatch) -> list[float]:
    """How long the nodes sleep, on a clock that stands still."""
    slept: list[float] = []
    monkeypatch.setattr(time, "time", lambda: 1000.0)
    monkeypatch.setattr(time, "sleep", slept.append)
    return slept


def opt_ins(config: dict, rounds: int, nodes: int, **message) -> list[list[bool]]:
    """What each of the nodes answers in each round."""
    grid = InProcessGrid(client_app.app, config, nodes)
    answers = []
    for server_round in range(1, rounds + 1):
        content = instructions(server_round=server_round, **message)
        messages = [Message(content, node_id, MessageType.QUERY) for node_id in grid.contexts]
        replies = {grid.partition(r.metadata.src_node_id): r for r in grid.send_and_receive(messages)}
        assert all(r.content.keys() == {"config"} for r in replies.values())
        assert all(r.content["config"].keys() == {"opt-in"} for r in replies.values())
        answers.append([replies[partition].content["config"]["opt-in"] for partition in range(nodes)])
    return answers


@pytest.mark.parametrize("probability", [0.0, 0.3, 1.0])
def test_nodes_opt_in_with_the_probability_asked_for(sleeps, probability):
    config = run_config(opt_in_probability=probability, seed=3)
    answers = opt_ins(config, rounds=20, nodes=50, max_delay=0.0, deadline=1002.0)
    assert {type(answer) for answers_of_round in answers for answer in answers_of_round} == {bool}
    share = sum(map(sum, answers)) / 1000
    assert abs(share - probability) <= (0.05 if 0 < probability < 1 else 0)  # 3.4 standard deviations
    if 0 < probability < 1:
        assert len({tuple(a) for a in answers}) == 20  # no two rounds are alike,
        assert len(set(zip(*answers, strict=True))) > 45  # and hardly two nodes
        assert opt_ins(config, rounds=2, nodes=50, max_delay=0.0) == answers[:2]
        assert opt_ins(config | {"seed": 4}, rounds=2, nodes=50, max_delay=0.0) != answers[:2]
        streams = [random_stream(3, Purpose.TRAIN, 1, partition).random(2) for partition in range(50)]
        assert answers[0] != [bool(chance < probability) for _, chance in streams]  # that of the training


def test_a_delay_is_uniform_and_never_passes_the_deadline(sleeps):
    config = run_config()
    answers = opt_ins(config, rounds=4, nodes=50, max_delay=3.0)  # without a deadline
    flat = [answer for of_round in answers for answer in of_round]
    prompt = [answer for answer, delay in zip(flat, sleeps, strict=True) if delay < 1.5]
    assert sum(prompt) / len(prompt) == pytest.approx(0.5, abs=0.15)  # who opts in does not depend on the delay
    assert opt_ins(config, 1, 50, max_delay=0.0)[0] == answers[0]
    del sleeps[200:]
    assert 0 <= min(sleeps) < 0.1
    assert 2.9 < max(sleeps) < 3.0
    assert sum(sleeps) / 200 == pytest.approx(1.5, abs=0.25)
    free = sleeps.copy()
    for deadline in (1100.0, 1002.0, 990.0):  # at 990 s nobody waits, and it is 1000 s
        sleeps.clear()
        opt_ins(config, rounds=4, nodes=50, max_delay=3.0, deadline=deadline)
        assert sleeps == [max(0.0, min(delay, deadline - 1000)) for delay in free]


# ------------------------------------------------------------------------- A node's own data


def own_data(tmp_path, names: list[str], labels: list[int], channels: int = 1) -> str:
    pictures = [Image.new("L" if channels == 1 else "RGB", (28, 28)) for _ in labels]
    features = datasets.Features({"image": datasets.Image(), "label": datasets.ClassLabel(names=names)})
    rows = datasets.Dataset.from_dict({"image": pictures, "label": labels}, features=features)
    rows.save_to_disk(tmp_path / "own")
    return str(tmp_path / "own")


CLASSES = ["ant", "bee", "cow"]


@BOTH
def test_a_node_numbers_its_classes_as_the_server_does(tmp_path, monkeypatch, message_type):
    real, seen = client_app.local_data, []
    monkeypatch.setattr(client_app, "local_data", lambda *args: seen.append(real(*args)) or seen[-1])
    path = own_data(tmp_path, ["cow", "ant"], [0] * 10)
    content = instructions(task.Net(1, 3), server_round=1, lr=0.1, class_names=CLASSES)
    reply = ask(run_config(), message_type, content, data_path=path)
    assert reply.content["metrics"]["num-examples"] == (8 if message_type == MessageType.TRAIN else 2)
    assert set(seen[0].labels.tolist()) == {2}
    assert seen[0].class_names == CLASSES


@BOTH
def test_a_node_with_other_channels_names_both(tmp_path, message_type):
    path = own_data(tmp_path, CLASSES, [0, 1] * 5, channels=3)
    content = instructions(task.Net(1, 3), server_round=1, lr=0.1, class_names=CLASSES)
    reason = ask(run_config(), message_type, content, data_path=path).error.reason
    facts = {"class-names": CLASSES, "image-shape": [3, 28, 28]}
    assert reason.startswith(f"the server's model does not fit data of {facts}: ")
    assert "[16, 1, 5, 5]" in reason  # the server's


def test_the_split_of_a_nodes_own_data_stays_the_same(tmp_path, monkeypatch):
    """It depends on the partition, or on the id that the node has at its SuperLink."""
    asked = []
    monkeypatch.setattr(images, "load_folder", lambda *args: asked.append(args) or {})
    content = instructions(task.Net(1, 3), server_round=1, lr=0.1)
    for node_config in ({}, {"partition_id": 7}):
        ask(run_config(seed=9), MessageType.TRAIN, content, data_path="/here", **node_config)
    node_id = next(iter(InProcessGrid(client_app.app, {}, 1).contexts))
    assert [(path, number, config.seed, shape) for path, number, config, shape in asked] == [
        ("/here", node_id, 9, None), ("/here", 7, 9, None)
    ]  # fmt: skip


def test_a_node_without_data_says_what_it_needs(settings):
    content = instructions(task.Net(1, 10), server_round=1, lr=0.1)
    for node_config in ({"name": "x"}, {"partition_id": 1}, {"num_partitions": 1}):
        reason = ask(settings, MessageType.TRAIN, content, **node_config).error.reason
        assert reason == "a node needs --node-config 'data-path=\"…\"' or 'partition-id=… num-partitions=…'"


# ----------------------------------------------------------------------------------- Errors


@pytest.mark.parametrize(("key", "value"), [("lr", None), ("server-round", "0.1")])
def test_a_message_without_a_number_is_one_line(settings, key, value):
    content = instructions(task.Net(1, 10), server_round=1, lr=0.1)
    del content["config"][key]
    if value is not None:
        content["config"][key] = value
    reason = ask(settings, MessageType.TRAIN, content).error.reason
    assert reason.startswith(f"ValueError: the message's config needs the number '{key}', it is {value!r} (number in ")


def test_a_fault_in_the_code_says_where_it_is(settings, monkeypatch, caplog):
    def broken(*args, **kwargs):
        raise KeyError("one\ntwo")

    monkeypatch.setattr(task, "train", broken)
    caplog.set_level("DEBUG", logger="flwr")
    reply = ask(settings, MessageType.TRAIN, instructions(task.Net(1, 10), server_round=1, lr=0.1))
    line = inspect.getsourcelines(broken)[1] + 1
    assert reply.error.reason == f"KeyError: 'one\\ntwo' (broken in {__file__}, line {line})"
    assert "Traceback" in caplog.text


# ----------------------------------------------------------------------------- Any nn.Module


class Odd(nn.Module):
    """BatchNorm, Dropout, an unused layer, shared weights, and buffers of many types.

    Frozen are a convolution, a layer of two names, and a parameter of a type that NumPy lacks.
    """

    DTYPES = (torch.bool, torch.uint8, torch.int16, torch.int64, torch.float16, torch.bfloat16, torch.float64)

    def __init__(self, channels: int, classes: int) -> None:
        super().__init__()
        self.conv = nn.Conv2d(channels, 4, 5, stride=3)
        self.norm = nn.BatchNorm2d(4)
        self.drop = nn.Dropout(0.3)
        self.head = nn.Linear(4 * 8 * 8, classes)
        self.same = self.head
        self.unused = nn.Linear(2, 2)
        self.scale = nn.Parameter(torch.tensor(2.0), requires_grad=False)
        for dtype in (*self.DTYPES, torch.complex64):
            self.register_buffer(f"buffer_{dtype}".replace("torch.", ""), torch.ones(2, 3, dtype=dtype))
        self.register_buffer("nothing", torch.zeros(0, 2))
        self.conv.requires_grad_(False)
        self.table = self.alias = nn.Embedding(3, 2)
        self.table.requires_grad_(False)
        self.bf16 = nn.Parameter(torch.rand(3, dtype=torch.bfloat16), requires_grad=False)

    def forward(self, x):
        return self.same(self.drop(torch.relu(self.norm(self.conv(x)))).flatten(1)) * self.scale


FROZEN = {"conv.weight", "conv.bias", "table.weight", "alias.weight", "bf16", "scale"}


def test_only_what_training_can_change_travels(app, monkeypatch, quick_plot):
    monkeypatch.setattr(task, "make_model", lambda facts: Odd(1, 10))
    before = task.initial_model(FACTS, 42).state_dict()
    grid = app.grid()
    seen = []

    def watch(msg, context):
        reply = client_app.app(msg, context)
        seen.extend(record.keys() for record in reply.content.array_records.values())
        return reply

    grid.handlers = dict.fromkeys(range(5), watch)
    whole = app.run(grid, opt_in_probability=1.0)
    sent = [m.content["arrays"].keys() for m in grid.sent if m.metadata.message_type != MessageType.QUERY]
    assert len(sent) == 2 * (3 + 5)
    assert len(seen) == 2 * 3
    assert all(keys == before.keys() - FROZEN for keys in [*sent, *seen])
    kinds = [(name, tensor.dtype, tensor.shape) for name, tensor in before.items()]
    for name in ("final_model.pt", "checkpoints/best.pt"):
        after = model(whole, name)
        assert [(name, tensor.dtype, tensor.shape) for name, tensor in after.items()] == kinds
        assert all(torch.equal(after[frozen], before[frozen]) for frozen in FROZEN)
    after = model(whole)
    same = {name for name in before if torch.equal(before[name], after[name])}
    assert same == FROZEN | {name for name in before if name.startswith(("buffer", "nothing", "unused"))}
    assert torch.equal(after["head.weight"], after["same.weight"])
    assert after["norm.num_batches_tracked"] == 2  # a node has 19 images: one batch a round
    assert [row["train_rejected"] + row["train_failed"] for row in results(whole)[1:]] == [0, 0]
    half = app.run(opt_in_probability=1.0, num_server_rounds=1)
    app.run(opt_in_probability=1.0, resume_from=str(half))
    assert same_bits(model(half), after)


@BOTH
def test_only_frozen_parameters_may_be_missing(settings, monkeypatch, message_type):
    monkeypatch.setattr(task, "make_model", lambda facts: Odd(1, 10))
    content = instructions(task.initial_model(FACTS, 1), server_round=1, lr=0.1)
    whole = content["arrays"]
    content["arrays"] = ArrayRecord({name: whole[name] for name in whole if name not in {*FROZEN, "head.bias"}})
    reason = ask(settings, message_type, content).error.reason
    assert reason.startswith("the server's model does not fit data of {")
    assert 'Missing key(s) in state_dict: "head.bias".' in reason
    content["arrays"]["other"] = whole["head.bias"]
    assert 'Unexpected key(s) in state_dict: "other".' in ask(settings, message_type, content).error.reason


@BOTH
def test_a_node_with_other_frozen_parameters_says_so(settings, monkeypatch, message_type):
    """Such as those of another version of a file of weights: the node would train another model in silence."""
    monkeypatch.setattr(task, "make_model", lambda facts: Odd(1, 10))
    net = task.initial_model(FACTS, settings["seed"])
    frozen = utils.frozen(net)
    sent = {name: tensor for name, tensor in net.state_dict().items() if name not in frozen}
    for change, right in ((0, True), (1, False)):
        digest = utils.frozen_digest({name: tensor + change for name, tensor in frozen.items()})
        content = instructions(server_round=1, lr=0.1, frozen=digest)
        content["arrays"] = to_array_record(sent)
        reply = ask(settings, message_type, content)
        assert reply.has_content() == right
    assert reply.error.reason.startswith(
        "make_model creates other frozen parameters here (another file of weights?): ["
    )


def test_metrics_of_all_kinds_of_numbers_reach_the_server(settings, monkeypatch):
    metrics = {"loss": np.float64(1), "accuracy": True, "counts": [3, None, 0.5]}
    monkeypatch.setattr(task, "test", lambda *args: metrics)
    record = ask(settings, MessageType.EVALUATE, instructions(task.Net(1, 10), server_round=1)).content["metrics"]
    assert (record["eval_loss"], record["eval_acc"], record["eval_counts"][::2]) == (1.0, 1.0, [3.0, 0.5])
    assert math.isnan(record["eval_counts"][1])


def test_a_server_that_sends_everything_gets_everything(settings, monkeypatch):
    monkeypatch.setattr(task, "make_model", lambda facts: Odd(1, 10))
    net = task.initial_model(FACTS, 1)
    for name in FROZEN:
        net.state_dict()[name].add_(1)  # the server's own, and not those of a new model
    reply = ask(settings, MessageType.TRAIN, instructions(net, server_round=1, lr=0.1))
    assert reply.content["arrays"].keys() == net.state_dict().keys()
    trained = reply.content["arrays"].to_torch_state_dict()
    assert all(torch.equal(trained[name], net.state_dict()[name]) for name in FROZEN - {"bf16"})
