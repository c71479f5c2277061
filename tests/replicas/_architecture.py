"""What a transformer is made of, whichever library it came from."""

from collections.abc import Collection
from dataclasses import dataclass, field

from torch import Tensor

ALL_RULES: tuple[str, ...] = ("ln", "identity", "half", "attention")
RULE_SETS: dict[str, tuple[str, ...]] = {
    "relp": ALL_RULES,
    "cp": ALL_RULES,
    "attnlrp": ("ln", "identity", "half", "split_attention"),
    "gim": ("ln", "half", "split_attention", "warm_softmax"),
}
"""The named sets, in the replicas' own switches."""

RULE_SETS: dict[str, tuple[str, ...]] = {
    "relp": ("ln", "identity", "half", "attention"),
    "cp": ("ln", "identity", "half", "attention"),
    "attnlrp": ("ln", "head_norms", "identity", "half", "halve_attention"),
    "gim": ("ln", "head_norms", "half", "halve_attention", "softmax_temperature"),
}
"""The named sets as switches of the forward pass. Three switches are no rules that a user can name:

- "head_norms": the scales of the norms of queries and keys are constants too. (Without it a query times its gradient
  sums to zero, as its scale is irrelevant, and none of what the half rule gives to queries would get through.)
- "halve_attention": the half rule on attention's two products, Q K^T and A V.
- "softmax_temperature": the softmax's backward pass is s (g - sum s g) with s = softmax(scores / 2).
"""


def switches_of(rules: str | Collection[str]) -> tuple[str, ...]:
    """Spell out a named set, or a single rule's name; a collection of names stays as it is."""
    switches = RULE_SETS.get(rules, (rules,)) if isinstance(rules, str) else tuple(rules)
    unknown = set(switches) - {name for named in RULE_SETS.values() for name in named}
    assert not unknown, f"unknown rules {unknown}"
    return switches


@dataclass(frozen=True)
class Architecture:
    """The settings of one transformer; anything per layer is a tuple."""

    n_layers: int
    n_heads: int
    n_kv_heads: int
    activation: str
    norm: str | None
    """"layer" (centered), "rms", or None."""
    eps: float
    score_scale: tuple[float, ...]
    """Attention scores are multiplied by it."""
    parallel: bool = False
    """Attention and MLP both read the block's input."""
    gated: bool = False
    post_norms: bool = False
    activation_norm: bool = False
    """A norm follows the activation (solu_ln)."""
    qk_norm: bool = False
    rotary_dim: int = 0
    rotary_base: tuple[float, ...] = ()
    rotary_adjacent: bool = False
    alibi: bool = False
    windows: tuple[int | None, ...] = ()
    """How far back each layer attends; None is without limit."""
    causal: bool = True
    score_cap: float | None = None
    logit_cap: float | None = None
    embedding_scale: float = 1.0
    embedding_norm: bool = False
    """A norm follows the token embedding (Bloom); `hook_embed` comes after it in both model classes."""


@dataclass(frozen=True)
class Replica:
    """Settings and weights. Names are HookedTransformer's; what an architecture lacks is missing.

    Matrices act from the right (`x @ W`), heads come first: W_Q [head, d_model, d_head], W_O [head, d_head, d_model].
    Gated MLPs: post = act(x @ W_gate + b_gate) * (x @ W_in + b_up) + b_in.
    """

    architecture: Architecture
    weights: dict[str, Tensor] = field(repr=False)
