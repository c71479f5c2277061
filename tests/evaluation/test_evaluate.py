"""Faithfulness and completeness of node sets: endpoints, a slow loop close to the definition, every ablation."""

from collections.abc import Sequence
from dataclasses import replace
from functools import cache
from typing import Any

import pytest
import torch
from torch import Tensor

from tests.bases.site_dictionaries import PLACES, dictionaries, dictionary, pairs
from tests.families import N_LAYERS, ModelCase, all_models, typical_models
from tests.loops import for_each
from tl_neuron_circuits import NodeScores, attribute, compare, evaluate, load_demo_model
from tl_neuron_circuits._errors import NumericalError, PairsError, SettingsError
from tl_neuron_circuits.bases import (
    AttentionBlockOutputs,
    Dictionaries,
    HeadOutputs,
    MLPOutputs,
    Neurons,
    ResidualStream,
)
from tl_neuron_circuits.bases._runs import run_values
from tl_neuron_circuits.bases._site import Basis
from tl_neuron_circuits.tasks import TokenizedPairs, logit_difference, subject_verb_agreement
from tl_neuron_circuits.tasks._metrics import measure

BASES: dict[str, Basis | list[Basis]] = {
    basis.name: basis for basis in (Neurons(), MLPOutputs(), HeadOutputs(), ResidualStream(), AttentionBlockOutputs())
}
BASES |= {place: dictionaries(place) for place in PLACES}
BASES["attention and transcoder"] = [HeadOutputs(), dictionaries("transcoder")]
BASES["attention SAE, neurons and residual stream"] = [dictionaries("sae_attention"), Neurons(), ResidualStream([1])]
quiet = pytest.mark.filterwarnings("ignore:dictionaries leave more than 0.9")  # random dictionaries explain nothing
both_classes = pytest.mark.parametrize("case", all_models("gpt2"))


@cache
def built(case: ModelCase) -> Any:
    return case.build()


@cache
def scored(case: ModelCase, name: str) -> NodeScores:
    return attribute(built(case), pairs(built(case)), basis=BASES[name])


@quiet
@for_each("name", BASES)
@for_each("case", typical_models("gpt2", "llama"))
def test_all_nodes_give_1_and_0_and_none_0_and_1(case: ModelCase, name: str) -> None:
    model = built(case)
    scores = scored(case, name)
    curve = evaluate(model, pairs(model), scores, sizes=[0, len(scores) // 3, len(scores)], batch_size=4)
    assert curve.faithfulness[[0, -1]] == pytest.approx([0, 1], abs=1e-4)
    assert curve.completeness[[0, -1]] == pytest.approx([1, 0], abs=1e-4)
    assert curve.n_nodes == len(scores) and 0 < abs(curve.faithfulness[1]) and curve.faithfulness[1] != 1


@quiet
@for_each("error", ["keep", "ablate"])
@for_each("name", ["sae_mlp_out", "skip_transcoder", "attention and transcoder"])
@both_classes
def test_an_error_that_is_no_node_is_always_kept_or_always_ablated(case: ModelCase, name: str, error: Any) -> None:
    """Kept: all nodes give the original model. Ablated: they give the dictionaries' own reconstruction, not 1."""
    model, tokens = built(case), pairs(built(case))
    scores = scored(case, name)
    n_errors = sum(block.numel() for block in scores.errors.values())
    n_nodes = len(scores) - n_errors
    curve = evaluate(model, tokens, scores, sizes=[0, n_nodes], error_nodes=error)
    assert curve.n_nodes == n_nodes and n_errors == N_LAYERS * 5
    assert curve.faithfulness[0] == pytest.approx(0, abs=1e-4)
    if error == "keep":
        assert curve.faithfulness[1] == pytest.approx(1, abs=1e-4)
        assert curve.completeness == pytest.approx([1, 0], abs=1e-4)
    else:
        assert abs(curve.faithfulness[1] - 1) > 1e-2
        assert curve.completeness[1] == pytest.approx(0, abs=1e-4)  # empties both
        assert curve.completeness[0] == pytest.approx(curve.faithfulness[1], abs=1e-6)
    with pytest.raises(SettingsError, match=f"number of nodes, {n_nodes:,}"):
        evaluate(model, tokens, scores, sizes=[n_nodes + 1], error_nodes=error)


def kept_by_hand(model: Any, tokens: TokenizedPairs, kept: set[tuple[int, int, int]], base: list[Tensor]) -> Tensor:
    """The metric of each prompt alone, neurons outside `kept` (layer, position, unit) set to `base` one by one."""
    out = []
    for batch in tokens.batches(1):
        (row,) = batch.index.tolist()

        def ablate(value: Tensor, hook: Any, row: int = row) -> Tensor:
            layer = int(hook.name.split(".")[1])
            changed = value.clone()
            for position in range(value.shape[1]):
                for unit in range(value.shape[2]):
                    if (layer, position, unit) not in kept:
                        changed[0, position, unit] = base[layer][row, position, unit]
            return changed

        hooks = [(f"blocks.{layer}.mlp.hook_post", ablate) for layer in range(N_LAYERS)]
        with torch.no_grad():
            logits = model.run_with_hooks(batch.clean, fwd_hooks=hooks)
        out.append(measure(logit_difference, logits, batch))
    return torch.cat(out).float()


@for_each("ablation", ["mean", "zero", "corrupt"])
@both_classes
def test_curves_are_a_slow_loops(case: ModelCase, ablation: Any) -> None:
    """Kept neurons are live: whatever the ablated run computes, not their clean value."""
    model = built(case)
    tokens = pairs(model, n=4, length=3)
    scores = attribute(model, tokens)
    curve = evaluate(model, tokens, scores, sizes=[9, 40], ablation=ablation, batch_size=3)
    hooks = list(scores.values)
    (batch,) = tokens.batches(8)
    corrupt = run_values(model, batch.on_corrupt(), hooks)
    base = {"mean": lambda v: v.mean(0).expand_as(v), "zero": torch.zeros_like, "corrupt": lambda v: v}[ablation]
    bases = [base(corrupt[hook]) for hook in hooks]
    every = {(layer, p, u) for layer in range(N_LAYERS) for p in range(3) for u in range(model.cfg.d_mlp)}
    for row, size in enumerate(curve.sizes):
        best = {(r.layer, r.position, r.unit) for r in scores.top(size).itertuples()}
        torch.testing.assert_close(curve.kept[row], kept_by_hand(model, tokens, best, bases), atol=1e-5, rtol=1e-5)
        torch.testing.assert_close(
            curve.removed[row], kept_by_hand(model, tokens, every - best, bases), atol=1e-5, rtol=1e-5
        )
        assert float(curve.predicted[row]) == pytest.approx(scores.top(size)["score"].sum(), rel=1e-5)
    torch.testing.assert_close(curve.empty, kept_by_hand(model, tokens, set(), bases), atol=1e-5, rtol=1e-5)


@quiet
@both_classes
def test_a_kept_feature_is_read_off_the_ablated_run(case: ModelCase) -> None:
    """A transcoder in layer 1 whose layer 0 is ablated: by hand, with encode, W_dec and the mean of the error."""
    model = built(case)
    tokens = pairs(model, n=4, length=3)
    made = [dictionary("skip_transcoder", layer) for layer in range(N_LAYERS)]
    scores = attribute(model, tokens, basis=Dictionaries(made))
    (batch,) = tokens.batches(8)
    names = [f"blocks.{layer}.{site}" for layer in range(N_LAYERS) for site in ("ln2.hook_normalized", "hook_mlp_out")]
    corrupt = run_values(model, batch.on_corrupt(), names)
    best = scores.top(12)
    chosen = {(r.layer, r.position, r.kind, r.unit) for r in best.itertuples()}
    assert {kind for _, _, kind, _ in chosen} >= {"node", "error"}
    seen: dict[int, Tensor] = {}

    def read(value: Tensor, hook: Any) -> None:
        seen[int(hook.name.split(".")[1])] = value

    def write(value: Tensor, hook: Any, layer: int) -> Tensor:
        d, x = made[layer], seen[layer]
        other_x, other = corrupt[f"blocks.{layer}.ln2.hook_normalized"], corrupt[f"blocks.{layer}.hook_mlp_out"]
        live = {"node": d.encode(x), "skip": d.skip(x), "error": value - d(x)}
        base = {"node": d.encode(other_x), "skip": d.skip(other_x), "error": other - d(other_x)}
        parts = {kind: b.mean(0, keepdim=True).expand_as(live[kind]).clone() for kind, b in base.items()}
        for at, position, kind, unit in chosen:
            if at == layer:
                where = (slice(None), position, unit) if kind == "node" else (slice(None), position)
                parts[kind][where] = live[kind][where]
        return parts["node"] @ d.W_dec + d.b_dec + parts["skip"] + parts["error"]

    hooks = [(f"blocks.{layer}.ln2.hook_normalized", read) for layer in range(N_LAYERS)]
    hooks += [
        (f"blocks.{layer}.hook_mlp_out", lambda value, hook, layer=layer: write(value, hook, layer))
        for layer in range(N_LAYERS)
    ]
    with torch.no_grad():
        logits = model.run_with_hooks(batch.clean, fwd_hooks=hooks)
    curve = evaluate(model, tokens, scores, sizes=[12])
    expected = measure(logit_difference, logits, batch).float()
    torch.testing.assert_close(curve.kept[0], expected, atol=1e-5, rtol=1e-5)


@quiet
@both_classes
def test_resampling_gives_every_prompt_another_prompts_values(case: ModelCase) -> None:
    """Of two prompts each gets the other's, whatever the batches; a seed gives the same values again."""
    model = built(case)
    two = pairs(model, n=2)
    swapped = TokenizedPairs.from_tokens(
        torch.stack(list(two.clean)), two.answer, torch.stack(list(two.corrupt or ())).flip(0), two.wrong_answer
    )
    scores = scored(case, "skip_transcoder")
    other = evaluate(model, swapped, scores, sizes=[9], ablation="corrupt")
    for batch_size in (1, 2):
        found = evaluate(model, two, scores, sizes=[9], ablation="resample", batch_size=batch_size)
        torch.testing.assert_close(found.kept, other.kept, atol=1e-5, rtol=1e-5)
    many = pairs(model)
    runs = [evaluate(model, many, scores, sizes=[9], ablation="resample", seed=seed).kept for seed in (0, 0, 1)]
    assert torch.equal(runs[0], runs[1]) and not torch.equal(runs[0], runs[2])


@both_classes
def test_signed_ranking_and_sums_over_positions(case: ModelCase) -> None:
    model = built(case)
    tokens = pairs(model)
    scores = scored(case, "neurons")
    signed = evaluate(model, tokens, scores, sizes=[20], ranking="signed")
    assert float(signed.predicted[0]) == pytest.approx(scores.top(20, by="signed")["score"].sum(), rel=1e-5)
    summed = attribute(model, tokens, positions="sum")
    curve = evaluate(model, tokens, summed, sizes=[0, 5, len(summed)])
    assert curve.n_nodes == N_LAYERS * model.cfg.d_mlp
    assert curve.faithfulness[[0, -1]] == pytest.approx([0, 1], abs=1e-4)


@both_classes
def test_the_model_is_left_as_it_was_and_nothing_is_printed(case: ModelCase, untouched: Any, capfd: Any) -> None:
    model, tokens, scores = built(case), pairs(built(case)), scored(case, "neurons")
    with untouched(model):
        evaluate(model, tokens, scores, sizes=[3])
    with untouched(model), pytest.raises(RuntimeError, match="stop"):
        evaluate(model, tokens, scores, sizes=[3], metric=_stop)
    assert capfd.readouterr() == ("", "")


def _stop(logits: Tensor, pairs: Any) -> Tensor:
    raise RuntimeError("stop")


@both_classes
def test_what_does_not_fit_is_refused(case: ModelCase) -> None:
    model, tokens, scores = built(case), pairs(built(case)), scored(case, "neurons")
    for sizes, message in (([], "none"), ([-1], "-1"), ([10**6], "1000000")):
        with pytest.raises(SettingsError, match=message):
            evaluate(model, tokens, scores, sizes=sizes)
    with pytest.raises(PairsError, match="the scores have 5 positions"):
        evaluate(model, pairs(model, length=6), scores)
    unpaired = TokenizedPairs.from_tokens(torch.stack(list(tokens.clean)), tokens.answer, None, tokens.wrong_answer)
    with pytest.raises(PairsError, match="Use 'zero'"):
        evaluate(model, unpaired, scores)
    assert len(evaluate(model, unpaired, scores, sizes=[3], ablation="zero").sizes) == 1
    with pytest.raises(NumericalError, match="ablating every node"):
        evaluate(model, tokens, scores, sizes=[1], metric=lambda logits, pairs: 0 * logits[:, 0, 0] + 1)


def test_default_sizes_are_log_spaced_to_all_nodes() -> None:
    (case, *_) = (p.values[0] for p in all_models("gpt2"))
    sizes: Sequence[int] = evaluate(built(case), pairs(built(case)), scored(case, "neurons")).sizes
    assert sizes[0] == 1 and sizes[-1] == 240 and len(sizes) <= 20 and list(sizes) == sorted(set(sizes))


@both_classes
def test_twenty_sizes_with_completeness_cost_at_most_45_forwards_a_batch(case: ModelCase) -> None:
    model, tokens, scores = built(case), pairs(built(case)), scored(case, "neurons")
    forwards: list[int] = []
    handle = model.register_forward_pre_hook(lambda *_: forwards.append(1))
    evaluate(model, tokens, scores, sizes=range(1, 21))
    assert 40 <= len(forwards) <= 45
    handle.remove()


@both_classes
def test_a_set_of_nodes_is_run_once(case: ModelCase) -> None:
    """All, none, and a size twice over: the original model, none, the mean, and the one set and its complement."""
    model, tokens, scores = built(case), pairs(built(case)), scored(case, "neurons")
    forwards: list[int] = []
    handle = model.register_forward_pre_hook(lambda *_: forwards.append(1))
    curve = evaluate(model, tokens, scores, sizes=[0, 7, len(scores)])
    handle.remove()
    assert len(forwards) == 5
    assert torch.equal(curve.kept[2], curve.full) and torch.equal(curve.removed[0], curve.full)
    assert torch.equal(curve.kept[0], curve.empty) and torch.equal(curve.removed[2], curve.empty)


def test_means_come_from_the_reference_and_not_from_the_pairs_judged() -> None:
    """As if the pairs judged had the reference's corrupt prompts; clean prompts and answers are their own."""
    model = load_demo_model()
    train, test = subject_verb_agreement("nounpp", n=16).split(0.5)
    scores = attribute(model, train)
    found = evaluate(model, test, scores, sizes=[30], reference=train)
    donors = replace(test, corrupt=[*(train.corrupt or ())][: len(test)])
    assert len(train) == len(test)
    expected = evaluate(model, donors, scores, sizes=[30])
    for name in ("kept", "removed", "full", "empty"):
        assert torch.allclose(getattr(found, name), getattr(expected, name), atol=1e-5), name
    own = evaluate(model, test, scores, sizes=[30])
    assert not torch.allclose(found.kept, own.kept, atol=1e-3)
    assert found.settings["reference_hash"] != found.settings["pairs_hash"]
    both = compare(model, train, test, reference=train, bases=[Neurons()], methods=["relp"], sizes=[30], bootstrap=2)
    (curve,) = both.curves.values()
    assert torch.allclose(curve.kept, found.kept, atol=1e-5)


def test_a_reference_that_cannot_give_means_is_refused() -> None:
    model = load_demo_model()
    pairs, longer = subject_verb_agreement("simple", n=4), subject_verb_agreement("nounpp", n=4)
    scores = attribute(model, pairs)
    with pytest.raises(SettingsError, match="takes none"):
        evaluate(model, pairs, scores, ablation="corrupt", reference=pairs)
    with pytest.raises(PairsError, match=r"no corrupt prompts of \[3\] tokens"):
        evaluate(model, pairs, scores, reference=longer)
    with pytest.raises(PairsError, match="reference=, and its pairs have none"):
        evaluate(model, pairs, scores, reference=replace(pairs, corrupt=None, wrong_answer=None))
    with pytest.raises(SettingsError, match="reference="):
        compare(model, {"a": pairs}, {"a": pairs}, reference={"b": pairs})
