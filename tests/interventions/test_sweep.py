"""Groups against groups and the output: rows are single steers, complements are the rest, controls are matched."""

import copy
from typing import Any

import pytest
import torch
from torch.utils.checkpoint import checkpoint

import tl_neuron_circuits as tnc
from tests.families import MAJOR, ModelCase, all_models, random_tokens
from tests.interventions.test_steering import logits_with
from tests.loops import for_each
from tests.propagation.test_threads import in_a_thread
from tl_neuron_circuits._errors import PropagationError, SettingsError
from tl_neuron_circuits.interventions import steer, steering_hooks, sweep
from tl_neuron_circuits.interventions._continue import _with_cache, continue_greedily
from tl_neuron_circuits.interventions._find_nodes import find_nodes
from tl_neuron_circuits.interventions._matched import POOL, draw_matched
from tl_neuron_circuits.interventions._steering_prompts import read_prompts

FAMILY = all_models("llama")
GROUPS = {"early": ["L0/N3@2", "L0/N8@2"], "late": ["L1/N7@4", "L1/N0"]}
TEXTS = ["The dog near the cats", "The cats near the dog", "The girl near the boys"]


@pytest.mark.parametrize("case", FAMILY)
def test_every_row_of_the_matrix_is_a_single_steer(case: ModelCase, untouched: Any) -> None:
    model = case.build(dtype=torch.float32)
    tokens = random_tokens(model, batch=3)
    pairs = tnc.TokenizedPairs.from_tokens(tokens, torch.tensor([3, 4, 5]), wrong_answer=torch.tensor([6, 7, 8]))
    model(tokens)
    with untouched(model):
        swept = sweep(model, pairs, GROUPS, scales=(1, -2), complement=True)
    names = ["early", "late", "all but early", "all but late"]
    assert list(swept.steered) == names
    for scale in (1.0, -2.0):
        matrix = swept.matrix(scale)
        assert list(matrix.index) == names
        assert list(matrix.columns) == ["early", "late", "kl", "log p", "logit difference"]
        for name in names:
            complement, group = name.startswith("all but"), GROUPS[name.removeprefix("all but ")]
            one = steer(model, tokens, group, scale=scale, complement=complement, watch=GROUPS)
            place = names.index(name) * 2 + swept.scales.index(scale)
            assert torch.equal(swept.results[place].after, one.after)
            for read in GROUPS:
                assert matrix.loc[name, read] == float(one.watched[read].double().mean())
            assert matrix.loc[name, "kl"] == pytest.approx(float(one.kl.double().mean()), abs=1e-7)
            rows = torch.arange(3)
            before, after = (z.double().log_softmax(-1) for z in (one.before, one.after))
            change = (after - before)[rows, pairs.answer]
            assert matrix.loc[name, "log p"] == pytest.approx(float(change.mean()), abs=1e-9)
            gap = change - (after - before)[rows, pairs.wrong_answer]
            assert matrix.loc[name, "logit difference"] == pytest.approx(float(gap.mean()), abs=1e-6)
            if scale == 1:
                assert torch.equal(one.after, one.before) and (matrix.loc[name] == 0).all()
    effects = swept.effects()
    assert (effects["low"] <= effects["mean"] + 1e-12).all() and (effects["mean"] <= effects["high"] + 1e-12).all()
    assert "early" in swept._repr_html_() and len(swept.plot(1, "late").data)


@for_each("change", [{"scale": 0}, {"value": 0.5}, {"add": -1.0}])
def test_the_complement_of_nothing_is_everything_and_of_everything_nothing(change: dict[str, Any]) -> None:
    model = FAMILY[0].values[0].build(dtype=torch.float32)
    tokens = random_tokens(model, batch=2)
    every = [f"L{layer}/N{unit}" for layer in range(2) for unit in range(24)]
    everything = logits_with(model, tokens, steering_hooks(model, every, **change))
    nothing = logits_with(model, tokens, [])
    for kept, among, expected in (
        ([], True, everything),
        ([], every, everything),
        (every, True, nothing),
        (every, every, nothing),
        (every[:9], True, logits_with(model, tokens, steering_hooks(model, every[9:], **change))),
        (every[:9], every[:12], logits_with(model, tokens, steering_hooks(model, every[9:12], **change))),
    ):
        rest = steering_hooks(model, kept, **change, complement=among)
        assert torch.equal(logits_with(model, tokens, rest), expected)
    # A node with a position is left alone there alone, also by what is steered at every position.
    places = [f"{label}@{place}" for label in every for place in range(7)]
    listed = steering_hooks(model, [place for place in places if place != "L0/N3@2"], **change)
    rest = logits_with(model, tokens, steering_hooks(model, ["L0/N3@2"], **change, complement=True))
    assert torch.equal(rest, logits_with(model, tokens, listed))


def test_complements_of_features_and_what_has_none() -> None:
    model = tnc.load_demo_model()
    basis = tnc.bases.Dictionaries(tnc.load_demo_dictionaries("sae"))
    n_features = [int(site.dictionary.W_dec.shape[0]) for site in basis.sites(model)]
    every = [
        f"L{site.layer}/F{unit}" for site, n in zip(basis.sites(model), n_features, strict=True) for unit in range(n)
    ]
    tokens = model.to_tokens(TEXTS[0])
    rest, listed = (
        logits_with(model, tokens, steering_hooks(model, nodes, scale=0.5, basis=basis, complement=complement))
        for nodes, complement in ((every[:3], True), (every[3:], False))
    )
    torch.testing.assert_close(rest, listed, rtol=1e-5, atol=1e-5)
    assert not torch.equal(rest, logits_with(model, tokens, []))
    embedding = find_nodes(model, ["L0/N1"]).assign(hook="hook_embed")
    with pytest.raises(SettingsError, match="no others are known"):
        steering_hooks(model, embedding.drop(columns="label"), scale=0, complement=True)
    with pytest.raises(SettingsError, match="a number with complement"):
        steering_hooks(model, ["L0/N1"], value=torch.zeros(1), complement=True)
    with pytest.raises(SettingsError, match="at least one neuron"):
        steering_hooks(model, [], scale=0)


def test_batched_prompts_are_steered_as_one_by_one_and_intervals_cover_them() -> None:
    model = tnc.load_demo_model()
    groups = {"noun": [f"L0/N{unit}@1" for unit in range(40)], "last": [f"L2/N{unit}" for unit in range(40)]}
    prompts = [*TEXTS, "The boys"]  # of two lengths
    swept = sweep(model, prompts, groups, scales=(0,), controls=3, seed=1)
    single = [sweep(model, prompt, groups, scales=(0,)) for prompt in prompts]
    means = torch.stack([torch.tensor(one.matrix().to_numpy()) for one in single]).mean(0)
    torch.testing.assert_close(torch.tensor(swept.matrix().to_numpy()), means, rtol=1e-4, atol=1e-6)
    assert single[0].effects()["low"].isna().all()
    effects = swept.effects()
    assert (effects["low"] < effects["high"])[effects["read"] == "kl"].all()
    # The controls are what steering the drawn nodes gives.
    read, frames = (
        read_prompts(model, prompts),
        {name: find_nodes(model, nodes, features=True) for name, nodes in groups.items()},
    )
    drawn = draw_matched(model, read, frames, 3, 1, 32)
    for name, draws in drawn.items():
        kls = [float(steer(model, prompts, draw.nodes, scale=0).kl.mean()) for draw in draws]
        row = effects[(effects["steered"] == name) & (effects["read"] == "kl")].iloc[0]
        assert row["control"] == pytest.approx(sum(kls) / 3, rel=1e-4)
        assert row["p"] == pytest.approx((1 + sum(kl >= row["mean"] for kl in kls)) / 4)


def test_controls_are_other_nodes_of_the_same_place_and_size() -> None:
    model = tnc.load_demo_model()
    prompts = read_prompts(model, TEXTS)
    groups = {"a": [f"L1/N{unit}@3" for unit in range(12)], "b": ["L1/N100", "L2/N5@1"]}
    frames = {name: find_nodes(model, nodes, features=True) for name, nodes in groups.items()}
    _, cache = model.run_with_cache(torch.stack(list(prompts.tokens)))
    size = cache["blocks.1.mlp.hook_post"][:, 3].abs().mean(0)
    for draw in draw_matched(model, prompts, frames, 5, 0, 2)["a"]:
        units = list(draw.nodes["unit"])
        assert len(set(units)) == 12 and not set(units) & {*range(12), 100}
        assert (draw.nodes["position"] == 3).all() and (draw.nodes["hook"] == "blocks.1.mlp.hook_post").all()
        for own, other in enumerate(units):
            distance = (size - size[own]).abs()
            distance[[*range(12), 100, *units[:own]]] = torch.inf
            assert distance[other] <= distance.sort().values[POOL - 1]
        assert draw.size == pytest.approx(float(size[units].sum() / size[:12].sum()), rel=1e-5)
    every = {"all": [f"L1/N{unit}@3" for unit in range(512)]}
    with pytest.raises(SettingsError, match="outside the groups"):
        sweep(model, TEXTS, every, scales=(0,), controls=1)


def test_a_group_that_is_silent_has_no_relative_change_and_no_p() -> None:
    model = tnc.load_demo_model()
    basis = tnc.bases.Dictionaries(tnc.load_demo_dictionaries("sae"))
    labels = [f"L1/F{unit}@2" for unit in range(60)]
    values = tnc.node_values(model, TEXTS[0], labels, basis=basis)[0]
    silent = [label for label, value in zip(labels, values, strict=True) if value == 0][:3]
    loud = [label for label, value in zip(labels, values, strict=True) if value > 0]
    groups = {"silent": silent, "loud": loud or ["L0/F0@2"]}
    table = (
        sweep(model, TEXTS[0], groups, scales=(0,), controls=2, basis=basis).effects().set_index(["steered", "read"])
    )
    assert table.loc[("silent", "silent"), ["mean", "p"]].isna().all()
    assert table.loc[("silent", "kl"), "mean"] == 0 and table.loc[("silent", "kl"), "p"] == 1


def test_groups_with_a_donors_values_are_interchanges_and_complements_the_rest() -> None:
    model = tnc.load_demo_model()
    groups = {"noun": ["L0/N3@2", "L1/N8@2"], "last": ["L2/N7@5", "L3/N1@5"]}
    everything, donors = (
        [*groups["noun"], *groups["last"]],
        ["The dogs near the cat", "The boys near the dog", TEXTS[0]],
    )
    swept = sweep(model, TEXTS, groups, scales=(0,), donor=donors, complement=everything, controls=2)
    others = {"noun": "last", "last": "noun"}
    for name in swept.steered:
        moved = others[name.removeprefix("all but ")] if name.startswith("all but") else name
        alone = tnc.interchange(model, TEXTS, donors, groups[moved], watch=groups)
        result = swept.results[2 * swept.steered.index(name) + 1]
        assert torch.equal(result.after, alone.after) and not torch.equal(alone.after, alone.before)
        for read in groups:
            assert swept.matrix("donor").loc[name, read] == float(alone.watched[read].double().mean())
    frames = {name: find_nodes(model, nodes, features=True) for name, nodes in groups.items()}
    draws = draw_matched(model, read_prompts(model, TEXTS), frames, 2, 0, 32)["last"]
    kls = [float(tnc.interchange(model, TEXTS, donors, draw.nodes).kl.mean()) for draw in draws]
    assert swept.matrix("donor", "control").loc["last", "kl"] == pytest.approx(sum(kls) / 2, rel=1e-4)
    assert len(swept.plot().data) and "donor" in repr(swept) and swept._repr_html_()
    only = sweep(model, TEXTS, groups, scales=(), donor=TEXTS[0])
    assert float(only.results[0].kl[0]) < 1e-9 and only.matrix().index.tolist() == ["noun", "last"]
    alone = sweep(model, TEXTS, everything, scales=(), donor=donors)
    assert torch.equal(alone.results[0].after, tnc.interchange(model, TEXTS, donors, everything).after)
    cases: list[tuple[Any, dict[str, Any], str]] = [
        (groups, {"donor": TEXTS[:2]}, "one donor or 3"),
        (groups, {"donor": donors, "complement": True}, "among which"),
        ({"free": ["L0/N3"]}, {"donor": donors}, "a position for every node"),
    ]
    for nodes, arguments, message in cases:
        with pytest.raises(SettingsError, match=message):
            sweep(model, TEXTS, nodes, scales=(), **arguments)
    with pytest.raises(SettingsError, match="the figure's axis"):
        only.plot()


def test_groups_with_wrong_settings_are_refused() -> None:
    model = tnc.load_demo_model()
    cases: list[tuple[dict[str, Any], str]] = [
        ({"nodes": ["L0/N1"], "controls": 3}, "groups by name"),
        ({"nodes": ["L0/N1"], "complement": True}, "groups by name"),
        ({"nodes": {}}, "at least one group"),
        ({"nodes": {"kl": ["L0/N1"]}}, "none of"),
        ({"nodes": {"a": ["L0/N1"]}, "watch": {"a": ["L0/N2"]}}, "every group's name once"),
        ({"nodes": {"a": []}}, "at least one neuron"),
    ]
    for arguments, message in cases:
        with pytest.raises(SettingsError, match=message):
            sweep(model, TEXTS[0], **arguments)
    swept = sweep(model, TEXTS[0], {"a": ["L0/N1"]}, scales=(0, 2))
    for call in (lambda: swept.matrix(), lambda: swept.matrix(1), lambda: swept.matrix(0, "p")):
        with pytest.raises(SettingsError, match="expected"):
            call()


# --- generated text ---


@for_each("case", [p.values[0] for p in all_models("llama", "opt")], ids=str)
def test_text_generated_with_the_cache_is_the_text_without(case: ModelCase, untouched: Any) -> None:
    model = case.build(dtype=torch.float32)
    tokens = random_tokens(model, batch=2, pos=5)
    model(tokens)
    for hooks in (
        steering_hooks(model, ["L0/N3@2", "L1/N7@0", "L1/N2"], value=6.0),
        steering_hooks(model, ["L0/N3@2", "L1/N2"], scale=-2, complement=True),
    ):
        with untouched(model):
            cached, plain = (continue_greedily(model, tokens, 6, hooks, cache=cache) for cache in (True, False))
        assert cached == plain != continue_greedily(model, tokens, 6, [])
        widths: list[int] = []
        seen = ("blocks.0.mlp.hook_post", lambda value, hook, widths=widths: widths.append(value.shape[1]))
        with torch.no_grad(), model.hooks(fwd_hooks=[*hooks, seen]):
            assert _with_cache(model, tokens, 6, None) is not None
        assert widths[-4:] == [1] * 4  # and nothing was run over the whole text after the comparison


@pytest.mark.skipif(MAJOR < 3, reason="TransformerLens 2 has no TransformerBridge")
def test_a_cache_that_loses_the_prompt_is_not_used(monkeypatch: pytest.MonkeyPatch) -> None:
    from tl_neuron_circuits.interventions import _continue

    model = FAMILY[-1].values[0].build(dtype=torch.float32)  # a TransformerBridge
    tokens = random_tokens(model, batch=2, pos=5)
    expected = continue_greedily(model, tokens, 6, [], cache=False)
    empty = _continue._pass_of_bridge
    monkeypatch.setattr(
        _continue, "_pass_of_bridge", lambda model, batch: lambda tokens, seen: empty(model, batch)(tokens, 0)
    )
    with torch.no_grad():
        assert _with_cache(model, tokens, 6, None) is None
    assert continue_greedily(model, tokens, 6, []) == expected


# --- threads ---


def test_steering_hooks_act_in_the_thread_that_made_them_and_in_backward_passes(untouched: Any) -> None:
    model = FAMILY[-1].values[0].build(dtype=torch.float32)
    tokens = random_tokens(model)
    model.requires_grad_(False)
    model(tokens)
    hooks = steering_hooks(model, ["L0/N3@2", "L1/N7"], scale=3)
    with untouched(model), model.hooks(fwd_hooks=hooks):
        error = in_a_thread(lambda: model(tokens))
        assert isinstance(error, PropagationError) and "call steering_hooks in the thread" in str(error)
        expected = model(tokens)
        # Checkpointing runs the forward pass again, in autograd's thread.
        embedded = torch.zeros(1, requires_grad=True)
        again = checkpoint(lambda x: model(tokens) + x, embedded, use_reentrant=False)
        in_a_thread(lambda: again.sum().backward())
        assert torch.equal(again, expected) and embedded.grad is not None
    other = copy.deepcopy(model)
    steered = in_a_thread(lambda: steer(other, tokens, ["L0/N3@2", "L1/N7"], scale=3).after)
    assert torch.equal(steered, expected[:, -1].detach().float())
