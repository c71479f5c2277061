"""Transcoders and SAEs: training, fidelity, and the front of sparsity against fidelity."""

from ._config import TrainingConfig as TrainingConfig
from ._report import TrainingReport as TrainingReport
from ._train import train as train
