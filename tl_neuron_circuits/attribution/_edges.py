"""Edges: the direct effect of every chosen node, embedding, error and bias on every chosen node and goal.

    weight(s -> t)      = (a_s - a_s,base) * d a_t / d a_s     attention and norms frozen, nodes in between stopped
    attribution(s -> t) = weight(s -> t) * dG / d a_t          through all paths from t on; averaged over prompts

The target is a neuron, read through its MLP by the rules of relevance propagation, or a feature, read by its encoder
as it fires: both are linear in what arrives. So the weights of all sources sum to the target's activation: chosen
nodes, the embedding of each position, positional embeddings, biases (those of dictionaries too), per layer and position
the dictionary's error, and per position the remainder (the nodes that were not chosen). A transcoder's skip is part of
the paths, as attention is. That sum is checked whenever edges are computed. With pairs, weights are of differences,
biases cancel, and the residual of the linearisation is a source of its own.

Cost: two forward passes a prompt (three for pairs) and a vector-Jacobian product a target, in chunks of `max_bytes`.
Source: Arora et al. 2026, arXiv 2601.22594; Ameisen et al. 2025 (features); METHODS 1.5, 4.5.
"""

from collections.abc import Iterator, Sequence
from contextlib import nullcontext
from dataclasses import dataclass

import torch
from jaxtyping import Float, Int
from torch import Tensor
from tqdm.auto import tqdm

from .._errors import NumericalError
from ..bases import Neurons
from ..models import TransformerLensModel
from ..propagation import biases_in_graph, relp
from ..tasks import Batch
from ._edges_run import PromptRun, run_prompt
from ._edges_slots import Chosen, Slot, slots_of, summed, wide
from ._edges_totals import Changes, Totals, totals
from ._goals import Goal

_ALLOWED = {torch.float64: 1e-5, torch.float32: 1e-4, torch.float16: 0.05, torch.bfloat16: 0.1}


@dataclass(frozen=True, eq=False)
class DirectEffects:
    """Edges as one sparse matrix: a row a target, a column a source, two values an edge (weight, attribution).

    Targets: the nodes, then the goals. Sources: see `Columns`.

    Example:
        >>> import torch
        >>> import tl_neuron_circuits as tnc
        >>> from tl_neuron_circuits import attribution
        >>> model = tnc.load_demo_model()
        >>> pairs = tnc.PromptPairs(clean=["The dogs near the cat"], answer=[" are"])
        >>> batches = list(tnc.tasks.tokenise(model, pairs).batches(1))
        >>> goals = [attribution.answer_goal(against_wrong=False)]
        >>> neurons = torch.tensor([[0, 2, 7], [1, 2, 9], [2, 5, 3]])  # layer, position, unit
        >>> found = attribution.direct_effects(model, batches, neurons, goals, paired=False)
        >>> weight, attribution_of_edge = found.edges.to_dense()[1, 0].tolist()  # from the first neuron to the second
        >>> found.columns.embedding, found.columns.remainder, len(found.columns)
        (3, 9, 18)
    """

    nodes: Chosen
    edges: Float[Tensor, "target source 2"]
    totals: Totals
    largest_residual: float
    """What incoming edges leave unexplained where nothing should be, relative to the sum of their sizes."""
    chunk: int
    """Targets in one backward pass."""
    columns: "Columns"


@dataclass(frozen=True)
class Columns:
    """Where each kind of source stands: nodes, by position embeddings and remainders, positions, biases, the residual.

    Then the errors of each slot that has them, by position.
    """

    n_nodes: int
    n_positions: int
    slots_with_errors: tuple[int, ...] = ()

    @property
    def embedding(self) -> int:
        """First embedding."""
        return self.n_nodes

    @property
    def remainder(self) -> int:
        """First remainder."""
        return self.n_nodes + self.n_positions

    @property
    def positional(self) -> int:
        """The positional embeddings."""
        return self.n_nodes + 2 * self.n_positions

    @property
    def bias(self) -> int:
        """The biases."""
        return self.positional + 1

    @property
    def residual(self) -> int:
        """What the linearisation misses."""
        return self.positional + 2

    def errors(self, slot: int) -> slice:
        """The errors of one slot."""
        first = self.residual + 1 + self.slots_with_errors.index(slot) * self.n_positions
        return slice(first, first + self.n_positions)

    def __len__(self) -> int:
        """How many sources there are."""
        return self.residual + 1 + len(self.slots_with_errors) * self.n_positions


def mean_totals(
    model: TransformerLensModel, batches: Sequence[Batch], goals: Sequence[Goal], *, paired: bool,
    slots: Sequence[Slot] | None = None,
) -> Totals:  # fmt: skip
    """Total effects on the goals' sum, averaged over batches of one prompt each.

    Example:
        >>> import tl_neuron_circuits as tnc
        >>> from tl_neuron_circuits import attribution
        >>> model = tnc.load_demo_model()
        >>> pairs = tnc.PromptPairs(clean=["The dogs near the cat"], answer=[" are"])
        >>> batches = list(tnc.tasks.tokenise(model, pairs).batches(1))
        >>> goals = [attribution.answer_goal(against_wrong=False)]
        >>> found = attribution.mean_totals(model, batches, goals, paired=False)
        >>> everything = float(found.embedding.sum()) + found.positional + found.bias
        >>> abs(everything / float(found.goals.sum()) - 1) < 1e-3  # relevance is conserved
        True
    """
    slots = slots_of(model, Neurons()) if slots is None else slots
    found = None
    for batch in batches:
        one, _ = totals(model, batch, slots, goals, paired=paired)
        found = one if found is None else found.plus(one)
    assert found is not None
    return found.over(len(batches))


def direct_effects(
    model: TransformerLensModel, batches: Sequence[Batch], nodes: Chosen, goals: Sequence[Goal], *,
    paired: bool, slots: Sequence[Slot] | None = None, max_bytes: int = 2**30, verbose: bool = False,
) -> DirectEffects:  # fmt: skip
    """Edges between `nodes`, and from everything to them and to the goals, averaged over prompts of one length.

    Args:
        model: any TransformerLens model that RelP applies to.
        batches: one prompt each.
        nodes: slot, position and unit, ordered by slot.
        goals: see `Goal`.
        paired: take differences to the corrupt prompts.
        slots: from `slots_of`; the neurons of every layer unless given.
        max_bytes: for the gradients of one chunk of targets, on top of the graph of one prompt.
        verbose: show progress.

    Raises:
        NumericalError: incoming edges do not sum to a target's activation.

    Example:
        >>> import torch
        >>> import tl_neuron_circuits as tnc
        >>> from tl_neuron_circuits import attribution
        >>> model = tnc.load_demo_model()
        >>> pairs = tnc.PromptPairs(clean=["The dogs near the cat"], answer=[" are"])
        >>> batches = list(tnc.tasks.tokenise(model, pairs).batches(1))
        >>> goals = [attribution.answer_goal(against_wrong=False)]
        >>> neurons = torch.tensor([[0, 2, 7], [1, 2, 9], [2, 5, 3]])  # layer, position, unit
        >>> found = attribution.direct_effects(model, batches, neurons, goals, paired=False)
        >>> tuple(found.edges.shape) == (len(neurons) + len(goals), len(found.columns), 2)
        True
        >>> found.largest_residual < 1e-4
        True
    """
    slots = slots_of(model, Neurons()) if slots is None else slots
    with_errors = tuple(index for index, slot in enumerate(slots) if slot.has_error)
    columns = Columns(len(nodes), batches[0].clean.shape[1], with_errors)
    size = (len(nodes) + len(goals), len(columns), 2)
    found, sums, worst, chunk = None, None, 0.0, 1
    with tqdm(total=len(batches) * size[0], desc="edges", disable=not verbose, unit="target") as bar:
        for batch in batches:
            one, change = totals(model, batch, slots, goals, paired=paired)
            prompt = _Prompt(model, batch, slots, goals, nodes, columns, change, one, max_bytes)
            parts = list(prompt.edges(bar))
            indices, values = torch.cat([i for i, _ in parts], 1), torch.cat([v for _, v in parts])
            matrix = torch.sparse_coo_tensor(indices, values / len(batches), size, check_invariants=True)
            found = matrix if found is None else (found + matrix)
            sums = one if sums is None else sums.plus(one)
            worst, chunk = max(worst, prompt.largest_residual), prompt.chunk
    assert found is not None and sums is not None
    return DirectEffects(nodes, found.coalesce(), sums.over(len(batches)), worst, chunk, columns)


class _Prompt:
    """Edges of one prompt, a chunk of targets at a time."""

    def __init__(
        self, model: TransformerLensModel, batch: Batch, slots: Sequence[Slot], goals: Sequence[Goal], nodes: Chosen,
        columns: Columns, change: Changes, total: Totals, max_bytes: int,
    ) -> None:  # fmt: skip
        self._model, self._batch, self._slots, self._goals, self._nodes = model, batch, slots, goals, nodes
        self._columns, self._change, self._total = columns, change, total
        self._allowed = _ALLOWED.get(change.embedding.dtype, 1e-4)
        self._of_slot = [(nodes[:, 0] == index).nonzero()[:, 0] for index in range(len(slots))]
        self.largest_residual = 0.0
        self.chunk = max(1, min(len(nodes), max_bytes // bytes_per_target(change)))

    def edges(self, bar: tqdm) -> Iterator[tuple[Int[Tensor, "2 edge"], Float[Tensor, "edge 2"]]]:
        """Target and source of each edge that is not zero, and its weight and attribution."""
        biased = nullcontext({}) if self._change.paired else biases_in_graph(self._model)
        with relp(self._model), biased as biases:
            run = run_prompt(self._model, self._batch, self._slots, cut=True)
            goals = torch.stack([goal.value(run, self._batch) for goal in self._goals])
            for slot in range(len(self._slots)):
                for rows in self._of_slot[slot].split(self.chunk):
                    if len(rows):
                        yield self._node_rows(run, biases, slot, rows)
                    bar.update(len(rows))
            for rows in torch.arange(len(self._goals)).split(self.chunk):
                yield self._goal_rows(run, biases, goals, rows)
                bar.update(len(rows))

    def _node_rows(self, run: PromptRun, biases: dict, index: int, rows: Tensor) -> tuple[Tensor, Tensor]:
        slot, here = self._slots[index], run.slots[index]
        place, unit = self._nodes[rows, 1], self._nodes[rows, 2]
        weights = self._weights(run, biases, here.reading, slot.seeds(here, place, unit), index)
        constant = None if self._change.paired else slot.constant(here, place, unit)
        if constant is not None:
            weights[:, self._columns.bias] += constant
        activation, slope = (
            of[place.to(of.device), unit.to(of.device)].cpu().double()
            for of in (self._change.slots[index].nodes, self._total.gradient[index])
        )
        return self._sparse(weights, rows, activation, slope, exact=not self._change.paired)

    def _goal_rows(self, run: PromptRun, biases: dict, goals: Tensor, rows: Tensor) -> tuple[Tensor, Tensor]:
        chosen = torch.eye(len(goals), dtype=goals.dtype, device=goals.device)[rows.to(goals.device)]
        weights = self._weights(run, biases, goals, chosen, len(run.slots))
        exact = not self._change.paired and all(goal.linear for goal in self._goals)
        rows_after = rows + len(self._nodes)
        return self._sparse(weights, rows_after, self._change.goals[rows], torch.ones(len(rows)).double(), exact=exact)

    def _weights(
        self, run: PromptRun, biases: dict[str, Tensor], output: Tensor, chosen: Tensor, n_slots: int
    ) -> Float[Tensor, "target source"]:
        """Dense weights of a few targets, by one batched backward pass."""
        change, columns = self._change, self._columns
        positional = [] if change.positional is None or run.positional is None else [run.positional]
        sources = [slot.source for slot in run.slots[:n_slots]]
        inputs = [*sources, run.embedding, *positional, *biases.values()]
        gradients = torch.autograd.grad(
            output, inputs, chosen, retain_graph=True, allow_unused=True, is_grads_batched=True
        )
        weights = torch.zeros(len(chosen), len(columns), dtype=torch.float64)
        for slot, gradient in enumerate(gradients[:n_slots]):
            if gradient is not None:
                self._arrive(weights, slot, gradient[:, 0].flatten(2))
        embedding = gradients[n_slots]
        if embedding is not None:
            weights[:, columns.embedding : columns.remainder] = summed(
                wide(embedding[:, 0]) * wide(change.embedding[0])
            )
        if positional and gradients[n_slots + 1] is not None:
            assert change.positional is not None
            weights[:, columns.positional] = _dots(change.positional, gradients[n_slots + 1])
        for bias, gradient in zip(biases.values(), gradients[n_slots + 1 + len(positional) :], strict=True):
            if gradient is not None:
                weights[:, columns.bias] += _dots(bias, gradient)
        return weights

    def _arrive(self, weights: Tensor, slot: int, gradient: Float[Tensor, "target pos d"]) -> None:
        """Enter what comes from one slot: its chosen nodes, the remainder, errors and biases."""
        columns, here = self._columns, self._of_slot[slot]
        place, unit = self._nodes[here, 1], self._nodes[here, 2]
        found = self._slots[slot].arrivals(gradient, self._change.slots[slot], place, unit)
        weights[:, here] = found.nodes
        left = weights[:, columns.remainder : columns.positional]
        left += found.everything
        left.index_add_(1, place, found.nodes, alpha=-1)
        if found.error is not None:
            weights[:, columns.errors(slot)] = found.error
        if found.bias is not None and not self._change.paired:
            weights[:, columns.bias] += found.bias

    def _sparse(
        self, weights: Tensor, rows: Tensor, activation: Tensor, slope: Tensor, *, exact: bool
    ) -> tuple[Tensor, Tensor]:
        """Check the sums, add the residual where one belongs, and keep what is not zero."""
        residual = activation - weights.sum(1)
        relative = residual.abs() / (weights.abs().sum(1) + torch.finfo(torch.float32).tiny)
        if exact:
            self.largest_residual = max(self.largest_residual, float(relative.max()))
            if not self.largest_residual <= self._allowed:
                raise NumericalError(
                    f"incoming edges do not sum to their target's activation: off by {self.largest_residual:.1e} of "
                    f"the sum of their sizes, allowed {self._allowed:.0e}. check_model(model) tells whether relevance "
                    "is conserved on this model; in half precision use float32."
                )
        else:
            rounding = 100 * torch.finfo(self._change.embedding.dtype).eps
            weights[:, self._columns.residual] = torch.where(relative > rounding, residual, 0.0)
        target, source = weights.nonzero(as_tuple=True)
        weight = weights[target, source]
        return torch.stack([rows[target], source]), torch.stack([weight, weight * slope[target]], 1)


def _dots(value: Tensor, gradient: Tensor) -> Float[Tensor, " target"]:
    return summed((wide(gradient) * wide(value.detach())).reshape(len(gradient), 1, -1))[:, 0]


def bytes_per_target(change: Changes) -> int:
    """Bytes that one target's backward pass holds at its peak: the gradients at all sources, and a few more."""
    n_positions, d_model = change.embedding[0].shape
    widths = [slot.width for slot in change.slots]
    return change.embedding.element_size() * n_positions * (sum(widths) + 5 * max(widths) + 12 * d_model)
