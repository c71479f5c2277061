"""One prompt's forward pass, held so that direct effects can be read from it.

Every slot writes a leaf: what later layers read is a copy without a past. The gradient of anything with respect to a
leaf is then its direct effect, every slot in between stopped, and one forward pass has all of them. Total effects are
the same gradients, passed on by every slot from its leaf to what it was computed from.
"""

from collections.abc import Callable, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from .._errors import PropagationError
from ..bases._runs import fired, logits_of
from ..models._protocol import TransformerLensModel, hook_points, submodule
from ..tasks._tokenized import Batch
from ._slot import Seen, Slot, SlotRun, note_input


@dataclass(frozen=True)
class PromptRun:
    """What one prompt left, by slot and at both ends."""

    slots: Sequence[SlotRun]
    gate: Sequence[Float[Tensor, "1 pos d_mlp"] | None]
    up: Sequence[Float[Tensor, "1 pos d_mlp"] | None]
    embedding: Float[Tensor, "1 pos d_model"]
    positional: Float[Tensor, "1 pos d_model"] | None
    raw_logits: Float[Tensor, "1 pos d_vocab"]
    """Before any soft cap: relevance is conserved here and not beyond."""
    final: Float[Tensor, "1 pos d_model"]
    """What the unembedding reads, after the final norm."""
    logits: Float[Tensor, "1 pos d_vocab"]
    stream: Sequence[Float[Tensor, "1 pos d_model"] | None]
    """The residual stream above each layer; the last is `final`. None where the model does not show it."""


def run_prompt(model: TransformerLensModel, batch: Batch, slots: Sequence[Slot]) -> PromptRun:
    """Run the model on a batch of one prompt.

    Inside `relp` the run has a graph; under `torch.no_grad()` it only has values.

    Raises:
        PropagationError: the unembedding did not run as a module.
        UnsupportedModelError: a hook point did not fire.
    """
    seen: list[Seen] = [{} for _ in slots]
    read: Seen = {}

    def embedding(value: Tensor, name: str) -> Tensor:
        # Always a leaf: what comes before (BLOOM's norm of the embedding) is part of the embedding.
        read[name] = value.detach().requires_grad_(True) if torch.is_grad_enabled() else value
        return read[name]

    names = _embeddings(model)
    hooks: list[tuple[str, Any]] = [(name, _named(embedding, name)) for name in names]
    hooks += [
        (n, partial(_noting, h, n, read)) for slot, of in zip(slots, seen, strict=True) for n, h in slot.hooks(of)
    ]
    ends: list[tuple[Tensor, Tensor]] = []
    unembed = submodule(model, "unembed")
    if unembed is None:
        raise PropagationError(
            f"expected an unembedding module on this {type(model).__name__}; it has none. "
            "Logits are read there: use a model that TransformerLens unembeds."
        )

    def end(module: Any, arguments: Any, output: Any) -> None:
        ends.append((arguments[0], output))

    points = hook_points(model)
    above = [f"blocks.{layer}.hook_resid_pre" for layer in range(1, int(model.cfg.n_layers))]
    stream: Seen = {}
    with ExitStack() as stack:
        stack.callback(unembed.register_forward_hook(end).remove)
        for slot, of in zip(slots, seen, strict=True):
            for name, hook in slot.early_hooks(of):
                place = points.get(name) or submodule(model, name)
                if place is not None:
                    stack.callback(place.register_forward_pre_hook(hook).remove)
        for name in above:
            if name in points:
                stack.callback(points[name].register_forward_pre_hook(note_input(stream, name)).remove)
        stack.enter_context(model.hooks(fwd_hooks=hooks))
        logits = logits_of(model, batch.clean, batch.attention_mask)
    if not ends:
        raise PropagationError(
            "expected the unembedding to run as a module; it did not, so logits were not seen. Use a model whose "
            "forward calls model.unembed."
        )
    fired(read, [name for name, _ in hooks], model)
    final, raw_logits = ends[-1]
    return PromptRun(
        slots=[slot.run(of) for slot, of in zip(slots, seen, strict=True)],
        gate=[_detached(of.get("pre") if "up" in of else None) for of in seen],
        up=[_detached(of.get("up")) for of in seen],
        embedding=read["hook_embed"],
        positional=read.get("hook_pos_embed"),
        raw_logits=raw_logits,
        final=final,
        logits=logits,
        stream=[*(stream.get(name) for name in above), final],
    )


def _embeddings(model: TransformerLensModel) -> list[str]:
    standard = model.cfg.positional_embedding_type == "standard" and "hook_pos_embed" in hook_points(model)
    return ["hook_embed", "hook_pos_embed"] if standard else ["hook_embed"]


def _named(keep: Callable[[Tensor, str], Tensor], name: str) -> Any:
    return lambda value, hook: keep(value, name)


def _noting(change: Callable[..., Tensor], name: str, read: Seen, value: Tensor, hook: Any) -> Tensor:
    """What the hook makes of the value, noting that it fired."""
    out = change(value, hook=hook)
    read.setdefault(name, out)
    return out


def _detached(value: Tensor | None) -> Tensor | None:
    return None if value is None else value.detach()
