"""Features of dictionaries steered: read by the encoder, written by the decoder.

    value at hook_out  <-  value + sum_f (new_f - old_f) * W_dec[f]

The old feature is what this run computes, so that steering upstream is seen. Where nothing changes the value stays, bit
for bit. Source: METHODS 1.7, with a feature in place of a neuron.
"""

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from jaxtyping import Int
from torch import Tensor

from ..bases._dictionary_basis import DictionarySite
from ._ablation import Hooks


@dataclass(eq=False, repr=False)
class FeatureEdit:
    """The hooks that steer features of one dictionary; `edit` changes features `[batch, pos, unit]`."""

    site: DictionarySite
    edit: Callable[..., Tensor]
    units: Int[Tensor, " unit"]
    _seen: dict[str, Tensor] = field(default_factory=dict)

    def hooks(self) -> Hooks:
        """One hook that writes, and one that reads where that is elsewhere."""
        reads = [] if self.site.hook_in == self.site.hook else [(self.site.hook_in, self._read)]
        return [*reads, (self.site.hook, self._write)]

    def _read(self, value: Tensor, hook: Any) -> None:
        self._seen[self.site.hook_in] = value

    def _write(self, value: Tensor, hook: Any) -> Tensor:
        nodes = self.site.take_apart({**self._seen, self.site.hook: value}).nodes
        self._seen.clear()
        steered = self.edit(nodes, hook)
        units = self.units.to(nodes.device)
        change = steered[..., units] - nodes[..., units]
        written = (change @ self.site.dictionary.W_dec.to(change)[units]).reshape(value.shape)
        return torch.where(written == 0, value, (value + written).to(value.dtype))
