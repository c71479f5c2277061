"""How good a set of nodes is: faithfulness, completeness, their curves, and bases compared by them."""

from .._lazy import explain_old_names
from ._compare import compare as compare
from ._compare_with_patching import compare_with_patching as compare_with_patching
from ._comparison import Comparison as Comparison
from ._curve import EdgeCurve as EdgeCurve
from ._curve import SparsityCurve as SparsityCurve
from ._edge_curve import evaluate_edges as evaluate_edges
from ._evaluate import evaluate as evaluate
from ._reliability import reliability as reliability
from ._reliability import screen as screen
from ._soft_masks import compare_soft_masks as compare_soft_masks
from ._stability import stability as stability

explain_old_names(__name__)
