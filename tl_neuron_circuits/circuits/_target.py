"""What a circuit explains: one goal a logit node, each a number read from a run.

Tokens and directions are read from the logits before any soft cap, where relevance is conserved; a token's logit is
taken minus the mean over the vocabulary, so that centering an unembedding changes nothing. A metric is read from the
model's own logits, and what it is not linear in shows as a residual.
"""

from collections.abc import Callable
from dataclasses import dataclass

from jaxtyping import Float
from torch import Tensor

from ..tasks._metrics import Metric, measure, metric_name
from ..tasks._tokenized import Batch
from ._prompt_run import PromptRun


@dataclass(frozen=True)
class Goal:
    """One number that a run gives.

    `linear` in the logits before any soft cap: then its incoming edges sum to it.
    """

    name: str
    value: Callable[[PromptRun, Batch], Float[Tensor, ""]]
    token: int = -1
    linear: bool = True


def token_goal(token: int, name: str) -> Goal:
    """The logit of a token minus the mean logit."""

    def value(run: PromptRun, batch: Batch) -> Float[Tensor, ""]:
        logits = run.raw_logits[0, int(batch.position[0])]
        return logits[token] - logits.mean()

    return Goal(name, value, token)


def difference_goal(token: int, other: int, name: str) -> Goal:
    """The logit of a token minus that of another."""

    def value(run: PromptRun, batch: Batch) -> Float[Tensor, ""]:
        logits = run.raw_logits[0, int(batch.position[0])]
        return logits[token] - logits[other]

    return Goal(name, value, token)


def answer_goal(*, against_wrong: bool) -> Goal:
    """Each pair's answer: its logit minus the wrong answer's, or minus the mean logit."""

    def value(run: PromptRun, batch: Batch) -> Float[Tensor, ""]:
        logits = run.raw_logits[0, int(batch.position[0])]
        other = (
            logits[int(batch.wrong_answer[0])] if batch.wrong_answer is not None and against_wrong else logits.mean()
        )
        return logits[int(batch.answer[0])] - other

    return Goal("logit_difference" if against_wrong else "answer_logit", value)


def direction_goal(direction: Float[Tensor, " d"], name: str, *, of_logits: bool) -> Goal:
    """A direction over the logits, or over what the unembedding reads."""

    def value(run: PromptRun, batch: Batch) -> Float[Tensor, ""]:
        source = run.raw_logits if of_logits else run.final
        return source[0, int(batch.position[0])] @ direction.to(source)

    return Goal(name, value)


def metric_goal(metric: Metric) -> Goal:
    """Any metric of this package, or a callable like one."""
    return Goal(metric_name(metric), lambda run, batch: measure(metric, run.logits, batch)[0], linear=False)
