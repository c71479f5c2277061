"""Variance at the last token against one prompt at a time, and what `evaluate` makes of it."""

from typing import Any

import pytest
import torch
from torch import Tensor

from tests.bases.tiny_dictionaries import RANDOM, tiny_dictionaries
from tests.families import ModelCase, all_models
from tests.nodes.plain import random_pairs, values_of
from tests.propagation.readings import model_of
from tl_neuron_circuits import NumericalError, evaluate
from tl_neuron_circuits.bases import Neurons
from tl_neuron_circuits.nodes import activation_variance

pytestmark = RANDOM
models = pytest.mark.parametrize("case", all_models("gpt2"))


@models
def test_it_is_the_variance_over_prompts_at_the_last_token(case: ModelCase) -> None:
    """Whatever the lengths and the batches; neurons, features and the error they leave."""
    model, pairs = model_of(case), random_pairs(4, 6, 5, 4, corrupt=False)
    basis = tiny_dictionaries("transcoder", model)
    neurons = activation_variance(model, pairs, batch_size=1)
    features = activation_variance(model, pairs, basis=basis, batch_size=3)
    for dictionary, hook in zip(basis.dictionaries, neurons.values, strict=True):
        names = (hook, dictionary.hook_in, dictionary.hook_out)
        last = [{n: v[-1].double() for n, v in values_of(model, tokens, names).items()} for tokens in pairs.clean]
        rows = {name: torch.stack([values[name] for values in last]) for name in names}
        assert_variance(neurons.values[hook], rows[hook])
        assert_variance(features.values[dictionary.hook_out], dictionary.encode(rows[dictionary.hook_in]))
        error = rows[dictionary.hook_out] - dictionary(rows[dictionary.hook_in])
        expected = float(error.var(0, correction=0).sum())
        assert float(features.errors[dictionary.hook_out]) == pytest.approx(expected, rel=1e-4)


def assert_variance(found: Tensor, rows: Tensor) -> None:
    torch.testing.assert_close(found, rows.double().var(0, correction=0).float(), atol=1e-6, rtol=1e-4)


@models
def test_kept_and_zeroed_units_are_what_their_names_say(case: ModelCase) -> None:
    """All neurons are the model; all features are the MLPs replaced; none of them is the bias of the decoder."""
    model, pairs = model_of(case), random_pairs(4, 4, 4, corrupt=False)
    settings: dict[str, Any] = {"ablation": "zero", "error_nodes": "ablate", "completeness": False}
    whole = evaluate(model, pairs, activation_variance(model, pairs, basis=Neurons()), sizes=[0, 48], **settings)
    assert torch.equal(whole.kept[1], whole.full) and not torch.equal(whole.kept[0], whole.full)
    basis = tiny_dictionaries("transcoder", model)
    curve = evaluate(model, pairs, activation_variance(model, pairs, basis=basis), sizes=[0, 40], **settings)
    for row, size in enumerate((0, 40)):
        torch.testing.assert_close(curve.kept[row], replaced(model, pairs, basis, size > 0), atol=1e-4, rtol=1e-4)


def replaced(model: Any, pairs: Any, basis: Any, features: bool) -> Tensor:
    """The metric with every MLP replaced by its transcoder, or by its decoder's bias."""
    seen: dict[str, Tensor] = {}
    hooks = []
    for d in basis.dictionaries:

        def write(value: Tensor, hook: Any, d: Any = d) -> Tensor:
            return (d(seen[d.hook_in].double()) if features else d.b_dec.expand_as(value)).to(value)

        hooks += [(d.hook_in, lambda value, hook, d=d: seen.update({d.hook_in: value})), (d.hook_out, write)]
    with torch.no_grad(), model.hooks(fwd_hooks=hooks):
        logits = model(torch.stack(list(pairs.clean)))[:, -1]
    rows = torch.arange(len(pairs))
    return (logits[rows, pairs.answer] - logits[rows, pairs.wrong_answer]).float()


def test_one_prompt_does_not_vary() -> None:
    case = all_models("gpt2")[0].values[0]
    with pytest.raises(NumericalError, match="at least two prompts to vary over; got 1"):
        activation_variance(model_of(case), random_pairs(4))
