"""One prompt, open: its graph, its scores, and the way down from every node and goal."""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor

from .._errors import PropagationError
from ..models._protocol import TransformerLensModel
from ..propagation._biases import biases_in_graph
from ..propagation._relp import relp
from ..tasks._tokenized import Batch
from ._paths import Paths, find_paths
from ._prompt_run import run_prompt
from ._slot import Slot
from ._target import Goal
from ._totals import Changes, Totals, changes, goal_values, totals

Goals = Sequence[Goal] | Callable[[Float[Tensor, " d_vocab"]], Sequence[Goal]]
"""Goals, or what finds them from the logits of the next token."""


@dataclass(frozen=True, eq=False)
class Prompt:
    """What one prompt has, while its graph stands."""

    slots: Sequence[Slot]
    paths: Paths
    goals: Sequence[Goal]
    values: Float[Tensor, " goal"]
    """The goals', with their past."""
    biases: Sequence[Tensor]
    change: Changes
    totals: Totals


@contextmanager
def opened(
    model: TransformerLensModel, batch: Batch, slots: Sequence[Slot], goals: Goals, *, paired: bool
) -> Iterator[Prompt]:
    """Run a batch of one prompt: one forward and one backward pass, and a forward of its corrupt prompt for pairs.

    Raises:
        PropagationError: gradients are disabled.
    """
    if not torch.is_grad_enabled() or torch.is_inference_mode_enabled():
        raise PropagationError(
            "expected gradients to be enabled; call this outside torch.no_grad() and inference_mode()."
        )
    there, base, position = batch.on_corrupt() if paired else None, None, int(batch.position[0])
    if there is not None:
        with torch.no_grad():
            base = run_prompt(model, there, slots)
    with relp(model), nullcontext({}) if paired else biases_in_graph(model) as biases:
        run = run_prompt(model, batch, slots)
        found = goals(run.logits[0, position].detach()) if callable(goals) else goals
        values = goal_values(found, run, batch)
        base_values = None if base is None or there is None else goal_values(found, base, there).cpu().double()
        change = changes(slots, run, values.detach(), base, base_values)
        some = list(biases.values())
        paths = find_paths(run, slots, values, some, positional=change.positional is not None)
        total = totals(run, paths, slots, change, some, position)
        yield Prompt(slots, paths, found, values, some, change, total)
