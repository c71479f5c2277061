"""The two tables of a circuit: their columns. `_flow.py` has what follows from them (flow, influence, remainders)."""

from collections.abc import Collection

import numpy as np
import pandas as pd

SCHEMA = 3
"""Of these tables in files. 3: one file, with a checksum.
2: kinds `unselected` and `linearization_error`; `nodes` in the settings is a label."""
NODE_COLUMNS = {
    "node": "str", "label": "str", "score": "float64", "share": "float64", "kind": "str", "layer": "int64",
    "unit": "int64", "position": "int64", "token": "str", "activation": "float64", "change": "float64", "sign": "int64",
    "gate_sign": "int64", "up_sign": "int64", "flow": "float64", "influence": "float64", "probability": "float64",
    "group": "str",
}  # fmt: skip
"""In an order in which a narrow terminal, which shows the first and the last columns, shows the scores."""
EDGE_COLUMNS = {
    "source": "str",
    "target": "str",
    "weight": "float64",
    "relative": "float64",
    "attribution": "float64",
}
HEAD_COLUMNS = {
    "source": "str",
    "target": "str",
    "kind": "str",
    "layer": "int64",
    "head": "int64",
    "from_position": "int64",
    "part": "float64",
    "attribution": "float64",
    "share": "float64",
}
HEAD_KINDS = ("head", "direct", "rest")
"""What a part is of: a head, the residual stream alone, or parts too small for a row of their own."""
SINGLE = ("neuron", "feature", "component")
"""Kinds of single nodes that were chosen, supernodes aside."""
CHOSEN = (*SINGLE, "head", "skip", "group")
"""Kinds of nodes that pruning may drop; their scores stand beside each other."""
KIND_OF_LETTER = {"N": "neuron", "F": "feature"}
ENDS = ("embedding", "bias", "unselected", "linearization_error", "error")
"""Kinds without incoming edges: where flow ends."""
LEFT_OUT = ("unselected", "linearization_error", "error")
"""Ends that explain nothing: nodes that were not chosen, what the linearization misses, what dictionaries miss."""
FIXED_SOURCES = ("bias", "unselected", "linearization_error")


def node_table(rows: Collection[dict]) -> pd.DataFrame:
    """A table of nodes with every column; missing entries are neutral (-1 for places, 0 for signs, nan for numbers)."""
    neutral = {"str": "", "int64": -1, "float64": np.nan}
    signs = {"sign": 0, "gate_sign": 0, "up_sign": 0}
    frame = pd.DataFrame(list(rows), columns=list(NODE_COLUMNS))
    for column, kind in NODE_COLUMNS.items():
        filled = frame[column].where(frame[column].notna(), signs.get(column, neutral[kind]))
        frame[column] = filled.astype(object if kind == "str" else kind)
    frame["label"] = frame["label"].where(frame["label"] != "", frame["node"])
    return frame


def typed(frame: pd.DataFrame, columns: dict[str, str]) -> pd.DataFrame:
    """The table with exactly these columns, texts as objects."""
    return frame[list(columns)].astype({c: object if kind == "str" else kind for c, kind in columns.items()})


def unselected_name(position: int) -> str:
    """The node that stands for whatever was left out at a position."""
    return "unselected" if position < 0 else f"unselected@{position}"


def unselected_row(position: int, token: str = "") -> dict:
    """A remainder, as a row of the nodes."""
    where = "everywhere" if position < 0 else f"at {position}"
    return {
        "node": unselected_name(position), "label": f"left out {where}", "kind": "unselected", "position": position,
        "token": token,
    }  # fmt: skip


def target_shares(nodes: pd.DataFrame, target_value: float) -> dict[str, float]:
    """Shares of the target by where it comes from in the end: explained, left (out) and not_linear; they sum to 1.

    Not linear is the flow to the node of that kind, which circuits of differences have; left out is the flow to the
    other ends of `LEFT_OUT`; the rest is explained. All are nan where edges carry no flow, as those of a regression.
    """
    if nodes["flow"].isna().all():
        return dict.fromkeys(("explained", "left", "not_linear"), float("nan"))
    flow = nodes.groupby("kind")["flow"].sum() / target_value
    parts = {kind: float(flow.get(kind, 0.0)) for kind in LEFT_OUT}
    bent = parts.pop("linearization_error")
    left = sum(parts.values())
    return {"explained": 1 - left - bent, "left": left, "not_linear": bent}
