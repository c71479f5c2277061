"""One prompt's forward pass, held so that direct effects can be read from it.

With `cut=True` the neurons of every layer are leaves: what later layers read is a copy without a past. The gradient of
anything with respect to a leaf is then its direct effect, every MLP in between stopped, and one forward pass has all
of them. With `cut=False` nothing is cut and the same gradients are total effects.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from .._errors import PropagationError
from ..bases import fired, logits_of
from ..models import MLPSites, TransformerLensModel, find_sites, hook_points, submodule
from ..tasks import Batch


@dataclass(frozen=True)
class PromptRun:
    """What one prompt left: by layer, the neurons as they are computed and as later layers read them."""

    written: Sequence[Float[Tensor, "1 pos d_mlp"]]
    read: Sequence[Float[Tensor, "1 pos d_mlp"]]
    gate: Sequence[Float[Tensor, "1 pos d_mlp"] | None]
    up: Sequence[Float[Tensor, "1 pos d_mlp"] | None]
    embedding: Float[Tensor, "1 pos d_model"]
    positional: Float[Tensor, "1 pos d_model"] | None
    raw_logits: Float[Tensor, "1 pos d_vocab"]
    """Before any soft cap: relevance is conserved here and not beyond."""
    final: Float[Tensor, "1 pos d_model"]
    """What the unembedding reads, after the final norm."""
    logits: Float[Tensor, "1 pos d_vocab"]


def mlp_sites(model: TransformerLensModel) -> tuple[MLPSites, ...]:
    """The MLPs of `model`, in the order of its layers."""
    return find_sites(model).mlps


def run_prompt(model: TransformerLensModel, batch: Batch, *, cut: bool) -> PromptRun:
    """Run the model on a batch of one prompt.

    Inside `relp` the run has a graph; under `torch.no_grad()` it only has values, and `cut` says nothing.

    Raises:
        PropagationError: the unembedding did not run as a module.
    """
    sites = mlp_sites(model)
    written: dict[str, Tensor] = {}
    read: dict[str, Tensor] = {}

    def neurons(value: Tensor, name: str) -> Tensor:
        written[name] = value
        read[name] = value.detach().requires_grad_(True) if cut and torch.is_grad_enabled() else value
        return read[name]

    def embedding(value: Tensor, name: str) -> Tensor:
        # Always a leaf: what comes before (BLOOM's norm of the embedding) is part of the embedding.
        read[name] = value.detach().requires_grad_(True) if torch.is_grad_enabled() else value
        return read[name]

    def look(value: Tensor, name: str) -> Tensor:
        written[name] = value.detach()
        return value

    names = _embeddings(model)
    branches = [name for site in sites for name in (site.pre, site.up) if name is not None and site.up is not None]
    hooks = [(name, _named(embedding, name)) for name in names]
    hooks += [(site.post, _named(neurons, site.post)) for site in sites]
    hooks += [(name, _named(look, name)) for name in branches]
    ends: list[tuple[Tensor, Tensor]] = []
    unembed = submodule(model, "unembed")
    if unembed is None:
        raise PropagationError(
            f"expected an unembedding module on this {type(model).__name__}; it has none. "
            "Logits are read there: use a model that TransformerLens unembeds."
        )

    def end(module: Any, arguments: Any, output: Any) -> None:
        ends.append((arguments[0], output))

    handle = unembed.register_forward_hook(end)
    try:
        with model.hooks(fwd_hooks=hooks):
            logits = logits_of(model, batch.clean, batch.attention_mask)
    finally:
        handle.remove()
    if not ends:
        raise PropagationError(
            "expected the unembedding to run as a module; it did not, so logits were not "
            "seen. Use a model whose forward calls model.unembed."
        )
    fired(written | read, [*names, *(site.post for site in sites)], model)
    final, raw_logits = ends[-1]
    return PromptRun(
        written=[written[site.post] for site in sites],
        read=[read[site.post] for site in sites],
        gate=[written.get(site.pre) if site.up is not None else None for site in sites],
        up=[written.get(site.up) if site.up is not None else None for site in sites],
        embedding=read["hook_embed"],
        positional=read.get("hook_pos_embed"),
        raw_logits=raw_logits,
        final=final,
        logits=logits,
    )


def _embeddings(model: TransformerLensModel) -> list[str]:
    standard = model.cfg.positional_embedding_type == "standard" and "hook_pos_embed" in hook_points(model)
    return ["hook_embed", "hook_pos_embed"] if standard else ["hook_embed"]


def _named(keep: Callable[[Tensor, str], Tensor], name: str) -> Any:
    return lambda value, hook: keep(value, name)
