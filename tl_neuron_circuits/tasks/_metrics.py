"""Metrics: from logits to one number per prompt, higher is better.

A metric is any callable `metric(logits, batch)` from `Float[Tensor, "batch pos d_vocab"]` and a `Batch` to
`Float[Tensor, "batch"]`. Ours read the logits at `batch.position`, so padding does not touch them, and compute in
float32 at least. On the corrupt run pass `batch.on_corrupt()`: the same answers at that run's positions.
The default, `logit_difference`, does not change when the unembedding is centered; `answer_logit` does.
"""

import functools
from collections.abc import Callable
from dataclasses import dataclass

import torch
from jaxtyping import Float, Int
from torch import Tensor

from .._errors import NumericalError, PairsError, SettingsError
from .._typing import checked
from ..models._protocol import TransformerLensModel
from ._pairs import PromptPairs
from ._tokenize import tokenize
from ._tokenized import Batch

Metric = Callable[[Float[Tensor, "batch pos d_vocab"], Batch], Float[Tensor, " batch"]]


@checked
def logit_difference(logits: Float[Tensor, "batch pos d_vocab"], batch: Batch) -> Float[Tensor, " batch"]:
    """Logit of the answer minus logit of the wrong answer.

    Raises:
        PairsError: the pairs have no wrong answers.

    Example:
        >>> import tl_neuron_circuits as tnc
        >>> model = tnc.load_demo_model()
        >>> pairs = tnc.tasks.subject_verb_agreement("simple", n=8)
        >>> batch = next(tnc.tasks.tokenize(model, pairs).batches(8))
        >>> bool((tnc.tasks.logit_difference(model(batch.clean), batch) > 0).all())
        True
    """
    if batch.wrong_answer is None:
        raise PairsError(
            "the logit difference needs wrong answers, and these pairs have none. "
            "Give wrong_answer=, or choose metric=tnc.tasks.answer_logit or tnc.tasks.answer_log_probability."
        )
    final = read(logits, batch)
    return _pick(final, batch.answer) - _pick(final, batch.wrong_answer)


@checked
def answer_logit(logits: Float[Tensor, "batch pos d_vocab"], batch: Batch) -> Float[Tensor, " batch"]:
    """Logit of the answer.

    Example:
        >>> import tl_neuron_circuits as tnc
        >>> model = tnc.load_demo_model()
        >>> pairs = tnc.tasks.subject_verb_agreement("simple", n=8)
        >>> batch = next(tnc.tasks.tokenize(model, pairs).batches(8))
        >>> tnc.tasks.answer_logit(model(batch.clean), batch).shape
        torch.Size([8])
    """
    return _pick(read(logits, batch), batch.answer)


@checked
def answer_log_probability(logits: Float[Tensor, "batch pos d_vocab"], batch: Batch) -> Float[Tensor, " batch"]:
    """Log-probability of the answer, in nats; not linear in the logits, so relevance is not conserved for it.

    Example:
        >>> import tl_neuron_circuits as tnc
        >>> model = tnc.load_demo_model()
        >>> pairs = tnc.tasks.subject_verb_agreement("simple", n=8)
        >>> batch = next(tnc.tasks.tokenize(model, pairs).batches(8))
        >>> bool((tnc.tasks.answer_log_probability(model(batch.clean), batch) <= 0).all())
        True
    """
    return _pick(read(logits, batch).log_softmax(-1), batch.answer)


@dataclass(frozen=True, eq=False)
class ProbabilityDifference:
    """sum_{y >= answer} p(y) - sum_{y < answer} p(y) over ordered tokens, p their softmax (greater-than; METHODS 4.4).

    `tokens` are in ascending order; the answer of a pair is the smallest right one, so for "17YY to 17" it is YY + 1.

    Raises:
        PairsError: an answer is not among `tokens`.

    Example:
        >>> import tl_neuron_circuits as tnc
        >>> model = tnc.load_demo_model()
        >>> pairs = tnc.tasks.greater_than(4)
        >>> metric = tnc.tasks.ProbabilityDifference.for_years(model, pairs)
        >>> batch = next(tnc.tasks.tokenize(model, pairs).batches(4))
        >>> bool((metric(model(batch.clean), batch) > 0.5).all())
        True
    """

    tokens: Int[Tensor, " choice"]

    @classmethod
    @checked
    def for_years(
        cls, model: TransformerLensModel, pairs: PromptPairs, *, prepend_bos: bool | None = None
    ) -> "ProbabilityDifference":
        """Use the tokens "00" to "99" as they are after the first prompt of `pairs`, or "0" to "9" for decades.

        Raises:
            PairsError: one of these numbers is not one token there.
        """
        digits = len(pairs.answer[0])
        years = [f"{year:0{digits}d}" for year in range(10**digits)] if digits in (1, 2) else [pairs.answer[0]]
        numbers = PromptPairs(clean=[pairs.clean[0]] * len(years), answer=years, made_for=pairs.made_for)
        return cls(tokenize(model, numbers, prepend_bos=prepend_bos).answer)

    def __call__(self, logits: Float[Tensor, "batch pos d_vocab"], batch: Batch) -> Float[Tensor, " batch"]:
        """Return the difference for every row of the batch."""
        final = read(logits, batch)
        found = batch.answer.to(final.device)[:, None] == self.tokens.to(final.device)
        if not found.any(-1).all():
            row = int((~found.any(-1)).nonzero()[0])
            raise PairsError(
                f"pair {int(batch.index[row])}: its answer is token {int(batch.answer[row])}, which is not among the "
                f"{len(self.tokens)} tokens of this metric. Use the pairs of tasks.greater_than."
            )
        right = found.cumsum(-1) > 0
        sign = right.to(final.dtype) * 2 - 1
        return (final[:, self.tokens.to(final.device)].softmax(-1) * sign).sum(-1)


METRICS: dict[str, Metric] = {
    "logit_difference": logit_difference,
    "answer_logit": answer_logit,
    "answer_log_probability": answer_log_probability,
}


def reads_answers_only(metric: Metric) -> bool:
    """Whether the metric reads logits at `batch.position` alone, as ours do; of others nobody knows."""
    return isinstance(metric, ProbabilityDifference) or any(metric is known for known in METRICS.values())


def read(logits: Float[Tensor, "batch pos d_vocab"], batch: Batch) -> Float[Tensor, "batch d_vocab"]:
    """Logits at each row's position, in float32 at least."""
    rows = torch.arange(len(batch), device=logits.device)
    final = logits[rows, batch.position.to(logits.device)]
    return final if final.dtype == torch.float64 else final.float()


def _pick(values: Float[Tensor, "batch d_vocab"], tokens: Int[Tensor, " batch"]) -> Float[Tensor, " batch"]:
    return values.gather(-1, tokens.to(values.device)[:, None])[:, 0]


@checked
def measure(metric: Metric, logits: Float[Tensor, "batch pos d_vocab"], batch: Batch) -> Float[Tensor, " batch"]:
    """`metric(logits, batch)`, checked: one finite floating-point number per row, differentiable if the logits are.

    Raises:
        SettingsError: the metric returned something other than a floating-point tensor [batch], or cut the graph.
        NumericalError: the logits or the metric's values are not finite.
    """
    name, values = metric_name(metric), metric(logits, batch)
    expected = f"metric {name} must return a floating-point tensor of shape [{len(batch)}], one number per prompt"
    if not isinstance(values, Tensor):
        raise SettingsError(f"{expected}, got {type(values).__name__}. Return a tensor: do not call .item().")
    if tuple(values.shape) != (len(batch),) or not values.is_floating_point():
        raise SettingsError(
            f"{expected}, got {values.dtype} of shape {list(values.shape)}. Read the logits at batch.position, and do "
            "not average over prompts."
        )
    if logits.requires_grad and torch.is_grad_enabled() and not values.requires_grad:
        raise SettingsError(
            f"metric {name} is not differentiable: its values do not depend on the logits through torch operations. "
            "Remove .detach(), .argmax(), comparisons and numpy from it, or use method='patching'."
        )
    if not values.isfinite().all():
        rows = batch.index[(~values.isfinite()).to(batch.index.device)].tolist()
        if read(logits, batch).isfinite().all():
            raise NumericalError(
                f"metric {name} returned NaN or inf for pairs {rows[:10]} although the logits are finite. "
                "Check the metric."
            )
        raise NumericalError(
            f"metric {name} returned NaN or inf for pairs {rows[:10]} because the model's logits are not finite. "
            "Check the model, or load it with dtype=torch.float32."
        )
    return values


@checked
def metric_name(metric: Metric) -> str:
    """A name for files and tables: ours by their short names, others as `module.qualified_name`."""
    for name, known in METRICS.items():
        if metric is known:
            return name
    if isinstance(metric, ProbabilityDifference):
        return "probability_difference"
    if isinstance(metric, functools.partial):
        settings = [*map(repr, metric.args), *(f"{key}={value!r}" for key, value in sorted(metric.keywords.items()))]
        return f"{metric_name(metric.func)}({', '.join(settings)})"
    named = metric if hasattr(metric, "__qualname__") else type(metric)
    return f"{named.__module__}.{named.__qualname__}"
