"""Interventions as TransformerLens hooks."""

from ._ablation import Ablation as Ablation
from ._ablation import AblationSwitch as AblationSwitch
from ._ablation import Hooks as Hooks
from ._ablation import Kept as Kept
from ._ablation import ablation_hooks as ablation_hooks
from ._edge_ablation import Edge as Edge
from ._edge_ablation import EdgeMode as EdgeMode
from ._edge_ablation import Neuron as Neuron
from ._edge_ablation import run_with_edges as run_with_edges
from ._steering import steering_hooks as steering_hooks
from ._steering_nodes import Nodes as Nodes
from ._steering_nodes import find_nodes as find_nodes
from ._steering_prompts import Prompts as Prompts
from ._steering_prompts import read_prompts as read_prompts
from ._steering_prompts import run as run
from ._steering_prompts import text_pieces as text_pieces
from ._steering_prompts import token_names as token_names
from ._steering_result import SteeringResult as SteeringResult
from ._steering_runs import steer as steer
from ._steering_runs import sweep as sweep
from ._steering_runs import interchange as interchange
from ._steering_sweep import SteeringSweep as SteeringSweep
from ._steering_values import node_values as node_values
