"""The forward pass, written out; a rule changes only what autograd sees."""

import math
from collections.abc import Callable, Collection
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor

from tests.replicas._architecture import Architecture, Replica

Record = Callable[[str, Tensor], Tensor]


def forward(
    replica: Replica, tokens: Int[Tensor, "batch pos"], rules: Collection[str], record: Record
) -> Float[Tensor, "batch pos d_vocab"]:
    """Compute the logits; `record(name, value)` sees each value that has a hook and returns what is used from there."""
    arch, w = replica.architecture, replica.weights
    embedding = record("token_embedding", w["W_E"][tokens] * arch.embedding_scale)
    if arch.embedding_norm:
        embedding = _norm(replica, "embed.ln", embedding, rules)
    residual = record("hook_embed", embedding)
    if "W_pos" in w:
        positions = w["W_pos"][: tokens.shape[1]].expand(tokens.shape[0], -1, -1).clone()
        residual = residual + record("hook_pos_embed", positions)
    for layer in range(arch.n_layers):
        residual = _block(replica, layer, residual, rules, record)
    final = _norm(replica, "ln_final", residual, rules)
    z = record("logits_before_cap", final @ w["W_U"] + w.get("b_U", 0.0))
    return _cap(z, arch.logit_cap)


def _block(
    replica: Replica, layer: int, resid_pre: Tensor, rules: Collection[str], record: Record
) -> Float[Tensor, "batch pos d_model"]:
    arch, name = replica.architecture, f"blocks.{layer}"
    resid_pre = record(f"{name}.hook_resid_pre", resid_pre)
    attn_out = _attention(replica, layer, _norm(replica, f"{name}.ln1", resid_pre, rules), rules, record)
    if arch.post_norms:
        attn_out = _norm(replica, f"{name}.ln1_post", attn_out, rules)
    attn_out = record(f"{name}.hook_attn_out", attn_out)
    resid_mid = resid_pre + attn_out
    if not arch.parallel:
        resid_mid = record(f"{name}.hook_resid_mid", resid_mid)
    mlp_in = resid_pre if arch.parallel else resid_mid
    mlp_out = _mlp(replica, layer, _norm(replica, f"{name}.ln2", mlp_in, rules), rules, record)
    if arch.post_norms:
        mlp_out = _norm(replica, f"{name}.ln2_post", mlp_out, rules)
    mlp_out = record(f"{name}.hook_mlp_out", mlp_out)
    return record(f"{name}.hook_resid_post", resid_mid + mlp_out)


def _norm(replica: Replica, name: str, x: Tensor, rules: Collection[str]) -> Tensor:
    """Divide by the scale; the ln rule treats the scale as a constant, the centring stays differentiable."""
    arch, w = replica.architecture, replica.weights
    if arch.norm is None:
        return x
    if arch.norm == "layer":
        x = x - x.mean(-1, keepdim=True)
    scale = (x.pow(2).mean(-1, keepdim=True) + arch.eps).sqrt()
    if "ln" in rules:
        scale = scale.detach()
    return x / scale * w.get(f"{name}.w", 1.0) + w.get(f"{name}.b", 0.0)


def _attention(
    replica: Replica, layer: int, x: Tensor, rules: Collection[str], record: Record
) -> Float[Tensor, "batch pos d_model"]:
    arch, w, name = replica.architecture, replica.weights, f"blocks.{layer}.attn"

    def project(letter: str) -> Float[Tensor, "batch pos head_index d_head"]:
        product = torch.einsum("bpm,hmd->bphd", x, w[f"{name}.W_{letter}"])
        return product + w.get(f"{name}.b_{letter}", 0.0)

    q, k, v = (record(f"{name}.hook_{letter.lower()}", project(letter)) for letter in "QKV")
    if arch.qk_norm:  # never frozen by the ln rule: these norms shape the pattern, not the values
        q = _head_norm(q, w[f"{name}.q_norm.w"], arch.eps, rules)
        k = _head_norm(k, w[f"{name}.k_norm.w"], arch.eps, rules)
    if arch.rotary_dim:
        q, k = _rotate(q, arch, layer), _rotate(k, arch, layer)
    repeats = arch.n_heads // arch.n_kv_heads
    k, v = k.repeat_interleave(repeats, dim=2), v.repeat_interleave(repeats, dim=2)
    scores = _product("bqhd,bkhd->bhqk", q, k, rules) * arch.score_scale[layer]
    if arch.alibi:
        scores = scores - _alibi_slopes(arch.n_heads)[:, None, None] * _distance(scores.shape[-1])
    scores = _cap(scores, arch.score_cap)
    scores = scores.masked_fill(~_visible(arch, layer, scores.shape[-1]), -torch.inf)
    pattern = SoftmaxAtTemperature.apply(scores) if "softmax_temperature" in rules else scores.softmax(-1)
    if "attention" in rules:
        pattern = pattern.detach()
    z = record(f"{name}.hook_z", _product("bhqk,bkhd->bqhd", pattern, v, rules))
    return torch.einsum("bqhd,hdm->bqm", z, w[f"{name}.W_O"]) + w.get(f"{name}.b_O", 0.0)


def _product(equation: str, a: Tensor, b: Tensor, rules: Collection[str]) -> Tensor:
    """Multiply two signals; the half rule holds one of them constant at a time and takes the mean of both."""
    if "halve_attention" not in rules:
        return torch.einsum(equation, a, b)
    return (torch.einsum(equation, a.detach(), b) + torch.einsum(equation, a, b.detach())) / 2


class SoftmaxAtTemperature(torch.autograd.Function):
    """A softmax whose backward pass is that of a softmax at temperature 2, without the factor 1/2 of its inner slope.

    Edin et al. 2025, arXiv 2505.17630: the gradient g becomes s (g - sum_j s_j g_j), s = softmax(scores / 2).
    """

    @staticmethod
    def forward(ctx: Any, scores: Tensor) -> Tensor:
        """Compute the ordinary softmax."""
        ctx.save_for_backward(scores)
        return scores.softmax(-1)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> Tensor:
        """Let softened attention weights share the gradient out."""
        (scores,) = ctx.saved_tensors
        (gradient,) = gradients
        softened = (scores / 2).softmax(-1)
        return softened * (gradient - (gradient * softened).sum(-1, keepdim=True))


def _head_norm(x: Tensor, weight: Tensor, eps: float, rules: Collection[str]) -> Tensor:
    scale = (x.pow(2).mean(-1, keepdim=True) + eps).sqrt()
    return x / (scale.detach() if "head_norms" in rules else scale) * weight


def _rotate(x: Tensor, arch: Architecture, layer: int) -> Tensor:
    """Rotate pairs of the first `rotary_dim` coordinates: neighbors, or i and i + rotary_dim / 2."""
    half = arch.rotary_dim // 2
    out = x.clone()
    for i in range(half):
        first, second = (2 * i, 2 * i + 1) if arch.rotary_adjacent else (i, i + half)
        angle = torch.arange(x.shape[1], dtype=x.dtype) / arch.rotary_base[layer] ** (i / half)
        cos, sin = angle.cos()[None, :, None], angle.sin()[None, :, None]
        out[..., first] = x[..., first] * cos - x[..., second] * sin
        out[..., second] = x[..., second] * cos + x[..., first] * sin
    return out


def _distance(length: int) -> Float[Tensor, "query key"]:
    positions = torch.arange(length, dtype=torch.float64)
    return positions[:, None] - positions[None, :]


def _alibi_slopes(n_heads: int) -> Float[Tensor, " head_index"]:
    assert math.log2(n_heads).is_integer(), "only powers of two here"
    return torch.tensor([2.0 ** (-8.0 * (head + 1) / n_heads) for head in range(n_heads)], dtype=torch.float64)


def _visible(arch: Architecture, layer: int, length: int) -> Float[Tensor, "query key"]:
    distance = _distance(length)
    visible = distance >= 0 if arch.causal else torch.ones_like(distance, dtype=torch.bool)
    window = arch.windows[layer] if arch.windows else None
    return visible if window is None else visible & (distance < window)


def _mlp(
    replica: Replica, layer: int, x: Tensor, rules: Collection[str], record: Record
) -> Float[Tensor, "batch pos d_model"]:
    arch, w, name = replica.architecture, replica.weights, f"blocks.{layer}.mlp"
    if arch.gated:
        pre = record(f"{name}.hook_pre", x @ w[f"{name}.W_gate"] + w.get(f"{name}.b_gate", 0.0))
        up = record(f"{name}.hook_pre_linear", x @ w[f"{name}.W_in"] + w.get(f"{name}.b_up", 0.0))
        gate = _activation(arch.activation, pre, rules)
        if "half" in rules:
            product = (gate.detach() * up + gate * up.detach()) / 2
        else:
            product = gate * up
        post = product + w.get(f"{name}.b_in", 0.0)
    else:
        pre = record(f"{name}.hook_pre", x @ w[f"{name}.W_in"] + w.get(f"{name}.b_in", 0.0))
        post = _activation(arch.activation, pre, rules)
        if arch.activation_norm:
            post = _norm(replica, f"{name}.ln", record(f"{name}.hook_mid", post), rules)
    post = record(f"{name}.hook_post", post)
    return post @ w[f"{name}.W_out"] + w.get(f"{name}.b_out", 0.0)


def _activation(kind: str, x: Tensor, rules: Collection[str]) -> Tensor:
    """Compute f(x) = x * ratio(x); the identity rule treats the ratio as a constant."""
    ratio = RATIOS[kind](x)
    return x * (ratio.detach() if "identity" in rules else ratio)


def _tanh_ratio(x: Tensor) -> Tensor:
    return (1 + torch.tanh(math.sqrt(2 / math.pi) * (x + 0.044715 * x**3))) / 2


RATIOS: dict[str, Callable[[Tensor], Tensor]] = {
    "gelu": lambda x: (1 + torch.erf(x / math.sqrt(2))) / 2,
    "gelu_new": _tanh_ratio,
    "gelu_fast": _tanh_ratio,
    "gelu_pytorch_tanh": _tanh_ratio,
    "silu": torch.sigmoid,
    "relu": lambda x: (x > 0).to(x.dtype),
    "solu": lambda x: x.softmax(-1),
    "solu_ln": lambda x: x.softmax(-1),
}
"""f(x) / x in closed form, so that nothing is special about x = 0."""


def _cap(x: Tensor, cap: float | None) -> Tensor:
    return x if cap is None else cap * torch.tanh(x / cap)
