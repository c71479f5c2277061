"""Which contrasts a model gets right: in every direction that is asked, the metric is above zero."""

import torch

from .._errors import PairsError, SettingsError
from ..models._protocol import TransformerLensModel
from ..models._threads import holding
from ._metrics import Metric, logit_difference, measure
from ._pairs import PromptPairs, directions
from ._tokenize import tokenize


@holding
def contrasts_right(
    model: TransformerLensModel, pairs: PromptPairs, metric: Metric | None, batch_size: int
) -> list[int]:
    """Indices of the pairs of these contrasts, in order. Cost: one forward pass per pair.

    Raises:
        PairsError: there are none.
    """
    if batch_size < 1:
        raise SettingsError(f"expected batch_size of at least 1; got {batch_size}.")
    tokens = tokenize(model, pairs, aligned=False)
    right = torch.zeros(len(pairs), dtype=torch.bool)
    with torch.no_grad():
        for batch in tokens.batches(batch_size):
            values = measure(metric or logit_difference, model(batch.clean), batch)
            right[batch.index.cpu()] = (values > 0).cpu()
    contrast = directions(pairs)
    wrong = {contrast[index] for index in (~right).nonzero().flatten().tolist()}
    kept = [index for index in range(len(pairs)) if contrast[index] not in wrong]
    if not kept:
        raise PairsError(
            f"the model is right in every direction of none of the {len(set(contrast))} contrasts ({int(right.sum())} "
            f"of {len(pairs)} pairs by themselves). Ask something that it knows, or look at the metric."
        )
    return kept
