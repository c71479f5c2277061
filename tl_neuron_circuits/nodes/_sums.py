"""Scores summed over pairs: of one batch, of a process, of all processes."""

import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

from torch import Tensor

from .._processes import Processes
from ..bases._dictionary_variance import VarianceSums
from ..bases._site import Site
from ._scope import Blocks

ROWS = 8  # forward rows per prompt of `batch_size`, for patching


@dataclass
class Sums:
    """Sums over pairs so far, in float32 on each hook's device: memory does not grow with the number of prompts."""

    blocks: Blocks = field(default_factory=dict)
    variance: dict[str, VarianceSums] = field(default_factory=dict)
    """How much of each dictionary's site the nodes leave unexplained."""

    def add(self, other: "Sums") -> None:
        """Take over the sums over other pairs, one block after the other, so that only one is there twice."""
        for key in list(other.blocks):
            block = other.blocks.pop(key)
            self.blocks[key] = self.blocks[key].add_(block) if key in self.blocks else block
        for hook, sums in other.variance.items():
            self.variance[hook] = self.variance[hook] + sums if hook in self.variance else sums

    def over_processes(self, processes: Processes) -> "Sums":
        """The sums over all processes."""
        whole = Sums(processes.total(self.blocks))
        for variance in processes.gather(self.variance):
            whole.add(Sums({}, variance))
        return whole

    def variance_unexplained(self) -> dict[str, float]:
        """Fraction of variance unexplained by hook point; nan where nothing varies.

        Above 0.9 a dictionary is probably attached at the wrong place, and a warning says so.
        """
        fractions = {h: s.unexplained if s.variation > 0 else float("nan") for h, s in self.variance.items()}
        wrong = {hook: round(fraction, 3) for hook, fraction in fractions.items() if fraction > 0.9}
        if wrong:
            message = (
                f"dictionaries leave more than 0.9 of the variance unexplained on these prompts: {wrong}. They are "
                "probably attached at the wrong place or made for another model; name their hooks with "
                "as_dictionary(hook_in=...)."
            )
            warnings.warn(message, UserWarning, stacklevel=4)
        return fractions


def unexplained_sums(sites: Sequence[Site], values: Mapping[str, Tensor]) -> dict[str, VarianceSums]:
    """How much of each dictionary's site the nodes leave unexplained, on one batch."""
    sums = {site.hook: site.variance(values) for site in sites}
    return {hook: one for hook, one in sums.items() if one is not None}
