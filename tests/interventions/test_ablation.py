"""Ablation hooks: what they write, what stays live, and how they ride on a user's own run."""

from typing import Any

import pytest
import torch

from tests.families import ModelCase, all_models
from tests.propagation.readings import model_of, tokens_of
from tl_neuron_circuits._errors import SettingsError
from tl_neuron_circuits.bases import HeadOutputs, Neurons
from tl_neuron_circuits.bases._site import Parts
from tl_neuron_circuits.interventions import ablation_hooks
from tl_neuron_circuits.interventions._ablation import AblationSwitch

models = pytest.mark.parametrize("case", all_models("gpt2"))
NAME = "blocks.1.mlp.hook_post"


def value_after(model: Any, tokens: torch.Tensor, hooks: Any, name: str = NAME) -> torch.Tensor:
    seen: list[torch.Tensor] = []
    with torch.no_grad():
        model.run_with_hooks(tokens, fwd_hooks=[*hooks, (name, lambda value, hook: seen.append(value.clone()))])
    return seen[0]


@models
def test_nodes_outside_the_mask_take_the_baseline(case: ModelCase) -> None:
    model, tokens = model_of(case), tokens_of(case)
    sites = Neurons(layers=[1]).sites(model)
    mask = torch.rand(6, 24, generator=torch.Generator().manual_seed(0)) < 0.5
    base = torch.randn(1, 6, 24, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    live = value_after(model, tokens, [])
    found = value_after(model, tokens, ablation_hooks(sites, {(NAME, "node"): mask}, {NAME: Parts(base)}))
    assert torch.equal(found, torch.where(mask, live, base.expand_as(live)))
    zeroed = value_after(model, tokens, ablation_hooks(sites, {(NAME, "node"): mask}, {NAME: None}))
    assert torch.equal(zeroed, torch.where(mask, live, 0.0))
    by_unit = value_after(model, tokens, ablation_hooks(sites, {(NAME, "node"): mask[0]}, {NAME: None}))
    assert torch.equal(by_unit, torch.where(mask[0], live, 0.0))


@models
def test_heads_are_ablated_component_by_component(case: ModelCase) -> None:
    model, tokens, name = model_of(case), tokens_of(case), "blocks.0.attn.hook_z"
    mask = torch.arange(16) < 8
    hooks = ablation_hooks(HeadOutputs(layers=[0]).sites(model), {(name, "node"): mask}, {name: None})
    live, found = value_after(model, tokens, [], name), value_after(model, tokens, hooks, name)
    assert found.shape == live.shape == (2, 6, 4, 4)
    assert torch.equal(found[:, :, :2], live[:, :, :2]) and not found[:, :, 2:].any()


@models
def test_sites_that_stay_whole_get_no_hook(case: ModelCase) -> None:
    """So a full set is the model itself, bit for bit."""
    sites = Neurons().sites(model_of(case))
    everything = {(site.hook, "node"): torch.ones(6, 24, dtype=torch.bool) for site in sites}
    assert ablation_hooks(sites, everything, {site.hook: None for site in sites}) == []
    assert ablation_hooks(sites, {}, {site.hook: None for site in sites}) == []


@models
def test_a_site_without_a_baseline_is_an_error(case: ModelCase) -> None:
    sites = Neurons().sites(model_of(case))
    with pytest.raises(SettingsError, match=r"expected a baseline \(None for zero\) for blocks\.0"):
        ablation_hooks(sites, {}, {NAME: None})


@models
def test_a_switch_is_the_hooks_of_every_set_in_turn(case: ModelCase) -> None:
    """All nodes, some, none, all again: the same bits as hooks made for each, and the model's own where all stay."""
    model, tokens = model_of(case), tokens_of(case)
    sites = Neurons().sites(model)
    base = {site.hook: Parts(torch.randn(1, 6, 24, generator=torch.Generator().manual_seed(1))) for site in sites}
    before = {hook: parts.nodes.clone() for hook, parts in base.items()}
    some = torch.rand(6, 24, generator=torch.Generator().manual_seed(0)) < 0.5
    none = torch.zeros(6, 24, dtype=torch.bool)
    sets = [{(site.hook, "node"): mask for site in sites} for mask in (~none, some, none)] + [None]
    switch = AblationSwitch(sites, base)
    with torch.no_grad():
        expected = [model.run_with_hooks(tokens, fwd_hooks=ablation_hooks(sites, kept or {}, base)) for kept in sets]
        with model.hooks(fwd_hooks=switch.hooks):
            for kept, logits in zip(sets, expected, strict=True):
                switch.keep(kept)
                assert torch.equal(model(tokens), logits)
    assert torch.equal(expected[0], expected[3]) and not torch.equal(expected[1], expected[2])
    assert all(torch.equal(base[hook].nodes, value) for hook, value in before.items())


@models
@pytest.mark.parametrize("share", [0.0, 0.5])
def test_undefined_values_of_ablated_nodes_leave_nothing_behind(case: ModelCase, share: float) -> None:
    model, tokens = model_of(case), tokens_of(case)
    mask = torch.rand(24, generator=torch.Generator().manual_seed(0)) < share
    broken = (NAME, lambda value, hook: torch.where(mask, value, torch.tensor([torch.inf, torch.nan]).repeat(12)))
    hooks = ablation_hooks(Neurons(layers=[1]).sites(model), {(NAME, "node"): mask}, {NAME: None})
    expected = model.run_with_hooks(tokens, fwd_hooks=hooks)
    assert torch.equal(model.run_with_hooks(tokens, fwd_hooks=[broken, *hooks]), expected)
