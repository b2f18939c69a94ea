"""The run configuration: every key is checked, and all faults come in one error."""

import itertools
import math
import re
from pathlib import Path

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from pytorch_example_low_level import config as config_module
from pytorch_example_low_level import server_app
from pytorch_example_low_level.config import (
    CODE,
    Purpose,
    RunConfig,
    UserError,
    check_code,
    explained,
    one_line,
    random_stream,
    source_digest,
)
from tests.grid import make_context, run_config, typed_config

DEFAULTS = run_config()

# For each key: a value of a wrong type, and values out of range.
WRONG = {
    "num-server-rounds": ["ten", 0, -1, 1.5, True, 10**7],
    "fraction-clients-train": ["half", 0, 0.0, 1.01, -0.2, math.nan, math.inf, True],
    "fraction-clients-query": ["half", 0, 0.0, 1.01, -0.2, math.nan, True],
    "evaluate-every": ["never", 0, -1, 1.5, 10**7],
    "min-available-nodes": ["two", 0, 2.0],
    "min-train-nodes": ["two", 0, 2.0, 3],
    "node-wait-timeout": ["soon", 0, -1.0, math.inf, 1e6],
    "local-epochs": ["one", 0, 1.0],
    "batch-size": ["all", 0, 32.0],
    "learning-rate": ["fast", 0, -0.1, math.nan, 1e3],
    "momentum": ["0.9", 1, 1.0, -0.1, math.nan],
    "logit-adjustment": ["yes", -0.1, 10.1, math.nan, True],
    "lr-decay-every": ["never", -1, 0.5],
    "lr-decay-factor": ["half", 0, 1.5],
    "augment": ["yes", 1, 0],
    "train-timeout": ["long", 0, -5],
    "query-timeout": ["short", 0.0, math.nan],
    "evaluate-timeout": ["long", 0, 1e9],
    "opt-in-probability": ["maybe", -0.1, 1.1],
    "query-max-delay": ["no", -0.1, math.inf],
    "dataset": [1, "", "  "],
    "partitioner": [1, "shards", "IID"],
    "dirichlet-alpha": ["one", 0, -1.0, 1e-9],
    "server-device": [0, "CUDA", "cuda:1234", "cuda:x", "", "cpu "],
    "seed": ["x", -1, 1.5, 2**63],
    "output-dir": [1, "", "  ", "a\0b"],
    "resume-from": [1, "a\0b"],
    "initial-model": [1, "a\0b"],
    "image-column": [1],
    "label-column": [1],
    "image-size": ["28", -1, 15, 513],
    "partition-column": [1],
    "classes-per-node": ["2", 0],
    "use-wandb": ["false", 0],
    "wandb-project": [1, "", "a/b", "x" * 129, "a b"],
}

# The first and the last value allowed, of keys and of groups of them.
LIMITS = {
    ("num-server-rounds", "evaluate-every", "batch-size"): [1, 10**6],
    ("fraction-clients-train", "fraction-clients-query", "lr-decay-factor"): [1e-9, 1.0],
    ("node-wait-timeout", "train-timeout", "query-timeout", "evaluate-timeout"): [1e-9, 86_400.0],
    ("min-available-nodes",): [2, 10**6],
    ("min-train-nodes",): [1, 2],
    ("local-epochs",): [1, 10**4],
    ("learning-rate",): [1e-9, 100.0],
    ("momentum",): [0.0, 0.999999],
    ("logit-adjustment",): [0.0, 10.0],
    ("lr-decay-every",): [0, 10**6],
    ("opt-in-probability",): [0.0, 1.0],
    ("query-max-delay",): [0.0, 86_400.0],
    ("dirichlet-alpha",): [0.001, 1e6],
    ("image-size",): [0, 16, 512],
    ("seed",): [0, 2**63 - 1],
    ("wandb-project",): ["x", "x" * 128],
    ("server-device",): ["cpu", "cuda:123"],
}


def test_a_whole_number_may_stand_for_a_float():
    rate = typed_config(learning_rate=1).learning_rate
    assert rate == 1.0
    assert isinstance(rate, float)


@pytest.mark.parametrize(("key", "value"), [(k, v) for k, values in WRONG.items() for v in values])
def test_a_wrong_value_is_named_with_key_and_what_is_allowed(key, value):
    with pytest.raises(UserError) as error:
        RunConfig.from_context(make_context(DEFAULTS | {key: value}))
    line = str(error.value).splitlines()[1]
    assert line.startswith(f"  - {key}: ")
    assert (repr(value) in line) or (str(value) in line)
    assert " should " in line
    assert "pattern" not in line and "Value error" not in line


@pytest.mark.parametrize(("key", "value"), [(k, v) for keys, values in LIMITS.items() for k in keys for v in values])
def test_the_limits_are_allowed(key, value):
    assert RunConfig.from_context(make_context(DEFAULTS | {key: value})).model_dump(by_alias=True)[key] == value


def test_every_key_has_a_wrong_value_in_the_table():
    assert WRONG.keys() == DEFAULTS.keys()


def test_unknown_and_missing_keys_are_named():
    given = DEFAULTS | {"num-rounds": 3}
    del given["seed"]
    with pytest.raises(UserError) as error:
        RunConfig.from_context(make_context(given))
    assert "num-rounds: Extra inputs are not permitted" in str(error.value)
    assert "seed: Field required\n" in str(error.value)


def test_all_faults_come_together_and_nothing_is_written(tmp_path):
    wrong = DEFAULTS | {k: v[0] for k, v in WRONG.items()} | {"output-dir": str(tmp_path / "outputs")}
    with pytest.raises(UserError) as error:
        server_app.main(None, make_context(wrong))
    assert len(str(error.value).splitlines()) == len(WRONG)  # a headline, and all but output-dir
    assert list(tmp_path.iterdir()) == []


VALUES = st.one_of(st.integers(), st.floats(), st.booleans(), st.text(max_size=20))


@settings(suppress_health_check=[HealthCheck.too_slow], deadline=None)
@given(st.dictionaries(st.sampled_from([*DEFAULTS, "unknown-key"]), VALUES))
def test_any_values_give_a_configuration_or_one_error(overrides):
    try:
        config = RunConfig.from_context(make_context(DEFAULTS | overrides))
    except UserError as error:
        faults = [line.split(":")[0].removeprefix("  - ") for line in str(error).splitlines() if line[:4] == "  - "]
        assert set(faults) <= overrides.keys() | {"min-train-nodes"}
        assert "Traceback" not in str(error)
    else:
        assert config.model_dump(by_alias=True) == DEFAULTS | overrides


def test_an_error_is_one_line_or_its_name():
    assert one_line(ValueError("\n one\n  two")) == "one two"
    assert one_line(ValueError(" \n")) == "ValueError"
    assert one_line(ValueError("x" * 1001)) == "x" * 1000


def test_any_exception_is_explained_with_its_cause():
    cause = OSError(13, "Permission denied")
    with pytest.raises(UserError) as error, explained("output-dir", "; allowed: a folder"):
        raise cause
    assert str(error.value) == "output-dir: [Errno 13] Permission denied; allowed: a folder"
    assert error.value.__cause__ is cause
    said = r"^Cannot read: while generating \('magic'\)$"  # the outer one says nothing
    with pytest.raises(UserError, match=said), explained("Cannot read"):
        raise RuntimeError("while generating") from KeyError("magic")


# -------------------------------------------------------------------------- Random streams


def test_streams_of_different_seeds_and_paths_never_coincide():
    paths = [(p, r, n) for p in Purpose for r in (*range(6), 10**6) for n in (*range(6), 2**62, 2**64 - 1)]
    seen = {tuple(random_stream(42, *path).integers(2**63, size=2)) for path in paths}
    seen |= {tuple(random_stream(seed, Purpose.TRAIN, 1, 1).integers(2**63, size=2)) for seed in (0, 43, 2**63 - 1)}
    assert len(seen) == len(paths) + 3
    words = [42, [42, 0], [42, 0, 0], *([42, *path] for path in itertools.product(range(6), repeat=3))]
    assert not seen & {tuple(np.random.default_rng(word).integers(2**63, size=2)) for word in words}


def test_a_random_stream_is_the_same_everywhere():
    """Results in the documentation depend on these bits."""
    assert random_stream(42, Purpose.TRAIN, 3, 7).integers(0, 1000, 4).tolist() == [578, 331, 506, 404]
    assert random_stream(42, Purpose.SPLIT).random() == random_stream(42, Purpose.SPLIT, 0, 0).random()


# ------------------------------------------------------------------------- The code that runs


def test_the_digest_is_that_of_the_source(tmp_path):
    (tmp_path / "a.py").write_bytes(b"x = 1\ny = 2\n")
    (tmp_path / "b.py").write_bytes(b"")
    before = source_digest(tmp_path)
    assert re.fullmatch("[0-9a-f]{16}", before)
    (tmp_path / "a.py").write_bytes(b"x = 1\r\ny = 2\r\n")  # as Git may check it out on Windows
    (tmp_path / "notes.txt").write_text("no code")
    (tmp_path / ".#a.py").symlink_to("nowhere")  # an editor's lock
    assert source_digest(tmp_path) == before
    (tmp_path / "a.py").write_bytes(b"x = 1\ny = 3\n")
    assert source_digest(tmp_path) != before
    (tmp_path / "a.py").write_bytes(b"x = 1\ny = 2\n")
    (tmp_path / "b.py").rename(tmp_path / "c.py")
    assert source_digest(tmp_path) != before


def test_other_code_is_one_clear_error_and_the_same_code_elsewhere_is_none():
    digest, _, place = CODE.partition(" in ")
    assert place == str(Path(config_module.__file__).parent)
    check_code(CODE)
    check_code(f"{digest} in /another place")
    with pytest.raises(
        UserError, match=rf"different code from the server: the node {re.escape(CODE)}, the server 0 in /b\."
    ):
        check_code("0 in /b")
