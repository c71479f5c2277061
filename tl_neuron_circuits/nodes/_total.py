"""Sums over batches, kept in float32 on each hook's device: memory does not grow with the number of prompts."""

import warnings
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from .._processes import Processes
from ..bases._dictionary_variance import VarianceSums
from ..bases._site import Basis
from . import _controls
from ._scores import NodeScores, site_labels
from ._setting import Gradients, Runs, Setting

_FIELD = {"node": "values", "error": "errors", "skip": "skips"}


class Total:
    """Running sums of every block of scores, by (hook, kind)."""

    def __init__(self, setting: Setting, seed: int) -> None:
        self._setting = setting
        self._sums: dict[tuple[str, str], Tensor] = {}
        self._generator = torch.Generator().manual_seed(seed)
        self._variance: dict[str, VarianceSums] = {}

    def add(self, runs: Runs, gradients: Gradients) -> None:
        """(a - a_base) * gradient, summed over the batch; the clean run minus the corrupt one in either direction."""
        sign = 1.0 if self._setting.direction == "noising" else -1.0
        for site in self._setting.sites:
            clean, base, gradient = runs.clean[site.hook], runs.base[site.hook], gradients[site.hook]
            delta = clean.nodes if base is None else clean.nodes - base.nodes
            self._add(site.hook, "node", sign * delta.float() * site.node_gradient(gradient).float())
            for kind, vector in clean.vectors.items():
                change = vector if base is None else vector - base.vectors[kind]
                product = change.float() * site.vector_gradient(gradient).float()
                self._add(site.hook, kind, sign * product.sum(-1))

    def merge(self, other: "Total") -> None:
        """Add another's sums, as if its batch had been added here."""
        for (hook, kind), block in other._sums.items():
            self._keep(hook, kind, block)
        self._keep_variance(other._variance)

    def reduce(self, processes: Processes) -> None:
        """Replace the sums by those over all processes."""
        self._sums = processes.total(self._sums)
        variances, self._variance = processes.gather(self._variance), {}
        for variance in variances:
            self._keep_variance(variance)

    def state(self) -> tuple[dict[str, Tensor], dict[str, Any]]:
        """The sums as tensors and notes, to be written."""
        tensors = {f"{kind}/{hook}": block for (hook, kind), block in self._sums.items()}
        tensors |= {f"mean/{hook}": sums.mean for hook, sums in self._variance.items()}
        notes = {hook: [sums.count, sums.variation, sums.error] for hook, sums in self._variance.items()}
        devices = {name: str(tensor.device) for name, tensor in tensors.items()}
        return tensors, {"variance": notes, "devices": devices}

    def restore(self, tensors: Mapping[str, Tensor], notes: Mapping[str, Any]) -> None:
        """Take up what `state` gave, each block on the device it came from."""
        for site in self._setting.sites:  # files forget the order, which is that of the nodes
            for kind in ("node", *site.vectors):
                name = f"{kind}/{site.hook}"
                if name in tensors:
                    self._sums[site.hook, kind] = tensors[name].to(notes["devices"][name])
        for hook, (count, variation, error) in notes["variance"].items():
            self._variance[hook] = VarianceSums(count, tensors[f"mean/{hook}"], variation, error)

    def add_variance(self, values: Mapping[str, Tensor]) -> None:
        """How much of the run's activations the nodes leave unexplained."""
        for site in self._setting.sites:
            sums = site.variance(values)
            if sums is not None:
                self._keep_variance({site.hook: sums})

    def unexplained(self) -> dict[str, float]:
        """Fraction of variance unexplained by hook point, on the prompts so far; nan where nothing varies.

        Above 0.9 a dictionary is probably attached at the wrong place, and a warning says so.
        """
        fractions = {h: s.unexplained if s.variation > 0 else float("nan") for h, s in self._variance.items()}
        wrong = {hook: round(fraction, 3) for hook, fraction in fractions.items() if fraction > 0.9}
        if wrong:
            message = (
                f"dictionaries leave more than 0.9 of the variance unexplained on these prompts: {wrong}. They are "
                f"probably "
                "attached at the wrong place or made for another model; name their hooks with "
                "as_dictionary(hook_in=...)."
            )
            warnings.warn(message, UserWarning, stacklevel=4)
        return fractions

    def add_differences(self, runs: Runs) -> None:
        """|a - a_base|, summed over the batch."""
        for site in self._setting.sites:
            nodes, vectors = _controls.difference(runs.clean[site.hook], runs.base[site.hook])
            self._add(site.hook, "node", nodes.float())
            for kind, vector in vectors.items():
                self._add(site.hook, kind, vector.float())

    def add_scores(self, scores: Mapping[tuple[str, str], Tensor]) -> None:
        """Blocks that are summed over the batch already."""
        for (hook, kind), block in scores.items():
            self._keep(hook, kind, block)

    def _add(self, hook: str, kind: str, per_prompt: Tensor) -> None:
        if kind == "node" and self._setting.units == "sum":
            per_prompt = per_prompt.sum(-1, keepdim=True)
        self._keep(hook, kind, per_prompt.sum((0, 1) if self._setting.positions == "sum" else 0))

    def _keep_variance(self, found: Mapping[str, VarianceSums]) -> None:
        for hook, sums in found.items():
            seen = self._variance.get(hook)
            self._variance[hook] = sums if seen is None else seen + sums

    def _keep(self, hook: str, kind: str, block: Tensor) -> None:
        seen = self._sums.get((hook, kind))
        self._sums[hook, kind] = block if seen is None else seen.add_(block)

    def scores(self, n_pairs: int, settings: Mapping[str, Any], basis: Basis | Sequence[Basis]) -> NodeScores:
        """The means over pairs; for `random`, noise of the same shapes."""
        blocks: dict[str, dict[str, Tensor]] = {field: {} for field in _FIELD.values()}
        for (hook, kind), block in self._sums.items():
            noise = self._setting.method == "random"
            score = _controls.noise(block, self._generator) if noise else block / n_pairs
            blocks[_FIELD[kind]][hook] = score.to(block.device)
        return NodeScores(**blocks, sites=site_labels(self._setting.sites), settings=settings, basis=basis)
