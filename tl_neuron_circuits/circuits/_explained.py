"""Choose as many nodes as it takes to explain a share of the target, by running the circuit.

    f(S) = (F(S) - F(0)) / (F(M) - F(0))

F is the target with only the nodes S live: F(M) is the model's, F(0) has none of them. Nodes that are not live have
their values on the corrupt prompt (pairs), or their means over reference texts (a single prompt); those at skipped
positions (BOS) stay live in all three. The circuit is the shortest prefix of the ranking by |score| from which f stays
within [share, 2 - share]: a circuit may overshoot, and one that is right at a single size alone is luck.

The search runs sizes on a grid, a third of a factor of two apart or wider, down from all nodes; then between the last
size that was outside and the first that was not, as finely as the budget allows. "Stays" means: at every size it ran.
Source: the faithfulness of METHODS 1.3, for one prompt.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import numpy as np
import torch
from torch import Tensor

from .._errors import NumericalError, SettingsError
from .._options import Options
from .._progress import progress
from ..bases._runs import list_reads, run_values, take_apart, values_at
from ..bases._site import Basis, Parts, basis_sites
from ..interventions._ablation import AblationSwitch
from ..models._protocol import TransformerLensModel
from ..models._threads import hooked
from ..tasks._tokenized import Batch
from ._alignment import Alignment, Places
from ._choose import Ranking
from ._prompt_graph import run_prompt
from ._targets import Target

_ROWS = 16  # forward rows at once


@dataclass(frozen=True)
class ByExplained(Options):
    """Choose the shortest prefix of the ranking from which the circuit alone gives between `share` and 2 - `share`.

    One is the whole model's target, zero that of a model in which no node is live. Measured, not estimated: `budget`
    forward passes per prompt.

    Raises:
        SettingsError: a share that is not between 0 and 1, or a budget below 8.

    Example:
        >>> import tl_neuron_circuits as tnc
        >>> model, pairs = tnc.load_demo_model(), tnc.tasks.subject_verb_agreement("simple", n=8)
        >>> circuit = tnc.trace(model, pairs, nodes=tnc.ByExplained(0.5))
        >>> 0.5 <= circuit.settings["explained"]["share"] <= 1.5
        True
    """

    name: ClassVar[str] = "explained"
    share: float = 0.5
    budget: int = 48

    def __post_init__(self) -> None:
        """Check both."""
        super().__post_init__()
        if not 0 < self.share < 1 or self.budget < 8:
            raise SettingsError(
                f"expected a share between 0 and 1 and a budget of at least 8 forward passes; got {self.share} and "
                f"{self.budget}."
            )

    @property
    def label(self) -> str:
        """How settings and the command line write it."""
        return f"explained({self.share:g})"


def count_explained(
    model: TransformerLensModel, basis: Basis | Sequence[Basis], batches: Sequence[Batch], targets: Sequence[Target],
    ranking: Ranking, choice: ByExplained, *, reference: Sequence[Tensor] | None, places: Places,
    verbose: bool | None = False,
) -> tuple[int, list[tuple[int, float]]]:  # fmt: skip
    """How many nodes `choice` takes, and f at every size that was run, ascending.

    Args:
        model: the model.
        basis: whose nodes are ranked.
        batches: of one prompt each.
        targets: whose sum is explained.
        ranking: of all nodes.
        choice: share and budget.
        reference: tokens of texts over which means are taken; None for pairs, whose corrupt prompts are there.
        places: of the nodes; those that are skipped always stay live.
        verbose: as in `trace`.

    Raises:
        NumericalError: the nodes make no difference to the target, so that nothing can be a share of it.
        SettingsError: not even all nodes explain the share (nodes at skipped positions or errors of dictionaries hold
            the rest).
    """
    circuit = _Circuits(model, basis, batches, targets, ranking, reference, places, verbose)
    empty, whole = circuit.target([0])[0], circuit.target([None])[0]
    if abs(whole - empty) <= 1e-6 * max(abs(whole), abs(empty), 1e-30):
        raise NumericalError(
            f"the target is {whole:.4g} with all nodes and {empty:.4g} with none: they make no difference to it, so no "
            "number of them explains a share."
        )
    shares: dict[int, float] = {}

    def run(sizes: Sequence[int]) -> None:
        new = [size for size in sizes if size not in shares]
        shares.update(zip(new, ((f - empty) / (whole - empty) for f in circuit.target(new)), strict=True))

    def smallest_that_stays() -> int | None:
        stays = None
        for size in sorted(shares, reverse=True):
            if not choice.share <= shares[size] <= 2 - choice.share:
                return stays
            stays = size
        return stays

    most = ranking.available
    run(sorted({round(size) for size in np.geomspace(1, most, max(4, choice.budget // 2))}))
    while len(shares) < choice.budget:
        found = smallest_that_stays()
        below = [size for size in shares if found is not None and size < found]
        if found is None or found - (last := max(below, default=0)) <= 1:
            break
        left = choice.budget - len(shares)
        step = np.linspace(last, found, min(left, max(4, left // 2)) + 2)[1:-1]
        before = len(shares)
        run(sorted({round(size) for size in step} - {last, found}))
        if len(shares) == before:
            break
    found = smallest_that_stays()
    table = sorted(shares.items())
    if found is None:
        raise SettingsError(
            f"all {most:,} nodes together give {shares[most]:.2f} of the target's change, not between {choice.share:g} "
            f"and {2 - choice.share:g}: what else holds it (errors of dictionaries, excluded nodes) is not ranked. "
            "Give a number of nodes."
        )
    return found, table


class _Circuits:
    """Runs of the model with the first nodes of a ranking live."""

    def __init__(
        self, model: TransformerLensModel, basis: Basis | Sequence[Basis], batches: Sequence[Batch],
        targets: Sequence[Target], ranking: Ranking, reference: Sequence[Tensor] | None, places: Places,
        verbose: bool | None,
    ) -> None:  # fmt: skip
        self._verbose = verbose
        self._model, self._batches, self._targets, self._aligned = model, batches, targets, places
        self._sites = sorted(basis_sites(model, basis), key=lambda site: site.layer)
        order = ranking.size.argsort(descending=True, stable=True)
        rank = torch.empty_like(order)
        rank[order] = torch.arange(len(order))
        ends = [positions * units for positions, units in ranking.shapes]
        self._ranks = [
            part.reshape(shape) for part, shape in zip(rank.split(ends), ranking.shapes, strict=True)
        ]  # of each node, by place: live if below the size
        self._means = None if reference is None else self._mean_parts(reference)

    @torch.no_grad()
    def target(self, sizes: Sequence[int | None]) -> list[float]:
        """The targets' sum, averaged over prompts, for each size; None is the model as it is."""
        totals = torch.zeros(len(sizes), dtype=torch.float64)
        for batch in progress(self._batches, desc="circuits of several sizes", verbose=self._verbose, unit="prompt"):
            switch = AblationSwitch(self._sites, self._baselines(batch))
            with hooked(self._model, switch.hooks):
                for first in range(0, len(sizes), _ROWS):
                    some = sizes[first : first + _ROWS]
                    switch.keep(self._kept(some, self._aligned.alignments[int(batch.index[0])]))
                    run = run_prompt(self._model, batch.repeat(len(some)), ())
                    for row in range(len(some)):
                        value = sum(target.value(run.row(row), batch) for target in self._targets)
                        totals[first + row] += float(value) / len(self._batches)
        return totals.tolist()

    def _kept(self, sizes: Sequence[int | None], alignment: Alignment) -> Any:
        kept: dict[tuple[str, str], Tensor] = {}
        whole = torch.tensor([size is None for size in sizes])
        limit = torch.tensor([0 if size is None else size for size in sizes])[:, None, None]
        skipped = torch.isin(alignment.place, torch.tensor(list(self._aligned.skipped), dtype=torch.long))
        for site, ranks in zip(self._sites, self._ranks, strict=True):
            live = (ranks[alignment.place] < limit) | whole[:, None, None]
            live[:, skipped] = True
            kept[site.hook, "node"] = live
            for name in site.vectors:
                vector = whole[:, None].expand(-1, len(skipped)).clone()
                vector[:, skipped] = True
                kept[site.hook, name] = vector
        return kept

    def _baselines(self, batch: Batch) -> dict[str, Parts]:
        if self._means is not None:
            return self._means
        return take_apart(self._sites, run_values(self._model, batch.on_corrupt(), list_reads(self._sites)))

    def _mean_parts(self, reference: Sequence[Tensor]) -> dict[str, Parts]:
        """Means over all positions of all texts."""
        sums: dict[str, Parts] = {}
        count = 0
        for tokens in reference:
            parts = take_apart(self._sites, values_at(self._model, tokens[None], list_reads(self._sites)))
            skipped = len(self._aligned.skipped)
            skip = skipped if len(tokens) > skipped else 0
            count += len(tokens) - skip
            for hook, part in parts.items():
                total = part.map(lambda value, skip=skip: value[:, skip:].double().sum(1, keepdim=True))
                sums[hook] = total if hook not in sums else sums[hook].plus(total)
        return {hook: part.map(lambda value: (value / count).float()) for hook, part in sums.items()}
