"""Area under the ROC curve of many scores at once, ties counting one half."""

import torch
from jaxtyping import Bool, Float
from torch import Tensor


def auroc(scores: Float[Tensor, "row column"], members: Bool[Tensor, "row label"]) -> Float[Tensor, "label column"]:
    """For every label and column of scores, the probability that a member's score is above a non-member's, ties half.

    By ranks: AUROC = (sum of the members' mean ranks - n (n + 1) / 2) / (n m) with n members and m others; nan where a
    label has all rows or none. Cost: one sort per column. Float64.
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
