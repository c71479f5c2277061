"""Group and logistic variants against scikit-learn and a slow replica."""

from importlib.metadata import version
from typing import Any

import numpy as np
import pytest
import torch

from tests.lasso.problems import regression, standardized_columns
from tl_neuron_circuits._errors import NumericalError, SettingsError
from tl_neuron_circuits.lasso._feature_ranking import solve_labels
from tl_neuron_circuits.lasso._solver import block_norms, largest_penalty, solve_group_lasso, solve_lasso
from tl_neuron_circuits.lasso._statistics import Statistics, standardize

sklearn = pytest.importorskip("sklearn.linear_model")


def test_groups_of_one_are_the_lasso() -> None:
    x, y = regression(150, 12, 3, shared=1.0)
    problem = standardize(Statistics.from_rows(x, y))
    penalty = 0.1 * largest_penalty(problem)
    grouped = solve_group_lasso(problem, penalty, torch.arange(12), tolerance=1e-12)
    assert torch.allclose(grouped.weights, solve_lasso(problem, penalty, tolerance=1e-12).weights, atol=1e-6)


def test_one_column_against_all_targets_is_scikit_learns_multi_task_lasso() -> None:
    x, y = regression(150, 12, 3)
    problem = standardize(Statistics.from_rows(x, y))
    penalty = 0.1 * largest_penalty(problem)
    solution = solve_group_lasso(problem, penalty, torch.arange(12), torch.zeros(3, dtype=torch.long), tolerance=1e-12)
    alpha = penalty / (2 * 150) * 3**0.5
    model = sklearn.MultiTaskLasso(alpha=alpha, fit_intercept=False, tol=1e-13, max_iter=100_000)
    expected = model.fit(standardized_columns(x).numpy(), standardized_columns(y).numpy()).coef_.T
    assert np.abs(solution.weights.numpy() - expected).max() < 1e-6


def slow_group_lasso(x, y, groups, target_groups, penalty, steps=4000):
    """Plain proximal gradient, block by block, straight from the definition."""
    weights = torch.zeros(x.shape[1], y.shape[1], dtype=torch.float64)
    step = 1 / (2 * float(torch.linalg.matrix_norm(x, ord=2)) ** 2)
    for _ in range(steps):
        weights = weights - step * 2 * x.T @ (x @ weights - y)
        for g in groups.unique():
            for h in target_groups.unique():
                block = torch.outer(groups == g, target_groups == h)
                norm = weights[block].norm()
                weights[block] *= max(0.0, 1 - step * penalty * float(block.sum()) ** 0.5 / max(float(norm), 1e-300))
    return weights


def test_blocks_equal_the_slow_replica() -> None:
    x, y = regression(80, 9, 4)
    groups, targets = torch.tensor([0, 0, 0, 1, 1, 2, 2, 2, 2]), torch.tensor([0, 0, 1, 1])
    problem = standardize(Statistics.from_rows(x, y))
    penalty = 0.15 * largest_penalty(problem)
    solution = solve_group_lasso(problem, penalty, groups, targets, tolerance=1e-13)
    expected = slow_group_lasso(standardized_columns(x), standardized_columns(y), groups, targets, penalty)
    assert torch.allclose(solution.weights, expected, atol=1e-6)
    norms = block_norms(solution.weights, groups, targets)
    assert bool((norms == 0).any()) and bool((norms > 0).any())
    assert float(norms[0, 0]) == pytest.approx(float(solution.weights[:3, :2].norm()))


def test_blocks_that_are_not_allowed_stay_empty() -> None:
    x, y = regression(80, 6, 2)
    allowed = torch.ones(6, 2, dtype=torch.bool)
    allowed[:3, 0] = False
    problem = standardize(Statistics.from_rows(x, y))
    groups = torch.tensor([0, 0, 0, 1, 1, 1])
    solution = solve_group_lasso(problem, 0.05 * largest_penalty(problem), groups, allowed=allowed)
    assert not solution.weights[~allowed].any() and bool(solution.weights[allowed].all())


def test_groups_with_holes_are_refused() -> None:
    x, y = regression(20, 3, 1)
    with pytest.raises(SettingsError, match="without holes"):
        solve_group_lasso(standardize(Statistics.from_rows(x, y)), 1.0, torch.tensor([0, 2, 2]))


def labeled(n: int = 200, p: int = 8):
    x, _ = regression(n, p, 1)
    z = standardized_columns(x)
    generator = torch.Generator().manual_seed(1)
    odds = torch.stack([2 * z[:, 0] - z[:, 1] - 1, z[:, 2]], 1)
    return x, (torch.rand(n, 2, generator=generator, dtype=torch.float64) < odds.sigmoid()).double()


def test_labels_equal_scikit_learns_logistic_regression() -> None:
    x, y = labeled()
    solution = solve_labels(x, y, 5.0, tolerance=1e-12)
    newer = tuple(map(int, version("scikit-learn").split(".")[:2])) >= (1, 8)  # which deprecates penalty=
    l1: Any = {"l1_ratio": 1.0} if newer else {"penalty": "l1"}
    for label in range(2):
        model = sklearn.LogisticRegression(C=1 / 5.0, **l1, solver="saga", tol=1e-10, max_iter=100_000)
        model.fit(standardized_columns(x).numpy(), y[:, label].numpy())
        assert np.abs(solution.weights[:, label].numpy() - model.coef_[0]).max() < 1e-5
        assert float(solution.intercept[label]) == pytest.approx(model.intercept_[0], abs=1e-5)
    assert bool((solution.weights == 0).any())


def test_a_feature_that_never_fires_has_no_weight() -> None:
    x, y = labeled()
    x[:, 0] = 0.0
    solution = solve_labels(x, y, 5.0)
    assert not solution.weights[0].any() and torch.isfinite(solution.weights).all()


def test_labels_must_be_zeros_and_ones_and_differ() -> None:
    x, y = labeled()
    with pytest.raises(SettingsError, match="zeros and ones"):
        solve_labels(x, y + 0.5, 1.0)
    with pytest.raises(SettingsError, match=r"labels \[1\] are the same"):
        solve_labels(x, y * torch.tensor([1.0, 0.0]), 1.0)
    with pytest.raises(NumericalError, match="did not converge"):
        solve_labels(x, y, 0.1, tolerance=1e-12, max_steps=3)
