"""Slots: where the nodes of a circuit live, one a layer, as the forward pass reaches them.

A slot says three things about its nodes: what they are in a run, from which tensor of the graph each is read as the
target of edges, and at which tensor the gradient says what each contributes as a source. Neurons are read and written
at one hook point. Features of a dictionary are read by its encoder at one and written by its decoder at another:

    value at hook_out = features @ W_dec + b_dec + skip(x) + error      the model's own value, bit for bit

of which only the features and the skip have a past (local replacement): a feature that fires is its pre-activation, a
linear function of the dictionary's input, and one that does not stays at zero; the error is a constant of the prompt.
Source: Marks et al. 2025, arXiv 2403.19647 (errors); Ameisen et al. 2025 (local replacement); METHODS 4.3, 4.5.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Protocol, runtime_checkable

import torch
from jaxtyping import Float, Int
from torch import Tensor

from .._errors import SettingsError
from ..bases import ActivationSite, Basis, DictionarySite, Neurons, name_of, sites_of
from ..models import MLPSites, TransformerLensModel, find_sites
from ._edges_dictionary import LinearEncoder, find_reader, linear_encoder

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
    """What gradients of nodes are taken at."""
    factor: Float[Tensor, "pos unit"] | None = None
    """Frozen: a feature's value over its linear pre-activation; zero where it does not fire."""


@dataclass(frozen=True)
class SlotChange:
    """Values of a run at a slot minus their baseline."""

    nodes: Float[Tensor, "pos unit"]
    error: Float[Tensor, "pos d"] | None
    written: Float[Tensor, "pos d"] | None
    """What all features together write; None for neurons, which are written as they are."""
    width: int
    """Numbers in a gradient at the source, a position."""


@dataclass(frozen=True)
class Arrivals:
    """What reaches each target from a slot."""

    nodes: Float[Tensor, "target node"]
    everything: Float[Tensor, "target pos"]
    error: Float[Tensor, "target pos"] | None
    bias: Float[Tensor, " target"] | None


@runtime_checkable
class Slot(Protocol):
    """The nodes of one layer.

    Example:
        >>> import tl_neuron_circuits as tnc
        >>> from tl_neuron_circuits import attribution
        >>> model = tnc.load_demo_model()
        >>> (slot,) = attribution.slots_of(model, tnc.bases.Neurons([2]))
        >>> isinstance(slot, attribution.Slot)
        True
    """

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
        """Forward pre-hooks of hook points, for values that are read before TransformerLens' hooks."""
        ...

    def hooks(self, seen: Seen, *, cut: bool) -> Hooks:
        """Forward hooks. With `cut`, later layers read a leaf."""
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

    def seeds(self, run: SlotRun, place: Tensor, unit: Tensor) -> Float[Tensor, "target ..."]:
        """Gradients of chosen nodes at `run.reading`."""
        ...

    def constant(self, run: SlotRun, place: Tensor, unit: Tensor) -> Float[Tensor, " target"] | None:
        """The part of chosen nodes that does not depend on `run.reading`; None where there is none."""
        ...

    def arrivals(
        self, gradient: Float[Tensor, "target pos d"], change: SlotChange, place: Tensor, unit: Tensor
    ) -> Arrivals:
        """Products of values and gradients: of chosen nodes, of all, of the error and of the decoder's bias."""
        ...

    def bias_score(self, run: SlotRun, gradient: Float[Tensor, "pos d"]) -> float:
        """The biases of encoder and decoder times their gradients."""
        ...


def slots_of(model: TransformerLensModel, basis: Basis | Sequence[Basis]) -> tuple[Slot, ...]:
    """One slot a layer, in the order of the layers.

    Layers without nodes are paths between the others, their MLPs under the rules of relevance propagation.

    Raises:
        SettingsError: a basis other than neurons and dictionaries, two that claim one layer, or a dictionary that is
            not linear once its features are known.

    Example:
        >>> import tl_neuron_circuits as tnc
        >>> from tl_neuron_circuits import attribution
        >>> model = tnc.load_demo_model()
        >>> [slot.hook for slot in attribution.slots_of(model, tnc.bases.Neurons([0, 2]))]
        ['blocks.0.mlp.hook_post', 'blocks.2.mlp.hook_post']
    """
    mlps = {mlp.post: mlp for mlp in find_sites(model).mlps}
    slots: list[Slot] = []
    for site in sites_of(model, basis):
        if isinstance(site, DictionarySite):
            slots.append(DictionarySlot(site, linear_encoder(site.dictionary), find_reader(model, site)))
        elif isinstance(site, ActivationSite) and site.letter == Neurons.letter and site.hook in mlps:
            slots.append(NeuronSlot(mlps[site.hook]))
        else:
            raise SettingsError(
                f"the nodes of a circuit are neurons or features of dictionaries; got the basis {name_of(basis)}. "
                "attribute(model, pairs, basis=...) scores the components of other activations."
            )
    layers = [slot.layer for slot in slots]
    twice = sorted({layer for layer in layers if layers.count(layer) > 1})
    if twice:
        raise SettingsError(
            f"expected one kind of nodes a layer; several bases have nodes in layers {twice}. Restrict one of them, as "
            "in basis=[bases.Neurons(layers=[0, 1]), bases.Dictionaries(of_layers_2_and_3)]."
        )
    return tuple(sorted(slots, key=lambda slot: slot.layer))


def keep(seen: Seen, key: str) -> Callable[..., Tensor]:
    """A hook that keeps the value. Returning it keeps reshaped views in the graph."""

    def hook(value: Tensor, hook: Any) -> Tensor:
        seen[key] = value
        return value

    return hook


@dataclass(frozen=True)
class NeuronSlot:
    """The neurons of one MLP: read, written and cut at its `hook_post`."""

    mlp: MLPSites
    letter: str = "N"
    has_error: bool = False

    @property
    def layer(self) -> int:
        return self.mlp.layer

    @property
    def hook(self) -> str:
        return self.mlp.post

    def early_hooks(self, seen: Seen) -> list[tuple[str, Callable[..., None]]]:
        return []

    def hooks(self, seen: Seen, *, cut: bool) -> Hooks:
        def neurons(value: Tensor, hook: Any) -> Tensor:
            seen["written"] = value
            seen["read"] = value.detach().requires_grad_(True) if cut and torch.is_grad_enabled() else value
            return seen["read"]

        branches = () if self.mlp.up is None else (("gate", self.mlp.pre), ("up", self.mlp.up))
        return [(self.mlp.post, neurons), *((name, keep(seen, key)) for key, name in branches)]

    def run(self, seen: Seen) -> SlotRun:
        return SlotRun(_of_prompt(seen["written"].detach()), None, seen["written"], seen["read"])

    def change(self, run: SlotRun, base: SlotRun | None) -> SlotChange:
        nodes = run.nodes if base is None else run.nodes - base.nodes
        return SlotChange(nodes, None, None, nodes.shape[-1])

    def node_gradient(self, gradient: Tensor) -> Tensor:
        return wide(gradient)

    def seeds(self, run: SlotRun, place: Tensor, unit: Tensor) -> Tensor:
        seeds = run.reading.new_zeros(len(place), *run.nodes.shape)
        seeds[torch.arange(len(place), device=seeds.device), place.to(seeds.device), unit.to(seeds.device)] = 1
        return seeds.reshape(len(place), *run.reading.shape)

    def constant(self, run: SlotRun, place: Tensor, unit: Tensor) -> None:
        return None

    def arrivals(self, gradient: Tensor, change: SlotChange, place: Tensor, unit: Tensor) -> Arrivals:
        product = wide(gradient) * wide(change.nodes)
        nodes = product[:, place.to(product.device), unit.to(product.device)].cpu().double()
        return Arrivals(nodes, summed(product), None, None)

    def bias_score(self, run: SlotRun, gradient: Tensor) -> float:
        return 0.0


@dataclass(frozen=True, eq=False)
class DictionarySlot:
    """The features of one dictionary, with an error node a position."""

    site: DictionarySite
    encoder: LinearEncoder
    reader: Any
    letter: str = "F"
    has_error: bool = True

    @property
    def layer(self) -> int:
        return self.site.layer

    @property
    def hook(self) -> str:
        return self.site.hook

    def early_hooks(self, seen: Seen) -> list[tuple[str, Callable[..., None]]]:
        return self.reader.early_hooks(seen)

    def hooks(self, seen: Seen, *, cut: bool) -> Hooks:
        apart = self.site.hook_in != self.site.hook
        readers: Hooks = [(self.site.hook_in, keep(seen, "x"))] if apart else []
        return [*readers, (self.site.hook, self._replace(seen, cut))]

    def _replace(self, seen: Seen, cut: bool) -> Callable[..., Tensor]:
        def replace(value: Tensor, hook: Any) -> Tensor:
            if self.site.hook_in == self.site.hook:
                seen["x"] = value
            with torch.no_grad():
                values = {self.site.hook_in: seen["x"].detach(), self.site.hook: value.detach()}
                parts = self.site.take_apart(values)
            seen["nodes"], seen["error"] = parts.nodes[0], parts.vectors["error"][0]
            if not torch.is_grad_enabled():
                return value
            x = self.reader.input(seen).reshape(1, seen["nodes"].shape[0], -1)
            seen["reading"] = self.encoder.normalise(x)
            seen["factor"] = self.encoder.factor(x.detach(), parts.nodes)[0]
            if cut:
                features = seen["source"] = value.detach().requires_grad_(True)
            else:
                features = self._features(seen, value)
            skip = self.site.dictionary.skip(x)
            standing = [features] if skip is None else [features, skip.reshape(value.shape).to(value.dtype)]
            out: Any = StandIn.apply(value, *standing)
            if not cut:
                seen["source"] = out
            return out

        return replace

    def _features(self, seen: Seen, value: Tensor) -> Tensor:
        """What the features write, with a past: all of them, since all take part in total effects."""
        nodes = self.encoder.features(seen["reading"], seen["factor"])
        self.encoder.check(nodes.detach()[0], seen["nodes"])
        return (nodes @ self.site.dictionary.W_dec.to(nodes)).reshape(value.shape).to(value.dtype)

    def run(self, seen: Seen) -> SlotRun:
        nothing = torch.zeros(())
        reading, source = seen.get("reading", nothing), seen.get("source", nothing)
        return SlotRun(seen["nodes"], seen["error"], reading, source, seen.get("factor"))

    def change(self, run: SlotRun, base: SlotRun | None) -> SlotChange:
        assert run.error is not None
        nodes, error = run.nodes, run.error
        if base is not None:
            assert base.error is not None
            nodes, error = nodes - base.nodes, error - base.error
        return SlotChange(nodes, error, nodes @ self.site.dictionary.W_dec.to(nodes), error.shape[-1])

    def node_gradient(self, gradient: Tensor) -> Tensor:
        gradient = wide(gradient)
        return gradient @ self.site.dictionary.W_dec.to(gradient).mT

    def seeds(self, run: SlotRun, place: Tensor, unit: Tensor) -> Tensor:
        assert run.factor is not None
        place, unit = place.to(run.reading.device), unit.to(run.reading.device)
        seeds = run.reading.new_zeros(len(place), *run.reading.shape)
        columns = self.encoder.weight[:, unit.to(self.encoder.weight.device)].mT.to(seeds)
        seeds[torch.arange(len(place), device=seeds.device), 0, place] = columns * run.factor[place, unit, None]
        return seeds

    def constant(self, run: SlotRun, place: Tensor, unit: Tensor) -> Tensor:
        assert run.factor is not None
        place, unit = place.to(run.factor.device), unit.to(run.factor.device)
        return (run.factor[place, unit] * self.encoder.bias.to(run.factor)[unit]).cpu().double()

    def arrivals(self, gradient: Tensor, change: SlotChange, place: Tensor, unit: Tensor) -> Arrivals:
        assert change.written is not None and change.error is not None
        gradient = gradient.to(change.written)
        nodes = gradient.new_zeros(len(gradient), len(place))
        for position in place.unique().tolist():
            here = (place == position).nonzero()[:, 0].to(nodes.device)
            units = unit[place == position].to(nodes.device)
            rows = self.site.dictionary.W_dec.to(gradient)[units]
            nodes[:, here] = (gradient[:, position] @ rows.mT) * change.nodes[position, units]
        bias = gradient.sum(1) @ self.site.dictionary.b_dec.to(gradient)
        return Arrivals(
            nodes.cpu().double(),
            summed(gradient * change.written),
            summed(gradient * change.error),
            bias.cpu().double(),
        )

    def bias_score(self, run: SlotRun, gradient: Tensor) -> float:
        assert run.factor is not None
        gradient = gradient.to(run.factor)
        decoder = gradient.sum(0) @ self.site.dictionary.b_dec.to(gradient)
        encoder = (self.node_gradient(gradient) * run.factor).sum(0) @ self.encoder.bias.to(gradient)
        return float(decoder + encoder)


class StandIn(torch.autograd.Function):
    """The first argument's value, bit for bit; the gradient goes to all the others instead."""

    @staticmethod
    def forward(ctx: Any, value: Tensor, *standing: Tensor) -> Tensor:
        ctx.count = len(standing)
        return value.detach()

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        return (None, *gradients * ctx.count)


def _of_prompt(value: Float[Tensor, "1 pos ..."]) -> Float[Tensor, "pos d"]:
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
