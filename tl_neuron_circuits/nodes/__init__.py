"""Node scores: how much every node supports a metric. One method, one file."""

from ._activation_variance import activation_variance as activation_variance
from ._attribute import attribute as attribute
from ._memory import MemoryEstimate as MemoryEstimate
from ._memory import estimate_memory as estimate_memory
from ._scores import NodeScores as NodeScores
