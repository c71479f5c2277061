"""Transcoders and SAEs: training, fidelity, and the front of sparsity against fidelity."""

from ._config import TrainingConfig as TrainingConfig
from ._contributions import Contributions as Contributions
from ._contributions import contributions as contributions
from ._fidelity import Fidelity as Fidelity
from ._fidelity import fidelity as fidelity
from ._pareto import ParetoFront as ParetoFront
from ._pareto import pareto as pareto
from ._report import TrainingReport as TrainingReport
from ._train import train as train
from ._trace_feature import trace_feature as trace_feature
