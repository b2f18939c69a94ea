"""What publishing on Flower's hub takes of the app is a working app.

The rules are those of `flwr app publish`: some kinds of text files and the license, 1 MB a file.
"""

import os
import re
import shutil
import subprocess
import sys
import textwrap
import tomllib
import zipfile
from pathlib import Path

import pytest

from deploy.cli import BIN
from tests.grid import PROJECT

pytestmark = pytest.mark.e2e

SUFFIXES = {".py", ".toml", ".md", ".yaml", ".yml", ".json", ".jsonl"}
MEGABYTE = 1024 * 1024


def published() -> list[Path]:
    """The files of the project that publishing takes, relative to it."""
    listed = ["git", "ls-files", "--cached", "--others", "--exclude-standard", "-z"]
    names = subprocess.run(listed, cwd=PROJECT, capture_output=True, text=True, check=True).stdout.split("\0")
    files = [Path(name) for name in names if name and (PROJECT / name).is_file()]
    return [file for file in files if file.suffix in SUFFIXES or str(file) in ("LICENSE", ".gitignore")]


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    """A fresh folder with what publishing takes, and nothing else."""
    folder = tmp_path_factory.mktemp("hub") / "pytorch-example-low-level"
    for file in published():
        (folder / file).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(PROJECT / file, folder / file)
    return folder


def test_every_file_may_be_published():
    files = published()
    assert {Path("LICENSE"), Path("README.md"), Path("pyproject.toml")} <= set(files)
    assert len(files) <= 1000
    sizes = [(PROJECT / file).stat().st_size for file in files]
    assert max(sizes) <= MEGABYTE
    assert sum(sizes) <= 10 * MEGABYTE
    for file in files:
        assert len(file.parts) <= 10
        (PROJECT / file).read_text(encoding="utf-8")


def test_the_names_are_such_as_the_hub_takes():
    project = tomllib.loads((PROJECT / "pyproject.toml").read_text())
    assert re.fullmatch(r"[A-Za-z][A-Za-z0-9-]{0,30}[A-Za-z0-9]", project["project"]["name"])
    assert project["project"]["license"] == {"file": "LICENSE"}
    assert 0 < len(project["project"]["description"]) <= 200
    assert project["tool"]["flwr"]["app"]["fab-format-version"] == 1
    assert "federations" not in project["tool"]["flwr"]


def test_flower_packs_the_app_readme_and_licence_and_nothing_else(folder, tmp_path):
    env = os.environ | {"FLWR_HOME": str(tmp_path / ".flwr")}
    subprocess.run([BIN / "flwr", "build", "--app", folder], cwd=tmp_path, env=env, check=True, capture_output=True)
    (fab,) = tmp_path.glob("*.fab")
    names = {name for name in zipfile.ZipFile(fab).namelist() if not name.startswith(".info/")}
    app = {str(file) for file in published() if file.parts[0] == "pytorch_example_low_level"}
    assert "pytorch_example_low_level/server_app.py" in app
    assert names == app | {"pyproject.toml", "README.md", "LICENSE"}


def test_the_published_app_loads_up_to_its_images_which_it_takes_from_the_hub(folder):
    code = textwrap.dedent("""
        import logging, sys, tomllib
        from pytorch_example_low_level import client_app, config, images, server_app
        print(server_app.__file__, type(server_app.app).__name__, type(client_app.app).__name__)
        logging.basicConfig(stream=sys.stdout, format="%(message)s")
        logging.getLogger("flwr").setLevel("INFO")
        defaults = tomllib.load(open("pyproject.toml", "rb"))["tool"]["flwr"]["app"]["config"]
        try:
            images.load_test_split(config.RunConfig.model_validate(defaults))
        except ValueError as error:
            print("error:", error)
    """)
    env = os.environ | {"HF_HUB_OFFLINE": "1", "HF_HOME": str(folder.parent / "hf"), "PYTHONPATH": str(folder)}
    command = [sys.executable, "-c", code]
    done = subprocess.run(command, cwd=folder, env=env, capture_output=True, text=True, check=False)
    said, error = done.stdout.split("error: ")
    loaded, text = said.splitlines()[:2]
    assert loaded == f"{folder / 'pytorch_example_low_level' / 'server_app.py'} ServerApp ClientApp", done.stderr
    dataset = "zalando-datasets/fashion_mnist"
    assert text == f"The bundled images are not installed; taking {dataset} from the Hugging Face Hub"
    for words in (dataset, "`pip install .` in a clone of the app", "needs network"):
        assert words in error
