"""The rules of relevance propagation, one small object each.

Each rule says how the gradient passes one kind of operation; forward values never change. With all four, relevance is
conserved: the gradient times the activation, summed over any cut of the network, biases included, gives the metric's
logits. For linear maps the 0-rule is the plain gradient, so it needs no object.
Sources: Ali et al. 2022 (ln); Rezaei Jafari et al. 2025, arXiv 2508.21258 (RelP); Arora et al. 2026, arXiv 2601.22594.
"""

from dataclasses import dataclass

from jaxtyping import Float
from torch import Tensor

from .._errors import SettingsError
from ._activations import Activation


@dataclass(frozen=True)
class LnRule:
    """Treat a norm's denominator as a constant: y = w * center(x) / sg(scale) + b. Ali et al. 2022.

    Example:
        >>> import torch
        >>> from tl_neuron_circuits.propagation import LnRule
        >>> gradient, scale = torch.tensor([[1.0, 3.0]]), torch.tensor([[2.0]])
        >>> LnRule().gradient(gradient, torch.ones(2), scale, centered=True)
        tensor([[-0.5000,  0.5000]])
    """

    name = "ln"

    def gradient(
        self,
        gradient: Float[Tensor, "*batch d"],
        weight: Float[Tensor, "#d"],
        scale: Float[Tensor, "*batch 1"],
        centered: bool,
    ) -> Float[Tensor, "*batch d"]:
        """From the gradient at the norm's output to the gradient at its input."""
        inner = (gradient * weight).div_(scale)
        return inner.sub_(inner.mean(-1, keepdim=True)) if centered else inner


@dataclass(frozen=True)
class IdentityRule:
    """Treat an activation as x times the constant f(x) / x. Rezaei Jafari et al. 2025.

    Example:
        >>> from tl_neuron_circuits.propagation import RULES, IdentityRule
        >>> RULES["identity"] == IdentityRule()
        True
    """

    name = "identity"

    def ratio(
        self,
        activation: Activation,
        pre: Float[Tensor, "*batch d_mlp"],
        activated: Float[Tensor, "*batch d_mlp"] | None,
        stabilizer: float | None,
    ) -> Float[Tensor, "*batch d_mlp"]:
        """The constant: exact closed forms; with `stabilizer` f(x) / (x + sign(x) * stabilizer), as the fork has it."""
        return activation.ratio_at(pre, activated, stabilizer)


@dataclass(frozen=True)
class HalfRule:
    """Share the gradient of a product equally: d(a * b) -> b / 2 to a, a / 2 to b. Arras et al. 2019.

    Example:
        >>> from tl_neuron_circuits.propagation import HalfRule
        >>> HalfRule().share
        0.5
    """

    name = "half"
    share = 0.5


@dataclass(frozen=True)
class AttentionRule:
    """Treat the attention pattern as a constant, by cutting queries and keys from the graph. Arora et al. 2026.

    Example:
        >>> import torch
        >>> from tl_neuron_circuits.propagation import AttentionRule
        >>> AttentionRule().cut(torch.ones(2, requires_grad=True)).requires_grad
        False
    """

    name = "attention"

    def cut(self, value: Float[Tensor, "*batch d_head"]) -> Float[Tensor, "*batch d_head"]:
        """The same value, without a gradient."""
        return value.detach()


Rule = LnRule | IdentityRule | HalfRule | AttentionRule
RULES: dict[str, Rule] = {rule.name: rule for rule in (LnRule(), IdentityRule(), HalfRule(), AttentionRule())}
ALL_RULES = tuple(RULES)


def check_rules(rules: tuple[str, ...]) -> tuple[str, ...]:
    """The rules' names, each once.

    Raises:
        SettingsError: a name is not a rule.
    """
    unknown = [name for name in rules if name not in RULES]
    if unknown:
        raise SettingsError(f"expected rules out of {ALL_RULES}; got {unknown}. An empty tuple is the plain gradient.")
    return tuple(dict.fromkeys(rules))
