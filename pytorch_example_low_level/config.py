"""What all modules share: the typed, validated run configuration, its random streams, errors and the log.

`pyproject.toml` holds the defaults and says what each key means; `flwr run --run-config` overrides
them. Every value is checked here before anything is sent or written.
"""

import hashlib
from collections.abc import Iterator
from contextlib import contextmanager
from enum import IntEnum
from logging import getLogger
from pathlib import Path
from typing import Annotated, Literal, Self

import numpy as np
from flwr.app import Context
from pydantic import BaseModel, ConfigDict, Field, ValidationError, ValidationInfo, field_validator

log = getLogger("flwr")  # Flower sends this logger's lines to `flwr run --stream`


class UserError(ValueError):
    """An error that the user can fix; the message says what is wrong and what to do."""


def one_line(error: BaseException) -> str:
    """Return an error's text as one line of at most 1,000 characters, or the name of its class if it has no text."""
    return " ".join(str(error).split())[:1000] or type(error).__name__


@contextmanager
def explained(what: str, allowed: str = "") -> Iterator[None]:
    """Convert any exception to a UserError of one line: what failed, why, and what is allowed."""
    try:
        yield
    except Exception as error:
        cause: BaseException = error
        while cause.__cause__ and not isinstance(cause, UserError):  # a library's outermost error may say nothing
            cause = cause.__cause__
        deepest = "" if cause is error else f" ({one_line(cause)})"
        raise UserError(f"{what}: {one_line(error)}{deepest}{allowed}") from error


def source_digest(folder: Path) -> str:
    """Return a digest of the Python files in a folder, which does not depend on how their lines end."""
    files = sorted(path for path in folder.glob("*.py") if not path.name.startswith("."))  # editors' files are hidden
    return hashlib.sha256(repr([(path.name, path.read_text(encoding="utf-8")) for path in files]).encode()).hexdigest()[
        :16
    ]


# The code that this process runs, and where it is. It is computed once, when the code is imported, so a file that is
# saved during a run does not disturb the processes that are running.
CODE = f"{source_digest(Path(__file__).parent)} in {Path(__file__).parent}"


def check_code(server: object) -> None:
    """Raise UserError unless `server`, its CODE, has the digest of this process's code.

    Ray imports the ClientApp by name, from the directory or the environment in which the SuperLink was started.
    """
    if str(server).partition(" ")[0] != CODE.partition(" ")[0]:
        raise UserError(
            f"this node runs different code from the server: the node {CODE}, the server {server}. In a simulation, "
            "the SuperLink was started in another copy of the app, or its environment has another copy installed: stop "
            "it, and give each copy its own (see 'Another project's SuperLink takes the run' in "
            "docs/troubleshooting.md). Over a network, install the same version on both."
        )


Count = Annotated[int, Field(ge=1, le=1_000_000)]
Fraction = Annotated[float, Field(gt=0, le=1)]
Timeout = Annotated[float, Field(gt=0, le=86_400)]  # seconds; more than a day is probably a typing error
PathOrEmpty = Annotated[str, Field(pattern=r"^[^\x00]*$", description='a path, or ""')]

# These keys control how a run is carried out, not what it computes, so they may differ when it is resumed.
OPERATIONAL = {
    "num_server_rounds", "min_available_nodes", "node_wait_timeout", "train_timeout", "query_timeout",
    "evaluate_timeout", "server_device", "output_dir", "resume_from", "use_wandb", "wandb_project",
    "dataset",  # what it holds is compared instead
}  # fmt: skip


class RunConfig(BaseModel):
    """The run configuration. The key `some-key` of `pyproject.toml` is the field `some_key`.

    https://docs.pydantic.dev/latest/concepts/fields/ explains the constraints.
    """

    model_config = ConfigDict(
        alias_generator=lambda name: name.replace("_", "-"),
        strict=True,  # no conversion, except that `learning-rate=1` means 1.0
        extra="forbid",
        frozen=True,
    )

    num_server_rounds: Count
    fraction_clients_train: Fraction
    fraction_clients_query: Fraction
    evaluate_every: Count
    min_available_nodes: Count
    min_train_nodes: Count
    node_wait_timeout: Timeout

    local_epochs: Annotated[int, Field(ge=1, le=10_000)]
    batch_size: Count
    learning_rate: Annotated[float, Field(gt=0, le=100)]
    momentum: Annotated[float, Field(ge=0, lt=1)]
    logit_adjustment: Annotated[float, Field(ge=0, le=10)]
    lr_decay_every: Annotated[int, Field(ge=0, le=1_000_000)]
    lr_decay_factor: Fraction
    augment: bool

    train_timeout: Timeout
    query_timeout: Timeout
    evaluate_timeout: Timeout

    opt_in_probability: Annotated[float, Field(ge=0, le=1)]
    query_max_delay: Annotated[float, Field(ge=0, le=86_400)]

    dataset: Annotated[str, Field(pattern=r"\S", description="a name or a path")]
    image_column: str
    label_column: str
    image_size: Annotated[int, Field(ge=0, le=512)]
    partitioner: Literal["dirichlet", "iid", "natural", "pathological"]
    dirichlet_alpha: Annotated[float, Field(ge=1e-3, le=1e6)]
    partition_column: str
    classes_per_node: Count

    server_device: Annotated[str, Field(pattern=r"^[a-z]+(:\d{1,3})?$", description="a device: auto, cpu, cuda:1, ...")]
    seed: Annotated[int, Field(ge=0, lt=2**63)]
    output_dir: Annotated[str, Field(pattern=r"^[^\x00]*[^\x00\s][^\x00]*$", description="a path")]
    resume_from: PathOrEmpty
    initial_model: PathOrEmpty
    use_wandb: bool
    wandb_project: Annotated[
        str,
        Field(
            pattern=r"^[^/\\#?%:\s]{1,128}$",
            description="a name of 1 to 128 characters, without spaces and / \\ # ? % :",
        ),
    ]

    @field_validator("min_train_nodes")
    @classmethod
    def at_most_available(cls, value: int, info: ValidationInfo) -> int:
        """Check that a round does not need more nodes than it waits for."""
        if value > (limit := info.data.get("min_available_nodes", value)):
            raise ValueError(f"Input should be at most min-available-nodes, {limit}")
        return value

    @field_validator("image_size")
    @classmethod
    def zero_or_at_least_16(cls, value: int) -> int:
        """Check that images are not smaller than what a network can work on."""
        if 0 < value < 16:
            raise ValueError("Input should be 0, or from 16 to 512")
        return value

    @field_validator("partition_column")
    @classmethod
    def given_for_natural(cls, value: str, info: ValidationInfo) -> str:
        """Check that the natural partitioner has its column."""
        if not value and info.data.get("partitioner") == "natural":
            raise ValueError("Input should be the name of a column, which partitioner='natural' needs")
        return value

    @classmethod
    def from_context(cls, context: Context) -> Self:
        """Read the run configuration from the context of a ServerApp or a ClientApp.

        Raises UserError, which lists every fault: unknown and missing keys, wrong types, values
        out of range, and keys that contradict one another.
        """
        try:
            return cls.model_validate(dict(context.run_config))
        except ValidationError as error:
            faults = []
            for fault in error.errors():
                key, said = str(fault["loc"][0]), fault["msg"].removeprefix("Value error, ")
                field = cls.model_fields.get(key.replace("-", "_"))
                if fault["type"] == "string_pattern_mismatch" and field and field.description:
                    said = f"Input should be {field.description}"  # a regular expression says little
                faults.append(f"  - {key}: {said}" + f"; it is {fault['input']!r}" * (fault["type"] != "missing"))
            # The path shows whether another copy of the app is running.
            raise UserError("\n".join([f"Wrong run configuration (checked in {__file__}):", *faults])) from None


# What random numbers are used for. Each purpose has its own streams.
Purpose = IntEnum("Purpose", ["WEIGHTS", "COHORT", "TRAIN", "QUERY", "ASKED", "SPLIT"], start=0)


def random_stream(seed: int, purpose: Purpose, server_round: int = 0, partition: int = 0) -> np.random.Generator:
    """Return the random generator of (seed, purpose, round, partition).

    No random number depends on the earlier state of a global generator, so the results do not depend on
    which process does the work, or when. https://numpy.org/doc/stable/reference/random/parallel.html
    """
    return np.random.default_rng(np.random.SeedSequence(seed, spawn_key=(purpose, server_round, partition)))
