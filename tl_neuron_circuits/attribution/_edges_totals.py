"""Total effects of everything in a run on the goals: what circuits choose their nodes by.

    score(n) = (a - a_base) * dG/da under all rules of relevance propagation, through all paths; averaged over prompts

G is the sum of the goals. With a zero baseline the scores of embeddings, positions and biases sum to G.
Source: METHODS 1.2, case studies (zero baseline); pairs take the corrupt prompt as baseline.
"""

from collections.abc import Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from .._errors import PropagationError
from ..models import TransformerLensModel
from ..propagation import biases_in_graph, relp
from ..tasks import Batch
from ._edges_run import PromptRun, run_prompt
from ._goals import Goal


@dataclass(frozen=True)
class Changes:
    """Values minus their baseline: neurons by layer, the embedding, positions, the goals; and the goals themselves."""

    neurons: Sequence[Float[Tensor, "1 pos d_mlp"]]
    embedding: Float[Tensor, "1 pos d_model"]
    positional: Float[Tensor, "1 pos d_model"] | None
    goals: Float[Tensor, " goal"]
    goal_values: Float[Tensor, " goal"]
    paired: bool


@dataclass(frozen=True)
class Totals:
    """Scores and mean values of one prompt, or their mean over prompts. Signs of gate and up come from the values.

    Example:
        >>> import tl_neuron_circuits as tnc
        >>> from tl_neuron_circuits import attribution
        >>> model = tnc.load_demo_model()
        >>> pairs = tnc.PromptPairs(clean=["The dogs near the cat"], answer=[" are"])
        >>> batches = list(tnc.tasks.tokenise(model, pairs).batches(1))
        >>> goals = [attribution.answer_goal(against_wrong=False)]
        >>> found = attribution.mean_totals(model, batches, goals, paired=False)
        >>> len(found.score), tuple(found.score[0].shape)  # by layer: [pos, d_mlp]
        (4, (6, 512))
    """

    score: Sequence[Float[Tensor, "pos d_mlp"]]
    activation: Sequence[Float[Tensor, "pos d_mlp"]]
    change: Sequence[Float[Tensor, "pos d_mlp"]]
    """The activation minus its baseline."""
    gradient: Sequence[Float[Tensor, "pos d_mlp"]]
    gate: Sequence[Float[Tensor, "pos d_mlp"] | None]
    up: Sequence[Float[Tensor, "pos d_mlp"] | None]
    embedding: Float[Tensor, " pos"]
    positional: float
    bias: float
    goals: Float[Tensor, " goal"]
    """Minus their baseline."""
    goal_values: Float[Tensor, " goal"]

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


@dataclass(frozen=True)
class _Baseline:
    """What the corrupt prompt left."""

    run: PromptRun
    goals: Float[Tensor, " goal"]


@torch.no_grad()
def _baseline(model: TransformerLensModel, batch: Batch, goals: Sequence[Goal]) -> _Baseline:
    there = batch.on_corrupt()
    run = run_prompt(model, there, cut=False)
    return _Baseline(run, _goal_values(goals, run, there))


@torch.no_grad()
def _changes(run: PromptRun, values: Float[Tensor, " goal"], base: _Baseline | None) -> Changes:
    """Clean values, minus those of the corrupt prompt where there is one."""
    clean = [value.detach() for value in run.written]
    positional = None if run.positional is None else run.positional.detach()
    if base is None:
        return Changes(clean, run.embedding.detach(), positional, values, values, False)
    return Changes(
        [here - other for here, other in zip(clean, base.run.written, strict=True)],
        run.embedding.detach() - base.run.embedding,
        None,  # the same at every prompt
        values - base.goals,
        values,
        True,
    )


def _goal_values(goals: Sequence[Goal], run: PromptRun, batch: Batch) -> Float[Tensor, " goal"]:
    return torch.stack([goal.value(run, batch).detach().cpu().double() for goal in goals])


def totals(model: TransformerLensModel, batch: Batch, goals: Sequence[Goal], *, paired: bool) -> tuple[Totals, Changes]:
    """Scores of one prompt, and the changes they are of: one forward and one backward pass, two forwards for pairs."""
    if not torch.is_grad_enabled() or torch.is_inference_mode_enabled():
        raise PropagationError(
            "expected gradients to be enabled; call this outside torch.no_grad() and inference_mode()."
        )
    base = _baseline(model, batch, goals) if paired else None
    with relp(model), nullcontext({}) if paired else biases_in_graph(model) as biases:
        run = run_prompt(model, batch, cut=False)
        change = _changes(run, _goal_values(goals, run, batch), base)
        goal = torch.stack([goal.value(run, batch) for goal in goals]).sum()
        inputs = [*run.written, run.embedding, *biases.values()]
        inputs += [] if change.positional is None or run.positional is None else [run.positional]
        gradients = torch.autograd.grad(goal, inputs, allow_unused=True)
    n = len(run.written)
    neurons = [_or_zero(g, value)[0] for g, value in zip(gradients[:n], run.written, strict=True)]
    bias = sum(dot(b, g) for b, g in zip(biases.values(), gradients[n + 1 : n + 1 + len(biases)], strict=True))
    positional = dot(change.positional, gradients[-1]) if change.positional is not None else 0.0
    embedding = wide(change.embedding[0]) * wide(_or_zero(gradients[n], change.embedding)[0])
    found = Totals(
        score=[wide(d[0]) * wide(g) for d, g in zip(change.neurons, neurons, strict=True)],
        activation=[wide(value.detach()[0]) for value in run.written],
        change=[wide(d[0]) for d in change.neurons],
        gradient=[wide(g) for g in neurons],
        gate=[None if v is None else v[0] for v in run.gate],
        up=[None if v is None else v[0] for v in run.up],
        embedding=embedding.sum(-1).cpu().double(),
        positional=positional,
        bias=float(bias),
        goals=change.goals,
        goal_values=change.goal_values,
    )
    return found, change


def _or_zero(gradient: Tensor | None, like: Tensor) -> Tensor:
    return torch.zeros_like(like) if gradient is None else gradient


def wide(tensor: Tensor) -> Tensor:
    """In float32 at least: products of bfloat16 lose what sums need."""
    return tensor if tensor.dtype == torch.float64 else tensor.float()


def dot(value: Tensor, gradient: Tensor | None) -> float:
    """The sum of the products, zero without a gradient."""
    return 0.0 if gradient is None else float((wide(value.detach()) * wide(gradient)).sum().cpu().double())
