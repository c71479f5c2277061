"""Metrics against their definitions, padding, precision, and the refusals of `measure`."""

import functools
from typing import Any

import pytest
import torch
from torch import Tensor

from tests.loops import for_each
from tl_neuron_circuits._errors import NumericalError, PairsError, SettingsError
from tl_neuron_circuits.tasks import (
    ProbabilityDifference,
    TokenizedPairs,
    answer_log_probability,
    answer_logit,
    logit_difference,
    tokenize,
)
from tl_neuron_circuits.tasks._metrics import METRICS, measure, metric_name
from tl_neuron_circuits.tasks._tokenized import Batch

LENGTHS, D_VOCAB = [2, 4, 3], 11


def setting(dtype: torch.dtype = torch.float64, side: str = "right") -> tuple[Tensor, Batch]:
    """One padded batch of three prompts and random logits for it."""
    prompts = [torch.arange(length) for length in LENGTHS]
    pairs = TokenizedPairs.from_tokens(prompts, torch.tensor([1, 2, 3]), None, torch.tensor([4, 5, 6]))
    (batch,) = pairs.batches(3, equal_length=False, padding_side=side)
    logits = torch.randn(3, 4, D_VOCAB, generator=torch.Generator().manual_seed(0), dtype=dtype)
    return logits, batch


@pytest.mark.parametrize("side", ["left", "right"])
def test_metrics_are_their_definitions_at_the_last_token(side: str) -> None:
    logits, batch = setting(side=side)
    for row, length in enumerate(LENGTHS):
        final = logits[row, 3 if side == "left" else length - 1]
        answer, wrong = final[row + 1], final[row + 4]
        assert logit_difference(logits, batch)[row] == answer - wrong
        assert answer_logit(logits, batch)[row] == answer
        expected = torch.log(torch.exp(answer) / torch.exp(final).sum())
        torch.testing.assert_close(answer_log_probability(logits, batch)[row], expected)


def test_probability_difference_is_its_definition() -> None:
    logits, batch = setting()
    years = torch.tensor([7, 1, 2, 9, 3])  # ascending order is theirs, not that of the ids
    values = measure(ProbabilityDifference(years), logits, batch)
    for row, length in enumerate(LENGTHS):
        p = torch.exp(logits[row, length - 1, years]) / torch.exp(logits[row, length - 1, years]).sum()
        first = years.tolist().index(row + 1)
        torch.testing.assert_close(values[row], sum(p[first:]) - sum(p[:first]))
    with pytest.raises(PairsError, match="pair 0: its answer is token 1, which is not among the 2"):
        ProbabilityDifference(torch.tensor([2, 3]))(logits, batch)


@for_each("metric", [*METRICS.values(), ProbabilityDifference(torch.arange(D_VOCAB))])
def test_half_precision_logits_are_measured_in_float32(metric: Any) -> None:
    logits, batch = setting(torch.bfloat16)
    values = measure(metric, logits, batch)
    assert values.dtype == torch.float32
    torch.testing.assert_close(values, measure(metric, logits.double(), batch).float(), rtol=1e-5, atol=1e-5)


@for_each("metric", [*METRICS.values(), ProbabilityDifference(torch.arange(D_VOCAB))])
def test_gradients_reach_only_the_position_that_is_read(metric: Any) -> None:
    logits, batch = setting()
    logits.requires_grad_(True)
    (gradient,) = torch.autograd.grad(measure(metric, logits, batch).sum(), logits)
    read = torch.zeros(3, 4, dtype=torch.bool)
    read[torch.arange(3), batch.position] = True
    assert (gradient[read] != 0).any(-1).all() and (gradient[~read] == 0).all()


def test_the_logit_difference_needs_wrong_answers() -> None:
    (batch,) = TokenizedPairs.from_tokens(torch.ones(1, 2, dtype=torch.long), torch.tensor([1])).batches(1)
    with pytest.raises(PairsError, match=r"needs wrong answers.*answer_logit"):
        logit_difference(torch.zeros(1, 2, 5), batch)


def mean_over_batch(logits: Tensor, batch: Batch) -> Tensor:
    return logit_difference(logits, batch).mean()


def whole_sequence(logits: Tensor, batch: Batch) -> Tensor:
    return logits[..., 0]


def is_right(logits: Tensor, batch: Batch) -> Tensor:
    return logit_difference(logits, batch) > 0


def detached(logits: Tensor, batch: Batch) -> Tensor:
    return logit_difference(logits, batch).detach()


def item(logits: Tensor, batch: Batch) -> float:
    return logit_difference(logits, batch).mean().item()


@for_each(
    ("metric", "message"),
    [
        (
            mean_over_batch,
            r"mean_over_batch must return a floating-point tensor of shape \[3\].*got torch.float64 of shape \[\]",
        ),
        (whole_sequence, r"got torch.float64 of shape \[3, 4\]"),
        (is_right, r"got torch.bool of shape \[3\]"),
        (detached, "detached is not differentiable"),
        (item, "got float.*do not call .item"),
    ],
)
def test_metrics_that_are_none_are_refused(metric: Any, message: str) -> None:
    logits, batch = setting()
    with pytest.raises(SettingsError, match=message):
        measure(metric, logits.requires_grad_(True), batch)


def test_a_metric_may_be_detached_where_no_gradient_is_asked() -> None:
    logits, batch = setting()
    assert measure(detached, logits, batch).shape == (3,)
    with torch.no_grad():
        assert measure(detached, logits.requires_grad_(True), batch).shape == (3,)


def test_numbers_that_are_not_finite_are_refused_by_pair() -> None:
    logits, batch = setting()
    with pytest.raises(NumericalError, match=r"NaN or inf for pairs \[0, 1, 2\] although the logits are finite"):
        measure(lambda logits, batch: logit_difference(logits, batch) / 0, logits, batch)
    logits[1, 3, 2] = float("nan")
    with pytest.raises(NumericalError, match=r"NaN or inf for pairs \[1\] because the model's logits are not finite"):
        measure(logit_difference, logits, batch)


def test_names_are_stable() -> None:
    assert [metric_name(metric) for metric in METRICS.values()] == list(METRICS)
    assert metric_name(ProbabilityDifference(torch.arange(3))) == "probability_difference"
    assert metric_name(is_right) == f"{__name__}.is_right"
    scaled = functools.partial(is_right, scale=2)
    assert metric_name(scaled) == f"{__name__}.is_right(scale=2)"


def test_a_metric_reads_a_real_model_the_same_padded_or_not(word_model: Any) -> None:
    from tl_neuron_circuits.tasks import PromptPairs

    pairs = PromptPairs(
        clean=["The key", "The boys that the girl admires", "The key on the table"],
        answer=[" is", " were", " is"],
        wrong_answer=[" are", " was", " are"],
    )
    tokens = tokenize(word_model, pairs)
    alone = torch.cat([measure(logit_difference, word_model(b.clean), b) for b in tokens.batches(1)])
    index = torch.cat([b.index for b in tokens.batches(1)])
    (batch,) = tokens.batches(3, equal_length=False, padding_side="right")
    padded = measure(logit_difference, word_model(batch.clean, attention_mask=batch.attention_mask), batch)
    torch.testing.assert_close(padded[index], alone, rtol=1e-6, atol=1e-6)
