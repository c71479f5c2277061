"""Heads in the edges: parts sum to the edge, equal a slow split, and are what path patching measures."""

from dataclasses import replace
from functools import partial
from typing import Any

import pandas as pd
import pytest
import torch
from torch import Tensor

import tl_neuron_circuits as tnc
from tests.families import ModelCase, all_models, model_cases, random_tokens, typical_models
from tests.loops import for_each
from tests.planted.circuits import N_CASES, N_TOKENS, Chain, planted_case, prompts
from tests.planted.load import load_planted
from tl_neuron_circuits import Circuit, trace
from tl_neuron_circuits._errors import PairsError, SettingsError, UnsupportedModelError
from tl_neuron_circuits.circuits import _heads
from tl_neuron_circuits.propagation import relp

FAMILIES = ("gpt2", "pythia", "llama_biased", "gemma2", "mistral", "bloom")
PROMPT = "The capital of the state containing Dallas is"


@pytest.fixture(scope="module")
def demo() -> Any:
    return tnc.load_demo_model()


@pytest.fixture(scope="module")
def dallas(demo: Any) -> Circuit:
    return trace(demo, PROMPT, " Austin", nodes=30).with_heads(edges=60)


def circuit_of(model: Any, **options: Any) -> Circuit:
    return trace(model, random_tokens(model, 1, 6)[0], [5, 9], nodes=20, keep_bos=True, **options)


def slow_part(model: Any, tokens: Tensor, source: pd.Series, target: pd.Series, at: tuple[int, int, int]) -> float:
    """One part by plain gradients.

    z of one head at one position depends on the values at one position, and nothing else in the attention of that layer
    or of later ones depends on anything.
    """
    layer, head, place = at
    n_layers, position = int(model.cfg.n_layers), int(target["position"])
    seen: dict[str, Tensor] = {}

    def gradient(*, live: bool) -> float:
        def keep(value: Tensor, hook: Any, name: str) -> Tensor:
            seen[name] = value
            return value

        def cut(value: Tensor, hook: Any, number: int) -> Tensor:
            seen[f"post {number}"] = value
            return leaf(value, hook, "leaf") if number == source["layer"] else value.detach()

        def leaf(value: Tensor, hook: Any, name: str) -> Tensor:
            seen[name] = value.detach().requires_grad_(True)
            return seen[name]

        def mix(value: Tensor, hook: Any, number: int) -> Tensor:
            if number < layer:
                return value
            z = value.detach().clone()
            if live and number == layer:
                pattern, v = seen[f"pattern {layer}"], seen[f"v {layer}"]
                by_head = z.reshape(1, z.shape[1], pattern.shape[1], -1)
                v = v.reshape(1, z.shape[1], -1, by_head.shape[-1])
                kv = head // (by_head.shape[2] // v.shape[2])
                part = pattern[0, head, position, place].detach() * v[0, place, kv]
                by_head[0, position, head] = by_head[0, position, head] - part.detach() + part
            return z

        hooks: list[Any] = [("hook_embed", partial(leaf, name="embedding"))]
        for number in range(n_layers):
            attention = f"blocks.{number}.attn"
            hooks += [(f"{attention}.hook_{name}", partial(keep, name=f"{name} {number}")) for name in ("v", "pattern")]
            hooks += [(f"{attention}.hook_z", partial(mix, number=number))]
            hooks += [(f"blocks.{number}.mlp.hook_post", partial(cut, number=number))]
        with relp(model), model.hooks(fwd_hooks=hooks):
            logits = model(tokens)
        if target["kind"] == "logit":
            row = logits[0, position]
            if (cap := float(getattr(model.cfg, "output_logits_soft_cap", 0) or 0)) > 0:
                row = cap * torch.atanh(row / cap)
            read = row[target["unit"]] - row.mean()
        else:
            read = seen[f"post {target['layer']}"][0, position, target["unit"]]
        name = "embedding" if source["kind"] == "embedding" else "leaf"
        (g,) = torch.autograd.grad(read, seen[name], allow_unused=True)
        if g is None:
            return 0.0
        product = (g * seen[name].detach())[0, source["position"]]
        return float(product.sum() if name == "embedding" else product[source["unit"]])

    return gradient(live=True) - gradient(live=False)


@for_each("case", typical_models(*FAMILIES))
def test_parts_sum_to_their_edge_and_equal_a_slow_split(case: ModelCase) -> None:
    model = case.build()
    circuit = circuit_of(model).with_heads(edges=40)
    parts, edges = circuit.heads(), circuit.edges.set_index(["source", "target"])["weight"]
    sums = parts.groupby(["source", "target"])["part"].sum()
    torch.testing.assert_close(
        torch.tensor(sums.to_numpy()), torch.tensor(edges[sums.index].to_numpy()), rtol=1e-4, atol=1e-7
    )
    nodes, tokens = circuit.nodes.set_index("node"), random_tokens(model, 1, 6)
    heads = parts[parts["kind"] == "head"]
    for row in heads.iloc[:: max(1, len(heads) // 6)].itertuples():
        at = (row.layer, row.head, row.from_position)
        slow = slow_part(model, tokens, nodes.loc[row.source], nodes.loc[row.target], at)
        assert row.part == pytest.approx(slow, rel=1e-4, abs=1e-7), f"{row.source} -> {row.target} by {at}"
    direct = parts[parts["kind"] == "direct"]
    assert (nodes.loc[direct["source"], "position"].to_numpy() == direct["from_position"]).all()
    assert (nodes.loc[direct["target"], "position"].to_numpy() == direct["from_position"]).all()


@pytest.mark.parametrize("case", typical_models("gpt2", "llama", "gemma2"))
def test_parts_sum_to_their_edge_in_float32(case: ModelCase) -> None:
    model = case.build(torch.float32)
    circuit = circuit_of(model)
    parts = circuit.heads(60)
    sums = parts.groupby(["source", "target"])["part"].sum()
    weights = circuit.edges.set_index(["source", "target"])["weight"][sums.index]
    off = (sums - weights).abs().to_numpy()
    sizes = parts["part"].abs().groupby([parts["source"], parts["target"]]).sum()[sums.index].to_numpy()
    assert (off <= 1e-4 * sizes).all()


@pytest.mark.parametrize("case", all_models("llama"))
def test_parts_of_pairs_sum_too(case: ModelCase) -> None:
    model = case.build(torch.float32)
    answers = torch.tensor([3, 4])
    pairs = tnc.TokenizedPairs.from_tokens(
        random_tokens(model, 2, 6), answers, random_tokens(model, 2, 6, seed=1), answers + 20
    )
    circuit = trace(model, pairs, nodes=15)
    with pytest.raises(PairsError, match="give them"):
        replace(circuit, traced=None).with_heads(model=model)
    split = replace(circuit, traced=None).with_heads(edges=30, model=model, pairs=pairs)
    pd.testing.assert_frame_equal(split.heads(), circuit.heads(30))
    sums = split.heads().groupby(["source", "target"])["part"].sum()
    weights = circuit.edges.set_index(["source", "target"])["weight"][sums.index]
    torch.testing.assert_close(torch.tensor(sums.to_numpy()), torch.tensor(weights.to_numpy()), rtol=1e-3, atol=1e-5)


def single_heads(seed: int) -> list[tuple[int, Chain]]:
    """Chains embedding -> head -> logits, with their numbers."""
    chains = enumerate(planted_case(seed).chains)
    return [(number, chain) for number, chain in chains if len(chain.nodes) == 3 and "/H" in chain.nodes[1]]


def test_the_planted_head_carries_the_edge() -> None:
    """It brings the token it asks about, from where it stands, more than any other head, for nearly all chains.

    In one of the eleven another head is the last: it passes on what the planted head brought.
    """
    right = []
    for seed, (number, chain) in [(case, one) for case in range(N_CASES) for one in single_heads(case)]:
        planted, layer, head = load_planted(seed), *(int(part[1:]) for part in chain.nodes[1].split("/"))
        for tokens in prompts(2, 5):
            answer = int(planted.case.answers(tokens[None])[0, number]) + number * N_TOKENS
            circuit = trace(planted.model, tokens, answer, nodes=5, keep_bos=True)
            ends = pd.DataFrame({"source": [f"embed@{chain.position}"], "target": [f"logit/{answer}"]})
            best = circuit.with_heads(ends).heads().query("kind == 'head'").iloc[0]
            right.append((best["layer"], best["head"], best["from_position"]) == (layer, head, chain.position))
    assert len(right) == 22 and sum(right) >= 18


@pytest.mark.parametrize("case", [c for c in all_models("gpt2", "llama") if "Hooked" in c.id])
def test_cutting_with_norms_and_patterns_held_moves_logits_by_exactly_the_part(case: ModelCase) -> None:
    """Path patching is linear then: each row of its batch gets the norms and patterns of the first, the live one."""
    model = case.build()
    circuit = circuit_of(model).with_heads(edges=60)
    parts = circuit.heads()
    parts = parts[(parts["kind"] == "head") & parts["target"].str.startswith("logit")]

    def hold(value: Tensor, hook: Any) -> Tensor:
        return value[:1].expand_as(value).clone()

    held = [(name, hold) for name in model.hook_dict if name.endswith(("hook_scale", "hook_pattern"))]
    with model.hooks(fwd_hooks=held):
        tested = circuit.cut_heads(parts)
    assert len(tested) > 20
    torch.testing.assert_close(
        torch.tensor(tested["measured"].to_numpy()), torch.tensor(tested["predicted"].to_numpy()), rtol=1e-4, atol=1e-5
    )


def test_parts_are_saved_pruned_and_asked_for(demo: Any, dallas: Circuit, tmp_path: Any) -> None:
    dallas.save(tmp_path / "c")
    again = Circuit.load(tmp_path / "c")
    pd.testing.assert_frame_equal(again.heads(), dallas.heads())
    dallas.to_neuronpedia(tmp_path / "graph.json")
    pd.testing.assert_frame_equal(Circuit.from_neuronpedia(tmp_path / "graph.json").heads(), dallas.heads())
    assert len(dallas.heads(3)[["source", "target"]].drop_duplicates()) == 3
    first = dallas.heads().iloc[0]
    one = dallas.heads([(first["source"], first["target"])])
    assert one["share"].sum() == pytest.approx(1, abs=1e-4)
    small = dallas.prune(count=5)
    assert set(zip(small.heads()["source"], small.heads()["target"], strict=True)) <= set(
        zip(small.edges["source"], small.edges["target"], strict=True)
    )
    assert (dallas | dallas).head_parts is None  # averaged edges are others
    with pytest.raises(SettingsError, match="model="):
        Circuit.load(tmp_path / "c").heads(1000)
    with pytest.raises(SettingsError, match="are not"):
        dallas.heads([("embed@0", "nothing")])


def test_cutting_leaves_the_model_as_found(demo: Any, dallas: Circuit) -> None:
    """Without anything held, the norms of a small model respond a lot: sign and order alone are what can be asked."""
    tested = dallas.cut_heads()
    assert len(tested) == 20 and tested["predicted"].corr(tested["measured"]) > 0.6
    assert not any(point.fwd_hooks for point in demo.hook_dict.values())


def test_attention_that_is_not_pattern_times_values_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    model = model_cases("gpt2")[0].build()
    circuit = circuit_of(model)
    monkeypatch.setattr(_heads, "nearly_equal", lambda *_: False)
    with pytest.raises(UnsupportedModelError, match="hook_pattern times hook_v"):
        circuit.with_heads()


def test_another_models_circuit_is_refused() -> None:
    model = model_cases("gpt2")[0]
    circuit = circuit_of(model.build())
    with pytest.raises(SettingsError, match="other weights"):
        circuit.with_heads(model=model.build(seed=1))
