"""How well a method's scores agree with exact patching, node by node."""

from dataclasses import dataclass

import pandas as pd

from .. import _html
from .._errors import SettingsError
from .._indices import as_count
from .._typing import checked
from ..nodes._scores import NodeScores


@dataclass(frozen=True)
class PatchingAgreement:
    """Agreement of two methods on the nodes that both have measured.

    Example:
        >>> import tl_neuron_circuits as tnc
        >>> model = tnc.load_demo_model()
        >>> pairs = tnc.tasks.subject_verb_agreement("simple", n=8)
        >>> scores = tnc.attribute(model, pairs)
        >>> exact = tnc.attribute(model, pairs, method=tnc.Patching(nodes=scores.top(10)))
        >>> agreement = tnc.compare_with_patching(scores, exact, top_k=5)
        >>> agreement.n_nodes, agreement.pearson > 0.5
        (10, True)
    """

    pearson: float
    spearman: float
    top_overlap: float
    """Share of the `top_k` largest |exact| scores among the `top_k` largest |scores|."""
    top_k: int
    n_nodes: int

    def to_dataframe(self) -> pd.DataFrame:
        """One row."""
        return pd.DataFrame([vars(self)])

    def _repr_html_(self) -> str:
        return _html.block(f"Agreement on {self.n_nodes:,} nodes", _html.table(self.to_dataframe()))


@checked
def compare_with_patching(scores: NodeScores, exact: NodeScores, *, top_k: int = 100) -> PatchingAgreement:
    """Compare `scores` with `exact` ones (`attribute(..., method="patching")`), on the nodes measured in both.

    Args:
        scores: of any method.
        exact: the reference; nodes that are nan there are left out.
        top_k: for the overlap; at most the number of nodes measured.

    Raises:
        SettingsError: the two do not have the same nodes, or fewer than three are measured.

    Example:
        >>> import tl_neuron_circuits as tnc
        >>> model, pairs = tnc.load_demo_model(), tnc.tasks.subject_verb_agreement("simple", n=4)
        >>> scores = tnc.attribute(model, pairs)
        >>> exact = tnc.attribute(model, pairs, method=tnc.Patching(nodes=scores.top(20)))
        >>> tnc.compare_with_patching(scores, exact).n_nodes
        20
    """
    shapes = [[(hook, kind, block.shape) for hook, kind, block in s.blocks()] for s in (scores, exact)]
    if shapes[0] != shapes[1]:
        raise SettingsError(
            "expected scores of the same nodes; these differ in basis, positions or prompt length. "
            "Attribute both with the same basis= and positions=, on the same pairs."
        )
    a, b = scores.flat().double(), exact.flat().double()
    both = ~(a.isnan() | b.isnan())
    a, b = a[both], b[both]
    if len(a) < 3:
        raise SettingsError(f"expected at least three nodes measured in both; got {len(a)}.")
    k = min(as_count(top_k, "top_k"), len(a))
    first, second = (set(x.abs().topk(k).indices.tolist()) for x in (a, b))
    frame = pd.DataFrame({"scores": a.numpy(), "exact": b.numpy()})
    rank = frame.rank()
    return PatchingAgreement(
        pearson=float(frame.corr().iloc[0, 1]),
        spearman=float(rank.corr().iloc[0, 1]),
        top_overlap=len(first & second) / k,
        top_k=k,
        n_nodes=len(a),
    )
