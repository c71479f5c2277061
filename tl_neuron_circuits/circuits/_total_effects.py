"""Scores of every node that may enter a circuit: one forward and one backward pass for a batch of prompts.

    score(n) = (a_n - a_n,base) * dG / d a_n        through all paths: what circuits choose their nodes by

G is the sum of the targets (`_targets.py`). The forward pass runs under the rules of relevance propagation, and its
slots write leaves (`_prompt_graph.run_prompt`, `_slots.py`). With a zero baseline the scores of neurons, embeddings,
positions, biases and errors sum to G; for pairs the baseline is the corrupt prompt, one forward pass more, and biases
cancel. Prompts of a batch do not touch each other; biases are no prompt's own, so prompts share a batch only where none
has a part (`can_share`). The open prompt, graph and all, is what edges are computed from (`_direct_effects.py`).
Source: Arora et al. 2026, arXiv 2601.22594; METHODS 1.2, 1.5.
"""

from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, replace
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from .._errors import PropagationError, SettingsError
from .._progress import show_batches
from ..models._protocol import TransformerLensModel
from ..propagation._biases import bias_parameters, biases_in_graph
from ..propagation._relp import relp
from ..tasks._tokenized import Batch
from ._alignment import Alignment
from ._prompt_graph import Paths, PromptRun, find_paths, run_prompt
from ._slots import NeuronSlot, Slot, SlotChange, by_position, node_gradient, widened
from ._targets import Target, goal_positions

Targets = Sequence[Target] | Callable[[Float[Tensor, " d_vocab"]], Sequence[Target]]
"""Targets, or what finds them from the logits of the next token."""


@dataclass(frozen=True)
class Totals:
    """Scores and mean values of one prompt, or their mean over prompts. Signs of gate and up come from the values.

    Lists have one entry per slot, each as wide as its slot has units.
    """

    score: Sequence[Float[Tensor, "pos _"]]
    activation: Sequence[Float[Tensor, "pos _"]]
    change: Sequence[Float[Tensor, "pos _"]]
    """The activation minus its baseline."""
    gradient: Sequence[Float[Tensor, "pos _"]]
    gate: Sequence[Float[Tensor, "pos _"] | None]
    up: Sequence[Float[Tensor, "pos _"] | None]
    errors: Sequence[Float[Tensor, " rest"] | None]
    """Scores of the error nodes."""
    embedding: Float[Tensor, " token"]
    positional: float
    bias: float
    target_changes: Float[Tensor, " target"]
    """The targets minus their baseline: their scores."""
    target_values: Float[Tensor, " target"]
    probabilities: Float[Tensor, "goal d_vocab"]
    """Of the next token, at every position where a target is read (`goal_positions`)."""

    @property
    def target(self) -> float:
        """What the scores are shares of."""
        return float(self.target_changes.sum())

    def aligned(self, alignment: Alignment | None) -> "Totals":
        """Numbers of tokens that share a place added up."""
        if alignment is None or alignment.is_identity:
            return self

        def add(values: Tensor | None, where: Tensor, n: int) -> Any:
            if values is None:
                return None
            return values.new_zeros(n, *values.shape[1:]).index_add_(0, where.to(values.device), values)

        names = ("score", "activation", "change", "gradient", "gate", "up")
        columns: Any = {
            name: [add(values, alignment.place, alignment.n_places) for values in getattr(self, name)] for name in names
        }
        return replace(
            self,
            **columns,
            errors=[add(values, alignment.rest, alignment.n_rests) for values in self.errors],
            embedding=add(self.embedding, alignment.token, alignment.n_tokens),
        )

    def plus(self, other: "Totals") -> "Totals":
        """The sum, number by number."""
        add = lambda a, b: None if a is None or b is None else a + b  # noqa: E731
        sums: Any = {
            name: list(map(add, mine, theirs)) if isinstance(mine, list) else mine + theirs
            for (name, mine), theirs in zip(vars(self).items(), vars(other).values(), strict=True)
        }
        return Totals(**sums)

    def divided_by(self, n: int) -> "Totals":
        """Every number divided by `n`."""
        share = lambda tensors: [None if t is None else t / n for t in tensors]  # noqa: E731
        means: Any = {k: share(v) if isinstance(v, list) else v / n for k, v in vars(self).items()}
        return Totals(**means)


@dataclass(frozen=True, eq=False)
class OpenPrompt:
    """One prompt, or several of one length, while their graph stands."""

    run: PromptRun
    slots: Sequence[Slot]
    paths: Paths
    targets: Sequence[Target]
    values: Float[Tensor, "prompt target"]
    """Of the targets, with their past."""
    biases: Sequence[Tensor]
    batch: Batch
    paired: bool
    changes: Sequence[SlotChange]
    """Values minus their baseline, by slot; so are the three below."""
    embedding: Float[Tensor, "prompt pos d_model"]
    positional: Float[Tensor, "1 pos d_model"] | None
    target_changes: Float[Tensor, "prompt target"]


@contextmanager
def open_prompt(
    model: TransformerLensModel,
    batch: Batch,
    slots: Sequence[Slot],
    targets: Targets,
    *,
    paired: bool,
    keep: Iterable[str] = (),
) -> Iterator[OpenPrompt]:
    """Run a batch with a graph, and its corrupt prompts without one for pairs.

    `keep` names hook points whose tensors of the graph the caller wants.

    Raises:
        PropagationError: gradients are disabled.
    """
    if not torch.is_grad_enabled() or torch.is_inference_mode_enabled():
        raise PropagationError(
            "expected gradients to be enabled; call this outside torch.no_grad() and inference_mode()."
        )
    corrupt, base, position = batch.on_corrupt() if paired else None, None, int(batch.position[0])
    if len(batch) > 1 and not can_share(model, slots, paired=paired):
        raise SettingsError("expected one prompt at a time: biases have parts here, which no prompt has to itself.")
    if corrupt is not None:
        with torch.no_grad():
            base = run_prompt(model, corrupt, slots)
    with relp(model), nullcontext({}) if paired else biases_in_graph(model) as bias_of_name:
        run, biases = run_prompt(model, batch, slots, keep), list(bias_of_name.values())
        found = targets(run.logits[0, position].detach()) if callable(targets) else targets
        values = _target_values(found, run, batch)
        target_changes, embedding = values.detach().cpu().double(), run.embedding.detach()
        positional = None if run.positional is None else run.positional.detach()
        base_slots: list[Any] = [None] * len(slots)
        if base is not None and corrupt is not None:
            base_values = _target_values(found, base, corrupt)
            target_changes, embedding = target_changes - base_values.cpu().double(), embedding - base.embedding
            positional, base_slots = None, list(base.slots)  # positional embeddings are the same on every prompt
        with torch.no_grad():
            changes = [slot.change(own, other) for slot, own, other in zip(slots, run.slots, base_slots, strict=True)]
        yield OpenPrompt(
            run, slots, find_paths(run, slots, values, biases, positional=positional is not None), found, values,
            biases, batch, paired, changes, embedding, positional, target_changes,
        )  # fmt: skip


def _target_values(targets: Sequence[Target], run: PromptRun, batch: Batch) -> Float[Tensor, "prompt target"]:
    rows = [(run.row(row), own) for row, own in enumerate(batch.split(1))]
    return torch.stack([torch.stack([target.value(*row) for target in targets]) for row in rows])


def total_effects(prompt: OpenPrompt) -> list[Totals]:
    """Scores of each prompt: one backward pass.

    Where a dictionary has the nodes of a layer, paths go through its features, each frozen as firing or not, and
    through its skip, not through the MLP itself: the gradient of the local replacement model.
    """
    run, slots, changes = prompt.run, prompt.slots, prompt.changes
    gradients = prompt.paths.total(slots)
    at_sources = [by_position(gradients.get(("slot", i), torch.zeros_like(s.source))) for i, s in enumerate(run.slots)]
    bias = sum(_dot(bias, gradients.get(("bias", i))) for i, bias in enumerate(prompt.biases))
    nodes = [node_gradient(slots, index, dict(enumerate(at_sources))) for index in range(len(slots))]
    if not prompt.paired and prompt.embedding.shape[0] == 1:  # prompts that share a batch have no biases
        bias += sum(s.bias_score(r, g, n) for s, r, g, n in zip(slots, run.slots, at_sources, nodes, strict=True))
    at_embedding = gradients.get(("embedding", 0), torch.zeros_like(prompt.embedding))
    score = [widened(change.nodes) * g for change, g in zip(changes, nodes, strict=True)]
    errors = [
        None if c.error is None else (widened(c.error) * g.to(c.error)).sum(-1).cpu().double()
        for c, g in zip(changes, at_sources, strict=True)
    ]
    embedding = (widened(prompt.embedding) * widened(at_embedding)).sum(-1).cpu().double()
    positional = 0.0 if prompt.positional is None else _dot(prompt.positional, gradients.get(("positional", 0)))
    totals = []
    for row in range(len(embedding)):
        own = slice(row * embedding.shape[1], (row + 1) * embedding.shape[1])
        goals = goal_positions(prompt.targets, int(prompt.batch.position[row]))
        totals.append(
            Totals(
                score=[values[own] for values in score],
                activation=[widened(slot.nodes[own]) for slot in run.slots],
                change=[widened(change.nodes[own]) for change in changes],
                gradient=[values[own] for values in nodes],
                gate=[None if slot.gate is None else slot.gate[own] for slot in run.slots],
                up=[None if slot.up is None else slot.up[own] for slot in run.slots],
                errors=[None if values is None else values[own] for values in errors],
                embedding=embedding[row],
                positional=positional,
                bias=float(bias),
                target_changes=prompt.target_changes[row],
                target_values=prompt.values[row].detach().cpu().double(),
                probabilities=run.logits[row, goals].detach().float().softmax(-1).cpu(),
            )
        )
    return totals


def mean_totals(
    model: TransformerLensModel, batches: Sequence[Batch], targets: Sequence[Target], *, paired: bool,
    slots: Sequence[Slot], alignments: Sequence[Alignment] | None = None, verbose: bool | None = False,
) -> Totals:  # fmt: skip
    """Total effects on the targets' sum, averaged over prompts."""
    sums = None
    for own in each_totals(model, batches, targets, paired=paired, slots=slots, alignments=alignments, verbose=verbose):
        sums = own if sums is None else sums.plus(own)
    assert sums is not None
    return sums.divided_by(sum(map(len, batches)))


def each_totals(
    model: TransformerLensModel, batches: Sequence[Batch], targets: Sequence[Target], *, paired: bool,
    slots: Sequence[Slot], alignments: Sequence[Alignment] | None = None, verbose: bool | None = False,
) -> Iterator[Totals]:  # fmt: skip
    """Total effects of each prompt, at its places."""
    for batch in show_batches(batches, sum(map(len, batches)), verbose=verbose, desc="scores"):
        with open_prompt(model, batch, slots, targets, paired=paired) as prompt:
            own = total_effects(prompt)
        for total, index in zip(own, batch.index.tolist(), strict=True):
            yield total.aligned(None if alignments is None else alignments[index])


def can_share(model: TransformerLensModel, slots: Sequence[Slot], *, paired: bool) -> bool:
    """Whether prompts may share a batch: biases and positional embeddings, which are no prompt's own, have no part."""
    if paired:
        return True
    if model.cfg.positional_embedding_type == "standard" or not all(isinstance(slot, NeuronSlot) for slot in slots):
        return False
    return not any(bool(bias.any()) for bias in bias_parameters(model).values())  # zeros where the model has none


def _dot(value: Tensor, gradient: Tensor | None) -> float:
    """The sum of the products, zero without a gradient."""
    return 0.0 if gradient is None else float((widened(value.detach()) * widened(gradient)).sum().cpu().double())
