"""Stability: draws of words against one pair after the other, and false discoveries where the truth is known."""

from typing import Any, Literal

import pytest
import torch

import tl_neuron_circuits as tnc
from tests.families import all_models
from tests.loops import for_each
from tests.model_state import unchanged
from tests.nodes.plain import random_pairs
from tests.propagation.readings import model_of
from tl_neuron_circuits import PairsError, SettingsError, attribute, stability
from tl_neuron_circuits.evaluation._learned_stability import swap_answers
from tl_neuron_circuits.evaluation._stability import (
    _count,
    _same_answer,
    draw_weights,
    flipped_counts,
    jaccard,
    statistic,
)
from tl_neuron_circuits.evaluation._stability import standard_error as error_of
from tl_neuron_circuits.tasks import TokenizedPairs

MODEL = all_models("gpt2")[0].values[0]
FIRST = ["a", "a", "b", "c", "c", "d", "b", "d"]
SECOND = ["x", "y", "x", "y", "z", "z", "x", "z"]


def labeled(*lengths: int, seed: int = 0) -> TokenizedPairs:
    made = random_pairs(*lengths, seed=seed)
    corrupt = list(made.corrupt or ())
    return TokenizedPairs.from_tokens(list(made.clean), made.answer, corrupt, made.wrong_answer, labels=FIRST)


def one_by_one(pairs: TokenizedPairs, **settings: Any) -> torch.Tensor:
    """The scores of every pair by itself, [pair, node]."""
    rows = []
    for batch in pairs.batches(1):
        one = TokenizedPairs.from_tokens(batch.clean, batch.answer, batch.corrupt, batch.wrong_answer)
        rows.append((int(batch.index[0]), attribute(model_of(MODEL), one, **settings).flat()))
    return torch.stack([row for _, row in sorted(rows, key=lambda item: item[0])])


@pytest.mark.parametrize("kinds", [[FIRST], [FIRST, SECOND]], ids=["one kind", "two kinds"])
@pytest.mark.parametrize("method", ["gradient", "mask_gradient(steps=2)"])
def test_draws_are_those_of_pairs_weighted_one_by_one(kinds: list[list[str]], method: str) -> None:
    pairs = labeled(4, 5, 4, 4, 5, 4, 4, 5)
    settings: dict[str, Any] = {"method": method, "positions": "sum"}
    with unchanged(model_of(MODEL)):
        found = stability(model_of(MODEL), pairs, sizes=[3, 6], clusters=kinds, draws=40, null_draws=3, **settings)
    alone = one_by_one(pairs, **settings)
    assert torch.allclose(found.scores.flat(), alone.mean(0), atol=1e-6)
    names = list(zip(*kinds, strict=True))
    cells = list(dict.fromkeys(names))
    weights = draw_weights(cells, 40, 0)[:, [cells.index(name) for name in names]]
    means = weights @ alone / weights.sum(1, keepdim=True)
    means = means[weights.sum(1) > 0]
    key = means.abs() if found.settings["ranking"] == "abs" else means
    assert torch.equal(found.best, key.topk(6).indices)
    table, expected = found.frequency(3), torch.bincount(key.topk(3).indices.flatten(), minlength=alone.shape[1])
    assert table["frequency"].to_numpy() == pytest.approx(
        (expected[expected > 0] / len(key)).sort(descending=True).values
    )
    core = found.core(3, frequency=0.5)
    assert int((~core.flat().isnan()).sum()) == int((expected / len(key) >= 0.5).sum())


def test_words_have_one_weight_in_a_draw() -> None:
    weights = draw_weights([("a", "x"), ("a", "y"), ("b", "x")], 4000, 0)
    assert torch.equal(weights, weights.round()) and abs(float(weights.mean()) - 1) < 0.1
    assert float(weights[:, 0].var()) == pytest.approx(3, rel=0.35)  # (1 + 1)(1 + 1) - 1 of a product of two
    both = torch.corrcoef(weights.T)
    assert both[0, 1] > 0.2 < both[0, 2] and abs(both[1, 2]) < 0.1


def test_the_standard_error_is_that_of_cluster_means() -> None:
    generator = torch.Generator().manual_seed(0)
    values = torch.randn(6, 50, generator=generator)  # clusters of one pair: the ordinary standard error
    expected = values.std(0) / 6**0.5
    assert torch.allclose(error_of(values, torch.ones(6, dtype=torch.float64)), expected, rtol=1e-5)


@pytest.mark.parametrize("rate", [0.05, 0.1, 0.2])
def test_false_discoveries_are_about_as_many_as_said(rate: float) -> None:
    shares = []
    for seed in range(8):
        generator = torch.Generator().manual_seed(seed)
        sums = torch.randn(30, 2000, generator=generator)
        sums[:, :200] += 0.8 * (torch.arange(200) % 2 * 2 - 1)
        counts = torch.ones(30, dtype=torch.float64)
        t, _ = statistic(sums.mean(0), error_of(sums, counts))
        observed = t.abs().sort(descending=True).values
        false = flipped_counts(sums, counts, observed, 30, seed).median(0).values
        passed = ((false / torch.arange(1, 2001)) <= rate).nonzero()
        order = t.abs().argsort(descending=True)[: int(passed.max()) + 1]
        shares.append(float((order >= 200).float().mean()))
        assert len(order) > 150
    assert sum(shares) / len(shares) < 1.35 * rate


def test_a_member_must_exceed_its_own_score_on_null_pairs() -> None:
    model, pairs = tnc.load_demo_model(), tnc.tasks.subject_verb_agreement("simple", n=16)
    found = stability(model, pairs, sizes=[5], draws=5, null_draws=20, null_pairs=pairs)
    assert found.at_fdr(0.9, null="pairs").flat().isnan().all()  # the null is the pairs themselves
    chosen = found.at_fdr(0.1).flat()
    assert 0 < int((~chosen.isnan()).sum()) < len(chosen)
    assert torch.equal(
        found.t[~chosen.isnan()].abs().sort().values, found.t.abs().topk(int((~chosen.isnan()).sum())).values.flip(0)
    )
    with pytest.raises(SettingsError, match="null_pairs="):
        stability(model, pairs, sizes=[5], draws=5, null_draws=0).at_fdr(0.1, null="pairs")


def test_methods_agree_with_themselves_and_counts_are_those_of_sets() -> None:
    model, pairs = tnc.load_demo_model(), tnc.tasks.subject_verb_agreement("simple", n=16)
    one, other = (stability(model, pairs, method=m, sizes=[5, 9], draws=9, null_draws=0) for m in ("relp", "gradient"))
    assert one.agreement(one)["jaccard_low"].tolist() == [1, 1] and (one.agreement(other)["jaccard"] < 1).any()
    assert jaccard(torch.tensor([[1, 2, 3]]), torch.tensor([[3, 4, 1]])).tolist() == [0.5]
    assert _count(torch.tensor([1.0, 2.0, 3.0]), torch.tensor([3.0, 2.5, 0.5])).tolist() == [1, 1, 3]
    with pytest.raises(SettingsError, match="differ in"):
        one.agreement(stability(model, pairs, sizes=[5, 9], draws=9, null_draws=0, seed=1))


@for_each(
    ("error", "message", "settings"),
    [
        (SettingsError, "no stability to measure", {"method": "random"}),
        (SettingsError, "one label per pair", {"clusters": [["a"]]}),
        (PairsError, "three words", {"clusters": [["a"] * 8]}),
        (SettingsError, "at least 2 draws", {"draws": 1}),
        (SettingsError, "are an order", {"method": "mask_gradient", "ranking": "abs"}),
    ],
)
def test_what_cannot_be_drawn_is_refused(error: type[Exception], message: str, settings: dict[str, Any]) -> None:
    with pytest.raises(error, match=message):
        stability(model_of(MODEL), labeled(*[4] * 8), **{"sizes": [3], **settings})


def test_null_scores_are_those_of_swapped_answers_and_refused_where_scores_do_not_read_them() -> None:
    model, pairs = model_of(MODEL), labeled(*[4] * 8)
    settings: dict[str, Any] = {"metric": tnc.tasks.answer_log_probability, "method": "gradient"}
    found = stability(model, pairs, sizes=[5], draws=5, null_draws=7, **settings)
    sums = []
    for some in (pairs, swap_answers(pairs)):
        alone = one_by_one(some, **settings)
        sums.append(torch.stack([alone[[label == name for label in FIRST]].sum(0) for name in "abcd"]))
    counts = torch.full((4,), 2.0, dtype=torch.float64)
    t, live = statistic(sums[0].sum(0) / 8, error_of(sums[0], counts))
    observed = t.abs()[live].sort(descending=True).values
    expected = flipped_counts(sums[0][:, live], counts, observed, 7, 1, sums[1][:, live])
    assert (found.null_counts - expected).abs().max() <= 1  # of nodes whose statistics are equal but for rounding
    assert not torch.equal(expected, flipped_counts(sums[0][:, live], counts, observed, 7, 1))
    refused: tuple[tuple[dict[str, Any], str], ...] = (
        ({"metric": lambda logits, batch: logits[:, -1].logsumexp(-1)}, "does not change with them"),
        ({"method": "mask_gradient(steps=2, loss=kl)"}, "mask_gradient.* do not read the answers"),
        ({"method": "activation_difference"}, "do not read the answers"),
    )
    for more, message in refused:
        found = stability(model, pairs, sizes=[5], draws=5, null_draws=9, null_pairs=labeled(*[4] * 8, seed=1), **more)
        with pytest.raises(SettingsError, match=message):
            found.at_fdr(0.1)
        found.at_fdr(0.1, null="pairs")


def test_a_learned_mask_is_learned_anew_in_every_draw_and_null_set() -> None:
    model, pairs = model_of(MODEL), labeled(*[4] * 8)
    mask = tnc.LearnedMask(steps=3, loss="metric", pairs_per_step=4)
    learn = lambda some: attribute(model, some, method=mask).flat()  # noqa: E731
    with unchanged(model):
        found = stability(
            model, pairs, method=mask, sizes=[3, 6], draws=4, null_draws=2, null_pairs=labeled(*[4] * 8, seed=1)
        )
    assert torch.equal(found.scores.flat(), learn(pairs)) and found.settings["ranking"] == "signed"
    weights = draw_weights([(name,) for name in "abcd"], 4, 0).long()
    drawn = []
    for row in weights:
        rows = [i for i, name in enumerate(FIRST) for _ in range(int(row["abcd".index(name)]))]
        drawn += [learn(pairs.select(rows))] if rows else []
    assert torch.equal(found.best, torch.stack(drawn).topk(6).indices)
    t, _ = statistic(found.scores.flat(), torch.stack(drawn).std(0))
    assert torch.allclose(found.t, t, rtol=1e-4, atol=1e-5)
    assert found.null_counts.shape[0] == 2 and found.other is not None
    assert torch.equal(found.other, learn(labeled(*[4] * 8, seed=1)))
    matching = stability(model, pairs, method=tnc.LearnedMask(steps=1), sizes=[3], draws=2, null_draws=2)
    with pytest.raises(SettingsError, match="do not read the answers"):
        matching.at_fdr(0.1)


def test_a_circuit_keeps_the_nodes_that_pass_the_test() -> None:
    model, pairs = tnc.load_demo_model(), tnc.tasks.subject_verb_agreement("simple", n=16, verbs=["is"])
    circuit = tnc.trace(model, pairs, nodes=300)
    found = stability(model, pairs, sizes=[5], draws=2, null_pairs="same_answer")
    nulls: tuple[Literal["signs", "pairs"], ...] = ("signs", "pairs")
    for null in nulls:
        named = found.at_fdr(0.005, null=null)
        kept = circuit.at_fdr(0.005, null=null)
        assert kept.members == circuit.members & set(named.top(len(named))["label"])
        assert circuit.at_fdr(0.005, null=null, stability=found).members == kept.members
    sure = circuit.at_fdr(0.005)
    assert 100 < len(sure) < len(circuit) and sure.target_value == circuit.target_value
    with pytest.raises(SettingsError, match="stability of the circuit's nodes"):
        circuit.at_fdr(0.1, stability=stability(model, pairs, sizes=[5], draws=2, positions="sum"))
    with pytest.raises(SettingsError, match="stability=tnc.stability"):
        tnc.trace(model, "The dogs", nodes=5).at_fdr(0.1)


def test_null_pairs_have_the_same_answers_and_other_words() -> None:
    model, pairs = tnc.load_demo_model(), tnc.tasks.subject_verb_agreement("simple", n=16, verbs=["is"])
    tokens = tnc.tasks.tokenize(model, pairs)
    null = _same_answer(tokens, [list(tokens.labels or ())])
    assert torch.equal(null.answer, tokens.answer) and null.corrupt is not None
    asked = {tuple(prompt.tolist()): int(answer) for prompt, answer in zip(tokens.clean, tokens.answer, strict=True)}
    for clean, corrupt, answer in zip(null.clean, null.corrupt, null.answer.tolist(), strict=True):
        assert asked[tuple(corrupt.tolist())] == answer and clean.tolist() != corrupt.tolist()
    with pytest.raises(PairsError, match="no partner of other words"):
        stability(
            model, tnc.tasks.subject_verb_agreement("simple", n=8, seed=3), sizes=[5], draws=5, null_pairs="same_answer"
        )
