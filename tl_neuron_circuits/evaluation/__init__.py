"""How good a set of nodes is: faithfulness, completeness and their curves."""

from ._curve import MIB_FRACTIONS as MIB_FRACTIONS
from ._curve import SparsityCurve as SparsityCurve
from ._evaluate import evaluate as evaluate
from ._node_sets import RankedNodes as RankedNodes
