"""Edge scores and circuits in MIB's submission format: the JSON of EAP-IG's graphs.

    {"cfg": {n_layers, n_heads, parallel_attn_mlp, d_model},
     "nodes": {"input": {"in_graph": true}, "a0.h3": ..., "m0": ..., "logits": ...},
     "edges": {"input->a0.h3<q>": {"score": 0.1, "in_graph": false}, "a0.h3->m0": ..., ...}}

Heads read by three edges, into q, k and v. A circuit holds the `n` edges with the largest |score|, without those that
lie on no path from the input to the logits, as its evaluation prunes them. Two ways to count it are in use, and both
are in the file's "counts": the leaderboard puts a circuit at the share of edges asked for, int(p * N) of N; the paper
at the share that pruning leaves. A submission is a folder per task and model, such as `ioi_gpt2`, with one file of
scores, or with nine circuits, of at most .1, .2, .5, 1, 2, 5, 10, 20 and 50% of the edges, and nothing else. Sign:
positive supports the answer, as where its loss is the negative difference.
Source: hannamw/EAP-IG (`Graph.to_json`, `apply_topn`), MIB-circuit-track (`evaluate_area_under_curve`); METHODS 5.2 and
5.11.
"""

import json
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any, Literal

import msgspec
import torch
from jaxtyping import Bool, Float
from torch import Tensor

from .._errors import FileFormatError, SettingsError
from .._files import present, read_json, write_text

SHARES = (0.001, 0.002, 0.005, 0.01, 0.02, 0.05, 0.1, 0.2, 0.5)
"""Of all edges, in the nine circuits of a submission."""
Split = Float[Tensor, "3 source target"]


def write_mib(
    path: Path, names: Sequence[str], scores: Float[Tensor, "source target"], qkv: Split | None, d_model: int | None,
    n_edges: int | Literal["mib"] | None,
) -> None:  # fmt: skip
    """Write the file, or for "mib" the folder of nine.

    Raises:
        SettingsError: attention by layers, heads without their q, k and v, no MLPs, or more edges than there are.
        FileFormatError: the folder holds something else, which MIB would take for circuits.
    """
    if qkv is None or d_model is None or any(name.endswith("/attention") for name in names):
        raise SettingsError(
            "MIB's edges into a head are three, to q, k and v: score them with component_edges(model, pairs, "
            "method='eap', attention='heads', split_qkv=True)."
        )
    layers = [int(name[1:].split("/")[0]) for name in names if name.startswith("L")]
    n_layers, n_heads = max(layers) + 1, sum(re.fullmatch(r"L0/H\d+", name) is not None for name in names)
    if len(names) != 2 + n_layers * (n_heads + 1):
        raise SettingsError("expected an MLP in every layer; MIB's graphs have no other form. Export models with MLPs.")
    edges = _edges(names, scores, qkv)
    cfg = {
        "n_layers": n_layers, "n_heads": n_heads, "d_model": d_model,
        "parallel_attn_mlp": bool(scores[names.index("L0/H0"), names.index("L0/MLP")].isnan()),
    }  # fmt: skip
    if n_edges == "mib":
        sizes = {f"{share:g}.json": int(share * len(edges)) for share in SHARES}
        if path.is_file() or (path.is_dir() and (strange := sorted(present(path) - set(sizes)))):
            raise FileFormatError(
                f"expected a new folder at {path}, or one of nine circuits; "
                f"it is {'a file' if path.is_file() else f'a folder with {strange[:3]}'}. Choose another path."
            )
        for name, size in sizes.items():
            write_text(path / name, json.dumps(_graph(names, edges, cfg, size), allow_nan=False))
        return
    if n_edges is not None and not 0 <= n_edges <= len(edges):
        raise SettingsError(f"expected between 0 and {len(edges):,} edges, q, k and v apart; got {n_edges}.")
    write_text(path, json.dumps(_graph(names, edges, cfg, n_edges), allow_nan=False))


def _graph(
    names: Sequence[str], edges: Mapping[tuple[str, str], float], cfg: Mapping[str, Any], n_edges: int | None
) -> dict[str, Any]:
    """The graph with a circuit of `n_edges` edges."""
    order = sorted(edges, key=lambda edge: -abs(edges[edge]))  # stable: ties by order in the graph
    kept, nodes = _connected(set(order[:n_edges]) if n_edges is not None else set())
    return {
        "cfg": cfg,
        "nodes": {_name(name): {"in_graph": _name(name) in nodes} for name in names},
        "edges": {
            f"{source}->{target}": {"score": score, "in_graph": (source, target) in kept}
            for (source, target), score in edges.items()
        },
        "counts": {"edges": len(edges), "requested": n_edges, "kept": len(kept)},
    }  # fmt: skip


class _Config(msgspec.Struct):
    n_layers: Annotated[int, msgspec.Meta(ge=1, le=10_000)]
    n_heads: Annotated[int, msgspec.Meta(ge=1, le=10_000)]
    d_model: int
    parallel_attn_mlp: bool


class _Edge(msgspec.Struct):
    score: float
    in_graph: bool


class _Counts(msgspec.Struct):
    requested: int | None = None


class _Graph(msgspec.Struct):
    cfg: _Config
    edges: dict[str, _Edge]
    counts: _Counts | None = None


def read_mib(path: Path) -> tuple[tuple[str, ...], Tensor, Tensor, Tensor | None, int]:
    """Names, scores, their q, k and v, the circuit (None where the file has none) and d_model of a file.

    Raises:
        FileFormatError: missing, of another form, or not the edges of its own `cfg`.
    """
    graph = read_json(path, _Graph)
    cfg = graph.cfg
    names, stage = ["embedding"], [0]
    for layer in range(cfg.n_layers):
        names += [*(f"L{layer}/H{head}" for head in range(cfg.n_heads)), f"L{layer}/MLP"]
        stage += [2 * layer + 1] * cfg.n_heads + [2 * layer + (1 if cfg.parallel_attn_mlp else 2)]
    names, stage = [*names, "logits"], torch.tensor([*stage, 2 * cfg.n_layers + 1])
    is_head = torch.tensor(["/H" in name for name in names])
    scores = torch.where(stage[:, None] < stage, 0.0, torch.nan)
    places = {
        f"{_name(names[source])}->{end}": (part, source, target)
        for target, name in enumerate(names)
        for part, end in enumerate([f"{_name(name)}<{letter}>" for letter in "qkv"] if "/H" in name else [_name(name)])
        for source in (~scores[:, target].isnan()).nonzero()[:, 0].tolist()
    }
    if strange := sorted(places.keys() ^ graph.edges.keys()):
        raise FileFormatError(
            f"{path}: expected the {len(places):,} edges of {cfg.n_layers} layers of {cfg.n_heads} heads; "
            f"{strange[:3]} are missing or not among them."
        )
    parts, kept = torch.zeros(3, *scores.shape), torch.zeros_like(scores, dtype=torch.bool)
    for name, edge in graph.edges.items():
        part, source, target = places[name]
        parts[part, source, target] = edge.score
        kept[source, target] |= edge.in_graph
    if not bool(parts.isfinite().all()):
        raise FileFormatError(f"{path}: expected finite scores of edges; got NaN or inf.")
    scores = scores + parts.sum(0)
    parts[:, :, ~is_head] = 0.0
    asked = graph.counts is not None and graph.counts.requested is not None  # also for no edges at all
    return tuple(names), scores, parts, kept if asked or kept.any() else None, cfg.d_model


def _name(name: str) -> str:
    """MIB's name of a component."""
    head, mlp = re.fullmatch(r"L(\d+)/H(\d+)", name), re.fullmatch(r"L(\d+)/MLP", name)
    if head is not None:
        return f"a{head[1]}.h{head[2]}"
    return f"m{mlp[1]}" if mlp is not None else {"embedding": "input"}.get(name, name)


def _edges(names: Sequence[str], scores: Tensor, qkv: Split) -> dict[tuple[str, str], float]:
    """The score of each edge, by source and target ("a0.h3<q>"), in the order of the graph."""
    there: Bool[Tensor, "source target"] = ~scores.isnan()
    edges: dict[tuple[str, str], float] = {}
    for target, name in enumerate(list(names)):
        ends = [f"{_name(name)}<{letter}>" for letter in "qkv"] if "/H" in name else [_name(name)]
        values = qkv[:, :, target] if "/H" in name else scores[None, :, target]
        for end, value in zip(ends, values, strict=True):
            for source in there[:, target].nonzero()[:, 0].tolist():
                edges[_name(str(names[source])), end] = float(value[source])
    return edges


def _connected(kept: set[tuple[str, str]]) -> tuple[set[tuple[str, str]], set[str]]:
    """The edges between nodes that have one in and one out, and these nodes."""
    plain = lambda end: end.split("<")[0]  # noqa: E731
    while True:
        sources, targets = {source for source, _ in kept}, {plain(target) for _, target in kept}
        nodes = (sources & targets) | (sources & {"input"})
        left = {(s, t) for s, t in kept if s in nodes and (plain(t) in nodes or t == "logits")}
        if left == kept:
            return kept, nodes | {"logits"}
        kept = left
