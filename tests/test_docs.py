"""What README and docs say is what the code does. `test_recipes.py` runs docs/recipes/."""

import importlib
import json
import logging
import re
import subprocess
import sys
import tomllib
from importlib.metadata import entry_points
from operator import attrgetter
from types import SimpleNamespace

import numpy as np
import pytest
import yaml
from flwr.app import Message, RecordDict
from PIL import Image

from deploy.keys import make_certificates, make_node_key
from pytorch_example_low_level import __version__, config, figures, images, messaging, server_app, utils
from pytorch_example_low_level.config import OPERATIONAL, RunConfig, UserError
from tests.conftest import App, results
from tests.grid import PROJECT, make_context, typed_config

PAGES = {
    path.relative_to(PROJECT).as_posix(): path.read_text()
    for path in (
        PROJECT / "README.md",
        PROJECT / "CONTRIBUTING.md",
        PROJECT / "CHANGELOG.md",
        *PROJECT.glob("docs/**/*.md"),
    )
}
README, REFERENCE = PAGES["README.md"], PAGES["docs/reference.md"]
DEPLOYMENT, TROUBLESHOOTING = PAGES["docs/deployment.md"], PAGES["docs/troubleshooting.md"]
ALL = "\n".join(PAGES.values())
PYPROJECT = tomllib.loads((PROJECT / "pyproject.toml").read_text())
DEFAULTS = PYPROJECT["tool"]["flwr"]["app"]["config"]


def table(text: str) -> list[list[str]]:
    """The rows of all Markdown tables in the text."""
    return [[cell.strip() for cell in line.strip("|").split("|")] for line in text.splitlines() if line[:2] == "| "]


def section(page: str, heading: str) -> str:
    """The text below a heading, up to the next one of the same level."""
    level = heading.split(maxsplit=1)[0]
    return page.split(f"\n{heading}\n")[1].split(f"\n{level} ", maxsplit=1)[0]


def anchors(text: str) -> set[str]:
    """The anchors that GitHub makes of the headings."""
    headings = re.findall(r"^#+ (.+)$", re.sub(r"```.*?```", "", text, flags=re.DOTALL), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


# ------------------------------------------------------------------------- README, CONTRIBUTING


def test_the_front_matter_is_that_of_flowers_examples():
    front_matter = yaml.safe_load(README.split("---\n")[1])
    assert front_matter.keys() == {"tags", "dataset", "framework"}
    assert all(isinstance(value, list) and value for value in front_matter.values())


def test_readme_and_contributing_are_short():
    assert len(README.splitlines()) <= 250
    assert len(PAGES["CONTRIBUTING.md"].splitlines()) <= 60


def test_the_two_commands_are_complete():
    assert re.search(r"^pip install -e \. && .*flwr run \. --stream", README, re.MULTILINE)
    assert "<!-- test command -->" in (PROJECT / ".ci" / "run").read_text()
    assert "<!-- test command -->\n```shell\npip install -e '.[test]' && pytest -n 3 --dist loadfile\n```" in README


def test_versions_agree():
    assert PYPROJECT["project"]["version"] == __version__
    assert re.search(r"^## (.+)$", PAGES["CHANGELOG.md"], re.MULTILINE).group(1) == __version__
    target = PYPROJECT["tool"]["flwr"]["app"]["flwr-version-target"]
    assert f"flwr {target}" in README
    assert f"flwr {target}" in TROUBLESHOOTING
    assert f"superlink:{target}" in (PROJECT / "deploy" / "compose.yml").read_text()


def test_each_module_is_listed_and_within_its_size():
    modules = {
        path.name: len(path.read_text().splitlines()) for path in PROJECT.glob("pytorch_example_low_level/[!_]*.py")
    }
    assert set(re.findall(r"── (\w+\.py) ", README)) == modules.keys()
    limits = {row[0].strip("`"): row[2] for row in table(PAGES["CONTRIBUTING.md"]) if row[-1].isdigit()}
    assert limits.keys() == modules.keys()
    assert {name: lines for name, lines in modules.items() if lines > int(limits[name])} == {}


def test_only_task_and_images_know_what_is_learned():
    """What is left are names of other libraries, and what other Flower apps call accuracy in a message."""
    words = re.compile(
        r"\b(images?|pixels?|labels?|class[-_ ]names?|columns?|accurac(y|ies))\b|_(image|label|accuracy)", re.I
    )
    others = re.compile(r"wandb\.Image\(|\blabel=|Accuracy has that of|name == \"accuracy\"")
    for name in ("server_app", "messaging", "figures", "utils", "client_app"):
        lines = (PROJECT / "pytorch_example_low_level" / f"{name}.py").read_text().splitlines()
        assert [line for line in lines if words.search(others.sub("", line))] == [], name


def test_the_names_that_the_readme_says_to_edit_exist():
    for _, where in table(section(README, "## Make the round your own"))[2:]:
        names = re.findall(r"`((?!\w+\.py`)[\w.]+)`", where)
        for file in re.findall(r"`(\w+\.py)`", where):
            module = importlib.import_module(f"pytorch_example_low_level.{file[:-3]}")
            assert names
            for name in names:
                attrgetter(name)(module)  # raises if it is not there


@pytest.fixture(scope="module")
def finished(tiny_dataset, tmp_path_factory) -> SimpleNamespace:
    """A run of two rounds in which all nodes take part: its directory, its log, its Grid, and the nodes' replies."""
    lines: list[str] = []
    replies: dict[str, RecordDict] = {}
    app = App(tiny_dataset, tmp_path_factory.mktemp("finished"))
    grid = app.grid()
    real = grid.client_app

    def watch(message: Message, context) -> Message:
        reply = real(message, context)
        replies[f"← {message.metadata.message_type.upper()}"] = reply.content
        return reply

    grid.client_app = watch
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(config.log, "handle", lambda record: lines.append(record.getMessage()))
        patch.setattr(config.log, "isEnabledFor", lambda level: level >= logging.INFO)
        directory = app.run(grid, fraction_clients_train=1.0, opt_in_probability=1.0)
    return SimpleNamespace(directory=directory, log=lines, grid=grid, replies=replies)


def shape(line: str) -> str:
    """A line of the log with its numbers, paths and ids replaced."""
    line = re.sub(r"(?<=: )/\S+|(?<=sync )/\S+|(?<=in )/\S+", "PATH", line)
    return re.sub(r"\d[\d.:+a-z]*", "N", line).replace("   ", " ").strip()


def test_the_log_in_the_readme_is_one(finished):
    logged = [shape(line) for line in finished.log]
    block = re.search(r"<!-- log -->\n```\n(.*?)```", README, re.DOTALL).group(1)
    lines = [line.removeprefix("INFO :").strip() for line in block.splitlines() if line != "..."]
    source = (PROJECT / "pytorch_example_low_level" / "utils.py").read_text()
    for words in ("W&B cannot go online: ", "offline. To upload this run later: wandb sync "):
        assert words in block
        assert words in source
    # W&B is off here, and which round is the best depends on the data.
    shown = [shape(line) for line in lines if not line.startswith(("📈", "🎉"))]
    start = shown.index(shape("🔄 Starting round 2/10"))
    one_round = [line for line in logged[logged.index(shown[start]) :] if not line.startswith("🎉")]
    assert one_round[:8] == shown[start : start + 8]
    position = 0
    for line in shown:
        position = logged.index(line, position) + 1


def test_the_snippet_classifies_image_files(finished, tiny_dataset, tmp_path, monkeypatch, capsys):
    directory = finished.directory
    info = json.loads((directory / "run_config.json").read_text())
    split = images.load_test_split(typed_config(dataset=tiny_dataset))
    files = []
    for number, image in enumerate(split.images):
        files.append(tmp_path / f"{number}.png")
        Image.fromarray(np.asarray(image[0])).save(files[-1])
    code = re.search(r"<!-- example: use a model -->\n```python\n(.*?)```", README, re.DOTALL).group(1)
    example_directory = re.search(r'run = Path\("([^"]+)"\)', code).group(1)
    code = code.replace(example_directory, str(directory)).replace("image.png", str(files[0]))
    # The code alone: nothing of this test, and a working directory without the run.
    monkeypatch.chdir(tmp_path)
    namespace: dict = {}
    exec(compile(code, "README.md", "exec"), namespace)
    assert capsys.readouterr().out.split("\n")[:-1] == [namespace["classify"](files[0])]
    monkeypatch.setattr(config, "CODE", "0123456789abcdef in another copy")
    exec(compile(code, "README.md", "exec"), {})
    assert re.match(r"The model was .* [0-9a-f]{16} in /.*, and this is 0123456789abc", capsys.readouterr().out)
    names = [namespace["classify"](file) for file in files]
    assert set(names) <= set(info["class-names"])
    right = sum(name == split.class_names[label] for name, label in zip(names, split.labels.tolist(), strict=True))
    assert right / len(files) == results(directory)[-1]["centralized_accuracy"]
    # Any image file will do.
    Image.new("RGBA", (300, 200)).save(tmp_path / "large.png")
    assert namespace["classify"](tmp_path / "large.png") in info["class-names"]


# ------------------------------------------------------------------------------------- Links


@pytest.mark.parametrize("page", PAGES)
def test_links_lead_somewhere(page):
    text = re.sub(r"```.*?```|`[^`\n]*`", "", PAGES[page], flags=re.DOTALL)
    for target in re.findall(r"\]\((?!https?:)([^)]+)\)", text):
        path, _, anchor = target.partition("#")
        file = (PROJECT / page).parent / path if path else PROJECT / page
        assert file.exists(), target
        assert not anchor or anchor in anchors(file.read_text()), target


# --------------------------------------------------------------------------------- Reference


def test_the_configuration_tables_are_those_of_the_code():
    rows = dict(re.findall(r"^\| `([a-z-]+)` \| `([^`]*)` \|", REFERENCE, re.MULTILINE))
    documented = {key: tomllib.loads(f"v = {value}")["v"] for key, value in rows.items()}
    assert documented == DEFAULTS
    assert list(documented) == list(DEFAULTS)
    assert {name.replace("_", "-") for name in RunConfig.model_fields} == set(DEFAULTS)
    text = (PROJECT / "pyproject.toml").read_text().split("[tool.flwr.app.config]")[1].split("\n[")[0]
    assert [line for line in text.splitlines() if line and "# " not in line] == []  # each default has a comment


def test_the_keys_that_may_change_on_resuming_are_listed():
    text = section(REFERENCE, "## Resuming a run")
    listed = set(re.findall(r"`([a-z-]+)`", text.split("These keys may change:")[1].split("All other keys")[0]))
    operational = {name.replace("_", "-") for name in OPERATIONAL}
    assert listed == operational - {"resume-from"}


def test_the_keys_of_results_json_are_listed_in_order():
    rows = table(section(REFERENCE, "### results.json"))
    keys = figures.result_keys(["loss", "accuracy", "accuracy_per_class"], server_app.SCORE)
    assert [key for row in rows for key in re.findall(r"`(\w+)`", row[0])] == keys


def test_the_files_of_a_run_are_listed(finished):
    directory = finished.directory
    rows = table(section(REFERENCE, "## The run directory").split("### results.json")[0])
    listed = {name for row in rows for name in re.findall(r"`([^`]+)`", row[0])}
    found = {path.relative_to(directory).as_posix() for path in directory.rglob("*") if path.is_file()}
    assert found | {"wandb/"} == listed  # test_report.py has a run with W&B
    info = json.loads((directory / "run_config.json").read_text())
    assert info.keys() == DEFAULTS.keys() | {"run-id", "class-names", "image-shape", "versions", "code"}
    assert info["versions"].keys() == {"flwr", "flwr-datasets", "torch", "numpy", "python", "app"}


def test_the_table_of_messages_is_that_of_a_run(finished):
    seen = {f"{m.metadata.message_type.upper()} →": m.content for m in finished.grid.sent} | finished.replies
    rows = table(section(REFERENCE, "## Messages"))[2:]
    assert {row[0] for row in rows} == seen.keys()
    for kind, records, contents in rows:
        assert set(re.findall(r"`(\w+)`", records)) == seen[kind].keys(), kind
        values = {}
        for name, record in seen[kind].items():
            values |= {} if name == "arrays" else {key: type(value).__name__ for key, value in record.items()}
        documented = dict(re.findall(r"`([\w-]+)` (int|float|bool|list|str)", contents))
        assert documented == values, kind


def test_the_limits_in_the_reference_are_those_of_the_code():
    text = " ".join(REFERENCE.split())
    for value, words in (
        (messaging.MAX_FLOAT, "exceed 1e38"),
        (messaging.MAX_EXAMPLES, "between 1 and 1,000,000,000"),
        (messaging.MAX_WAITING, "8 models wait"),
        (messaging.MAX_TEXT, "1,000 characters"),
        (utils.PLOT_EVERY, "every 30 s"),
        (images.MIN_PARTITION, "at least 5 images"),
    ):
        assert words in text
        number = re.findall(r"\d[\d,]*(?:e\d+)?", words)[-1]
        assert float(number.replace(",", "")) == value
    assert f"{1 - images.VALIDATION_SHARE:.0%}".replace("%", " %") in REFERENCE
    assert all(f"`{name}`" in section(REFERENCE, "## Data") for name in ("train", "test", "validation", "valid"))


# ---------------------------------------------------------------------------------- Commands


def test_every_run_config_in_a_command_is_valid():
    from flwr.common.config import parse_config_args

    text = "\n".join(PAGES[page] for page in PAGES if not page.startswith("docs/recipes/"))  # they add settings
    commands = re.findall(r'--run-config (?:"([^"]*)"|([a-z-]+=\S+))', text)
    assert len(commands) >= 8
    for quoted, bare in commands:
        if "..." not in quoted:
            RunConfig.from_context(make_context(DEFAULTS | parse_config_args([quoted or bare])))


OURS = [f"python -m {name}" for name in set(re.findall(r"python -m ((?:benchmarks|deploy)\.\w+|recipes|sweep)", ALL))]
FLOWER = ["flower-superlink", "flower-supernode", "flwr run", "flwr supernode register", "flwr supernode ls"]
FLOWER += ["flwr ls", "flwr log", "flwr stop"]


@pytest.mark.parametrize("command", [*sorted(OURS), *FLOWER])
def test_the_commands_have_these_options(command, monkeypatch, capsys):
    if command in OURS:
        main, arguments = importlib.import_module(command.split()[-1]).main, command.split()[2:]
    else:
        arguments = command.split()
        (script,) = entry_points(group="console_scripts", name=arguments[0])
        main = script.load()
    monkeypatch.setenv("COLUMNS", "200")
    monkeypatch.setattr(sys, "argv", [*arguments, "--help"])
    with pytest.raises(SystemExit):
        main()
    known = set(re.findall(r"--[a-z-]+", capsys.readouterr().out))
    given = re.findall(rf"{command}\b([^`\n|]*)", ALL)
    assert given
    for options in given:
        assert set(re.findall(r"(?<= )--[a-z-]+", re.sub(r'"[^"]*"', "", options))) <= known, options


# -------------------------------------------------------------------------------- Deployment


def test_the_containers_have_the_options_of_the_steps(tmp_path):
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
        (command,) = re.findall(rf"`{program} (--[^`]+)`", DEPLOYMENT)
        options = dict(option.split("=", 1) for option in service["command"] if "=" in option)
        assert {option.split("=")[0] for option in service["command"]} == set(re.findall(r"--[a-z-]+", command))
        mounted = dict(reversed(volume.removesuffix(":ro").split(":")) for volume in service["volumes"])
        assert all((tmp_path / "deploy" / source).resolve().exists() for source in mounted.values())
        paths = re.findall(r"/app/[\w/.-]+", " ".join(options.values()))
        assert paths
        assert all(any(path.startswith(target) for target in mounted) for path in paths)


# --------------------------------------------------------------------------- Troubleshooting


def test_the_errors_that_are_quoted_are_those_of_the_code(tmp_path):
    with pytest.raises(UserError) as error:
        RunConfig.from_context(make_context(DEFAULTS | {"num-server-rounds": 3.0}))
    assert f"UserError: {error.value}".replace(f"{PROJECT}/", ".../") in TROUBLESHOOTING
    (tmp_path / "checkpoints").mkdir()
    utils.replace_json(tmp_path / "run_config.json", {"run-id": "11550502938398601821"})
    with utils.lock(tmp_path), pytest.raises(utils.UserError) as error, utils.lock(tmp_path):
        pass
    quoted = re.search(r"UserError: (resume-from: .*is in use.*)", TROUBLESHOOTING).group(1)
    assert re.sub(r"(?<=resume-from: )\S+", str(tmp_path), quoted) == str(error.value)
    with pytest.raises(UserError, match="Cannot use dataset '/nowhere': there is no folder /nowhere -- Allowed: "):
        images.load_test_split(typed_config(dataset="/nowhere"))


def test_the_wrong_settings_are_refused_by_flower():
    from flwr.common.config import parse_config_args

    rows = table(section(TROUBLESHOOTING, "## The run configuration is refused"))[2:]
    examples = [re.findall(r"`([^`]+)`", row[2]) for row in rows]
    assert len(examples) == 4
    for wrong, right in examples:
        RunConfig.from_context(make_context(DEFAULTS | parse_config_args([right])))
        if "num-server-round=" in wrong:
            assert not parse_config_args([wrong]).keys() <= DEFAULTS.keys()
        else:
            with pytest.raises(Exception, match="invalid format"):
                parse_config_args([wrong])


CI = re.search(r"<!-- example: ci -->\n```shell\n(.*?)```", TROUBLESHOOTING, re.DOTALL).group(1)


@pytest.mark.parametrize(("status", "code"), [("finished:completed", 0), ("finished:failed", 1)])
def test_the_commands_for_ci_fail_if_the_run_has_failed(status, code):
    """test_e2e.py runs them with the app."""
    flwr = f"""flwr() {{ echo '"run-id": "7", "status": "{status}"'; }}\n"""
    assert subprocess.run(["sh", "-c", flwr + CI], capture_output=True, check=False).returncode == code
