"""Features over data: their mean activation, and one feature's every activation, in one stream of forward passes."""

from collections.abc import Iterator, Sequence

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from .._errors import SettingsError
from ..bases._dictionary import Dictionary
from ..bases._runs import Values, values_at
from ..models._protocol import TransformerLensModel
from ._residual_run import ResidualRun

_CHUNK = 2**25
Prompts = Int[Tensor, "prompt pos"]


def feature_means(
    model: TransformerLensModel, run: ResidualRun, tokens: Prompts, ignore: tuple[int, ...], batch_size: int
) -> dict[int, Float[Tensor, " feature"]]:
    """The mean activation of every feature over all positions that count, by layer.

    Raises:
        SettingsError: no position counts.
    """
    reads = {layer: (w.dictionary, w.hook_in) for layer, w in enumerate(run.mlps) if w.dictionary is not None}
    sums = {layer: torch.zeros(dictionary.d_dict) for layer, (dictionary, _) in reads.items()}
    count = 0
    for values, counts in runs_over(model, tokens, [hook_in for _, hook_in in reads.values()], ignore, batch_size):
        count += int(counts.sum())
        for layer, (dictionary, hook_in) in reads.items():
            value = values[hook_in]
            x = value.reshape(*counts.shape, -1)[counts.to(value.device)]
            for features in encoded(dictionary, x):
                sums[layer] += features.sum(0).float().cpu()
    if not count:
        raise SettingsError("expected tokens with positions that are not ignored; got none.")
    return {layer: total / count for layer, total in sums.items()}


def feature_activations(
    model: TransformerLensModel, dictionary: Dictionary, hook_in: str, unit: int, tokens: Prompts, batch_size: int
) -> Float[Tensor, "prompt pos"]:
    """One feature's activation at every position, on the CPU."""
    found = []
    for values, counts in runs_over(model, tokens, [hook_in], (), batch_size):
        x = values[hook_in].reshape(counts.numel(), -1)
        one = torch.cat([features[:, unit] for features in encoded(dictionary, x)])
        found.append(one.float().cpu().reshape(counts.shape))
    return torch.cat(found)


def runs_over(
    model: TransformerLensModel, tokens: Prompts, names: Sequence[str], ignore: tuple[int, ...], batch_size: int
) -> Iterator[tuple[Values, Bool[Tensor, "batch pos"]]]:
    """Values at hook points, batch after batch, and which positions count."""
    if batch_size < 1:
        raise SettingsError(f"expected batch_size of at least 1; got {batch_size}.")
    wanted = list(dict.fromkeys(names))
    for start in range(0, len(tokens), batch_size):
        part = tokens[start : start + batch_size].to(model.cfg.device or "cpu")
        ignored = torch.tensor(ignore, dtype=part.dtype, device=part.device)
        yield values_at(model, part, wanted), ~torch.isin(part, ignored)


def encoded(dictionary: Dictionary, x: Float[Tensor, "row d_in"]) -> Iterator[Float[Tensor, "row feature"]]:
    """The features of many positions, a chunk at a time, so that memory does not grow with the dictionary."""
    step = max(1, _CHUNK // dictionary.d_dict)
    for start in range(0, len(x), step):
        yield dictionary.encode(x[start : start + step])
