"""Node scores and edges: how much every node supports a metric, and through what. One method a file."""

from ._attribute import attribute as attribute
from ._component_edges import EdgeMethod as EdgeMethod
from ._component_edges import EdgeScores as EdgeScores
from ._component_edges import component_edges as component_edges
from ._component_edges import metric_of_edges as metric_of_edges
from ._component_edges_graph import Component as Component
from ._component_edges_graph import ComponentGraph as ComponentGraph
from ._component_edges_graph import component_graph as component_graph
from ._component_edges_graph import split_heads as split_heads
from ._edges import DirectEffects as DirectEffects
from ._edges import direct_effects as direct_effects
from ._edges import mean_totals as mean_totals
from ._edges_slots import Slot as Slot
from ._edges_slots import slots_of as slots_of
from ._edges_totals import Totals as Totals
from ._goals import Goal as Goal
from ._goals import answer_goal as answer_goal
from ._goals import difference_goal as difference_goal
from ._goals import direction_goal as direction_goal
from ._goals import metric_goal as metric_goal
from ._goals import token_goal as token_goal
from ._gradients import run_gradients as run_gradients
from ._scores import NodeScores as NodeScores
from ._scores import SiteLabels as SiteLabels
from ._scores import label as label
from ._setting import MethodName as MethodName
