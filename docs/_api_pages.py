"""How API pages are made: a hook of mkdocs and an extension of griffe, which reads the docstrings.

An API page names its room and gets every name that the room re-exports: mkdocstrings leaves out what a module imports,
and every public name here is imported from a private module.
"""

import ast
import re
from pathlib import Path
from typing import Any

import griffe

ROOT = Path(__file__).parents[1]
ENTRY = """    options:
      show_root_heading: true
      show_root_full_path: false
      heading_level: 2
"""


def re_exports(room: str) -> list[str]:
    """Names in `from ._x import y as y` statements of an `__init__.py` or its stub, in their order.

    In a room these are all public names; in the package itself those that belong to no room.
    """
    file = ROOT.joinpath(*room.split("."), "__init__.pyi")  # the package's; rooms have none
    source = (file if file.exists() else file.with_suffix(".py")).read_text(encoding="utf-8")
    imports = [node for node in ast.parse(source).body if isinstance(node, ast.ImportFrom)]
    own = [node for node in imports if node.level == 1 and node.module]
    if file.exists():
        own = [node for node in own if (node.module or "").startswith("_")]
    return [alias.name for node in own for alias in node.names if alias.name == alias.asname]


def results(room: str, names: list[str]) -> list[tuple[str, str]]:
    """(module, class) of what these functions return and the room does not export: users get it, and never make it."""
    found: dict[str, str] = {}
    for name in names:
        file, definition = definition_of(room, name)
        returns = definition.returns if isinstance(definition, ast.FunctionDef) else None
        wanted = {node.id for node in ast.walk(returns) if isinstance(node, ast.Name)} if returns else set()
        for node in ast.parse(file.read_text(encoding="utf-8")).body:
            if isinstance(node, ast.ClassDef) and node.name in wanted - set(names) and not node.name.startswith("_"):
                found[node.name] = ".".join(file.relative_to(ROOT).with_suffix("").parts)
            elif isinstance(node, ast.ImportFrom) and node.level == 1:
                wanted_here = {alias.name for alias in node.names} & (wanted - set(names))
                module = ".".join([*file.relative_to(ROOT).parent.parts, node.module or ""])
                source = ROOT.joinpath(*module.split(".")).with_suffix(".py")
                if wanted_here and source.exists():
                    body = ast.parse(source.read_text(encoding="utf-8")).body
                    classes = {inner.name for inner in body if isinstance(inner, ast.ClassDef)}
                    found |= {kind: module for kind in sorted(wanted_here & classes)}
    return [(module, kind) for kind, module in found.items()]


def definition_of(room: str, name: str) -> tuple[Path, ast.stmt | None]:
    """The file that a re-exported name comes from, and its definition there."""
    file = ROOT.joinpath(*room.split("."), "__init__.pyi")
    file = file if file.exists() else file.with_suffix(".py")
    for node in ast.parse(file.read_text(encoding="utf-8")).body:
        if isinstance(node, ast.ImportFrom) and node.level and any(alias.asname == name for alias in node.names):
            module = file.parents[node.level - 1].joinpath(*(node.module or "").split(".")).with_suffix(".py")
            body = ast.parse(module.read_text(encoding="utf-8")).body if module.exists() else []
            defined = [d for d in body if isinstance(d, ast.FunctionDef | ast.ClassDef) and d.name == name]
            return module, defined[0] if defined else None
    return file, None


def summary(room: str, name: str) -> str:
    """The first line of a re-exported name's docstring."""
    _, definition = definition_of(room, name)
    if not isinstance(definition, ast.FunctionDef | ast.ClassDef):
        return ""
    return (ast.get_docstring(definition) or "").split("\n\n")[0].replace("\n", " ")


def on_page_markdown(markdown: str, page: Any, **_: Any) -> str:
    """Follow each `::: package.room` of an API page by a list of its names and one entry for each.

    `::: package.room: main, Result` puts these first; the others keep the order of the room. Other entries stay.
    """
    if not page.file.src_uri.startswith("api/"):
        return markdown
    lines = []
    for line in markdown.splitlines():
        room, _, wanted = line.removeprefix("::: ").partition(": ")
        if not line.startswith("::: ") or not ROOT.joinpath(*room.split(".")).is_dir():
            lines.append(line)
            continue
        first = [name.strip() for name in wanted.split(",") if name.strip()]
        names = re_exports(room)
        if unknown := set(first) - set(names):
            raise ValueError(f"{page.file.src_uri}: {room} does not export {sorted(unknown)}.")
        names = [*first, *(name for name in names if name not in first)]
        lines += [f"::: {room}", "    options:\n      members: false\n      show_root_toc_entry: false\n"]
        lines += ["| | |", "|---|---|"]
        lines += [f"| [`{name}`][{room}.{name}] | {summary(room, name).replace('|', '/')} |" for name in names]
        lines += ["", *(f"::: {room}.{name}\n{ENTRY}" for name in names)]
        returned = results(room, names)
        lines += ["## What these return", "", "No one makes these by hand, so they are not exported.", ""] * bool(
            returned
        )
        lines += [f"::: {module}.{kind}\n{ENTRY.replace('level: 2', 'level: 3')}" for module, kind in returned]
    return "\n".join(lines)


class ExampleSections(griffe.Extension):
    """Read `Example:` as `Examples:`: the one is a note to griffe, the other a console session."""

    def on_object(self, *, obj: griffe.Object, **_: Any) -> None:
        """Rename the section in the docstring of each object."""
        if obj.docstring:
            obj.docstring.value = re.sub(r"^Example:$", "Examples:", obj.docstring.value, flags=re.MULTILINE)
