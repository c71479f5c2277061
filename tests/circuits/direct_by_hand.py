"""Direct effects computed slowly and in the open: by replicas, by finite differences, and along a single path."""

from collections.abc import Callable
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor

from tests.families import ModelCase
from tests.replicas import ALL_RULES, replica_of
from tests.replicas._forward import forward

Node = tuple[int, int, int]
"""Layer, position, unit."""


def replica_effects(
    case: ModelCase, tokens: Int[Tensor, "1 pos"], target: Node | Callable[[Tensor], Tensor], *, seed: int = 0
) -> dict[str, Tensor]:
    """Gradient of a neuron (or of a function of the raw logits) at every neuron and embedding, MLPs stopped."""
    read: dict[str, Tensor] = {}
    written: dict[str, Tensor] = {}

    def record(name: str, value: Tensor) -> Tensor:
        written[name] = value
        if name.endswith("mlp.hook_post") or name in ("hook_embed", "hook_pos_embed"):
            read[name] = value.detach().requires_grad_()
            return read[name]
        return value

    forward(replica_of(case, seed), tokens, ALL_RULES, record)
    if callable(target):
        output = target(written["logits_before_cap"])
    else:
        layer, position, unit = target
        output = written[f"blocks.{layer}.mlp.hook_post"][0, position, unit]
    found = torch.autograd.grad(output, list(read.values()), allow_unused=True)
    gradients = dict(zip(read, found, strict=True))
    return {name: torch.zeros_like(read[name]) if g is None else g for name, g in gradients.items()}


class FrozenModel:
    """A HookedTransformer as the linear map that edges describe: attention, norms and activation ratios held fixed.

    `neuron` gives a neuron's value when the outputs of some neurons are changed and every other MLP stays as it was. In
    a gated MLP each branch moves while the other is held, and the half rule takes the mean of both.
    """

    def __init__(self, model: Any, tokens: Int[Tensor, "1 pos"]) -> None:
        self._model, self._tokens = model, tokens
        with torch.no_grad():
            _, self._clean = model.run_with_cache(tokens)

    def neuron(self, target: Node, changes: dict[Node, float]) -> float:
        layer, position, unit = target
        path = f"blocks.{layer}.mlp"
        seen: dict[str, Tensor] = {}
        hooks = [(name, self._freeze) for name in self._clean if name.endswith(("hook_scale", "attn.hook_pattern"))]
        hooks += [(f"blocks.{other}.mlp.hook_post", self._changed(other, changes)) for other in range(layer)]
        hooks += [
            (f"{path}.{name}", lambda value, hook: seen.update({hook.name: value}))
            for name in ("hook_pre", "hook_pre_linear")
        ]
        with torch.no_grad():
            self._model.run_with_hooks(self._tokens, fwd_hooks=[h for h in hooks if h[0] in self._model.hook_dict])
        place = (0, position, unit)
        pre, clean_pre = seen[f"{path}.hook_pre"][place], self._clean[f"{path}.hook_pre"][place]
        if f"{path}.hook_pre_linear" not in seen:
            return float(pre / clean_pre * self._clean[f"{path}.hook_post"][place])
        up, clean_up = seen[f"{path}.hook_pre_linear"][place], self._clean[f"{path}.hook_pre_linear"][place]
        gate = torch.nn.functional.silu(clean_pre)
        bias = self._model.blocks[layer].mlp.b_in[unit].detach()  # HookedTransformer adds it after the product
        return float(0.5 * gate * up + 0.5 * gate * pre / clean_pre * clean_up + bias)

    def _freeze(self, value: Tensor, hook: Any) -> Tensor:
        return self._clean[hook.name]

    def _changed(self, layer: int, changes: dict[Node, float]) -> Callable[..., Tensor]:
        def change(value: Tensor, hook: Any) -> Tensor:
            value = self._clean[hook.name].clone()
            for (of, position, unit), by in changes.items():
                if of == layer:
                    value[0, position, unit] += by
            return value

        return change


@torch.no_grad()
def edge_in_closed_form(model: Any, tokens: Int[Tensor, "1 pos"], source: Node, target: Node) -> float:
    """The edge between neurons of layers 0 and 1 of a pre-norm HookedTransformer with layer norms, path by path.

    A row of W_out through the residual stream, directly and through each head's OV circuit with its pattern, then
    through the norms' frozen scales to a column of W_in, times the activation's ratio.
    """
    (_, from_position, from_unit), (_, position, unit) = source, target
    _, cache = model.run_with_cache(tokens)
    block = model.blocks[1]
    written = cache["blocks.0.mlp.hook_post"][0, from_position, from_unit] * model.blocks[0].mlp.W_out[from_unit]
    arriving = written if from_position == position else torch.zeros_like(written)
    normed = _through_norm(written, block.ln1, cache["blocks.1.ln1.hook_scale"][0, from_position])
    for head in range(model.cfg.n_heads):
        pattern = cache["blocks.1.attn.hook_pattern"][0, head, position, from_position]
        arriving = arriving + pattern * (normed @ block.attn.W_V[head] @ block.attn.W_O[head])
    normed = _through_norm(arriving, block.ln2, cache["blocks.1.ln2.hook_scale"][0, position])
    pre = cache["blocks.1.mlp.hook_pre"][0, position, unit]
    ratio = cache["blocks.1.mlp.hook_post"][0, position, unit] / pre
    return float(normed @ block.mlp.W_in[:, unit] * ratio)


def _through_norm(x: Float[Tensor, " d_model"], norm: Any, scale: Float[Tensor, " 1"]) -> Float[Tensor, " d_model"]:
    return (x - x.mean()) / scale * norm.w
