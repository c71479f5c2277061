"""Dictionaries as a basis: their nodes add up to the activation's own, whatever the dictionary misses."""

from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from tests.bases.site_dictionaries import LENGTH, PLACES, dictionaries, dictionary, identity, pairs
from tests.families import D_MLP, D_MODEL, N_LAYERS, ModelCase, all_models
from tests.loops import for_each
from tests.methods import with_steps
from tl_neuron_circuits import as_dictionary, attribute, compare, evaluate
from tl_neuron_circuits._errors import DictionaryError, FileFormatError, SettingsError, UnsupportedModelError
from tl_neuron_circuits.bases import Dictionaries, HeadOutputs, MLPOutputs, Neurons, load_dictionary, save_dictionary
from tl_neuron_circuits.bases._runs import list_reads, run_values
from tl_neuron_circuits.bases._site import basis_sites
from tl_neuron_circuits.models._protocol import submodule
from tl_neuron_circuits.nodes import NodeScores
from tl_neuron_circuits.tasks import logit_difference
from tl_neuron_circuits.tasks._metrics import measure

METHODS = ("relp", "gradient", "integrated_gradients")
BASES = {place: dictionaries(place) for place in PLACES}
each_place = pytest.mark.parametrize("place", PLACES)
both_classes = pytest.mark.parametrize("case", all_models("gpt2"))
quiet = pytest.mark.filterwarnings("ignore:dictionaries leave more than 0.9")  # random dictionaries explain nothing


@cache
def built(case: ModelCase, dtype: torch.dtype = torch.float64) -> Any:
    return case.build(dtype=dtype)


def per_position(scores: NodeScores, hook: str) -> Tensor:
    """All that a layer's nodes have at each position, error and skip included."""
    total = scores.values[hook].sum(-1)
    for extra in (scores.errors, scores.skips):
        total = total + extra.get(hook, 0)
    return total


def assert_same_sums(first: NodeScores, second: NodeScores) -> None:
    """Layer by layer and position by position."""
    for one, other in zip(first.values, second.values, strict=True):
        ours, theirs = per_position(first, one), per_position(second, other)
        torch.testing.assert_close(ours, theirs, atol=1e-5 * float(theirs.abs().max()), rtol=1e-4)
        assert float(theirs.abs().max()) > 1e-3


RUNS = [(case.values[0], method) for case in all_models("gpt2") for method in METHODS]


@quiet
@each_place
@for_each(("case", "method"), RUNS, ids=[f"{case.id}-{method}" for case, method in RUNS])
def test_features_skip_and_error_add_up_to_the_activations_scores(case: ModelCase, method: Any, place: str) -> None:
    model = built(case)
    tokens = pairs(model)
    features = attribute(model, tokens, method=with_steps(method, 2), basis=BASES[place])
    assert set(features.errors) == set(features.values) and all(e.shape == (LENGTH,) for e in features.errors.values())
    assert set(features.skips) == (set(features.values) if place == "skip_transcoder" else set())
    whole = attribute(model, tokens, method=with_steps(method, 2), basis=PLACES[place][-1])
    assert_same_sums(features, whole)
    if isinstance(PLACES[place][-1], MLPOutputs):
        assert_same_sums(whole, attribute(model, tokens, method=with_steps(method, 2), basis=Neurons()))


@quiet
@pytest.mark.parametrize("case", all_models("gemma2"))
def test_a_post_norm_separates_neurons_from_mlp_outputs_unless_its_scale_is_frozen(case: ModelCase) -> None:
    """Gemma-2: features still add up to MLP outputs; neurons do where the norm is linear (RelP) and the baseline 0."""
    model = case.build()
    tokens = pairs(model)
    for method in METHODS:
        outputs = attribute(model, tokens, method=with_steps(method, 2), basis=MLPOutputs())
        assert_same_sums(
            attribute(model, tokens, method=with_steps(method, 2), basis=BASES["skip_transcoder"]), outputs
        )
    with torch.no_grad():  # a bias of the down projection is no neuron's
        for layer in range(N_LAYERS):
            if (bias := getattr(submodule(model, f"blocks.{layer}.mlp"), "b_out", None)) is not None:
                bias.zero_()
    outputs, neurons = (attribute(model, tokens, basis=b, baseline="zero") for b in (MLPOutputs(), Neurons()))
    assert_same_sums(outputs, neurons)
    with pytest.raises(AssertionError):
        assert_same_sums(*(attribute(model, tokens, basis=b) for b in (MLPOutputs(), Neurons())))


@each_place
@both_classes
def test_the_splice_changes_nothing(case: ModelCase, place: str) -> None:
    """Every site taken apart and put together again, all in one forward, gives the original's logits."""
    model = built(case, torch.float32)
    sites = basis_sites(model, dictionaries(place, dtype=torch.float32))
    (batch,) = pairs(model).batches(8)
    values = run_values(model, batch, list_reads(sites))
    hooks = []
    for site in sites:
        parts = site.take_apart(values)
        assert float(parts.vectors["error"].abs().max()) > 0.1 and float(parts.nodes.count_nonzero()) > 10
        hooks.append((site.hook, lambda value, hook, site=site, parts=parts: site.put_together(parts, value)))
    with torch.no_grad():
        original = model(batch.clean)
        torch.testing.assert_close(model.run_with_hooks(batch.clean, fwd_hooks=hooks), original, atol=2e-4, rtol=1e-4)


@quiet
@pytest.mark.parametrize("place", ["sae_attention", "skip_transcoder"])
@both_classes
def test_exact_patching_through_a_dictionary_is_a_naive_loop(case: ModelCase, place: str) -> None:
    """One node at a time: the clean output with one feature, error or skip of the corrupt run."""
    model = built(case)
    tokens = pairs(model, n=2, length=3)
    exact = attribute(model, tokens, method="patching", basis=dictionaries(place, [1]))
    made, (batch,) = dictionary(place, 1), tokens.batches(8)
    (site,) = basis_sites(model, Dictionaries([made]))
    clean, corrupt = (run_values(model, run, site.reads) for run in (batch, batch.on_corrupt()))

    def metric(output: Tensor) -> Tensor:
        hook = (site.hook, lambda value, hook: output.reshape(value.shape).to(value.dtype))
        with torch.no_grad():
            logits = model.run_with_hooks(batch.clean, fwd_hooks=[hook])
        return measure(logit_difference, logits, batch).mean()

    x, target = (clean[name].flatten(2) if "hook_z" in name else clean[name] for name in (site.reads[0], site.hook))
    other_x, other_target = (
        corrupt[name].flatten(2) if "hook_z" in name else corrupt[name] for name in (site.reads[0], site.hook)
    )
    features, other = made.encode(x), made.encode(other_x)
    errors = target - made(x), other_target - made(other_x)
    start = metric(target)
    for position in range(3):
        for unit in (0, 3, 7):
            step = torch.zeros_like(target)
            change = (other - features)[:, position, unit, None]
            step[:, position] = change * made.W_dec[unit]
            expected = start - metric(target + step)
            torch.testing.assert_close(
                float(exact.values[site.hook][position, unit]), float(expected), atol=1e-5, rtol=0
            )
        step = torch.zeros_like(target)
        step[:, position] = (errors[1] - errors[0])[:, position]
        expected = start - metric(target + step)
        torch.testing.assert_close(float(exact.errors[site.hook][position]), float(expected), atol=1e-5, rtol=0)
        if made.has_skip:
            step[:, position] = (made.skip(other_x) - made.skip(x))[:, position]
            expected = start - metric(target + step)
            torch.testing.assert_close(float(exact.skips[site.hook][position]), float(expected), atol=1e-5, rtol=0)
    assert all(float(block.abs().max()) > 1e-4 for _, _, block in exact.blocks())


@both_classes
def test_an_identity_dictionary_is_the_neuron_basis(case: ModelCase) -> None:
    """The same scores and the same curve, error nodes (zero, and ranked last) aside."""
    model = built(case)
    tokens = pairs(model)
    same = Dictionaries([identity(D_MLP, f"blocks.{layer}.mlp.hook_post") for layer in range(N_LAYERS)])
    for method in (*METHODS, "activation_difference"):
        one, other = (attribute(model, tokens, method=with_steps(method, 2), basis=b) for b in (Neurons(), same))
        for hook, values in one.values.items():
            torch.testing.assert_close(values, other.values[hook], atol=1e-7, rtol=1e-6)
        assert all(float(error.abs().max()) < 1e-7 for error in other.errors.values())
        if method != "relp":
            continue
        curves = [evaluate(model, tokens, scores, sizes=[1, 7, 30, 120]) for scores in (one, other)]
        torch.testing.assert_close(curves[0].kept, curves[1].kept, atol=1e-5, rtol=1e-5)
        torch.testing.assert_close(curves[0].removed, curves[1].removed, atol=1e-5, rtol=1e-5)
        assert curves[1].n_nodes == curves[0].n_nodes + N_LAYERS * LENGTH
        assert all(fraction < 1e-9 for fraction in other.settings["variance_unexplained"].values())


@quiet
def test_a_bfloat16_dictionary_on_a_float32_model_loses_its_weights_rounding_only() -> None:
    (case, *_) = (p.values[0] for p in all_models("gpt2"))
    model = built(case, torch.float32)
    tokens = pairs(model)
    rounded = [dictionary("transcoder", layer, torch.bfloat16) for layer in range(N_LAYERS)]
    exact = [made.to(dtype=torch.float32) for made in rounded]
    one, other = (attribute(model, tokens, basis=Dictionaries(list(made))) for made in (rounded, exact))
    assert rounded[0].dtype == torch.bfloat16 and one.flat().dtype == torch.float32
    assert torch.equal(one.flat(), other.flat())
    assert_same_sums(one, attribute(model, tokens, basis=MLPOutputs()))
    curves = [evaluate(model, tokens, scores, sizes=[1, 9, len(one)]) for scores in (one, other)]
    assert torch.equal(curves[0].kept, curves[1].kept)
    assert curves[0].faithfulness[-1] == pytest.approx(1, abs=1e-4)


def test_what_a_dictionary_leaves_unexplained_is_reported_and_above_nine_tenths_warned_of() -> None:
    (case, *_) = (p.values[0] for p in all_models("gpt2"))
    model = built(case)
    tokens = pairs(model)
    hooks = [f"blocks.{layer}.hook_mlp_out" for layer in range(N_LAYERS)]
    good = Dictionaries([identity(D_MODEL, hook) for hook in hooks])
    assert attribute(model, tokens, basis=good).settings["variance_unexplained"] == pytest.approx(
        dict.fromkeys(hooks, 0)
    )
    with pytest.warns(UserWarning, match=r"more than 0\.9 of the variance.*blocks\.1\.hook_mlp_out"):
        scores = attribute(model, tokens, basis=BASES["sae_mlp_out"])
    (batch,) = tokens.batches(8)
    values = run_values(model, batch, hooks)
    for layer, hook in enumerate(hooks):
        target = values[hook].flatten(0, 1)
        missed = (target - dictionary("sae_mlp_out", layer)(target)).square().sum()
        expected = float(missed / (target - target.mean(0)).square().sum())
        assert scores.settings["variance_unexplained"][hook] == pytest.approx(expected, rel=1e-6)
    curve = evaluate(model, tokens, scores, sizes=[3])
    assert curve.settings["variance_unexplained"] == scores.settings["variance_unexplained"]


@both_classes
def test_wrong_places_are_refused(case: ModelCase, tmp_path: Path) -> None:
    model = built(case)
    tokens = pairs(model)
    made = dictionary("sae_mlp_out", 0)
    with pytest.raises(DictionaryError, match="hook_nowhere"):
        attribute(model, tokens, basis=Dictionaries([as_dictionary(made, hook_in="blocks.0.hook_nowhere")]))
    with pytest.raises(DictionaryError, match=f"width {D_MODEL} at blocks.0.mlp.hook_post.*width {D_MLP}"):
        attribute(model, tokens, basis=Dictionaries([as_dictionary(made, hook_in="blocks.0.mlp.hook_post")]))
    with pytest.raises(DictionaryError, match=r"has 2 layers and nothing under blocks\.5"):
        attribute(model, tokens, basis=Dictionaries([dictionary("sae_mlp_out", 5)]))
    with pytest.raises(SettingsError, match=r"one dictionary per hook point.*blocks\.0\.hook_mlp_out"):
        attribute(model, tokens, basis=Dictionaries([made, dictionary("transcoder", 0)]))
    with pytest.raises(SettingsError, match="more than once"):
        attribute(model, tokens, basis=[MLPOutputs(), Dictionaries([made])])
    with pytest.raises(SettingsError, match="at least one dictionary"):
        Dictionaries([])
    with pytest.raises(SettingsError, match=r"cover the same layers.*'sae': \[0\]"):
        compare(model, tokens, tokens, bases=[Neurons(), Dictionaries([made])], methods=["relp"], sizes=[1])
    with pytest.raises(FileFormatError, match="absent"):
        load_dictionary(tmp_path / "absent")


def test_a_hook_that_does_not_fire_is_refused() -> None:
    """The Bridge of GPT-2 lists the joint projection of q, k and v, and never reaches it."""
    for case in (p.values[0] for p in all_models("gpt2") if p.values[0].backend == "TransformerBridge"):
        model = built(case)
        made = as_dictionary(dictionary("sae_mlp_out", 0), hook_in="blocks.0.attn.qkv.hook_out")
        for method in ("relp", "random", "patching"):
            with pytest.raises(UnsupportedModelError, match=r"expected the hook points.*qkv.*did not"):
                attribute(model, pairs(model), method=method, basis=Dictionaries([made]))


@quiet
def test_a_dictionary_from_its_folder_gives_the_same_scores(tmp_path: Path) -> None:
    (case, *_) = (p.values[0] for p in all_models("gpt2"))
    model = built(case, torch.float32)
    tokens = pairs(model)
    made = [dictionary("skip_transcoder", layer, torch.float32) for layer in range(N_LAYERS)]
    again = [load_dictionary(save_dictionary(d, tmp_path / str(i))) for i, d in enumerate(made)]
    one, other = (attribute(model, tokens, basis=Dictionaries(list(d))).flat() for d in (made, reversed(again)))
    assert torch.equal(one, other)


@quiet
@both_classes
def test_several_sites_make_one_list_of_nodes(case: ModelCase) -> None:
    """Attention outputs and a transcoder together: the scores of each alone, one after the other."""
    model = built(case)
    tokens = pairs(model)
    together = attribute(model, tokens, basis=[HeadOutputs(), BASES["transcoder"]])
    alone = [attribute(model, tokens, basis=b) for b in (HeadOutputs(), BASES["transcoder"])]
    torch.testing.assert_close(together.flat(), torch.cat([scores.flat() for scores in alone]))
