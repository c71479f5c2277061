"""Exact activation patching: the truth that gradient methods estimate.

    noising:    score(n) = m(clean) - m(clean with n at its baseline value)
    denoising:  score(n) = m(corrupt with n at its clean value) - m(corrupt)

Sign: positive supports the answer. Cost: one forward row a node and prompt, batched. With positions summed a node is
patched at all positions at once, with units summed the whole activation at a position.
Source: Vig et al. 2020; METHODS 2.
"""

from collections.abc import Iterator

import torch
from torch import Tensor
from tqdm.auto import tqdm

from .._errors import SettingsError
from ..bases._runs import answers_only, logits_of
from ..bases._site import Parts, Site
from ..tasks._metrics import measure
from ..tasks._tokenized import Batch
from ._setting import Runs, Setting

Chosen = dict[tuple[str, str], Tensor]
"""Nodes to measure, by (hook, kind): rows of position and unit (-1 where there is none)."""


def patch(
    setting: Setting, batch: Batch, runs: Runs, chosen: Chosen | None, rows: int, verbose: bool
) -> dict[tuple[str, str], Tensor]:
    """Sum over the batch of every chosen node's score, by (hook, kind); the rest is nan.

    `batch` holds the run that is patched as its clean prompts, `runs.clean` its parts, `runs.base` what is patched in.
    """
    with torch.no_grad(), answers_only(setting.model, batch, setting.metric) as seen:
        start = measure(setting.metric, logits_of(setting.model, batch.clean, batch.attention_mask), seen)
    sign = 1.0 if setting.direction == "noising" else -1.0
    out: dict[tuple[str, str], Tensor] = {}
    for site in tqdm(setting.sites, desc="patched sites", disable=not verbose, leave=False):
        for kind in ("node", *site.vectors):
            shape = block_shape(setting, runs.clean[site.hook], kind)
            scores = torch.full((shape.numel(),), torch.nan)
            wanted = torch.arange(shape.numel()) if chosen is None else _flat(chosen, site.hook, kind, shape)
            for chunk in wanted.split(max(1, rows // len(batch))) if len(wanted) else ():
                scores[chunk] = sign * _change(setting, batch, site, kind, shape, chunk, runs, start).float().cpu()
            out[site.hook, kind] = scores.reshape(shape).to(runs.clean[site.hook].nodes.device)
    return out


def _flat(chosen: Chosen, hook: str, kind: str, shape: torch.Size) -> Tensor:
    """Flat indices of the chosen nodes of one block.

    Raises:
        SettingsError: a unit that the block does not have.
    """
    if (hook, kind) not in chosen:
        return torch.arange(0)
    position, unit = chosen[hook, kind].clamp(min=0).unbind(-1)
    width = shape[-1] if kind == "node" else 1
    if len(unit) and int(unit.max()) >= width:
        raise SettingsError(f"expected units of {hook} below {width}; got {int(unit.max())}.")
    return position * width + unit


def block_shape(setting: Setting, parts: Parts, kind: str) -> torch.Size:
    """Shape of a block of scores: [pos, unit], [unit], [pos] or [], after the sums that the setting asks for."""
    shape = list(parts.nodes.shape[1:] if kind == "node" else parts.vectors[kind].shape[1:2])
    if setting.units == "sum" and kind == "node":
        shape[-1] = 1
    return torch.Size(shape[1:] if setting.positions == "sum" else shape)


def _change(
    setting: Setting, batch: Batch, site: Site, kind: str, shape: torch.Size, chunk: Tensor, runs: Runs, start: Tensor
) -> Tensor:
    """Sum over prompts of start - m(patched), for each node of the chunk."""
    n = len(chunk)
    clean, base = runs.clean[site.hook], runs.base[site.hook]
    nodes = _repeat(clean.nodes, n)
    vectors = {name: _repeat(vector, n) for name, vector in clean.vectors.items()}
    for row, (position, unit) in enumerate(_places(setting, shape, chunk, kind)):
        if kind == "node":
            nodes[row][:, position, unit] = 0 if base is None else base.nodes[:, position, unit]
        else:
            vectors[kind][row][:, position] = 0 if base is None else base.vectors[kind][:, position]
    patched = Parts(nodes.flatten(0, 1), {name: vector.flatten(0, 1) for name, vector in vectors.items()})
    repeated = batch.repeat(n)
    replace = [(site.hook, lambda value, hook: site.put_together(patched, value))]
    narrow = answers_only(setting.model, repeated, setting.metric)
    with torch.no_grad(), narrow as seen, setting.model.hooks(fwd_hooks=replace):
        metric = measure(setting.metric, logits_of(setting.model, repeated.clean, repeated.attention_mask), seen)
    return (start[None] - metric.reshape(n, len(batch))).sum(1)


def _repeat(value: Tensor, n: int) -> Tensor:
    return value[None].expand(n, *value.shape).clone()


def _places(setting: Setting, shape: torch.Size, chunk: Tensor, kind: str) -> Iterator[tuple[slice, slice]]:
    """Position and unit of every node of the chunk, as slices."""
    every = slice(None)
    width = shape[-1] if kind == "node" else 1
    for index in chunk.tolist():
        position, unit = (every, index) if setting.positions == "sum" else divmod(index, width)
        where = position if isinstance(position, slice) else slice(position, position + 1)
        yield where, every if setting.units == "sum" else slice(unit, unit + 1)
