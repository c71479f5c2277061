"""Forward passes compute what is read and no more: the same numbers, and nothing else changed."""

from typing import Any

import pytest
import torch
from torch import Tensor

from tests.families import ModelCase, all_models, random_tokens, typical_models
from tests.loops import for_each
from tests.methods import with_steps
from tests.model_state import unchanged
from tl_neuron_circuits import attribute
from tl_neuron_circuits.bases._runs import answers_only, values_at
from tl_neuron_circuits.tasks import (
    ProbabilityDifference,
    TokenizedPairs,
    answer_log_probability,
    answer_logit,
    logit_difference,
)
from tl_neuron_circuits.tasks._tokenized import Batch

CHOICE = torch.arange(2, 50)
METRICS = (logit_difference, answer_logit, answer_log_probability, ProbabilityDifference(CHOICE))
SOFT_CAPPED = typical_models("gpt2", "gemma2")
NAMES = ("blocks.0.hook_resid_pre", "blocks.0.mlp.hook_post", "blocks.1.mlp.hook_post")
both_classes = pytest.mark.parametrize("case", all_models("gpt2"))


def batch_of(model: Any) -> Batch:
    """Three prompts, read at different positions."""
    tokens = random_tokens(model, batch=3)
    where = torch.tensor([6, 2, 4])
    pairs = TokenizedPairs.from_tokens(tokens, tokens[:, 0], tokens.flip(0), tokens[:, 1], position=where)
    return next(pairs.batches(3))


@pytest.mark.parametrize("case", SOFT_CAPPED)
def test_a_metric_of_ours_sees_the_same_logits(case: ModelCase) -> None:
    model = case.build()
    batch = batch_of(model)
    with torch.no_grad():
        everything = model(batch.clean)
        for metric in METRICS:
            with unchanged(model), answers_only(model, batch, metric) as seen:
                logits = model(batch.clean)
            assert logits.shape == (3, 1, model.cfg.d_vocab)
            torch.testing.assert_close(metric(logits, seen), metric(everything, batch), rtol=1e-9, atol=1e-9)


@both_classes
def test_a_metric_of_the_users_gets_every_position(case: ModelCase) -> None:
    model = case.build()
    batch = batch_of(model)
    with torch.no_grad(), answers_only(model, batch, lambda logits, batch: logits[:, 0, 0]) as seen:
        assert torch.equal(model(seen.clean), model(batch.clean))
    assert seen is batch


@both_classes
@pytest.mark.parametrize("direction", ["fwd_hooks", "bwd_hooks"])
def test_a_hook_at_the_unembedding_sees_every_position(case: ModelCase, direction: str) -> None:
    model = case.build()
    if "unembed.hook_in" not in model.hook_dict:
        pytest.skip("this TransformerLens has no hook point inside the unembedding")
    batch, shapes = batch_of(model), []

    def look(value: Tensor, hook: Any) -> None:
        shapes.append(value.shape)

    with model.hooks(**{direction: [("unembed.hook_in", look)]}), answers_only(model, batch, answer_logit) as seen:
        model(batch.clean)[:, -1].sum().backward()
    assert seen is batch
    assert [shape[:2] for shape in shapes] == [(3, 7)]


@both_classes
@for_each("method", ["relp", "gradient", "integrated_gradients", "patching"])
def test_scores_are_those_of_all_logits(case: ModelCase, method: Any) -> None:
    model = case.build()
    tokens = random_tokens(model, batch=3)
    pairs = TokenizedPairs.from_tokens(tokens, tokens[:, 0], tokens.flip(0), tokens[:, 1])

    def same(logits: Tensor, batch: Batch) -> Tensor:
        return logit_difference(logits, batch)

    narrow, whole = (
        attribute(model, pairs, method=with_steps(method, 2), metric=metric).flat()
        for metric in (logit_difference, same)
    )
    torch.testing.assert_close(narrow, whole, rtol=1e-5, atol=1e-7)


def values_of_whole_run(model: Any, tokens: Tensor, hooks: Any = ()) -> dict[str, Tensor]:
    store: dict[str, Tensor] = {}
    keep = [(name, lambda value, hook, name=name: store.update({name: value.clone()})) for name in NAMES]
    with torch.no_grad(), model.hooks(fwd_hooks=[*hooks, *keep]):
        model(tokens)
    return store


def count_unembeddings(model: Any) -> tuple[list[str], Any]:
    seen: list[str] = []
    return seen, model.unembed.register_forward_hook(lambda *_: seen.append("unembed"))


@pytest.mark.parametrize("case", typical_models("gpt2", "opt"))
def test_values_are_those_values_of_whole_run_and_no_logits_are_computed(case: ModelCase) -> None:
    model = case.build()
    tokens = random_tokens(model)
    twice = [("blocks.0.hook_resid_pre", lambda value, hook: 2 * value)]
    for hooks in ((), twice):
        expected = values_of_whole_run(model, tokens, hooks)
        seen, handle = count_unembeddings(model)
        with unchanged(model):
            found = values_at(model, tokens, NAMES, hooks=hooks)
        handle.remove()
        assert not seen
        assert found.keys() == expected.keys()
        assert all(torch.equal(found[name], expected[name]) for name in NAMES)


@both_classes
def test_offloaded_models_run_to_their_end(case: ModelCase) -> None:
    """accelerate puts weights back after a module's forward pass: it must not be cut short."""
    model = case.build()
    model.unembed._hf_hook = object()
    seen, _ = count_unembeddings(model)
    values_at(model, random_tokens(model), NAMES)
    assert seen == ["unembed"]


@both_classes
def test_what_is_kept_of_a_value_is_the_callers_choice(case: ModelCase) -> None:
    model = case.build()
    tokens = random_tokens(model)
    found = values_at(model, tokens, NAMES, kept=lambda value: value.sum(-1))
    expected = values_of_whole_run(model, tokens)
    assert all(torch.equal(found[name], expected[name].sum(-1)) for name in NAMES)
