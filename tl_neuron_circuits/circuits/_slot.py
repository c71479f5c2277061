"""A slot: where the nodes of one layer of a circuit live, as the forward pass reaches them.

A slot says three things about its nodes: what they are in a run, from which tensor of the graph each is read as the
target of edges, and at which tensor the gradient says what each contributes as a source. In a run every slot writes a
leaf: what later layers read is a copy without a past.
"""

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from functools import partial
from typing import Any, Protocol, runtime_checkable

import torch
from jaxtyping import Float, Int
from torch import Tensor

Hooks = list[tuple[str, Callable[..., Tensor]]]
Seen = dict[str, Tensor]
"""What the hooks of one slot left in one run."""


@dataclass(frozen=True)
class SlotRun:
    """What one run left at a slot."""

    nodes: Float[Tensor, "pos unit"]
    """Their values, without a graph."""
    error: Float[Tensor, "pos d"] | None
    reading: Float[Tensor, "..."]
    """What targets are read from."""
    source: Float[Tensor, "..."]
    """The leaf that the nodes write: what gradients of all of them are taken at."""
    factor: Float[Tensor, "pos unit"] | None = None
    """Frozen: a feature's value over its linear pre-activation; zero where it does not fire."""
    output: "Output | None" = None
    """Where gradients at few nodes are read sooner than at `source`."""
    input: "Input | None" = None
    """Where gradients of few nodes are known sooner than at `reading`."""


@dataclass(frozen=True, eq=False)
class Output:
    """What the MLP writes: `neurons @ weights`, and a bias. It was checked that it does."""

    tensor: Float[Tensor, "..."]
    """In the graph, as wide as the residual stream."""
    weights: Float[Tensor, "d_mlp d_model"]
    written: Float[Tensor, "pos d_model"]
    """Without the bias, in float32 at least."""


@dataclass(frozen=True, eq=False)
class Input:
    """What the MLP reads: the graph above it has nothing but these branches, `tensor @ weights`, and biases."""

    tensor: Float[Tensor, "..."]
    branches: tuple["Branch", ...]


@dataclass(frozen=True, eq=False)
class Branch:
    """A linear map into an MLP."""

    value: Float[Tensor, "..."]
    weights: Float[Tensor, "d_model d_mlp"]
    bias: Float[Tensor, " d_mlp"] | None


@dataclass(frozen=True)
class SlotChange:
    """Values of a run at a slot minus their baseline."""

    nodes: Float[Tensor, "pos unit"]
    error: Float[Tensor, "pos d"] | None
    written: Float[Tensor, "pos d"] | None
    """What all nodes together write; None where that is not known."""


@dataclass(frozen=True, eq=False)
class Reading:
    """Nodes as targets: gradients of each at a tensor, and what in them does not come from there."""

    tensor: Float[Tensor, "..."]
    seeds: Float[Tensor, "target ..."]
    constant: Float[Tensor, " target"] | None = None


@dataclass(frozen=True)
class Arrivals:
    """What reaches each target from a slot."""

    nodes: Float[Tensor, "target node"]
    everything: Float[Tensor, "target pos"]
    error: Float[Tensor, "target pos"] | None
    bias: Float[Tensor, " target"] | None


@runtime_checkable
class Slot(Protocol):
    """The nodes of one layer."""

    @property
    def layer(self) -> int: ...

    @property
    def hook(self) -> str:
        """Where its nodes write."""
        ...

    @property
    def letter(self) -> str:
        """Of its nodes' labels."""
        ...

    @property
    def has_error(self) -> bool: ...

    def early_hooks(self, seen: Seen) -> list[tuple[str, Callable[..., None]]]:
        """Forward pre-hooks of hook points and modules, for values read before TransformerLens' hooks, if they fire."""
        ...

    def hooks(self, seen: Seen) -> Hooks:
        """Forward hooks. With a graph, later layers read a leaf."""
        ...

    def run(self, seen: Seen) -> SlotRun:
        """What the hooks left."""
        ...

    def change(self, run: SlotRun, base: SlotRun | None) -> SlotChange:
        """Values minus their baseline; zero without one."""
        ...

    def node_gradient(self, gradient: Float[Tensor, "pos d"]) -> Float[Tensor, "pos unit"]:
        """The gradient at every node, from that at the source."""
        ...

    def pass_on(self, run: SlotRun, gradient: Float[Tensor, "..."]) -> Float[Tensor, "..."]:
        """From the gradient at the source to the gradient at `run.reading`, all nodes together."""
        ...

    def read(self, run: SlotRun, place: Tensor, unit: Tensor) -> "Reading":
        """Where chosen nodes are read from the graph."""
        ...

    def arrivals(
        self, gradient: Float[Tensor, "target pos d"], run: SlotRun, change: SlotChange, place: Tensor, unit: Tensor
    ) -> Arrivals:
        """Products of values and gradients: of chosen nodes, of all, of the error and of the decoder's bias.

        The gradient is at the output where the run has one, else at the source.
        """
        ...

    def bias_score(self, run: SlotRun, gradient: Float[Tensor, "pos d"]) -> float:
        """The biases of encoder and decoder times their gradients."""
        ...


def keep(seen: Seen, key: str) -> Callable[..., Tensor]:
    """A hook that keeps the value. Returning it keeps reshaped views in the graph."""

    def hook(value: Tensor, hook: Any) -> Tensor:
        seen[key] = value
        return value

    return hook


def note_input(seen: Seen, key: str) -> Callable[..., None]:
    """A forward pre-hook that keeps what enters a hook point, before anything replaces it."""
    return partial(_note, seen, key)


def _note(seen: Seen, key: str, module: Any, arguments: tuple[Tensor, ...]) -> None:
    if arguments:
        seen[key] = arguments[0]


def leaves_of(outputs: Iterable[Tensor], stops: Iterable[Tensor]) -> dict[int, Tensor]:
    """All leaves, by id, that gradients of `outputs` can reach without passing `stops`."""
    seen: set[Any] = {tensor.grad_fn for tensor in stops}
    todo: list[Any] = [tensor.grad_fn for tensor in outputs]
    found = {}
    while todo:
        node = todo.pop()
        if node is None or node in seen:
            continue
        seen.add(node)
        variable = getattr(node, "variable", None)
        if variable is not None:
            found[id(variable)] = variable
        todo += [following for following, _ in node.next_functions]
    return found


def seeds_at(tensor: Tensor, place: Tensor, rows: Float[Tensor, "target d"]) -> Float[Tensor, "target ..."]:
    """Gradients of targets at a tensor of one prompt: each has its row, at its place."""
    d = rows.shape[1]
    seeds = tensor.new_zeros(len(place), tensor.numel() // d, d)
    seeds[torch.arange(len(place), device=seeds.device), place] = rows.to(seeds)
    return seeds.reshape(len(place), *tensor.shape)


def through(
    gradient: Float[Tensor, "target pos d"],
    rows: Float[Tensor, "node d"],
    values: Float[Tensor, " node"],
    place: Tensor,
) -> Float[Tensor, "target node"]:
    """What nodes contribute that write `rows` times their values, each at its place."""
    nodes = gradient.new_zeros(len(gradient), len(place))
    values = values.to(gradient)
    for position in place.unique().tolist():
        here = (place == position).nonzero()[:, 0].to(gradient.device)
        nodes[:, here] = (gradient[:, position] @ rows[here].mT) * values[here]
    return nodes


def of_prompt(value: Float[Tensor, "1 pos ..."]) -> Float[Tensor, "pos d"]:
    return value[0].flatten(1)


def wide(tensor: Tensor) -> Tensor:
    """In float32 at least: products of bfloat16 lose what sums need."""
    return tensor if tensor.dtype == torch.float64 else tensor.float()


def summed(product: Float[Tensor, "target pos d"]) -> Float[Tensor, "target pos"]:
    """Over the last axis, in float64 on the CPU."""
    if product.device.type == "mps":  # no float64 there
        return product.sum(-1).cpu().double()
    return product.sum(-1, dtype=torch.float64).cpu()


Chosen = Int[Tensor, "node 3"]
"""Slot, position and unit of each chosen node, ordered by slot. Slots are layers where every layer has neurons."""
