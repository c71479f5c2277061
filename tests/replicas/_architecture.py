"""What a transformer is made of, whichever library it came from."""

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
