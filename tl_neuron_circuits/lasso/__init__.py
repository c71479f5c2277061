"""CircuitLasso: circuits by sparse regression of every component on those before it."""

from ._circuit_lasso import CircuitLasso as CircuitLasso
from ._groups import block_norms as block_norms
from ._groups import solve_group_lasso as solve_group_lasso
from ._labels import LabelSolution as LabelSolution
from ._labels import solve_labels as solve_labels
from ._lasso_circuit import LassoCircuit as LassoCircuit
from ._observations import Observations as Observations
from ._solver import LassoSolution as LassoSolution
from ._solver import explained as explained
from ._solver import largest_penalty as largest_penalty
from ._solver import lasso_path as lasso_path
from ._solver import solve_lasso as solve_lasso
from ._statistics import Accumulator as Accumulator
from ._statistics import Standardised as Standardised
from ._statistics import Statistics as Statistics
from ._statistics import standardise as standardise
from ._statistics import sum_of as sum_of
