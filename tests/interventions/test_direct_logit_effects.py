"""Direct logit effects against gradients with frozen norms, and profiles and clusters."""

from typing import Any

import pandas as pd
import pytest
import torch

from tests.families import ModelCase, all_models, random_tokens
from tl_neuron_circuits._errors import NeuronCircuitsError, SettingsError
from tl_neuron_circuits.explain import Profiles, cluster, profiles, prompt_scores
from tl_neuron_circuits.explain._cluster import affinities
from tl_neuron_circuits.interventions import direct_logit_effects
from tl_neuron_circuits.interventions._direct_logit_effects import effects_on_logits, output_weights
from tl_neuron_circuits.propagation import relp
from tl_neuron_circuits.tasks import TokenizedPairs

few_models = pytest.mark.parametrize("case", all_models("gpt2", "llama", "gemma2"))
_CAPS = {"HookedTransformer": {"output_logits_soft_cap": -1.0}, "TransformerBridge": {"final_logit_softcapping": None}}


def gradients_of_logits(model: Any, tokens: Any, name: str) -> torch.Tensor:
    """d (logit - mean logit) / d unit at the last position, norms frozen: [d_vocab, unit]."""
    kept = {}

    def keep(value: Any, hook: Any) -> Any:
        kept["value"] = value
        return value

    with relp(model, rules=("ln",)), model.hooks(fwd_hooks=[(name, keep)]):
        last = model(tokens)[0, -1]
        centered = last - last.mean()
        rows = [torch.autograd.grad(c, kept["value"], retain_graph=True)[0][0, -1] for c in centered]
    return torch.stack(rows)


@pytest.mark.parametrize(
    "case",
    all_models(
        "gpt2", "gpt2_folded", "llama", "llama_folded", "gemma2", "gemma3", "pythia", "opt", "solu_ln", "no_norm"
    ),
)
def test_the_effect_is_the_gradient_through_frozen_norms_up_to_their_scale(case: ModelCase, untouched: Any) -> None:
    overrides = _CAPS[case.backend] if case.family == "gemma2" else {}
    model = case.build(**overrides)
    tokens = random_tokens(model, 1)
    gradient = gradients_of_logits(model, tokens, "blocks.1.mlp.hook_post")
    with untouched(model):
        weights = output_weights(model, 1)
        effects = effects_on_logits(model, 1, weights).T.to(gradient)
    scale = (effects * gradient).sum() / (gradient * gradient).sum()
    assert scale > 0
    torch.testing.assert_close(effects, gradient * scale, rtol=1e-3, atol=1e-4 * float(effects.abs().max()))


@few_models
def test_the_table_lists_the_extremes(case: ModelCase) -> None:
    model = case.build()
    effects = effects_on_logits(model, 0, output_weights(model, 0)[[3, 9]])
    found = direct_logit_effects(model, ["L0/N3@2", "L1/N4", "L0/N9"], k=4, batch_size=1)
    table = found.to_dataframe()
    assert len(table) == 3 * 8 and set(table["label"]) == {"L0/N3", "L0/N9", "L1/N4"}
    for label, effect in zip(("L0/N3", "L0/N9"), effects, strict=True):
        rows = table[table["label"] == label]
        up, down = (rows[rows["direction"] == d] for d in ("promoted", "suppressed"))
        assert list(up["token_id"]) == effect.topk(4).indices.tolist()
        assert list(down["token_id"]) == effect.topk(4, largest=False).indices.tolist()
        assert up["effect"].is_monotonic_decreasing and down["effect"].is_monotonic_increasing
    torch.testing.assert_close(effects.mean(1), torch.zeros(2), atol=1e-5, rtol=0)
    assert len(found.summary()) == 3 and "3 neurons" in repr(found) and "<table" in found._repr_html_()
    with pytest.raises(SettingsError, match="expected neurons"):
        direct_logit_effects(model, "L0/R3")
    with pytest.raises(SettingsError, match="units below 24"):
        direct_logit_effects(model, "L0/N24")
    with pytest.raises(SettingsError, match="k and batch_size"):
        direct_logit_effects(model, "L0/N3", k=0)


def test_html_of_tokens_is_escaped(stories260K: Any) -> None:
    found = direct_logit_effects(stories260K, [f"L4/N{unit}" for unit in range(172)], k=20)
    assert (found.table["token"] == "<").any() or (found.table["token"].str.contains("<")).any()
    assert "'<'" not in found._repr_html_()


# --- profiles ---


@few_models
def test_profiles_are_gradients_times_values(case: ModelCase, untouched: Any) -> None:
    model = case.build()
    tokens = random_tokens(model, 2, 5)
    labels = ["L1/N3@2", "L0/N5", "L1/N8@4"]
    model(tokens)
    with untouched(model):
        found = profiles(model, tokens, labels, goals=3, chunk=2)
    assert found.attribution.shape == (3, 10) and found.contribution.shape == (3, 6)
    for prompt in range(2):
        kept = {}

        def keep(value: Any, hook: Any, kept: dict = kept) -> Any:
            kept[hook.name] = value
            return value

        names = ["hook_embed", "blocks.0.mlp.hook_post", "blocks.1.mlp.hook_post"]
        points = {model.hook_dict[name].name: name for name in names}
        with relp(model), model.hooks(fwd_hooks=[(name, keep) for name in names]):
            logits = model(tokens[prompt][None])[0, -1]
            embed, zero, one = (kept[next(n for n, m in points.items() if m == name)] for name in names)
            targets = [one[0, 2, 3], zero[0, :, 5].sum(), one[0, 4, 8]]
            for row, target in enumerate(targets):
                (gradient,) = torch.autograd.grad(target, embed, retain_graph=True)
                expected = (gradient * embed).sum(-1)[0].detach().float()
                torch.testing.assert_close(
                    found.attribution[row, prompt * 5 : prompt * 5 + 5], expected, rtol=1e-4, atol=1e-5
                )
            for column, token in enumerate(logits.topk(3).indices.tolist()):
                a, b = torch.autograd.grad(logits[token] - logits.mean(), [zero, one], retain_graph=True)
                expected = (
                    torch.stack([(b * one)[0, 2, 3], (a * zero)[0, :, 5].sum(), (b * one)[0, 4, 8]]).detach().float()
                )
                torch.testing.assert_close(found.contribution[:, prompt * 3 + column], expected, rtol=1e-4, atol=1e-5)
    assert set(found.to_dataframe()["view"]) == {"attribution", "contribution"} and "3 nodes" in repr(found)
    with pytest.raises(SettingsError, match="positions below 5"):
        profiles(model, tokens, "L0/N3@7")


@few_models
def test_contributions_are_prompt_scores_of_the_same_goal(case: ModelCase) -> None:
    model = case.build()
    tokens = random_tokens(model, 1, 5)
    found = profiles(model, tokens, ["L0/N3", "L1/N4"], goals=1)
    pairs = TokenizedPairs.from_tokens(tokens, model(tokens)[:, -1].argmax(-1))
    scores = prompt_scores(
        model, pairs, ["L0/N3", "L1/N4"], metric=lambda logits, batch: logits[:, -1].amax(-1) - logits[:, -1].mean(-1)
    )
    torch.testing.assert_close(scores.values[0], found.contribution[:, 0], rtol=1e-4, atol=1e-6)


# --- clusters ---


def planted(groups: int = 3, each: int = 6) -> Profiles:
    generator = torch.Generator().manual_seed(0)
    views = []
    for width in (12, 8):
        centers = torch.eye(groups, width) * 3
        views.append(centers.repeat_interleave(each, 0) + 0.2 * torch.rand(groups * each, width, generator=generator))
    nodes = tuple(f"L0/N{i}" for i in range(groups * each))
    return Profiles(nodes, views[0], views[1], tuple("abcdefghijkl"), tuple("mnopqrst"))


def test_planted_clusters_are_found() -> None:
    pytest.importorskip("sklearn")
    found = cluster(planted(), 3)
    assert sorted(found.groups().values()) == sorted([[f"L0/N{6 * g + i}" for i in range(6)] for g in range(3)])
    assert torch.equal(found.labels, cluster(planted(), 3).labels)
    table = found.to_dataframe()
    assert (table["cohesion"] > 0.8).all() and len(found) == 3 and "3 clusters" in repr(found)
    assert "<table" in found._repr_html_()


def test_the_affinity_is_high_only_where_both_views_agree() -> None:
    a, b = torch.tensor([[1.0, 0.0], [1.0, 0.0], [0.0, 1.0]]), torch.tensor([[1.0, 0.0], [0.0, 1.0], [1.0, 0.0]])
    found = affinities(Profiles(("x", "y", "z"), a, b, ("s", "t"), ("u", "v")))
    assert float(found[0, 1]) < 1e-5 and float(found[0, 2]) < 1e-5 and torch.equal(found, found.T)
    same = affinities(Profiles(("x", "y", "z"), a, a, ("s", "t"), ("u", "v")))
    assert float(same[0, 1]) == pytest.approx(1.0)


def test_cluster_errors(monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("sklearn")
    with pytest.raises(SettingsError, match="2 to 17 clusters of 18 nodes; got 18"):
        cluster(planted(), 18)
    broken = planted()
    broken.attribution[0, 0] = float("nan")
    with pytest.raises(SettingsError, match="attribution has NaN"):
        cluster(broken, 3)
    monkeypatch.setitem(__import__("sys").modules, "sklearn.cluster", None)
    with pytest.raises(NeuronCircuitsError, match=r"tl-neuron-circuits\[explain\]"):
        cluster(planted(), 3)


def test_profiles_of_a_real_model_cluster(stories260K: Any) -> None:
    pytest.importorskip("sklearn")
    nodes = pd.DataFrame({"hook": "blocks.3.mlp.hook_post", "unit": range(30), "position": -1})
    found = profiles(stories260K, ["Lily saw a big ball.", "Tom was sad."], nodes)
    clusters = cluster(found, 4)
    assert sum(len(members) for members in clusters.groups().values()) == 30 and len(clusters) == 4
