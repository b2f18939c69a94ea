"""Applies a recipe of docs/recipes/ to the app in a folder.

    python -m recipes --list
    python -m recipes fedprox          # changes the app in this folder; `git diff` shows what
    python -m recipes fedprox ../copy

A `python` block of a recipe holds whole definitions: each replaces the one of its name, or goes to the end of
the file; imports go to the top. A definition that another recipe changed is not replaced, unless the comment above
the block names that recipe: `<!-- bfloat16 after quantise: messaging.py -->`. In a `diff` block, the lines with `-` or
without a sign must occur once in the file, one after the other; the lines with `+` or without a sign replace them. `@@`
begins another place.
"""

# This command is for users, so it is not among the tests, which use it too. It is not part of the app, which is packed
# without the documentation.

from __future__ import annotations

import argparse
import ast
import os
import re
import sys
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

PACKAGE = "pytorch_example_low_level"
PAGES = {path.name: path.read_text(encoding="utf-8") for path in Path(__file__).parent.glob("docs/recipes/*.md")}
BLOCK = re.compile(r"<!-- ([\w-]+)(?: after ([\w-]+))?: ([\w./]+) -->\n+```(\w+)\n(.*?)```", re.DOTALL)


class Block(NamedTuple):
    """A change to one file."""

    page: str
    recipe: str
    after: str  # the recipe that it changes, or ""
    file: str
    language: str
    text: str


class RecipeError(Exception):
    """A recipe that does not exist, or does not fit the app in the folder."""


def all_blocks() -> dict[str, list[Block]]:
    """Return the blocks of each recipe, in the order of the pages."""
    found: dict[str, list[Block]] = {}
    for page, text in sorted(PAGES.items()):
        for match in BLOCK.findall(text):
            found.setdefault(match[0], []).append(Block(page, *match))
    return found


def apply(recipe: str, folder: Path) -> list[Path]:
    """Change the app in a folder; return the changed files. Raises RecipeError, and then changes nothing."""
    everything = [block for blocks in all_blocks().values() for block in blocks]
    blocks = [block for block in everything if block.recipe == recipe]
    if not blocks:
        raise RecipeError(f"there is no recipe {recipe!r}; `python -m recipes --list` shows the names")
    changed: dict[Path, str] = {}
    for block in blocks:
        path = folder / block.file if block.file == "pyproject.toml" else folder / PACKAGE / block.file
        try:
            source = changed.get(path) or path.read_text(encoding="utf-8")
            if block.language == "diff":
                changed[path] = with_lines(source, block.text)
            else:
                own = (recipe, block.after)
                others = [b for b in everything if b.file == block.file and b.recipe not in own]
                changed[path] = with_definitions(source, block.text, others)
        except FileNotFoundError:
            raise RecipeError(f"{folder} is not a folder of the app: there is no {path}") from None
        except (RecipeError, SyntaxError) as error:
            raise RecipeError(f"{recipe} does not fit {path}, so nothing was changed: {error}") from None
    if unused := definitions(blocks) - used_names(folder, changed):
        raise RecipeError(f"{recipe} changes nothing here, because nothing uses {', '.join(sorted(unused))}")
    if locked := [path for path in changed if not os.access(path, os.W_OK)]:
        raise RecipeError(f"nothing was changed, because these files cannot be written: {', '.join(map(str, locked))}")
    for path, source in changed.items():
        path.write_text(source, encoding="utf-8")
    return list(changed)


def changed_by(others: Iterable[Block], source: str) -> list[str]:
    """Return the recipes of which a definition, or changed lines, are in the source."""
    found = set()
    for block in others:
        if block.language == "python":
            nodes = [node for node in ast.parse(block.text).body if not isinstance(node, ast.Import | ast.ImportFrom)]
            parts = [segment(block.text, node) for node in nodes]
        else:
            parts = [new for old, new in places(block.text) if old in new or old not in source]
        if any(part in source for part in parts):
            found.add(block.recipe)
    return sorted(found)


def definitions(blocks: Iterable[Block]) -> set[str]:
    """Return the functions and classes that blocks define. Handlers are left out: their decorator uses them."""
    nodes = [node for block in blocks if block.language == "python" for node in ast.parse(block.text).body]
    kinds = ast.FunctionDef | ast.ClassDef
    return {node.name for node in nodes if isinstance(node, kinds) and not node.decorator_list}


def used_names(folder: Path, changed: Mapping[Path, str]) -> set[str]:
    """Return all names that the app in a folder uses, with these changes."""
    unchanged = {path: path.read_text(encoding="utf-8") for path in (folder / PACKAGE).glob("*.py")}
    names = set()
    for path, text in {**unchanged, **changed}.items():
        try:
            nodes = list(ast.walk(ast.parse(text))) if path.suffix == ".py" else []
        except SyntaxError as error:
            raise RecipeError(f"{path} is not Python: {error}") from None
        names |= {str(getattr(node, "attr", None) or getattr(node, "id", None)) for node in nodes}
    return names


def with_lines(source: str, diff: str) -> str:
    """Return the source with the places of a diff block changed."""
    for old, new in places(diff):
        if source.count(old) != 1:
            raise RecipeError(f"these lines must occur exactly once, but occur {source.count(old)} times:\n{old}")
        if old in new and new in source:  # lines that are only added
            raise RecipeError(f"these lines are already in it:\n{new}")
        source = source.replace(old, new)
    return source


def places(diff: str) -> Iterator[tuple[str, str]]:
    """Yield the old and the new lines of each place of a diff block."""
    for place in re.split(r"^@@.*\n", diff, flags=re.MULTILINE):
        lines = [(line[:1], line[1:]) for line in place.splitlines(keepends=True)]
        old = "".join(line or "\n" for sign, line in lines if sign != "+")
        yield old, "".join(line or "\n" for sign, line in lines if sign != "-")


def with_definitions(source: str, code: str, others: Sequence[Block]) -> str:
    """Return the source with the definitions of a python block in it. Raises RecipeError if one of `others` is lost."""
    imports, added = [], []
    for node in ast.parse(code).body:
        text = segment(code, node)
        if isinstance(node, ast.Import | ast.ImportFrom):
            imports.append(text)
        elif old := next((n for n in ast.parse(source).body if name_of(n) == name_of(node)), None):
            replaced = segment(source, old)
            if replaced != text and (lost := changed_by(others, replaced)):
                raise RecipeError(f"it would replace {name_of(node)!r}, which {' and '.join(lost)} changed")
            source = source.replace(replaced, text)
        else:
            added.append(text)
    if imports:
        lines = source.splitlines()
        last = max(n.end_lineno or 0 for n in ast.parse(source).body if isinstance(n, ast.Import | ast.ImportFrom))
        source = "\n".join([*lines[:last], *imports, *lines[last:]])
    return "\n\n\n".join([source.rstrip("\n"), *added]) + "\n"


def name_of(node: ast.stmt) -> str | None:
    """Return the name that a statement defines."""
    target = node.targets[0] if isinstance(node, ast.Assign) else node
    return getattr(target, "name", None) or getattr(target, "id", None)


def segment(source: str, node: ast.stmt) -> str:
    """Return the lines of a statement, with its decorators."""
    first = min([node.lineno, *(d.lineno for d in getattr(node, "decorator_list", []))])
    return "\n".join(source.splitlines()[first - 1 : node.end_lineno])


def main() -> None:
    """Parse the command line; list the recipes, or apply one."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("name", nargs="?", help="the recipe to apply")
    parser.add_argument("folder", nargs="?", type=Path, default=Path(), help="of the app (default: this folder)")
    parser.add_argument("--list", action="store_true", help="show names, pages and files, and change nothing")
    args = parser.parse_args()
    if args.list:
        for recipe, blocks in all_blocks().items():
            files = dict.fromkeys(block.file for block in blocks)
            print(f"{recipe:16} docs/recipes/{blocks[0].page:24} {', '.join(files)}")
    elif not args.name:
        parser.error("give the name of a recipe, or --list")
    else:
        try:
            print("changed:", *apply(args.name, args.folder))
        except RecipeError as error:
            sys.exit(f"python -m recipes: {error}")


if __name__ == "__main__":
    main()
