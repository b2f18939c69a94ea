"""What publishing on Flower's hub takes of the app is a working app.

The rules are those of `flwr app publish`: some kinds of text files and the license, 1 MB a file.
"""

import os
import re
import shutil
import subprocess
import sys
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


def python(folder: Path, code: str, **env: str) -> subprocess.CompletedProcess:
    """Run Python in a folder, with the app that is there and no network."""
    apart = {"HF_HUB_OFFLINE": "1", "HF_HOME": str(folder.parent / "hf"), "PYTHONPATH": str(folder)}
    env = os.environ | apart | env
    return subprocess.run(
        [sys.executable, "-c", code], cwd=folder, env=env, capture_output=True, text=True, check=False
    )


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


def test_flower_builds_the_published_folder(folder, tmp_path):
    env = os.environ | {"FLWR_HOME": str(tmp_path / ".flwr")}
    done = subprocess.run(
        [BIN / "flwr", "build", "--app", str(folder)],
        cwd=tmp_path,
        env=env,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    (fab,) = tmp_path.glob("*.fab")
    names = set(zipfile.ZipFile(fab).namelist())
    app = {str(file) for file in published() if file.parts[0] == "pytorch_example_low_level"}
    assert app | {"pyproject.toml", "README.md", "LICENSE"} <= names
    assert not any(name.startswith(("tests/", "fashion_mnist_sample/")) for name in names)


def test_the_published_app_loads_up_to_its_images_which_it_takes_from_the_hub(folder):
    code = (
        "import logging, sys\n"
        "from pytorch_example_low_level import client_app, server_app\n"
        "print(server_app.__file__, type(server_app.app).__name__, type(client_app.app).__name__)\n"
        "logging.basicConfig(stream=sys.stdout, format='%(message)s')\n"
        "logging.getLogger('flwr').setLevel('INFO')\n"
        "from pytorch_example_low_level import images\n"
        "try:\n"
        "    import tomllib\n"
        "    from pytorch_example_low_level.config import RunConfig\n"
        "    defaults = tomllib.load(open('pyproject.toml', 'rb'))['tool']['flwr']['app']['config']\n"
        "    images.load_test_split(RunConfig.model_validate(defaults))\n"
        "except ValueError as error:\n"
        "    print('error:', error)\n"
    )
    done = python(folder, code)
    said, error = done.stdout.split("error: ")
    loaded, text = said.splitlines()[:2]
    assert loaded == f"{folder / 'pytorch_example_low_level' / 'server_app.py'} ServerApp ClientApp", done.stderr
    assert text == (
        "The bundled images are not installed; taking zalando-datasets/fashion_mnist from the Hugging Face Hub"
    )
    assert "zalando-datasets/fashion_mnist" in error
    assert "`pip install .` in a clone of the app" in error
    assert "needs network" in error
