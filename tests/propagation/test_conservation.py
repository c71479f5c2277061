"""Relevance is conserved with all four rules, and `check_model` measures whether it is."""

from collections.abc import Callable
from contextlib import AbstractContextManager
from typing import Any

import pytest
import torch
from torch import Tensor

from tests.families import (
    N_LAYERS,
    ModelCase,
    all_models,
    each_model,
    hooked_transformer,
    model_cases,
    random_tokens,
    unsupported_models,
)
from tests.propagation.readings import model_of, settled
from tests.real_models import HookedTransformer
from tl_neuron_circuits.propagation import ModelReport, check_model, relp

Untouched = Callable[[Any], AbstractContextManager[None]]
CLOSE = 1e-6


def biases_of(model: Any) -> list[Tensor]:
    """Every bias, found by its name alone."""
    named = torch.nn.Module.named_parameters(model)
    return [p for name, p in named if name.rsplit(".", 1)[-1].lstrip("_").startswith("b")]


def without_biases(case: ModelCase, **settings: Any) -> Any:
    """The model with all biases zero: embeddings alone then carry all relevance."""
    model = case.build(**settings)
    with torch.no_grad():
        for bias in biases_of(model):
            bias.zero_()
    return model


def relevance_at(model: Any, tokens: Tensor, hooks: list[list[str]], pick: Callable[[Tensor], Tensor]) -> list[float]:
    """Sum of value times gradient over each cut, and over the raw logits, which come first."""
    store: dict[str, Tensor] = {}
    raw: list[Tensor] = []
    names = [name for cut in hooks for name in cut]
    keep = [(name, lambda value, hook, name=name: store.update({name: value}) or value) for name in names]
    handle = model.unembed.register_forward_hook(lambda module, arguments, output: raw.append(output))
    try:
        with relp(model):
            metric = pick(model.run_with_hooks(tokens, fwd_hooks=keep))
            values = [*raw, *store.values()]
            gradients = torch.autograd.grad(metric, values)
    finally:
        handle.remove()
    sums = {
        name: float((v * g).sum().detach()) for name, v, g in zip(("logits", *store), values, gradients, strict=True)
    }
    return [sums["logits"], *(sum(sums[name] for name in cut) for cut in hooks)]


def cuts_of(model: Any) -> list[list[str]]:
    """Embeddings, and the residual stream after each layer."""
    positional = model.cfg.positional_embedding_type == "standard" and "hook_pos_embed" in model.hook_dict
    return [
        ["hook_embed", *(["hook_pos_embed"] if positional else [])],
        *([f"blocks.{i}.hook_resid_post"] for i in range(2)),
    ]


@each_model()
def test_check_model_measures_conservation_with_biases_and_soft_caps(case: ModelCase, untouched: Untouched) -> None:
    model = model_of(case)
    with untouched(model):
        report = check_model(model)
    assert report.ok, report.problems
    assert abs(report.conservation - 1) < CLOSE
    assert report.model_class == case.backend


@each_model()
def test_every_cut_of_a_bias_free_model_carries_the_logits(case: ModelCase) -> None:
    model = without_biases(case)
    tokens = random_tokens(model, batch=1, pos=7)
    logits, *cuts = relevance_at(model, tokens, cuts_of(model), lambda logits: logits[0, -1, 3] - logits[0, -1, 5])
    assert abs(logits) > 1e-3
    for relevance in cuts:
        assert abs(relevance - logits) < max(CLOSE, 3 * case.tolerance) * max(map(abs, (logits, *cuts)))


@pytest.mark.parametrize("case", all_models("gemma2"))
def test_conservation_holds_near_the_soft_cap(case: ModelCase) -> None:
    """The cap's own slope is not conserved, so the reference is the logit before it: the metric would be far off."""
    model = without_biases(case)
    cap = model.cfg.output_logits_soft_cap
    with torch.no_grad():
        weight = next(p for name, p in torch.nn.Module.named_parameters(model.unembed) if p.dim() == 2)
        weight *= 10
    tokens = random_tokens(model, batch=1, pos=7)
    top = int(model(tokens)[0, -1].abs().argmax())
    metric = float(model(tokens)[0, -1, top].detach())
    assert abs(metric) > 0.9 * cap
    logits, *cuts = relevance_at(model, tokens, cuts_of(model), lambda logits: logits[0, -1, top])
    assert abs(logits - metric) > 0.3 * abs(metric)
    for relevance in cuts:
        assert abs(relevance - logits) < 1e-5 * abs(logits)
    assert abs(check_model(model, tokens).conservation - 1) < 1e-5


@pytest.mark.parametrize("case", all_models("gpt2", "llama"))
def test_check_model_lists_sites_that_fire(case: ModelCase) -> None:
    table = check_model(model_of(case)).to_dataframe()
    assert set(table["role"]) >= {"embedding", "query", "key", "activation input", "neurons", "norm"}
    assert table["fires"].all()
    neurons = table[table["role"] == "neurons"]
    assert list(neurons["hook"]) == ["blocks.0.mlp.hook_post", "blocks.1.mlp.hook_post"]
    assert list(neurons["shape"]) == ["8x24", "8x24"]


@pytest.mark.parametrize("case", all_models("gpt2", "llama"))
def test_check_model_estimates_memory_from_what_it_measured(case: ModelCase) -> None:
    report = check_model(model_of(case))
    weights = sum(p.numel() * p.element_size() for p in torch.nn.Module.parameters(model_of(case)))
    assert report.parameter_bytes <= weights  # parameters that TransformerBridge does not map are not counted
    graph = report.memory_bytes(4, 10) - report.parameter_bytes
    assert 40 * 24 * 8 * 2 < graph < 40 * 24 * 8 * 1000  # at least the neurons of both layers
    assert report.memory_bytes(8, 10) - report.parameter_bytes == pytest.approx(2 * graph, rel=1e-6)


@pytest.mark.parametrize("case", all_models("gpt2"))
def test_reports_show_themselves(case: ModelCase) -> None:
    report = check_model(model_of(case))
    assert "conservation=1.0000" in repr(report) and "ok" in repr(report) and "\n" not in repr(report)
    assert "<table" in report._repr_html_()
    assert isinstance(report, ModelReport)


@pytest.mark.skipif(HookedTransformer is None, reason="builds a HookedTransformer")
def test_check_model_notices_what_the_rules_do_not_cover(untouched: Untouched) -> None:
    """A part that multiplies two signals: the numbers are measured, not looked up."""
    model = settled(hooked_transformer("gpt2"))

    class Squared(torch.nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return x + x.square()

    model.blocks[1].hook_mlp_out = torch.nn.Sequential(model.blocks[1].hook_mlp_out, Squared())
    report = check_model(model)
    assert not report.ok and any("relevance is not conserved" in problem for problem in report.problems)
    assert abs(report.conservation - 1) > 1e-2


@pytest.mark.parametrize("case", [pytest.param(c, id=c.id) for c in model_cases("gpt2")])
def test_a_logit_that_does_not_depend_on_the_input_is_a_problem_not_a_number(case: ModelCase) -> None:
    model = case.build()
    with torch.no_grad():
        for parameter in torch.nn.Module.parameters(model):
            parameter.zero_()
    report = check_model(model)
    assert not report.ok and "exactly zero" in report.problems[0]


def test_the_summary_is_one_screen_that_names_what_matters() -> None:
    """Whatever the depth: sites are counted by role, and only silent ones are named."""
    model = model_cases("llama")[0].build(torch.float32)
    report = check_model(model)
    lines = report.summary().splitlines()
    assert len(lines) <= 20 and all(len(line) < 250 for line in lines)
    assert "relevance propagation holds" in lines[0] and "2 layers" in report.model_line
    assert f"neurons {N_LAYERS}" in report.summary() and "all fire" in report.summary()
    assert f"half at {N_LAYERS}" in report.summary() and "no tokenizer" in report.input_line
    refused = check_model(unsupported_models()[0].values[0].build()).summary()
    assert "does not hold" in refused and "problem" in refused and "patching" in refused
