"""Interventions as TransformerLens hooks."""

from ._ablation import Ablation as Ablation
from ._ablation import Hooks as Hooks
from ._ablation import Kept as Kept
from ._ablation import ablation_hooks as ablation_hooks
