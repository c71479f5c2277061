"""Forward passes in which every component may read its own version of the residual stream.

The stream that v reads is a sum of what earlier components write (plus attention's output biases), so an edge u -> v is
one summand of one reader. `run_with_edges` gives every reader its own sum: live writes along kept edges, the corrupt
run's writes along the others. What a component computes from that is live for all later ones. Nothing is approximated.
Rows: readers of one hook point (the heads of a layer) are run as copies of the batch, each reading its own stream, of
which only the reader's own output is used.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from .._errors import UnsupportedModelError
from ..bases._runs import run_logits, run_values
from ..models._protocol import TransformerLensModel, submodule
from ..models._threads import hooked
from ..tasks._tokenized import Batch
from ._graph import Component, ComponentGraph, split_heads

OutputWeights = Mapping[int, Float[Tensor, "head d_head d_model"]]


@dataclass(frozen=True, eq=False)
class Streams:
    """One run: what every component but the logits writes, and what each reading point holds beyond that (biases)."""

    writes: Float[Tensor, "source batch pos d_model"]
    rest: Mapping[str, Float[Tensor, "batch pos d_model"]]
    output_weights: OutputWeights

    def of_rows(self, rows: Sequence[int]) -> "Streams":
        """Those of some prompts."""
        index = torch.tensor(list(rows), device=self.writes.device)
        return Streams(self.writes[:, index], {n: t[index] for n, t in self.rest.items()}, self.output_weights)


def _output_weights(model: TransformerLensModel, graph: ComponentGraph) -> OutputWeights:
    """The output matrices of every layer whose heads are nodes, each on its layer's device."""
    layers = {component.layer for component in graph.components if component.kind == "head"}
    modules: dict[int, Any] = {layer: submodule(model, f"blocks.{layer}.attn") for layer in layers}
    weights = {layer: module.W_O.detach() for layer, module in modules.items()}
    return {layer: weight.reshape(graph.n_heads, -1, weight.shape[-1]) for layer, weight in weights.items()}


def hook_names(graph: ComponentGraph) -> list[str]:
    """Every hook point that a component writes to or reads from, once."""
    names = [name for component in graph.components for name in (component.reads, component.hook) if name]
    return list(dict.fromkeys(names))


def _write(component: Component, value: Tensor, weights: OutputWeights, n_heads: int) -> Tensor:
    """What a component adds to the residual stream, from the value at its hook."""
    if component.kind != "head":
        return value
    z = split_heads(value, n_heads)[:, :, component.head]
    return z @ weights[component.layer][component.head].to(z)


def paired_streams(model: TransformerLensModel, graph: ComponentGraph, batch: Batch) -> tuple[Streams, Streams]:
    """Writes and reads on the batch's clean prompts, and on its corrupt ones.

    Raises:
        UnsupportedModelError: a hook point did not fire, or the stream is not a sum of the components' writes.
    """
    return streams(model, graph, batch), streams(model, graph, batch.on_corrupt())


def streams(model: TransformerLensModel, graph: ComponentGraph, batch: Batch) -> Streams:
    """Writes and reads on the batch's clean prompts, gathered where the last of them is read.

    Raises:
        UnsupportedModelError: a hook point did not fire, or the stream is not a sum of the components' writes.
    """
    values, weights = run_values(model, batch, hook_names(graph)), _output_weights(model, graph)
    senders = graph.components[:-1]
    home = values[graph.components[-1].reads].device
    writes = torch.stack([_write(c, values[c.hook], weights, graph.n_heads).to(home) for c in senders])
    rest = {}
    for component in graph.components[1:]:
        if component.reads not in rest:
            before = torch.tensor([sender.stage < component.stage for sender in senders], device=home)
            rest[component.reads] = values[component.reads].to(home) - writes[before].sum(0)
    for name, left in rest.items():  # biases: the same vector at every position of every prompt
        size, spread = values[name].abs().amax(), (left - left[:1, :1]).abs().amax()
        if float(spread) > 1e-3 * float(size):
            raise UnsupportedModelError(
                f"expected the residual stream at {name} to be the sum of components' writes and biases; "
                f"on this {type(model).__name__} it differs by {float(spread):.2g} (values up to {float(size):.2g}). A "
                "norm after attention does this to single heads: use attention='layers'."
            )
    return Streams(writes, rest, weights)


def run_with_edges(
    model: TransformerLensModel,
    graph: ComponentGraph,
    batch: Batch,
    kept: Bool[Tensor, "mask source target"] | Float[Tensor, "mask source target"],
    clean: Streams,
    corrupt: Streams,
) -> Float[Tensor, "mask batch pos d_vocab"]:
    """Logits of the clean prompts with only the edges in `kept` live, once for every mask.

    `kept` covers all components on both sides; entries that are not edges are ignored. Numbers between 0 and 1 mix an
    edge's two writes, and get gradients if they ask for them. Rows of one forward pass: masks x batch x (readers of the
    busiest hook point).
    """
    mixed = _MixedStreams(graph, kept.to(clean.writes.device), clean, corrupt)
    # not by hook.name: TransformerBridge may give a hook another of the point's names than the one it was added under
    hooks = [(name, partial(mixed.read, name)) for name in mixed.readers]
    hooks += [(name, partial(mixed.write, name)) for name in mixed.writers]
    rows = batch.clean.repeat(len(kept) * mixed.copies, 1)
    with torch.set_grad_enabled(kept.requires_grad), hooked(model, hooks):
        logits = run_logits(model, rows)
    return logits.unflatten(0, (len(kept), mixed.copies, len(batch)))[:, 0]


class _MixedStreams:
    """The live writes of one forward pass, filled in as components compute them, mixed with the corrupt run's."""

    def __init__(self, graph: ComponentGraph, kept: Tensor, clean: Streams, corrupt: Streams) -> None:
        self._graph, self._kept, self._clean, self._corrupt = graph, kept, clean, corrupt.writes
        self._live = list(clean.writes[:, None].expand(-1, len(kept), -1, -1, -1))  # [mask batch pos d_model] each
        self.readers: dict[str, list[int]] = {}
        self.writers: dict[str, list[int]] = {}
        for index, component in enumerate(graph.components):
            if component.reads:
                self.readers.setdefault(component.reads, []).append(index)
                if component.hook:
                    self.writers.setdefault(component.hook, []).append(index)
        self.copies = max(len(readers) for readers in self.readers.values())

    def read(self, name: str, value: Tensor, hook: Any) -> Tensor:
        """Let every copy of the rows read the stream of its own component."""
        indices = self.readers[name]
        views = [self._view(index) for index in indices]
        views += [views[0]] * (self.copies - len(views))
        return torch.stack(views, 1).flatten(0, 2).to(value)

    def write(self, name: str, value: Tensor, hook: Any) -> Tensor:
        """Keep each component's output from the copy in which it read its own stream."""
        for index in self.writers[name]:
            component = self._graph.components[index]
            copy = self.readers[component.reads].index(index)
            written = _write(component, value, self._clean.output_weights, self._graph.n_heads)
            self._live[index] = written.unflatten(0, (len(self._kept), self.copies, -1))[:, copy].to(self._corrupt)
        return value

    def _view(self, index: int) -> Tensor:
        component = self._graph.components[index]
        before = [k for k, sender in enumerate(self._graph.components[:-1]) if sender.stage < component.stage]
        kept = self._kept[:, before, index].to(self._corrupt.dtype)
        live = torch.einsum("ks,ksbtd->kbtd", kept, torch.stack([self._live[k] for k in before], 1))
        cut = torch.einsum("ks,sbtd->kbtd", 1 - kept, self._corrupt[before])
        return live + cut + self._clean.rest[component.reads]
