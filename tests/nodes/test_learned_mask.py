"""Learned masks: two cases that can be solved by hand, a slow version step for step, and stopping on the way."""

from dataclasses import replace
from itertools import islice
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

import tl_neuron_circuits as tnc
from tests.bases.tiny_dictionaries import RANDOM, tiny_dictionaries
from tests.families import all_models
from tests.loops import for_each
from tests.model_state import unchanged
from tests.nodes.plain import POSTS, random_pairs
from tests.nodes.plain_masks import PlainLearning, plain_mask
from tests.nodes.toys import Toy, ToyNodes, toy_pairs
from tests.propagation.readings import model_of
from tl_neuron_circuits import LearnedMask, PairsError, SettingsError
from tl_neuron_circuits._errors import FileFormatError
from tl_neuron_circuits.nodes import MaskGradient, attribute
from tl_neuron_circuits.nodes._learned_mask import find_threshold, through_threshold

CASE = all_models("llama")[0].values[0]
NAMES = list(POSTS)


def learned(method: Any, formula: Any, n: int) -> Any:
    return attribute(Toy(formula, n), toy_pairs(), method=method, basis=ToyNodes()).flat()


@pytest.mark.parametrize("method", [LearnedMask(60, loss="metric"), MaskGradient()], ids=lambda method: method.name)
def test_a_linear_model_is_ordered_by_effect(method: Any) -> None:
    effects = torch.tensor([0.5, 3.0, -1.0, 0.0, 2.0, -2.0, 1.0])
    found = learned(method, lambda a: a @ effects, 7)
    assert found.argsort(descending=True).tolist() == effects.argsort(descending=True).tolist()


def either(a: Tensor) -> Tensor:
    """One of nodes 0 and 1 is enough; node 2 adds a fifth."""
    return (a[..., 0] + a[..., 1]).clamp(max=1) + 0.2 * a[..., 2]


def both(a: Tensor) -> Tensor:
    """Nodes 0 and 1 do 1 together and nothing alone; node 2 does .9 by itself."""
    return a[..., 0] * a[..., 1] + 0.9 * a[..., 2]


@pytest.mark.parametrize("loss", ["metric", "matching"])
@pytest.mark.parametrize(
    ("formula", "at_clean", "order"),
    # An `either` has no gradient where both are there, so gradients put node 2 first; a `both` counts twice, so last.
    [(either, [0.0, 0.0, 0.2], [0, 1, 2]), (both, [1.0, 1.0, 0.9], [2, 0, 1])],
    ids=["either", "both"],
)
def test_what_gradients_miss_or_count_twice_is_learned(
    formula: Any, at_clean: list[float], order: list[int], loss: str
) -> None:
    clean = torch.ones(6).mul(1.0 + 1e-6).requires_grad_(True)
    assert torch.autograd.grad(formula(clean), clean)[0][:3].tolist() == pytest.approx(at_clean, abs=1e-5)
    found = learned(LearnedMask(200, loss=loss), formula, 6)
    assert found.sort(descending=True, stable=True).indices[:3].tolist() == order
    assert found[:3].min() > 0 > found[3:].max() and torch.isclose(found[0], found[1], atol=1e-4)


@pytest.mark.parametrize(
    "method",
    [
        LearnedMask(12),
        LearnedMask(12, loss="metric", schedule="uniform", direction="flip", cache="never", cooling=0.97),
        LearnedMask(12, loss="kl", pairs_per_step=3),
        LearnedMask(12, loss="kl", direction="flip", cache="never"),
        LearnedMask(12, direction="flip"),
    ],
    ids=lambda method: method.label,
)
def test_every_step_is_that_of_the_slow_version(method: LearnedMask) -> None:
    model, pairs = model_of(CASE), random_pairs(4, 4, 4, 4, 4)
    with unchanged(model):
        scores = attribute(model, pairs, method=method, batch_size=2)
    expected = PlainLearning(model, pairs, NAMES, method).learn()
    assert scores.ranking == "signed" and len(scores.settings["learning"]["losses"]) == 12
    assert float(expected.abs().max()) > 0.01
    assert torch.allclose(scores.flat(), expected, rtol=1e-6, atol=1e-6 * float(expected.abs().max()))


def test_the_expected_gradient_at_zero_is_the_learning_free_score() -> None:
    model, pairs = model_of(CASE), random_pairs(3, 3)
    plain = PlainLearning(model, pairs, NAMES, LearnedMask(loss="metric"))
    # The same quantiles as MaskGradient's ten, whose budgets are whole numbers
    whole = [1 + int((step + 0.5) / 10 * (plain.n - 1)) for step in range(10)]
    found = torch.stack([plain.gradient(torch.zeros(plain.n), [0, 1], budget, 0.5) for budget in whole]).mean(0)
    scores = attribute(model, pairs, method="mask_gradient", batch_size=1).flat()
    assert torch.allclose(scores, -found, rtol=1e-5, atol=1e-6 * float(found.abs().max()))
    assert abs(float(scores.double().mean())) < 1e-6 * float(found.abs().max())


@for_each("spread", [0.0, 1.0, 30.0])
@for_each("budget", [0.5, 1.0, 7.3, 500.0, 999.0, 999.5])
def test_the_mask_adds_up_to_its_budget_and_its_gradient_is_exact(spread: float, budget: float) -> None:
    generator = torch.Generator().manual_seed(0)
    scores = spread * torch.randn(1000, generator=generator)
    pull = torch.randn(1000, generator=generator)
    mask = ((scores - find_threshold(scores, budget, 0.5)) / 0.5).sigmoid()
    side = mask if budget < 500 else 1 - mask.double()
    assert float(side.sum(dtype=torch.float64)) == pytest.approx(min(budget, 1000 - budget), rel=1e-4)
    moving = scores.clone().requires_grad_(True)
    (expected,) = torch.autograd.grad((plain_mask(moving, budget, 0.5) * pull).sum(), moving)
    found = through_threshold(pull, mask, 0.5)
    assert torch.allclose(found, expected, rtol=1e-3, atol=1e-5)


def test_saturated_masks_have_no_gradient() -> None:
    mask = torch.tensor([1.0, 1.0, 0.0, 0.0])
    assert through_threshold(torch.ones(4), mask, 0.5).tolist() == [0.0] * 4


def test_fewer_steps_are_the_beginning_of_more(tmp_path: Path) -> None:
    model, pairs = model_of(CASE), random_pairs(4, 4, 4, 4, 4)
    call = lambda steps, **more: attribute(model, pairs, method=LearnedMask(steps, pairs_per_step=2, **more))  # noqa: E731
    kept = lambda steps, **more: attribute(  # noqa: E731
        model, pairs, method=LearnedMask(steps, pairs_per_step=2, **more), resume=tmp_path / "run"
    )
    for steps in (2, 5, 5, 9):
        assert torch.equal(kept(steps).flat(), call(steps).flat())
    with pytest.raises(SettingsError, match="holds 9 steps, more than the 5"):
        kept(5)
    with pytest.raises(FileFormatError, match="method_options"):
        kept(12, lr=0.1)


def test_an_interrupted_run_goes_on_to_the_same_bits(tmp_path: Path) -> None:
    model, pairs = model_of(CASE), random_pairs(4, 4, 4)
    calls: list[int] = []

    def metric(logits: Any, batch: Any) -> Any:
        calls.append(1)
        if len(calls) == 8:
            raise KeyboardInterrupt
        return tnc.tasks.logit_difference(logits, batch)

    run = lambda: attribute(model, pairs, method=LearnedMask(9), metric=metric, resume=tmp_path / "run")  # noqa: E731
    with unchanged(model), pytest.raises(KeyboardInterrupt):
        run()
    found = run()
    assert len(calls) - 8 < 4 + 9  # references twice, on one pair and on all; and fewer steps than from the beginning
    again = attribute(model, pairs, method=LearnedMask(9), metric=metric)
    assert torch.equal(found.flat(), again.flat())


def test_positions_are_summed_over_prompts_of_several_lengths_and_every_basis_learns() -> None:
    model, pairs = model_of(CASE), random_pairs(4, 5, 4, 6)
    method = LearnedMask(3, loss="metric", start="relp")
    for basis in (tnc.bases.Neurons(), tnc.bases.HeadOutputs(), tnc.bases.ResidualStream()):
        for baseline in ("corrupt", "mean", "zero"):
            scores = attribute(model, pairs, method=method, positions="sum", basis=basis, baseline=baseline)
            assert scores.flat().isfinite().all() and scores.flat().std() > 0
    assert scores.settings["learning"]["counterfactuals"] == "zero"


def test_a_learned_order_is_never_ranked_by_size() -> None:
    model, pairs = model_of(CASE), random_pairs(4, 4)
    scores = attribute(model, pairs, method=LearnedMask(3))
    assert tnc.evaluate(model, pairs, scores, sizes=[2]).settings["ranking"] == "signed"
    assert scores.top(3)["score"].is_monotonic_decreasing and scores.top(1)["score"][0] == scores.flat().max()
    with pytest.raises(SettingsError, match="are an order"):
        tnc.evaluate(model, pairs, scores, sizes=[2], ranking="abs")


@for_each(
    ("message", "settings"),
    [
        ("schedule of learned_mask out of", {"method": "learned_mask(schedule=linear)"}),
        ("lr of learned_mask to be a positive", {"method": "learned_mask(lr=-1)"}),
        ("steps of mask_gradient", {"method": "mask_gradient(steps=0)"}),
        ("ranks single nodes", {"method": "learned_mask", "units": "sum"}),
        ("direction='denoising' needs", {"method": "learned_mask", "direction": "denoising"}),
    ],
)
def test_what_has_no_answer_is_refused(message: str, settings: dict[str, Any]) -> None:
    with pytest.raises(SettingsError, match=message):
        attribute(model_of(CASE), random_pairs(4, 4), **settings)


def test_draws_visit_every_pair_and_do_not_depend_on_the_number_of_steps() -> None:
    draws = list(islice(LearnedMask(pairs_per_step=2)._draws(6, 1000), 300))
    assert sorted(index for chosen, _ in draws[:3] for index in chosen) == list(range(6))
    budgets = [budget for _, budget in draws]
    assert all(0 < budget < 1000 for budget in budgets)
    assert 0.2 < sum(budget < 10 for budget in budgets) / 300 < 0.45  # a third of log(1000) lies below log(10)


@pytest.mark.parametrize("direction", ["keep", "flip"])
def test_hard_masks_are_what_evaluate_measures_and_soft_ones_tend_to_them(direction: Any) -> None:
    model, pairs = model_of(CASE), random_pairs(4, 4, 4)
    few = attribute(model, pairs, method=LearnedMask(4, direction=direction))
    table = tnc.evaluation.compare_soft_masks(model, pairs, few, sizes=[3, 30])
    curve = tnc.evaluate(model, pairs, few, sizes=[3, 30], ablation="corrupt")
    hard = curve.faithfulness if direction == "keep" else curve.completeness
    assert table["hard"].to_numpy() == pytest.approx(hard, abs=1e-4)
    assert (table["outside"] > 0.5).any() and (table["difference"].abs() > 0.01).any()
    cold = dict(few.settings) | {"method_options": dict(few.settings["method_options"]) | {"temperature": 1e-7}}
    nearly = tnc.evaluation.compare_soft_masks(model, pairs, replace(few, settings=cold), sizes=[3, 30])
    assert nearly["difference"].abs().max() < 1e-3 and nearly["outside"].max() < 1e-3
    with pytest.raises(SettingsError, match="of a learned mask"):
        tnc.evaluation.compare_soft_masks(model, pairs, attribute(model, pairs))


@RANDOM
@pytest.mark.parametrize("kind", ["sae", "skip_transcoder"])
def test_features_errors_and_skips_are_nodes_of_the_mask(kind: Any) -> None:
    model, pairs = model_of(CASE), random_pairs(4, 4, 4)
    basis = tiny_dictionaries(kind, model)
    scores = attribute(model, pairs, method=LearnedMask(4, start="relp"), basis=basis)
    assert len(scores.errors) == 2 and all(error.shape == (4,) and error.std() > 0 for error in scores.errors.values())
    assert (len(scores.skips) > 0) == (kind == "skip_transcoder")
    table = tnc.evaluation.compare_soft_masks(model, pairs, scores, sizes=[5, 40])
    curve = tnc.evaluate(model, pairs, scores, sizes=[5, 40], ablation="corrupt")
    assert table["hard"].to_numpy() == pytest.approx(curve.faithfulness, abs=1e-4)


def test_learning_stops_where_circuits_get_no_better_on_other_pairs(tmp_path: Path) -> None:
    model, pairs, others = model_of(CASE), random_pairs(4, 4, 4, 4), random_pairs(4, 4, 4, seed=5)
    method = LearnedMask(300, lr=0.5, development=others, patience=2)
    stopped = attribute(model, pairs, method=method)
    looks, losses = (stopped.settings["learning"][name] for name in ("development", "losses"))
    best = min(range(len(looks)), key=looks.__getitem__)
    assert len(looks) == best + 3 < 12 and len(losses) == 25 * len(looks)  # two looks in vain, long before 300 steps
    there = attribute(model, pairs, method=LearnedMask(25 * (best + 1), lr=0.5))
    assert torch.equal(stopped.flat(), there.flat())
    sizes = method._sizes(len(there))
    curve = tnc.evaluate(model, others, there, sizes=sizes, ablation="corrupt")
    span = torch.maximum((curve.full - curve.empty).abs(), 0.1 * curve.full.abs())
    assert looks[best] == pytest.approx(float(((curve.kept - curve.full).abs() / span).mean()), rel=1e-3)
    for steps in (30, 60, 300):  # also in three calls
        few = replace(method, steps=steps)
        kept = attribute(model, pairs, method=few, resume=tmp_path / "run")
    assert torch.equal(kept.flat(), stopped.flat()) and kept.settings["learning"]["development"] == looks
    assert few.label == "learned_mask(steps=300, lr=0.5, patience=2, development=3 pairs)"
    with pytest.raises(PairsError, match="4 of 4 prompts are learned on too"):
        attribute(model, pairs, method=LearnedMask(5, development=pairs))
