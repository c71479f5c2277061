"""Names that are imported on first access, so that importing the package costs nothing; and names that moved.

A package lists its names in `__init__.pyi`, which type checkers read as usual. `lazy_names` reads the same stub, so
the list exists once. (Scientific Python's `lazy_loader` does the first half, but would be a dependency that users do
not have yet, and knows nothing of old names.)
"""

import ast
import importlib
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

from ._renamed import old_name

Lookup = Callable[[str], Any]


def lazy_names(package: str, file: str) -> tuple[Lookup, Callable[[], list[str]]]:
    """`__getattr__` and `__dir__` of a package whose names are the imports in the stub beside its `__init__.py`.

    Args:
        package: its `__name__`.
        file: its `__file__`.
    """
    stub = ast.parse(Path(file).with_suffix(".pyi").read_text(encoding="utf-8"))
    imports = [node for node in stub.body if isinstance(node, ast.ImportFrom)]
    sources = {alias.asname or alias.name: (node.module, alias.name) for node in imports for alias in node.names}
    unknown = old_names(package)

    def __getattr__(name: str) -> Any:
        if name not in sources:
            return unknown(name)
        module, original = sources[name]
        if module is None:  # `from . import room as room`
            return importlib.import_module(f"{package}.{original}")
        value = getattr(importlib.import_module(f"{package}.{module}"), original)
        setattr(sys.modules[package], name, value)  # the next access does not come here
        return value

    def __dir__() -> list[str]:
        return sorted({*vars(sys.modules[package]), *sources})

    return __getattr__, __dir__


def old_names(package: str) -> Lookup:
    """`__getattr__` of a package some of whose names moved: the error says where to."""

    def __getattr__(name: str) -> Any:
        raise AttributeError(old_name(package, name) or f"module {package!r} has no attribute {name!r}")

    return __getattr__
