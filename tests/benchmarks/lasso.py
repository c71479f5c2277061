"""CircuitLasso's solver against a loop over scikit-learn's Lasso with the precomputed Gram, in one run.

    python -m tests.benchmarks.lasso [--units 2000] [--observations 100000] [--sample 10]
    python -m tests.benchmarks.lasso --growth      how time and memory grow with units and observations

Data: a linear structural model of ten sites; every unit is the target once, its sources are all units of earlier sites.
Both sides get the data, standardize it and solve one penalty to the same relative duality gap. The loop is timed on a
sample of targets spread over the sites and extrapolated to all (said in the output), in two forms: `Lasso.fit`, as its
documentation has it, and `lasso_path` with Gram and X'y given, the least that scikit-learn's public interface can do.
"""

import argparse
import time
import warnings
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
from sklearn.exceptions import ConvergenceWarning
from sklearn.linear_model import Lasso, lasso_path

from tl_neuron_circuits.lasso._solver import largest_penalty, solve_lasso
from tl_neuron_circuits.lasso._statistics import Accumulator, standardize

GAP = 1e-6


def seconds(work: Callable[[], object]) -> tuple[float, object]:
    """CPU seconds of this process, which other load on the machine does not move."""
    start = time.process_time()
    result = work()
    return time.process_time() - start, result


def structure(units: int, sites: int = 10, seed: int = 0) -> tuple[torch.Tensor, torch.Tensor]:
    """Weights of a linear structural model, about six parents a unit, and which pairs the order of sites allows."""
    generator = torch.Generator().manual_seed(seed)
    site = torch.arange(units) * sites // units
    allowed = site[:, None] < site[None]
    parents = torch.rand(units, units, generator=generator) < 6 / (units * 0.45)
    return torch.randn(units, units, generator=generator).mul_(parents & allowed).mul_(0.5), allowed


def draw(weights: torch.Tensor, observations: int, seed: int, sites: int = 10) -> torch.Tensor:
    """float32 activations of the model, site by site."""
    units = len(weights)
    site = torch.arange(units) * sites // units
    x = torch.randn(units, observations, generator=torch.Generator().manual_seed(seed))
    for index in range(1, sites):
        here = site == index
        x[here] += torch.sparse.mm(weights[:, here].T.to_sparse_csr(), x)
    return x.T.contiguous()


def peak(reset: bool = False) -> float:
    """Peak resident memory in MiB since the last reset (Linux)."""
    if reset:
        Path("/proc/self/clear_refs").write_text("5")
    status = Path("/proc/self/status").read_text().split("VmHWM:")[1]
    return int(status.split()[0]) / 1024


def growth(share: float, most: float, only: tuple[int, int] | None = None) -> None:
    """One line a size, then exponents fitted to the logarithms of the seconds.

    Observations are streamed in batches made as they are needed, so that memory is that of statistics and solve.
    """
    rows = []
    for units in (100, 300, 1000, 3000, 10_000) if only is None else only[:1]:
        weights, allowed = structure(units)
        for observations in (10_000, 100_000, 1_000_000) if only is None else only[1:]:
            if only is None and units**2 * observations > most:
                continue
            before = peak(reset=True)
            accumulator, in_gram = Accumulator(), 0.0
            for start in range(0, observations, 5000):
                x = draw(weights, 5000, start)
                in_gram += seconds(lambda x=x, a=accumulator: a.add(x))[0]
            problem = standardize(accumulator.total())
            penalty = share * largest_penalty(problem, allowed)
            in_solve, solution = seconds(
                lambda p=problem, a=allowed, k=penalty: solve_lasso(p, k, allowed=a, tolerance=GAP)
            )
            rows.append((units, observations, in_gram, in_solve))
            print(
                f"N = {units:6}, M = {observations:8}: statistics {in_gram:8.2f} s, solve {in_solve:7.2f} s, "
                f"peak memory {peak() - before:7.0f} MiB (one Gram is {8 * units**2 / 2**20:.1f}), "
                f"{solution.n_edges} weights, "
                f"{int((weights != 0).sum())} true",
                flush=True,
            )
            del problem, solution, accumulator
    if only is not None:
        return
    table = np.log(np.array([row for row in rows if row[0] >= 300]))
    design = np.column_stack([table[:, :2], np.ones(len(table))])
    for name, column in (("statistics", 2), ("solve", 3)):
        in_units, in_observations, _ = np.linalg.lstsq(design, table[:, column], rcond=None)[0]
        print(f"{name}: seconds grow as N^{in_units:.2f} M^{in_observations:.2f} (fitted from N = 300 on)")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--units", type=int, default=2000)
    parser.add_argument("--observations", type=int, default=100_000)
    parser.add_argument("--sample", type=int, default=10)
    parser.add_argument("--penalty", type=float, default=0.05, help="as a share of the largest penalty")
    parser.add_argument("--growth", action="store_true")
    parser.add_argument(
        "--most", type=float, default=1e12, help="with --growth: leave out units^2 x observations above"
    )
    parser.add_argument("--size", type=int, nargs=2, metavar=("N", "M"), help="with --growth: this size alone")
    options = parser.parse_args()
    if options.growth:
        return growth(options.penalty, options.most, options.size and tuple(options.size))
    weights, allowed = structure(options.units)
    x = draw(weights, options.observations, 0)

    def accumulate() -> object:
        accumulator = Accumulator()
        for batch in x.split(8192):
            accumulator.add(batch)
        return standardize(accumulator.total())

    to_gram, problem = seconds(accumulate)
    penalty = options.penalty * largest_penalty(problem, allowed)
    to_solve, solution = seconds(lambda: solve_lasso(problem, penalty, allowed=allowed, tolerance=GAP))
    ours = to_gram + to_solve
    print(f"{torch.get_num_threads()} threads, N = {options.units}, M = {options.observations}")
    print(f"ours: statistics {to_gram:.1f} s + solve {to_solve:.1f} s = {ours:.1f} s, {solution.n_edges} weights, ")
    print(f"      worst gap {float(solution.gap.max()):.1e}")

    prepare, data = seconds(lambda: prepared(x))
    standard, gram = data
    first = int(allowed.any(0).nonzero()[0])
    sample = np.linspace(first, options.units - 1, options.sample).round().astype(int)
    alpha = penalty / (2 * options.observations)
    for name, fit in (("Lasso(precompute=gram).fit", by_estimator), ("lasso_path(precompute=gram, Xy=...)", by_path)):
        total, worst, unfinished = 0.0, 0.0, 0
        for j in sample:
            sources = allowed[:, j].numpy()
            with warnings.catch_warnings(record=True) as caught:
                warnings.simplefilter("always", ConvergenceWarning)
                took, weights = seconds(lambda s=sources, j=j, fit=fit: fit(standard, gram, s, j, alpha))
            unfinished += len(caught)
            total += took
            worst = max(worst, float(np.abs(weights - solution.weights[:, j].numpy()[sources]).max()))
        n_targets = int(allowed.any(0).sum())
        loop = prepare + total / len(sample) * n_targets
        print(
            f"scikit-learn, {name}: {total / len(sample):.3f} s a target on a sample of {len(sample)}, extrapolated to "
            f"{n_targets} targets + Gram {prepare:.1f} s = {loop:.0f} s; largest difference in a weight {worst:.1e}; "
            f"{unfinished} not converged. Ratio: {loop / ours:.1f}"
        )


def prepared(x: torch.Tensor) -> tuple[np.ndarray, np.ndarray]:
    standard = x.double().numpy()
    standard -= standard.mean(0)
    standard /= standard.std(0)
    return np.asfortranarray(standard), standard.T @ standard


def by_estimator(x: np.ndarray, gram: np.ndarray, sources: np.ndarray, j: int, alpha: float) -> np.ndarray:
    k = int(sources.sum())  # the first columns: a view, so that nothing is copied
    model = Lasso(alpha=alpha, precompute=gram[:k, :k].copy(), fit_intercept=False, copy_X=False, tol=GAP)
    return model.fit(x[:, :k], x[:, j]).coef_


def by_path(x: np.ndarray, gram: np.ndarray, sources: np.ndarray, j: int, alpha: float) -> np.ndarray:
    k = int(sources.sum())
    given = {"precompute": gram[:k, :k].copy(), "Xy": gram[:k, j].copy()}
    _, weights, _ = lasso_path(x[:, :k], x[:, j], alphas=[alpha], tol=GAP, check_input=False, **given)
    return weights[:, 0]


if __name__ == "__main__":
    main()
