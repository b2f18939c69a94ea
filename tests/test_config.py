"""The run configuration: every key is checked, and all faults come in one error."""

import math

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from pytorch_example_low_level import server_app
from pytorch_example_low_level.config import ConfigError, RunConfig
from tests.grid import make_context, run_config

DEFAULTS = run_config()

# For each key: a value of a wrong type, and values out of range.
WRONG = {
    "num-server-rounds": ["ten", 0, -1, 1.5, True, 10**7],
    "fraction-clients-train": ["half", 0, 0.0, 1.01, -0.2, math.nan, math.inf, True],
    "min-available-nodes": ["two", 0, 2.0],
    "min-train-nodes": ["two", 0, 2.0, 3],
    "node-wait-timeout": ["soon", 0, -1.0, math.inf, 1e6],
    "local-epochs": ["one", 0, 1.0],
    "batch-size": ["all", 0, 32.0],
    "learning-rate": ["fast", 0, -0.1, math.nan, 1e3],
    "momentum": ["0.9", 1, 1.0, -0.1, math.nan],
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
    "server-device": [0, "gpu", "cuda:x", ""],
    "seed": ["x", -1, 1.5, 2**63],
    "output-dir": [1, "", "a\0b"],
    "resume-from": [1, "a\0b"],
    "use-wandb": ["false", 0],
    "wandb-project": [1, "", "a/b", "x" * 129],
}


def read(**overrides) -> RunConfig:
    return RunConfig.from_context(make_context(DEFAULTS | {k.replace("_", "-"): v for k, v in overrides.items()}))


def test_the_defaults_are_valid_and_come_back_with_the_keys_of_pyproject():
    assert RunConfig.from_context(make_context(DEFAULTS)).to_dict() == DEFAULTS


def test_a_whole_number_may_stand_for_a_float():
    rate = read(learning_rate=1).learning_rate
    assert rate == 1.0
    assert isinstance(rate, float)


@pytest.mark.parametrize(("key", "value"), [(k, v) for k, values in WRONG.items() for v in values])
def test_a_wrong_value_is_named_with_its_key_and_what_is_allowed(key, value):
    with pytest.raises(ConfigError) as error:
        RunConfig.from_context(make_context(DEFAULTS | {key: value}))
    line = str(error.value).splitlines()[1]
    assert line.startswith(f"  - {key}: ")
    assert (repr(value) in line) or (str(value) in line)
    assert "allowed: " in line


def test_every_key_has_a_wrong_value_in_the_table():
    assert WRONG.keys() == DEFAULTS.keys()


def test_unknown_and_missing_keys_are_named():
    given = DEFAULTS | {"num-rounds": 3}
    del given["seed"]
    with pytest.raises(ConfigError) as error:
        RunConfig.from_context(make_context(given))
    assert "num-rounds: unknown key" in str(error.value)
    assert "seed: missing" in str(error.value)


def test_all_faults_are_reported_together_and_nothing_is_written(tmp_path):
    wrong = DEFAULTS | {k: v[0] for k, v in WRONG.items()} | {"output-dir": str(tmp_path / "outputs")}
    with pytest.raises(ConfigError) as error:
        server_app.main(None, make_context(wrong))
    assert len(str(error.value).splitlines()) == len(WRONG)  # a headline, and all but output-dir
    assert list(tmp_path.iterdir()) == []


VALUES = st.one_of(st.integers(), st.floats(), st.booleans(), st.text(max_size=20))


@settings(suppress_health_check=[HealthCheck.too_slow], deadline=None)
@given(st.dictionaries(st.sampled_from([*DEFAULTS, "unknown-key"]), VALUES))
def test_any_values_give_a_configuration_or_one_error_that_names_each_fault(overrides):
    try:
        config = RunConfig.from_context(make_context(DEFAULTS | overrides))
    except ConfigError as error:
        faults = [line.split(":")[0].removeprefix("  - ") for line in str(error).splitlines() if line[:4] == "  - "]
        assert set(faults) <= overrides.keys() | {"min-train-nodes"}
        assert "Traceback" not in str(error)
    else:
        assert config.to_dict() == DEFAULTS | overrides
