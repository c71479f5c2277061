"""The seed paper's attributions by its formulas, in plain torch on a Llama folder: no hooks, no package, float64.

    python -m tests.nodes.seed_paper ../shared/models/stories260K      prints the numbers that test_seed_paper.py stores

Relevance of a neuron: a * dG/da with G the sum of the k largest logits at the last position. The backward pass differs:
norm coefficients are constants; SiLU(g) = g * sigmoid(g) with the sigmoid a constant; the product with `up` halves both
gradients; and, in the paper's text but not in its released code, attention patterns are constants.
Source: Arora et al. 2026, arXiv 2601.22594; METHODS 1.2 to 1.5.
"""

import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from torch import Tensor

PROMPT = (1, 403, 407, 261, 378, 432, 383, 286, 261, 376, 298, 315, 421, 395)
"""Once upon a time, there was a little girl named"""
TOP = 5


class Llama:
    """A forward pass whose backward pass follows the named rules."""

    def __init__(self, folder: Path) -> None:
        self.config = json.loads((folder / "config.json").read_text())
        self.weights = {name: value.double() for name, value in load_file(folder / "model.safetensors").items()}

    def norm(self, x: Tensor, weight: Tensor, frozen: bool) -> Tensor:
        scale = weight * (x.square().mean(-1, keepdim=True) + self.config["rms_norm_eps"]).rsqrt()
        return x * (scale.detach() if frozen else scale)

    def attention(self, x: Tensor, layer: int, frozen: bool) -> Tensor:
        width, heads, own = self.config["head_dim"], self.config["num_attention_heads"], "self_attn"
        q, k, v = (
            (x @ self.weights[f"model.layers.{layer}.{own}.{name}_proj.weight"].T).unflatten(-1, (-1, width))
            for name in "qkv"
        )
        q, k = rotated(q), rotated(k)
        groups = heads // k.shape[1]
        k, v = k.repeat_interleave(groups, 1), v.repeat_interleave(groups, 1)
        scores = torch.einsum("qhd,khd->hqk", q, k) / width**0.5
        later = torch.ones(len(x), len(x)).triu(1).bool()
        pattern = scores.masked_fill(later, -torch.inf).softmax(-1)
        mixed = torch.einsum("hqk,khd->qhd", pattern.detach() if frozen else pattern, v)
        return mixed.flatten(1) @ self.weights[f"model.layers.{layer}.{own}.o_proj.weight"].T

    def run(
        self,
        embeddings: Tensor,
        *,
        rules: Sequence[str],
        stopped: Sequence[int] = (),
        moved: dict[int, Tensor] | None = None,
    ) -> tuple[Tensor, list[Tensor]]:
        """Logits and every layer's neurons; MLPs of `stopped` layers pass no gradient; `moved` replaces neurons."""
        x, neurons = embeddings, []
        for layer in range(self.config["num_hidden_layers"]):
            weight = lambda name, layer=layer: self.weights[f"model.layers.{layer}.{name}.weight"]  # noqa: E731
            normed = self.norm(x, weight("input_layernorm"), "ln" in rules)
            x = x + self.attention(normed, layer, "attention" in rules)
            normed = self.norm(x, weight("post_attention_layernorm"), "ln" in rules)
            gate, up = normed @ weight("mlp.gate_proj").T, normed @ weight("mlp.up_proj").T
            sigmoid = gate.sigmoid()
            silu = gate * (sigmoid.detach() if "identity" in rules else sigmoid)
            product = silu * up
            if "half" in rules:  # the value of the product, half of its gradient
                product = product / 2 + product.detach() / 2
            a = (moved or {}).get(layer, product)
            neurons.append(a)
            out = a @ weight("mlp.down_proj").T
            x = x + (out.detach() if layer in stopped else out)
        logits = self.norm(x, self.weights["model.norm.weight"], "ln" in rules) @ self.weights["lm_head.weight"].T
        return logits, neurons

    def embeddings(self, tokens: Sequence[int]) -> Tensor:
        return self.weights["model.embed_tokens.weight"][torch.tensor(tokens)].clone().requires_grad_(True)


def rotated(x: Tensor, base: float = 10_000.0) -> Tensor:
    """Rotary embedding of [pos, head, d], halves apart."""
    half = x.shape[-1] // 2
    angles = torch.arange(len(x)).double()[:, None] * base ** (-torch.arange(half).double() / half)
    cos, sin = angles.cos()[:, None], angles.sin()[:, None]
    first, second = x[..., :half], x[..., half:]
    return torch.cat([first * cos - second * sin, second * cos + first * sin], -1)


def goal(logits: Tensor, center: bool = False) -> Tensor:
    """Sum of the largest logits at the last position; centered: each minus the mean over the vocabulary."""
    best = logits[-1].topk(TOP).values
    return best.sum() - (TOP * logits[-1].mean() if center else 0.0)


def relevance(model: Llama, rules: Sequence[str], *, center: bool = False, scale: float = 1.0) -> tuple[Any, ...]:
    """(neurons [layer, pos, unit], their gradients, share of the goal that arrives at the embeddings)."""
    start = (scale * model.embeddings(PROMPT)).detach().requires_grad_(True)
    logits, neurons = model.run(start, rules=rules)
    target = goal(logits, center)
    if scale != 1.0:  # the goal's tokens are those of the whole prompt
        chosen = model.run(model.embeddings(PROMPT), rules=rules)[0][-1].topk(TOP).indices
        target = logits[-1, chosen].sum()
    found = torch.autograd.grad(target, [start, *neurons])
    share = float((start * found[0]).sum().detach() / target.detach())
    return torch.stack(neurons).detach(), torch.stack(found[1:]), share


def edge(model: Llama, source: Sequence[int], target: Sequence[int] | None) -> float:
    """a_s * d a_t / d a_s under the paper's rules, MLPs between them stopped; a target of None is the raw goal."""
    rules = ("ln", "identity", "half", "attention")
    layer, position, unit = source
    last = model.config["num_hidden_layers"] if target is None else target[0]
    logits, neurons = model.run(model.embeddings(PROMPT), rules=rules, stopped=range(layer + 1, last))
    end = goal(logits) if target is None else neurons[target[0]][target[1], target[2]]
    gradient = torch.autograd.grad(end, neurons[layer])[0][position, unit]
    return float((neurons[layer][position, unit] * gradient).detach())


def measured(folder: Path) -> dict[str, Any]:
    """All that is stored: the ten neurons of largest |relevance| as (layer, position, unit), and numbers at them."""
    model = Llama(folder)
    three, four = ("ln", "identity", "half"), ("ln", "identity", "half", "attention")
    a, g, share = relevance(model, four)
    flat = (a * g).flatten().abs().topk(10).indices.tolist()
    places = [(i // a[0].numel(), i % a[0].numel() // a.shape[2], i % a.shape[2]) for i in flat]
    take = lambda values: [float(values[place]) for place in places]  # noqa: E731
    released = relevance(model, three)
    centered = relevance(model, four, center=True)
    plain = relevance(model, ())
    steps = [relevance(model, (), scale=k / 5) for k in range(6)]
    order = (a * g).flatten().abs().topk(40).indices.tolist()
    nodes = [(i // a[0].numel(), i % a[0].numel() // a.shape[2], i % a.shape[2]) for i in order]
    ends = [(s, t) for s in nodes for t in (*nodes[:10], None) if t is None or (s[0] < t[0] and s[1] <= t[1])]
    weights = sorted(((edge(model, s, t), s, t) for s, t in ends), key=lambda row: -abs(row[0]))
    kinds = [[row for row in weights if row[2] is None], [row for row in weights if row[2] and row[1][1] == row[2][1]]]
    kinds.append([row for row in weights if row[2] and row[1][1] < row[2][1]])
    with torch.no_grad():
        total = float(goal(model.run(model.embeddings(PROMPT), rules=())[0]))
    return {
        "goal": total,
        "neurons": places,
        "conserved": [share, released[2]],
        "paper": take(a * g),
        "released": take(released[0] * released[1]),
        "centered": take(centered[0] * centered[1]),
        "unpaired": take(g * (0 - a)),
        "sum": [float((a * g).sum()), float((a * g)[:, 1:].sum())],
        "gradient": take(plain[0] * plain[1]),
        "ig_inputs": take(torch.stack([s[1] for s in steps[1:]]).mean(0) * (steps[5][0] - steps[0][0])),
        "conductance": take(sum(steps[k][1] * (steps[k][0] - steps[k - 1][0]) for k in range(1, 6))),
        "edges": [row for kind in kinds for row in kind[:3]],
    }


if __name__ == "__main__":
    for name, value in measured(Path(sys.argv[1])).items():
        print(f"{name!r}: {value!r},")
