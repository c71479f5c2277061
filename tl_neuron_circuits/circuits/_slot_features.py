"""The features of a dictionary as a slot: read by its encoder at one hook point, written by its decoder at another.

    value at hook_out = features @ W_dec + b_dec + skip(x) + error      the model's own value, bit for bit

of which only the features and the skip have a past (local replacement): a feature that fires is its pre-activation, a
linear function of the dictionary's input, and one that does not stays at zero; the error is a constant of the prompt.
Source: Marks et al. 2025, arXiv 2403.19647 (errors); Ameisen et al. 2025 (local replacement); METHODS 4.3, 4.5.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ..bases._dictionary_basis import DictionarySite
from ._slot import Arrivals, Hooks, Reading, Seen, SlotChange, SlotRun, keep, seeds_at, summed, through, wide
from ._slot_dictionary import LinearEncoder


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

    def hooks(self, seen: Seen) -> Hooks:
        apart = self.site.hook_in != self.site.hook
        readers: Hooks = [(self.site.hook_in, keep(seen, "x"))] if apart else []
        return [*readers, (self.site.hook, self._replace(seen))]

    def _replace(self, seen: Seen) -> Callable[..., Tensor]:
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
            seen["reading"] = self.encoder.normalize(x)
            seen["factor"] = self.encoder.factor(x.detach(), parts.nodes)[0]
            with torch.no_grad():
                self.encoder.check(self.encoder.features(seen["reading"], seen["factor"])[0], seen["nodes"])
            features = seen["source"] = value.detach().requires_grad_(True)
            skip = self.site.dictionary.skip(x)
            standing = [features] if skip is None else [features, skip.reshape(value.shape).to(value.dtype)]
            return StandIn.apply(value, *standing)  # pyright: ignore[reportReturnType]

        return replace

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
        return SlotChange(nodes, error, nodes @ self.site.dictionary.W_dec.to(nodes))

    def node_gradient(self, gradient: Tensor) -> Tensor:
        gradient = wide(gradient)
        return gradient @ self.site.dictionary.W_dec.to(gradient).mT

    def pass_on(self, run: SlotRun, gradient: Tensor) -> Tensor:
        assert run.factor is not None
        nodes = self.node_gradient(gradient[0].flatten(1)) * run.factor
        return (nodes.to(run.reading) @ self.encoder.weight.to(run.reading).mT).reshape(run.reading.shape)

    def read(self, run: SlotRun, place: Tensor, unit: Tensor) -> Reading:
        assert run.factor is not None
        place, unit = place.to(run.reading.device), unit.to(run.reading.device)
        factor = run.factor.to(run.reading.device)[place, unit]
        columns = self.encoder.weight[:, unit.to(self.encoder.weight.device)].mT.to(run.reading)
        bias = self.encoder.bias.to(factor)[unit]
        return Reading(
            run.reading, seeds_at(run.reading, place, columns * factor[:, None]), (factor * bias).cpu().double()
        )

    def arrivals(self, gradient: Tensor, run: SlotRun, change: SlotChange, place: Tensor, unit: Tensor) -> Arrivals:
        assert change.written is not None and change.error is not None
        gradient = gradient.to(change.written)
        place, unit = place.to(gradient.device), unit.to(gradient.device)
        rows = self.site.dictionary.W_dec[unit.to(self.site.dictionary.W_dec.device)].to(gradient)
        nodes = through(gradient, rows, change.nodes[place, unit], place)
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
