"""Circuits whose tables are made up, as large or as nasty as a test needs."""

from functools import cache

import numpy as np
import pandas as pd

from tl_neuron_circuits.circuits import Circuit
from tl_neuron_circuits.circuits._flow import complete
from tl_neuron_circuits.circuits._table import node_table

NASTY = (
    "</script><script>window.broken = true</script>",
    "<!--",
    "\"quoted\" \\ 'both'",
    "line\nbreak",
    "<img src=x onerror=window.broken=true>",
    "\x00\x07\x7f",
    "‮right to left\u200b",
    "&amp;[[data]]${window.broken = true}",
    "   ",
    "日本語 Größe 🙂",
    "",
)

BYTES = "\udc80\udcff"
"""Bytes that are no UTF-8, as surrogates; pandas has no place for them, JSON has."""


@cache
def large_circuit(n_nodes: int = 300, n_edges: int = 3000, *, layers: int = 12, positions: int = 12) -> Circuit:
    """Random neurons over layers and positions, crowded at the last position, with random edges upwards."""
    random = np.random.default_rng(0)
    rows = [
        {"node": f"embed@{p}", "label": f"tok{p}", "kind": "embedding", "position": p, "token": f"tok{p}", "score": 0.4}
        for p in range(positions)
    ]
    for index in range(n_nodes):
        position = positions - 1 if random.random() < 0.4 else int(random.integers(positions))
        layer, score = int(random.integers(layers)), float(random.normal() * random.exponential())
        rows.append(
            {
                "node": f"L{layer}/N{index}@{position}", "kind": "neuron", "layer": layer, "unit": index,
                "position": position, "token": f"tok{position}", "activation": score / 2, "change": score / 2,
                "sign": int(np.sign(score)), "score": score,
            }
        )  # fmt: skip
    rows.append(
        {"node": "logit/7", "label": "seven", "kind": "logit", "layer": layers, "unit": 7, "position": positions - 1,
         "token": "seven", "activation": 10.0, "change": 10.0, "sign": 1, "score": 10.0, "probability": 0.5}
    )  # fmt: skip
    nodes = node_table(rows)
    sources = random.permutation(np.repeat(np.arange(len(rows) - 1), 40))
    pairs: dict[tuple[int, int], None] = {}
    for source in sources:
        above = np.flatnonzero(
            (nodes["layer"] > nodes["layer"][source]) & (nodes["position"] >= nodes["position"][source])
        )
        if len(above):
            pairs[int(source), int(random.choice(above))] = None
        if len(pairs) == n_edges:
            break
    weight = random.normal(size=len(pairs)) * random.exponential(size=len(pairs))
    edges = pd.DataFrame(
        {
            "source": [nodes["node"][source] for source, _ in pairs],
            "target": [nodes["node"][target] for _, target in pairs],
            "weight": weight, "relative": 0.0, "attribution": weight / 10,
        }
    )  # fmt: skip
    return made(nodes, edges, [f"tok{p}" for p in range(positions)], layers)


def nasty_circuit() -> Circuit:
    """Tokens, labels, a group and a prompt that would break a page that does not escape them."""
    rows = []
    for position, token in enumerate(NASTY):
        place = {"position": position, "token": token}
        group = NASTY[0] if position < 2 else ""
        rows.append({"node": f"embed@{position}", "label": token or "empty", "kind": "embedding", "score": 1.0} | place)
        rows.append(
            {
                "node": f"L0/N{position}@{position}", "label": token, "kind": "neuron", "layer": 0, "unit": position,
                "activation": 1.0, "change": 1.0, "sign": 1, "score": 1.0, "group": group, **place,
            }
        )  # fmt: skip
    rows.append(
        {
            "node": "logit/1", "label": NASTY[0], "kind": "logit", "layer": 1, "unit": 1, "position": len(NASTY) - 1,
            "token": NASTY[0], "activation": 12.0, "change": 12.0, "sign": 1, "score": 12.0,
        }
    )  # fmt: skip
    names = [f"L0/N{position}@{position}" for position in range(len(NASTY))]
    edges = [(f"embed@{position}", name) for position, name in enumerate(names)] + [(name, "logit/1") for name in names]
    table = pd.DataFrame(edges, columns=["source", "target"]).assign(weight=1.0, relative=0.0, attribution=1.0)
    return made(node_table(rows), table, list(NASTY), 1)


def made(nodes: pd.DataFrame, edges: pd.DataFrame, tokens: list[str], layers: int) -> Circuit:
    score = nodes.set_index("node")["score"][edges["target"]].to_numpy()
    edges = edges.assign(relative=edges["attribution"] / score)
    value = float(nodes.loc[nodes["kind"] == "logit", "score"].sum())
    target = nodes.loc[nodes["kind"] == "logit", "label"].tolist()
    settings = {
        "model": "made up", "n_layers": layers, "d_mlp": None, "n_prompts": 1, "prompt": "".join(tokens) + BYTES,
        "tokens": tokens, "token_ids": None, "target": target, "target_value": value, "position": len(tokens) - 1,
        "baseline": "zero", "pairs_hash": "", "versions": {"torch": "0"},
    }  # fmt: skip
    return Circuit(*complete(nodes, edges, value), settings)
