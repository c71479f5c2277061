"""Edges that are kept or cut by path patching do what single interventions, one after another, do."""

import itertools
from collections.abc import Callable
from contextlib import AbstractContextManager
from typing import Any

import pytest
import torch
from torch import Tensor

from tests.families import ModelCase, random_tokens, typical_models
from tl_neuron_circuits._errors import SettingsError
from tl_neuron_circuits.bases import Neurons
from tl_neuron_circuits.bases._site import Parts
from tl_neuron_circuits.interventions import ablation_hooks
from tl_neuron_circuits.interventions._edge_ablation import Edge, Neuron, run_with_edges

CASES = typical_models("gpt2", "llama", "gemma2")
LAYERS, POSITIONS, WIDTH = 3, 4, 24


def build(case: ModelCase) -> Any:
    setting = (
        "n_layers" if case.backend == "HookedTransformer" else {"gpt2": "n_layer"}.get(case.family, "num_hidden_layers")
    )
    more = {"attn_types": ["global", "local", "global"]} if (case.family, setting) == ("gemma2", "n_layers") else {}
    if (case.family, setting) == ("gemma2", "num_hidden_layers"):
        more = {"layer_types": ["sliding_attention", "full_attention", "sliding_attention"]}
    return case.build(**{setting: LAYERS}, **more)


def baselines_of(model: Any, tokens: Tensor) -> dict[str, Tensor]:
    with torch.no_grad():
        cache = model.run_with_cache(tokens.roll(1, 1))[1]
    return {site.hook: cache[site.hook].mean(0, keepdim=True) for site in Neurons().sites(model)}


def all_neurons(layer: int) -> list[Neuron]:
    return [(layer, position, unit) for position in range(POSITIONS) for unit in range(WIDTH)]


NODES: list[Neuron] = [(0, 1, 2), (0, 3, 5), (1, 2, 7), (1, 3, 0), (2, 3, 1), (2, 3, 9)]


def all_edges(nodes: list[Neuron]) -> list[Edge]:
    inside: list[Edge] = [(s, t) for s, t in itertools.product(nodes, nodes) if s[0] < t[0]]
    return inside + [(node, None) for node in nodes]


def only_nodes(
    model: Any, tokens: Tensor, base: dict[str, Tensor], kept: list[Neuron], *, inverse: bool = False
) -> Tensor:
    sites = Neurons().sites(model)
    masks = {(site.hook, "node"): torch.full((POSITIONS, WIDTH), inverse) for site in sites}
    for layer, position, unit in kept:
        masks[sites[layer].hook, "node"][position, unit] = not inverse
    hooks = ablation_hooks(sites, masks, {hook: Parts(value) for hook, value in base.items()})
    with torch.no_grad():
        return model.run_with_hooks(tokens, fwd_hooks=hooks)


@pytest.mark.parametrize("case", CASES)
def test_keeping_all_edges_between_nodes_keeps_the_nodes(case: ModelCase) -> None:
    model, tokens = build(case), random_tokens(build(case), 2, POSITIONS)
    base = baselines_of(model, tokens)
    found = run_with_edges(model, tokens, all_edges(NODES), base, mode="keep")
    torch.testing.assert_close(found, only_nodes(model, tokens, base, NODES), atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("case", CASES)
def test_nothing_kept_is_everything_ablated_and_nothing_cut_is_the_model(case: ModelCase) -> None:
    model, tokens = build(case), random_tokens(build(case), 2, POSITIONS)
    base = baselines_of(model, tokens)
    nothing = run_with_edges(model, tokens, [], base, mode="keep")
    torch.testing.assert_close(nothing, only_nodes(model, tokens, base, []), atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(
        run_with_edges(model, tokens, [], base, mode="cut"), model(tokens).detach(), atol=1e-5, rtol=1e-5
    )


@pytest.mark.parametrize("case", CASES)
def test_cutting_all_edges_of_a_node_ablates_it(case: ModelCase) -> None:
    model, tokens = build(case), random_tokens(build(case), 2, POSITIONS)
    base = baselines_of(model, tokens)
    source = (1, 2, 7)
    cut: list[Edge] = [(source, target) for target in all_neurons(2)] + [(source, None)]
    found = run_with_edges(model, tokens, cut, base, mode="cut")
    expected = only_nodes(model, tokens, base, [source], inverse=True)
    torch.testing.assert_close(found, expected, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("case", CASES)
def test_cutting_one_edge_is_path_patching(case: ModelCase) -> None:
    """The source's change reaches the target with all other neurons held, and then only the target moves the rest."""
    model, tokens = build(case), random_tokens(build(case), 2, POSITIONS)
    base = baselines_of(model, tokens)
    (l_s, p_s, u_s), (l_t, p_t, u_t) = source, target = (0, 1, 2), (2, 3, 9)
    hooks = [site.hook for site in Neurons().sites(model)]
    with torch.no_grad():
        clean = model.run_with_cache(tokens)[1]

    def hold(value: Tensor, hook: Any, layer: int) -> Tensor:
        value = clean[hooks[layer]].clone()
        if layer == l_s:
            value[:, p_s, u_s] = base[hooks[layer]][:, p_s, u_s]
        return value

    seen: dict[str, Tensor] = {}
    held = [(hooks[layer], lambda value, hook, layer=layer: hold(value, hook, layer)) for layer in range(l_t)]
    with torch.no_grad():
        model.run_with_hooks(tokens, fwd_hooks=[*held, (hooks[l_t], lambda value, hook: seen.update(t=value.clone()))])

    def patch(value: Tensor, hook: Any) -> Tensor:
        value = value.clone()
        value[:, p_t, u_t] = seen["t"][:, p_t, u_t]
        return value

    with torch.no_grad():
        expected = model.run_with_hooks(tokens, fwd_hooks=[(hooks[l_t], patch)])
    found = run_with_edges(model, tokens, [(source, target)], base, mode="cut")
    torch.testing.assert_close(found, expected, atol=1e-5, rtol=1e-5)
    assert (found - model(tokens)).abs().max() > 1e-4


@pytest.mark.parametrize("case", CASES[:1])
def test_a_batch_is_its_members(case: ModelCase) -> None:
    model, tokens = build(case), random_tokens(build(case), 3, POSITIONS)
    base = baselines_of(model, tokens)
    edges = all_edges(NODES)[::2]
    for mode in ("keep", "cut"):
        together = run_with_edges(model, tokens, edges, base, mode=mode)
        alone = [run_with_edges(model, row[None], edges, base, mode=mode) for row in tokens]
        torch.testing.assert_close(together, torch.cat(alone))


@pytest.mark.parametrize("case", CASES[:1])
def test_wrong_edges_are_refused(case: ModelCase, untouched: Callable[[Any], AbstractContextManager[None]]) -> None:
    model, tokens = build(case), random_tokens(build(case), 1, POSITIONS)
    base = baselines_of(model, tokens)
    with untouched(model):
        run_with_edges(model, tokens, all_edges(NODES), base, mode="cut")
        with pytest.raises(SettingsError, match="later layers"):
            run_with_edges(model, tokens, [((1, 0, 0), (1, 1, 0))], base, mode="cut")
        with pytest.raises(SettingsError, match="baseline"):
            run_with_edges(model, tokens, [], {}, mode="keep")
