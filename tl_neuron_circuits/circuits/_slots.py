"""Slots: where the nodes of one layer live, as the forward pass reaches them. Neurons, or features of a dictionary.

A slot answers three questions about its nodes: what their values are in a run, from which tensor of the graph each is
read as the receiver of edges, and at which tensor the gradient tells what each contributes as a source. In a run every
slot writes a leaf: later layers read a copy without a past, so that gradients at the leaf are direct effects.

A cross-layer transcoder has one slot per layer like any other dictionary: its features are read there, and its leaf
is that layer's output. At that leaf stand the features of earlier layers too (`receives_from`): their contributions to
a receiver add up over the leaves they write to, and so do their gradients.
"""

from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from .._errors import SettingsError
from ..bases._activations import ActivationSite, Neurons
from ..bases._dictionary_basis import DictionarySite
from ..bases._site import Basis, basis_name, basis_sites
from ..models._protocol import TransformerLensModel, hook_points, submodule
from ..models._sites import MLPSites, bias_after_product, find_sites
from ..models._threads import keep_value
from ._linear_encoder import LinearEncoder, NormReader, PlainReader, find_reader, linear_encoder

Hooks = list[tuple[str, Callable[..., Tensor]]]
Seen = dict[str, Tensor]
"""What the hooks of one slot recorded in one run."""
Chosen = Int[Tensor, "node 3"]
"""Slot, position and unit of each chosen node."""


@dataclass(frozen=True)
class SlotRun:
    """One slot in one run. Positions are those of all its prompts, one prompt's after the other's."""

    nodes: Float[Tensor, "pos unit"]
    """Values, without a graph."""
    reading: Float[Tensor, "..."]
    """Where receivers are read."""
    source: Float[Tensor, "..."]
    """The leaf that the nodes write: gradients of all of them are taken here."""
    error: Float[Tensor, "pos d"] | None = None
    factor: Float[Tensor, "pos unit"] | None = None
    """Frozen: a feature's value over its linear pre-activation; zero where it does not fire."""
    gate: Float[Tensor, "pos unit"] | None = None
    up: Float[Tensor, "pos unit"] | None = None
    output: "Output | None" = None
    """Where gradients of a few nodes are cheaper than at `source`."""
    input: "Input | None" = None
    """Where a few nodes are cheaper to read than at `reading`."""
    written: Float[Tensor, "pos d"] | None = None
    """What the features of all layers write here, for a cross-layer transcoder."""


@dataclass(frozen=True, eq=False)
class Linear:
    """Weights `[in, out]` of an MLP, and the bias after them."""

    weights: Float[Tensor, "d_in d_out"]
    bias: Float[Tensor, " d_out"] | None


@dataclass(frozen=True, eq=False)
class Output:
    """What the MLP writes: `neurons @ weights`, and a bias. Measured, not assumed."""

    tensor: Float[Tensor, "..."]
    """In the graph, as wide as the residual stream."""
    weights: Float[Tensor, "d_mlp d_model"]
    written: Float[Tensor, "pos d_model"]
    """Without the bias, in float32 or wider."""


@dataclass(frozen=True, eq=False)
class Input:
    """What the MLP reads. The graph above it has nothing but these branches, `tensor @ weights`, and biases."""

    tensor: Float[Tensor, "..."]
    branches: tuple[tuple[Tensor, Linear], ...]


@dataclass(frozen=True)
class SlotChange:
    """Values at a slot minus their baseline."""

    nodes: Float[Tensor, "pos unit"]
    error: Float[Tensor, "pos d"] | None
    written: Float[Tensor, "pos d"] | None
    """What all nodes together write; None where that is not known."""


@dataclass(frozen=True, eq=False)
class Reading:
    """Receivers: the gradient of each at a tensor, and the part of each that does not come from there."""

    tensor: Float[Tensor, "..."]
    seeds: Float[Tensor, "receiver ..."]
    constant: Float[Tensor, " receiver"] | None = None


@dataclass(frozen=True)
class Contributions:
    """What one slot contributes to each receiver."""

    nodes: Float[Tensor, "receiver node"]
    everything: Float[Tensor, "receiver pos"]
    error: Float[Tensor, "receiver pos"] | None = None
    bias: Float[Tensor, " receiver"] | None = None


_ALLOWED = {torch.float64: 1e-9, torch.float32: 1e-5, torch.float16: 5e-3, torch.bfloat16: 2e-2}
_ROWS_AT_ONCE = 4096  # of W_out, when they are converted to float32


@dataclass(frozen=True, eq=False, repr=False)
class NeuronSlot:
    """The neurons of one MLP: read, written and cut at `hook_post`.

        MLP output = neurons @ W_out + b_out            so  d a_t / d a_s = W_out[s] . d a_t / d output
        a_t = c * pre_t (+ c' * up_t), pre = x @ W_in   so  d a_t / d x   = c W_in[:, t] (+ c' W_up[:, t])

    Where that holds, gradients are read at the output and begun at the input x, both as wide as the residual stream,
    and only the chosen neurons' rows and columns of the weights are used (at 12 x 768 `trace` takes half the time).
    It is measured on every prompt, not looked up. Where something else is in between (a norm after the MLP, as in
    Gemma 2 on HookedTransformer, or inside it, as with solu_ln), gradients of all neurons are taken instead.
    """

    mlp: MLPSites
    path: str
    out: Linear | None
    outputs: tuple[str, ...]
    """Hook points at which the MLP's output may appear."""
    into: tuple[Linear | None, ...]
    """Into `pre`, and into `up` where the MLP is gated."""
    after_product: Float[Tensor, " d_mlp"] | None
    letter: str = "N"
    has_error: bool = False

    @property
    def layer(self) -> int:
        return self.mlp.layer

    @property
    def hook(self) -> str:
        """Where the nodes write."""
        return self.mlp.post

    def early_hooks(self, seen: Seen) -> list[tuple[str, Callable[..., None]]]:
        """Forward pre-hooks of hook points and modules: values before anybody's TransformerLens hooks edit them."""
        return [(name, partial(note_input, seen, name)) for name in (*self.outputs, self.path)]

    def hooks(self, seen: Seen) -> Hooks:
        """Forward hooks. With a graph, later layers read a leaf."""
        branches = [("pre", self.mlp.pre)] + ([] if self.mlp.up is None else [("up", self.mlp.up)])
        readers = [(name, partial(keep_value, seen, key)) for key, name in branches]
        return [(self.mlp.post, partial(_write_leaf, seen)), *readers]

    def run(self, seen: Seen) -> SlotRun:
        """What the hooks recorded."""
        written, read = seen["written"], seen["read"]
        nodes = by_position(written.detach())
        if not written.requires_grad:
            return SlotRun(nodes, written, read)
        gate, up = (by_position(seen[key].detach()) if "up" in seen else None for key in ("pre", "up"))
        return SlotRun(
            nodes, written, read, gate=gate, up=up, output=self._output(nodes, seen), input=self._input(seen)
        )

    @torch.no_grad()
    def _output(self, nodes: Float[Tensor, "pos d_mlp"], seen: Seen) -> Output | None:
        """The tensor that is what the neurons write, rebuilt from the weights; None where none is."""
        if self.out is None or self.out.weights.shape[0] != nodes.shape[1]:
            return None
        written = None
        for tensor in (seen[name] for name in self.outputs if name in seen):
            if tensor.grad_fn is None:
                continue
            written = _write(nodes, self.out.weights) if written is None else written
            if tensor.numel() != written.numel():
                continue
            value = widened(tensor.reshape(written.shape))
            off = (written if self.out.bias is None else written + self.out.bias.to(written)) - value
            if float(off.abs().max()) <= _ALLOWED.get(tensor.dtype, 1e-5) * float(value.abs().max()):
                return Output(tensor, self.out.weights, written)
        return None

    def _input(self, seen: Seen) -> Input | None:
        """The tensor that the neurons read, where the graph has nothing but biases beside it."""
        x, values = seen.get(self.path), [seen[name] for name in ("pre", "up") if name in seen]
        into = [linear for linear in self.into if linear is not None]
        graphless = [value for value in (x, *values) if value is None or value.grad_fn is None]
        if x is None or graphless or len(into) != len(values) or self.mlp.activated != self.mlp.post:
            return None
        beside = leaves_of([seen["written"]], values) | leaves_of(values, [x])
        if not all(isinstance(leaf, nn.Parameter) for leaf in beside.values()):
            return None
        return Input(x, tuple(zip(values, into, strict=True)))

    def change(self, run: SlotRun, base: SlotRun | None) -> SlotChange:
        """Values minus those of the base run, or minus zero."""
        if base is None:
            return SlotChange(run.nodes, None, None if run.output is None else run.output.written)
        nodes = run.nodes - base.nodes
        return SlotChange(nodes, None, None if run.output is None else _write(nodes, run.output.weights))

    def node_gradient(self, gradient: Float[Tensor, "*receiver pos d"]) -> Float[Tensor, "*receiver pos unit"]:
        """The gradient at every node, from that at the source."""
        return widened(gradient)

    def receives_from(self, other: "Slot") -> bool:
        """Whether nodes of an earlier slot write to this one's source."""
        return False

    def pass_on(
        self, run: SlotRun, gradient: Float[Tensor, "..."], nodes: Float[Tensor, "*receiver pos unit"]
    ) -> Tensor:
        """From the gradients at the source, and at the nodes, to that at `run.reading`, all nodes together."""
        return gradient

    def read(
        self, run: SlotRun, place: Tensor, unit: Tensor, receiver: Tensor | None = None, factor: Tensor | None = None
    ) -> Reading:
        """Chosen nodes as receivers: each its own, or `receiver[i]` the sum of its nodes, each times its factor."""
        place, unit = place.to(run.reading.device), unit.to(run.reading.device)
        receiver = (torch.arange(len(place)) if receiver is None else receiver).to(place.device)
        factor = torch.ones(len(place)) if factor is None else factor
        found = None if run.input is None else self._read_at_input(run, run.input, place, unit)
        if found is not None and run.input is not None:
            rows, constant = found
            seeds = seeds_at(run.input.tensor, place, rows * factor.to(rows)[:, None], receiver)
            return Reading(run.input.tensor, seeds, sum_by(receiver, constant * factor.to(constant)))
        seeds = run.reading.new_zeros(int(receiver.max()) + 1, *run.nodes.shape)
        seeds[receiver, place, unit] = factor.to(seeds)
        return Reading(run.reading, seeds.reshape(len(seeds), *run.reading.shape))

    def _read_at_input(
        self, run: SlotRun, read: Input, place: Tensor, unit: Tensor
    ) -> tuple[Float[Tensor, "node d_in"], Float[Tensor, " node"]] | None:
        """Gradients at the MLP's input, and constants; None where a neuron is not what its weights make of it."""
        chosen = torch.zeros_like(run.nodes)
        chosen[place, unit] = 1
        values, seed = [value for value, _ in read.branches], chosen.reshape(run.reading.shape)
        slopes = torch.autograd.grad(run.reading, values, seed, retain_graph=True, allow_unused=True)
        x = widened(read.tensor.detach().reshape(len(run.nodes), -1)[place])
        rows, constant = 0.0, 0.0
        for (value, linear), slope in zip(read.branches, slopes, strict=True):
            if slope is None or slope.numel() != chosen.numel():
                return None
            slope, value = slope.reshape(chosen.shape), value.detach().reshape(chosen.shape)
            share = slope[place, unit]
            spreads = int(slope.count_nonzero()) != int(share.count_nonzero())  # to branches of other neurons
            if spreads or linear.weights.shape != (x.shape[1], chosen.shape[1]):
                return None
            columns = widened(linear.weights[:, unit].mT)
            bias = columns.new_zeros(len(unit)) if linear.bias is None else widened(linear.bias[unit])
            off = ((x * columns).sum(1) + bias - widened(value[place, unit])).abs()
            size = (x * columns).abs().sum(1) + bias.abs()
            if not bool((off <= _ALLOWED.get(value.dtype, 1e-5) * size).all()):
                return None
            share = widened(share)
            rows, constant = rows + share[:, None] * columns, constant + share * bias
        if self.after_product is not None:
            constant = constant + widened(self.after_product[unit])
        assert isinstance(rows, Tensor) and isinstance(constant, Tensor)
        return rows, constant.cpu().double()

    def contributions(
        self, gradient: Float[Tensor, "receiver pos d"], run: SlotRun, change: SlotChange, place: Tensor, unit: Tensor
    ) -> Contributions:
        """Values times gradients: of chosen nodes, of all, of the error and of the decoder's bias.

        The gradient is at the output where the run has one, else at the source.
        """
        gradient = widened(gradient)
        place, unit = place.to(gradient.device), unit.to(gradient.device)
        if run.output is None or change.written is None:
            product = gradient * widened(change.nodes)
            return Contributions(product[:, place, unit].cpu().double(), sum_last_axis(product))
        rows = run.output.weights[unit.to(run.output.weights.device)].to(gradient)
        nodes = written_by_nodes(gradient, rows, change.nodes.to(gradient.device)[place, unit], place)
        return Contributions(nodes.cpu().double(), sum_last_axis(gradient * change.written.to(gradient)))

    def bias_score(self, run: SlotRun, gradient: Float[Tensor, "pos d"], nodes: Float[Tensor, "pos unit"]) -> float:
        """The biases of encoder and decoder times their gradients; `nodes` are those at the nodes."""
        return 0.0


def neuron_slot(model: TransformerLensModel, mlp: MLPSites, points: Collection[str]) -> NeuronSlot:
    """The slot of an MLP, with the linear maps that its module shows. They are used where they prove right."""
    path = mlp.post.removesuffix(".hook_post")
    module, after = submodule(model, path), bias_after_product(model, mlp.layer)
    up = _linear(module, "W_in", "b_in" if after is None else "")
    outputs = tuple(n for n in (f"{path}.hook_out", f"blocks.{mlp.layer}.hook_mlp_out") if n in points)
    return NeuronSlot(
        mlp, path, _linear(module, "W_out", "b_out"), outputs,
        into=(up,) if mlp.up is None else (_linear(module, "W_gate", "b_gate"), up),
        after_product=None if after is None else after.detach(),
    )  # fmt: skip


def _linear(module: nn.Module | None, weights: str, bias: str) -> Linear | None:
    tensor, added = (getattr(module, name, None) if name else None for name in (weights, bias))
    if not isinstance(tensor, Tensor) or tensor.dim() != 2:
        return None
    return Linear(tensor.detach(), added.detach() if isinstance(added, Tensor) else None)


def _write_leaf(seen: Seen, value: Tensor, hook: Any) -> Tensor:
    """As a hook: what later layers read is a leaf, where there is a graph."""
    seen["written"] = value
    seen["read"] = as_leaf(value)
    return seen["read"]


def _write(nodes: Float[Tensor, "pos d_mlp"], weights: Float[Tensor, "d_mlp d_model"]) -> Float[Tensor, "pos d_model"]:
    """nodes @ weights in float32 or wider, without a converted copy of all weights."""
    blocks = zip(widened(nodes).split(_ROWS_AT_ONCE, 1), weights.to(nodes.device).split(_ROWS_AT_ONCE), strict=True)
    parts = [some @ rows.to(some) for some, rows in blocks]
    return torch.stack(parts).sum(0) if len(parts) > 1 else parts[0]


@dataclass(frozen=True, eq=False, repr=False)
class DictionarySlot:
    """The features of one dictionary, read at one hook point, written at another, with an error node per position.

        value at hook_out = features @ W_dec + b_dec + skip(x) + error      the model's own value, bit for bit

    of which only the features and the skip have a past (local replacement): a feature that fires is its
    pre-activation, a linear function of the dictionary's input, and one that does not stays at zero; the error is a
    constant of the prompt. Methods as in `NeuronSlot`.
    Source: Marks et al. 2025, arXiv 2403.19647 (errors); Ameisen et al. 2025 (local replacement); METHODS 4.3, 4.5.
    """

    site: DictionarySite
    encoder: LinearEncoder
    reader: PlainReader | NormReader
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

    def hooks(self, seen: Seen) -> Hooks:
        keys = {name: "x" if name == self.site.hook_in else name for name in self.site.reads if name != self.site.hook}
        readers: Hooks = [(name, partial(keep_value, seen, key)) for name, key in keys.items()]
        return [*readers, (self.site.hook, partial(self._replace, seen))]

    def _replace(self, seen: Seen, value: Tensor, hook: Any) -> Tensor:
        if self.site.hook_in == self.site.hook:
            seen["x"] = value
        with torch.no_grad():
            inputs = {site.hook_in: seen[site.hook_in].detach() for site in self.site.before}
            inputs |= {self.site.hook_in: seen["x"].detach(), self.site.hook: value.detach()}
            parts = self.site.take_apart(inputs)
            if self.site.before:
                seen["written"] = by_position(self.site.written(parts.nodes, parts.earlier))
        seen["nodes"], seen["error"] = by_position(parts.nodes), by_position(parts.vectors["error"])
        if not torch.is_grad_enabled():
            return value
        x = self.reader.input(seen).reshape(1, seen["nodes"].shape[0], -1)
        seen["reading"] = self.encoder.normalize(x)
        seen["factor"] = self.encoder.factor(x.detach(), seen["nodes"][None])[0]
        with torch.no_grad():
            self.encoder.check(self.encoder.features(seen["reading"], seen["factor"])[0], seen["nodes"])
        features = seen["source"] = value.detach().requires_grad_(True)
        skip = self.site.dictionary.skip(x)
        if skip is None:
            return _StandIn.apply(value, features)  # pyright: ignore[reportReturnType]
        return _StandIn.apply(value, features, skip.reshape(value.shape).to(value.dtype))  # pyright: ignore[reportReturnType]

    def run(self, seen: Seen) -> SlotRun:
        nothing = torch.zeros(())  # a run without a graph has values only
        reading, source = seen.get("reading", nothing), seen.get("source", nothing)
        return SlotRun(seen["nodes"], reading, source, seen["error"], seen.get("factor"), written=seen.get("written"))

    def change(self, run: SlotRun, base: SlotRun | None) -> SlotChange:
        assert run.error is not None
        nodes, error, written = run.nodes, run.error, run.written
        if base is not None:
            assert base.error is not None
            nodes, error = nodes - base.nodes, error - base.error
            written = None if written is None or base.written is None else written - base.written
        if written is None:
            written = self.site.dictionary.write(nodes, self.site.dictionary.W_dec)
        return SlotChange(nodes, error, written)

    def node_gradient(self, gradient: Float[Tensor, "*receiver pos d"]) -> Float[Tensor, "*receiver pos unit"]:
        return self.gradient_of(self, gradient)

    def receives_from(self, other: "Slot") -> bool:
        return isinstance(other, DictionarySlot) and other.hook in self.site.earlier

    def gradient_of(
        self, other: "DictionarySlot", gradient: Float[Tensor, "*receiver pos d"]
    ) -> Float[Tensor, "*receiver pos unit"]:
        """The gradient at the nodes of a slot that writes here, from that at this source."""
        gradient = widened(gradient)
        return gradient @ other.site.decoder(self.hook).to(gradient).mT

    def contributions_of(
        self, other: "DictionarySlot", gradient: Float[Tensor, "receiver pos d"], change: SlotChange, place: Tensor,
        unit: Tensor,
    ) -> Float[Tensor, "receiver node"]:  # fmt: skip
        """What chosen nodes of a slot contribute that write here; `change` is that slot's."""
        decoder, gradient = other.site.decoder(self.hook), gradient.to(change.nodes)
        rows = decoder[unit.to(decoder.device)].to(gradient)
        values = change.nodes[place.to(gradient.device), unit.to(gradient.device)]
        return written_by_nodes(gradient, rows, values, place).cpu().double()

    def pass_on(
        self, run: SlotRun, gradient: Float[Tensor, "..."], nodes: Float[Tensor, "*receiver pos unit"]
    ) -> Tensor:
        assert run.factor is not None
        nodes = nodes.to(run.factor) * run.factor
        passed = nodes.to(run.reading) @ self.encoder.weight.to(run.reading).mT
        return passed.reshape(*nodes.shape[:-2], *run.reading.shape)

    def read(
        self, run: SlotRun, place: Tensor, unit: Tensor, receiver: Tensor | None = None, factor: Tensor | None = None
    ) -> Reading:
        assert run.factor is not None
        place, unit = place.to(run.reading.device), unit.to(run.reading.device)
        receiver = (torch.arange(len(place)) if receiver is None else receiver).to(place.device)
        fires = run.factor.to(run.reading.device)[place, unit]
        fires = fires if factor is None else fires * factor.to(fires)
        columns = self.encoder.weight[:, unit.to(self.encoder.weight.device)].mT.to(run.reading)
        constant = (fires * self.encoder.bias.to(fires)[unit]).cpu().double()
        seeds = seeds_at(run.reading, place, columns * fires[:, None], receiver)
        return Reading(run.reading, seeds, sum_by(receiver, constant))

    def contributions(
        self, gradient: Float[Tensor, "receiver pos d"], run: SlotRun, change: SlotChange, place: Tensor, unit: Tensor
    ) -> Contributions:
        assert change.written is not None and change.error is not None
        dictionary, gradient = self.site.dictionary, gradient.to(change.written)
        nodes = self.contributions_of(self, gradient, change, place, unit)
        bias = gradient.sum(1) @ dictionary.b_dec.to(gradient)
        return Contributions(
            nodes, sum_last_axis(gradient * change.written), sum_last_axis(gradient * change.error),
            bias.cpu().double(),
        )  # fmt: skip

    def bias_score(self, run: SlotRun, gradient: Float[Tensor, "pos d"], nodes: Float[Tensor, "pos unit"]) -> float:
        assert run.factor is not None
        gradient = gradient.to(run.factor)
        decoder = gradient.sum(0) @ self.site.dictionary.b_dec.to(gradient)
        encoder = (nodes.to(gradient) * run.factor).sum(0) @ self.encoder.bias.to(gradient)
        return float(decoder + encoder)


class _StandIn(torch.autograd.Function):
    """The first argument's value, bit for bit; the gradient goes to all the others instead."""

    @staticmethod
    def forward(ctx: Any, value: Tensor, *others: Tensor) -> Tensor:
        ctx.count = len(others)
        return value.detach()

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        return (None, *gradients * ctx.count)


Slot = NeuronSlot | DictionarySlot


def node_gradient(
    slots: Sequence[Slot], index: int, at_sources: Mapping[int, Float[Tensor, "pos d"]]
) -> Float[Tensor, "pos unit"]:
    """The gradient at every node of one slot, over all sources that it writes to."""
    own = slots[index]
    total = own.node_gradient(at_sources[index])
    for place, slot in enumerate(slots):
        if isinstance(slot, DictionarySlot) and isinstance(own, DictionarySlot) and slot.receives_from(own):
            total = total + slot.gradient_of(own, at_sources[place])
    return total


def by_position(value: Float[Tensor, "prompt pos ..."]) -> Float[Tensor, "position unit"]:
    """All positions of all prompts as rows."""
    return value.flatten(0, 1).flatten(1)


def find_slots(model: TransformerLensModel, basis: Basis | Sequence[Basis]) -> tuple[Slot, ...]:
    """One slot per layer, in the order of the layers.

    Layers without nodes are paths between the others, their MLPs under the rules of relevance propagation.

    Raises:
        SettingsError: a basis other than neurons and dictionaries, two that claim one layer, or a dictionary that is
            not linear once its features are known.
    """
    mlps = {mlp.post: mlp for mlp in find_sites(model).mlps}
    points = hook_points(model)  # looked up once: TransformerBridge builds them anew every time
    slots: list[Slot] = []
    for site in basis_sites(model, basis):
        if isinstance(site, DictionarySite):
            slots.append(DictionarySlot(site, linear_encoder(site.dictionary), find_reader(model, site)))
        elif isinstance(site, ActivationSite) and site.letter == Neurons.letter and site.hook in mlps:
            slots.append(neuron_slot(model, mlps[site.hook], points))
        else:
            raise SettingsError(
                f"the nodes of a circuit are neurons or features of dictionaries; got the basis {basis_name(basis)}. "
                "attribute(model, pairs, basis=...) scores the components of other activations."
            )
    layers = [slot.layer for slot in slots]
    twice = sorted({layer for layer in layers if layers.count(layer) > 1})
    if twice:
        raise SettingsError(
            f"expected one kind of node per layer; several bases have nodes in layers {twice}. Restrict one of them, "
            "as in basis=[bases.Neurons(layers=[0, 1]), bases.Dictionaries(those_of_layers_2_and_3)]."
        )
    return tuple(sorted(slots, key=lambda slot: slot.layer))


def as_leaf(value: Tensor) -> Tensor:
    """The value without a past, where there is a graph."""
    return value.detach().requires_grad_(True) if torch.is_grad_enabled() else value


def note_input(seen: Seen, key: str, module: Any, arguments: tuple[Tensor, ...]) -> None:
    """As a forward pre-hook: keep what enters a hook point, before anything replaces it."""
    if arguments:
        seen[key] = arguments[0]


def leaves_of(outputs: Iterable[Tensor], stops: Iterable[Tensor]) -> dict[int, Tensor]:
    """All leaves, by id, that gradients of `outputs` can reach without passing `stops`."""
    visited: set[Any] = {tensor.grad_fn for tensor in stops}
    todo: list[Any] = [tensor.grad_fn for tensor in outputs]
    leaves = {}
    while todo:
        node = todo.pop()
        if node is None or node in visited:
            continue
        visited.add(node)
        variable = getattr(node, "variable", None)
        if variable is not None:
            leaves[id(variable)] = variable
        todo += [following for following, _ in node.next_functions]
    return leaves


def seeds_at(
    tensor: Tensor, place: Tensor, rows: Float[Tensor, "row d"], receiver: Tensor | None = None
) -> Float[Tensor, "receiver ..."]:
    """Gradients of receivers at a tensor: each row at its place, a receiver of its own unless `receiver` says whose."""
    d = rows.shape[1]
    receiver = torch.arange(len(place), device=tensor.device) if receiver is None else receiver.to(tensor.device)
    seeds = tensor.new_zeros(int(receiver.max()) + 1 if len(receiver) else 0, tensor.numel() // d, d)
    seeds[receiver, place] = rows.to(seeds)
    return seeds.reshape(len(seeds), *tensor.shape)


def sum_by(receiver: Tensor, values: Float[Tensor, " row"]) -> Float[Tensor, " receiver"]:
    """The sum of each receiver's values."""
    receiver = receiver.to(values.device)
    return values.new_zeros(int(receiver.max()) + 1 if len(receiver) else 0).index_add_(0, receiver, values)


def written_by_nodes(
    gradient: Float[Tensor, "receiver pos d"],
    rows: Float[Tensor, "node d"],
    values: Float[Tensor, " node"],
    place: Tensor,
) -> Float[Tensor, "receiver node"]:
    """What nodes contribute that write `rows` times their values, each at its place."""
    nodes = gradient.new_zeros(len(gradient), len(place))
    values = values.to(gradient)
    for position in place.unique().tolist():
        here = (place == position).nonzero()[:, 0].to(gradient.device)
        nodes[:, here] = (gradient[:, position] @ rows[here].mT) * values[here]
    return nodes


def widened(tensor: Tensor) -> Tensor:
    """In float32 or wider: products of bfloat16 lose what sums need."""
    return tensor if tensor.dtype == torch.float64 else tensor.float()


def sum_last_axis(product: Float[Tensor, "receiver pos d"]) -> Float[Tensor, "receiver pos"]:
    """In float64, on the CPU."""
    if product.device.type == "mps":  # no float64 there
        return product.sum(-1).cpu().double()
    return product.sum(-1, dtype=torch.float64).cpu()
