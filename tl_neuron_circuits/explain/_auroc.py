"""Area under the ROC curve of many scores at once, ties counting one half."""

import torch
from jaxtyping import Bool, Float
from torch import Tensor


def auroc(scores: Float[Tensor, "prompt node"], members: Bool[Tensor, "prompt label"]) -> Float[Tensor, "label node"]:
    """The probability that a prompt of the label has a higher score than one without, ties one half.

    By ranks: AUROC = (sum of the members' mean ranks - n (n + 1) / 2) / (n m); nan where a label has all prompts or
    none. Cost: one sort a node. Float64.
    """
    columns = scores.double().T.contiguous()
    ordered = columns.sort(dim=1).values
    below = torch.searchsorted(ordered, columns, right=False)
    up_to = torch.searchsorted(ordered, columns, right=True)
    ranks = (below + up_to + 1).double() / 2
    inside = members.double()
    n = inside.sum(0)
    m = len(scores) - n
    return ((inside.T @ ranks.T) - (n * (n + 1) / 2)[:, None]) / (n * m)[:, None]
