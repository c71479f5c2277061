"""What the methods of `component_edges` are asked, and what they answer."""

import abc
from collections.abc import Iterator
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from .._options import Options
from .._progress import progress
from ..models._protocol import TransformerLensModel
from ..tasks._metrics import Metric
from ..tasks._tokenized import Batch, TokenizedPairs
from ._graph import ComponentGraph


@dataclass(frozen=True)
class EdgeQuestion:
    """Which edges, on which pairs, for which metric."""

    model: TransformerLensModel
    graph: ComponentGraph
    tokens: TokenizedPairs
    metric: Metric
    batch_size: int
    verbose: bool | None
    split_qkv: bool = False

    def batches(self, label: str) -> Iterator[Batch]:
        """The pairs, batch by batch, under a progress bar."""
        with progress(total=len(self.tokens), desc=label, verbose=self.verbose, unit="pair") as bar:
            for batch in self.tokens.batches(self.batch_size):
                yield batch
                bar.update(len(batch))


@dataclass(frozen=True)
class EdgeSums:
    """Scores `[source, target]` summed over pairs; `kept` is the circuit of a method that chooses one."""

    scores: Tensor
    kept: Tensor | None = None
    qkv: Tensor | None = None
    """`[3, source, target]`: the scores of heads by what reads the source, q, k or v."""


@dataclass(frozen=True)
class EdgeMethod(Options, abc.ABC):
    """One way to score edges between components."""

    @abc.abstractmethod
    def score(self, question: EdgeQuestion) -> EdgeSums:
        """The scores of every edge."""


@dataclass(frozen=True)
class Random(EdgeMethod):
    """Noise: what any ranking must beat.

    Example:
        >>> import tl_neuron_circuits as tnc
        >>> tnc.components.Random(seed=1).label
        'random(seed=1)'
    """

    name: ClassVar[str] = "random"
    seed: int = 0

    def score(self, question: EdgeQuestion) -> EdgeSums:
        """Independent N(0, 1)."""
        n = len(question.graph)
        noise = torch.randn(n, n, generator=torch.Generator().manual_seed(self.seed))
        return EdgeSums(noise * len(question.tokens))
