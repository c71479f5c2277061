"""Edges between heads and MLPs (EAP, EAP-IG, RelP, ACDC, exact patching), and ground truth to judge them by."""

from ._acdc import ACDC as ACDC
from ._component_edges import EdgeScores as EdgeScores
from ._component_edges import component_edges as component_edges
from ._component_edges import metric_of_edges as metric_of_edges
from ._eap import EAP as EAP
from ._eap import EAPIGInputs as EAPIGInputs
from ._eap import RelP as RelP
from ._graph import component_graph as component_graph
from ._ground_truth import GroundTruth as GroundTruth
from ._ground_truth import judge_edges as judge_edges
from ._learned_mask import LearnedMask as LearnedMask
from ._method import Random as Random
from ._patching import Patching as Patching
