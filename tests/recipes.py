"""Applies the blocks of docs/recipes.md to a copy of the app, and runs the copy in this process.

    python -m tests.recipes fedprox .      # changes the app in this folder; `git diff` shows what

A `python` block holds whole definitions: each replaces the one of its name, or goes to the end of
the file; imports go to the top. A `diff` block holds lines: those with `-` and without a sign are
in the file once, in a row, and become those with `+` and without. `@@` begins another place.
"""

import ast
import functools
import importlib
import itertools
import re
import shutil
import sys
import tempfile
import time
import tomllib
from pathlib import Path
from types import SimpleNamespace

from tests.grid import PROJECT, InProcessGrid, make_context

PACKAGE = "pytorch_example_low_level"
TEXT = (PROJECT / "docs" / "recipes.md").read_text()
BLOCK = re.compile(r"<!-- ([\w-]+): ([\w./]+) -->\n+```(\w+)\n(.*?)```", re.DOTALL)
numbers = itertools.count()
copies = tempfile.TemporaryDirectory(prefix="recipes-")  # goes when this process ends


def blocks(recipe: str) -> list[tuple[str, str, str]]:
    """File, language and text of the blocks of a recipe."""
    found = [match[1:] for match in BLOCK.findall(TEXT) if match[0] == recipe]
    assert found, f"docs/recipes.md has no recipe {recipe!r}"
    return found


def apply(recipe: str, app: Path) -> None:
    """Change the app in a folder as a reader of the recipe would."""
    for file, language, text in blocks(recipe):
        path = app / file if file == "pyproject.toml" else app / PACKAGE / file
        edit = {"python": with_definitions, "diff": with_lines}[language]
        path.write_text(edit(path.read_text(), text))


def with_lines(source: str, diff: str) -> str:
    for place in re.split(r"^@@.*\n", diff, flags=re.MULTILINE):
        lines = [(line[:1], line[1:]) for line in place.splitlines(keepends=True)]
        old = "".join(line or "\n" for sign, line in lines if sign != "+")
        new = "".join(line or "\n" for sign, line in lines if sign != "-")
        assert source.count(old) == 1, f"not there once:\n{old}"
        source = source.replace(old, new)
    return source


def with_definitions(source: str, code: str) -> str:
    imports, added = [], []
    for node in ast.parse(code).body:
        text = segment(code, node)
        if isinstance(node, ast.Import | ast.ImportFrom):
            imports.append(text)
        elif old := next((n for n in ast.parse(source).body if name_of(n) == name_of(node)), None):
            source = source.replace(segment(source, old), text)
        else:
            added.append(text)
    if imports:
        lines = source.splitlines()
        last = max(n.end_lineno for n in ast.parse(source).body if isinstance(n, ast.Import | ast.ImportFrom))
        source = "\n".join([*lines[:last], *imports, *lines[last:]])
    return "\n\n\n".join([source.rstrip("\n"), *added]) + "\n"


def name_of(node: ast.stmt) -> str | None:
    target = node.targets[0] if isinstance(node, ast.Assign) else node
    return getattr(target, "name", None) or getattr(target, "id", None)


def segment(source: str, node: ast.stmt) -> str:
    """The lines of a statement, with its decorators."""
    first = min([node.lineno, *(d.lineno for d in getattr(node, "decorator_list", []))])
    return "\n".join(source.splitlines()[first - 1 : node.end_lineno])


def changed_app(*recipes: str) -> SimpleNamespace:
    """The modules of a copy of the app with these recipes, and its default configuration."""
    return _load(_copy(recipes))


@functools.cache
def _copy(recipes: tuple[str, ...]) -> Path:
    folder = Path(copies.name, f"copy-{next(numbers)}")
    shutil.copytree(PROJECT / PACKAGE, folder / PACKAGE, ignore=shutil.ignore_patterns("__pycache__"))
    shutil.copy(PROJECT / "pyproject.toml", folder)
    for recipe in recipes:
        apply(recipe, folder)
    return folder


def _load(folder: Path) -> SimpleNamespace:
    """Import the app in a folder under a name of its own, beside the app that is installed."""
    name = f"changed_app_{next(numbers)}"
    shutil.copytree(folder / PACKAGE, folder / name)
    for path in (folder / name).glob("*.py"):
        path.write_text(path.read_text().replace(PACKAGE, name))
    sys.path.insert(0, str(folder))
    try:
        modules = ("server_app", "client_app", "messaging", "task", "utils", "config")
        loaded = {module: importlib.import_module(f"{name}.{module}") for module in modules}
    finally:
        sys.path.remove(str(folder))
    defaults = tomllib.loads((folder / "pyproject.toml").read_text())["tool"]["flwr"]["app"]["config"]
    return SimpleNamespace(**loaded, defaults=defaults)


class PacedGrid(InProcessGrid):
    """Partition p takes `paces[p]` seconds for a TRAIN message, one message at a time.

    The seconds are those of a clock that only sleeping moves, so a run takes no longer than its
    computing, and gives the same result on every machine.
    """

    def __init__(self, app: SimpleNamespace, config: dict, paces: list[float]) -> None:
        super().__init__(app.client_app.app, config, len(paces))
        self.paces = paces
        self.now = time.time()
        self.free_at: dict[int, float] = {}
        self.clock = SimpleNamespace(time=lambda: self.now, monotonic=lambda: self.now, sleep=self.sleep)
        for module in (app.server_app, app.client_app, app.messaging, app.task, app.utils):
            if hasattr(module, "time"):
                module.time = self.clock

    def sleep(self, seconds: float) -> None:
        self.now += seconds

    def push_messages(self, messages):
        messages = list(messages)
        ids = super().push_messages(messages)
        for message in messages:
            partition = self.partition(message.metadata.dst_node_id)
            pace = self.paces[partition] if message.metadata.message_type == "train" else 0.0
            done_at = max(self.now, self.free_at.get(partition, 0.0)) + pace
            self.free_at[partition] = done_at
            for reply in self.replies.get(message.metadata.message_id, []):
                reply.metadata.created_at = done_at
        return ids

    def pull_messages(self, message_ids):
        there = [i for i in message_ids if any(r.metadata.created_at <= self.now for r in self.replies.get(i, []))]
        return super().pull_messages(there)


def run(app: SimpleNamespace, config: dict, grid: InProcessGrid | None = None, num_nodes: int = 5) -> InProcessGrid:
    """Run a changed app to its end. `config` overrides the defaults of its pyproject.toml."""
    config = app.defaults | config
    grid = grid or InProcessGrid(app.client_app.app, config, num_nodes)
    for context in grid.contexts.values():
        context.run_config = config
    app.server_app.main(grid, make_context(config))
    return grid


if __name__ == "__main__":
    apply(sys.argv[1], Path(sys.argv[2]))
