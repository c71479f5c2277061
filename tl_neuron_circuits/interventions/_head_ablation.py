"""Cut what one head brings of an edge: path patching from a source through a head to a receiver.

    live      the model as it is
    sender    the source at its baseline, all other neurons at their live values: the head's values v' at a position q
    receiver  z of the head at the receiver's position less A[q] (v[q] - v'[q]); every other head after it and all other
              neurons at their live values. Only the receiver's own reading, through the residual stream, is new.

Nothing is linearized: norms respond in both passes, and patterns before the head do in the first. So the difference
between the receiver's live value and its new one tests the part that `Circuit.heads` states.
Source: path patching (Goldowsky-Dill et al. 2023, arXiv 2304.05969).
"""

from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from functools import partial
from typing import Any, NamedTuple

import torch
from jaxtyping import Float, Int
from torch import Tensor

from ..bases._activations import Neurons
from ..bases._runs import run_logits
from ..models._protocol import TransformerLensModel, submodule
from ..models._threads import hooked, this_thread_only
from ._ablation import Hooks


class HeadPart(NamedTuple):
    """What `head` of `layer` brings from position `place` of a source to a receiver."""

    source: tuple[int, int, int]
    """Layer, position, unit of a neuron; layer -1 is the embedding at that position."""
    receiver: tuple[int, int, int] | None
    """A neuron, or None for the logits at `at`."""
    layer: int
    head: int
    place: int
    at: int
    """The receiver's position."""


class CutParts(NamedTuple):
    """Of each part: the receiving neuron live and cut (nan for logits), and the logits at its position."""

    live: Float[Tensor, " part"]
    cut: Float[Tensor, " part"]
    live_logits: Float[Tensor, "part d_vocab"]
    cut_logits: Float[Tensor, "part d_vocab"]
    """Before any soft cap."""


@torch.no_grad()
def cut_head_parts(
    model: TransformerLensModel,
    tokens: Int[Tensor, "1 pos"],
    parts: Sequence[HeadPart],
    baselines: Mapping[str, Tensor | None],
    attention_mask: Tensor | None = None,
) -> CutParts:
    """Cut each part alone; two forward passes with a row per source and per part.

    Args:
        model: any TransformerLens model with dense MLPs.
        tokens: one prompt.
        parts: what to cut.
        baselines: by hook point ("hook_embed" and those of neurons), the value of an ablated source `[1, pos, d]`;
            None is zero.
        attention_mask: as the model takes it.
    """
    sources = list(dict.fromkeys(part.source for part in parts))
    sites, n_layers = {site.layer: site.hook for site in Neurons().sites(model)}, int(model.cfg.n_layers)
    names = [f"blocks.{layer}.attn.{name}" for layer in range(n_layers) for name in ("hook_v", "hook_pattern")]
    seen: dict[str, Tensor] = {}

    def keep(value: Tensor, hook: Any, name: str) -> None:
        seen[name] = value

    def ablate(value: Tensor, hook: Any, name: str, layer: int) -> Tensor:
        """The first row is live, and so are all other rows except for their own source."""
        value = value[:1].expand_as(value).clone()
        for row, (at, place, unit) in enumerate(sources, 1):
            if at == layer:
                index = (place,) if layer < 0 else (place, unit)
                base = baselines[name]
                value[row][index] = 0.0 if base is None else base[0].to(value)[index]
        return value

    hooks: Hooks = [(name, partial(keep, name=name)) for name in names]
    hooks += [("hook_embed", partial(ablate, name="hook_embed", layer=-1))]
    hooks += [(hook, partial(ablate, name=hook, layer=layer)) for layer, hook in sites.items()]
    _run(model, tokens, 1 + len(sources), hooks, attention_mask)
    shape = next(value.shape for name, value in seen.items() if name.endswith("hook_pattern"))
    n_heads, n_positions = int(shape[1]), int(shape[-1])

    def change(part: HeadPart) -> Float[Tensor, " d_head"]:
        """A[q] (v[q] - v'[q])."""
        pattern, v = (seen[f"blocks.{part.layer}.attn.{name}"] for name in ("hook_pattern", "hook_v"))
        d_head = int(model.cfg.d_head)
        v = v.reshape(len(v), n_positions, -1, d_head)
        kv = part.head // (n_heads // v.shape[2])
        row = 1 + sources.index(part.source)
        return pattern[0, part.head, part.at, part.place] * (v[0, part.place, kv] - v[row, part.place, kv])

    changes = [change(part) for part in parts]
    values: dict[int, Tensor] = {}

    def freeze(value: Tensor, hook: Any, layer: int) -> Tensor:
        values[layer] = value
        return value[:1].expand_as(value).clone()

    def cut(value: Tensor, hook: Any, layer: int) -> Tensor:
        rows = value[:1].expand_as(value).clone()
        by_head = rows.reshape(len(rows), n_positions, n_heads, -1)
        for row, (part, less) in enumerate(zip(parts, changes, strict=True), 1):
            if part.layer == layer:
                by_head[row, part.at, part.head] -= less.to(by_head)
        return by_head.reshape(value.shape)

    hooks = [(hook, partial(freeze, layer=layer)) for layer, hook in sites.items()]
    hooks += [(f"blocks.{layer}.attn.hook_z", partial(cut, layer=layer)) for layer in range(n_layers)]
    logits = _run(model, tokens, 1 + len(parts), hooks, attention_mask).float()
    at = torch.tensor([part.at for part in parts], device=logits.device)
    live, own = (torch.full((len(parts),), float("nan")) for _ in range(2))
    for row, part in enumerate(parts):
        if part.receiver is not None:
            layer, place, unit = part.receiver
            live[row], own[row] = values[layer][0, place, unit], values[layer][row + 1, place, unit]
    return CutParts(live, own, logits[0, at], logits[torch.arange(1, 1 + len(parts), device=at.device), at])


def _run(
    model: TransformerLensModel, tokens: Tensor, rows: int, hooks: Hooks, mask: Tensor | None
) -> Float[Tensor, "row pos d_vocab"]:
    """Logits before any soft cap."""
    unembedded: list[Any] = []
    unembed = submodule(model, "unembed")
    with ExitStack() as stack:
        if unembed is not None:
            handle = unembed.register_forward_hook(
                this_thread_only(lambda _, arguments, output: unembedded.append(output))
            )
            stack.callback(handle.remove)
        stack.enter_context(hooked(model, hooks))
        logits = run_logits(model, tokens.repeat(rows, 1), None if mask is None else mask.repeat(rows, 1))
    return unembedded[-1] if unembedded else logits
