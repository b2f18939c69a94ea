"""The typed, validated run configuration, and the random streams that derive from its seed.

`pyproject.toml` holds the defaults and says what each key means; `flwr run --run-config` overrides
them. Every value is checked here before anything is sent or written.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, fields
from enum import IntEnum
from typing import Any

import numpy as np
from flwr.app import Context, UserConfigValue

DAY = 86_400.0  # seconds; the longest timeout, since a longer one is probably a typing error


class UserError(ValueError):
    """An error that the user can fix; the message says what is wrong and what to do."""


class ConfigError(UserError):
    """The run configuration is invalid; the message lists every fault."""


def first_line(error: BaseException | str) -> str:
    """Return the first line of an error's text, or the name of its class if it has no text."""
    return (str(error).strip() or type(error).__name__).splitlines()[0]


def setting(allowed: str, fits: Callable[[Any], bool] = lambda _: True, *, operational: bool = False) -> Any:  # noqa: ANN401 (takes the field's type)
    """Declare a key of the run configuration with its allowed values, in words and as a predicate.

    `operational` keys control how a run is carried out, not what it computes. They may have other
    values when a run is resumed.
    """
    return field(metadata={"allowed": allowed, "fits": fits, "operational": operational})


def timeout() -> Any:  # noqa: ANN401
    """Declare a key that holds a timeout in seconds."""
    return setting("seconds, above 0, at most 86400", lambda v: 0 < v <= DAY, operational=True)


@dataclass(frozen=True, kw_only=True)
class RunConfig:
    """The run configuration. The key `some-key` of `pyproject.toml` is the field `some_key`."""

    num_server_rounds: int = setting("1 to 1000000", lambda v: 1 <= v <= 1e6, operational=True)
    fraction_clients_train: float = setting("above 0, at most 1", lambda v: 0 < v <= 1)
    fraction_clients_query: float = setting("above 0, at most 1", lambda v: 0 < v <= 1)
    evaluate_every: int = setting("1 to 1000000", lambda v: 1 <= v <= 1e6)
    min_available_nodes: int = setting("1 to 1000000", lambda v: 1 <= v <= 1e6, operational=True)
    min_train_nodes: int = setting("1 to min-available-nodes", lambda v: 1 <= v <= 1e6)
    node_wait_timeout: float = timeout()

    local_epochs: int = setting("1 to 10000", lambda v: 1 <= v <= 1e4)
    batch_size: int = setting("1 to 1000000", lambda v: 1 <= v <= 1e6)
    learning_rate: float = setting("above 0, at most 100", lambda v: 0 < v <= 100)
    momentum: float = setting("at least 0, below 1", lambda v: 0 <= v < 1)
    logit_adjustment: float = setting("0 (plain cross-entropy) to 10", lambda v: 0 <= v <= 10)
    lr_decay_every: int = setting("0 (never) to 1000000", lambda v: 0 <= v <= 1e6)
    lr_decay_factor: float = setting("above 0, at most 1", lambda v: 0 < v <= 1)
    augment: bool = setting("true or false")

    train_timeout: float = timeout()
    query_timeout: float = timeout()
    evaluate_timeout: float = timeout()

    opt_in_probability: float = setting("0 to 1", lambda v: 0 <= v <= 1)
    query_max_delay: float = setting("seconds, 0 to 86400", lambda v: 0 <= v <= DAY)

    dataset: str = setting("'fashion-mnist-sample', a name on the Hub, or a folder", lambda v: bool(v.strip()))
    partitioner: str = setting("'dirichlet' or 'iid'", lambda v: v in ("dirichlet", "iid"))
    dirichlet_alpha: float = setting("0.001 to 1000000", lambda v: 1e-3 <= v <= 1e6)

    server_device: str = setting(
        "'auto', or a device of PyTorch such as 'cpu', 'cuda', 'cuda:1', 'mps'",
        lambda v: bool(re.fullmatch(r"[a-z]+(:\d{1,3})?", v)),
        operational=True,
    )
    seed: int = setting("0 to 9223372036854775807", lambda v: 0 <= v < 2**63)
    output_dir: str = setting("a folder", lambda v: bool(v.strip()) and "\0" not in v, operational=True)
    resume_from: str = setting("'' or the directory of a run", lambda v: "\0" not in v, operational=True)
    initial_model: str = setting("'' or the file of a state_dict", lambda v: "\0" not in v)
    use_wandb: bool = setting("true or false", operational=True)
    wandb_project: str = setting(
        "1 to 128 characters, none of /\\#?%: and no spaces",
        lambda v: bool(re.fullmatch(r"[^/\\#?%:\s]{1,128}", v)),
        operational=True,
    )

    @classmethod
    def from_context(cls, context: Context) -> RunConfig:
        """Read the run configuration from the context of a ServerApp or a ClientApp.

        Raises ConfigError, which lists every fault: unknown and missing keys, wrong types, values
        out of range, and keys that contradict one another.
        """
        given: Mapping[str, UserConfigValue] = context.run_config
        keys = {f.name.replace("_", "-"): f for f in fields(cls)}
        known = f"the keys in {__file__} are {', '.join(keys)}"  # the file shows when another copy of the app runs
        faults = [f"{key}: unknown key; {known}" for key in given if key not in keys]
        values: dict[str, Any] = {}
        for key, spec in keys.items():
            value = given.get(key)
            if spec.type == "float" and type(value) is int:  # `learning-rate=1` means 1.0
                value = float(value) if abs(value) < 2**63 else value
            if value is None:
                faults.append(f"{key}: missing")
            elif type(value).__name__ == spec.type and spec.metadata["fits"](value):
                values[spec.name] = value
            else:
                faults.append(f"{key}: {value!r} is not allowed; allowed: {spec.type}, {spec.metadata['allowed']}")
        if values.get("min_train_nodes", 0) > values.get("min_available_nodes", 1e6):
            faults.append(
                f"min-train-nodes: {values['min_train_nodes']} is more than min-available-nodes, "
                f"{values['min_available_nodes']}; allowed: at most that"
            )
        if faults:
            raise ConfigError("Wrong run configuration:\n" + "\n".join(f"  - {f}" for f in faults))
        return cls(**values)

    def to_dict(self, *, with_operational: bool = True) -> dict[str, UserConfigValue]:
        """Return the configuration with the keys of `pyproject.toml`."""
        return {
            f.name.replace("_", "-"): getattr(self, f.name)
            for f in fields(self)
            if with_operational or not f.metadata["operational"]
        }


class Purpose(IntEnum):
    """What random numbers are used for. Each purpose has its own streams."""

    WEIGHTS = 0
    COHORT = 1
    TRAIN = 2
    QUERY = 3
    ASKED = 4
    SPLIT = 5


def random_stream(seed: int, purpose: Purpose, server_round: int = 0, partition: int = 0) -> np.random.Generator:
    """Return the random generator of (seed, purpose, round, partition).

    No random number comes from a global generator, so the results do not depend on which process
    does the work, or when. https://numpy.org/doc/stable/reference/random/parallel.html
    """
    return np.random.default_rng(np.random.SeedSequence(seed, spawn_key=(purpose, server_round, partition)))
