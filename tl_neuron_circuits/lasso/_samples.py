"""A regression from its stored observations, where the products of all sources with each other do not fit into memory.

    kept: the n x source numbers themselves. Of the Gram X'X / n and of X'y / n only what is asked for, when it is:
    Gram @ B = X'(X B) / n,    Gram[I, J] = X_I' X_J / n,    X'Y / n for the targets of one block

`Samples` takes the place of `Statistics`, `SampledProblem` that of `Standardized`, and the solver works as on products:
it needs the Gram times sparse weights, and the entries of small working sets. Columns are centered and scaled as they
are read. The targets are cut into blocks of one site, solved one after the other, and their weights kept sparse; the
most that is held beside the observations is a few source x block arrays. Time grows with n, which it does not do on
products.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Float64, Int
from torch import Tensor

from .._errors import SettingsError
from ._statistics import Standardized, finite_rows, scale_columns

_STRIP = 2**23  # numbers that are centered at a time: 64 MB


@dataclass(frozen=True, eq=False, repr=False)
class Samples:
    """One block's observations; `x` is one tensor for all regressions on the same sources."""

    x: Float64[Tensor, "n source"]
    y: Float64[Tensor, "n target"]
    place: tuple[int, int, int] | None = None
    """(first, last, all): `y` is `x[:, first:last]`, some of the targets `x[:, :all]`. None: it has nothing of `x`."""

    @property
    def n(self) -> int:
        """Observations."""
        return len(self.x)


@dataclass(frozen=True, eq=False, repr=False)
class Moments:
    """Mean and sum of squares about it, by column."""

    mean: Float64[Tensor, " column"]
    squares: Float64[Tensor, " column"]

    @classmethod
    def from_parts(cls, parts: Sequence[Tensor], times: Sequence[int]) -> "Moments":
        """Of the parts' rows together, part k `times[k]` times."""
        n = sum(len(part) * count for part, count in zip(parts, times, strict=True))
        mean = torch.stack([part.sum(0) * count for part, count in zip(parts, times, strict=True)]).sum(0) / n
        squares = torch.zeros_like(mean)
        for part, count in zip(parts, times, strict=True):
            for columns in torch.arange(len(mean), device=mean.device).split(max(1, _STRIP // len(part))):
                squares[columns] += count * (part[:, columns] - mean[columns]).square().sum(0)
        return cls(mean, squares)


@dataclass(frozen=True, eq=False, repr=False)
class SampledStatistics:
    """Blocks of observations, block k `times[k]` times: what `Statistics` is to products."""

    parts: tuple[Samples, ...]
    times: tuple[int, ...]
    sources: Moments
    targets: Moments

    @property
    def n(self) -> int:
        """Observations, repeated ones as often as they count."""
        return sum(part.n * count for part, count in zip(self.parts, self.times, strict=True))

    @property
    def mean(self) -> Tensor:
        """Of every source."""
        return self.sources.mean

    @property
    def target_mean(self) -> Tensor:
        """Of every target."""
        return self.targets.mean

    def mean_squared_error(self, weights: Tensor, mean: Tensor, target_mean: Tensor) -> Float64[Tensor, " target"]:
        """Of predicting target_mean + (x - mean)' weights, in the columns' own units."""
        total = torch.zeros_like(target_mean)
        used = weights.any(1).nonzero().flatten()
        for part, count in zip(self.parts, self.times, strict=True):
            predicted = (part.x[:, used] - mean[used]) @ weights[used]
            total += count * (part.y - target_mean - predicted).square().sum(0)
        return total / self.n


def combine_samples(parts: Sequence[Samples], times: Sequence[int], sources: dict[int, Moments]) -> SampledStatistics:
    """Of the blocks together, block k `times[k]` times; moments of sources are looked up in, and added to, `sources`.

    Raises:
        SettingsError: no block is left.
    """
    chosen = [(part, int(count)) for part, count in zip(parts, times, strict=True) if count > 0]
    if not chosen:
        raise SettingsError("expected at least one part with observations; got none.")
    some, counts = [part for part, _ in chosen], [count for _, count in chosen]
    key = id(some[0].x)
    if key not in sources:
        sources[key] = Moments.from_parts([part.x for part in some], counts)
    of_x, place = sources[key], some[0].place
    if place is None:
        targets = Moments.from_parts([part.y for part in some], counts)
    else:
        targets = Moments(of_x.mean[place[0] : place[1]], of_x.squares[place[0] : place[1]])
    return SampledStatistics(tuple(some), tuple(counts), of_x, targets)


@dataclass(frozen=True, eq=False, repr=False)
class SampledGram:
    """Correlations of the sources, computed where they are asked for; indexed and multiplied like the matrix itself."""

    statistics: SampledStatistics
    left: Float64[Tensor, " source"]
    """1 over the scale of a source; 0 where it is constant."""

    def __len__(self) -> int:
        """How many sources."""
        return len(self.left)

    def __matmul__(self, weights: Float64[Tensor, "source target"]) -> Float64[Tensor, "source target"]:
        """Gram @ weights: fitted values from the sources in use, then every source's product with them."""
        used = weights.any(1).nonzero().flatten()
        scaled = self.left[used, None] * weights[used]
        return self.products([self._columns(part.x, used) @ scaled for part in self.statistics.parts])

    def products(self, values: Sequence[Float64[Tensor, "n target"]]) -> Float64[Tensor, "source target"]:
        """X'v / n of the standardized sources; `values` by block."""
        total = self.left.new_zeros(len(self.left), values[0].shape[1])
        for part, count, value in zip(self.statistics.parts, self.statistics.times, values, strict=True):
            total.addmm_(part.x.T, value, alpha=count)
            total.addr_(self.statistics.mean, value.sum(0), alpha=-count)
        return total.mul_(self.left[:, None] / self.statistics.n)

    def __getitem__(self, key: tuple[Int[Tensor, "..."], Int[Tensor, "..."]]) -> Tensor:
        """`gram[rows[:, None], columns]`, or `gram[sets[:, :, None], sets[:, None, :]]` for many small sets of columns.

        Raises:
            IndexError: another kind of index.
        """
        rows, columns = (index.to(self.left.device) for index in key)
        if rows.dim() == 2 and rows.shape[1] == 1 and columns.dim() == 1:
            return self._block(rows[:, 0], columns)
        if rows.dim() == 3 and rows.shape[2] == 1 and torch.equal(rows.mT, columns):
            return self._small_sets(rows[:, :, 0])
        raise IndexError(f"expected rows[:, None], columns; got indices of {tuple(rows.shape)}, {tuple(columns.shape)}")

    def _block(self, rows: Tensor, columns: Tensor) -> Tensor:
        total = self.left.new_zeros(len(rows), len(columns))
        for part, count in zip(self.statistics.parts, self.statistics.times, strict=True):
            total.addmm_(self._columns(part.x, rows).T, self._columns(part.x, columns), alpha=count)
        return total.mul_(self.left[rows, None]).mul_(self.left[columns] / self.statistics.n)

    def _small_sets(self, sets: Int[Tensor, "set width"]) -> Float64[Tensor, "set width width"]:
        total = self.left.new_zeros(*sets.shape, sets.shape[1])
        at_once = max(1, _STRIP // max(1, sets.shape[1] * max(part.n for part in self.statistics.parts)))
        for part, count in zip(self.statistics.parts, self.statistics.times, strict=True):
            for some, out in zip(sets.split(at_once), total.split(at_once), strict=True):
                values = (self._columns(part.x, some.flatten()) * self.left[some.flatten()]).T.unflatten(0, some.shape)
                out.baddbmm_(values, values.mT, alpha=count / self.statistics.n)
        return total

    def _columns(self, x: Tensor, columns: Tensor) -> Tensor:
        return x[:, columns] - self.statistics.mean[columns]


class SampledProblem:
    """The lasso's problem for one block of targets; `cross` is made by `with_cross`, as all blocks' would not fit."""

    def __init__(self, statistics: SampledStatistics, floor: float) -> None:
        """Scales as in `standardize`."""
        self.statistics, self.n = statistics, statistics.n
        if self.n < 2:
            raise SettingsError(f"expected at least 2 observations to standardize; got {self.n}. Give more tokens.")
        sources, targets = statistics.sources, statistics.targets
        self.scale, self.constant = scale_columns(sources.squares / self.n, sources.mean, floor)
        place = statistics.parts[0].place
        if place is None:
            self.target_scale, self.target_constant = scale_columns(targets.squares / self.n, targets.mean, floor)
        else:  # the floor is a share of the largest of *all* targets
            first, last, every = place
            scale, constant = scale_columns(sources.squares[:every] / self.n, sources.mean[:every], floor)
            self.target_scale, self.target_constant = scale[first:last], constant[first:last]
        self.gram = SampledGram(statistics, (~self.constant).double() / self.scale)
        self._right = (~self.target_constant).double() / self.target_scale
        self.squares = (targets.squares / self.n) * self._right.square()
        self.most: Tensor | None = None
        """By target, the penalty (as alpha) from which on nothing is chosen; once `smallest_empty` was asked."""

    def with_cross(self, columns: Int[Tensor, " some"]) -> Standardized:
        """The problem of some of its targets, with their correlations."""
        mean, right = self.statistics.target_mean[columns], self._right[columns]
        cross = self.gram.products([(part.y[:, columns] - mean) * right for part in self.statistics.parts])
        return Standardized(
            self.n, self.gram, cross, self.squares[columns], self.scale, self.target_scale[columns], self.constant,
            self.target_constant[columns],
        )  # fmt: skip

    def smallest_empty(self, allowed: Tensor) -> Float64[Tensor, " target"]:
        """By target, the alpha from which on it has no weight; asked once."""
        if self.most is None:
            columns = torch.arange(len(self.squares), device=self.squares.device)
            self.most = (self.with_cross(columns).cross * allowed.to(self.squares.device)).abs().amax(0)
        return self.most


def join_rows(rows: Sequence[Tensor], what: str) -> Float64[Tensor, "n column"]:
    """Batches of observations in one tensor.

    Raises:
        NumericalError: a value is NaN or infinite.
    """
    return torch.cat([finite_rows(some, what) for some in rows])
