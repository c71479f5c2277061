"""Node scores: how much every node of a basis supports a metric. One method a file."""

from ._attribute import attribute as attribute
from ._component_edges import EdgeMethod as EdgeMethod
from ._component_edges import EdgeScores as EdgeScores
from ._component_edges import component_edges as component_edges
from ._component_edges import metric_of_edges as metric_of_edges
from ._component_edges_graph import Component as Component
from ._component_edges_graph import ComponentGraph as ComponentGraph
from ._component_edges_graph import component_graph as component_graph
from ._component_edges_graph import split_heads as split_heads
from ._gradients import run_gradients as run_gradients
from ._scores import NodeScores as NodeScores
from ._scores import label as label
from ._setting import MethodName as MethodName
