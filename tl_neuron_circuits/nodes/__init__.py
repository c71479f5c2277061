"""Node scores: how much every node supports a metric. One method, one file."""

from ._activation_variance import activation_variance as activation_variance
from ._attribute import attribute as attribute
from ._attribute import estimate_memory as estimate_memory
from ._controls import ActivationDifference as ActivationDifference
from ._controls import Random as Random
from ._integrated_gradients import Conductance as Conductance
from ._integrated_gradients import IntegratedGradients as IntegratedGradients
from ._integrated_gradients import IntegratedGradientsInputs as IntegratedGradientsInputs
from ._learned_mask import LearnedMask as LearnedMask
from ._mask_gradient import MaskGradient as MaskGradient
from ._patching import Patching as Patching
from ._relp import Gradient as Gradient
from ._relp import RelP as RelP
from ._scores import NodeScores as NodeScores
