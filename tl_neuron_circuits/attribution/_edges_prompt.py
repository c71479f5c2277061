"""One prompt, open: its graph, its scores, and the way down from every node and goal."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass

import torch
from torch import Tensor

from .._errors import PropagationError
from ..models import TransformerLensModel
from ..propagation import biases_in_graph, relp
from ..tasks import Batch
from ._edges_paths import Paths, find_paths
from ._edges_run import run_prompt
from ._edges_slot import Slot
from ._edges_totals import Changes, Totals, baseline, changes, goal_values, totals
from ._goals import Goal


@dataclass(frozen=True, eq=False)
class Prompt:
    """What one prompt has, while its graph stands."""

    slots: Sequence[Slot]
    paths: Paths
    goals: Tensor
    """With their past."""
    linear: bool
    """Whether the goals are."""
    biases: Sequence[Tensor]
    change: Changes
    totals: Totals


@contextmanager
def opened(
    model: TransformerLensModel, batch: Batch, slots: Sequence[Slot], goals: Sequence[Goal], *, paired: bool
) -> Iterator[Prompt]:
    """Run a batch of one prompt: one forward and one backward pass, and a forward of its corrupt prompt for pairs.

    Raises:
        PropagationError: gradients are disabled.
    """
    if not torch.is_grad_enabled() or torch.is_inference_mode_enabled():
        raise PropagationError(
            "expected gradients to be enabled; call this outside torch.no_grad() and inference_mode()."
        )
    base = baseline(model, batch, slots, goals) if paired else None
    with relp(model), nullcontext({}) if paired else biases_in_graph(model) as biases:
        run = run_prompt(model, batch, slots)
        values = goal_values(goals, run, batch)
        change = changes(slots, run, values.detach(), base)
        some = list(biases.values())
        paths = find_paths(run, slots, values, some, positional=change.positional is not None)
        found = totals(run, paths, slots, change, some)
        yield Prompt(slots, paths, values, all(goal.linear for goal in goals), some, change, found)
