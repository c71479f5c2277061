"""The neurons of one MLP as a slot: read, written and cut at `hook_post`.

    MLP output = neurons @ W_out + b_out            so  d a_t / d a_s = W_out[s] . d a_t / d output
    a_t = c * pre_t (+ c' * up_t), pre = x @ W_in   so  d a_t / d x   = c W_in[:, t] (+ c' W_up[:, t])

Where that holds, gradients are read at the output and begun at the input x, both as wide as the residual stream, and
only the chosen neurons' rows and columns of the weights are used: a quarter of the numbers, and no product with whole
matrices for every target. It is measured at every prompt, not looked up. Where something else stands there (a norm
after the MLP, as in Gemma 2 on HookedTransformer, or inside it, as with solu_ln), gradients are those of all neurons.
"""

from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn

from ..models._protocol import TransformerLensModel, hook_points, submodule
from ..models._sites import MLPSites, bias_after_product
from ._slot import (
    Arrivals,
    Branch,
    Hooks,
    Input,
    Output,
    Reading,
    Seen,
    SlotChange,
    SlotRun,
    keep,
    leaves_of,
    note_input,
    of_prompt,
    seeds_at,
    summed,
    through,
    wide,
)

_ALLOWED = {torch.float64: 1e-9, torch.float32: 1e-5, torch.float16: 5e-3, torch.bfloat16: 2e-2}
_BLOCK = 4096  # rows of W_out in float32 at a time


@dataclass(frozen=True, eq=False)
class Linear:
    """Weights `[in, out]` of an MLP, and the bias after them."""

    weights: Float[Tensor, "d_in d_out"]
    bias: Float[Tensor, " d_out"] | None


@dataclass(frozen=True, eq=False)
class Weights:
    """The linear maps of an MLP as its module shows them, each None where it does not. Used where they prove right."""

    path: str
    out: Linear | None
    outputs: tuple[str, ...]
    """Hook points at which the MLP's output may appear."""
    into: tuple[Linear | None, ...]
    """Into `pre`, and into `up` where it is gated."""
    after_product: Float[Tensor, " d_mlp"] | None


def neuron_slot(model: TransformerLensModel, mlp: MLPSites) -> "NeuronSlot":
    """The slot of an MLP."""
    path = mlp.post.removesuffix(".hook_post")
    module, points = submodule(model, path), hook_points(model)
    after = bias_after_product(model, mlp.layer)
    gate = _linear(module, "W_gate", "b_gate")
    linear = _linear(module, "W_in", "b_in" if after is None else "")
    into = (linear,) if mlp.up is None else (gate, linear)
    outputs = tuple(n for n in (f"{path}.hook_out", f"blocks.{mlp.layer}.hook_mlp_out") if n in points)
    after = None if after is None else after.detach()
    return NeuronSlot(mlp, Weights(path, _linear(module, "W_out", "b_out"), outputs, into, after))


def _linear(module: Any, weights: str, bias: str) -> Linear | None:
    found, added = (getattr(module, name, None) if name else None for name in (weights, bias))
    if not isinstance(found, Tensor) or found.dim() != 2:
        return None
    return Linear(found.detach(), added.detach() if isinstance(added, Tensor) else None)


@dataclass(frozen=True, eq=False)
class NeuronSlot:
    """The neurons of one MLP."""

    mlp: MLPSites
    weights: Weights = field(repr=False)
    letter: str = "N"
    has_error: bool = False

    @property
    def layer(self) -> int:
        return self.mlp.layer

    @property
    def hook(self) -> str:
        return self.mlp.post

    def early_hooks(self, seen: Seen) -> list[tuple[str, Callable[..., None]]]:
        return [(name, note_input(seen, name)) for name in (*self.weights.outputs, self.weights.path)]

    def hooks(self, seen: Seen) -> Hooks:
        def neurons(value: Tensor, hook: Any) -> Tensor:
            seen["written"] = value
            seen["read"] = value.detach().requires_grad_(True) if torch.is_grad_enabled() else value
            return seen["read"]

        branches = [("pre", self.mlp.pre)] + ([] if self.mlp.up is None else [("up", self.mlp.up)])
        return [(self.mlp.post, neurons), *((name, keep(seen, key)) for key, name in branches)]

    def run(self, seen: Seen) -> SlotRun:
        nodes = of_prompt(seen["written"].detach())
        if not seen["written"].requires_grad:
            return SlotRun(nodes, None, seen["written"], seen["read"])
        output = self._output(nodes, [seen[name] for name in self.weights.outputs if name in seen])
        return SlotRun(nodes, None, seen["written"], seen["read"], output=output, input=self._input(seen))

    @torch.no_grad()
    def _output(self, nodes: Float[Tensor, "pos d_mlp"], candidates: Iterable[Tensor]) -> Output | None:
        """The tensor that is what the neurons write, rebuilt from the weights; None where none is."""
        out, written = self.weights.out, None
        for tensor in candidates:
            if out is None or out.weights.shape[0] != nodes.shape[1] or tensor.grad_fn is None:
                continue
            written = _product(nodes, out.weights) if written is None else written
            if tensor.numel() != written.numel():
                continue
            value = wide(tensor.reshape(written.shape))
            off = (written if out.bias is None else written + out.bias.to(written)) - value
            if float(off.abs().max()) <= _ALLOWED.get(tensor.dtype, 1e-5) * float(value.abs().max()):
                return Output(tensor, out.weights, written)
        return None

    def _input(self, seen: Seen) -> Input | None:
        """The tensor that the neurons read, where the graph has nothing but biases beside it."""
        x, values = seen.get(self.weights.path), [seen[name] for name in ("pre", "up") if name in seen]
        into = [linear for linear in self.weights.into if linear is not None]
        graphless = [value for value in (x, *values) if value is None or value.grad_fn is None]
        if x is None or graphless or len(into) != len(values) or self.mlp.activated != self.mlp.post:
            return None
        beside = leaves_of([seen["written"]], values) | leaves_of(values, [x])
        if not all(isinstance(leaf, nn.Parameter) for leaf in beside.values()):
            return None
        return Input(x, tuple(Branch(v, w.weights, w.bias) for v, w in zip(values, into, strict=True)))

    def change(self, run: SlotRun, base: SlotRun | None) -> SlotChange:
        if base is None:
            return SlotChange(run.nodes, None, None if run.output is None else run.output.written)
        nodes = run.nodes - base.nodes
        return SlotChange(nodes, None, None if run.output is None else _product(nodes, run.output.weights))

    def node_gradient(self, gradient: Tensor) -> Tensor:
        return wide(gradient)

    def pass_on(self, run: SlotRun, gradient: Tensor) -> Tensor:
        return gradient

    def read(self, run: SlotRun, place: Tensor, unit: Tensor) -> Reading:
        place, unit = place.to(run.reading.device), unit.to(run.reading.device)
        found = None if run.input is None else self._read_input(run, run.input, place, unit)
        if found is not None:
            return found
        seeds = run.reading.new_zeros(len(place), *run.nodes.shape)
        seeds[torch.arange(len(place), device=seeds.device), place, unit] = 1
        return Reading(run.reading, seeds.reshape(len(place), *run.reading.shape))

    def _read_input(self, run: SlotRun, read: Input, place: Tensor, unit: Tensor) -> Reading | None:
        """Gradients at the MLP's input; None where a neuron is not what its columns of the weights make of it."""
        chosen = torch.zeros_like(run.nodes)
        chosen[place, unit] = 1
        values = [branch.value for branch in read.branches]
        seed = chosen.reshape(run.reading.shape)
        slopes = torch.autograd.grad(run.reading, values, seed, retain_graph=True, allow_unused=True)
        x = wide(read.tensor.detach().reshape(len(run.nodes), -1)[place])
        rows, constant = 0.0, 0.0
        for branch, slope in zip(read.branches, slopes, strict=True):
            if slope is None or slope.numel() != chosen.numel():
                return None
            slope, value = slope.reshape(chosen.shape), branch.value.detach().reshape(chosen.shape)
            if branch.weights.shape != (x.shape[1], chosen.shape[1]) or _spreads(slope, slope[place, unit]):
                return None
            columns = wide(branch.weights[:, unit].mT)
            bias = columns.new_zeros(len(unit)) if branch.bias is None else wide(branch.bias[unit])
            off = ((x * columns).sum(1) + bias - wide(value[place, unit])).abs()
            size = (x * columns).abs().sum(1) + bias.abs()
            if not bool((off <= _ALLOWED.get(value.dtype, 1e-5) * size).all()):
                return None
            share = wide(slope[place, unit])
            rows, constant = rows + share[:, None] * columns, constant + share * bias
        if self.weights.after_product is not None:
            constant = constant + wide(self.weights.after_product[unit])
        assert isinstance(rows, Tensor) and isinstance(constant, Tensor)
        return Reading(read.tensor, seeds_at(read.tensor, place, rows), constant.cpu().double())

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


def _spreads(slope: Tensor, chosen: Tensor) -> bool:
    """Whether gradients of the chosen neurons reach others' branches."""
    return int(slope.count_nonzero()) != int(chosen.count_nonzero())
