"""The open graph of one prompt: its forward pass, and gradients that walk down its residual stream.

Every slot writes a leaf: later layers read a copy without a past. The gradient of anything at a leaf is then its direct
effect, every slot in between stopped, and one forward pass has all of them. Total effects are the same gradients,
passed on by every slot from its leaf to what it was computed from.

Between two layers everything passes through the residual stream. So the gradients of all receivers go down together,
one stretch (a layer) at a time, and each receiver joins where it is read: no layer above it is touched, none below it
twice, and only one layer's gradients are in memory. Whether anything bypasses the residual stream is read from the
graph itself; if so, the receivers of each slot take the whole graph below them at once.
"""

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, replace
from functools import partial
from typing import Any, Literal, NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor

from .._errors import PropagationError
from ..bases._runs import require_fired, run_logits
from ..models._protocol import TransformerLensModel, hook_points, submodule
from ..models._threads import hooked, this_thread_only
from ..tasks._tokenized import Batch
from ._slots import Seen, Slot, SlotRun, as_leaf, by_position, leaves_of, node_gradient, note_input


@dataclass(frozen=True)
class PromptRun:
    """What one forward pass left: at the slots, at both ends, and between the layers. One row where it has slots."""

    slots: Sequence[SlotRun]
    embedding: Float[Tensor, "row pos d_model"]
    positional: Float[Tensor, "row pos d_model"] | None
    raw_logits: Float[Tensor, "row pos d_vocab"]
    """Before any soft cap: relevance is conserved here and not beyond."""
    final: Float[Tensor, "row pos d_model"]
    """What the unembedding reads, after the final norm."""
    logits: Float[Tensor, "row pos d_vocab"]
    stream: Sequence[Float[Tensor, "row pos d_model"] | None]
    """The residual stream above each layer; the last is `final`. None where the model does not show it."""
    kept: Mapping[str, Tensor]
    """What entered the hook points that the caller asked for."""

    def row(self, index: int) -> "PromptRun":
        """What targets read of one prompt: both ends of its run."""
        own = slice(index, index + 1)
        return PromptRun((), self.embedding[own], None, self.raw_logits[own], self.final[own], self.logits[own], (), {})


def run_prompt(model: TransformerLensModel, batch: Batch, slots: Sequence[Slot], keep: Iterable[str] = ()) -> PromptRun:
    """Run the model on a batch of prompts of one length.

    Inside `relp` the run has a graph; under `torch.no_grad()` it only has values. `keep` names hook points whose
    tensors of the graph the caller wants.

    Raises:
        PropagationError: the unembedding did not run as a module.
        UnsupportedModelError: a hook point did not fire.
    """
    points, unembed = hook_points(model), submodule(model, "unembed")
    if unembed is None:
        raise PropagationError(
            f"expected an unembedding module on this {type(model).__name__}; it has none. Logits are read there: use a "
            "model that TransformerLens unembeds."
        )
    seen: list[Seen] = [{} for _ in slots]
    embeddings: Seen = {}
    noted: Seen = {}
    stream: Seen = {}
    unembedded: list[tuple[Tensor, Tensor]] = []

    standard = model.cfg.positional_embedding_type == "standard" and "hook_pos_embed" in points
    names = ["hook_embed", "hook_pos_embed"] if standard else ["hook_embed"]
    hooks: list[tuple[str, Any]] = [(name, partial(_embed, embeddings, name)) for name in names]
    for slot, record in zip(slots, seen, strict=True):
        hooks += [(name, partial(_note_change, noted, name, change)) for name, change in slot.hooks(record)]
    above = [f"blocks.{layer}.hook_resid_pre" for layer in range(1, int(model.cfg.n_layers))]
    # Pre-hooks see the tensors of the graph itself; a hook point's forward hooks may already have reshaped copies.
    early: list[tuple[str, Any]] = [(name, partial(note_input, stream, name)) for name in above if name in points]
    kept: Seen = {}
    early += [(name, partial(note_input, kept, name)) for name in keep]
    early += [pair for slot, record in zip(slots, seen, strict=True) for pair in slot.early_hooks(record)]
    with ExitStack() as stack:
        stack.callback(unembed.register_forward_hook(this_thread_only(partial(_note_logits, unembedded))).remove)
        for name, hook in early:
            place = points.get(name) or submodule(model, name)
            if place is not None:
                stack.callback(place.register_forward_pre_hook(this_thread_only(hook)).remove)
        stack.enter_context(hooked(model, hooks))
        logits = run_logits(model, batch.clean, batch.attention_mask)
    if not unembedded:
        raise PropagationError(
            "expected the unembedding to run as a module; it did not, so its logits were not seen. Use a model whose "
            "forward calls model.unembed."
        )
    require_fired({**noted, **embeddings}, [name for name, _ in hooks], model)
    final, raw_logits = unembedded[-1]
    return PromptRun(
        slots=[slot.run(record) for slot, record in zip(slots, seen, strict=True)],
        embedding=embeddings["hook_embed"],
        positional=embeddings.get("hook_pos_embed"),
        raw_logits=raw_logits,
        final=final,
        logits=logits,
        stream=[*(stream.get(name) for name in above), final],
        kept=kept,
    )


def _embed(seen: Seen, name: str, value: Tensor, hook: Any) -> Tensor:
    """Always a leaf: what comes before (BLOOM's norm of the embedding) is part of the embedding."""
    seen[name] = as_leaf(value)
    return seen[name]


def _note_change(seen: Seen, name: str, change: Callable[..., Tensor], value: Tensor, hook: Any) -> Tensor:
    seen[name] = change(value, hook=hook)
    return seen[name]


def _note_logits(seen: list[tuple[Tensor, Tensor]], module: Any, arguments: Any, output: Any) -> None:
    seen.append((arguments[0], output))


Kind = Literal["slot", "embedding", "positional", "bias"]


class End(NamedTuple):
    """A tensor at which gradients are read."""

    kind: Kind
    index: int
    """Of the slot or the bias, else zero."""
    tensor: Tensor


@dataclass(frozen=True, eq=False)
class Stretch:
    """A piece of the graph: from the residual stream above it, and from what is read in it, down to its ends.

    `top` and `bottom` are the residual stream. Without them a stretch reaches all the way down.
    """

    slot: int
    """Whose nodes are read and written here; -1 for none, the number of slots for the targets."""
    reading: Tensor | None
    top: Tensor | None
    bottom: Tensor | None
    written: tuple[End, ...]
    """The nodes written here. The stream above reads them; the nodes read here do not."""
    ends: tuple[End, ...]


@dataclass(frozen=True, eq=False)
class Paths:
    """Stretches, from the targets down."""

    stretches: Sequence[Stretch]
    runs: Sequence[SlotRun]
    """Of the slots; `output` is where their ends are, None where they are at the leaves."""
    layered: bool
    """Whether there is one stretch per layer."""

    def direct(
        self,
        rows: Callable[[int], range],
        seeds: Callable[[int, range], tuple[Tensor, Tensor]],
        through: Sequence[Slot] | None = None,
    ) -> Iterator[tuple[slice, End, Tensor]]:
        """Gradients of many receivers at every end they reach: (receivers, end, `[receiver, *end.tensor.shape]`).

        `rows(slot)` are the receivers read there, one slot's right after the other's; `seeds` gives a tensor and their
        gradients there. With `through`, the slots, nodes pass on what reaches them instead of ending it; that takes
        layers, each of which writes for itself.
        """
        flowing, receivers = None, slice(0, 0)
        for stretch in self.stretches:
            new, below = rows(stretch.slot), []
            if len(new):
                down, pulled = _pull([seeds(stretch.slot, new)], stretch.bottom, stretch.ends, batched=True)
                yield from ((slice(new.start, new.stop), end, gradient) for end, gradient in pulled)
                below.append(down)
            if flowing is not None and stretch.top is not None:
                sources, ends = [(stretch.top, flowing)], (*stretch.written, *stretch.ends)
                if through is not None:
                    sources += self._passed_on(stretch, through, sources)
                    ends = stretch.ends
                down, pulled = _pull(sources, stretch.bottom, ends, batched=True)
                yield from ((receivers, end, gradient) for end, gradient in pulled)
                below.append(down)
            if len(new):
                receivers = slice(new.start, new.stop if flowing is None else receivers.stop)
            flowing = torch.cat(below) if below and stretch.bottom is not None else None

    def _passed_on(
        self, stretch: Stretch, slots: Sequence[Slot], sources: list[tuple[Tensor, Tensor]]
    ) -> list[tuple[Tensor, Tensor]]:
        """The gradients with which the nodes of a stretch go on, from those that reach them."""
        leaves = [end._replace(tensor=self.runs[end.index].source) for end in stretch.written]
        passed = []
        for end, gradient in _pull(sources, None, leaves, batched=True)[1]:
            assert stretch.reading is not None
            slot, run = slots[end.index], self.runs[end.index]
            nodes = slot.node_gradient(gradient.flatten(1, 2).flatten(2))
            passed.append((stretch.reading, slot.pass_on(run, gradient, nodes)))
        return passed

    def total(self, slots: Sequence[Slot], seed: Tensor | None = None) -> dict[tuple[Kind, int], Tensor]:
        """Gradients of the targets' sum through all paths, at every end. Nodes pass on what reaches them.

        `seed` weighs the targets, one each unless given.
        """
        gradients: dict[tuple[Kind, int], Tensor] = {}

        def pull(sources: list[tuple[Tensor, Tensor]], bottom: Tensor | None, ends: Iterable[End]) -> Any:
            # At the leaves that all nodes of a slot write.
            ends = [e._replace(tensor=self.runs[e.index].source) if e.kind == "slot" else e for e in ends]
            down, pulled = _pull(sources, bottom, ends, batched=False)
            for end, gradient in pulled:
                key = (end.kind, end.index)
                gradients[key] = gradients[key] + gradient if key in gradients else gradient
            return down

        flowing = None
        for stretch in self.stretches:
            sources: list[tuple[Tensor, Tensor]] = []
            if flowing is not None and stretch.top is not None:
                sources.append((stretch.top, flowing))
                pull(sources, None, stretch.written)
            if stretch.slot == len(slots):
                assert stretch.reading is not None
                sources.append((stretch.reading, torch.ones_like(stretch.reading) if seed is None else seed))
            elif any(("slot", index) in gradients for index in self._written_by(slots, stretch.slot)):
                assert stretch.reading is not None
                index, run = stretch.slot, self.runs[stretch.slot]
                places = self._written_by(slots, index)
                at = {p: gradients.get(("slot", p), torch.zeros_like(self.runs[p].source)) for p in places}
                nodes = node_gradient(slots, index, {p: by_position(gradient) for p, gradient in at.items()})
                sources.append((stretch.reading, slots[index].pass_on(run, at[index], nodes)))
            flowing = pull(sources, stretch.bottom, stretch.ends)
        return gradients

    @staticmethod
    def _written_by(slots: Sequence[Slot], index: int) -> list[int]:
        """The slots whose sources the nodes of one slot write to, its own first."""
        if not 0 <= index < len(slots):
            return []
        return [index, *(place for place, slot in enumerate(slots) if slot.receives_from(slots[index]))]


def find_paths(
    run: PromptRun, slots: Sequence[Slot], targets: Tensor, biases: Sequence[Tensor], *, positional: bool
) -> Paths:
    """The stretches of a run, layer by layer where the graph shows that they are all there is."""
    starts = [End("embedding", 0, run.embedding)]
    starts += [] if run.positional is None or not positional else [End("positional", 0, run.positional)]
    bias_ends = [End("bias", index, bias) for index, bias in enumerate(biases)]
    stretches = _layers(run, slots, targets, starts, bias_ends)
    if stretches is not None:
        return Paths(stretches, run.slots, layered=True)
    readings = [*(slot.reading for slot in run.slots), targets]
    leaves = [End("slot", index, slot.source) for index, slot in enumerate(run.slots)]
    whole = [
        Stretch(index, readings[index], None, None, (), (*leaves[:index], *starts, *bias_ends))
        for index in range(len(slots), -1, -1)
    ]
    return Paths(whole, [replace(slot, output=None) for slot in run.slots], layered=False)


def _layers(
    run: PromptRun, slots: Sequence[Slot], targets: Tensor, starts: Sequence[End], biases: Sequence[End]
) -> list[Stretch] | None:
    """One stretch per layer and one for the targets; None where a path bypasses the residual stream between layers."""
    n_layers, slot_of_layer = len(run.stream), {slot.layer: index for index, slot in enumerate(slots)}
    if any(t is None or t.grad_fn is None for t in run.stream) or not slot_of_layer.keys() <= set(range(n_layers)):
        return None
    at_start = {id(t) for t in (run.embedding, run.positional) if t is not None}
    stretches = []
    for layer in range(n_layers, -1, -1):
        index = len(slots) if layer == n_layers else slot_of_layer.get(layer, -1)
        slot = run.slots[index] if 0 <= index < len(slots) else None
        top = None if layer == n_layers else run.stream[layer]
        bottom = None if layer == 0 else run.stream[layer - 1]
        below = [] if bottom is None else [bottom]
        reading = targets if layer == n_layers else None if slot is None else slot.reading
        leaves = leaves_of([t for t in (top, reading) if t is not None], below)
        ends = [end for end in (*(starts if layer == 0 else ()), *biases) if id(end.tensor) in leaves]
        written: tuple[End, ...] = ()
        known = {id(end.tensor) for end in biases} | (at_start if layer == 0 else set())
        if slot is not None:
            output = slot.output
            written = (End("slot", index, slot.source if output is None else output.tensor),)
            known.add(id(slot.source))
            # The output stands for the neurons only if nothing else reads them.
            if output is not None and top is not None and id(slot.source) in leaves_of([top], [output.tensor, *below]):
                return None
        if not leaves.keys() <= known:
            return None
        stretches.append(Stretch(index, reading, top, bottom, written, tuple(ends)))
    return stretches


def _pull(
    sources: Sequence[tuple[Tensor, Tensor]], bottom: Tensor | None, ends: Sequence[End], *, batched: bool
) -> tuple[Any, list[tuple[End, Tensor]]]:
    """Gradients at `bottom`, zero where there is none, and at those ends that are reached."""
    inputs = [*([] if bottom is None else [bottom]), *(end.tensor for end in ends)]
    if not sources or not inputs:
        return None, []
    outputs, seeds = zip(*sources, strict=True)
    gradients = list(
        torch.autograd.grad(outputs, inputs, seeds, retain_graph=True, allow_unused=True, is_grads_batched=batched)
    )
    down = None
    if bottom is not None:
        down = gradients.pop(0)
        if down is None:
            down = bottom.new_zeros((len(seeds[0]), *bottom.shape) if batched else bottom.shape)
    return down, [(end, g) for end, g in zip(ends, gradients, strict=True) if g is not None]
