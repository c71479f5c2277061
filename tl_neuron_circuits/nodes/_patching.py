"""Exact activation patching: the truth that gradient methods estimate.

    noising:    score(n) = m(clean) - m(clean with n at its baseline value)
    denoising:  score(n) = m(corrupt with n at its clean value) - m(corrupt)

Sign: positive supports the answer. Cost: one forward row per node and prompt, batched. With positions summed a node is
patched at all positions at once, with units summed the whole activation at a position.
Source: Vig et al. 2020; METHODS 2.
"""

import hashlib
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, ClassVar

import pandas as pd
import torch
from torch import Tensor

from .._errors import SettingsError
from .._progress import progress
from ..bases._activations import Neurons
from ..bases._runs import Values, answers_only, run_logits
from ..bases._site import Parts, Site, refuse_cross_layer
from ..models._threads import hooked
from ..tasks._metrics import measure
from ..tasks._tokenized import Batch
from ._method import Method
from ._scope import Blocks, Means, Scope


@dataclass(frozen=True, eq=False)
class Patching(Method):
    """Patch every node, or only `nodes`: rows of `NodeScores.top`, or of a circuit's table (its neurons).

    Nodes that are not measured score nan.

    Example:
        >>> import tl_neuron_circuits as tnc
        >>> model, pairs = tnc.load_demo_model(), tnc.tasks.subject_verb_agreement("simple", n=8)
        >>> best = tnc.attribute(model, pairs).top(3)
        >>> len(tnc.attribute(model, pairs, method=tnc.Patching(best)).top(10))
        3
    """

    name: ClassVar[str] = "patching"
    nodes: pd.DataFrame | None = None

    def __post_init__(self) -> None:
        """Take the neurons among rows of a circuit's table."""
        nodes = self.nodes
        if nodes is not None and "hook" not in nodes.columns and {"kind", "layer", "unit", "position"} <= {*nodes}:
            nodes = nodes[nodes["kind"] == "neuron"]
            nodes = nodes.assign(hook=[Neurons.hook.format(layer=layer) for layer in nodes["layer"]], kind="node")
        object.__setattr__(self, "nodes", nodes)

    @property
    def measures_all(self) -> bool:
        """Whether every node gets a score."""
        return self.nodes is None

    @property
    def options(self) -> dict[str, Any]:
        """How many nodes were chosen, and a hash of them."""
        if self.nodes is None:
            return {"nodes": None}
        return {"nodes": len(self.nodes), "nodes_hash": hashlib.sha256(self.nodes.to_json().encode()).hexdigest()}

    @property
    def label(self) -> str:
        """The name alone: which nodes were measured does not change their scores."""
        return self.name

    def check(self, scope: Scope) -> None:
        """The chosen nodes are nodes of this basis, and write to one place."""
        refuse_cross_layer(scope.sites, "exact patching of single nodes")
        if self.nodes is None:
            return
        missing = {"hook", "unit", "position", "kind"} - set(self.nodes.columns)
        if missing:
            raise SettingsError(
                f"expected nodes with columns hook, unit, position and kind; {sorted(missing)} missing. Give rows of "
                "NodeScores.top, or circuit.nodes."
            )
        hooks = [site.hook for site in scope.sites]
        unknown = set(self.nodes["hook"]) - set(hooks)
        if unknown:
            raise SettingsError(f"expected nodes of the hook points {hooks}; got {sorted(unknown)}.")
        if scope.units == "sum":
            raise SettingsError(
                "nodes= chooses single nodes; units='sum' measures whole activations. Leave one of them out."
            )

    def score(
        self, scope: Scope, batch: Batch, means: Means | None, *, rows: int, verbose: bool | None
    ) -> tuple[Values, Blocks]:
        """Patch node after node, `rows` forward rows at once."""
        run = scope.first_run(batch)
        values, baselines = scope.values(run), scope.baseline_parts(batch, means)
        with torch.no_grad(), answers_only(scope.model, run, scope.metric) as narrowed:
            start = measure(scope.metric, run_logits(scope.model, run.clean, run.attention_mask), narrowed)
        blocks: Blocks = {}
        for site in progress(scope.sites, desc="patched sites", verbose=verbose):
            parts = site.take_apart(values)
            for kind in ("node", *site.vectors):
                shape = block_shape(scope, parts, kind)
                scores = torch.full((shape.numel(),), torch.nan, dtype=torch.float32)
                wanted = self._wanted(scope, site.hook, kind, shape)
                chunks = wanted.split(max(1, rows // len(run))) if len(wanted) else ()
                for chunk in progress(chunks, desc=site.hook, verbose=verbose):
                    fall = _fall(scope, run, site, kind, shape, chunk, parts, baselines[site.hook], start)
                    scores[chunk] = scope.sign * fall.float().cpu()
                blocks[site.hook, kind] = scores.reshape(shape).to(parts.nodes.device)
        return values, blocks

    def _wanted(self, scope: Scope, hook: str, kind: str, shape: torch.Size) -> Tensor:
        """Flat indices of the nodes to measure in one block."""
        if self.nodes is None:
            return torch.arange(shape.numel())
        rows = self.nodes[(self.nodes["hook"] == hook) & (self.nodes["kind"] == kind)]
        if not len(rows):
            return torch.arange(0)
        width = shape[-1] if kind == "node" else 1
        position, unit = (torch.tensor(rows[column].to_numpy(copy=True)) for column in ("position", "unit"))
        length = shape.numel() // width
        if scope.positions == "keep" and not bool(((position >= 0) & (position < length)).all()):
            raise SettingsError(
                f"expected positions from 0 to {length - 1} (positions='keep'); got "
                f"{sorted(set(position.tolist()))[:8]}."
            )
        if int(unit.max()) >= width:
            raise SettingsError(f"expected units of {hook} below {width}; got {int(unit.max())}.")
        return position.clamp(min=0) * width + unit.clamp(min=0)


def block_shape(scope: Scope, parts: Parts, kind: str) -> torch.Size:
    """Shape of a block of scores: [pos, unit], [unit], [pos] or [], after the sums that are asked for."""
    shape = list(parts.nodes.shape[1:] if kind == "node" else parts.vectors[kind].shape[1:2])
    if scope.units == "sum" and kind == "node":
        shape[-1] = 1
    return torch.Size(shape[1:] if scope.positions == "sum" else shape)


def _fall(
    scope: Scope,
    batch: Batch,
    site: Site,
    kind: str,
    shape: torch.Size,
    chunk: Tensor,
    parts: Parts,
    baseline: Parts | None,
    start: Tensor,
) -> Tensor:
    """Sum over prompts of start - m(patched), for each node of the chunk."""
    n = len(chunk)
    nodes = _repeat(parts.nodes, n)
    vectors = {name: _repeat(vector, n) for name, vector in parts.vectors.items()}
    for row, (position, unit) in enumerate(_places(scope, shape, chunk, kind)):
        if kind == "node":
            nodes[row][:, position, unit] = 0 if baseline is None else baseline.nodes[:, position, unit]
        else:
            vectors[kind][row][:, position] = 0 if baseline is None else baseline.vectors[kind][:, position]
    patched = Parts(nodes.flatten(0, 1), {name: vector.flatten(0, 1) for name, vector in vectors.items()})
    repeated = batch.repeat(n)
    replace = [(site.hook, lambda value, hook: site.put_together(patched, value))]
    narrow = answers_only(scope.model, repeated, scope.metric)
    with torch.no_grad(), narrow as narrowed, hooked(scope.model, replace):
        metric = measure(scope.metric, run_logits(scope.model, repeated.clean, repeated.attention_mask), narrowed)
    return (start[None] - metric.reshape(n, len(batch))).sum(1)


def _repeat(value: Tensor, n: int) -> Tensor:
    return value[None].expand(n, *value.shape).clone()


def _places(scope: Scope, shape: torch.Size, chunk: Tensor, kind: str) -> Iterator[tuple[slice, slice]]:
    """Position and unit of every node of the chunk, as slices."""
    every = slice(None)
    width = shape[-1] if kind == "node" else 1
    for index in chunk.tolist():
        position, unit = (every, index) if scope.positions == "sum" else divmod(index, width)
        where = position if isinstance(position, slice) else slice(position, position + 1)
        yield where, every if scope.units == "sum" else slice(unit, unit + 1)
