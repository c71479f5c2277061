"""The neurons of one MLP as a slot: read, written and cut at `hook_post`.

    MLP output = neurons @ W_out + b_out        so  d a_t / d a_s = W_out[s] . d a_t / d(output)

Where that holds, gradients are read at the output, as wide as the residual stream, and only the chosen neurons' rows of
W_out are used: a quarter of the numbers, and no product with all of W_out for every target. It is measured at every
prompt, not looked up: where something stands between neurons and output (a norm, as in Gemma 2 on HookedTransformer),
gradients are those of all neurons, at `hook_post`.
"""

from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from ..models import MLPSites, TransformerLensModel, hook_points, submodule
from ._edges_slot import (
    Arrivals,
    Hooks,
    Output,
    Seen,
    SlotChange,
    SlotRun,
    keep,
    note_input,
    of_prompt,
    summed,
    through,
    wide,
)

_ALLOWED = {torch.float64: 1e-9, torch.float32: 1e-5, torch.float16: 5e-3, torch.bfloat16: 2e-2}
_BLOCK = 4096  # rows of W_out in float32 at a time


def neuron_slot(model: TransformerLensModel, mlp: MLPSites) -> "NeuronSlot":
    """The slot of an MLP, with the weights it writes through where the model shows them."""
    path = mlp.post.removesuffix(".hook_post")
    module = submodule(model, path)
    weights, bias = (getattr(module, name, None) for name in ("W_out", "b_out"))
    if not isinstance(weights, Tensor) or weights.dim() != 2:
        return NeuronSlot(mlp)
    points = hook_points(model)
    names = tuple(n for n in (f"{path}.hook_out", f"blocks.{mlp.layer}.hook_mlp_out") if n in points)
    return NeuronSlot(mlp, weights.detach(), bias.detach() if isinstance(bias, Tensor) else None, names)


@dataclass(frozen=True, eq=False)
class NeuronSlot:
    """The neurons of one MLP."""

    mlp: MLPSites
    weights: Float[Tensor, "d_mlp d_model"] | None = field(default=None, repr=False)
    bias: Float[Tensor, " d_model"] | None = field(default=None, repr=False)
    outputs: tuple[str, ...] = ()
    """Where the MLP's output may appear."""
    letter: str = "N"
    has_error: bool = False

    @property
    def layer(self) -> int:
        return self.mlp.layer

    @property
    def hook(self) -> str:
        return self.mlp.post

    def early_hooks(self, seen: Seen) -> list[tuple[str, Callable[..., None]]]:
        return [(name, note_input(seen, name)) for name in self.outputs]

    def hooks(self, seen: Seen) -> Hooks:
        def neurons(value: Tensor, hook: Any) -> Tensor:
            seen["written"] = value
            seen["read"] = value.detach().requires_grad_(True) if torch.is_grad_enabled() else value
            return seen["read"]

        branches = () if self.mlp.up is None else (("gate", self.mlp.pre), ("up", self.mlp.up))
        return [(self.mlp.post, neurons), *((name, keep(seen, key)) for key, name in branches)]

    def run(self, seen: Seen) -> SlotRun:
        nodes = of_prompt(seen["written"].detach())
        candidates = [seen[name] for name in self.outputs if name in seen and seen[name].requires_grad]
        return SlotRun(nodes, None, seen["written"], seen["read"], output=self._output(nodes, candidates))

    @torch.no_grad()
    def _output(self, nodes: Float[Tensor, "pos d_mlp"], candidates: Iterable[Tensor]) -> Output | None:
        """The tensor that is what the neurons write, rebuilt from the weights; None where none is."""
        written = None
        for tensor in candidates:
            assert self.weights is not None
            if self.weights.shape[0] != nodes.shape[1] or tensor.numel() != len(nodes) * self.weights.shape[1]:
                continue
            written = _product(nodes, self.weights) if written is None else written
            value = wide(tensor.detach().reshape(written.shape))
            off = (written if self.bias is None else written + self.bias.to(written)) - value
            if float(off.abs().max()) <= _ALLOWED.get(tensor.dtype, 1e-5) * float(value.abs().max()):
                return Output(tensor, self.weights, written)
        return None

    def change(self, run: SlotRun, base: SlotRun | None) -> SlotChange:
        if base is None:
            return SlotChange(run.nodes, None, None if run.output is None else run.output.written)
        nodes = run.nodes - base.nodes
        return SlotChange(nodes, None, None if run.output is None else _product(nodes, run.output.weights))

    def node_gradient(self, gradient: Tensor) -> Tensor:
        return wide(gradient)

    def pass_on(self, run: SlotRun, gradient: Tensor) -> Tensor:
        return gradient

    def seeds(self, run: SlotRun, place: Tensor, unit: Tensor) -> Tensor:
        seeds = run.reading.new_zeros(len(place), *run.nodes.shape)
        seeds[torch.arange(len(place), device=seeds.device), place.to(seeds.device), unit.to(seeds.device)] = 1
        return seeds.reshape(len(place), *run.reading.shape)

    def constant(self, run: SlotRun, place: Tensor, unit: Tensor) -> None:
        return None

    def arrivals(self, gradient: Tensor, run: SlotRun, change: SlotChange, place: Tensor, unit: Tensor) -> Arrivals:
        gradient = wide(gradient)
        place, unit = place.to(gradient.device), unit.to(gradient.device)
        if run.output is None or change.written is None:
            product = gradient * wide(change.nodes)
            return Arrivals(product[:, place, unit].cpu().double(), summed(product), None, None)
        rows = run.output.weights[unit.to(run.output.weights.device)].to(gradient)
        nodes = through(gradient, rows, change.nodes.to(gradient.device)[place, unit], place)
        return Arrivals(nodes.cpu().double(), summed(gradient * change.written.to(gradient)), None, None)

    def bias_score(self, run: SlotRun, gradient: Tensor) -> float:
        return 0.0


def _product(
    nodes: Float[Tensor, "pos d_mlp"], weights: Float[Tensor, "d_mlp d_model"]
) -> Float[Tensor, "pos d_model"]:
    """In float32 at least, without a copy of all weights in it."""
    blocks = zip(wide(nodes).split(_BLOCK, 1), weights.to(nodes.device).split(_BLOCK), strict=True)
    parts = [some @ rows.to(some) for some, rows in blocks]
    return torch.stack(parts).sum(0) if len(parts) > 1 else parts[0]
