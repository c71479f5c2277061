"""Edges: the direct effect of every chosen node, embedding, error and bias on every chosen node and target.

    weight(s -> t)      = (a_s - a_s,base) * d a_t / d a_s     attention and norms frozen, nodes in between stopped
    attribution(s -> t) = weight(s -> t) * dG / d a_t          through all paths from t on; averaged over prompts

G is the sum of the targets (`_targets.py`). The receiver t is a neuron, read through its MLP by the rules of relevance
propagation, or a feature, read by its encoder as it fires: both are linear in what arrives. So the weights of all
sources sum to the receiver's activation: chosen nodes, the embedding of each position, positional embeddings, biases
(those of dictionaries too), the dictionary's error at each layer and position, and at each position the remainder (the
nodes that were not chosen). A transcoder's skip is part of the paths, as attention is. That sum is checked whenever
edges are computed. Pairs take the corrupt prompt as baseline: weights are of differences, biases cancel, and the error
of the linearization is a source of its own.

The algorithm, for each batch of prompts of one length: one forward pass with a graph and one backward pass for the
scores (`_total_effects.py`); then a vector-Jacobian product per receiver, through attention alone and only below the
receiver, in chunks of `max_bytes` (`_Edges`). Prompts of a batch do not touch each other, so one product serves a
receiver on all of them: sources belong to one prompt each.

Where a place of the circuit is several tokens of a prompt (`_alignment.py`), a node there is the sum of its nodes at
those tokens. Weights into it are one product, seeded at all of them; attributions into it, whose slopes differ by
token, are a second one.

Profiles: the token s's part of a node's activation through *all* paths, e_s . d a_t / d e_s, is the same product with
nodes passing on what reaches them; a node's contribution to each target is a backward pass per target.
Source: Arora et al. 2026, arXiv 2601.22594; Ameisen et al. 2025 (features, local replacement); METHODS 1.2, 1.5, 4.5.
"""

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace

import torch
from jaxtyping import Float, Int
from torch import Tensor

from .._errors import NumericalError, SettingsError
from .._memory import free_memory
from .._progress import Bar, progress
from ..models._protocol import TransformerLensModel
from ..tasks._tokenized import Batch
from ._alignment import Alignment, identity
from ._prompt_graph import End
from ._slots import Chosen, DictionarySlot, Reading, Slot, by_position, sum_last_axis, widened
from ._targets import Target
from ._total_effects import OpenPrompt, Targets, Totals, mean_totals, open_prompt, total_effects

_ALLOWED = {torch.float64: 1e-5, torch.float32: 1e-4, torch.float16: 0.05, torch.bfloat16: 0.1}
_BYTES_PER_EDGE = 180
"""What `trace` holds per edge at its peak, tables included: 185 to 220 measured on SmolLM2-135M."""


@dataclass(frozen=True)
class Columns:
    """Which column of the edges belongs to which source.

    The chosen nodes, embeddings, remainders, positional embeddings, biases, the linearization error; then the errors of
    each slot that has them. Where each token's stand says the alignment: by position unless prompts differ in length.
    """

    n_nodes: int
    n_tokens: int
    n_rests: int
    slots_with_errors: tuple[int, ...] = ()

    @property
    def embedding(self) -> int:
        """First embedding."""
        return self.n_nodes

    @property
    def unselected(self) -> int:
        """First remainder."""
        return self.n_nodes + self.n_tokens

    @property
    def positional(self) -> int:
        """The positional embeddings."""
        return self.unselected + self.n_rests

    @property
    def bias(self) -> int:
        """The biases."""
        return self.positional + 1

    @property
    def linearization_error(self) -> int:
        """What the linearization misses."""
        return self.positional + 2

    def errors(self, slot: int) -> slice:
        """The errors of one slot."""
        first = self.linearization_error + 1 + self.slots_with_errors.index(slot) * self.n_rests
        return slice(first, first + self.n_rests)

    def __len__(self) -> int:
        """How many sources there are."""
        return self.linearization_error + 1 + len(self.slots_with_errors) * self.n_rests


@dataclass(frozen=True, eq=False)
class PromptEffects:
    """What one prompt adds to the mean: numbers of the chosen nodes, and edges as receiver, source and two values."""

    prompt: int
    """Its place among all prompts."""
    score: Float[Tensor, " node"]
    change: Float[Tensor, " node"]
    embedding: Float[Tensor, " token"]
    errors: Sequence[Float[Tensor, " rest"] | None]
    target_changes: Float[Tensor, " target"]
    probabilities: Float[Tensor, "goal d_vocab"]
    indices: Int[Tensor, "2 edge"]
    values: Float[Tensor, "edge 2"]
    by_token: Float[Tensor, "receiver token 2"] | None = None
    """Profiles: each token's part of a receiver's change, and of its score, through all paths."""
    by_target: Float[Tensor, "target node"] | None = None
    """Profiles: each node's part of a target, through all paths."""


@dataclass(frozen=True, eq=False)
class DirectEffects:
    """Edges as one sparse matrix: a row per receiver, a column per source, two values per edge (weight, attribution).

    Receivers: the nodes, then the targets. Sources: see `Columns`.
    """

    nodes: Chosen
    edges: Float[Tensor, "receiver source 2"]
    totals: Totals
    largest_residual: float
    """What incoming edges leave unexplained where nothing should be, relative to the sum of their sizes."""
    chunk: int
    """Receivers in one backward pass."""
    columns: Columns
    targets: Sequence[Target]
    by_prompt: Sequence[PromptEffects] = ()
    """In the order of the prompts, where they were to be kept."""


def direct_effects(
    model: TransformerLensModel, batches: Sequence[Batch], nodes: Chosen | Callable[[Totals], Chosen],
    targets: Targets, *, paired: bool, slots: Sequence[Slot], alignments: Sequence[Alignment] | None = None,
    keep: bool = False, profiles: bool = False, max_bytes: int = 2**30,
    verbose: bool | None = None,
) -> DirectEffects:  # fmt: skip
    """Edges between `nodes`, and from everything to them and to the targets, averaged over prompts.

    Args:
        model: any TransformerLens model that RelP applies to.
        batches: prompts of one length each; several only where `can_share` says so.
        nodes: slot, place and unit; or what chooses them from the scores averaged over prompts.
        targets: see `Target`; for one prompt also what finds them from its next token's logits.
        paired: take differences to the corrupt prompts.
        slots: from `find_slots`.
        alignments: of all prompts; None where each token is a place of its own.
        keep: keep the numbers of each prompt.
        profiles: keep them, with the parts of every token in every node, and of every node in every target.
        max_bytes: for the gradients of one chunk of receivers, on top of the graph of one batch.
        verbose: a progress bar. None: after two seconds, in a notebook or a terminal.

    Raises:
        NumericalError: incoming edges do not sum to a receiver's activation.
        SettingsError: several prompts, and targets that depend on each.
    """
    n_prompts = sum(map(len, batches))
    if n_prompts > 1 and callable(targets):
        raise SettingsError(f"expected targets for {n_prompts} prompts; got a function that finds them for one.")
    if n_prompts > 1 and not isinstance(nodes, Tensor) and not callable(targets):
        own = {"paired": paired, "slots": slots, "alignments": alignments}
        nodes = nodes(mean_totals(model, batches, targets, **own, verbose=verbose))
    mean, totals, largest_residual, chunk, kept = None, None, 0.0, 1, {}
    with progress(desc="edges", verbose=verbose, unit="receiver") as bar:
        for batch in batches:
            with open_prompt(model, batch, slots, targets, paired=paired) as prompt:
                own = total_effects(prompt)
                places = [None if alignments is None else alignments[row] for row in batch.index.tolist()]
                nodes = nodes if isinstance(nodes, Tensor) else nodes(own[0].aligned(places[0]))
                edges = _Edges(prompt, own, nodes, places, max_bytes)
                bar.total = n_prompts * edges.size[0]
                parts = edges.by_prompt(bar)
                if profiles:
                    parts = edges.with_profiles(parts)
            for part, total, place in zip(parts, own, places, strict=True):
                matrix = torch.sparse_coo_tensor(part.indices, part.values, edges.size, check_invariants=True)
                mean = matrix if mean is None else mean + matrix
                total = total.aligned(place)
                totals = total if totals is None else totals.plus(total)
                if keep or profiles:
                    kept[part.prompt] = part
            largest_residual, chunk = max(largest_residual, edges.largest_residual), edges.chunk
    assert mean is not None and totals is not None and isinstance(nodes, Tensor)
    return DirectEffects(
        nodes, mean.coalesce() / n_prompts, totals.divided_by(n_prompts), largest_residual, chunk, edges.columns,
        prompt.targets, [kept[index] for index in sorted(kept)],
    )  # fmt: skip


@dataclass(frozen=True, eq=False)
class _Members:
    """The chosen nodes at every token of their place: one entry per node, prompt and token."""

    node: Int[Tensor, " member"]
    slot: Int[Tensor, " member"]
    at: Int[Tensor, " member"]
    """Position among those of all prompts."""
    unit: Int[Tensor, " member"]
    prompt: Int[Tensor, " member"]
    slope: Float[Tensor, " member"]
    """Gradient of the targets' sum."""
    change: Float[Tensor, " member"]


class _Edges:
    """Edges of a batch of prompts, a chunk of receivers at a time: nodes ordered by slot, then the targets.

    Weights are a row per receiver and the columns of one prompt after those of the other.
    """

    def __init__(
        self, prompt: OpenPrompt, totals: Sequence[Totals], nodes: Chosen, alignments: Sequence[Alignment | None],
        max_bytes: int,
    ) -> None:  # fmt: skip
        self._prompt, self._totals, self._nodes, self._max_bytes = prompt, totals, nodes, max_bytes
        n_prompts, n_positions = prompt.embedding.shape[:2]
        self._alignments = [identity(n_positions) if one is None else one for one in alignments]
        _require_memory(nodes, len(prompt.targets))
        n_targets, n_slots, first = len(prompt.targets), len(prompt.slots), self._alignments[0]
        with_errors = tuple(index for index, slot in enumerate(prompt.slots) if slot.has_error)
        self.columns = Columns(len(nodes), first.n_tokens, first.n_rests, with_errors)
        self.size = (len(nodes) + n_targets, len(self.columns), 2)
        offset = (torch.arange(n_prompts) * len(self.columns)).repeat_interleave(n_positions)
        self._rest = offset + torch.cat([one.rest for one in self._alignments])
        self._token = offset + torch.cat([one.token for one in self._alignments])
        self._members = members = self._find_members()
        count = torch.zeros(n_prompts, len(nodes), dtype=torch.long)
        count.index_put_((members.prompt, members.node), torch.ones_like(members.node), accumulate=True)
        self._spread = torch.cat([(count > 1).any(0), torch.zeros(n_targets, dtype=torch.bool)])
        targets = torch.stack([total.target_changes for total in totals])
        self._change = torch.cat([self._by_node(members.change), targets], 1)
        self._score = torch.cat([self._by_node(members.change * members.slope), targets], 1)
        self._slope = torch.cat([self._by_node(members.slope), torch.ones_like(targets)], 1)
        self._order = torch.cat(
            [
                *((nodes[:, 0] == index).nonzero()[:, 0] for index in range(n_slots)),
                len(nodes) + torch.arange(n_targets),
            ]
        )
        self._slot = torch.cat([nodes[:, 0], torch.full((n_targets,), n_slots)])
        self.largest_residual = 0.0
        self.chunk = max(1, min(self.size[0], max_bytes // bytes_per_receiver(prompt)))

    def _find_members(self) -> _Members:
        prompt, nodes = self._prompt, self._nodes
        n_positions = prompt.embedding.shape[1]
        place = torch.cat([one.place for one in self._alignments])
        node, at = (nodes[:, 1, None] == place).nonzero(as_tuple=True)
        slot, unit = nodes[node, 0], nodes[node, 2]
        slope, change = (torch.zeros(len(node), dtype=torch.float64) for _ in range(2))
        for index, own in enumerate(prompt.changes):
            here = (slot == index).nonzero()[:, 0]
            gradient = torch.cat([total.gradient[index] for total in self._totals])
            for into, values in ((change, own.nodes), (slope, gradient)):
                into[here] = values[at[here].to(values.device), unit[here].to(values.device)].cpu().double()
        return _Members(node, slot, at, unit, at // n_positions, slope, change)

    def _by_node(self, values: Float[Tensor, " member"]) -> Float[Tensor, "prompt node"]:
        """Members' values added up."""
        total = torch.zeros(len(self._totals), len(self._nodes), dtype=torch.float64)
        return total.index_put_((self._members.prompt, self._members.node), values, accumulate=True)

    def by_prompt(self, bar: Bar) -> list[PromptEffects]:
        """Receiver and source of each edge that is not zero, and its weight and attribution; by prompt."""
        found: list[list[tuple[Tensor, Tensor]]] = [[] for _ in self._totals]
        for rows in self._order.split(self.chunk):
            weights, spread = self._weights(rows), self._spread[rows]
            attributions = None
            if spread.any():
                attributions = torch.zeros_like(weights)
                attributions[spread] = self._weights(rows[spread], by_slope=True)
            for index, edges in enumerate(found):
                own = slice(index * len(self.columns), (index + 1) * len(self.columns))
                edges.append(
                    self._sparse(index, rows, weights[:, own], None if attributions is None else attributions[:, own])
                )
            bar.update(len(rows) * len(found))
        n_nodes, parts = len(self._nodes), []
        for index, (edges, total, alignment) in enumerate(zip(found, self._totals, self._alignments, strict=True)):
            indices, values = zip(*edges, strict=True)
            own = total.aligned(alignment)
            parts.append(
                PromptEffects(
                    int(self._prompt.batch.index[index]), self._score[index, :n_nodes], self._change[index, :n_nodes],
                    own.embedding, own.errors, own.target_changes, own.probabilities,
                    torch.cat(indices, 1), torch.cat(values),
                )
            )  # fmt: skip
        return parts

    def with_profiles(self, parts: Sequence[PromptEffects]) -> list[PromptEffects]:
        """The same with every token's part of every receiver, and every node's part of every target.

        Raises:
            SettingsError: paths pass by the layers, or nodes write into several of them.
        """
        prompt, slots, columns = self._prompt, self._prompt.slots, self.columns
        if not prompt.paths.layered or any(a.receives_from(b) for a in slots for b in slots):
            raise SettingsError(
                "profiles are computed from layer to layer; on this model paths go past the residual stream, or the "
                "dictionaries write into several layers. Leave profiles out."
            )
        every = torch.zeros(*self.size[:1], len(parts), columns.n_tokens, 2, dtype=torch.float64)
        width = max(run.nodes.shape[1] for run in prompt.run.slots) + prompt.embedding.shape[-1]
        each = 12 * prompt.embedding.element_size() * prompt.embedding.shape[0] * prompt.embedding.shape[1] * width
        for rows in self._order.split(max(1, self._max_bytes // each)):
            tokens = self._through_all_paths(rows)
            every[rows, ..., 0] = tokens
            every[rows, ..., 1] = tokens * self._slope.T[rows, :, None]
            spread = self._spread[rows]
            if spread.any():
                every[rows[spread], ..., 1] = self._through_all_paths(rows[spread], by_slope=True)
        by_target = torch.stack([self._by_node(self._members.change * slope) for slope in self._slopes_by_target()])
        return [
            replace(part, by_token=every[:, index], by_target=by_target[:, index]) for index, part in enumerate(parts)
        ]

    def _through_all_paths(self, rows: Tensor, *, by_slope: bool = False) -> Float[Tensor, "receiver prompt token"]:
        weights = self._weights(rows, by_slope=by_slope, through=True)
        by_prompt = weights.reshape(len(rows), len(self._totals), len(self.columns))
        return by_prompt[..., self.columns.embedding : self.columns.unselected]

    def _slopes_by_target(self) -> Iterator[Float[Tensor, " member"]]:
        """Each member's gradient of each target, through all paths."""
        prompt, members, n_targets = self._prompt, self._members, self._prompt.values.shape[1]
        for target in range(n_targets):
            slope = members.slope.clone()
            if n_targets > 1:
                seed = torch.zeros_like(prompt.values)
                seed[:, target] = 1
                gradients = prompt.paths.total(prompt.slots, seed)
                for index, run in enumerate(prompt.run.slots):
                    at = by_position(gradients.get(("slot", index), torch.zeros_like(run.source)))
                    gradient = prompt.slots[index].node_gradient(at)
                    here = (members.slot == index).nonzero()[:, 0]
                    slope[here] = gradient[members.at[here], members.unit[here]].cpu().double()
            yield slope

    def _weights(self, rows: Tensor, *, by_slope: bool = False, through: bool = False) -> Float[Tensor, "receiver _"]:
        """Dense weights into some receivers, by one batched backward pass; of their scores with `by_slope`.

        With `through`, weights of tokens through all paths.
        """
        columns, prompt, slot = self.columns, self._prompt, self._slot[rows]
        weights = torch.zeros(len(rows), len(columns) * len(self._totals), dtype=torch.float64)

        def rows_of(index: int) -> range:
            here = (slot == index).nonzero()[:, 0].tolist()
            return range(here[0], here[-1] + 1) if here else range(0)

        def seeds(index: int, some: range) -> tuple[Tensor, Tensor]:
            reading = self._read(index, rows[some.start : some.stop], by_slope=by_slope)
            if reading.constant is not None and not prompt.paired and len(self._totals) == 1:
                weights[some.start : some.stop, columns.bias] += reading.constant
            return reading.tensor, reading.seeds

        for receivers, end, gradient in prompt.paths.direct(rows_of, seeds, prompt.slots if through else None):
            into = weights[receivers]
            if end.kind == "slot":
                self._add_slot(into, end, gradient.reshape(len(gradient), len(self._rest), -1))
            elif end.kind == "embedding":
                product = widened(gradient) * widened(prompt.embedding)
                into.index_add_(1, columns.embedding + self._token, sum_last_axis(product.flatten(1, 2)))
            elif end.kind == "positional":
                assert prompt.positional is not None
                into[:, columns.positional] = _dots(prompt.positional, gradient)
            else:
                into[:, columns.bias] += _dots(prompt.biases[end.index], gradient)
        return weights

    def _read(self, index: int, rows: Tensor, *, by_slope: bool) -> Reading:
        """Receivers of one slot, or targets."""
        prompt, members = self._prompt, self._members
        if index == len(prompt.slots):
            values = prompt.values
            one = torch.eye(values.shape[1]).to(values)[rows - len(self._nodes)]
            return Reading(values, one[:, None].expand(-1, len(values), -1))
        receiver = torch.full((len(self._nodes),), -1)
        receiver[rows] = torch.arange(len(rows))
        own = (receiver[members.node] >= 0).nonzero()[:, 0]
        factor = members.slope[own] if by_slope else None
        run = prompt.paths.runs[index]
        return prompt.slots[index].read(run, members.at[own], members.unit[own], receiver[members.node[own]], factor)

    def _add_slot(self, weights: Tensor, end: End, gradient: Float[Tensor, "receiver pos d"]) -> None:
        """Enter what comes from one slot: its chosen nodes, the remainder, errors and biases."""
        prompt, columns, members = self._prompt, self.columns, self._members
        run, change = prompt.paths.runs[end.index], prompt.changes[end.index]
        slot = prompt.slots[end.index]
        own = (members.slot == end.index).nonzero()[:, 0]
        found = slot.contributions(gradient, run, change, members.at[own], members.unit[own])
        weights.index_add_(1, columns.unselected + self._rest, found.everything)
        self._add_nodes(weights, own, found.nodes)
        for index, other in enumerate(prompt.slots):  # earlier layers of a cross-layer transcoder write here too
            if isinstance(slot, DictionarySlot) and isinstance(other, DictionarySlot) and slot.receives_from(other):
                own = (members.slot == index).nonzero()[:, 0]
                place, unit = members.at[own], members.unit[own]
                parts = slot.contributions_of(other, gradient, prompt.changes[index], place, unit)
                self._add_nodes(weights, own, parts)
        if found.error is not None:
            weights.index_add_(1, columns.errors(end.index).start + self._rest, found.error)
        if found.bias is not None and not prompt.paired:
            weights[:, columns.bias] += found.bias

    def _add_nodes(self, weights: Tensor, own: Tensor, parts: Float[Tensor, "receiver member"]) -> None:
        """What chosen nodes write: theirs, and not the remainder's."""
        members, columns = self._members, self.columns
        weights.index_add_(1, members.prompt[own] * len(columns) + members.node[own], parts)
        weights.index_add_(1, columns.unselected + self._rest[members.at[own]], parts, alpha=-1)

    def _sparse(
        self, index: int, rows: Tensor, weights: Tensor, attributions: Tensor | None
    ) -> tuple[Int[Tensor, "2 edge"], Float[Tensor, "edge 2"]]:
        """Check the sums of one prompt's receivers, add the linearization error, and keep what is not zero."""
        is_target = rows >= len(self._nodes)
        exact = not self._prompt.paired
        linear = all(target.linear for target in self._prompt.targets)
        for those, own in ((~is_target, exact), (is_target, exact and linear)):
            if those.any():
                weights[those] = self._checked(weights[those], self._change[index, rows[those]], exact=own)
        spread = self._spread[rows]
        if attributions is not None:
            attributions = attributions.clone()
            attributions[spread] = self._checked(attributions[spread], self._score[index, rows[spread]], exact=exact)
        receiver, source = (weights != 0 if attributions is None else (weights != 0) | (attributions != 0)).nonzero(
            as_tuple=True
        )
        weight = weights[receiver, source]
        attribution = weight * self._slope[index, rows[receiver]]
        if attributions is not None:
            attribution = torch.where(spread[receiver], attributions[receiver, source], attribution)
        return torch.stack([rows[receiver], source]), torch.stack([weight, attribution], 1)

    def _checked(self, weights: Tensor, activation: Tensor, *, exact: bool) -> Tensor:
        """The weights with their linearization error.

        Raises:
            NumericalError: there should be none, and is.
        """
        residual = activation - weights.sum(1)
        relative = residual.abs() / (weights.abs().sum(1) + torch.finfo(torch.float32).tiny)
        dtype = self._prompt.embedding.dtype
        if not exact:
            rounding = 100 * torch.finfo(dtype).eps
            weights[:, self.columns.linearization_error] = torch.where(relative > rounding, residual, 0.0)
            return weights
        self.largest_residual = max(self.largest_residual, float(relative.max()))
        if not self.largest_residual <= (allowed := _ALLOWED.get(dtype, 1e-4)):
            raise NumericalError(
                f"incoming edges do not sum to their node's activation: they are off by {self.largest_residual:.1e} of "
                f"the sum of their sizes, allowed {allowed:.0e}. check_model(model) says whether relevance is "
                "conserved on this model; instead of half precision use float32."
            )
        return weights


def most_edges(nodes: Chosen, n_targets: int) -> int:
    """How many edges there can be between nodes, and from them to the targets: upward, and not back in the prompt."""
    counts = torch.zeros(int(nodes[:, 0].max()) + 1, int(nodes[:, 1].max()) + 1, dtype=torch.float64)
    counts.index_put_((nodes[:, 0], nodes[:, 1]), torch.ones(len(nodes), dtype=torch.float64), accumulate=True)
    below = counts.cumsum(1).cumsum(0) - counts.cumsum(1)  # sources in the slots below, up to the place
    return int((counts * below).sum()) + len(nodes) * n_targets


def _require_memory(nodes: Chosen, n_targets: int) -> None:
    """Refuse what cannot be held before edges are computed: a process that is killed says nothing.

    Raises:
        SettingsError: with how many nodes fit.
    """
    if not len(nodes):
        return
    edges, available = most_edges(nodes, n_targets), free_memory(torch.device("cpu"))
    needed = edges * _BYTES_PER_EDGE
    if available is not None and needed > available:
        fitting = max(10.0, len(nodes) * (available / needed) ** 0.5)
        raise SettingsError(
            f"{len(nodes):,} nodes have up to {edges:,} edges, which take about {needed / 1e9:,.0f} GB; "
            f"{available / 1e9:,.0f} GB are free. Choose fewer: nodes={10 ** int(math.log10(fitting))} fits."
        )


def bytes_per_receiver(prompt: OpenPrompt) -> int:
    """Bytes that one receiver's backward pass holds at its peak: gradients at the residual stream and in one layer.

    Gradients of all neurons are held where the weights of few cannot be used, and of all layers where there are none.
    """
    n_positions, d_model = prompt.embedding.flatten(0, 1).shape
    runs = prompt.paths.runs
    widths = [run.source[0, 0].numel() for run in runs if run.output is None or run.input is None]
    at_once = 0 if prompt.paths.layered else sum(widths)
    return prompt.embedding.element_size() * n_positions * (at_once + 5 * max(widths, default=0) + 12 * d_model)


def _dots(value: Tensor, gradient: Tensor) -> Float[Tensor, " receiver"]:
    """The sum of the products, for each receiver."""
    product = widened(gradient) * widened(value.detach())
    return sum_last_axis(product.reshape(len(gradient), 1, -1))[:, 0]
