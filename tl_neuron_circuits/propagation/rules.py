"""Relevance propagation rules, with their formulas, and the named sets that are made of them.

A rule says which factors of a piece of a transformer count as constants. They are computed once, in the forward pass;
backward, the gradient g at the piece's output is passed to its inputs with them, out of place, so that many gradients
through one forward pass, or a batch of them (`is_grads_batched`), cost little. Forward values never change. Linear maps
need no rule: they keep the plain gradient.

    set        norm            activation   gated product   attention                                     conserves
    "relp"     scale frozen    identity     half            pattern frozen: nothing to queries and keys   yes
    "cp"       scale frozen    identity     half            the same                                      yes
    "attnlrp"  scale frozen    identity     half            1/4 each to queries and keys, 1/2 to values   no
    "gim"      scale frozen    plain        half            as attnlrp, softmax at temperature 2          no

Frozen, or sg (stop-gradient): a factor that counts as a constant in the backward pass. "Conserves": with these rules,
activation times gradient, summed over any cut of the network and the biases after it, equals the metric, if the metric
is linear in the logits (before any soft cap). That follows where every piece passes on what it gets: x * gradient(x),
summed over its inputs, equals y * g, summed over its outputs, minus the share of a bias. It holds for what is linear
once its constants are frozen (norm, activation, attention) and for a halved product. It does not hold for the plain
gradient of a softmax, nor of an activation where x * f'(x) is not f(x).
RelP and CP-LRP are the same on these pieces. The LXT package's CP-LRP differs on gated MLPs: it cuts the gate and gives
everything to the linear branch.

Sources: Ali et al. 2022, arXiv 2202.07304 (CP-LRP: norms, attention); Arras et al. 2019, arXiv 1909.12114 (half rule);
Rezaei Jafari et al. 2025, arXiv 2508.21258 (RelP); Arora et al. 2026, arXiv 2601.22594 (RelP for neurons, the attention
pattern frozen); Achtibat et al. 2024, arXiv 2402.05602 (AttnLRP); arXiv 2505.17630 (GIM); METHODS 1.1, 5.9.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from jaxtyping import Float
from torch import Tensor

from .._errors import SettingsError
from ._activations import Activation
from ._norms import Norm


@dataclass(frozen=True)
class LnRule:
    """A norm's scale is frozen: y = weight * (x - mean(x)) / sg(scale) + bias; RMSNorm does not subtract the mean.

    The plain gradient is nearly orthogonal to x (a norm does not see the length of x), so x * gradient(x) would sum to
    about zero, and no relevance would pass.

    Example:
        >>> from tl_neuron_circuits.propagation.rules import RULE_SETS
        >>> RULE_SETS["relp"].ln
        LnRule()
    """

    def gradients(self, g: Float[Tensor, "*batch d"], scale: Float[Tensor, "*pos 1"], norm: Norm) -> Tensor:
        """From the gradient at the norm's output to that at its input, in the precision the norm computes in."""
        inner = g.to(scale.dtype) * norm.weight.to(scale.dtype) / scale
        return inner - inner.mean(-1, keepdim=True) if norm.centered else inner


@dataclass(frozen=True)
class IdentityRule:
    """An activation is its input times a frozen ratio, f(x) = x * sg(f(x) / x): its relevance passes unchanged.

    The ratio is exact, from closed forms such as Phi(x) for GELU. `stabilizer` gives f(x) / (x + sign(x) * stabilizer)
    instead, and 0 at x = 0, as RelP's authors do in their fork of TransformerLens; near zero that loses relevance
    (gradients up to 7e-3 off, measured).

    Example:
        >>> from tl_neuron_circuits.propagation.rules import IdentityRule
        >>> IdentityRule(stabilizer=1e-6)
        IdentityRule(stabilizer=1e-06)
    """

    stabilizer: float | None = None

    def apply(
        self, x: Float[Tensor, "*pos d_mlp"], activation: Activation
    ) -> tuple[Float[Tensor, "*pos d_mlp"], Float[Tensor, "*pos d_mlp"]]:
        """x times the ratio (without a stabilizer f(x), which is compared with what the model computed); the ratio."""
        if self.stabilizer is None:
            ratio = activation.ratio(x)
        else:
            quotient = activation.value(x) / (x + x.sign() * self.stabilizer)
            ratio = torch.where(x == 0, torch.zeros_like(x), quotient)
        return ratio * x, ratio


@dataclass(frozen=True)
class PlainActivation:
    """No rule: g * f'(x). For a gated product whose activation has no rule, as in GIM."""

    def apply(
        self, x: Float[Tensor, "*pos d_mlp"], activation: Activation
    ) -> tuple[Float[Tensor, "*pos d_mlp"], Float[Tensor, "*pos d_mlp"]]:
        """f(x); f'(x)."""
        return activation.value(x), activation.slope(x)


@dataclass(frozen=True)
class HalfRule:
    """Each factor of a gated MLP's product a * b gets half of its relevance; plain gradients count it twice.

    Source: Arras et al. 2019, arXiv 1909.12114.

    Example:
        >>> import torch
        >>> from tl_neuron_circuits.propagation.rules import HalfRule
        >>> HalfRule().factors(torch.tensor([2.0]), torch.tensor([6.0]))
        (tensor([3.]), tensor([1.]))
    """

    def factors(self, a: Float[Tensor, "*pos d_mlp"], b: Float[Tensor, "*pos d_mlp"]) -> tuple[Tensor, Tensor]:
        """g * b / 2 to a, g * a / 2 to b: what g is multiplied by."""
        return b / 2, a / 2


@dataclass(frozen=True)
class PlainProduct:
    """No rule: g * b to a, g * a to b. With the identity rule but not the half rule, relevance is counted twice."""

    def factors(self, a: Float[Tensor, "*pos d_mlp"], b: Float[Tensor, "*pos d_mlp"]) -> tuple[Tensor, Tensor]:
        """What g is multiplied by."""
        return b, a


@dataclass(frozen=True)
class AttentionRule:
    """The attention pattern is frozen: queries and keys get nothing, values their plain gradient.

    Its fields are factors, by which the gradients at `hook_q`, `hook_k` and `hook_v` are multiplied. A `temperature`
    other than 1 puts a `SoftmaxRule` in place of the softmax's gradient.

    Example:
        >>> from tl_neuron_circuits.propagation.rules import AttentionRule
        >>> rule = AttentionRule()
        >>> rule.query, rule.key, rule.value
        (0.0, 0.0, 1.0)
    """

    query: float = 0.0
    key: float = 0.0
    value: float = 1.0
    temperature: float = 1.0
    """The softmax's temperature in the backward pass."""


@dataclass(frozen=True)
class SplitAttentionRule(AttentionRule):
    """Each product in attention is halved: 1/2 to values, 1/2 to the pattern, which queries and keys share (1/4 each).

    The softmax, and a soft cap before it, keep their plain gradients. With `LnRule` the norms that some models put on
    queries and keys are frozen too. Source: Achtibat et al. 2024.

    Example:
        >>> from tl_neuron_circuits.propagation.rules import SplitAttentionRule
        >>> SplitAttentionRule().value
        0.5
    """

    query: float = 1 / 4
    key: float = 1 / 4
    value: float = 1 / 2


@dataclass(frozen=True)
class SoftmaxRule:
    """The softmax goes backward as if its scores had been divided by a temperature (without the factor 1 / T).

    A saturated softmax has almost no gradient; a warmer one lets some reach the scores. Source: arXiv 2505.17630 (GIM).
    """

    temperature: float

    def gradients(self, g: Float[Tensor, "*batch key"], scores: Float[Tensor, "*pos key"]) -> Tensor:
        """p * (g - sum(g * p)) with p = softmax(scores / temperature), 0 where a row attends to nothing."""
        p = masked_softmax(scores / self.temperature)
        return p * (g - (g * p).sum(-1, keepdim=True))


def masked_softmax(scores: Float[Tensor, "*pos key"]) -> Float[Tensor, "*pos key"]:
    """The softmax in at least float32, as models compute it; rows masked throughout (padding) give 0, not NaN."""
    wide = scores.float() if scores.dtype in (torch.float16, torch.bfloat16) else scores
    return torch.softmax(wide, dim=-1).masked_fill((wide == -torch.inf).all(-1, keepdim=True), 0)


# --- pieces of a model: what one rule, or two in a row, apply to ---
# `freeze` gives the forward value, computed again to check the model's, and the constants; `gradients` what a gradient
# at the output becomes with them.


@dataclass(frozen=True)
class NormPiece:
    """A norm, from its input to its output."""

    rule: LnRule
    norm: Norm

    @property
    def bias(self) -> Tensor | None:
        """Added at the end; its gradient is the plain one."""
        return self.norm.bias

    def freeze(self, x: Tensor) -> tuple[Tensor, tuple[Tensor]]:
        """The norm's output, and its scale."""
        output, scale = self.norm.value_and_scale(x)
        return output, (scale,)

    def gradients(self, g: Tensor, scale: Tensor) -> tuple[Tensor]:
        """The gradient at its input."""
        return (self.rule.gradients(g, scale, self.norm),)


@dataclass(frozen=True)
class ActivationPiece:
    """The activation of an MLP without a gate, from `hook_pre` to `hook_post` (to `hook_mid` if a norm follows).

    Without the identity rule there is no such piece: autograd has the plain gradient already.
    """

    rule: IdentityRule
    activation: Activation
    bias: None = None

    def freeze(self, pre: Tensor) -> tuple[Tensor, tuple[Tensor]]:
        """f(pre), and f(pre) / pre."""
        activated, ratio = self.rule.apply(pre, self.activation)
        return activated, (ratio,)

    def gradients(self, g: Tensor, ratio: Tensor) -> tuple[Tensor]:
        """The gradient at `hook_pre`."""
        return (g * ratio,)


@dataclass(frozen=True)
class GatedPiece:
    """f(gate) * up + bias, from `hook_pre` and `hook_pre_linear` to `hook_post`: two rules in a row."""

    gate_rule: IdentityRule | PlainActivation
    product_rule: HalfRule | PlainProduct
    activation: Activation
    bias: Tensor | None

    def freeze(self, gate: Tensor, up: Tensor) -> tuple[Tensor, tuple[Tensor, Tensor]]:
        """f(gate) * up + bias, and what a gradient there is multiplied by on its way to the gate and to `up`."""
        activated, ratio = self.gate_rule.apply(gate, self.activation)
        to_activated, to_up = self.product_rule.factors(activated, up)
        product = activated * up
        return product if self.bias is None else product + self.bias, (ratio * to_activated, to_up)

    def gradients(self, g: Tensor, to_gate: Tensor, to_up: Tensor) -> tuple[Tensor, Tensor]:
        """The gradients at the gate and at the linear branch."""
        return g * to_gate, g * to_up


@dataclass(frozen=True)
class SoftmaxPiece:
    """The softmax of attention, from `hook_attn_scores` (masked) to `hook_pattern`."""

    rule: SoftmaxRule
    bias: None = None

    def freeze(self, scores: Tensor) -> tuple[Tensor, tuple[Tensor]]:
        """The pattern, and the scores: the warmer pattern is computed from them when it is needed."""
        return masked_softmax(scores), (scores,)

    def gradients(self, g: Tensor, scores: Tensor) -> tuple[Tensor]:
        """The gradient at the scores."""
        return (self.rule.gradients(g, scores),)


Piece = NormPiece | ActivationPiece | GatedPiece | SoftmaxPiece

# --- named sets ---


@dataclass(frozen=True)
class RuleSet:
    """One rule, or None for the plain gradient, for each kind of piece.

    Example:
        >>> from tl_neuron_circuits.propagation.rules import RULE_SETS
        >>> RULE_SETS["relp"].half
        HalfRule()
        >>> RULE_SETS["gim"].identity is None
        True
    """

    ln: LnRule | None = None
    identity: IdentityRule | None = None
    half: HalfRule | None = None
    attention: AttentionRule | None = None

    @property
    def needs(self) -> tuple[str, ...]:
        """What a model must have for this set, in the words of `find_sites`' problems."""
        names = [name for name in RULES if getattr(self, name) is not None]
        if self.attention is not None:
            names += ["values"] if self.attention.value != 1 else []
            names += ["scores"] if self.attention.temperature != 1 else []
        return tuple(names)


RULES = {"ln": LnRule(), "identity": IdentityRule(), "half": HalfRule(), "attention": AttentionRule()}
ALL_RULES = tuple(RULES)
RULE_SETS = {
    "relp": RuleSet(LnRule(), IdentityRule(), HalfRule(), AttentionRule()),
    "cp": RuleSet(LnRule(), IdentityRule(), HalfRule(), AttentionRule()),  # the same rules, under their older name
    "attnlrp": RuleSet(LnRule(), IdentityRule(), HalfRule(), SplitAttentionRule()),
    "gim": RuleSet(LnRule(), None, HalfRule(), SplitAttentionRule(temperature=2.0)),
}


def rule_set(rules: str | Sequence[str], stabilizer: float | None = None) -> RuleSet:
    """A named set, or a set of rules by their names ("ln", or ("ln", "half")); an empty tuple is the plain gradient.

    Raises:
        SettingsError: an unknown name, or a stabilizer out of range.
    """
    if isinstance(rules, str):
        if rules not in RULE_SETS and rules not in RULES:
            raise SettingsError(
                f"expected rules to be one of the sets {list(RULE_SETS)}, or one or a tuple of {list(RULES)}; got "
                f"{rules!r}."
            )
        chosen = RULE_SETS[rules] if rules in RULE_SETS else RuleSet(**{rules: RULES[rules]})
    else:
        unknown = [name for name in rules if name not in RULES]
        if unknown:
            raise SettingsError(
                f"expected rules out of {list(RULES)}, or the name of a set out of {list(RULE_SETS)}; got {unknown}. "
                "An empty tuple is the plain gradient."
            )
        chosen = RuleSet(**{name: RULES[name] for name in rules})
    if stabilizer is None:
        return chosen
    if not 0 < stabilizer < 1:
        raise SettingsError(f"expected a stabilizer between 0 and 1, such as 1e-6, or None; got {stabilizer}.")
    return replace(chosen, identity=IdentityRule(stabilizer)) if chosen.identity else chosen
