"""Gradient scores of edges between components: EAP, EAP-IG-inputs and RelP are one sum with three gradients.

    score(u -> v) = (write_u clean - write_u corrupt) . d metric / d (what v reads)

The gradient goes through v alone: it is taken back from v's own output to the stream v reads, so that other readers of
the same stream do not count. EAP takes it on the clean run; EAP-IG-inputs averages it over K points between the clean
and the corrupt embeddings (left sum from the clean end, so K = 1 is EAP); RelP takes it under the rules of relevance
propagation.
Sign: positive supports the answer. Cost: two forwards and a backward per batch and step, plus one per component through
that component alone.
Source: Syed et al. 2023 (EAP); Hanna et al. 2024, arXiv 2403.17806 (EAP-IG); Rezaei Jafari et al. 2025 (RelP);
METHODS 5.3.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from jaxtyping import Float
from torch import Tensor

from ..bases._runs import Values, capture, require_fired, run_logits, run_values
from ..models._protocol import TransformerLensModel
from ..propagation._gradients import gradients_by_name
from ..propagation._relp import relp
from ..tasks._metrics import Metric, measure
from ..tasks._tokenized import Batch
from ._graph import ComponentGraph, split_heads
from ._method import EdgeMethod, EdgeQuestion, EdgeSums
from ._streams import hook_names, paired_streams


@dataclass(frozen=True)
class EAP(EdgeMethod):
    """Edge attribution patching: plain gradients of the clean run. With rules, EAP by relevance propagation.

    Example:
        >>> import tl_neuron_circuits as tnc
        >>> tnc.components.EAP(rules="relp").label
        'eap(rules=relp)'
    """

    name: ClassVar[str] = "eap"
    rules: str | tuple[str, ...] = ()

    def score(self, question: EdgeQuestion) -> EdgeSums:
        """The gradient of the clean run, once per batch."""
        return EdgeSums(_sum_over_batches(question, self.rules, steps=1, label=self.label))


@dataclass(frozen=True)
class RelP(EAP):
    """`EAP` under the rules of relevance propagation.

    Example:
        >>> import tl_neuron_circuits as tnc
        >>> tnc.components.RelP().label
        'relp'
    """

    name: ClassVar[str] = "relp"
    rules: str | tuple[str, ...] = "relp"


@dataclass(frozen=True)
class EAPIGInputs(EdgeMethod):
    """EAP-IG: the gradient averaged over `steps` points between the clean and the corrupt embeddings.

    Example:
        >>> import tl_neuron_circuits as tnc
        >>> tnc.components.EAPIGInputs(steps=10).label
        'eap_ig_inputs(steps=10)'
    """

    name: ClassVar[str] = "eap_ig_inputs"
    steps: int = 5
    rules: str | tuple[str, ...] = ()

    def score(self, question: EdgeQuestion) -> EdgeSums:
        """The mean gradient along the path of the embeddings."""
        self.at_least_one("steps")
        return EdgeSums(_sum_over_batches(question, self.rules, self.steps, self.label))


def _sum_over_batches(
    question: EdgeQuestion, rules: str | tuple[str, ...], steps: int, label: str
) -> Float[Tensor, "source target"]:
    """Scores summed over pairs; the row of the logits and pairs that are not edges mean nothing."""
    model, graph = question.model, question.graph
    scores = torch.zeros(len(graph), len(graph), dtype=torch.float32)
    for batch in question.batches(label):
        clean, corrupt = paired_streams(model, graph, batch)
        change = (clean.writes - corrupt.writes).flatten(1)
        gradient = _mean_gradient(question, batch, rules, steps).flatten(1).to(change)
        part = change.new_zeros(len(graph), len(graph))
        part[:-1] = change @ gradient.T
        scores = scores.to(torch.promote_types(scores.dtype, part.dtype)) + part.cpu()
    return scores


def _mean_gradient(
    question: EdgeQuestion, batch: Batch, rules: str | tuple[str, ...], steps: int
) -> Float[Tensor, "target batch pos d_model"]:
    """Over `steps` points of the embeddings' path, the clean end first; one step is the clean run itself."""
    name, model = "hook_embed", question.model
    ends = [run_values(model, side, [name])[name] for side in (batch, batch.on_corrupt())] if steps > 1 else []
    total: Any = 0
    for step in range(steps):
        hooks: list[Any] = []
        if ends:
            point = torch.lerp(ends[0], ends[1], step / steps)
            hooks = [(name, lambda value, hook, point=point: point.clone().requires_grad_(True))]
        with relp(model, rules):
            total = total + read_gradients(model, question.graph, batch, question.metric, hooks) / steps
    return total


def read_gradients(
    model: TransformerLensModel, graph: ComponentGraph, batch: Batch, metric: Metric, hooks: Sequence[Any] = ()
) -> Float[Tensor, "target batch pos d_model"]:
    """Gradient of the metric's sum at what each component reads, through it alone; zero for the embedding."""
    store: Values = {}
    names = hook_names(graph)
    with model.hooks(fwd_hooks=[*hooks, *(capture(store, name) for name in names)]):
        logits = run_logits(model, batch.clean, batch.attention_mask)
    require_fired(store, names, model)
    total = measure(metric, logits, batch).sum()
    outputs = [c.hook for c in graph.components[1:-1]]
    unique = list(dict.fromkeys(outputs))
    last = graph.components[-1]
    at_output = gradients_by_name(total, {name: store[name] for name in (*unique, last.reads)}, retain_graph=True)
    at_end = at_output[last.reads]
    gradients = [torch.zeros_like(at_end)]
    for component in graph.components[1:-1]:
        output, gradient = store[component.hook], at_output[component.hook]
        if component.kind == "head":
            own_part = split_heads(gradient, graph.n_heads)[:, :, component.head]
            gradient = torch.zeros_like(gradient)  # one hook holds all heads: let this head's part alone go back
            split_heads(gradient, graph.n_heads)[:, :, component.head] = own_part
        (back,) = torch.autograd.grad(output, store[component.reads], gradient, retain_graph=True)
        gradients.append(back)
    return torch.stack([gradient.to(at_end.device) for gradient in (*gradients, at_end)]).detach()
