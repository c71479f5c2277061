"""The heads of a circuit's edges: `Circuit.with_heads`, `heads`, `attention` and `cut_heads`.

A circuit is a result without its model, so its prompts are run again here; `_heads.py` splits the edges,
`_attention.py` says why a head looks where it looks, and `interventions/_head_ablation.py` cuts a part to test it.
"""

import weakref
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import pandas as pd
import torch
from jaxtyping import Float
from torch import Tensor

from .._errors import PairsError, SettingsError
from ..bases._activations import Neurons
from ..bases._runs import run_logits
from ..bases._site import basis_name
from ..interventions._head_ablation import HeadPart, cut_head_parts
from ..models._protocol import TransformerLensModel
from ..models._threads import hooked
from ..tasks._pairs import PromptPairs
from ..tasks._provenance import model_name
from ..tasks._tokenize import tokenize
from ..tasks._tokenized import Batch, TokenizedPairs, unanswered
from ._attention import AttentionContributions, attention_contributions
from ._heads import Receivers, Sources, attention_hooks, split_by_head
from ._slots import Slot, find_slots
from ._table import HEAD_COLUMNS, typed
from ._targets import Target, TargetLike, answer_target, difference_target, find_targets, token_target
from ._total_effects import open_prompt

if TYPE_CHECKING:
    from ._circuit import Circuit

_SOURCES, _RECEIVERS = ("neuron", "feature", "embedding", "error"), ("neuron", "feature", "logit")
_SMALLEST = 0.002  # of the sum of an edge's |parts|: smaller ones share a row


@dataclass(frozen=True, eq=False)
class Traced:
    """What a circuit was traced on."""

    model: weakref.ref
    pairs: TokenizedPairs


@dataclass(frozen=True)
class _Again:
    """The prompts of a circuit, to be run again."""

    batches: Sequence[Batch]
    slots: Sequence[Slot]
    targets: Sequence[Target]
    paired: bool


Edges = int | pd.DataFrame | Sequence[tuple[str, str]]


def split_edges(
    circuit: "Circuit", edges: Edges, model: TransformerLensModel | None, pairs: Any, target: TargetLike
) -> pd.DataFrame:
    """The parts of the strongest edges, or of those given: see `Circuit.with_heads`."""
    model = _model_of(circuit, model)
    again = _run_again(model, circuit, pairs, target)
    table = _chosen_edges(circuit, edges)
    nodes = circuit.nodes.set_index("node")
    names = [list(dict.fromkeys(table[end])) for end in ("source", "target")]
    slot_of_layer = {slot.layer: index for index, slot in enumerate(again.slots)}
    logits = [node for node, kind in zip(circuit.nodes["node"], circuit.nodes["kind"], strict=True) if kind == "logit"]

    def places(nodes_of: Sequence[str]) -> Tensor:
        rows = []
        for name in nodes_of:
            kind, layer, position, unit = nodes.loc[name, ["kind", "layer", "position", "unit"]]
            slot = {"embedding": -1, "logit": len(again.slots)}.get(kind)
            unit = logits.index(name) if kind == "logit" else -1 if kind in ("embedding", "error") else unit
            rows.append((slot_of_layer[layer] if slot is None else slot, position, unit))
        return torch.tensor(rows).T

    sources, receivers = Sources(*places(names[0])), Receivers(*places(names[1]))
    ends = zip(names, ("source", "target"), strict=True)
    numbers = [torch.tensor([own.index(name) for name in table[end]]) for own, end in ends]
    direct, parts = 0.0, 0.0
    for batch in again.batches:
        with open_prompt(
            model, batch, again.slots, again.targets, paired=again.paired, keep=attention_hooks(model)
        ) as prompt:
            split = split_by_head(prompt, sources, receivers, torch.stack(numbers, 1))
        direct, parts = direct + split.direct / len(again.batches), parts + split.parts / len(again.batches)
    assert isinstance(direct, Tensor) and isinstance(parts, Tensor)
    _check_sums(table, direct + parts.sum((1, 2, 3)))
    return _part_table(table, nodes, direct, parts)


def known_parts(circuit: "Circuit", edges: Edges | None) -> pd.DataFrame | None:
    """The parts of these edges, where all of them are split already."""
    if circuit.head_parts is None:
        return None
    own = pd.MultiIndex.from_frame(circuit.head_parts[["source", "target"]])
    if edges is None:
        return circuit.head_parts.copy()
    wanted = own.unique()[:edges] if isinstance(edges, int) else pd.MultiIndex.from_tuples(_ends(edges))
    if not wanted.isin(own).all() or (isinstance(edges, int) and len(wanted) < edges):
        return None
    return circuit.head_parts[own.isin(wanted)].reset_index(drop=True)


def _ends(edges: pd.DataFrame | Sequence[tuple[str, str]]) -> list[tuple[str, str]]:
    rows = edges[["source", "target"]].itertuples(index=False) if isinstance(edges, pd.DataFrame) else edges
    return [(str(source), str(target)) for source, target in rows]


def known_model(circuit: "Circuit", model: TransformerLensModel | None) -> TransformerLensModel | None:
    """The model given, else the one that was traced, if it still lives."""
    return circuit.traced.model() if model is None and circuit.traced is not None else model


def _model_of(circuit: "Circuit", model: TransformerLensModel | None) -> TransformerLensModel:
    """The known model.

    Raises:
        SettingsError: there is none.
    """
    model = known_model(circuit, model)
    if model is None:
        raise SettingsError("this circuit was loaded, or its model is gone: give the model that was traced, model=...")
    return model


def _chosen_edges(circuit: "Circuit", edges: Edges) -> pd.DataFrame:
    """Edges whose sources have one place."""
    kind = circuit.nodes.set_index("node")["kind"]
    ends = (("source", _SOURCES), ("target", _RECEIVERS))
    own = circuit.edges[np.logical_and(*(kind[circuit.edges[end]].isin(kinds).to_numpy() for end, kinds in ends))]
    if isinstance(edges, int):
        if edges < 1 or own.empty:
            raise SettingsError(
                f"expected a number of edges from {', '.join(_SOURCES)} to {', '.join(_RECEIVERS)}; got {edges} of "
                f"{len(own)}. Edges of groups, remainders and biases have no one place to come from."
            )
        return own.head(edges)
    wanted = set(_ends(edges))
    there = [pair in wanted for pair in zip(own["source"], own["target"], strict=True)]
    chosen = own[np.array(there, dtype=bool)]  # an empty list would choose no columns
    if len(chosen) < len(wanted):
        missing = sorted(wanted - set(zip(chosen["source"], chosen["target"], strict=True)))
        raise SettingsError(f"expected edges of this circuit between single nodes; {missing[:3]} are not.")
    return chosen


def _run_again(model: TransformerLensModel, circuit: "Circuit", pairs: Any, target: TargetLike) -> _Again:
    settings = circuit.settings
    if settings["model"] != model_name(model):
        raise SettingsError(f"this circuit is of {settings['model']}; got {model_name(model)}. Give its own model.")
    if "head" in set(circuit.nodes["kind"]):
        raise SettingsError(
            "expected edges that run through heads; in this circuit heads are nodes: see circuit.nodes, kind 'head'."
        )
    if settings.get("positions", "keep") != "keep":
        raise SettingsError(
            "edges are split by head between positions, and this circuit has none that all its prompts share. Trace "
            "the prompt alone, or prompts of one token length."
        )
    pairs = circuit.traced.pairs if pairs is None and circuit.traced is not None else pairs
    if pairs is None:
        tokens = settings.get("token_ids")
        if tokens is None or settings["baseline"] == "corrupt":
            raise PairsError("this circuit is of pairs, which it does not hold: give them, pairs=...")
        pairs = unanswered([torch.tensor(tokens, device=model.cfg.device or "cpu")])
    else:
        pairs = tokenize(model, pairs) if isinstance(pairs, PromptPairs) else pairs
        if pairs.hash != settings["pairs_hash"]:
            raise PairsError("these are not the pairs that the circuit was traced on. Give the same ones, in order.")
    if target is not None:
        targets = find_targets(model, pairs, target, settings["prompt"], None, center=settings.get("center", True))
        targets = [] if callable(targets) else targets
    else:
        names = circuit.nodes.loc[circuit.nodes["kind"] == "logit", "node"]
        targets = [_target_of(name, settings.get("center", True)) for name in names]
    basis = circuit.basis or Neurons()
    if basis_name(basis) != settings["basis"]:
        raise SettingsError(
            f"this circuit is of {settings['basis']!r}; got {basis_name(basis)!r}. Dictionaries are not saved with a "
            "circuit: give them, Circuit.load(path, basis=bases.Dictionaries([...]))."
        )
    slots = find_slots(model, basis)
    return _Again(list(pairs.batches(1)), slots, targets, settings["baseline"] == "corrupt")


def _target_of(name: str, center: bool) -> Target:
    """The target that a logit node is called after."""
    if name.startswith("logit/"):
        text, _, place = name.removeprefix("logit/").partition("@")
        tokens, position = [int(token) for token in text.split("-")], int(place) if place else None
        if len(tokens) == 1:
            return token_target(tokens[0], position, center=center)
        return difference_target(tokens[0], tokens[1], position)
    if name in ("logit_difference", "answer_logit"):
        return answer_target(against_wrong=name == "logit_difference", center=center)
    raise SettingsError(f"the circuit explains {name!r}, which its name alone does not give: say target=...")


def _check_sums(table: pd.DataFrame, total: Float[Tensor, " edge"]) -> None:
    """Parts must sum to the edges of the circuit: another model, or other weights, would show here."""
    weight = torch.from_numpy(table["weight"].to_numpy(copy=True))
    if float((total - weight).abs().max()) > 1e-3 * float(weight.abs().max()):
        raise SettingsError(
            "the parts do not sum to the circuit's edges: it was traced on other weights, another dtype or other "
            "prompts. Trace it again with this model."
        )


def _part_table(table: pd.DataFrame, nodes: pd.DataFrame, direct: Tensor, parts: Tensor) -> pd.DataFrame:
    """Strongest edges first, and of each edge its strongest parts first."""
    size = parts.abs().sum((1, 2, 3)) + direct.abs()
    shown = (parts.abs() >= _SMALLEST * size[:, None, None, None]) & (parts != 0)
    edge, layer, head, place = (index.numpy() for index in shown.nonzero(as_tuple=True))
    rest = torch.where(shown, 0.0, parts).sum((1, 2, 3)).numpy()
    every, none = np.arange(len(table)), np.full(len(table), -1)
    position = nodes.loc[table["source"], "position"].to_numpy()
    blocks = [
        ("head", edge, layer, head, place, parts[shown].numpy()),
        ("direct", every, none, none, position, direct.numpy()),
        ("rest", every, none, none, none, rest),
    ]
    names = ["kind", "edge", "layer", "head", "from_position", "part"]
    frame = pd.concat([pd.DataFrame(dict(zip(names, block, strict=True))) for block in blocks], ignore_index=True)
    frame = frame[frame["part"] != 0]
    frame = frame.iloc[np.lexsort((-frame["part"].abs(), frame["edge"]))].reset_index(drop=True)
    weight, attribution = (table[name].to_numpy()[frame["edge"]] for name in ("weight", "attribution"))
    ends = {end: table[end].to_numpy(dtype=object)[frame["edge"]] for end in ("source", "target")}
    share = frame["part"] / weight
    frame = frame.assign(**ends, attribution=attribution * share, share=share)
    return typed(frame, HEAD_COLUMNS)


def explain_attention(
    circuit: "Circuit", at: Sequence[Any], model: TransformerLensModel | None, pairs: Any, top: int, *, raw: bool
) -> AttentionContributions:
    """Why a head looks where it looks: see `Circuit.attention`."""
    model = _model_of(circuit, model)
    if len(at) == 2:
        source, target = at
        own = circuit.heads([(source, target)], model=model, pairs=pairs)
        own = own[own["kind"] == "head"]
        if own.empty:
            raise SettingsError(f"no head brings anything of the edge from {source} to {target}.")
        best = own.iloc[0]
        query = int(circuit.nodes.set_index("node").loc[target, "position"])
        layer, head, key = int(best["layer"]), int(best["head"]), int(best["from_position"])
    elif len(at) == 4:
        layer, head, query, key = (int(number) for number in at)
    else:
        raise SettingsError(f"expected an edge (source, target) or (layer, head, query, key); got {at!r}.")
    again = _run_again(model, circuit, pairs, None)
    if len(again.batches) > 1:
        raise PairsError(
            f"attention is explained on one prompt; got {len(again.batches)}. Trace the prompt alone: its circuit has "
            "its own heads."
        )
    return attention_contributions(model, again.batches[0], again.slots, layer, head, query, key, top=top, raw=raw)


def cut_parts(circuit: "Circuit", rows: pd.DataFrame, model: TransformerLensModel | None, pairs: Any) -> pd.DataFrame:
    """Predicted and measured effects of parts: see `Circuit.cut_heads`."""
    model = _model_of(circuit, model)
    again = _run_again(model, circuit, pairs, None)
    nodes = circuit.nodes.set_index("node")
    own = rows[rows["kind"] == "head"].reset_index(drop=True)
    kinds = [nodes.loc[own[end], "kind"].isin(["neuron", "embedding", "logit"]) for end in ("source", "target")]
    if own.empty or not all(kind.all() for kind in kinds):
        raise SettingsError(
            "expected rows of circuit.heads() with kind 'head', between neurons, embeddings and logits; got "
            f"{len(own)} of {len(rows)}, some of features or errors perhaps."
        )
    logits = [node for node in circuit.nodes["node"] if nodes.loc[node, "kind"] == "logit"]
    parts = []
    for row in own.itertuples(index=False):
        source, target = nodes.loc[row.source], nodes.loc[row.target]
        sender = (-1, int(source["position"]), -1) if source["kind"] == "embedding" else _place(source)
        receiver = None if target["kind"] == "logit" else _place(target)
        parts.append(HeadPart(sender, receiver, row.layer, row.head, row.from_position, int(target["position"])))
    measured = torch.zeros(len(parts), dtype=torch.float64)
    for batch in again.batches:
        cut = cut_head_parts(model, batch.clean, parts, _baselines(model, batch, again), batch.attention_mask)
        for index, part in enumerate(parts):
            if part.receiver is not None:
                change = float(cut.live[index] - cut.cut[index])
            else:
                target = again.targets[logits.index(own["target"][index])]
                change = _logit(target, cut.live_logits[index], batch) - _logit(target, cut.cut_logits[index], batch)
            measured[index] += change / len(again.batches)
    return own.assign(predicted=own["part"], measured=measured.numpy())


def _place(node: Any) -> tuple[int, int, int]:
    return int(node["layer"]), int(node["position"]), int(node["unit"])


def _baselines(model: TransformerLensModel, batch: Batch, again: _Again) -> dict[str, Tensor | None]:
    """What ablated sources have: zero, or what the corrupt prompt has."""
    hooks = ["hook_embed", *(slot.hook for slot in again.slots)]
    if not again.paired:
        return dict.fromkeys(hooks)
    corrupt, seen = batch.on_corrupt(), {}

    def keep(value: Tensor, hook: Any, name: str) -> None:
        seen[name] = value

    with torch.no_grad(), hooked(model, [(name, lambda v, hook, n=name: keep(v, hook, n)) for name in hooks]):
        run_logits(model, corrupt.clean, corrupt.attention_mask)
    return seen


def _logit(target: Target, logits: Float[Tensor, " d_vocab"], batch: Batch) -> float:
    if len(target.tokens) == 2:
        return float(logits[target.tokens[0]] - logits[target.tokens[1]])
    if len(target.tokens) == 1:
        return float(logits[target.tokens[0]] - logits.mean())
    if target.name == "logit_difference" and batch.wrong_answer is not None:
        return float(logits[int(batch.answer[0])] - logits[int(batch.wrong_answer[0])])
    if target.name == "answer_logit":
        return float(logits[int(batch.answer[0])] - logits.mean())
    raise SettingsError(f"parts that reach {target.name!r} cannot be tested: give circuits of tokens as targets.")
