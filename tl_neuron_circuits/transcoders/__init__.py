"""Transcoders and SAEs: training, fidelity, the front of sparsity against fidelity, and circuits from weights."""

from ._config import TrainingConfig as TrainingConfig
from ._connections import connections as connections
from ._contributions import contributions as contributions
from ._dashboard import feature_dashboard as feature_dashboard
from ._deembed import deembed as deembed
from ._deembed import logit_weights as logit_weights
from ._fidelity import fidelity as fidelity
from ._pareto import pareto as pareto
from ._pull_back import pull_back as pull_back
from ._trace_feature import trace_feature as trace_feature
from ._train import train as train
