"""Attribution graphs in Neuronpedia's JSON, as circuit-tracer writes them.

What that format has no place for (scores, settings, attributions) stands in `metadata.info`, so that our own files come
back whole.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pandas as pd

if TYPE_CHECKING:
    from ._circuit import Circuit


def write(circuit: Circuit, path: Path, slug: str | None, scan: str | None) -> None:
    raise NotImplementedError


def read(path: Path) -> tuple[pd.DataFrame, pd.DataFrame, Mapping[str, Any]]:
    raise NotImplementedError
