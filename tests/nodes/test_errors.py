"""What `attribute` refuses, in words; and that it leaves nothing on the model, whether it returns or raises."""

from collections.abc import Callable
from contextlib import AbstractContextManager
from typing import Any

import pytest
import torch
from torch import Tensor

from tests.families import ModelCase, all_models, unsupported_models
from tests.loops import for_each
from tests.methods import with_steps
from tests.nodes.plain import random_pairs
from tests.propagation.readings import model_of, settled
from tl_neuron_circuits import RelP
from tl_neuron_circuits._errors import (
    NumericalError,
    PairsError,
    PropagationError,
    SettingsError,
    UnsupportedModelError,
)
from tl_neuron_circuits._typing import ArgumentError
from tl_neuron_circuits.bases import MLPOutputs, Neurons
from tl_neuron_circuits.nodes import attribute
from tl_neuron_circuits.tasks import PromptPairs, TokenizedPairs, logit_difference

Untouched = Callable[[Any], AbstractContextManager[None]]
models = pytest.mark.parametrize("case", all_models("gpt2"))
METHODS = (
    *("relp", "gradient", "integrated_gradients", "integrated_gradients_inputs", "patching"),
    *("learned_mask", "mask_gradient", "activation_difference", "random"),
)


def fails(logits: Tensor, batch: Any) -> Tensor:
    raise KeyboardInterrupt


@for_each("method", METHODS)
@models
def test_nothing_is_left_on_the_model(case: ModelCase, method: Any, untouched: Untouched) -> None:
    """After a result, and after Ctrl-C in the metric; parameters get no gradient."""
    model, pairs = model_of(case), random_pairs(4, 4)
    settings = {"method": with_steps(method, 2), "basis": Neurons(layers=[1])}
    with untouched(model):
        scores = attribute(model, pairs, **settings)
        if method not in ("activation_difference", "random"):
            with pytest.raises(KeyboardInterrupt):
                attribute(model, pairs, metric=fails, **settings)
    assert scores.flat().isfinite().all() and scores.settings["method_options"]["name"] == method
    assert all(parameter.grad is None for parameter in torch.nn.Module.parameters(model))


@models
def test_frozen_and_training_models_stay_so(case: ModelCase, untouched: Untouched) -> None:
    model = settled(case.build())
    expected = attribute(model, random_pairs(4, 4)).flat()
    for index, parameter in enumerate(torch.nn.Module.parameters(model)):
        parameter.requires_grad_(index % 2 == 0)
    with untouched(model):
        assert torch.equal(attribute(model, random_pairs(4, 4)).flat(), expected)


@for_each("method", [name for name in METHODS if name != "random"])
@models
def test_no_corrupt_prompts_is_an_error_where_they_are_needed(case: ModelCase, method: Any) -> None:
    model, pairs = model_of(case), random_pairs(4, 4, corrupt=False)
    with pytest.raises(PairsError, match=r"these pairs have none. Give corrupt=, or baseline='zero' or 'mean'"):
        attribute(model, pairs, method=method)
    assert attribute(model, pairs, method=with_steps(method, 2), baseline="zero").flat().isfinite().all()


@models
def test_lengths_that_do_not_fit_are_listed(case: ModelCase) -> None:
    model, pairs = model_of(case), random_pairs(4, 5, 4)
    with pytest.raises(PairsError, match=r"prompts of one token length; got \{4: 2, 5: 1\}.*positions='sum'"):
        attribute(model, pairs)
    uneven = TokenizedPairs.from_tokens(
        pairs.clean, pairs.answer, pairs.corrupt[::-1][:2] + pairs.clean[:1], pairs.answer + 1
    )
    with pytest.raises(PairsError, match=r"pair 1: clean has 5 tokens and corrupt 4"):
        attribute(
            model, TokenizedPairs.from_tokens(pairs.clean[:2], pairs.answer[:2], pairs.clean[:1] * 2), positions="sum"
        )
    assert len(uneven) == 3


@for_each(
    ("message", "settings"),
    [
        ("at least 1; got 0", {"method": "integrated_gradients(steps=0)"}),
        ("batch_size to be at least 1", {"batch_size": 0}),
        ("at least one rule for RelP", {"method": RelP(rules=())}),
        ("options of gradient out of", {"method": "gradient(rules=ln)"}),
        ("expected a method out of", {"method": "relevance"}),
        ("a number for steps", {"method": "integrated_gradients(steps=many)"}),
        ("needs baseline='corrupt'", {"direction": "denoising", "baseline": "zero"}),
        ("one of the methods relp, gradient, patching", {"direction": "denoising", "method": "integrated_gradients"}),
        ("not to a mean", {"method": "integrated_gradients_inputs", "baseline": "mean"}),
        ("expected rules out of", {"method": "relp(rules=halve+ln)"}),
        ("expected a stabilizer between 0 and 1", {"method": RelP(stabilizer=2.0)}),
        (r"expected layers between 0 and 1; got \[7\]", {"basis": Neurons(layers=[0, 7])}),
        ("expected every hook point once", {"basis": [Neurons(), Neurons(layers=[0])]}),
    ],
)
@models
def test_settings_that_contradict_each_other_are_refused(
    case: ModelCase, message: str, settings: dict[str, Any]
) -> None:
    with pytest.raises(SettingsError, match=message):
        attribute(model_of(case), random_pairs(4, 4), **settings)


@for_each(
    "settings",
    [
        {"positions": "all"},
        {"baseline": "noise"},
        {"method": 2.5},
        {"batch_size": "8"},
        {"basis": "neurons"},
        {"metric": 3},
    ],
    ids=str,
)
@models
def test_wrong_types_fail_at_the_call(case: ModelCase, settings: dict[str, Any]) -> None:
    with pytest.raises(ArgumentError):
        attribute(model_of(case), random_pairs(4, 4), **settings)
    with pytest.raises(ArgumentError):
        attribute("gpt2", random_pairs(4, 4))
    with pytest.raises(ArgumentError):
        TokenizedPairs.from_tokens(torch.rand(2, 4), torch.tensor([3, 4]))  # a wrong dtype


@models
def test_metrics_that_cannot_be_differentiated_are_refused(case: ModelCase) -> None:
    model, pairs = model_of(case), random_pairs(4, 4)
    wrong = {
        "is not differentiable": lambda logits, batch: logits[:, -1, 0].detach(),
        "one number per prompt": lambda logits, batch: logits[:, -1].mean(),
        "got float": lambda logits, batch: 1.0,
    }
    for message, metric in wrong.items():
        with pytest.raises(SettingsError, match=message):
            attribute(model, pairs, metric=metric)
    with pytest.raises(NumericalError, match="returned NaN or inf for pairs"):
        attribute(model, pairs, metric=lambda logits, batch: logits[:, -1, 0] / 0)
    with pytest.raises(PairsError, match="needs wrong answers"):
        attribute(model, TokenizedPairs.from_tokens(pairs.clean, pairs.answer, pairs.corrupt), metric=logit_difference)


@models
def test_no_pairs_and_no_tokenizer_are_told(case: ModelCase) -> None:
    with pytest.raises(PairsError, match="at least one pair"):
        PromptPairs(clean=[], answer=[])
    with pytest.raises(PairsError, match="at least one pair"):
        TokenizedPairs.from_tokens([], torch.zeros(0, dtype=torch.long))
    with pytest.raises(PairsError, match="has no tokenizer"):
        attribute(model_of(case), PromptPairs(clean=["The keys"], answer=[" are"]))


@for_each("method", ["relp", "gradient", "patching", "activation_difference"])
@models
def test_a_broken_model_gives_no_scores(case: ModelCase, method: Any, untouched: Untouched) -> None:
    model = settled(case.build())
    with torch.no_grad():
        next(p for n, p in torch.nn.Module.named_parameters(model) if "mlp" in n and p.dim() > 1)[0, 0] = float("nan")
    with untouched(model), pytest.raises(NumericalError, match="finite|contain NaN or inf"):
        attribute(model, random_pairs(4, 4), method=method)


@models
def test_gradients_that_the_caller_disabled_are_told(case: ModelCase, untouched: Untouched) -> None:
    with untouched(model_of(case)), torch.no_grad(), pytest.raises(PropagationError, match="gradients to be enabled"):
        attribute(model_of(case), random_pairs(4, 4))


@pytest.mark.parametrize("case", unsupported_models())
def test_mixtures_of_experts_have_no_neurons_but_outputs(case: ModelCase) -> None:
    """The remedy that the error names works."""
    model, pairs = case.build(), random_pairs(4, 4)
    with pytest.raises(UnsupportedModelError, match="basis=bases.MLPOutputs"):
        attribute(model, pairs)
    assert attribute(model, pairs, basis=MLPOutputs(), method="gradient").flat().isfinite().all()


def test_answers_of_several_tokens_are_told(stories260K: Any) -> None:
    pairs = PromptPairs(clean=["The dogs"], answer=[" were"], corrupt=["The dog"], wrong_answer=[" was"])
    with pytest.raises(PairsError, match=r"pair 0 \('The dogs'\).*first_difference"):
        attribute(stories260K, pairs)
