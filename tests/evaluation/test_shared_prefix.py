"""Runs from a shared prefix's keys and values give what runs of all positions give."""

from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from typing import Any

import pytest
import torch

from tests.families import ModelCase, all_models
from tests.loops import for_each
from tests.propagation.readings import model_of
from tl_neuron_circuits import TokenizedPairs
from tl_neuron_circuits.bases import HeadOutputs, Neurons
from tl_neuron_circuits.evaluation import SparsityCurve, _shared_prefix, evaluate
from tl_neuron_circuits.evaluation._shared_prefix import SharedPrefix
from tl_neuron_circuits.nodes import attribute
from tl_neuron_circuits.tasks import logit_difference

LENGTH, SHARED = 14, 10
SIZES = [0, 1, 5, 20, 60, 100, 200]


def few_shot_pairs(device: Any = None, *, own: bool = False) -> TokenizedPairs:
    """Six pairs whose first tokens are the same, in all prompts or in those of each pair (`own`)."""
    draws = torch.Generator().manual_seed(3)
    draw = lambda *shape: torch.randint(1, 20, shape, generator=draws)  # noqa: E731
    clean, corrupt, answers = draw(6, LENGTH), draw(6, LENGTH), draw(2, 6)
    clean[:, :SHARED] = clean[:, :SHARED] if own else clean[0, :SHARED]
    corrupt[:, :SHARED] = clean[:, :SHARED]
    corrupt[:, SHARED] = clean[:, SHARED] % 19 + 1
    clean[:, -1] = corrupt[:, -1] = 1
    return TokenizedPairs.from_tokens(clean, answers[0], corrupt, answers[1])


def curves(model: Any, pairs: TokenizedPairs, monkeypatch: pytest.MonkeyPatch, **options: Any) -> list[SparsityCurve]:
    """One from the prefix where that is possible, and one of whole runs."""
    scores = attribute(model, pairs, basis=[Neurons(), HeadOutputs()], method="random")
    first = evaluate(model, pairs, scores, sizes=SIZES, batch_size=4, **options)
    monkeypatch.setattr(_shared_prefix, "_FEWEST_RUNS", 10**6)
    return [first, evaluate(model, pairs, scores, sizes=SIZES, batch_size=4, **options)]


@contextmanager
def counted_positions(model: Any) -> Iterator[list[int]]:
    """The number of positions of every forward pass, read where no hook point is."""
    seen: list[int] = []
    handle = model.get_submodule("blocks.1.mlp").register_forward_pre_hook(
        lambda _, inputs: seen.append(inputs[0].shape[1])
    )
    try:
        yield seen
    finally:
        handle.remove()


@for_each("ablation", ["mean", "resample", "corrupt", "zero"])
@pytest.mark.parametrize("case", all_models("gpt2", "llama", "gemma2", "pythia"))
def test_a_curve_from_the_prefix_is_the_curve(case: ModelCase, ablation: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    model = model_of(case)
    with counted_positions(model) as seen:
        cached, whole = curves(model, few_shot_pairs(own=ablation == "corrupt"), monkeypatch, ablation=ablation)
    short = seen.count(LENGTH - SHARED)
    assert short == 0 if ablation == "zero" else short >= 2 * len(SIZES), f"{short} runs from the prefix"
    for name in ("kept", "removed", "full", "empty"):
        assert torch.allclose(getattr(cached, name), getattr(whole, name), atol=1e-5), name


def test_pairs_that_share_nothing_with_others_have_no_prefix_under_a_mean() -> None:
    model = model_of(next(iter(all_models("gpt2"))).values[0])
    cases: list[tuple[bool, Any, int]] = [
        (False, "mean", 10),
        (True, "mean", 0),
        (True, "corrupt", 10),
        (False, "zero", 0),
    ]
    for own, ablation, length in cases:
        pairs = few_shot_pairs(own=own)
        (batch,) = pairs.batches(8)
        found = SharedPrefix(model, pairs, ablation, logit_difference).length(batch)
        assert found == length, (own, ablation)


def test_hooks_of_the_user_and_their_metrics_get_every_position(monkeypatch: pytest.MonkeyPatch) -> None:
    model = model_of(next(iter(all_models("gpt2"))).values[0])
    own_metric = lambda logits, batch: logit_difference(logits, batch)  # noqa: E731
    name = "blocks.0.hook_mlp_out"
    with counted_positions(model) as seen:
        curves(model, few_shot_pairs(), monkeypatch, metric=own_metric)
        with model.hooks(fwd_hooks=[(name, lambda value, hook: value)]):
            monkeypatch.setattr(_shared_prefix, "_FEWEST_RUNS", 8)
            curves(model, few_shot_pairs(), monkeypatch)
    assert set(seen) == {LENGTH}


def test_a_model_whose_cache_is_wrong_is_run_whole(monkeypatch: pytest.MonkeyPatch) -> None:
    model = model_of(next(iter(all_models("gpt2"))).values[0])
    monkeypatch.setattr(_shared_prefix, "_hooked_transformer_cache", lambda model, first: lambda tokens: {})
    monkeypatch.setattr(_shared_prefix, "_bridge_cache", lambda model: nullcontext(lambda tokens: {}))
    with counted_positions(model) as seen:
        cached, whole = curves(model, few_shot_pairs(), monkeypatch)
    assert seen.count(LENGTH - SHARED) == 1, "only the trial runs without the prefix"
    assert torch.equal(cached.kept, whole.kept)
