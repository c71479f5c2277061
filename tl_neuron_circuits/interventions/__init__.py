"""Interventions as TransformerLens hooks."""

from .._lazy import explain_old_names
from ._ablation import ablation_hooks as ablation_hooks
from ._direct_logit_effects import DirectLogitEffects as DirectLogitEffects
from ._direct_logit_effects import direct_logit_effects as direct_logit_effects
from ._steering import steering_hooks as steering_hooks
from ._steering_result import SteeringResult as SteeringResult
from ._steering_runs import interchange as interchange
from ._steering_runs import steer as steer
from ._steering_runs import sweep as sweep
from ._steering_sweep import SteeringSweep as SteeringSweep
from ._steering_values import node_values as node_values

explain_old_names(__name__)
