"""Total effects of everything in a run on the goals: what circuits choose their nodes by.

    score(n) = (a - a_base) * dG/da under all rules of relevance propagation, through all paths; averaged over prompts

G is the sum of the goals. Where a dictionary has the nodes of a layer, paths go through its features, each frozen as
firing or not, and through its skip, not through the MLP itself: the gradient of the local replacement model. With a
zero baseline the scores of embeddings, positions, biases and errors sum to G.
Source: METHODS 1.2, case studies (zero baseline), 4.5 (local replacement); pairs take the corrupt prompt as baseline.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from ..tasks._tokenized import Batch
from ._paths import Paths
from ._prompt_run import PromptRun
from ._slot import Slot, SlotChange, wide
from ._target import Goal


@dataclass(frozen=True)
class Changes:
    """Values minus their baseline: nodes by slot, the embedding, positions, the goals; and the goals themselves."""

    slots: Sequence[SlotChange]
    embedding: Float[Tensor, "1 pos d_model"]
    positional: Float[Tensor, "1 pos d_model"] | None
    goals: Float[Tensor, " goal"]
    goal_values: Float[Tensor, " goal"]
    paired: bool


@dataclass(frozen=True)
class Totals:
    """Scores and mean values of one prompt, or their mean over prompts. Signs of gate and up come from the values.

    Lists have one entry a slot, each as wide as its slot has units.
    """

    score: Sequence[Float[Tensor, "pos _"]]
    activation: Sequence[Float[Tensor, "pos _"]]
    change: Sequence[Float[Tensor, "pos _"]]
    """The activation minus its baseline."""
    gradient: Sequence[Float[Tensor, "pos _"]]
    gate: Sequence[Float[Tensor, "pos _"] | None]
    up: Sequence[Float[Tensor, "pos _"] | None]
    errors: Sequence[Float[Tensor, " pos"] | None]
    """Scores of the error nodes."""
    embedding: Float[Tensor, " pos"]
    positional: float
    bias: float
    goals: Float[Tensor, " goal"]
    """Minus their baseline."""
    goal_values: Float[Tensor, " goal"]
    probabilities: Float[Tensor, " d_vocab"]
    """Of the next token."""

    def plus(self, other: "Totals") -> "Totals":
        """The sum, number by number."""
        mine, theirs = vars(self), vars(other)
        sums: Any = {k: _add(v, theirs[k]) if isinstance(v, list) else v + theirs[k] for k, v in mine.items()}
        return Totals(**sums)

    def over(self, n: int) -> "Totals":
        """Every number divided by `n`."""
        share = lambda tensors: [None if t is None else t / n for t in tensors]  # noqa: E731
        means: Any = {k: share(v) if isinstance(v, list) else v / n for k, v in vars(self).items()}
        return Totals(**means)


def _add(some: Sequence[Tensor | None], others: Sequence[Tensor | None]) -> list:
    return [None if a is None or b is None else a + b for a, b in zip(some, others, strict=True)]


@torch.no_grad()
def changes(
    slots: Sequence[Slot], run: PromptRun, values: Float[Tensor, " goal"], base: PromptRun | None,
    base_values: Float[Tensor, " goal"] | None,
) -> Changes:  # fmt: skip
    """Clean values, minus those of the corrupt prompt where there is one."""
    values = values.cpu().double()
    others = [None] * len(slots) if base is None else base.slots
    found = [slot.change(here, other) for slot, here, other in zip(slots, run.slots, others, strict=True)]
    if base is None or base_values is None:
        positional = None if run.positional is None else run.positional.detach()
        return Changes(found, run.embedding.detach(), positional, values, values, False)
    # Positional embeddings are the same at every prompt.
    return Changes(found, run.embedding.detach() - base.embedding, None, values - base_values, values, True)


def goal_values(goals: Sequence[Goal], run: PromptRun, batch: Batch) -> Float[Tensor, " goal"]:
    """The goals, with their past."""
    return torch.stack([goal.value(run, batch) for goal in goals])


def totals(
    run: PromptRun, paths: Paths, slots: Sequence[Slot], change: Changes, biases: Sequence[Tensor], position: int
) -> Totals:
    """Scores of one prompt: one backward pass. Goals are read at `position`."""
    gradients = paths.total(slots)
    at_sources = [_or_zero(gradients.get(("slot", i)), s.source)[0].flatten(1) for i, s in enumerate(run.slots)]
    bias = sum(dot(bias, gradients.get(("bias", i))) for i, bias in enumerate(biases))
    if not change.paired:
        bias += sum(s.bias_score(r, g) for s, r, g in zip(slots, run.slots, at_sources, strict=True))
    nodes = [slot.node_gradient(gradient) for slot, gradient in zip(slots, at_sources, strict=True)]
    at_embedding = _or_zero(gradients.get(("embedding", 0)), change.embedding)
    return Totals(
        score=[wide(d.nodes) * g for d, g in zip(change.slots, nodes, strict=True)],
        activation=[wide(slot.nodes) for slot in run.slots],
        change=[wide(d.nodes) for d in change.slots],
        gradient=nodes,
        gate=[None if v is None else v[0] for v in run.gate],
        up=[None if v is None else v[0] for v in run.up],
        errors=[_error_score(d, g) for d, g in zip(change.slots, at_sources, strict=True)],
        embedding=(wide(change.embedding[0]) * wide(at_embedding[0])).sum(-1).cpu().double(),
        positional=0.0 if change.positional is None else dot(change.positional, gradients.get(("positional", 0))),
        bias=float(bias),
        goals=change.goals,
        goal_values=change.goal_values,
        probabilities=run.logits[0, position].detach().float().softmax(-1).cpu(),
    )


def _error_score(change: SlotChange, gradient: Tensor) -> Float[Tensor, " pos"] | None:
    if change.error is None:
        return None
    return (wide(change.error) * gradient.to(change.error)).sum(-1).cpu().double()


def _or_zero(gradient: Tensor | None, like: Tensor) -> Tensor:
    return torch.zeros_like(like) if gradient is None else gradient


def dot(value: Tensor, gradient: Tensor | None) -> float:
    """The sum of the products, zero without a gradient."""
    return 0.0 if gradient is None else float((wide(value.detach()) * wide(gradient)).sum().cpu().double())
