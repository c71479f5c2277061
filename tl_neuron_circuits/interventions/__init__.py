"""Interventions as TransformerLens hooks."""

from .._lazy import explain_old_names
from ._ablation import ablation_hooks as ablation_hooks
from ._direct_logit_effects import direct_logit_effects as direct_logit_effects
from ._steer import SteeringResult as SteeringResult
from ._steer import interchange as interchange
from ._steer import node_values as node_values
from ._steer import steer as steer
from ._steering import steering_hooks as steering_hooks
from ._sweep import sweep as sweep

explain_old_names(__name__)
