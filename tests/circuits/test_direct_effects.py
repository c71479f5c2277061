"""Edges are the direct effects they claim to be, and account for every target's activation."""

from collections.abc import Callable
from contextlib import AbstractContextManager, contextmanager
from typing import Any

import pytest
import torch

import tl_neuron_circuits as tnc
from tests.circuits.direct_by_hand import FrozenModel, edge_in_closed_form, replica_effects
from tests.families import ModelCase, all_models, random_tokens, typical_models
from tests.loops import for_each
from tl_neuron_circuits import bases
from tl_neuron_circuits._errors import NumericalError, PropagationError, SettingsError, UnsupportedModelError
from tl_neuron_circuits.circuits import _direct_effects, _total_effects
from tl_neuron_circuits.circuits._direct_effects import DirectEffects, direct_effects
from tl_neuron_circuits.circuits._slots import find_slots
from tl_neuron_circuits.circuits._targets import metric_target, token_target
from tl_neuron_circuits.circuits._total_effects import mean_totals
from tl_neuron_circuits.nodes import attribute
from tl_neuron_circuits.tasks import TokenizedPairs, answer_logit, logit_difference

NEURONS = torch.tensor([[0, 0, 1], [0, 3, 2], [0, 5, 3], [0, 5, 9], [1, 2, 4], [1, 5, 7], [1, 5, 8]])
TARGETS = [token_target(3), token_target(4)]
FAMILIES = ("gpt2", "pythia", "llama", "gemma2", "solu_ln", "bloom", "llama_biased", "opt")


def pairs_of(model: Any, n: int = 1) -> TokenizedPairs:
    tokens, others = random_tokens(model, n, 6), random_tokens(model, n, 6, seed=1)
    answers = torch.arange(n) + 3
    return TokenizedPairs.from_tokens(tokens, answers, others, answers + 20)


def effects_of(
    model: Any, *, paired: bool = False, n: int = 1, nodes: Any = NEURONS, targets: Any = TARGETS, **options: Any
) -> DirectEffects:
    """Of the neurons of every layer, on n random prompts."""
    return direct_effects_on(model, list(pairs_of(model, n).batches(1)), nodes, targets, paired=paired, **options)


def direct_effects_on(model: Any, batches: Any, nodes: Any = NEURONS, targets: Any = TARGETS, **options: Any) -> Any:
    return direct_effects(model, batches, nodes, targets, slots=find_slots(model, bases.Neurons()), **options)


@for_each("case", typical_models(*FAMILIES))
def test_incoming_edges_sum_to_the_activation(case: ModelCase) -> None:
    effects = effects_of(case.build())
    weights = effects.edges.to_dense()[..., 0].sum(1)
    activations = [effects.totals.activation[layer][position, unit] for layer, position, unit in NEURONS.tolist()]
    expected = torch.cat([torch.stack(activations), effects.totals.target_changes]).double()
    torch.testing.assert_close(weights, expected, atol=case.tolerance, rtol=case.tolerance)
    assert effects.largest_residual < case.tolerance


@pytest.mark.parametrize("case", typical_models("gpt2", "llama"))
def test_incoming_edges_sum_to_the_activation_in_float32(case: ModelCase) -> None:
    effects = effects_of(case.build(torch.float32))
    weights = effects.edges.to_dense()[..., 0].sum(1)[: len(NEURONS)]
    activations = [effects.totals.activation[layer][position, unit] for layer, position, unit in NEURONS.tolist()]
    torch.testing.assert_close(weights.float(), torch.stack(activations), atol=1e-5, rtol=1e-4)


@for_each("case", typical_models(*FAMILIES))
def test_edges_equal_the_replicas_gradients(case: ModelCase) -> None:
    """Every neuron, the embeddings and the remainders of a replica that shares no code with the package."""
    model = case.build()
    tokens = random_tokens(model, 1, 6)
    effects = effects_of(model)
    edges, columns = effects.edges.to_dense()[..., 0], effects.columns
    values = model.run_with_cache(tokens)[1]
    receivers = [tuple(node) for node in NEURONS.tolist()]
    receivers += [lambda z, token=target.tokens[0]: z[0, -1, token] - z[0, -1].mean() for target in TARGETS]
    for row, receiver in enumerate(receivers):
        gradients = replica_effects(case, tokens, receiver)
        weights = [
            values[f"blocks.{layer}.mlp.hook_post"] * gradients[f"blocks.{layer}.mlp.hook_post"] for layer in (0, 1)
        ]
        chosen = torch.stack([weights[layer][0, position, unit] for layer, position, unit in NEURONS.tolist()])
        left = sum(weight[0].sum(-1) for weight in weights).index_add(0, NEURONS[:, 1], chosen, alpha=-1)
        embedding = (values["hook_embed"] * gradients["hook_embed"])[0].sum(-1)
        expected = torch.cat([chosen, embedding, left]).detach()
        found = edges[row, : columns.positional]
        torch.testing.assert_close(found, expected, atol=case.tolerance, rtol=case.tolerance)
        if "hook_pos_embed" in gradients:
            positional = (values["hook_pos_embed"] * gradients["hook_pos_embed"]).sum()
            torch.testing.assert_close(edges[row, columns.positional], positional.detach())


@pytest.mark.parametrize("case", [c for c in all_models("gpt2", "llama") if c.values[0].backend == "HookedTransformer"])
def test_edges_equal_finite_differences_of_the_frozen_model(case: ModelCase) -> None:
    model = case.build()
    tokens = random_tokens(model, 1, 6)
    effects, frozen = effects_of(model).edges.to_dense()[..., 0], FrozenModel(model, tokens)
    cache = model.run_with_cache(tokens)[1]
    for row, target in enumerate(NEURONS.tolist()):
        assert frozen.neuron(tuple(target), {}) == pytest.approx(
            float(cache[f"blocks.{target[0]}.mlp.hook_post"][0, target[1], target[2]])
        )
        for column, source in enumerate(NEURONS.tolist()):
            step = 1e-3
            there, back = (frozen.neuron(tuple(target), {tuple(source): by}) for by in (step, -step))
            activation = float(cache[f"blocks.{source[0]}.mlp.hook_post"][0, source[1], source[2]])
            assert float(effects[row, column]) == pytest.approx((there - back) / (2 * step) * activation, abs=1e-9)


@pytest.mark.parametrize("case", [c for c in all_models("gpt2") if c.values[0].backend == "HookedTransformer"])
def test_an_edge_equals_its_closed_form(case: ModelCase) -> None:
    model = case.build()
    effects = effects_of(model).edges.to_dense()[..., 0]
    nodes = [tuple(node) for node in NEURONS.tolist()]
    for row, column in ((4, 0), (5, 0), (5, 1), (6, 2), (6, 3)):
        expected = edge_in_closed_form(model, random_tokens(model, 1, 6), nodes[column], nodes[row])
        assert float(effects[row, column]) == pytest.approx(expected, abs=1e-10)


@pytest.mark.parametrize("case", typical_models("gpt2", "llama"))
@pytest.mark.parametrize("baseline", ["zero", "corrupt"])
def test_totals_equal_attribute(case: ModelCase, baseline: str) -> None:
    """Scores that choose the nodes are those of `attribute`, which computes them another way."""
    model = case.build()
    pairs = pairs_of(model, 3)
    slots, targets = find_slots(model, bases.Neurons()), [metric_target(logit_difference)]
    found = mean_totals(model, list(pairs.batches(1)), targets, paired=baseline == "corrupt", slots=slots)
    expected = attribute(model, pairs, metric=logit_difference, baseline=baseline)
    for layer, score in enumerate(found.score):
        torch.testing.assert_close(
            score.float(), expected.values[f"blocks.{layer}.mlp.hook_post"], atol=1e-6, rtol=1e-4
        )


@pytest.mark.parametrize("case", typical_models("gpt2", "llama"))
@pytest.mark.parametrize("paired", [False, True])
def test_attributions_into_a_node_sum_to_its_score(case: ModelCase, paired: bool) -> None:
    effects = effects_of(case.build(), paired=paired, n=3)
    sums = effects.edges.to_dense()[..., 1].sum(1)
    scores = [effects.totals.score[layer][position, unit] for layer, position, unit in NEURONS.tolist()]
    expected = torch.cat([torch.stack(scores).double(), effects.totals.target_changes])
    torch.testing.assert_close(sums, expected, atol=1e-6, rtol=1e-5)


@pytest.mark.parametrize("case", typical_models("gpt2", "llama"))
@pytest.mark.parametrize("paired", [False, True])
def test_several_prompts_give_the_mean_of_each(case: ModelCase, paired: bool) -> None:
    model = case.build()
    batches = list(pairs_of(model, 3).batches(1))
    together = direct_effects_on(model, batches, paired=paired).edges.to_dense()
    alone = [direct_effects_on(model, [batch], paired=paired).edges.to_dense() for batch in batches]
    torch.testing.assert_close(together, torch.stack(alone).mean(0))


@pytest.mark.parametrize("case", all_models("gpt2"))
def test_chunks_do_not_change_the_numbers(case: ModelCase) -> None:
    model = case.build()
    small, large = effects_of(model, max_bytes=1), effects_of(model)
    assert small.chunk == 1 < large.chunk
    torch.testing.assert_close(small.edges.to_dense(), large.edges.to_dense())


@pytest.mark.parametrize("case", all_models("gpt2"))
def test_pairs_have_no_biases_and_a_linearization_error(case: ModelCase) -> None:
    effects = effects_of(case.build(), paired=True)
    edges, columns = effects.edges.to_dense()[..., 0], effects.columns
    assert edges[:, columns.bias].abs().max() == 0 == edges[:, columns.positional].abs().max()
    changes = [effects.totals.change[layer][position, unit] for layer, position, unit in NEURONS.tolist()]
    rest = torch.stack(changes).double() - edges[: len(NEURONS), : columns.linearization_error].sum(1)
    torch.testing.assert_close(edges[: len(NEURONS), columns.linearization_error], rest)
    assert edges[:, columns.linearization_error].abs().max() > 1e-3


@pytest.mark.parametrize("case", all_models("gemma2"))
def test_a_metric_beyond_a_soft_cap_shows_its_linearization_error(case: ModelCase) -> None:
    effects = effects_of(case.build(), targets=[metric_target(answer_logit)])
    row, columns = effects.edges.to_dense()[-1, :, 0], effects.columns
    assert float(row.sum()) == pytest.approx(float(effects.totals.target_changes[0]))
    assert abs(float(row[columns.linearization_error])) > 1e-6


@pytest.mark.parametrize("case", typical_models("gpt2", "llama"))
def test_the_model_is_left_as_found(case: ModelCase, untouched: Callable[[Any], AbstractContextManager[None]]) -> None:
    model = case.build()
    model(random_tokens(model))  # TransformerBridge arranges hooks of its own on its first run
    with untouched(model):
        effects_of(model)
    with untouched(model), pytest.raises(PropagationError), torch.no_grad():
        effects_of(model)


@pytest.mark.parametrize("case", all_models("gpt2"))
def test_sums_that_do_not_hold_are_an_error(case: ModelCase, monkeypatch: pytest.MonkeyPatch) -> None:
    """Without the biases' share nothing adds up, and the check says so."""

    @contextmanager
    def without_biases(model: Any) -> Any:
        yield {}

    monkeypatch.setattr(_total_effects, "biases_in_graph", without_biases)
    with pytest.raises(NumericalError, match="do not sum"):
        effects_of(case.build())


@pytest.mark.parametrize("case", all_models("gpt2"))
def test_prompts_that_overflow_are_an_error(case: ModelCase) -> None:
    model = case.build(torch.float32)
    with torch.no_grad():
        next(p for p in torch.nn.Module.parameters(model) if p.dim() == 2).fill_(torch.inf)
    with pytest.raises(NumericalError):
        effects_of(model)


def test_mixtures_of_experts_are_refused() -> None:
    from tests.families import unsupported_models

    case = unsupported_models()[0].values[0]
    with pytest.raises((UnsupportedModelError, PropagationError)):
        effects_of(case.build())


def test_more_edges_than_memory_holds_are_refused_before_they_are_computed(monkeypatch: pytest.MonkeyPatch) -> None:
    generator = torch.Generator().manual_seed(0)
    nodes = torch.stack([torch.randint(0, n, (60,), generator=generator) for n in (4, 5, 9)], 1)
    pairs = [(s, t) for s in nodes.tolist() for t in nodes.tolist() if s[0] < t[0] and s[1] <= t[1]]
    assert _direct_effects.most_edges(nodes, 3) == len(pairs) + 3 * len(nodes)
    model = tnc.load_demo_model()
    circuit = tnc.trace(model, "The capital of the state containing Dallas is", " Austin", nodes=40)
    chosen = circuit.nodes.query("kind == 'neuron'")["node"]
    between = circuit.edges["source"].isin(chosen) & circuit.edges["target"].isin(chosen)
    index = torch.tensor(circuit.nodes.query("kind == 'neuron'")[["layer", "position", "unit"]].to_numpy())
    assert 0 < between.sum() <= _direct_effects.most_edges(index, 0)
    monkeypatch.setattr(_direct_effects, "free_memory", lambda device: 10_000)
    with pytest.raises(SettingsError, match=r"40 nodes have up to .* edges.*Choose fewer: nodes=10 fits"):
        tnc.trace(model, "The capital of the state containing Dallas is", " Austin", nodes=40)
