"""What the README says is what the code does."""

import importlib
import json
import os
import re
import shlex
import shutil
import subprocess
import sys
import tomllib
import types
from dataclasses import fields
from pathlib import Path

import pytest
import torch
import yaml
from flwr.app import MessageType

from deploy.cli import BIN, FlowerCli, free_port, start, stop
from deploy.local_federation import HOST, make_certificates, make_node_key
from deploy.prepare_partitions import write_partitions
from pytorch_example_low_level import client_app, server_app, utils
from pytorch_example_low_level.config import RunConfig
from tests.conftest import model, results, wait_for
from tests.grid import PROJECT, InProcessGrid, make_context

README = (PROJECT / "README.md").read_text()


def example(name: str) -> str:
    """The code block behind the marker of this name."""
    return re.search(rf"<!-- example: {name} -->\n```python\n(.*?)```", README, re.DOTALL).group(1)


def changed(module: types.ModuleType, **replacements: str) -> types.ModuleType:
    """The module with some of its text replaced, as a reader would."""
    source = (PROJECT / "pytorch_example_low_level" / f"{module.__name__.split('.')[-1]}.py").read_text()
    for old, new in replacements.items():
        assert source.count(old) == 1
        source = source.replace(old, new)
    copy = types.ModuleType(module.__name__ + "_changed")
    # So that dataclasses find the module in which they are defined.
    sys.modules[copy.__name__] = copy
    exec(compile(source, copy.__name__, "exec"), copy.__dict__)
    return copy


def add(module: types.ModuleType, code: str) -> None:
    exec(compile(code, "README.md", "exec"), module.__dict__)


def run(app, server: types.ModuleType, client: types.ModuleType = client_app, **overrides):
    config = app.config(**overrides)
    grid = InProcessGrid(client.app, config, 5)
    server.main(grid, make_context(config))
    return grid, app.latest()


def test_another_aggregation_rule(app):
    copy = changed(server_app)
    add(copy, example("aggregation"))
    like = {"w": torch.zeros(2)}
    updates = [({"w": torch.tensor(v)}, 1) for v in ([1.0, 9.0], [2.0, 8.0], [1e30, -1e30])]
    assert copy.weighted_mean(updates, like)["w"].tolist() == [2.0, 8.0]
    assert copy.weighted_mean([], like) is None
    _, directory = run(app, copy)
    _, plain = run(app, server_app)
    assert not torch.equal(model(directory)["fc2.bias"], model(plain)["fc2.bias"])


def test_another_way_to_sample(app):
    copy = changed(server_app)
    add(copy, example("sampling"))
    grid, _ = run(app, copy, num_server_rounds=5, fraction_clients_train=0.4)
    trained = {}
    for message in grid.sent:
        if message.metadata.message_type == MessageType.TRAIN:
            trained.setdefault(message.metadata.group_id, []).append(grid.partition(message.metadata.dst_node_id))
    assert trained == {"1": [0, 1], "2": [2, 3], "3": [0, 4], "4": [1, 2], "5": [3, 4]}


def test_one_more_phase(app):
    old = "            cohort = sample_cohort(nodes, config, server_round)\n"
    server = changed(server_app, **{old: example("phase, main")})
    add(server, example("phase, server"))
    client = changed(client_app)
    add(client, example("phase, client"))
    grid, directory = run(app, server, client, fraction_clients_train=1.0)
    assert {m.metadata.message_type for m in grid.sent} >= {"query.battery", MessageType.TRAIN}
    # Partition p has a level of 1 / (1 + p): only that of partition 0 is above one half.
    assert [row["train_sampled"] for row in results(directory)[1:]] == [1, 1]


@pytest.mark.parametrize("name", ["aggregation", "sampling", "phase, client", "phase, server", "phase, main"])
def test_every_example_is_short(name):
    assert len(example(name).splitlines()) <= 8


def test_the_configuration_table_is_that_of_the_code():
    config = tomllib.loads((PROJECT / "pyproject.toml").read_text())["tool"]["flwr"]["app"]["config"]
    rows = dict(re.findall(r"^\| `([a-z-]+)` \| `([^`]*)` \|", README, re.MULTILINE))
    documented = {key: tomllib.loads(f"v = {value}")["v"] for key, value in rows.items()}
    assert documented == config
    assert list(documented) == list(config)
    assert {f.name.replace("_", "-") for f in fields(RunConfig)} == set(config)


def test_every_default_has_a_comment():
    section = (PROJECT / "pyproject.toml").read_text().split("[tool.flwr.app.config]")[1].split("\n[")[0]
    for line in section.strip().splitlines():
        assert not line or "# " in line, line


def test_every_result_key_and_file_is_documented():
    for key in utils.RESULT_KEYS:
        assert f"`{key}`" in README
    for name in ("run_config.json", "results.json", "best.pt", "last.pt", "final_model.pt", "metrics.png", "wandb/"):
        assert name in README


def test_the_files_of_the_app_and_the_links_are_there():
    for name in re.findall(r"^\| `([a-z_]+\.py)` \|", README, re.MULTILINE):
        assert (PROJECT / "pytorch_example_low_level" / name).exists()
    for target in re.findall(r"\]\((?!http|#)([^)]+)\)", README):
        assert (PROJECT / target).exists(), target


def test_the_code_to_use_a_model_works(app, monkeypatch):
    directory = app.run(num_server_rounds=1)
    code = re.search(r"To use a model:\n\n```python\n(.*?)```", README, re.DOTALL).group(1)
    monkeypatch.chdir(directory)
    namespace: dict = {}
    exec(compile(code, "README.md", "exec"), namespace)
    assert torch.equal(namespace["net"].state_dict()["fc2.bias"], model(directory)["fc2.bias"])


def test_every_run_config_in_a_command_is_valid(app):
    from flwr.common.config import parse_config_args

    commands = re.findall(r'--run-config (?:"([^"]*)"|(\S+=\S+))', README)
    assert len(commands) >= 4
    defaults = tomllib.loads((PROJECT / "pyproject.toml").read_text())["tool"]["flwr"]["app"]["config"]
    for quoted, bare in commands:
        if "..." not in quoted:
            RunConfig.from_context(make_context(defaults | parse_config_args([quoted or bare])))


def test_the_commands_that_make_certificates_and_keys_work(tmp_path):
    commands = re.findall(r'`python -c "([^"]*)"`', README)
    assert len(commands) == 2
    for command in commands:
        exec(compile(command.replace("Path('", f"Path('{tmp_path}/"), "README.md", "exec"), {})
    made = {p.name for p in tmp_path.rglob("*") if p.is_file()}
    assert made == {"ca.crt", "server.crt", "server.key", "node-key", "node-key.pub"}


@pytest.mark.parametrize("module", sorted(set(re.findall(r"python -m ((?:benchmarks|deploy)\.\w+)", README))))
def test_every_command_of_ours_has_the_options_that_the_readme_gives_it(module, monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", [module, "--help"])
    with pytest.raises(SystemExit):
        importlib.import_module(module).main()
    known = set(re.findall(r"--[a-z-]+", capsys.readouterr().out))
    given = re.findall(rf"python -m {module}([^`\n]*)", README)
    for options in given:
        assert set(re.findall(r"(?<= )--[a-z-]+", re.sub(r'"[^"]*"', "", options))) <= known, options


@pytest.mark.parametrize("command", ["flower-superlink", "flower-supernode", "flwr run", "flwr supernode register"])
def test_flower_knows_every_option_that_the_readme_gives_it(command):
    program, *rest = command.split()
    env = os.environ | {"COLUMNS": "200", "NO_COLOR": "1"}
    shown = subprocess.run([BIN / program, *rest, "--help"], capture_output=True, text=True, check=True, env=env)
    known = set(re.findall(r"--[a-z-]+", shown.stdout))
    given = re.findall(rf"{command} ([^`\n]*)", README)
    assert given
    for options in given:
        assert set(re.findall(r"(?<= )--[a-z-]+", re.sub(r'"[^"]*"', "", options))) <= known, options


@pytest.mark.e2e
@pytest.mark.timeout(600)
def test_the_steps_of_the_readme_for_several_machines_make_a_federation(tmp_path, tiny_dataset):
    """Server, node and desk are folders here, each with the files that the README gives it."""
    server, node, desk = (tmp_path / name for name in ("server", "node", "desk"))
    home = {folder: FlowerCli(folder / ".flwr").env for folder in (server, node, desk)}
    write_partitions(tmp_path / "parts", 1, tiny_dataset, "iid", 1.0, 42)
    port = free_port()
    settings = "num-server-rounds=1 min-available-nodes=1 min-train-nodes=1 opt-in-probability=1.0 use-wandb=false"
    here = {
        "server.example.org": HOST, "0.0.0.0": HOST, "8000": str(port), "/path/to/ca.crt": str(desk / "ca.crt"),
        "/path/to/data": str(tmp_path / "parts" / "node-0"),
        '"query-timeout=30.0"': f"\"query-timeout=30.0 dataset='{tiny_dataset}' {settings}\"",
    }  # fmt: skip
    section = README[README.index("### Several machines") : README.index("### Docker")]
    for there, ours in here.items():
        assert there in section
        section = section.replace(there, ours)
    commands = re.findall(r"`((?:python -c|flower-\w+|flwr \w+) [^`]+)`", section)
    certificates, key, superlink, register, supernode, run = map(shlex.split, commands)

    def do(command: list[str], cwd: Path, env: dict[str, str]) -> str:
        done = subprocess.run(command, cwd=cwd, env=env, capture_output=True, text=True, check=False)
        assert done.returncode == 0, done.stdout + done.stderr
        return done.stdout

    processes = []
    try:
        do(certificates, server, home[server])
        do(key, node, home[node])
        for folder in (node, desk):
            shutil.copy(server / "certificates" / "ca.crt", folder)
        shutil.copy(node / "node-key.pub", desk)
        (configuration,) = re.findall(r"```toml\n(.*?)```", section, re.DOTALL)
        (desk / ".flwr" / "config.toml").write_text(configuration)

        processes.append(start(superlink, server, home[server], server / "log"))
        nodes = ["flwr", "supernode", "ls", "production", "--format", "json"]
        wait_for(lambda: '"success": true' in FlowerCli(desk / ".flwr")(*nodes[1:]))
        do(register, desk, home[desk])
        processes.append(start([*supernode, "--port", str(free_port())], node, home[node], node / "log"))
        wait_for(lambda: json.loads(do(nodes, desk, home[desk]))["nodes"][0]["status"] == "online")
        log = do(run, PROJECT, home[desk])
    finally:
        for process in reversed(processes):
            stop(process)
    (directory,) = (server / "outputs").glob("*/*")
    row = results(directory)[1]
    assert (row["nodes_available"], row["train_received"]) == (1, 1), log
    assert row["evaluate_received"] == row["query_received"]
    assert (directory / "final_model.pt").exists()


def test_the_containers_get_the_options_of_the_readme_and_the_files_that_its_steps_make(tmp_path):
    federation = tmp_path / "federation"
    make_certificates(federation / "certificates")
    for node in ("node-0", "node-1"):
        make_node_key(federation / "keys" / node)
        (federation / "data" / node).mkdir(parents=True)  # by deploy.prepare_partitions
    text = (PROJECT / "deploy" / "compose.yml").read_text()
    for folder in re.search(r"mkdir -p (.*) &&", text).group(1).split():
        (tmp_path / folder).mkdir()
    services = yaml.safe_load(text)["services"]
    assert services.keys() == {"superlink", "supernode-0", "supernode-1"}
    for name, service in services.items():
        program = f"flower-{name.removesuffix('-0').removesuffix('-1')}"
        (command,) = re.findall(rf"`{program} ([^`]+)`", README)
        options = dict(option.split("=", 1) for option in service["command"] if "=" in option)
        assert {option.split("=")[0] for option in service["command"]} == set(re.findall(r"--[a-z-]+", command))
        mounted = dict(reversed(volume.removesuffix(":ro").split(":")) for volume in service["volumes"])
        assert all((tmp_path / "deploy" / source).resolve().exists() for source in mounted.values())
        paths = re.findall(r"/app/[\w/.-]+", " ".join(options.values()))
        assert paths
        assert all(any(path.startswith(target) for target in mounted) for path in paths)


def test_the_flower_configuration_is_one():
    (block,) = re.findall(r"```toml\n(.*?)```", README, re.DOTALL)
    assert tomllib.loads(block)["superlink"]["production"].keys() == {"address", "root-certificates"}


def test_the_commands_for_set_up_are_complete():
    assert re.search(r"^pip install -e \. && .*flwr run \. --stream", README, re.MULTILINE)
    ci = (PROJECT / ".ci" / "run").read_text()
    assert "<!-- test command -->" in ci
    assert "<!-- test command -->\n```shell\npip install -e '.[test]' && pytest -n 2 --dist loadfile\n```" in README
