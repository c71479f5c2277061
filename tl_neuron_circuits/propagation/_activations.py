"""Activation functions f and their exact ratios f(x) / x, the coefficient of the identity rule.

Written as f(x) / x the ratio loses all digits near zero; every function here is x times a known factor, so the factor
itself is used: Phi(x) for GELU, sigmoid(x) for SiLU, the step for ReLU, softmax(x) for SoLU.
"""

import functools
import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, cast

import torch
from torch import Tensor
from torch.nn import functional

from .._errors import UnsupportedModelError
from .._memory import is_out_of_memory
from ..models._protocol import TransformerLensModel, submodule
from ..models._sites import activation_names

Elementwise = Callable[[Tensor], Tensor]
_CALLABLE_FIELDS = ("act_fn", "activation_fn", "act", "activation_function", "act_func", "gelu_impl", "activation")


@dataclass(frozen=True)
class Activation:
    """An activation function and its ratio.

    `function` is None where it was not found on the model, `exact_ratio` where no closed form is known.
    """

    name: str
    function: Elementwise | None
    exact_ratio: Elementwise | None

    @staticmethod
    def named(name: str) -> "Activation":
        """A known activation, by the name that configurations give it."""
        return _BY_NAME[name]

    def value(self, x: Tensor) -> Tensor:
        """f(x).

        Raises:
            UnsupportedModelError: the function itself was not found on the model.
        """
        if self.function is None:
            raise UnsupportedModelError(
                f"the MLP's activation function {self.name!r} was found neither by name nor on the module, so its "
                "rule cannot be taken. Leave 'identity' and 'half' out of the rules."
            )
        return self.function(x)

    def ratio(self, x: Tensor) -> Tensor:
        """f(x) / x: exact where a closed form is known, else the quotient, and 0 at x = 0."""
        if self.exact_ratio is not None:
            return self.exact_ratio(x)
        return torch.where(x == 0, torch.zeros_like(x), self.value(x) / x)

    def slope(self, x: Tensor) -> Tensor:
        """f'(x), of a function of each neuron alone. Asked for amid a forward pass: its graph is no checkpoint's."""
        with torch.enable_grad(), torch.autograd.graph.saved_tensors_hooks(_as_it_is, _as_it_is):
            leaf = x.detach().requires_grad_(True)
            (slope,) = torch.autograd.grad(self.value(leaf).sum(), leaf)
        return slope


def _as_it_is(x: Tensor) -> Tensor:
    return x


def _tanh_ratio(x: Tensor) -> Tensor:
    """(1 + tanh(u)) / 2 as sigmoid(2 u), u = sqrt(2 / pi) * (x + 0.044715 x^3): one buffer, a sixth of tanh's time."""
    slope = 2 * math.sqrt(2 / math.pi)
    return (x * x).mul_(0.044715 * slope).add_(slope).mul_(x).sigmoid_()


def _gelu_ratio(x: Tensor) -> Tensor:
    """Phi(x) as erfc(-x / sqrt 2) / 2, exact in the lower tail too and faster than ndtr."""
    return (x * -math.sqrt(0.5)).erfc_().mul_(0.5)


def _gelu_tanh(x: Tensor) -> Tensor:
    return functional.gelu(x, approximate="tanh")


def _quick_gelu(x: Tensor) -> Tensor:
    return x * torch.sigmoid(1.702 * x)


def _solu(x: Tensor) -> Tensor:
    return x * torch.softmax(x, dim=-1)


KNOWN = (
    Activation("gelu", functional.gelu, _gelu_ratio),
    Activation("gelu_tanh", _gelu_tanh, _tanh_ratio),
    Activation("silu", functional.silu, torch.sigmoid),
    Activation("relu", functional.relu, lambda x: (x > 0).to(x.dtype)),
    Activation("quick_gelu", _quick_gelu, lambda x: torch.sigmoid(1.702 * x)),
    Activation("solu", _solu, lambda x: torch.softmax(x, dim=-1)),
)
_BY_NAME = {activation.name: activation for activation in KNOWN} | {
    "gelu_new": KNOWN[1],
    "gelu_fast": KNOWN[1],
    "gelu_pytorch_tanh": KNOWN[1],
    "swish": KNOWN[2],
    "solu_ln": KNOWN[5],
}


@functools.cache
def _on_grid() -> tuple[Tensor, list[Tensor]]:
    """Where activations are told apart, and the known ones' values there; both are only read."""
    grid = torch.linspace(-6, 6, 97, dtype=torch.float32)
    with torch.inference_mode(False), torch.no_grad():
        return grid, [activation.value(grid) for activation in KNOWN]


def find_activation(model: TransformerLensModel, layer: int) -> Activation:
    """The activation of one MLP: recognized by its values on a grid, else by its name, else as a function.

    `HookedTransformer` keeps the function on the MLP, `TransformerBridge` on the wrapped Hugging Face module.
    """
    function = _find_callable(model, layer)
    names = activation_names(model)
    if function is None:
        return next((_BY_NAME[name] for name in names if name in _BY_NAME), Activation("unknown", None, None))
    unrecognized = Activation(names[0] if names else "unknown", function, None)
    grid, known_values = _on_grid()
    with torch.no_grad():
        try:
            values = function(grid)
        except (RuntimeError, TypeError, ValueError) as error:  # a function with buffers of another dtype or device
            if is_out_of_memory(error):
                raise
            return unrecognized
    for known, expected in zip(KNOWN, known_values, strict=True):
        if values.shape == grid.shape and torch.allclose(values.float(), expected, atol=2e-5):
            return Activation(known.name, function, known.exact_ratio)
    return unrecognized


def _find_callable(model: TransformerLensModel, layer: int) -> Elementwise | None:
    mlp: Any = submodule(model, f"blocks.{layer}.mlp")
    owners = (mlp, getattr(mlp, "original_component", None))
    for owner in owners:
        for field in _CALLABLE_FIELDS:
            function = getattr(owner, field, None)
            if callable(function):
                return cast(Elementwise, function)
    return None
