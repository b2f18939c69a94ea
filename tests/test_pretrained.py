"""The recipes for pretrained models and for smaller uploads: what is trained, what travels, and how it is rounded."""

import pytest
import torch
from flwr.app import ArrayRecord, Message
from torch import nn
from torchvision.models import resnet18

from tests.conftest import same_bits
from tests.grid import InProcessGrid
from tests.recipes import changed_app
from tests.test_recipes import try_out

__all__ = ["try_out"]  # a fixture
pytestmark = pytest.mark.e2e

FACTS = {"image-shape": [1, 28, 28], "class-names": list("abcde")}
HEAD = {"head.weight": (5, 512), "head.bias": (5,)}
ONE_ROUND = {"num_server_rounds": 1, "fraction_clients_train": 0.4, "learning_rate": 0.01, "opt_in_probability": 0.0}
BUFFERS = 20 * 2 + 20  # mean, variance and counter of each BatchNorm


@pytest.fixture
def weights(tmp_path, monkeypatch):
    """Random weights in the place of the pretrained ones, with statistics that are not the initial ones."""
    net = resnet18()
    for name, buffer in net.named_buffers():
        if name.endswith("running_mean"):
            buffer.normal_()
    torch.save(net.state_dict(), tmp_path / "resnet18.pt")
    return tmp_path / "resnet18.pt"


def tuned(weights, *recipes: str):
    app = changed_app("fine-tune", *recipes)
    app.task.WEIGHTS = weights
    return app


def travels(app) -> dict[str, torch.Tensor]:
    """The tensors that TRAIN carries."""
    net = app.task.make_model(FACTS)
    frozen = app.utils.frozen(net)
    return {name: tensor for name, tensor in net.state_dict().items() if name not in frozen}


def test_only_the_last_layer_is_trained(weights, try_out):
    app = tuned(weights)
    sent = travels(app)
    parameters = {name: tuple(t.shape) for name, t in sent.items() if not name.startswith("body.")}
    assert parameters == HEAD
    assert len(sent) == len(HEAD) + BUFFERS
    done = try_out(app, **ONE_ROUND)
    assert done.rows[1]["train_received"] == 2
    before = torch.load(weights, weights_only=True)
    body = {name.removeprefix("body."): t for name, t in done.model.items() if name.startswith("body.")}
    assert same_bits(body, {name: t for name, t in before.items() if not name.startswith("fc.")})  # buffers, too
    start = app.task.initial_model(FACTS | {"class-names": list("abcdefghij")}, 42)
    assert not torch.equal(done.model["head.weight"], start.head.weight)


def test_the_model_normalises_as_the_pretraining_did(weights):
    task = tuned(weights).task
    net = task.make_model(FACTS).eval()
    seen = []
    net.body.register_forward_pre_hook(lambda module, args: seen.append(args[0]))
    net(task.normalise(torch.full((1, 1, 32, 32), 255, dtype=torch.uint8)))
    expected = [(1 - mean) / std for mean, std in ((0.485, 0.229), (0.456, 0.224), (0.406, 0.225))]
    assert seen[0].shape == (1, 3, 32, 32)
    assert seen[0][0, :, 0, 0].tolist() == pytest.approx(expected)


def test_more_layers_travel(weights):
    block = travels(tuned(weights, "fine-tune-block"))
    trained = {name for name in block if "running" not in name and "num_batches" not in name}
    assert {name.split(".")[1] for name in trained if name.startswith("body.")} == {"layer4"}
    everything = travels(tuned(weights, "fine-tune-all"))
    assert everything.keys() == tuned(weights).task.make_model(FACTS).state_dict().keys()


def test_low_rank_matrices_start_at_the_pretrained_model_and_are_all_that_travels(weights, try_out):
    app = tuned(weights, "lora")
    net, plain = app.task.make_model(FACTS).eval(), tuned(weights).task.make_model(FACTS).eval()
    images = torch.rand(2, 1, 28, 28)
    assert torch.equal(net.body(images.expand(-1, 3, -1, -1)), plain.body(images.expand(-1, 3, -1, -1)))
    sent = {name: t for name, t in travels(app).items() if name.startswith("body.") and "bn" not in name}
    sent = {name: t for name, t in sent.items() if "downsample.1" not in name}
    assert {name.rsplit(".", 1)[1] for name in sent} == {"a", "b"}
    # The first convolution is 64 x (3 x 7 x 7).
    assert {tuple(t.shape) for name, t in sent.items() if name.startswith("body.conv1.")} == {(4, 147), (64, 4)}
    done = try_out(app, **ONE_ROUND)
    assert done.rows[1]["train_received"] == 2
    assert done.model["body.conv1.parametrizations.weight.0.b"].abs().max() > 0
    original = torch.load(weights, weights_only=True)["conv1.weight"]
    assert torch.equal(done.model["body.conv1.parametrizations.weight.original"], original)


@pytest.mark.parametrize("content", [None, {"conv1.weight": torch.zeros(1)}])
def test_a_wrong_file_of_weights_is_named(weights, content):
    app = tuned(weights)
    weights.unlink()
    if content:
        torch.save(content, weights)
    with pytest.raises(app.config.UserError, match=r"resnet18\.pt is not a state_dict of torchvision's resnet18"):
        app.task.make_model(FACTS)


# ------------------------------------------------------------------------- Smaller uploads


def test_an_update_is_rounded_to_255_steps_without_bias():
    messaging = changed_app("quantise").messaging
    update = {"w": torch.tensor([1.27, 0.005, -0.012, 0.0]), "n": torch.tensor(3)}
    draws = [messaging.encode(update, torch.Generator().manual_seed(seed)) for seed in range(2000)]
    dtypes = {"w": torch.int8, "w/scale": torch.float32, "n": torch.int64}
    assert {key: tensor.dtype for key, tensor in draws[0].items()} == dtypes
    assert draws[0]["w/scale"].tolist() == pytest.approx([0.01])
    assert {draw["w"][0].item() for draw in draws} <= {126, 127}
    assert {draw["w"][1].item() for draw in draws} == {0, 1}  # 0.5 steps
    assert {draw["w"][2].item() for draw in draws} == {-2, -1}  # -1.2 steps
    mean = torch.stack([draw["w"].float() for draw in draws]).mean(0)
    assert mean[1:].tolist() == pytest.approx([0.5, -1.2, 0.0], abs=0.05)
    model = {"w": torch.full((4,), 10.0), "n": torch.tensor(1)}
    decoded = messaging.decode(draws[0] | {"w": torch.tensor([127, 1, -1, 0], dtype=torch.int8)}, model)
    assert decoded["w"].tolist() == pytest.approx([11.27, 10.01, 9.99, 10.0])
    assert decoded["n"] == 3


def test_bfloat16_keeps_eight_bits():
    messaging = changed_app("quantise", "bfloat16").messaging
    encoded = messaging.encode({"w": torch.tensor([1.0, 1 + 2**-7, 1 + 2**-9])})
    assert encoded["w"].dtype == torch.int16
    decoded = messaging.decode(encoded, {"w": torch.zeros(3)})
    assert decoded["w"].tolist() == [1.0, 1 + 2**-7, 1.0]


@pytest.mark.parametrize(("recipes", "share"), [(("quantise",), 1 / 4), (("quantise", "bfloat16"), 1 / 2)])
def test_the_upload_is_a_part_of_the_download(try_out, recipes, share):
    app, settings = changed_app(*recipes), {"num_server_rounds": 1, "opt_in_probability": 0.0}
    done = try_out(app, **settings)
    row = done.rows[1]
    assert row["train_received"] == 3
    assert row["megabytes_received"] / row["megabytes_sent"] == pytest.approx(share, rel=0.05)  # arrays have headers
    plain = try_out(changed_app(), **settings)
    assert row["centralized_loss"] == pytest.approx(plain.rows[1]["centralized_loss"], abs=0.02)
    again = try_out(app, **settings)
    assert same_bits(done.model, again.model)


@pytest.mark.parametrize(
    ("recipes", "forged"),
    [
        *((("quantise",), forged) for forged in ("huge", "float32", "no scale")),
        (("quantise", "bfloat16"), "inf"),
    ],
)
def test_a_forged_update_is_rejected(try_out, recipes, forged):
    app = changed_app(*recipes)
    config = app.defaults | {"num-server-rounds": 1}
    grid = InProcessGrid(app.client_app.app, config, 5)

    def lie(message: Message, context) -> Message:
        reply = app.client_app.app(message, context)
        if reply.content.get("arrays"):
            arrays = reply.content["arrays"].to_torch_state_dict()
            name = "fc2.bias"
            quantised = arrays[name].dtype == torch.int8
            if forged == "float32":
                arrays[name] = arrays[name].float()
            elif forged == "no scale":
                del arrays[f"{name}/scale"]
            elif quantised:
                arrays[f"{name}/scale"] = torch.tensor([3e37])
                arrays[name].fill_(127)
            else:
                arrays[name].fill_(torch.tensor(float("inf"), dtype=torch.bfloat16).view(torch.int16).item())
            reply.content["arrays"] = ArrayRecord(arrays)
        return reply

    grid.handlers = {0: lie}
    done = try_out(app, grid, num_server_rounds=1, fraction_clients_train=1.0)
    assert (done.rows[1]["train_received"], done.rows[1]["train_rejected"]) == (4, 1)
    assert all(tensor.isfinite().all() for tensor in done.model.values())


def test_a_mask_of_infinity_is_refused(try_out):
    """Its update is NaN, which is not sent as a number."""
    app = changed_app("quantise")

    class Masked(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.net = app.task.Net(1, 10)
            self.register_buffer("mask", torch.tensor([0.0, float("-inf")]))

        def forward(self, x):
            return self.net(x)

    app.task.make_model = lambda facts: Masked()
    with pytest.raises(Exception, match="no round had a usable TRAIN reply"):
        try_out(app, num_server_rounds=1)
