"""Exact patching is what a loop over single nodes measures."""

from typing import Any

import pytest
import torch
from torch import Tensor

from tests.families import ModelCase, typical_models
from tests.nodes.plain import POSTS, assert_scores, metric_with, random_pairs, values_of
from tests.propagation.readings import model_of
from tl_neuron_circuits._errors import SettingsError
from tl_neuron_circuits.bases import HeadOutputs, MLPOutputs, Neurons, ResidualStream
from tl_neuron_circuits.nodes import Patching, attribute
from tl_neuron_circuits.tasks import TokenizedPairs

models = pytest.mark.parametrize("case", typical_models("gpt2", "llama"))
HOOK = POSTS[0]


def one_at_a_time(model: Any, pairs: TokenizedPairs, hook: str, *, base: Any, denoising: bool = False) -> Tensor:
    """Scores [pair, pos, unit] of a hook point, a forward pass each. `base(index)` is what is patched in."""
    rows = []
    for index, clean in enumerate(pairs.clean):
        here = pairs.corrupt[index] if denoising else clean
        live, other = values_of(model, here, [hook])[hook], base(index)
        start = metric_with(model, pairs, index, here, {})
        row = torch.empty(live.shape, dtype=torch.float64)
        for position in range(live.shape[0]):
            for unit in range(live.shape[1]):
                patched = live.clone()
                patched[position, unit] = other[position, unit]
                row[position, unit] = start - metric_with(model, pairs, index, here, {hook: patched})
        rows.append(-row if denoising else row)
    return torch.stack(rows)


def corrupt_values(model: Any, pairs: TokenizedPairs, hook: str) -> Any:
    return lambda index: values_of(model, pairs.corrupt[index], [hook])[hook]


@models
def test_every_neuron_is_patched_as_one_at_a_time(case: ModelCase) -> None:
    model, pairs = model_of(case), random_pairs(3, 3)
    expected = one_at_a_time(model, pairs, HOOK, base=corrupt_values(model, pairs, HOOK)).mean(0)
    for batch_size in (1, 5):
        found = attribute(model, pairs, method="patching", basis=Neurons(layers=[0]), batch_size=batch_size)
        assert_scores(found.values[HOOK], expected, case)


@models
def test_denoising_puts_clean_values_into_the_corrupt_run(case: ModelCase) -> None:
    model, pairs = model_of(case), random_pairs(3)
    clean = lambda index: values_of(model, pairs.clean[index], [HOOK])[HOOK]  # noqa: E731
    expected = one_at_a_time(model, pairs, HOOK, base=clean, denoising=True).mean(0)
    found = attribute(model, pairs, method="patching", direction="denoising", basis=Neurons(layers=[0]))
    assert_scores(found.values[HOOK], expected, case)


@models
def test_other_bases_and_baselines_are_patched_one_at_a_time(case: ModelCase) -> None:
    model, pairs = model_of(case), random_pairs(3, corrupt=False)
    for basis in (HeadOutputs(layers=[1]), MLPOutputs(layers=[1]), ResidualStream(layers=[0])):
        (site,) = basis.sites(model)
        zero = lambda index, hook=site.hook: torch.zeros_like(values_of(model, pairs.clean[index], [hook])[hook])  # noqa: E731
        found = attribute(model, pairs, method="patching", baseline="zero", basis=basis)
        assert_scores(found.values[site.hook], one_at_a_time(model, pairs, site.hook, base=zero).mean(0), case, basis)


@models
def test_a_unit_is_patched_at_all_positions_together_where_positions_are_summed(case: ModelCase) -> None:
    model, pairs = model_of(case), random_pairs(3, 4)
    units = torch.zeros(24, dtype=torch.float64)
    for index, clean in enumerate(pairs.clean):
        live, other = (values_of(model, tokens, [HOOK])[HOOK] for tokens in (clean, pairs.corrupt[index]))
        start = metric_with(model, pairs, index, clean, {})
        for unit in range(24):
            patched = live.clone()
            patched[:, unit] = other[:, unit]
            units[unit] += (start - metric_with(model, pairs, index, clean, {HOOK: patched})) / 2
    found = attribute(model, pairs, method="patching", basis=Neurons(layers=[0]), positions="sum", batch_size=2)
    assert_scores(found.values[HOOK], units, case)


@models
def test_summed_units_are_patched_together(case: ModelCase) -> None:
    """The whole activation at a position, as in maps over layer and position."""
    model, pairs = model_of(case), random_pairs(3)
    clean = pairs.clean[0]
    live, other = (values_of(model, tokens, [HOOK])[HOOK] for tokens in (clean, pairs.corrupt[0]))
    start, expected = metric_with(model, pairs, 0, clean, {}), torch.empty(3, 1, dtype=torch.float64)
    for position in range(3):
        patched = live.clone()
        patched[position] = other[position]
        expected[position] = start - metric_with(model, pairs, 0, clean, {HOOK: patched})
    found = attribute(model, pairs, method="patching", basis=Neurons(layers=[0]), units="sum")
    assert_scores(found.values[HOOK], expected, case)


@models
def test_chosen_nodes_alone_are_measured(case: ModelCase) -> None:
    """The rest is nan, and ranks last."""
    model, pairs = model_of(case), random_pairs(4, 4)
    everything = attribute(model, pairs, method="patching")
    chosen = attribute(model, pairs).top(7)
    some = attribute(model, pairs, method=Patching(chosen))
    assert int((~some.flat().isnan()).sum()) == 7 and len(some.top(50)) == 7
    for row in chosen.itertuples():
        expected = everything.values[row.hook][row.position, row.unit]
        torch.testing.assert_close(some.values[row.hook][row.position, row.unit], expected, atol=1e-6, rtol=1e-5)
    best = attribute(model, pairs, positions="sum").top(3)
    summed = attribute(model, pairs, method=Patching(best), positions="sum")
    assert int((~summed.flat().isnan()).sum()) == 3


@models
def test_nodes_that_do_not_exist_are_refused(case: ModelCase) -> None:
    model, pairs = model_of(case), random_pairs(4, 4)
    top = attribute(model, pairs).top(2)
    wrong = {
        "expected nodes of the hook points": top.assign(hook="blocks.9.mlp.hook_post"),
        "expected positions from 0 to 3": top.assign(position=4),
        "expected units of .* below 24": top.assign(unit=24),
        r"\['kind'\] missing": top.drop(columns="kind"),
    }
    for message, nodes in wrong.items():
        with pytest.raises(SettingsError, match=message):
            attribute(model, pairs, method=Patching(nodes))
    with pytest.raises(SettingsError, match="units='sum' measures whole activations"):
        attribute(model, pairs, method=Patching(top), units="sum")
