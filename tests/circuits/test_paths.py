"""Gradients that walk down the residual stream, and through few neurons' weights, are those of the whole graph."""

from typing import Any

import pytest
import torch

from tests.bases.site_dictionaries import dictionaries
from tests.circuits.test_direct_effects import NEURONS, TARGETS, direct_effects_on, effects_of, pairs_of
from tests.families import ModelCase, all_models, random_tokens, typical_models
from tests.loops import for_each
from tl_neuron_circuits import bases, trace
from tl_neuron_circuits._errors import SettingsError
from tl_neuron_circuits.circuits import _prompt_graph
from tl_neuron_circuits.circuits._direct_effects import bytes_per_receiver
from tl_neuron_circuits.circuits._slots import NeuronSlot, find_slots
from tl_neuron_circuits.circuits._total_effects import OpenPrompt, open_prompt
from tl_neuron_circuits.models._protocol import hook_points, submodule

NORM_AFTER_MLP = {"gemma2-HookedTransformer"}
NO_MLP_INPUT = {"solu_ln-HookedTransformer", "opt-TransformerBridge"}
FAMILIES = ("gpt2", "pythia", "llama", "llama_biased", "gemma2", "gemma3", "qwen3", "opt", "solu_ln", "falcon", "bloom")
both = typical_models("gpt2", "llama")


def prompt_of(model: Any, basis: Any = None, *, paired: bool = False) -> OpenPrompt:
    """One prompt, whose graph outlives the context."""
    (batch,) = pairs_of(model).batches(1)
    with open_prompt(model, batch, find_slots(model, basis or bases.Neurons()), TARGETS, paired=paired) as prompt:
        return prompt


def whole_graph(*_: Any) -> None:
    """No layers: every slot's targets take the whole graph below them."""


@for_each("case", typical_models(*FAMILIES))
def test_the_way_down_is_that_of_the_whole_graph(case: ModelCase, monkeypatch: pytest.MonkeyPatch) -> None:
    """On every family, through its layers and its few neurons' weights, and it is known where those cannot be used."""
    model = case.build()
    paths = prompt_of(model).paths
    assert paths.layered
    assert all((run.output is None) == (case.id in NORM_AFTER_MLP) for run in paths.runs)
    assert all((run.input is None) == (case.id in NO_MLP_INPUT) for run in paths.runs)
    layered = effects_of(model)
    monkeypatch.setattr(_prompt_graph, "_layers", whole_graph)
    monkeypatch.setattr(NeuronSlot, "_input", whole_graph)
    whole = effects_of(model)
    torch.testing.assert_close(layered.edges.to_dense(), whole.edges.to_dense(), rtol=1e-9, atol=1e-12)
    torch.testing.assert_close(list(layered.totals.score), list(whole.totals.score), rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("case", all_models("gpt2")[:1])
@pytest.mark.parametrize("place", ["skip_transcoder", "sae_residual", "sae_attention", "sae_hidden", "half"])
def test_so_it_is_for_dictionaries_and_layers_without_nodes(
    case: ModelCase, place: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = case.build()
    basis = bases.Neurons(layers=[1]) if place == "half" else dictionaries(place)
    assert prompt_of(model, basis).paths.layered
    tokens = random_tokens(model, 1, 5)
    layered = trace(model, tokens, basis=basis, nodes=8)
    monkeypatch.setattr(_prompt_graph, "_layers", whole_graph)
    whole = trace(model, tokens, basis=basis, nodes=8)
    found, expected = (c.edges.set_index(["source", "target"])["weight"] for c in (layered, whole))
    off = found.sub(expected, fill_value=0.0)  # where every feature was chosen, what remains is rounding
    assert off.abs().max() < 1e-12 < expected.abs().max()


@pytest.mark.parametrize("case", both)
def test_a_path_that_bypasses_the_residual_stream_is_seen(case: ModelCase) -> None:
    """What layer 0 reads is added to what the attention of layer 1 writes: no layer holds that path, the graph does."""
    model, kept = case.build(), {}

    def keep(value: torch.Tensor, hook: Any) -> None:
        kept["early"] = value

    hooks = [
        ("blocks.0.hook_resid_pre", keep),
        ("blocks.1.hook_attn_out", lambda value, hook: value + 0.1 * kept["early"]),
    ]
    with model.hooks(fwd_hooks=hooks):
        assert not prompt_of(model).paths.layered
        assert effects_of(model).largest_residual < case.tolerance


@pytest.mark.parametrize("case", both)
def test_an_mlp_that_writes_something_else_is_not_taken_for_its_neurons(case: ModelCase) -> None:
    model = case.build()
    scaled = submodule(model, "blocks.0.mlp").register_forward_hook(lambda module, inputs, output: 1.1 * output)  # type: ignore[union-attr]
    first, second = prompt_of(model).paths.runs
    assert (first.output is None) == (case.backend == "HookedTransformer") and second.output is not None
    assert effects_of(model).largest_residual < case.tolerance
    scaled.remove()


@pytest.mark.parametrize("case", [c for c in all_models("gpt2") if c.values[0].backend == "TransformerBridge"])
def test_neurons_that_something_else_reads_too_are_not_read_at_the_output(case: ModelCase) -> None:
    model, kept = case.build(), {}

    def keep(module: Any, arguments: tuple[torch.Tensor, ...]) -> None:
        kept["neurons"] = arguments[0][..., : model.cfg.d_model]

    down: Any = submodule(model, "blocks.0.mlp.out.original_component")
    handle = down.register_forward_pre_hook(keep)
    with model.hooks(fwd_hooks=[("blocks.0.hook_resid_post", lambda value, hook: value + 0.1 * kept["neurons"])]):
        assert all(run.output is None for run in prompt_of(model).paths.runs)
        assert effects_of(model).largest_residual < case.tolerance
    handle.remove()


@pytest.mark.parametrize("case", both)
def test_a_neuron_that_is_not_its_weights_is_read_from_the_graph(case: ModelCase) -> None:
    model = case.build()
    with model.hooks(fwd_hooks=[("blocks.1.mlp.hook_pre", lambda value, hook: 2 * value)]):
        prompt = prompt_of(model)
        for slot, run in zip(prompt.slots, prompt.paths.runs, strict=True):
            tensor = slot.read(run, torch.tensor([5]), torch.tensor([3])).tensor
            assert run.input is not None and (tensor is run.input.tensor) == (slot.layer == 0)
        assert effects_of(model).largest_residual < case.tolerance


@pytest.mark.parametrize("case", all_models("gpt2"))
@pytest.mark.parametrize("paired", [False, True])
def test_chunks_of_any_size_and_any_order_of_nodes_give_the_same(case: ModelCase, paired: bool) -> None:
    model = case.build()
    prompt = prompt_of(model, paired=paired)
    expected = effects_of(model, paired=paired).edges.to_dense()
    some = effects_of(model, paired=paired, max_bytes=4 * bytes_per_receiver(prompt))
    assert some.chunk == 4
    torch.testing.assert_close(some.edges.to_dense(), expected)
    order = torch.tensor([4, 0, 6, 2, 1, 5, 3])
    batches = list(pairs_of(model).batches(1))
    mixed = direct_effects_on(model, batches, NEURONS[order], paired=paired).edges.to_dense()
    n = len(NEURONS)
    torch.testing.assert_close(mixed[:n, :n], expected[order][:, order])
    torch.testing.assert_close(mixed[n:, n:], expected[n:, n:])


@pytest.mark.parametrize("case", all_models("gpt2"))
def test_nodes_and_targets_may_be_found_from_the_run(case: ModelCase) -> None:
    model = case.build()
    expected = effects_of(model)
    batches = list(pairs_of(model, 2).batches(1))
    found = direct_effects_on(model, batches[:1], lambda totals: NEURONS, lambda logits: TARGETS, paired=False)
    assert torch.equal(found.edges.to_dense(), expected.edges.to_dense()) and found.targets == TARGETS
    logits = model(batches[0].clean)[0, -1].float()
    assert torch.equal(found.totals.probabilities[0], logits.softmax(-1).detach())
    with pytest.raises(SettingsError, match="targets for 2 prompts"):
        direct_effects_on(model, batches, NEURONS, lambda logits: TARGETS, paired=False)


@pytest.mark.parametrize("case", all_models("gpt2"))
def test_models_that_do_not_show_their_residual_stream_take_the_whole_graph(
    case: ModelCase, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = case.build()
    points = {name: point for name, point in hook_points(model).items() if name != "blocks.1.hook_resid_pre"}
    monkeypatch.setattr(_prompt_graph, "hook_points", lambda model: points)
    assert not prompt_of(model).paths.layered
    assert effects_of(model).largest_residual < case.tolerance
