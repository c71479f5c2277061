"""Why a head looks where it looks: both sides and all pairs sum to its score, and equal products of weights."""

from typing import Any

import pandas as pd
import pytest
import torch

from tests.families import ModelCase, all_models, model_cases, random_tokens, typical_models
from tests.loops import for_each
from tl_neuron_circuits._errors import SettingsError, UnsupportedModelError
from tl_neuron_circuits.bases import Neurons
from tl_neuron_circuits.circuits._attention import AttentionContributions, attention_contributions
from tl_neuron_circuits.circuits._slots import find_slots
from tl_neuron_circuits.tasks import TokenizedPairs

FAMILIES = ("gpt2", "pythia", "llama", "gemma2", "qwen3", "bloom")
QUERY, KEY = 5, 3


def explain(model: Any, layer: int = 1, head: int = 1, **options: Any) -> AttentionContributions:
    tokens = random_tokens(model, 1, 7)
    batch = next(iter(TokenizedPairs.from_tokens(list(tokens), torch.tensor([3])).batches(1)))
    where = {"query": QUERY, "key": KEY} | options
    return attention_contributions(model, batch, find_slots(model, Neurons()), layer, head, **where)


@for_each("case", typical_models(*FAMILIES))
def test_both_sides_sum_to_the_change_of_the_log_pattern(case: ModelCase) -> None:
    """The softmax of the scores is the pattern, so value = d log A[key] for scores that all grow by their own size."""
    model = case.build()
    why = explain(model, top=10_000)
    pattern = model.run_with_cache(random_tokens(model, 1, 7))[1]["blocks.1.attn.hook_pattern"][0, 1, QUERY].detach()
    assert why.pattern == pytest.approx(float(pattern[KEY]))
    logs = pattern[: QUERY + 1].double().log()
    if case.family != "gemma2":  # its soft cap stands between scores and pattern
        expected = float(logs[KEY] - (logs * logs.exp()).sum())
        assert why.value == pytest.approx(expected, abs=1e-5)
    sides = why.writes.groupby("side")["contribution"].sum()
    assert sides["query"] == pytest.approx(why.value - why.position, abs=1e-6)
    assert sides["key"] == pytest.approx(why.value - why.position, abs=1e-6)
    assert (why.position != pytest.approx(0, abs=1e-6)) == (case.family == "bloom")


@pytest.mark.parametrize("case", [c for c in all_models("llama", "gemma2", "qwen3") if "Bridge" in c.id])
def test_without_biases_nothing_is_left_for_them_and_pairs_sum_to_the_marginals(case: ModelCase) -> None:
    why = explain(case.build(), top=10_000)
    biases = why.writes[why.writes["kind"] == "bias"]
    assert biases["contribution"].abs().max() < 1e-5
    by_key = why.pairs.groupby(["key_kind", "key_layer", "key_unit", "key_position"])["contribution"].sum()
    key_side = why.writes.query("side == 'key' and kind not in ('bias', 'unselected')")
    own = key_side.set_index(["kind", "layer", "unit", "position"])["contribution"]
    merged = pd.concat([by_key.rename_axis(own.index.names), own], axis=1, keys=["pairs", "side"]).dropna()
    assert len(merged) > 100 and float((merged["pairs"] - merged["side"]).abs().max()) < 1e-5


@pytest.mark.parametrize("case", [c for c in all_models("gpt2") if "Hooked" in c.id])
def test_writes_of_the_query_side_are_products_of_weights(case: ModelCase) -> None:
    """By hand: what wrote, through the norm with its scale frozen, through W_Q, times the keys' deviation from their
    mean.
    """
    model = case.build()
    why = explain(model, top=10_000)
    cache = model.run_with_cache(random_tokens(model, 1, 7))[1]
    pattern, keys = cache["blocks.1.attn.hook_pattern"][0, 1, QUERY], cache["blocks.1.attn.hook_k"][0, :, 1]
    deviation = keys[KEY] - pattern @ keys
    block = model.blocks[1]
    norm, scale = block.ln1, cache["blocks.1.ln1.hook_scale"][0, QUERY]

    def contribution(write: torch.Tensor) -> float:
        read = (write - write.mean()) / scale * norm.w
        return float((read @ block.attn.W_Q[1] @ deviation / model.cfg.attn_scale).detach())

    own = why.writes[(why.writes["side"] == "query") & (why.writes["kind"] != "unselected")]
    own = own.set_index(["kind", "layer", "unit", "position"])["contribution"]
    embedding = contribution(cache["hook_embed"][0, QUERY])
    assert own["embedding", -1, -1, QUERY] == pytest.approx(embedding, abs=1e-10)
    for head in range(4):
        write = cache["blocks.0.attn.hook_z"][0, QUERY, head] @ model.W_O[0, head]
        assert own["head", 0, head, QUERY] == pytest.approx(contribution(write), abs=1e-10)
    neurons = cache["blocks.0.mlp.hook_post"][0, QUERY]
    for unit in (0, 7, 23):
        write = neurons[unit] * model.W_out[0, unit]
        assert own["neuron", 0, unit, QUERY] == pytest.approx(contribution(write), abs=1e-10)


@for_each("case", [c for c in all_models(*FAMILIES, "opt") if "Hooked" in c.id and "bloom" not in c.id])
def test_taking_a_write_away_changes_the_score_by_its_contribution(case: ModelCase) -> None:
    """Slowly: the model run without one write at the query's position, its norms and the layer's keys held."""
    model = case.build()
    tokens = random_tokens(model, 1, 7)
    cache = model.run_with_cache(tokens)[1]
    names = [name for name in cache if name.endswith("hook_scale")] + ["blocks.1.attn.hook_k"]
    pattern = cache["blocks.1.attn.hook_pattern"][0, 1, QUERY, : QUERY + 1]
    cap = float(getattr(model.cfg, "attn_scores_soft_cap", -1))
    why = {raw: explain(model, top=10_000, raw=raw) for raw in (False, True)}

    def score(write: torch.Tensor, raw: bool) -> float:
        def without(value: torch.Tensor, hook: Any) -> torch.Tensor:
            value = value.clone()
            value[0, QUERY] -= write
            return value

        hooks = [(name, lambda value, hook, name=name: cache[name]) for name in names]
        store = {}
        hooks += [("blocks.1.hook_resid_pre", without)]
        hooks += [("blocks.1.attn.hook_attn_scores", lambda value, hook: store.update(scores=value))]
        with torch.no_grad(), model.hooks(fwd_hooks=hooks):
            model(tokens)
        scores = store["scores"][0, 1, QUERY, : QUERY + 1]
        scores = scores if cap <= 0 else cap * torch.atanh(scores / cap)
        seen = torch.where(pattern > 0, scores, 0.0)  # outside a sliding window scores are -inf
        return float(scores[KEY] - (0 if raw else pattern @ seen))

    layer = model.blocks[0]
    writes = {("embedding", -1, -1): cache["hook_embed"][0, QUERY]}
    if case.family != "gemma2":  # which has norms after attention and the MLP
        for unit in (3, 11):
            neuron = cache["blocks.0.mlp.hook_post"][0, QUERY, unit] * model.W_out[0, unit]
            writes["neuron", 0, unit] = neuron
        writes["head", 0, 2] = cache["blocks.0.attn.hook_z"][0, QUERY, 2] @ layer.attn.W_O[2]
    for raw, found in why.items():
        own = found.writes.query("side == 'query'").set_index(["kind", "layer", "unit", "position"])["contribution"]
        for (kind, number, unit), write in writes.items():
            change = score(torch.zeros_like(write), raw) - score(write.detach(), raw)
            assert own.get((kind, number, unit, QUERY), 0.0) == pytest.approx(change, abs=1e-8), (
                kind,
                number,
                unit,
                raw,
            )
        sides = found.writes.groupby("side")["contribution"].sum()
        assert sides["query"] == pytest.approx(found.value - found.position, abs=1e-8)
        assert sides["key"] == pytest.approx(found.value - found.position, abs=1e-8)


def test_few_rows_still_sum() -> None:
    why = explain(model_cases("gpt2")[0].build(), top=3)
    assert len(why.pairs) == 9
    sides = why.writes.groupby("side")["contribution"].sum()
    assert sides["query"] == pytest.approx(sides["key"], abs=1e-8) == pytest.approx(why.value - why.position, abs=1e-8)


def test_places_that_are_not_there_and_scores_that_are_not_shown_are_refused() -> None:
    model = model_cases("gpt2")[0].build()
    with pytest.raises(SettingsError, match="key <= query"):
        explain(model, key=6)
    for case in (c for c in model_cases("opt") if c.backend == "TransformerBridge"):
        with pytest.raises(UnsupportedModelError, match="hook_attn_scores"):
            explain(case.build())
