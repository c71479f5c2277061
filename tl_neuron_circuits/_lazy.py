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

from ._renamed import renamed


def lazy_names(package: str, file: str) -> tuple[Callable[[str], Any], Callable[[], list[str]]]:
    """`__getattr__` and `__dir__` of a package whose names are the imports in the stub beside its `__init__.py`.

    Args:
        package: its `__name__`.
        file: its `__file__`.
    """
    stub = ast.parse(Path(file).with_suffix(".pyi").read_text(encoding="utf-8"))
    imports = [node for node in stub.body if isinstance(node, ast.ImportFrom)]
    sources = {alias.asname or alias.name: (node.module, alias.name) for node in imports for alias in node.names}

    def __getattr__(name: str) -> Any:
        if name not in sources:
            raise unknown_name(package, name)
        module, original = sources[name]
        if module is None:  # `from . import room as room`
            return importlib.import_module(f"{package}.{original}")
        value = getattr(importlib.import_module(f"{package}.{module}"), original)
        setattr(sys.modules[package], name, value)  # the next access does not come here
        return value

    def __dir__() -> list[str]:
        return sorted({*vars(sys.modules[package]), *sources} - {"lazy_names"})  # what tab completion shows

    return __getattr__, __dir__


def explain_old_names(room: str) -> None:
    """Let `tnc.room.old_name` raise an error that says the new name.

    The room does not define `__getattr__` itself: type checkers would then believe that it has every name.
    """

    def __getattr__(name: str) -> Any:
        raise unknown_name(room, name)

    def __dir__() -> list[str]:
        return sorted(vars(sys.modules[room]).keys() - {"explain_old_names"})

    sys.modules[room].__dict__.update(__getattr__=__getattr__, __dir__=__dir__)


def unknown_name(package: str, name: str) -> AttributeError | ImportError:
    """The error for a name that a package does not have, or does not have any longer."""
    now = renamed(package, name)
    # `from package import name` first asks for the attribute in this function of importlib, and drops what an
    # AttributeError says; an ImportError passes.
    if now and sys._getframe(2).f_code.co_name == "_handle_fromlist":
        return ImportError(now, name=package)
    return AttributeError(now or f"module {package!r} has no attribute {name!r}")
