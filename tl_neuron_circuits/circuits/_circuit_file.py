"""A circuit's tables as tensors and notes of a file, and back: numbers as tensors, texts in the header."""

from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any

import msgspec
import numpy as np
import pandas as pd
import torch
from torch import Tensor

from .._errors import FileFormatError
from .._files import formed, require_shapes
from ._by_prompt import PROMPT_COLUMNS, fits_nodes, from_columns, to_columns
from ._flow import rows_of
from ._table import EDGE_COLUMNS, HEAD_COLUMNS, HEAD_KINDS, NODE_COLUMNS

Count = Annotated[int, msgspec.Meta(ge=0, lt=2**31)]


class CircuitNotes(msgspec.Struct, forbid_unknown_fields=True):
    """What a file says of a circuit beside its tensors."""

    settings: dict[str, Any]
    texts: dict[str, list[str]]
    details: dict[str, dict[str, Any]] = {}
    """What `Circuit.describe` found; older files have none."""


class _Example(msgspec.Struct):
    tokens: list[str]
    values: list[float]
    note: str = ""


class _Details(msgspec.Struct):
    """Of one node; any other key is a heading with its text."""

    direct_logit_effects: list[tuple[str, float]] = []
    examples: list[str | _Example] = []


class _SiteSettings(msgspec.Struct):
    layer: Count
    letter: str
    hook: str
    width: Count
    errors: bool


class _PromptSettings(msgspec.Struct):
    """What the model says on one of several prompts."""

    prompt: str
    predicted: str
    target: str | None
    rank: Count | None


class CircuitSettings(msgspec.Struct):
    """What a circuit needs of its settings; there may be more."""

    model: str
    target: list[str]
    target_value: float
    n_prompts: int
    sites: list[_SiteSettings] | None = None
    tokens: list[str] | None = None
    positions: str | None = None
    prompt: str = ""
    n_layers: Count = 0
    n_grouped: Count = 0
    groups: dict[str, list[str]] | None = None
    token_ids: list[int] | None = None
    spans: dict[str, tuple[Count, Count]] | None = None
    places: list[list[int]] | None = None
    prompts: list[_PromptSettings] | None = None
    predicted: list[tuple[str, float]] = []
    predicted_at: dict[str, list[tuple[str, float]]] | None = None
    target_ranks: dict[str, Count] | None = None
    twins: dict[str, tuple[str, float]] | None = None
    layer_scores: list[tuple[Count, float, float]] | None = None


def to_file(
    nodes: pd.DataFrame,
    edges: pd.DataFrame,
    settings: Mapping[str, Any],
    head_parts: pd.DataFrame | None = None,
    by_prompt: pd.DataFrame | None = None,
    details: Mapping[str, Mapping[str, Any]] | None = None,
) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Columns of numbers as tensors, sources and targets as rows of the nodes; columns of texts as notes."""
    numbers = {
        f"{table}/{name}": torch.from_numpy(np.array(frame[name]))
        for table, frame, columns in (("nodes", nodes, NODE_COLUMNS), ("edges", edges, EDGE_COLUMNS))
        for name, kind in columns.items()
        if kind != "str"
    }
    index = {node: place for place, node in enumerate(nodes["node"])}
    for end in ("source", "target"):
        numbers[f"edges/{end}"] = torch.from_numpy(np.array(edges[end].map(index).astype("int64")))
    if head_parts is not None:
        columns = {name: head_parts[name] for name, kind in HEAD_COLUMNS.items() if kind != "str"}
        columns |= {end: rows_of(nodes, head_parts[end]) for end in ("source", "target")}
        columns["kind"] = head_parts["kind"].map(HEAD_KINDS.index).astype("int64")
        numbers |= {f"heads/{name}": torch.from_numpy(np.array(values)) for name, values in columns.items()}
    if by_prompt is not None:
        numbers |= {f"prompts/{name}": torch.from_numpy(values) for name, values in to_columns(by_prompt, index)}
    texts = {name: nodes[name].tolist() for name, kind in NODE_COLUMNS.items() if kind == "str"}
    return numbers, {"settings": dict(settings), "texts": texts} | ({"details": dict(details)} if details else {})


def from_file(
    tensors: Mapping[str, Tensor], notes: CircuitNotes, path: str | Path
) -> tuple[pd.DataFrame, pd.DataFrame, pd.DataFrame | None, pd.DataFrame | None]:
    """The tables of nodes and edges, of the edges' parts by head where there are any, and of single prompts.

    Raises:
        FileFormatError: columns are missing or of different lengths, or an edge leads to no node.
    """
    formed(notes.settings, CircuitSettings, path)
    for told in notes.details.values():
        formed(told, _Details, path)
    named = {*(notes.settings.get("target_ranks") or {}), *(notes.settings.get("twins") or {})}
    if not named <= set(notes.texts.get("node", ())):
        raise FileFormatError(f"{path} has ranks of targets that are not there. It is damaged: save it again.")
    texts = [name for name, kind in NODE_COLUMNS.items() if kind == "str"]
    n, m = len(notes.texts.get("node", ())), tensors["edges/weight"].numel() if "edges/weight" in tensors else 0
    if set(notes.texts) != set(texts) or {len(column) for column in notes.texts.values()} != {n}:
        raise FileFormatError(f"expected {texts} of every node in {path}, {n} each. It is damaged: save it again.")
    shapes = {f"nodes/{name}": (n,) for name, kind in NODE_COLUMNS.items() if kind != "str"}
    shapes |= {f"edges/{name}": (m,) for name in EDGE_COLUMNS}
    tables = ["edges"]
    if "heads/part" in tensors:
        shapes |= {f"heads/{name}": (tensors["heads/part"].numel(),) for name in HEAD_COLUMNS}
        tables.append("heads")
    if "prompts/prompt" in tensors:
        shapes |= {f"prompts/{name}": (tensors["prompts/prompt"].numel(),) for name in PROMPT_COLUMNS}
    require_shapes(path, tensors, shapes)
    rows = {f"{table}/{end}": n for table in tables for end in ("source", "target")}
    rows |= {"heads/kind": len(HEAD_KINDS)} if "heads" in tables else {}
    by_prompt = {name: tensors[f"prompts/{name}"] for name in PROMPT_COLUMNS} if "prompts/prompt" in tensors else None
    if by_prompt is not None and not fits_nodes(by_prompt, n, notes.settings["n_prompts"]):
        raise FileFormatError(f"the table of prompts in {path} names nodes that are not there. Save it again.")
    if any(tensors[name].dtype != torch.int64 or not _within(tensors[name], most) for name, most in rows.items()):
        raise FileFormatError(f"edges in {path} lead to nodes that are not there. It is damaged: save it again.")
    nodes = pd.DataFrame(
        {  # pandas' own type of texts has no half surrogates
            c: pd.Series(notes.texts[c], dtype=object) if kind == "str" else tensors[f"nodes/{c}"].numpy()
            for c, kind in NODE_COLUMNS.items()
        }
    )
    names = nodes["node"].to_numpy(dtype=object)
    edges = pd.DataFrame({name: tensors[f"edges/{name}"].numpy() for name in EDGE_COLUMNS})
    edges = edges.assign(source=names[edges["source"]], target=names[edges["target"]])
    if by_prompt is not None:
        by_prompt = from_columns({name: values.numpy() for name, values in by_prompt.items()}, list(names))
    if "heads" not in tables:
        return nodes, edges, None, by_prompt
    parts = pd.DataFrame({name: tensors[f"heads/{name}"].numpy() for name in HEAD_COLUMNS})
    kinds = np.array(HEAD_KINDS, dtype=object)[parts["kind"]]
    parts = parts.assign(source=names[parts["source"]], target=names[parts["target"]], kind=kinds)
    return nodes, edges, parts, by_prompt


def _within(rows: Tensor, n: int) -> bool:
    return bool(((rows >= 0) & (rows < n)).all())
