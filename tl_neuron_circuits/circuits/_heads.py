"""Heads in the edges: which head brings each part of an edge, and from which position.

    weight(s -> t) = direct(s -> t) + sum of part(layer, head, q) over layers, heads and positions q

    part(layer, head, q) = A[head, p_t, q] * dv[q] . gz[head]
        dv[q]     what the source s brings to the head's values at q, by every path: earlier heads included
        gz[head]  gradient of the receiver t at the head's output z at t's position p_t, through the residual stream
                  alone: no head after this one
    direct(s -> t)       what s writes into the residual stream, read by t at once: zero unless p_s = p_t

So edges are split by the *last* head before the receiver, and the parts sum to the edge, exactly, with attention
patterns and norms frozen as in `_direct_effects.py`. Chains of heads are inside the parts: a part whose position q is
not the source's came to q through an earlier head.

The algorithm: gradients of all receivers walk down the residual stream (`_receivers`), sources walk up it as tangents
(`_walk_up`), and they meet at each head. A tangent is a Jacobian-vector product of the graph that is there anyway: the
derivative of its vector-Jacobian product. Two facts are used, each measured on every prompt and layer: z is the pattern
times the values, and a layer adds to the residual stream.
Source: the split by the last head is that of path patching (Goldowsky-Dill et al. 2023, arXiv 2304.05969), linearized.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Float, Int
from torch import Tensor

from .._errors import SettingsError, UnsupportedModelError
from ..models._protocol import TransformerLensModel, hook_points
from ._prompt_graph import PromptRun
from ._slots import seeds_at, widened
from ._total_effects import OpenPrompt

_ALLOWED = {torch.float64: 1e-8, torch.float32: 1e-4, torch.float16: 0.02, torch.bfloat16: 0.05}
_HOOKS = ("hook_v", "hook_pattern", "hook_z")


@dataclass(frozen=True)
class Sources:
    """Where edges begin: a node (slot, position, unit), an error node (unit -1), or an embedding (slot -1)."""

    slot: Int[Tensor, " source"]
    position: Int[Tensor, " source"]
    unit: Int[Tensor, " source"]


@dataclass(frozen=True)
class Receivers:
    """Where edges end: a node (slot, position, unit), or a target (slot = number of slots, unit = its number)."""

    slot: Int[Tensor, " receiver"]
    position: Int[Tensor, " receiver"]
    unit: Int[Tensor, " receiver"]


@dataclass(frozen=True)
class HeadParts:
    """Edges, each split by the last head before its receiver."""

    direct: Float[Tensor, " edge"]
    parts: Float[Tensor, "edge layer head pos"]

    @property
    def total(self) -> Float[Tensor, " edge"]:
        """The edges' weights."""
        return self.direct + self.parts.sum((1, 2, 3))


@dataclass(frozen=True)
class AttentionLayer:
    """The attention of one layer in the graph."""

    z: Float[Tensor, "1 pos ..."]
    v: Float[Tensor, "1 pos ..."]
    pattern: Float[Tensor, "head pos pos"]
    bottom: Tensor
    """The residual stream below; for the first layer the embedding."""
    top: Tensor
    """The residual stream above; for the last layer behind the final norm."""

    @property
    def shape(self) -> tuple[int, int, int]:
        """Heads, heads of keys and values, width of a head."""
        n_heads, n_positions = self.pattern.shape[:2]
        d_head = self.z.numel() // (n_heads * n_positions)
        return n_heads, self.v.numel() // (d_head * n_positions), d_head

    def mix(self, v: Float[Tensor, "source pos ..."]) -> Float[Tensor, "source pos ..."]:
        """z from values, with the pattern as it is."""
        n_heads, n_kv, d_head = self.shape
        v = v.reshape(len(v), -1, n_kv, d_head).repeat_interleave(n_heads // n_kv, 2)
        return torch.einsum("hpq,sqhd->sphd", self.pattern.to(v), v).reshape(len(v), *self.z.shape[1:])


def attention_hooks(model: TransformerLensModel) -> list[str]:
    """The hook points that `split_by_head` needs kept.

    Raises:
        UnsupportedModelError: one is missing.
    """
    names = [f"blocks.{layer}.attn.{name}" for layer in range(int(model.cfg.n_layers)) for name in _HOOKS]
    points = hook_points(model)
    missing = [name for name in names if name not in points]
    if missing:
        raise UnsupportedModelError(
            f"edges are split by head at hook_v, hook_pattern and hook_z of every layer; this model lacks {missing[0]} "
            f"and {len(missing) - 1} more. Its edges can be computed, but not split."
        )
    return names


def split_by_head(
    prompt: OpenPrompt, sources: Sources, receivers: Receivers, edges: Int[Tensor, "edge 2"]
) -> HeadParts:
    """Split edges, given as numbers of a source and a receiver, of one open prompt.

    Raises:
        UnsupportedModelError: heads are not where their hook points say, or the layers do not add to one stream.
        SettingsError: edges begin at features that write into several layers.
    """
    _refuse_later_writes(prompt, sources)
    layers = attention_layers(prompt.run)
    n_heads, n_positions = layers[0].pattern.shape[:2]
    gradients = _receivers(prompt, layers, receivers)
    first = torch.tensor([slot.layer for slot in prompt.slots] + [-1])[sources.slot]  # index -1 is the embedding's
    last = torch.tensor([slot.layer for slot in prompt.slots] + [len(layers)])[receivers.slot]
    parts = torch.zeros(len(edges), len(layers), n_heads, n_positions, dtype=torch.float64)
    source, receiver = edges.T
    # What the first layer reads is the embedding as it is; from there on it may have been multiplied by a factor.
    at_once = (first[source] == -1) & (last[receiver] == 0)
    at_once &= receivers.position[receiver] == sources.position[source]
    embedding = widened(prompt.embedding[0]).cpu().double()[sources.position[source]]
    direct = torch.where(at_once, (gradients.below[receiver] * embedding).sum(-1), 0.0)
    for layer, values, written in _walk_up(prompt, layers, sources, first):
        if values is not None:
            own = ((first[source] < layer) & (last[receiver] >= layer)).nonzero()[:, 0]
            at = receivers.position[receiver[own]]
            _, n_kv, d_head = layers[layer].shape
            dv = values[source[own]].reshape(len(own), n_positions, n_kv, d_head)
            gz = gradients.at_heads[layer][receiver[own]].reshape(len(own), n_heads, d_head)
            dv = dv.repeat_interleave(n_heads // n_kv, 2)
            pattern = layers[layer].pattern.cpu().double()[:, at].transpose(0, 1)
            parts[own, layer] = pattern * torch.einsum("eqhd,ehd->ehq", dv, gz)
        own = (first[source] == layer) & (last[receiver] > max(layer, 0))
        own = (own & (receivers.position[receiver] == sources.position[source])).nonzero()[:, 0]
        if written is not None and len(own):
            reading = gradients.at_stream(layer)[receiver[own]]
            direct[own] = (reading * written[source[own], sources.position[source[own]]]).sum(-1)
    return HeadParts(direct, parts)


def _refuse_later_writes(prompt: OpenPrompt, sources: Sources) -> None:
    """A feature of a cross-layer transcoder enters the residual stream at many layers; the walk up knows one."""
    for number in sources.slot[(sources.slot >= 0) & (sources.unit >= 0)].unique().tolist():
        slot = prompt.slots[number]
        dictionary = getattr(getattr(slot, "site", None), "dictionary", None)
        if dictionary is not None and dictionary.n_later:
            raise SettingsError(
                f"edges from features of a cross-layer transcoder cannot be split by head: those of layer {slot.layer} "
                f"write into {dictionary.n_later} later layers too. Choose edges that begin at embeddings, errors or "
                "the last layer's features."
            )


def attention_layers(run: PromptRun) -> list[AttentionLayer]:
    """The attention of every layer, measured to be what it is taken for."""
    layers = []
    for number in range(len(run.stream)):
        v, pattern, z = (run.kept[f"blocks.{number}.attn.{name}"] for name in _HOOKS)
        bottom = run.embedding if number == 0 else run.stream[number - 1]
        top = run.stream[number]
        if bottom is None or top is None or pattern.dim() != 4:
            raise UnsupportedModelError(
                f"expected a residual stream and one attention pattern per head around layer {number}; this model does "
                "not show them, so its edges cannot be split by head."
            )
        layer = AttentionLayer(z, v, pattern.detach()[0], bottom, top)
        n_heads, n_kv, _ = layer.shape
        fits = n_kv > 0 and n_heads % n_kv == 0 and v.shape[1] == z.shape[1] == pattern.shape[-1]
        if not fits or not nearly_equal(layer.mix(v.detach()), z.detach()):
            raise UnsupportedModelError(
                f"expected blocks.{number}.attn.hook_z to be hook_pattern times hook_v; it is not on this model (a "
                "gate, a sink, or another layout), so its edges cannot be split by head."
            )
        if 0 < number < len(run.stream) - 1:
            _require_adding(layer, number)
        layers.append(layer)
    return layers


def _require_adding(layer: AttentionLayer, number: int) -> None:
    """The layer passes the residual stream on as it is, beside what its heads bring."""
    seed = torch.randn(layer.top.shape, generator=torch.Generator().manual_seed(0)).to(layer.top)
    at_bottom, at_z = pull(layer.top, [layer.bottom, layer.z], seed[None])
    (by_heads,) = pull(layer.z, [layer.bottom], at_z)
    if not nearly_equal(at_bottom - by_heads, seed[None]):
        raise UnsupportedModelError(
            f"expected layer {number} to add to the residual stream; it does something else to it (as nodes of a "
            "dictionary on the residual stream do), so edges across it cannot be split by head."
        )


@dataclass(frozen=True)
class _Gradients:
    """Of all receivers, each at its position: at each layer's heads, and at the residual stream."""

    at_heads: Sequence[Float[Tensor, "receiver d"]]
    below: Float[Tensor, "receiver d_model"]
    """At the residual stream that the receiver's own layer reads; for targets, below the last layer."""
    final: Float[Tensor, "receiver d_model"]
    """Of targets, behind the final norm."""

    def at_stream(self, layer: int) -> Float[Tensor, "receiver d_model"]:
        """At the residual stream above a layer: the same wherever it passes by, except for the final norm."""
        return self.final if layer == len(self.at_heads) - 1 else self.below


def _receivers(prompt: OpenPrompt, layers: Sequence[AttentionLayer], receivers: Receivers) -> _Gradients:
    """Gradients of receivers through the residual stream alone, from the last layer to the first."""
    n_receivers, d_model = len(receivers.slot), prompt.embedding.shape[-1]
    every = torch.arange(n_receivers)
    below, final = (torch.zeros(n_receivers, d_model, dtype=torch.float64) for _ in range(2))
    at_heads = [torch.zeros(n_receivers, layer.z[0, 0].numel(), dtype=torch.float64) for layer in layers]
    slot_of_layer = {slot.layer: index for index, slot in enumerate(prompt.slots)}
    above = receivers.slot == len(prompt.slots)  # targets join above the last layer
    if above.any():
        seeds = torch.eye(prompt.values.shape[1]).to(prompt.values)[receivers.unit[above]][:, None]
        (down,) = pull(prompt.values, [layers[-1].top], seeds)
        final[above] = _at(down, receivers.position[above])
    for number in range(len(layers) - 1, -1, -1):
        layer = layers[number]
        if above.any():
            is_last = number == len(layers) - 1
            reading = (final if is_last else below)[above]
            seeds = seeds_at(layer.top, receivers.position[above], reading)
            at_bottom, at_z = pull(layer.top, [layer.bottom, layer.z], seeds)
            at_heads[number][above] = _at(at_z, receivers.position[above])
            if is_last:  # the final norm is in between: what is left is not what came
                (by_heads,) = pull(layer.z, [layer.bottom], at_z)
                below[above] = _at(at_bottom - by_heads, receivers.position[above])
        slot = slot_of_layer.get(number, -2)
        own = every[receivers.slot == slot]
        if len(own):
            reading = prompt.slots[slot].read(prompt.paths.runs[slot], receivers.position[own], receivers.unit[own])
            at_bottom, at_z = pull(reading.tensor, [layer.bottom, layer.z], reading.seeds)
            (by_heads,) = pull(layer.z, [layer.bottom], at_z)
            at_heads[number][own] = _at(at_z, receivers.position[own])
            below[own] = _at(at_bottom - by_heads, receivers.position[own])
            above = above | (receivers.slot == slot)
    return _Gradients(at_heads, below, final)


def _walk_up(
    prompt: OpenPrompt, layers: Sequence[AttentionLayer], sources: Sources, first: Tensor
) -> Iterator[tuple[int, Tensor | None, Tensor | None]]:
    """Layer by layer: its number, tangents of its values, and what the sources there write into the stream above it.

    Tangents have a row per source. The embedding is layer -1, below whose attention nothing has passed yet.
    """
    n_sources, n_positions = len(sources.slot), prompt.embedding.shape[1]
    slot_of_layer = {slot.layer: index for index, slot in enumerate(prompt.slots)}
    stream = prompt.embedding.new_zeros(n_sources, *prompt.embedding.shape)
    begin = (first == -1).nonzero()[:, 0]
    stream[begin, 0, sources.position[begin]] = prompt.embedding[0, sources.position[begin]]
    written = None
    for number, layer in enumerate(layers):
        live = (first < number).nonzero()[:, 0]
        values = None
        if len(live):
            values = layer.v.new_zeros(n_sources, *layer.v.shape)
            values[live] = push(layer.v, layer.bottom, stream[live])
            by_heads = push(layer.top, layer.z, layer.mix(values[live, 0])[:, None])
            if number == 0:  # what happens to the embedding before it is the residual stream (a factor) is in here
                passed = push(layer.top, layer.bottom, stream[live])
                stream[live] = passed
                passing = torch.zeros(n_sources, n_positions, stream.shape[-1], dtype=torch.float64)
                passing[live] = widened((passed - by_heads)[:, 0]).cpu().double()
                yield -1, None, passing
            elif number < len(layers) - 1:
                stream[live] = stream[live] + by_heads
        own = (first == number).nonzero()[:, 0]
        written = None
        if len(own):
            new = _written(prompt, slot_of_layer[number], layer, sources, own)
            if number < len(layers) - 1:
                stream[own] = new
            written = torch.zeros(n_sources, n_positions, stream.shape[-1], dtype=torch.float64)
            written[own] = widened(new[:, 0]).cpu().double()
        yield number, None if values is None else widened(values[:, 0]).cpu().double(), written


def _written(prompt: OpenPrompt, slot: int, layer: AttentionLayer, sources: Sources, own: Tensor) -> Tensor:
    """What sources of one slot write into the residual stream above their layer."""
    run, change = prompt.paths.runs[slot], prompt.changes[slot]
    place, unit = sources.position[own], sources.unit[own]
    device = run.source.device
    place, unit = place.to(device), unit.to(device)
    if run.output is not None:
        rows = run.output.weights[unit.to(run.output.weights.device)].to(device)
        seeds = seeds_at(run.output.tensor, place, widened(rows) * widened(change.nodes[place, unit])[:, None])
        return push(layer.top, run.output.tensor, seeds)
    is_error = unit < 0
    decoder = getattr(getattr(prompt.slots[slot], "site", None), "dictionary", None)
    if decoder is None:
        seeds = run.source.new_zeros(len(own), *run.nodes.shape)
        seeds[torch.arange(len(own), device=device), place, unit] = change.nodes[place, unit].to(seeds)
        return push(layer.top, run.source, seeds.reshape(len(own), *run.source.shape))
    rows = decoder.W_dec[unit.clamp(min=0).to(decoder.W_dec.device)].to(device)
    rows = widened(rows) * widened(change.nodes[place, unit.clamp(min=0)])[:, None]
    if change.error is not None:
        rows = torch.where(is_error[:, None], widened(change.error[place]).to(rows), rows)
    return push(layer.top, run.source, seeds_at(run.source, place, rows))


def pull(output: Tensor, inputs: Sequence[Tensor], seeds: Float[Tensor, "row ..."]) -> list[Float[Tensor, "row ..."]]:
    """Gradients at some inputs, zero where none arrives."""
    gradients = torch.autograd.grad(
        output, list(inputs), seeds.to(output), retain_graph=True, allow_unused=True, is_grads_batched=True
    )
    pairs = zip(gradients, inputs, strict=True)
    return [x.new_zeros(len(seeds), *x.shape) if gradient is None else gradient for gradient, x in pairs]


def push(output: Tensor, value: Tensor, tangents: Float[Tensor, "row ..."]) -> Float[Tensor, "row ..."]:
    """Jacobian-vector products: the vector-Jacobian product is linear in its vector, and they are its derivative."""
    vector = torch.zeros_like(output, requires_grad=True)
    (pulled,) = torch.autograd.grad(output, value, vector, create_graph=True, retain_graph=True, allow_unused=True)
    if pulled is None or not pulled.requires_grad:
        return output.new_zeros(len(tangents), *output.shape)
    (pushed,) = torch.autograd.grad(pulled, vector, tangents.to(pulled), is_grads_batched=True, allow_unused=True)
    return output.new_zeros(len(tangents), *output.shape) if pushed is None else pushed.detach()


def _at(rows: Float[Tensor, "row 1 pos ..."], position: Int[Tensor, " row"]) -> Float[Tensor, "row d"]:
    """Each row at its position."""
    at = rows[torch.arange(len(rows), device=rows.device), 0, position.to(rows.device)]
    return widened(at.flatten(1)).cpu().double()


def nearly_equal(one: Tensor, other: Tensor) -> bool:
    one, other = widened(one.detach().flatten()), widened(other.detach().flatten())
    size = float(other.abs().max()) if other.numel() else 0.0
    return one.shape == other.shape and float((one - other).abs().max()) <= _ALLOWED.get(one.dtype, 1e-4) * size
