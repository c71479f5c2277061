"""Gradient scores of edges between components: EAP, EAP-IG-inputs and RelP are one sum with three gradients.

    score(u -> v) = (write_u clean - write_u corrupt) . d metric / d (what v reads)

The gradient goes through v alone: it is taken back from v's own output to the stream v reads, so that other readers of
the same stream do not count. EAP takes it on the clean run; EAP-IG-inputs averages it over K points between the corrupt
and the clean embeddings, corrupt + k/K (clean - corrupt) with k = 0 .. K-1, as EAP-IG's code sums; `start="clean"` sums
from the other end, so that K = 1 is EAP (at 5 steps they differ by about .1 of the scores, and meet as K grows); RelP
takes it under the rules of relevance propagation. A head's score is the sum of those through its q, k and v
(`split_qkv`).
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

from .._errors import SettingsError
from ..bases._runs import Values, capture, require_fired, run_logits, run_values
from ..models._protocol import TransformerLensModel
from ..models._threads import hooked
from ..propagation._gradients import gradients_by_name
from ..propagation._relp import relp
from ..tasks._metrics import Metric, measure
from ..tasks._tokenized import Batch
from ._graph import Component, ComponentGraph, split_heads
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
        return _sum_over_batches(question, self.rules, 1, "clean", self.label)


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
    """EAP-IG: the gradient averaged over `steps` points between the corrupt and the clean embeddings.

    `start` is the end that is among the points: "corrupt" as in EAP-IG's code, or "clean".

    Example:
        >>> import tl_neuron_circuits as tnc
        >>> tnc.components.EAPIGInputs(steps=10).label
        'eap_ig_inputs(steps=10)'
    """

    name: ClassVar[str] = "eap_ig_inputs"
    steps: int = 5
    rules: str | tuple[str, ...] = ()
    start: str = "corrupt"

    def score(self, question: EdgeQuestion) -> EdgeSums:
        """The mean gradient along the path of the embeddings."""
        self.at_least_one("steps")
        if self.start not in ("corrupt", "clean"):
            raise SettingsError(f"expected start='corrupt' or 'clean' of {self.name}; got {self.start!r}.")
        return _sum_over_batches(question, self.rules, self.steps, self.start, self.label)


def _sum_over_batches(
    question: EdgeQuestion, rules: str | tuple[str, ...], steps: int, start: str, label: str
) -> EdgeSums:
    """Scores summed over pairs; the row of the logits and pairs that are not edges mean nothing."""
    model, graph, n = question.model, question.graph, len(question.graph)
    scores = torch.zeros(4 if question.split_qkv else 1, n, n, dtype=torch.float32)
    for batch in question.batches(label):
        clean, corrupt = paired_streams(model, graph, batch)
        change = (clean.writes - corrupt.writes).flatten(1)
        gradient = _mean_gradient(question, batch, rules, steps, start).flatten(2).to(change)
        part = change.new_zeros(scores.shape)
        part[:, :-1] = torch.einsum("sd,btd->bst", change, gradient)
        scores = scores.to(torch.promote_types(scores.dtype, part.dtype)) + part.cpu()
    return EdgeSums(scores[0], qkv=scores[1:] if question.split_qkv else None)


def _mean_gradient(
    question: EdgeQuestion, batch: Batch, rules: str | tuple[str, ...], steps: int, start: str
) -> Float[Tensor, "part target batch pos d_model"]:
    """Over `steps` points of the embeddings' path from its start; one step from the clean end is the clean run itself.

    The first part is whole; the others, where heads are split, are through q, k and v alone.
    """
    name, model = "hook_embed", question.model
    sides = (batch, batch.on_corrupt()) if start == "clean" else (batch.on_corrupt(), batch)
    along = steps > 1 or start == "corrupt"
    ends = [run_values(model, side, [name])[name] for side in sides] if along else []
    total: Any = 0
    for step in range(steps):
        hooks: list[Any] = []
        if ends:
            point = torch.lerp(ends[0], ends[1], step / steps)
            hooks = [(name, lambda value, hook, point=point: point.clone().requires_grad_(True))]
        with relp(model, rules):
            found = read_gradients(model, question.graph, batch, question.metric, hooks, split=question.split_qkv)
            total = total + found / steps
    return total


def read_gradients(
    model: TransformerLensModel, graph: ComponentGraph, batch: Batch, metric: Metric, hooks: Sequence[Any] = (),
    *, split: bool = False,
) -> Float[Tensor, "part target batch pos d_model"]:  # fmt: skip
    """Gradient of the metric's sum at what each component reads, through it alone; zero for the embedding.

    With `split` three parts follow: through q, k and v of each head alone, zero for other components.
    """
    store: Values = {}
    layers = sorted({c.layer for c in graph.components if c.kind == "head"}) if split else []
    names = [*hook_names(graph), *(f"blocks.{layer}.attn.hook_{letter}" for layer in layers for letter in "qkv")]
    with hooked(model, [*hooks, *(capture(store, name) for name in names)]):
        logits = run_logits(model, batch.clean, batch.attention_mask)
    require_fired(store, names, model)
    total = measure(metric, logits, batch).sum()
    outputs = [c.hook for c in graph.components[1:-1]]
    unique = list(dict.fromkeys(outputs))
    last = graph.components[-1]
    at_output = gradients_by_name(total, {name: store[name] for name in (*unique, last.reads)}, retain_graph=True)
    at_end = at_output[last.reads]
    gradients = [torch.zeros_like(at_end)]
    apart = [[torch.zeros_like(at_end)] for _ in range(3 if split else 0)]
    for component in graph.components[1:-1]:
        output, gradient = store[component.hook], at_output[component.hook]
        if component.kind == "head":
            own_part = split_heads(gradient, graph.n_heads)[:, :, component.head]
            gradient = torch.zeros_like(gradient)  # one hook holds all heads: let this head's part alone go back
            split_heads(gradient, graph.n_heads)[:, :, component.head] = own_part
        read = {component.reads: store[component.reads]}
        back = gradients_by_name(output, read, seed=gradient, retain_graph=True)[component.reads]
        gradients.append(back)
        branches = _through_qkv(store, component, output, gradient) if component.kind == "head" else []
        for part, branch in zip(apart, branches or [torch.zeros_like(back)] * len(apart), strict=True):
            part.append(branch)
    last_part = [at_end, *(torch.zeros_like(at_end) for _ in apart)]
    parts = [[*part, end] for part, end in zip([gradients, *apart], last_part, strict=True)]
    return torch.stack([torch.stack([one.to(at_end.device) for one in part]) for part in parts]).detach()


def _through_qkv(store: Values, component: Component, output: Tensor, gradient: Tensor) -> list[Tensor]:
    """The gradient at what a head reads, through its q, k and v; empty where they were not kept.

    A rule that holds attention patterns fixed cuts q and k off: nothing comes back through them.
    """
    names = [f"blocks.{component.layer}.attn.hook_{letter}" for letter in "qkv"]
    stream = store[component.reads]
    if any(name not in store for name in names):
        return []
    live = [store[name] for name in names if store[name].requires_grad]
    at_live = torch.autograd.grad(output, live, gradient, retain_graph=True, allow_unused=True)
    at = dict(zip([name for name in names if store[name].requires_grad], at_live, strict=True))
    branches = []
    for name in names:
        back = None
        if at.get(name) is not None:
            (back,) = torch.autograd.grad(store[name], stream, at[name], retain_graph=True, allow_unused=True)
        branches.append(torch.zeros_like(stream) if back is None else back)
    return branches
