"""The methods of `attribute` by name."""

from typing import Literal

from .._options import parse_options
from ._controls import ActivationDifference, Random
from ._integrated_gradients import Conductance, IntegratedGradients, IntegratedGradientsInputs
from ._learned_mask import LearnedMask
from ._mask_gradient import MaskGradient
from ._method import Method
from ._patching import Patching
from ._relp import Gradient, RelP

MethodName = Literal[
    "relp",
    "gradient",
    "integrated_gradients",
    "integrated_gradients_inputs",
    "conductance",
    "patching",
    "learned_mask",
    "mask_gradient",
    "activation_difference",
    "random",
]
METHODS: dict[str, type[Method]] = {
    method.name: method
    for method in (
        *(RelP, Gradient, IntegratedGradients, IntegratedGradientsInputs, Conductance, Patching),
        *(LearnedMask, MaskGradient, ActivationDifference, Random),
    )
}


def as_method(method: str | Method) -> Method:
    """The method itself, or the one that a name or a label stands for.

    Raises:
        SettingsError: an unknown name or option.
    """
    return parse_method(method) if isinstance(method, str) else method


def parse_method(text: str) -> Method:
    """What a method's label says: `integrated_gradients(steps=20, rules=ln+half)`.

    Raises:
        SettingsError: the name or an option is unknown, or the text has another form.
    """
    return parse_options(text, METHODS, what="a method", unwritten=("nodes", "development"))
