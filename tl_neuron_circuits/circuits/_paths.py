"""The graph of one prompt as stretches of the residual stream, and gradients that walk down them.

Between two layers everything passes through the residual stream. So the gradients of all targets go down together, one
stretch (a layer) at a time, and each target joins where it is read: no layer above it is touched, none below it twice,
and only one layer's gradients are in memory. That nothing goes round the residual stream is seen in the graph itself;
where something does, the targets of every slot take the whole graph below them at once.
"""

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor

from ._prompt_run import PromptRun
from ._slot import Slot, SlotRun, leaves_of

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
    """Whose nodes are read and written here; -1 for none, the number of slots for the goals."""
    reading: Tensor | None
    top: Tensor | None
    bottom: Tensor | None
    written: tuple[End, ...]
    """The nodes written here. The stream above reads them; the nodes read here do not."""
    ends: tuple[End, ...]


@dataclass(frozen=True, eq=False)
class Paths:
    """Stretches, from the goals down."""

    stretches: Sequence[Stretch]
    runs: Sequence[SlotRun]
    """Of the slots; `output` is where their ends are, None where they are at the leaves."""
    layered: bool
    """Whether there is one a layer."""

    def direct(
        self, rows: Callable[[int], range], seeds: Callable[[int, range], tuple[Tensor, Tensor]]
    ) -> Iterator[tuple[slice, End, Tensor]]:
        """Gradients of many targets at every end they reach: which targets, the end, `[target, *end.tensor.shape]`.

        `rows(slot)` are the targets read there, one slot's right after the other's; `seeds` a tensor and their
        gradients there.
        """
        flowing, targets = None, slice(0, 0)
        for stretch in self.stretches:
            new, below = rows(stretch.slot), []
            if len(new):
                down, found = _pull([seeds(stretch.slot, new)], stretch.bottom, stretch.ends, batched=True)
                yield from ((slice(new.start, new.stop), end, gradient) for end, gradient in found)
                below += [down]
            if flowing is not None and stretch.top is not None:
                ends = (*stretch.written, *stretch.ends)
                down, found = _pull([(stretch.top, flowing)], stretch.bottom, ends, batched=True)
                yield from ((targets, end, gradient) for end, gradient in found)
                below += [down]
            if len(new):
                targets = slice(new.start, new.stop if flowing is None else targets.stop)
            flowing = torch.cat(below) if below and stretch.bottom is not None else None

    def total(self, slots: Sequence[Slot]) -> dict[tuple[Kind, int], Tensor]:
        """Gradients of the goals' sum through all paths, at every end. Nodes pass on what reaches them."""
        found: dict[tuple[Kind, int], Tensor] = {}

        def add(some: Iterable[tuple[End, Tensor]]) -> None:
            for end, gradient in some:
                key = (end.kind, end.index)
                found[key] = found[key] + gradient if key in found else gradient

        flowing = None
        for stretch in self.stretches:
            sources: list[tuple[Tensor, Tensor]] = []
            if flowing is not None and stretch.top is not None:
                sources += [(stretch.top, flowing)]
                add(_pull(sources, None, self._leaves(stretch.written), batched=False)[1])
            if stretch.slot == len(slots):
                assert stretch.reading is not None
                sources += [(stretch.reading, torch.ones_like(stretch.reading))]
            elif ("slot", stretch.slot) in found:
                assert stretch.reading is not None
                reaching = found["slot", stretch.slot]
                sources += [(stretch.reading, slots[stretch.slot].pass_on(self.runs[stretch.slot], reaching))]
            flowing, some = _pull(sources, stretch.bottom, self._leaves(stretch.ends), batched=False)
            add(some)
        return found

    def _leaves(self, ends: Iterable[End]) -> tuple[End, ...]:
        """The same ends, slots at the leaves that all their nodes write."""
        return tuple(e._replace(tensor=self.runs[e.index].source) if e.kind == "slot" else e for e in ends)


def find_paths(
    run: PromptRun, slots: Sequence[Slot], goals: Tensor, biases: Sequence[Tensor], *, positional: bool
) -> Paths:
    """The stretches of a run, layer by layer where the graph shows that they are all there is."""
    n = len(slots)
    starts = [End("embedding", 0, run.embedding)]
    starts += [] if run.positional is None or not positional else [End("positional", 0, run.positional)]
    everywhere = [End("bias", index, bias) for index, bias in enumerate(biases)]
    exits = [End("slot", i, s.source if s.output is None else s.output.tensor) for i, s in enumerate(run.slots)]
    found = _layers(run, slots, goals, starts, everywhere, exits)
    if found is not None:
        return Paths(found, run.slots, layered=True)
    readings = [*(slot.reading for slot in run.slots), goals]
    leaves = [End("slot", index, slot.source) for index, slot in enumerate(run.slots)]
    whole = [Stretch(i, readings[i], None, None, (), (*leaves[:i], *starts, *everywhere)) for i in range(n, -1, -1)]
    return Paths(whole, [replace(slot, output=None) for slot in run.slots], layered=False)


def _layers(
    run: PromptRun, slots: Sequence[Slot], goals: Tensor, starts: Sequence[End], biases: Sequence[End],
    exits: Sequence[End],
) -> list[Stretch] | None:  # fmt: skip
    """One stretch a layer and one for the goals; None where a path goes round the residual stream between layers."""
    n_layers, of_layer = len(run.stream), {slot.layer: index for index, slot in enumerate(slots)}
    if any(t is None or t.grad_fn is None for t in run.stream) or not of_layer.keys() <= set(range(n_layers)):
        return None
    at_start = {id(t) for t in (run.embedding, run.positional) if t is not None}
    stretches = []
    for layer in range(n_layers, -1, -1):
        slot = len(slots) if layer == n_layers else of_layer.get(layer, -1)
        top = None if layer == n_layers else run.stream[layer]
        bottom = None if layer == 0 else run.stream[layer - 1]
        reading = goals if layer == n_layers else None if slot < 0 else run.slots[slot].reading
        leaves = leaves_of([t for t in (top, reading) if t is not None], [] if bottom is None else [bottom])
        ends = [end for end in (*(starts if layer == 0 else ()), *biases) if id(end.tensor) in leaves]
        written = () if layer == n_layers or slot < 0 else (exits[slot],)
        known = {id(end.tensor) for end in biases} | (at_start if layer == 0 else set())
        if written:
            known.add(id(run.slots[slot].source))
            if not _only_by(run.slots[slot], top, bottom):
                return None
        if not leaves.keys() <= known:
            return None
        stretches.append(Stretch(slot, reading, top, bottom, written, tuple(ends)))
    return stretches


def _only_by(slot: SlotRun, top: Tensor | None, bottom: Tensor | None) -> bool:
    """Whether the neurons are read by nothing but the output that stands for them."""
    if slot.output is None or top is None:
        return True
    stops = [slot.output.tensor, *([] if bottom is None else [bottom])]
    return id(slot.source) not in leaves_of([top], stops)


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
