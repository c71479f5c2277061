"""How good a set of nodes is: faithfulness, completeness, their curves, and bases compared by them."""

from ._agreement import Agreement as Agreement
from ._agreement import agreement as agreement
from ._compare import compare as compare
from ._comparison import Comparison as Comparison
from ._comparison import CurveKey as CurveKey
from ._curve import MIB_FRACTIONS as MIB_FRACTIONS
from ._curve import SparsityCurve as SparsityCurve
from ._edge_curve import evaluate_edges as evaluate_edges
from ._evaluate import evaluate as evaluate
from ._node_sets import RankedNodes as RankedNodes
