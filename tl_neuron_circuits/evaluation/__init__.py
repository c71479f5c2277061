"""How good a set of nodes is: faithfulness, completeness, their curves, and bases compared by them."""

from ._agreement import Agreement as Agreement
from ._agreement import agreement as agreement
from ._compare import DEFAULT_METHODS as DEFAULT_METHODS
from ._compare import compare as compare
from ._comparison import Comparison as Comparison
from ._comparison import CurveKey as CurveKey
from ._curve import MIB_FRACTIONS as MIB_FRACTIONS
from ._curve import SparsityCurve as SparsityCurve
from ._edge_curve import evaluate_edges as evaluate_edges
from ._evaluate import evaluate as evaluate
from ._ground_truth import GroundTruth as GroundTruth
from ._ground_truth import edge_auroc as edge_auroc
from ._ground_truth import edge_average_precision as edge_average_precision
from ._ground_truth import edge_precision_recall as edge_precision_recall
from ._ground_truth import judge_edges as judge_edges
from ._ground_truth import structural_hamming_distance as structural_hamming_distance
from ._ground_truth_readers import interpbench_ground_truth as interpbench_ground_truth
from ._ground_truth_readers import tracr_ground_truth as tracr_ground_truth
from ._node_sets import RankedNodes as RankedNodes
