"""The run configuration: one typed, validated view of [tool.flwr.app.config].

`pyproject.toml` holds the defaults and says what each key means; `flwr run --run-config`
overrides them. What arrives is a flat dictionary of whatever the user typed, so it is
checked here, once and completely, before anything is sent or written.
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from dataclasses import dataclass, field, fields
from typing import Any

from flwr.app import Context, UserConfigValue

_DAY = 86_400.0  # the longest deadline: longer ones are typing errors

# A message lives this much longer (seconds) than the server waits for its answer: late answers
# are then dropped in silence, while those to an expired message are logged as errors by Flower.
REPLY_GRACE = 60.0


class UserError(ValueError):
    """Something that the user can mend; the message says what and how."""


class ConfigError(UserError):
    """The run configuration is wrong; the message lists every fault."""


def first_line(error: BaseException | str) -> str:
    """Return what an error says, without the details that only a developer would read."""
    return (str(error).strip() or type(error).__name__).splitlines()[0]


def setting(
    allowed: str,
    *,
    least: float = -math.inf,
    most: float = math.inf,
    above: float = -math.inf,
    below: float = math.inf,
    matches: str = "",
    operational: bool = False,
) -> Any:  # noqa: ANN401 (a dataclass field takes the type of its annotation)
    """Declare a key: what is allowed, in words and as bounds or as a regular expression.

    `operational` keys say how a run is carried out, not what it computes: they may differ
    when a run is resumed.
    """
    return field(
        metadata={
            "allowed": allowed,
            "fits": lambda v: least <= v <= most and above < v < below,
            "matches": re.compile(matches, re.DOTALL),
            "operational": operational,
        }
    )


@dataclass(frozen=True, kw_only=True)
class RunConfig:
    """What a run is asked to do. Key `some-key` of the run configuration is `some_key` here."""

    num_server_rounds: int = setting("1 to 1000000", least=1, most=1e6, operational=True)
    fraction_clients_train: float = setting("above 0, at most 1", above=0, most=1)
    min_available_nodes: int = setting("1 to 1000000", least=1, most=1e6, operational=True)
    node_wait_timeout: float = setting("seconds, above 0, at most 86400", above=0, most=_DAY, operational=True)
    min_train_nodes: int = setting("1 to min-available-nodes", least=1, most=1e6)

    local_epochs: int = setting("1 to 10000", least=1, most=1e4)
    batch_size: int = setting("1 to 1000000", least=1, most=1e6)
    learning_rate: float = setting("above 0, at most 100", above=0, most=100)
    momentum: float = setting("at least 0, below 1", least=0, below=1)
    lr_decay_every: int = setting("0 (never) to 1000000", least=0, most=1e6)
    lr_decay_factor: float = setting("above 0, at most 1", above=0, most=1)
    augment: bool = setting("true or false")

    train_timeout: float = setting("seconds, above 0, at most 86400", above=0, most=_DAY, operational=True)
    query_timeout: float = setting("seconds, above 0, at most 86400", above=0, most=_DAY, operational=True)
    evaluate_timeout: float = setting("seconds, above 0, at most 86400", above=0, most=_DAY, operational=True)

    opt_in_probability: float = setting("0 to 1", least=0, most=1)
    query_max_delay: float = setting("seconds, 0 to 86400", least=0, most=_DAY)

    dataset: str = setting("'fashion-mnist-sample', a name on the Hub, or a folder", matches=r".*\S.*")
    partitioner: str = setting("'dirichlet' or 'iid'", matches="dirichlet|iid")
    dirichlet_alpha: float = setting("0.001 to 1000000", least=1e-3, most=1e6)

    server_device: str = setting(
        "'auto', 'cpu', 'mps', 'cuda', 'cuda:1', ...",
        matches=r"auto|cpu|mps|cuda(:\d{1,3})?",
        operational=True,
    )
    seed: int = setting("0 to 9223372036854775807", least=0, most=2**63 - 1)
    output_dir: str = setting("a folder", matches=r"[^\0]*[^\0\s][^\0]*", operational=True)
    resume_from: str = setting("'' or the directory of a run", matches=r"[^\0]*", operational=True)
    use_wandb: bool = setting("true or false", operational=True)
    wandb_project: str = setting(
        "1 to 128 characters, none of /\\#?%:", matches=r"[^/\\#?%:\s]{1,128}", operational=True
    )

    @classmethod
    def from_context(cls, context: Context) -> RunConfig:
        """Read the run configuration of a ServerApp's or ClientApp's context.

        Raises ConfigError, which lists all that is wrong: unknown or missing keys, wrong
        types, values out of range, and keys that contradict one another.
        """
        given: Mapping[str, UserConfigValue] = context.run_config
        keys = {f.name.replace("_", "-"): f for f in fields(cls)}
        faults = [f"{key}: unknown key; the keys are {', '.join(keys)}" for key in given if key not in keys]
        values: dict[str, Any] = {}
        for key, spec in keys.items():
            if key not in given:
                faults.append(f"{key}: missing")
                continue
            value = given[key]
            if spec.type == "float" and type(value) is int:  # `learning-rate=1` means 1.0
                value = float(value)
            if _is_allowed(value, str(spec.type), spec.metadata):
                values[spec.name] = value
            else:
                faults.append(f"{key}: {value!r} is not allowed; allowed: {spec.type}, {spec.metadata['allowed']}")
        if values.get("min_train_nodes", 0) > values.get("min_available_nodes", math.inf):
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


def _is_allowed(value: UserConfigValue, type_name: str, rules: Mapping[str, Any]) -> bool:
    """Check one value against its type and its rules. `True` is no int, NaN no float."""
    if type(value).__name__ != type_name:
        return False
    if isinstance(value, str):
        return rules["matches"].fullmatch(value) is not None
    return isinstance(value, bool) or bool(rules["fits"](value))
