"""Node scores: how much every node of a basis supports a metric. One method a file."""

from ._attribute import attribute as attribute
from ._gradients import run_gradients as run_gradients
from ._scores import NodeScores as NodeScores
from ._scores import label as label
from ._setting import MethodName as MethodName
