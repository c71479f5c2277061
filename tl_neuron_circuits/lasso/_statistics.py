"""Sufficient statistics of a regression: all that the lasso needs of the observations, however many they are.

    n,  mean of every column,  sum of (x - mean x)(x - mean x)',  of (x - mean x)(y - mean y)',  of (y - mean y)^2

Everything is float64. Products are kept about the mean and merged by Chan's update, so large means cost no digits.
Memory: source x source + source x target numbers, whatever n is.
Source: Chan, Golub, LeVeque 1983; METHODS 3.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Protocol, runtime_checkable

import torch
from jaxtyping import Bool, Float, Float64
from torch import Tensor

from .._errors import NumericalError, SettingsError

_FIELDS = ("mean", "products", "target_mean", "target_products", "target_squares")
_NOISE = 1e-6  # float32 activations of a constant column differ by about this share of their size
_STRIP = 256


@dataclass(frozen=True, eq=False, repr=False)
class Statistics:
    """Counts, means and centered products of observed sources and targets.

    Where the targets are the sources themselves, `target_products` is `products`: one tensor, not two.
    """

    n: int
    mean: Float64[Tensor, " source"]
    products: Float64[Tensor, "source source"]
    target_mean: Float64[Tensor, " target"]
    target_products: Float64[Tensor, "source target"]
    target_squares: Float64[Tensor, " target"]

    @classmethod
    def from_rows(cls, x: Float[Tensor, "n source"], y: Float[Tensor, "n target"] | None = None) -> "Statistics":
        """Statistics of one batch of observations; without `y`, of every column on every other.

        Raises:
            NumericalError: a value is NaN or infinite.
            SettingsError: no observations.
        """
        x = finite_rows(x, "sources")
        mean = x.mean(0)
        centered = x - mean
        products = _products(centered)
        if y is None:
            return cls.from_tensors(len(x), {"mean": mean, "products": products})
        y = finite_rows(y, "targets")
        target_mean = y.mean(0)
        difference = y - target_mean
        return cls(len(x), mean, products, target_mean, centered.T @ difference, difference.square().sum(0))

    @property
    def square(self) -> bool:
        """Whether the targets are the sources themselves."""
        return self.target_products is self.products

    def tensors(self) -> dict[str, Tensor]:
        """What is to be stored or sent, each tensor once; `from_tensors` reads it."""
        names = ("mean", "products") if self.square else _FIELDS
        return {name: getattr(self, name).contiguous() for name in names}

    @classmethod
    def from_tensors(cls, n: int, tensors: Mapping[str, Tensor]) -> "Statistics":
        """The statistics of `n` observations from their `tensors()`."""
        if "target_mean" in tensors:
            return cls(n, *(tensors[name] for name in _FIELDS))
        mean, products = tensors["mean"], tensors["products"]
        return cls(n, mean, products, mean, products, products.diagonal().clone())

    def __repr__(self) -> str:
        return f"Statistics(n={self.n:,}, {len(self.mean):,} sources, {len(self.target_mean):,} targets)"


class Accumulator:
    """Statistics of batches as they come, summed in place."""

    def __init__(self) -> None:
        self._total: Statistics | None = None

    @property
    def n(self) -> int:
        """Observations so far."""
        return 0 if self._total is None else self._total.n

    def add(self, x: Float[Tensor, "n source"], y: Float[Tensor, "n target"] | None = None) -> None:
        """Add one batch of observations.

        Raises:
            NumericalError: a value is NaN or infinite.
            SettingsError: the columns differ from earlier batches.
        """
        new = Statistics.from_rows(x, y)
        old = self._total
        if old is None:
            self._total = new
            return
        _same_columns([old, new])
        n = old.n + new.n
        shift, target_shift, weight = new.mean - old.mean, new.target_mean - old.target_mean, old.n * new.n / n
        old.products.add_(new.products).addr_(shift, shift, alpha=weight)
        if not old.square:
            old.target_products.add_(new.target_products).addr_(shift, target_shift, alpha=weight)
        squares = old.target_squares + new.target_squares + weight * target_shift.square()
        mean, target_mean = old.mean + shift * (new.n / n), old.target_mean + target_shift * (new.n / n)
        self._total = Statistics(n, mean, old.products, target_mean, old.target_products, squares)

    def total(self) -> Statistics:
        """Statistics of all batches; later batches change the same memory.

        Raises:
            SettingsError: no batch was added.
        """
        if self._total is None:
            raise SettingsError("expected at least one batch of observations; got none.")
        return self._total


def combine(parts: Sequence[Statistics], times: Sequence[int]) -> Statistics:
    """Statistics of the parts' observations together, part k repeated `times[k]` times (0 leaves it out).

    Raises:
        SettingsError: nothing is left, or the parts are of different columns.
    """
    chosen = [(part, int(count)) for part, count in zip(parts, times, strict=True) if count > 0]
    if not chosen:
        raise SettingsError("expected at least one part with observations; got none.")
    _same_columns([part for part, _ in chosen])
    n = sum(part.n * count for part, count in chosen)
    first = chosen[0][0]
    mean = torch.stack([part.mean * (part.n * count / n) for part, count in chosen]).sum(0)
    target_mean = torch.stack([part.target_mean * (part.n * count / n) for part, count in chosen]).sum(0)
    products = torch.zeros_like(first.products)
    target_products = products if first.square else torch.zeros_like(first.target_products)
    squares = torch.zeros_like(first.target_squares)
    for part, count in chosen:
        shift, target_shift = part.mean - mean, part.target_mean - target_mean
        products.add_(part.products, alpha=count).addr_(shift, shift, alpha=part.n * count)
        if not first.square:
            target_products.add_(part.target_products, alpha=count)
            target_products.addr_(shift, target_shift, alpha=part.n * count)
        squares += count * (part.target_squares + part.n * target_shift.square())
    return Statistics(n, mean, products, target_mean, target_products, squares)


@runtime_checkable
class Products(Protocol):
    """A Gram that computes its entries when they are asked for (`_samples`)."""

    def __len__(self) -> int:
        """How many sources."""
        ...

    def __matmul__(self, weights: Tensor) -> Tensor:
        """The matrix times weights."""
        ...

    def __getitem__(self, key: tuple[Tensor, Tensor]) -> Tensor:
        """Some of its entries."""
        ...


@dataclass(frozen=True, eq=False, repr=False)
class Standardized:
    """The lasso's problem in columns of mean 0 and variance 1: correlations instead of products.

    Constant columns are zero throughout: never chosen as a source, nothing to explain as a target. Columns whose
    standard deviation is below the floor are divided by the floor, so that their weight costs more.
    """

    n: int
    gram: Float64[Tensor, "source source"] | Products
    cross: Float64[Tensor, "source target"]
    squares: Float64[Tensor, " target"]
    scale: Float64[Tensor, " source"]
    target_scale: Float64[Tensor, " target"]
    constant: Bool[Tensor, " source"]
    target_constant: Bool[Tensor, " target"]


def standardize(statistics: Statistics, floor: float = 1e-4) -> Standardized:
    """Divide every column by its standard deviation, or by `floor` times the largest one if that is more.

    Raises:
        SettingsError: fewer than two observations.
    """
    if statistics.n < 2:
        raise SettingsError(f"expected at least 2 observations to standardize; got {statistics.n}. Give more tokens.")
    n = statistics.n
    scale, constant = scale_columns(statistics.products.diagonal() / n, statistics.mean, floor)
    if statistics.square:
        target_scale, target_constant = scale, constant
    else:
        target_scale, target_constant = scale_columns(statistics.target_squares / n, statistics.target_mean, floor)
    left = (~constant).double() / scale
    right = (~target_constant).double() / target_scale
    gram = (statistics.products / n) * left[:, None] * left
    cross = gram if statistics.square else (statistics.target_products / n) * left[:, None] * right
    squares = (statistics.target_squares / n) * right.square()
    return Standardized(n, gram, cross, squares, scale, target_scale, constant, target_constant)


def scale_columns(variance: Tensor, mean: Tensor, floor: float) -> tuple[Tensor, Tensor]:
    """What to divide each column by, and which columns are constant (divided by 1)."""
    deviation = variance.clamp(min=0).sqrt()
    constant = deviation <= _NOISE * mean.abs()
    largest = deviation[~constant].max() if bool((~constant).any()) else deviation.new_ones(())
    constant |= deviation <= 1e-12 * largest
    return torch.where(constant, torch.ones_like(deviation), deviation.clamp(min=floor * float(largest))), constant


def _products(x: Tensor) -> Tensor:
    """x'x, by strips of its lower triangle: half the work of a full product."""
    width = x.shape[1]
    out = x.new_zeros(width, width)
    for first in range(0, width, _STRIP):
        out[first:, first : first + _STRIP] = x[:, first:].T @ x[:, first : first + _STRIP]
    lower = out.tril_()
    return lower.add_(lower.tril(-1).T)


def finite_rows(values: Tensor, what: str) -> Tensor:
    """One batch of observations in float64.

    Raises:
        NumericalError: a value is NaN or infinite.
        SettingsError: no observations.
    """
    if len(values) == 0:
        raise SettingsError("expected at least one observation; got an empty batch.")
    values = values.detach().double()
    bad = ~torch.isfinite(values).all(0)
    if bool(bad.any()):
        columns = bad.nonzero().flatten()[:5].tolist()
        raise NumericalError(
            f"expected finite {what}; found NaN or infinite values in {int(bad.sum())} of {values.shape[1]} columns, "
            f"first {columns}. Leave those prompts out, or run the model in float32 or bfloat16."
        )
    return values


def _same_columns(parts: Sequence[Statistics]) -> None:
    shapes = {(tuple(part.target_products.shape), part.square) for part in parts}
    if len(shapes) > 1:
        raise SettingsError(f"expected statistics of the same columns; got {sorted(shapes)} (sources, targets).")
