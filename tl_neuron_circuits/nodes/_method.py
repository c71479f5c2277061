"""What the methods of `attribute` have in common."""

import abc
import dataclasses
from typing import ClassVar, Literal

import torch
from torch import Tensor

from .._errors import SettingsError
from .._options import Options
from ..bases._runs import Values
from ..tasks._tokenized import Batch
from ._scope import Blocks, Means, Scope


@dataclasses.dataclass(frozen=True)
class Method(Options, abc.ABC):
    """One way to score nodes."""

    ranking: ClassVar[Literal["abs", "signed"]] = "abs"
    """How its scores rank nodes: by |score|, or by score where a low one means "last", as a learned order has it."""

    @abc.abstractmethod
    def score(
        self, scope: Scope, batch: Batch, means: Means | None, *, rows: int, verbose: bool | None
    ) -> tuple[Values, Blocks]:
        """The values of the first run at every site, and the scores of every node, summed over the batch.

        Args:
            scope: sites, metric and conventions.
            batch: prompts of one length.
            means: of every node, for baseline="mean". `scope.baseline_parts` gives what nodes are compared with; with
                a gradient it is asked for afterwards, so that it is not held beside the graph.
            rows: forward rows at once, for methods that need many.
            verbose: show progress inside the batch.
        """

    def check(self, scope: Scope) -> None:
        """Raise for a question that the method does not answer.

        Raises:
            SettingsError: with the way out.
        """

    def finish(self, sums: Blocks, n_pairs: int) -> Blocks:
        """From sums over all pairs to scores."""
        return {key: block / n_pairs for key, block in sums.items()}

    @property
    def measures_all(self) -> bool:
        """Whether every node gets a score."""
        return True

    def no_denoising(self, scope: Scope) -> None:
        """Raise for a direction that paths between two runs do not have.

        Raises:
            SettingsError: the direction is "denoising".
        """
        if scope.direction == "denoising":
            raise SettingsError(
                f"direction='denoising' needs one of the methods relp, gradient, patching; got {self.label!r}."
            )


def noise(like: Tensor, generator: torch.Generator) -> Tensor:
    """N(0, 1) in float32, drawn on the CPU so that every device gets the same."""
    return torch.randn(like.shape, generator=generator, dtype=torch.float32).to(like.device)
