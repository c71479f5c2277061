"""The lasso on a Gram equals scikit-learn's Lasso, recovers what made the data, and handles degenerate columns."""

import numpy as np
import pytest
import torch
from torch import Tensor

from tests.lasso.problems import regression, standardized_columns, structural_model
from tests.loops import for_each
from tl_neuron_circuits._errors import NumericalError, SettingsError
from tl_neuron_circuits.lasso._solver import largest_penalty, r_squared, solve_lasso
from tl_neuron_circuits.lasso._statistics import Statistics, standardize

sklearn = pytest.importorskip("sklearn.linear_model")


def by_sklearn(x: Tensor, y: Tensor, penalty: float) -> np.ndarray:
    x, y = standardized_columns(x).numpy(), standardized_columns(y).numpy()
    model = sklearn.Lasso(alpha=penalty / (2 * len(x)), fit_intercept=False, tol=1e-13, max_iter=200_000)
    return np.stack([model.fit(x, column).coef_ for column in y.T], 1)


@for_each("share", [0.5, 0.1, 0.02])
@for_each(("n", "p", "shared"), [(300, 40, 0.0), (60, 150, 0.0), (300, 40, 4.0)], ids=["dense", "n < p", "correlated"])
def test_equals_scikit_learn(n: int, p: int, shared: float, share: float) -> None:
    x, y = regression(n, p, 4, shared=shared)
    problem = standardize(Statistics.from_rows(x, y))
    penalty = share * largest_penalty(problem)
    solution = solve_lasso(problem, penalty, tolerance=1e-12)
    expected = by_sklearn(x, y, penalty)
    assert np.abs(solution.weights.numpy() - expected).max() < 1e-6
    assert float(solution.gap.max()) <= 1e-12
    residual = standardized_columns(y) - standardized_columns(x) @ torch.from_numpy(expected)
    assert torch.allclose(solution.r2, 1 - residual.square().mean(0), atol=1e-6)


def test_optimality_holds_for_more_columns_than_a_working_set() -> None:
    x, _, allowed = structural_model(300, sites=4, width=40, edges=0.15)
    problem = standardize(Statistics.from_rows(x))
    penalty = 0.02 * largest_penalty(problem, allowed)
    weights = solve_lasso(problem, penalty, allowed=allowed, tolerance=1e-12).weights
    gradient = (problem.cross - problem.gram @ weights) * allowed
    alpha = penalty / (2 * problem.n)
    used = weights != 0
    assert int(used.sum(0).max()) > 32
    assert torch.allclose(gradient[used], alpha * weights[used].sign(), atol=1e-7)
    assert float(gradient.abs().max()) <= alpha + 1e-7
    assert not weights[~allowed].any()


def test_recovers_a_linear_structural_model() -> None:
    x, truth, allowed = structural_model(4000, noise=1.0)
    problem = standardize(Statistics.from_rows(x))
    solution = solve_lasso(problem, 0.01 * largest_penalty(problem, allowed), allowed=allowed)
    found = solution.weights * problem.scale / problem.scale[:, None]
    edges = truth != 0
    scores = solution.weights.abs()
    assert float(scores[edges].min()) > float(scores[allowed & ~edges].max())
    assert torch.allclose(found[edges], truth[edges], atol=0.25)


def test_from_the_largest_penalty_on_nothing_is_chosen() -> None:
    x, y = regression(100, 10, 3)
    problem = standardize(Statistics.from_rows(x, y))
    most = largest_penalty(problem)
    assert solve_lasso(problem, most).n_edges == 0
    assert solve_lasso(problem, 0.99 * most).n_edges == 1


def test_each_target_alone_gives_the_same_as_all_together() -> None:
    x, y = regression(120, 30, 5, shared=2.0)
    penalty = 0.05 * largest_penalty(standardize(Statistics.from_rows(x, y)))
    together = solve_lasso(standardize(Statistics.from_rows(x, y)), penalty, tolerance=1e-12).weights
    alone = [
        solve_lasso(standardize(Statistics.from_rows(x, y[:, [j]])), penalty, tolerance=1e-12).weights for j in range(5)
    ]
    assert torch.allclose(together, torch.cat(alone, 1), atol=1e-9)


def test_where_a_solution_starts_changes_nothing() -> None:
    x, y = regression(120, 30, 3, shared=1.0)
    problem = standardize(Statistics.from_rows(x, y))
    start = None
    for share in (0.03, 0.5, 0.1):
        penalty = share * largest_penalty(problem)
        found = solve_lasso(problem, penalty, start=start, tolerance=1e-12)
        assert torch.allclose(found.weights, solve_lasso(problem, penalty, tolerance=1e-12).weights, atol=1e-9)
        start = found.weights


def test_collinear_columns_share_one_weight_and_the_fit_is_the_same() -> None:
    x, y = regression(100, 6, 2)
    doubled = torch.cat([x, 2 * x[:, :3]], 1)
    one, two = standardize(Statistics.from_rows(x, y)), standardize(Statistics.from_rows(doubled, y))
    penalty = 0.1 * largest_penalty(one)
    single, double = solve_lasso(one, penalty, tolerance=1e-10), solve_lasso(two, penalty, tolerance=1e-10)
    assert torch.allclose(double.weights[:3] + double.weights[6:], single.weights[:3], atol=1e-6)
    assert torch.allclose(double.r2, single.r2, atol=1e-8)


def test_constant_columns_are_never_chosen_and_constant_targets_have_no_r2() -> None:
    x, y = regression(100, 6, 2)
    x[:, 1] = 5.0
    y[:, 0] = 2.0
    problem = standardize(Statistics.from_rows(x, y))
    solution = solve_lasso(problem, 0.05 * largest_penalty(problem))
    assert not solution.weights[1].any() and not solution.weights[:, 0].any()
    assert torch.isnan(solution.r2[0]) and float(solution.r2[1]) > 0.3


def test_held_out_r2_is_that_of_other_observations() -> None:
    x, y = regression(100, 6, 1)
    problem = standardize(Statistics.from_rows(x, y))
    weights = solve_lasso(problem, 0.1 * largest_penalty(problem)).weights
    zx, zy = standardized_columns(x), standardized_columns(y)
    expected = 1 - (zy - zx @ weights).square().sum() / zy.square().sum()
    assert float(r_squared(problem, weights)) == pytest.approx(float(expected))


@for_each("penalty", [0.0, -1.0, float("inf"), float("nan")])
def test_a_penalty_must_be_positive(penalty: float) -> None:
    x, y = regression(20, 3, 1)
    with pytest.raises(SettingsError, match="positive penalty"):
        solve_lasso(standardize(Statistics.from_rows(x, y)), penalty)


def test_a_target_that_does_not_converge_is_an_error() -> None:
    x, y = regression(60, 150, 2)
    problem = standardize(Statistics.from_rows(x, y))
    with pytest.raises(NumericalError, match="did not converge"):
        solve_lasso(problem, 0.01 * largest_penalty(problem), tolerance=1e-12, max_rounds=1)
