"""Pairs under masks: what each is mixed with and compared with, kept or run again, over processes and in pieces.

Counterfactual values take 4 bytes per node and pair. Where they are not kept, they are run again in every step.
"""

import itertools
from collections.abc import Iterator, Sequence

import torch
from jaxtyping import Float
from torch import Tensor

from .._errors import NumericalError
from .._memory import Halving, available_memory
from .._processes import Processes
from ..tasks._tokenized import Batch, TokenizedPairs
from ._mask_gradient import MaskGradient
from ._masked_runs import (
    NestedMasks,
    References,
    loss_of_run,
    mask_gradient,
    masked_run,
    measure_references,
    node_shapes,
    select,
    split_blocks,
)
from ._relp import RelP
from ._scope import Means, Scope

_CACHED_SHARE = 0.25  # of the memory that is free may go to counterfactual values


class MaskedPairs:
    """This process' pairs, with what their masked runs are mixed with and compared with."""

    def __init__(
        self,
        method: NestedMasks,
        scope: Scope,
        tokens: TokenizedPairs,
        means: Means | None,
        processes: Processes,
        halving: Halving,
        cache: str = "auto",
    ) -> None:
        self._method, self._scope, self._means = method, scope, means
        self._processes, self._halving, self._cache = processes, halving, cache
        self._groups = list(tokens.batches(len(tokens)))  # one per length
        self._place = {
            index: (number, row)
            for number, group in enumerate(self._groups)
            for row, index in enumerate(group.index.tolist())
        }
        first = select(self._groups[0], [0])
        values = scope.values(first)
        self.shapes = node_shapes(scope, values)
        self.devices = {site.hook: values[site.hook].device for site in scope.sites}
        self._cached = processes.from_first(lambda: self._fits(first, len(tokens)))
        self._stored: dict[str, Tensor] = {}
        self._rows: dict[int, int] = {}
        self._store()

    @property
    def how(self) -> str:
        """Where counterfactual values come from."""
        if self._scope.baseline != "corrupt":
            return self._scope.baseline
        return "cached" if self._cached else "run again"

    def gradient(self, mask: Float[Tensor, " node"], chosen: Sequence[int]) -> tuple[float, Tensor]:
        """The mean loss of the chosen pairs, and its gradient at the mask: the same on every process."""
        loss, gradient = torch.zeros((), dtype=torch.float64), torch.zeros_like(mask)
        for batch in self._batches(chosen):
            for attempt in self._halving.pieces(batch):
                with attempt as piece:
                    references = self._references(piece)
                    part = mask_gradient(self._method, self._scope, piece, references, self._means, mask, self.shapes)
                    loss += part[0].to(loss)
                    gradient += part[1]
        total = self._processes.total({"loss": loss, "gradient": gradient})
        gradient = total["gradient"] / len(chosen)
        if not gradient.isfinite().all():
            raise NumericalError(
                "the gradient at the mask contains NaN or inf: the model's values or gradients overflow. Try dtype "
                "float32 or bfloat16, and check_model(model)."
            )
        return float(total["loss"]) / len(chosen), gradient

    def hard_loss(self, scores: Float[Tensor, " node"], sizes: Sequence[int]) -> float:
        """The mean loss of all pairs with the best nodes live and the others not, over these sizes."""
        order, total = scores.argsort(descending=True, stable=True), torch.zeros((), dtype=torch.float64)
        masks = [torch.zeros_like(scores).index_fill(0, order[:size], 1.0) for size in sizes]
        for batch in self._batches(list(self._place)):
            for attempt in self._halving.pieces(batch):
                with attempt as piece, torch.no_grad():
                    references = self._references(piece)
                    for mask in masks:
                        blocks = split_blocks(mask, self.shapes)
                        run = masked_run(self._method, self._scope, piece, references, self._means, blocks)
                        total += loss_of_run(self._method, run, references).sum(dtype=torch.float64).to(total)
        return float(self._processes.total({"loss": total})["loss"]) / (len(self._place) * len(sizes))

    def relp_scores(self) -> Tensor:
        """RelP's scores r as a start: sign(r) log(1 + |r| / median |r|), scaled to at most 1."""
        sums = torch.zeros(sum(shape.numel() for shape in self.shapes.values()))
        for batch in self._batches(list(self._place)):
            for attempt in self._halving.pieces(batch):
                with attempt as piece:
                    _, blocks = RelP().score(self._scope, piece, self._means, rows=1, verbose=False)
                    sums += torch.cat([blocks[key].reshape(-1).cpu() for key in self.shapes])
        sums = self._processes.total({"sums": sums})["sums"]
        live = sums.abs()[sums != 0]
        if not len(live):
            return sums
        started = sums.sign() * (sums.abs() / live.median()).log1p()
        return started / started.abs().max()

    def _batches(self, chosen: Sequence[int]) -> Iterator[Batch]:
        """This process' part of the chosen pairs, in batches of one length."""
        mine = [index for index in chosen if index % self._processes.count == self._processes.rank]
        for number, group in enumerate(self._groups):
            rows = [self._place[index][1] for index in mine if self._place[index][0] == number]
            for start in range(0, len(rows), self._halving.size):
                yield select(group, rows[start : start + self._halving.size])

    def _fits(self, first: Batch, n: int) -> bool:
        if self._cache != "auto":
            return self._cache == "always"
        with torch.no_grad():
            found = measure_references(self._method, self._scope, first, self._means, self.shapes)
        needed = n * sum(tensor.numel() * tensor.element_size() for tensor in found.values())
        available = available_memory(self._scope.model)
        return needed <= (2e9 if available is None else _CACHED_SHARE * available)

    def _store(self) -> None:
        """Measure what every pair is compared with, once; all of it where it is cached."""
        if not self._cached and self._method.loss != "matching":
            return
        kept: dict[str, list[tuple[list[int], Tensor]]] = {}
        for batch in self._batches(list(self._place)):
            for attempt in self._halving.pieces(batch):
                with attempt as piece:
                    found = measure_references(
                        self._method, self._scope, piece, self._means, self.shapes, large=self._cached
                    )
                    for name, tensor in found.items():
                        kept.setdefault(f"{piece.clean.shape[1]}/{name}", []).append((piece.index.tolist(), tensor))
        for name in list(kept):
            parts = kept.pop(name)
            self._stored[name] = torch.cat([tensor for _, tensor in parts])
            self._rows |= {index: row for row, index in enumerate(itertools.chain(*(rows for rows, _ in parts)))}

    def _references(self, batch: Batch) -> References:
        prefix = f"{batch.clean.shape[1]}/"
        rows = torch.tensor([self._rows.get(index, 0) for index in batch.index.tolist()])
        found = {
            name.removeprefix(prefix): tensor[rows.to(tensor.device)]
            for name, tensor in self._stored.items()
            if name.startswith(prefix)
        }
        if not self._cached:
            again = MaskGradient(1, loss="metric") if self._method.loss == "matching" else self._method
            with torch.no_grad():
                found |= measure_references(again, self._scope, batch, self._means, self.shapes)
        return found
