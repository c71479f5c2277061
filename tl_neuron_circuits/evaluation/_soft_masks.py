"""How much of a learned order's success is that of its soft masks.

    soft(k) = faithfulness with every node mixed by its mask of budget k
    hard(k) = faithfulness with the k best live and the rest at their counterfactual values

Learning sees soft masks alone; a circuit is hard. While scores lie close together in units of the temperature, most of
a small budget is spread over all nodes, and a low loss says little about circuits.
Source: METHODS 5.8.
"""

from collections.abc import Sequence
from typing import Any

import pandas as pd
import torch
from torch import Tensor

from .._errors import SettingsError
from .._processes import current_processes
from .._progress import show_batches
from .._typing import checked
from ..bases._runs import mean_parts
from ..bases._site import basis_sites
from ..models._protocol import TransformerLensModel
from ..models._threads import holding
from ..nodes._attribute import check_pairs
from ..nodes._learned_mask import LearnedMask, find_threshold
from ..nodes._masked_runs import masked_run, measure_references, node_shapes, split_blocks
from ..nodes._methods import METHODS
from ..nodes._scope import Scope
from ..nodes._scores import NodeScores
from ..tasks._metrics import Metric, logit_difference
from ..tasks._pairs import PromptPairs
from ..tasks._tokenize import tokenize
from ..tasks._tokenized import TokenizedPairs
from ._node_sets import chosen_sizes


@holding
@checked
def compare_soft_masks(
    model: TransformerLensModel,
    pairs: PromptPairs | TokenizedPairs,
    scores: NodeScores,
    *,
    sizes: Sequence[int] | None = None,
    metric: Metric = logit_difference,
    batch_size: int = 32,
    verbose: bool | None = None,
) -> pd.DataFrame:
    """Faithfulness of a learned order with its soft masks and with hard ones, at several sizes.

    Ablation is that of learning: the scores' own baseline; with direction "flip" the best nodes are the ablated ones.

    Args:
        model: the model that the scores were learned on.
        pairs: a development split, or those to be judged on.
        scores: of `LearnedMask`.
        sizes: budgets of the masks, below the number of nodes; log-spaced unless given.
        metric: as in `attribute`.
        batch_size: prompts in one pass.
        verbose: as in `attribute`.

    Returns:
        One row per size: size, outside (the mask's mass outside the best, over the size), soft, hard, and difference
        (hard - soft).

    Raises:
        SettingsError: the scores are not of a learned mask, or lack their dictionaries.
        PairsError: as `attribute`.

    Source: METHODS 5.8.

    Example:
        >>> import tl_neuron_circuits as tnc
        >>> model, pairs = tnc.load_demo_model(), tnc.tasks.subject_verb_agreement("simple", n=8)
        >>> scores = tnc.attribute(model, pairs, method=tnc.LearnedMask(steps=5))
        >>> table = tnc.evaluation.compare_soft_masks(model, pairs, scores, sizes=[10, 100])
        >>> table.columns.tolist()
        ['size', 'outside', 'soft', 'hard', 'difference']
    """
    options: dict[str, Any] = dict(scores.settings["method_options"])
    if METHODS.get(options.pop("name")) is not LearnedMask or scores.basis is None:
        raise SettingsError(
            f"expected scores of a learned mask with their basis; got {scores!r}. Attribute with LearnedMask()."
        )
    learned = LearnedMask(**{**options, "development": None})
    baseline, positions = scores.settings["baseline"], scores.positions
    scope = Scope(model, basis_sites(model, scores.basis), metric, baseline, "noising", positions, "keep")
    tokens = tokenize(model, pairs)
    check_pairs(tokens, scope)
    flat = scores.flat()
    chosen = [size for size in chosen_sizes(sizes, len(flat)) if 0 < size < len(flat)]
    temperature = learned.temperature * learned.cooling ** (scores.settings["learning"]["steps"] - 1)
    pairs_of_masks = [_masks(flat, size, temperature) for size in chosen]
    judge = LearnedMask(loss="matching", direction=learned.direction)
    run = LearnedMask(loss="metric", direction=learned.direction)
    sums = torch.zeros(len(chosen), 2, dtype=torch.float64)
    full = empty = 0.0
    with current_processes().together("compare_soft_masks", dict(scores.settings)), torch.no_grad():
        means = mean_parts(model, scope.sites, tokens.batches(batch_size)) if baseline == "mean" else None
        for batch in show_batches(tokens.batches(batch_size), len(tokens), desc="masks", verbose=verbose):
            shapes = node_shapes(scope, scope.values(batch))
            references = measure_references(judge, scope, batch, means, shapes)
            full, empty = full + float(references["full"].sum()), empty + float(references["empty"].sum())
            for row, masks in enumerate(pairs_of_masks):
                for column, mask in enumerate(masks):
                    found = masked_run(run, scope, batch, references, means, split_blocks(mask, shapes))
                    sums[row, column] += found.sum(dtype=torch.float64).cpu()
    faithfulness = ((sums - empty) / (full - empty)).tolist()
    rows = []
    for size, (soft, hard), values in zip(chosen, pairs_of_masks, faithfulness, strict=True):
        outside = float(soft[hard == 0].sum(dtype=torch.float64)) / size
        rows.append((size, outside, values[0], values[1], values[1] - values[0]))
    return pd.DataFrame(rows, columns=["size", "outside", "soft", "hard", "difference"])


def _masks(scores: Tensor, size: int, temperature: float) -> tuple[Tensor, Tensor]:
    """The soft mask of this budget, and the hard one of its best nodes."""
    soft = ((scores - find_threshold(scores, float(size), temperature)) / temperature).sigmoid()
    hard = torch.zeros_like(soft)
    hard[scores.argsort(descending=True, stable=True)[:size]] = 1.0
    return soft, hard
