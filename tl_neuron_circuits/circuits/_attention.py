"""Why a head looks where it looks: its score for a key, split into what the residual stream holds at both positions.

    value = s_k - sum_j A_j s_j                       s_j: scaled score of the query for key j, A: the pattern
          = q . sum_j (1[j = k] - A_j) k_j            the change of log A_k per unit of all of these scores

Raw scores mean nothing up to a constant that the softmax drops; `value` is free of it. With the norms before attention
(and those that some models put on queries and keys) frozen, the query and the keys are linear in the residual stream
x, so value is bilinear: every write w at the query's position has a share, and so has every write at a key's position.

    query side    sum_w w(p) . d value / d x(p) through the query       + the query's own biases  = value - position
    key side      sum_{w, j} w(j) . d value / d x(j) through the keys   + the keys' own biases    = value - position
    pairs         w(p) and w'(j) at once: the second derivative; over all pairs, biases included, they sum to the same

`position` is what scores have beside q . k (ALiBi); rotary embeddings are part of the linear maps, and a soft cap is
undone. Writes are embeddings, neurons (or features), heads and, for each layer, the rest: its biases and errors.

These are shares of a score, not of a logit: they are never added to edges, in which patterns are constants.
Source: Ameisen et al. 2025 (QK attribution); METHODS 1.5.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import pandas as pd
import torch
from jaxtyping import Float
from torch import Tensor

from .. import _html
from .._errors import SettingsError, UnsupportedModelError
from ..models._protocol import TransformerLensModel, hook_points
from ..models._threads import hooked
from ..propagation._relp import Relp
from ..propagation.rules import LnRule, RuleSet, SplitAttentionRule
from ..tasks._tokenized import Batch
from ._heads import AttentionLayer, attention_hooks, attention_layers, nearly_equal, pull, push
from ._prompt_graph import PromptRun, run_prompt
from ._slots import Slot, widened

_RULES = RuleSet(ln=LnRule(), attention=SplitAttentionRule(query=1.0, key=1.0, value=1.0))
"""Frozen norms, those of queries and keys too; nothing is cut or scaled."""
_COLUMNS = ["side", "kind", "layer", "unit", "position", "contribution"]


@dataclass(frozen=True, repr=False)
class AttentionContributions:
    """Why one head looks from one position at another."""

    layer: int
    head: int
    query: int
    key: int
    value: float
    """The score of the key minus the pattern's mean of all scores; the score itself where it was asked for raw."""
    pattern: float
    """How much the head looks there, 0 to 1."""
    position: float
    """The part of `value` that depends on positions alone (ALiBi)."""
    writes: pd.DataFrame
    """Columns side ("query" or "key"), kind, layer, unit (a head's or node's number), position, contribution.

    Largest first; each side sums to `value - position`.
    """
    pairs: pd.DataFrame
    """The strongest writes of both sides together: the same columns with "query_" and "key_" before, contribution."""

    def to_dataframe(self) -> pd.DataFrame:
        """Return `writes`."""
        return self.writes

    def __repr__(self) -> str:
        return (
            f"AttentionContributions(layer {self.layer}, head {self.head}, from position {self.query} to {self.key}: "
            f"pattern {self.pattern:.3f}, value {self.value:.3f})"
        )

    def _repr_html_(self) -> str:
        return _html.block(repr(self), _html.table(self.writes.head(20), bars=("contribution",)))


@dataclass(frozen=True)
class _Write:
    """Something that wrote into the residual stream at one position: a node, a head or an embedding."""

    kind: str
    layer: int
    unit: int
    position: int


@dataclass(frozen=True)
class _Score:
    """`value` in the graph, from leaves in place of queries and keys."""

    value: Float[Tensor, ""]
    pattern: float
    queries: Tensor
    """With its past."""
    keys: Tensor
    query_leaf: Tensor
    key_leaf: Tensor


def attention_contributions(
    model: TransformerLensModel,
    batch: Batch,
    slots: Sequence[Slot],
    layer: int,
    head: int,
    query: int,
    key: int,
    *,
    top: int = 20,
    raw: bool = False,
) -> AttentionContributions:
    """Split why `head` of `layer` looks from position `query` at position `key`.

    Args:
        model: any TransformerLens model whose attention shows queries, keys, scores and patterns.
        batch: one prompt.
        slots: where nodes live, from `find_slots`.
        layer, head, query, key: which entry of which pattern.
        top: how many nodes per side have rows of their own (the others of a layer share one), and how many writes of
            each side are paired.
        raw: split the key's score alone, which means something only beside another key's.

    Raises:
        SettingsError: a place that is not there, or one at which the head does not look at all.
        UnsupportedModelError: queries, keys or scores cannot be read, or are not bilinear.
    """
    n_layers, n_heads, n_positions = int(model.cfg.n_layers), int(model.cfg.n_heads), batch.clean.shape[1]
    if not (0 <= layer < n_layers and 0 <= head < n_heads and 0 <= key <= query < n_positions):
        raise SettingsError(
            f"expected a layer below {n_layers}, a head below {n_heads}, positions key <= query < {n_positions}; got "
            f"layer {layer}, head {head}, query {query}, key {key}."
        )
    with Relp(model, _RULES):
        run, score = _run(model, batch, slots, layer, head, query, key, raw=raw)
        layers = attention_layers(run)[: layer + 1]
        one = torch.ones(1).to(score.value)
        (at_query,), (at_key,) = (pull(score.value, [leaf], one) for leaf in (score.query_leaf, score.key_leaf))
        products = [
            widened(g[0]) * widened(x.detach()) for g, x in ((at_query, score.query_leaf), (at_key, score.key_leaf))
        ]
        bilinear, by_keys = (float(product.sum()) for product in products)
        if abs(bilinear - by_keys) > 1e-3 * float(products[0].abs().sum()):
            raise UnsupportedModelError(
                f"expected the scores of blocks.{layer}.attn to be queries times keys; queries alone give "
                f"{bilinear:.4g} and keys alone {by_keys:.4g} on this model, so they cannot be split."
            )
        tables = [
            _table(side, _shares(run, slots, layers, past, gradient), top)
            for side, past, gradient in (("query", score.queries, at_query), ("key", score.keys, at_key))
        ]
        writes = pd.concat(tables, ignore_index=True)
        pairs = _pairs(run, slots, layers, score, writes, top)
    value = float(score.value.detach())
    order = writes["contribution"].abs().sort_values(ascending=False, kind="stable").index
    return AttentionContributions(
        layer, head, query, key, value, score.pattern, value - bilinear,
        writes.loc[order].reset_index(drop=True), pairs,
    )  # fmt: skip


def _run(
    model: TransformerLensModel, batch: Batch, slots: Sequence[Slot], layer: int, head: int, query: int, key: int,
    *, raw: bool,
) -> tuple[PromptRun, _Score]:  # fmt: skip
    """Run the prompt with leaves in place of the layer's queries and keys."""
    names = {name: f"blocks.{layer}.attn.hook_{name}" for name in ("q", "k", "attn_scores")}
    points = hook_points(model)
    missing = [name for name in names.values() if name not in points]
    if missing:
        raise UnsupportedModelError(f"expected {missing[0]}, where attention is read; this model has none.")
    past: dict[str, Tensor] = {}
    leaves: dict[str, Tensor] = {}

    def cut(value: Tensor, hook: Any, name: str) -> Tensor:
        past[name] = value
        leaves[name] = value.detach().requires_grad_(True)
        return leaves[name]

    hooks = [(names[name], partial(cut, name=name)) for name in ("q", "k")]
    with hooked(model, hooks):
        run = run_prompt(model, batch, slots, [*attention_hooks(model), names["attn_scores"]])
    pattern = run.kept[f"blocks.{layer}.attn.hook_pattern"].detach()[0, head, query]
    if float(pattern[key]) == 0:
        raise SettingsError(
            f"head {head} of layer {layer} does not look from position {query} at {key} at all (a mask or a window)."
        )
    live = (pattern > 0).nonzero()[:, 0]
    scores = run.kept[names["attn_scores"]][0, head, query, live]
    softmax = widened(scores.detach()).softmax(0).float()  # Hugging Face takes it in float32, whatever the model
    if not nearly_equal(softmax, pattern[live].to(softmax)):
        raise UnsupportedModelError(
            f"expected {names['attn_scores']} to be what the softmax turns into hook_pattern; it is not on this model "
            "(TransformerBridge's OPT and GPT-J fire it elsewhere), so the scores cannot be split."
        )
    cap = float(getattr(model.cfg, "attn_scores_soft_cap", -1) or -1)
    if cap > 0:
        scores = cap * torch.atanh(scores / cap)
    if scores.grad_fn is None:
        raise UnsupportedModelError(
            f"expected {names['attn_scores']} to depend on hook_q and hook_k; it does not on this model."
        )
    weights = (live == key).to(pattern) - (0.0 if raw else pattern[live])
    value = (weights.to(scores) * scores).sum()
    return run, _Score(value, float(pattern[key]), past["q"], past["k"], leaves["q"], leaves["k"])


@dataclass(frozen=True)
class _Shares:
    """What all writes of one kind in one layer contribute: a row per gradient, then positions, then units."""

    kind: str
    layer: int
    values: Float[Tensor, "row pos unit"]


def _shares(
    run: PromptRun, slots: Sequence[Slot], layers: Sequence[AttentionLayer], past: Tensor, gradient: Tensor
) -> Iterator[_Shares]:
    """Split the product of queries (or keys) with their gradient, the newest writes first; all shares sum to it.

    Gradients have a row each. The residual stream passes them down unchanged, which `attention_layers` has measured.
    """
    n_positions, reading = run.embedding.shape[1], layers[-1]
    whole = (widened(gradient) * widened(past.detach())).flatten(1).sum(1)
    ends = [x for x in (run.embedding, run.positional) if x is not None]
    if len(layers) == 1:
        at_ends = pull(past, ends, gradient)
        below = sum((g * x.detach()).flatten(1).sum(1) for g, x in zip(at_ends, ends, strict=True))
    else:
        (seeds,) = pull(past, [reading.bottom], gradient)
        below = (widened(seeds) * widened(reading.bottom.detach())).flatten(1).sum(1)
    yield _Shares("bias", len(layers) - 1, (whole - below)[:, None, None])  # of the norm and of the projection
    slot_of_layer = {slot.layer: index for index, slot in enumerate(slots)}
    for number in range(len(layers) - 2, -1, -1):
        layer, index = layers[number], slot_of_layer.get(number)
        leaf = [] if index is None else [run.slots[index].source]
        at_z, *at_leaf = pull(layer.top, [layer.z, *leaf], seeds)
        n_heads, _, d_head = layer.shape
        heads = (widened(at_z) * widened(layer.z.detach())).reshape(-1, n_positions, n_heads, d_head).sum(-1)
        yield _Shares("head", number, heads)
        left = (widened(seeds) * widened(layer.top.detach())).flatten(1).sum(1) - heads.flatten(1).sum(1)
        if index is not None:
            rows = at_leaf[0].reshape(len(seeds), n_positions, -1)
            nodes = torch.stack([slots[index].node_gradient(row) for row in rows]) * widened(run.slots[index].nodes)
            yield _Shares("neuron" if slots[index].letter == "N" else "feature", number, nodes)
            left = left - nodes.flatten(1).sum(1)
        if number == 0:
            at_ends, by_heads = pull(layer.top, ends, seeds), pull(layer.z, ends, at_z)
            at_ends = [one - other for one, other in zip(at_ends, by_heads, strict=True)]
            left = left - sum((g * x.detach()).flatten(1).sum(1) for g, x in zip(at_ends, ends, strict=True))
        else:
            left = left - (widened(seeds) * widened(layer.bottom.detach())).flatten(1).sum(1)
        yield _Shares("bias", number, left[:, None, None])  # and what a dictionary misses
    for kind, gradients, values in zip(("embedding", "positional"), at_ends, ends, strict=False):
        yield _Shares(kind, -1, (widened(gradients) * widened(values.detach()))[:, 0].sum(-1, keepdim=True))


def _table(side: str, shares: Iterator[_Shares], top: int) -> pd.DataFrame:
    """One row per write; of a layer's nodes the strongest `top`, and one row per position for the others."""
    rows = []
    for block in shares:
        values = block.values[0].cpu().double()
        if block.kind in ("neuron", "feature"):
            flat = values.flatten()
            chosen = flat.abs().topk(min(top, len(flat))).indices
            kept = torch.zeros_like(flat).index_put_((chosen,), flat[chosen]).reshape(values.shape)
            rest = (values - kept).sum(1)
            rows += [(side, "unselected", block.layer, -1, p, float(rest[p])) for p in range(len(rest)) if rest[p] != 0]
            values = kept
        for position, unit in values.nonzero().tolist():
            alone = block.kind in ("embedding", "positional", "bias")
            place = -1 if block.kind == "bias" else position
            number = -1 if alone else unit
            rows.append((side, block.kind, block.layer, number, place, float(values[position, unit])))
    return pd.DataFrame(rows, columns=_COLUMNS)


def _pairs(
    run: PromptRun, slots: Sequence[Slot], layers: Sequence[AttentionLayer], score: _Score, writes: pd.DataFrame,
    top: int,
) -> pd.DataFrame:  # fmt: skip
    """The strongest writes of the query side with the strongest of the key side."""
    strongest = []
    for side in ("query", "key"):
        own = writes[(writes["side"] == side) & ~writes["kind"].isin(["bias", "unselected"])]
        order = own["contribution"].abs().sort_values(ascending=False, kind="stable").index[:top]
        strongest.append([_Write(*row[1:5]) for row in own.loc[order].itertuples(index=False)])
    ours, theirs = strongest
    columns = [f"{side}_{name}" for side in ("query", "key") for name in _COLUMNS[1:5]] + ["contribution"]
    if not ours or not theirs:
        return pd.DataFrame(columns=columns)
    vectors = torch.cat([_query_of(run, slots, layers, score.queries, write) for write in ours])
    (at_query,) = torch.autograd.grad(score.value, score.query_leaf, create_graph=True)
    gradients = pull(at_query, [score.key_leaf], vectors)[0]
    wanted = {(w.kind, w.layer, w.unit, w.position): place for place, w in enumerate(theirs)}
    table = torch.zeros(len(ours), len(theirs), dtype=torch.float64)
    for block in _shares(run, slots, layers, score.keys, gradients):
        for (kind, layer, unit, position), place in wanted.items():
            if (kind, layer) == (block.kind, block.layer):
                table[:, place] = block.values[:, position, max(unit, 0)].cpu().double()
    rows = [
        (q.kind, q.layer, q.unit, q.position, k.kind, k.layer, k.unit, k.position, float(table[a, b]))
        for a, q in enumerate(ours)
        for b, k in enumerate(theirs)
    ]
    frame = pd.DataFrame(rows, columns=columns)
    order = frame["contribution"].abs().sort_values(ascending=False, kind="stable").index
    return frame.loc[order].reset_index(drop=True)


def _query_of(
    run: PromptRun, slots: Sequence[Slot], layers: Sequence[AttentionLayer], queries: Tensor, write: _Write
) -> Tensor:
    """What one write brings to the queries."""
    place = write.position
    if write.kind in ("embedding", "positional"):
        end = run.embedding if write.kind == "embedding" else run.positional
        assert end is not None
        tangent = torch.zeros_like(end)
        tangent[0, place] = end.detach()[0, place]
        if len(layers) == 1:
            return push(queries, end, tangent[None])
        first = layers[0]
        by_heads = push(first.top, first.z, push(first.z, end, tangent[None]))
        return push(queries, layers[-1].bottom, push(first.top, end, tangent[None]) - by_heads)
    layer = layers[write.layer]
    if write.kind == "head":
        n_heads, _, d_head = layer.shape
        z = layer.z.detach().reshape(1, -1, n_heads, d_head)
        tangent = torch.zeros_like(z)
        tangent[0, place, write.unit] = z[0, place, write.unit]
        written = push(layer.top, layer.z, tangent.reshape(1, *layer.z.shape))
    else:
        index = next(index for index, slot in enumerate(slots) if slot.layer == write.layer)
        source, nodes = run.slots[index].source, run.slots[index].nodes
        dictionary = getattr(getattr(slots[index], "site", None), "dictionary", None)
        tangent = torch.zeros_like(source).reshape(1, len(nodes), -1)
        value = nodes[place, write.unit]
        if dictionary is None:
            tangent[0, place, write.unit] = value
        else:
            tangent[0, place] = (value * dictionary.W_dec[write.unit].to(value)).to(tangent)
        written = push(layer.top, source, tangent.reshape(1, *source.shape))
    return push(queries, layers[-1].bottom, written)
