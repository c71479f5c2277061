"""Circuits on disk: numbers in `circuit.safetensors`, texts and settings in `circuit.json`."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pandas as pd
import torch
from torch import Tensor

from .._errors import FileFormatError
from .._files import read_directory, write_directory
from ._table import EDGE_COLUMNS, NODE_COLUMNS

if TYPE_CHECKING:
    from ._circuit import Circuit

SCHEMA = 1


def save(circuit: Circuit, path: str | Path) -> None:
    """Write the directory."""
    index = {node: place for place, node in enumerate(circuit.nodes["node"])}
    tensors = {f"nodes/{c}": _tensor(circuit.nodes[c]) for c, kind in NODE_COLUMNS.items() if kind != "str"}
    tensors |= {f"edges/{c}": _tensor(circuit.edges[c]) for c, kind in EDGE_COLUMNS.items() if kind != "str"}
    tensors |= {f"edges/{c}": _tensor(circuit.edges[c].map(index).astype("int64")) for c in ("source", "target")}
    texts = {c: circuit.nodes[c].tolist() for c, kind in NODE_COLUMNS.items() if kind == "str"}
    write_directory(path, "circuit", SCHEMA, tensors, {"settings": dict(circuit.settings), "texts": texts})


def load(path: str | Path) -> tuple[pd.DataFrame, pd.DataFrame, Mapping[str, Any]]:
    """Nodes, edges and settings.

    Raises:
        FileFormatError: missing, truncated, foreign, damaged, or of another schema.
    """
    tensors, notes = read_directory(path, "circuit", SCHEMA, required=("settings", "texts"))
    texts = notes["texts"]
    try:
        nodes = pd.DataFrame(
            {c: texts[c] if k == "str" else tensors[f"nodes/{c}"].numpy() for c, k in NODE_COLUMNS.items()}
        )
        names = nodes["node"].to_numpy(dtype=object)
        edges = pd.DataFrame({c: tensors[f"edges/{c}"].numpy() for c in EDGE_COLUMNS})
        edges = edges.assign(source=names[edges["source"]], target=names[edges["target"]])
    except (KeyError, ValueError, IndexError, TypeError) as error:
        raise FileFormatError(
            f"the tables in {path} do not fit together ({error!r}): it is damaged. Save it again."
        ) from error
    kinds = {c: object if k == "str" else k for c, k in NODE_COLUMNS.items()}
    return nodes.astype(kinds), edges.astype({"source": object, "target": object}), notes["settings"]


def _tensor(column: pd.Series) -> Tensor:
    return torch.from_numpy(np.array(column))
