"""What CircuitLasso observes, as regressions: which columns there are, which may explain which, and their statistics.

A site is a component, or a hook point of a basis; it is regressed on the sites of earlier stages. `regressors` says at
which positions a source is read for a target at position t:

    "same"     at t alone: rows are (prompt, position), attention's other positions stay unseen
    "pooled"   at t and, for targets that attend, also the mean over the positions they can see
    "earlier"  at every position they can see, a column each: rows are prompts, all of one length

MLPs and logits read position t alone in every case, as they do in the model. Prompts are dealt into blocks, each with
its own statistics: held-out error and bootstrap need no second pass.
"""

import hashlib
import itertools
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Annotated, Any, Literal

import msgspec
import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from .._errors import FileFormatError, SettingsError
from .._files import read_directory, require_shapes, write_directory
from .._processes import Processes
from ..bases._activations import Neurons
from ..bases._runs import Values, capture, require_fired, run_logits, run_values, values_at
from ..bases._site import Basis, basis_sites
from ..bases._site import Site as BasisSite
from ..components._graph import component_graph, split_heads
from ..models._protocol import TransformerLensModel
from ..models._threads import hooked
from ..nodes._scores import label
from ..tasks._metrics import Metric, measure
from ..tasks._pairs import PromptPairs
from ..tasks._text_tokens import text_tokens
from ..tasks._tokenize import tokenize
from ..tasks._tokenized import Batch, TokenizedPairs, unanswered
from ._memory import Size
from ._samples import Moments, SampledStatistics, Samples, combine_samples, join_rows
from ._statistics import Accumulator, Statistics, combine

Inputs = str | list[str] | Int[Tensor, "batch pos"] | PromptPairs | TokenizedPairs
Readout = Literal["answers", "metric", "logits", "none"]
Regressors = Literal["same", "pooled", "earlier"]
SCHEMA = 2
_NOW, _POOLED = -1, -2
_BLOCK = 64  # targets of a streamed block, where each is a node of its own


def tokenize_inputs(model: TransformerLensModel, inputs: Inputs, prepend_bos: bool | None) -> TokenizedPairs:
    """Tokens of prompts, or of pairs with their answers.

    Raises:
        SettingsError: no prompts.
    """
    if isinstance(inputs, PromptPairs | TokenizedPairs):
        return tokenize(model, inputs, prepend_bos=prepend_bos, aligned=False)
    if isinstance(inputs, str):
        inputs = [inputs]
    if isinstance(inputs, list):
        clean = [text_tokens(model, prompt, prepend_bos)[0] for prompt in inputs]
    else:
        clean = list(inputs)
    if not clean:
        raise SettingsError("expected at least one prompt; got none.")
    return unanswered(clean)


def shared_start(tokens: TokenizedPairs) -> int:
    """1 where all prompts begin with the same token (BOS) and are longer than it, else 0."""
    same = len({int(prompt[0]) for prompt in tokens.clean}) == 1 and len(tokens) > 1
    return int(same and min(tokens.lengths) > 1 and bool((tokens.position > 0).all()))


# --- Sites: one vector node (a head, an MLP), or, where `split`, one node per unit (neurons, dictionary features) ---


@dataclass(frozen=True)
class Components:
    """Nodes are the model's components: single heads or whole attention layers, whole MLPs or neurons in their place.

    Example:
        >>> import tl_neuron_circuits as tnc
        >>> tnc.lasso.CircuitLasso(nodes=tnc.lasso.Components(attention="layers")).nodes.mlp
        'outputs'
    """

    attention: Literal["heads", "layers"] = "heads"
    mlp: Literal["outputs", "neurons"] = "outputs"


@dataclass(frozen=True)
class Site:
    """One regressor and target: `attends` says that it reads other positions; `split` that each unit is a node."""

    name: str
    kind: str
    layer: int
    stage: int
    attends: bool
    split: bool = False
    hook: str = ""
    head: int = -1
    basis_site: BasisSite | None = None

    @property
    def reads(self) -> tuple[str, ...]:
        """Hook points whose values it needs."""
        return self.basis_site.reads if self.basis_site is not None else (self.hook,) if self.hook else ()

    def node(self, unit: int) -> str:
        """Name of the node that holds `unit`."""
        if not self.split:
            return self.name
        letter = self.basis_site.letter if self.basis_site is not None else "U"
        return label(self.layer, letter, unit, -1, "node")


@dataclass(frozen=True, eq=False)
class Noise:
    """Independent Gaussian noise on every unit, `size` times its standard deviation on undisturbed prompts."""

    size: float
    deviations: Mapping[str, Float[Tensor, "..."]]
    generator: torch.Generator

    def hook(self, name: str) -> tuple[str, Any]:
        """A forward hook; draws come from a CPU generator, so that devices agree."""

        def add(value: Tensor, hook: Any) -> Tensor:
            drawn = torch.randn(value.shape, generator=self.generator).to(value)
            return value + self.size * self.deviations[name] * drawn

        return name, add


@dataclass(frozen=True)
class Observer:
    """Runs the model and reads every site; `answers` are the tokens whose logits are the readout."""

    model: TransformerLensModel
    sites: tuple[Site, ...]
    n_heads: int
    bidirectional: bool
    readout: Readout
    metric: Metric
    answers: Sequence[int]

    @property
    def names(self) -> list[str]:
        """Every hook point that some site reads, once."""
        return list(dict.fromkeys(name for site in self.sites for name in site.reads))

    def deviations(self, batch: Batch) -> dict[str, Float[Tensor, "..."]]:
        """Standard deviation of every unit at every hook point, over prompts and positions."""
        values = run_values(self.model, batch, self.names)
        return {name: value.flatten(0, 1).std(0, correction=0) for name, value in values.items()}

    def values(
        self, batch: Batch, noise: Noise | None = None
    ) -> tuple[list[Float[Tensor, "batch pos _"]], Float[Tensor, "batch answer"] | None]:
        """Values of all sites at all positions, and the readout of a whole prompt where there is one.

        Everything is moved to the device of the last hook point: one regression takes it together. With `noise`, every
        site is disturbed as it is computed, and read as later components see it.

        Raises:
            UnsupportedModelError: a hook point did not fire.
        """
        names, mask, logits = self.names, batch.attention_mask, None
        disturbing = [] if noise is None else [noise.hook(name) for name in names]
        if self.readout == "none":
            store = values_at(self.model, batch.clean, names, attention_mask=mask, hooks=disturbing)
        else:
            kept: Values = {}
            with (
                torch.no_grad(),
                hooked(self.model, [*disturbing, *(capture(kept, name) for name in names)]),
            ):
                logits = run_logits(self.model, batch.clean, mask)
            store = require_fired(kept, names, self.model)
        home = store[names[-1]].device
        values = [self._value(site, store, logits).to(home) for site in self.sites]
        if logits is None or self.readout == "logits":  # then the logits are a site like any other
            return values, None
        with torch.no_grad():
            if self.readout == "metric":
                return values, measure(self.metric, logits, batch)[:, None].to(home)
            rows = torch.arange(len(batch), device=logits.device)
            return values, logits[rows, batch.position.to(logits.device)][:, list(self.answers)].to(home)

    def _value(self, site: Site, store: Mapping[str, Tensor], logits: Tensor | None) -> Tensor:
        if site.basis_site is not None:
            return site.basis_site.take_apart(store).nodes
        if not site.hook:
            assert logits is not None  # the readout is "logits", so the forward pass went to its end
            return logits
        value = store[site.hook]
        return split_heads(value, self.n_heads)[:, :, site.head] if site.head >= 0 else value.flatten(2)


def build_observer(
    model: TransformerLensModel,
    tokens: TokenizedPairs,
    nodes: Components | Basis | Sequence[Basis],
    readout: Readout,
    metric: Metric,
) -> Observer:
    """The sites of `nodes` in the model's order, and how to read them.

    A basis' error and skip nodes are vectors, not features: they are left out. Its sites of one layer are one stage;
    attention lies between stages, so all of them attend.

    Raises:
        SettingsError: the readout needs answers that differ, and there are none.
        UnsupportedModelError: a hook point is missing.
    """
    graph = component_graph(model, nodes.attention if isinstance(nodes, Components) else "heads")
    if isinstance(nodes, Components):
        neurons = {site.layer: site for site in Neurons().sites(model)} if nodes.mlp == "neurons" else {}
        sites = []
        for c in graph.components[:-1]:
            in_place = neurons.get(c.layer) if c.kind == "mlp" else None
            attends, split = c.kind in ("head", "attention"), in_place is not None
            sites.append(Site(c.name, c.kind, c.layer, c.stage, attends, split, c.hook, c.head, in_place))
    else:
        sites = [
            Site(s.hook, "unit", s.layer, s.layer, True, True, s.hook, basis_site=s) for s in basis_sites(model, nodes)
        ]
    if readout == "logits":
        last = graph.components[-1]
        sites.append(Site("logits", "logits", last.layer, max(site.stage for site in sites) + 1, False))
    answers: list[int] = []
    if readout == "answers":
        columns = [tokens.answer] + ([] if tokens.wrong_answer is None else [tokens.wrong_answer])
        answers = torch.cat(columns).unique().tolist()
        if len(answers) < 2:
            raise SettingsError(
                "readout='answers' is the logits of the pairs' answers and needs at least two different ones; got "
                f"token {answers}. Give pairs with different answers, or readout='logits', 'metric' or 'none'."
            )
    return Observer(model, tuple(sites), graph.n_heads, graph.bidirectional, readout, metric, answers)


# --- Regressions: columns, and which may explain which ---


@dataclass(frozen=True, eq=False)
class Columns:
    """Columns of one side of a regression: site (an index), unit, and slot (a position, or -1 now, -2 pooled)."""

    site: Int[Tensor, " column"]
    unit: Int[Tensor, " column"]
    slot: Int[Tensor, " column"]

    def __len__(self) -> int:
        """How many columns."""
        return len(self.site)


@dataclass(frozen=True, eq=False)
class Regression:
    """One regression's columns, and which sources each target may use."""

    sources: Columns
    targets: Columns
    allowed: Bool[Tensor, "source target"]
    of_readout: bool = False


def measure_size(
    watch: Observer, tokens: TokenizedPairs, first: Batch, regressors: Regressors, skip: int, kept: int
) -> Size:
    """How many columns `build_regressions` will make, from one prompt."""
    values, readout = watch.values(first)
    every = first.clean.shape[1] - skip
    slots, target_slots = {"same": (1, 1), "pooled": (2, 1), "earlier": (every, every)}[regressors]
    widths = [
        min(_BLOCK, v.shape[2]) if site.split else v.shape[2] for site, v in zip(watch.sites, values, strict=True)
    ]
    rows = len(tokens) if regressors == "earlier" else sum(length - skip for length in tokens.lengths)
    return Size(
        sum(value.shape[2] for value in values), slots, target_slots, 0 if readout is None else readout.shape[1], kept,
        rows, len(tokens), max(widths),
    )  # fmt: skip


def build_regressions(
    watch: Observer, first: Batch, regressors: Regressors, skip: int, streamed: bool = False
) -> tuple[Regression, ...]:
    """All sites on all earlier ones, and the readout on all sites where there is one; widths come from one prompt.

    Where they are `streamed`, the sites' targets are cut into one regression for each of `target_blocks`.
    """
    values, readout = watch.values(first)
    widths = [value.shape[2] for value in values]
    site = torch.cat([torch.full((width,), index) for index, width in enumerate(widths)])
    unit = torch.cat([torch.arange(width) for width in widths])
    now = Columns(site, unit, torch.full_like(site, _NOW))
    if regressors == "same":
        sources = targets = now
    elif regressors == "pooled":
        sources = Columns(site.repeat(2), unit.repeat(2), torch.cat([now.slot, torch.full_like(site, _POOLED)]))
        targets = now
    else:
        positions = torch.arange(skip, first.clean.shape[1])
        slot = positions.repeat_interleave(len(site))
        sources = targets = Columns(site.repeat(len(positions)), unit.repeat(len(positions)), slot)
    if streamed:
        main = tuple(_cut(watch, sources, targets, *ends) for ends in target_blocks(watch.sites, targets))
    else:
        main = (Regression(sources, targets, _allowed(watch, sources, targets)),)
    if readout is None:
        return main
    width, last = readout.shape[1], int(first.position[0])
    ends = Columns(torch.full((width,), len(widths)), torch.arange(width), torch.full((width,), last))
    if regressors == "earlier":
        return *main, Regression(sources, ends, (sources.slot == last)[:, None].expand(-1, width), of_readout=True)
    return *main, Regression(now, ends, torch.ones((), dtype=torch.bool).expand(len(now), width), of_readout=True)


def target_blocks(sites: Sequence[Site], targets: Columns) -> list[tuple[int, int]]:
    """First and last column of the targets of one site and position; of sites that are split, of a few units."""
    keys = torch.stack([targets.site, targets.slot], 1)
    starts = [0, *((keys[1:] != keys[:-1]).any(1).nonzero().flatten() + 1).tolist(), len(keys)]
    blocks = []
    for first, last in itertools.pairwise(starts):
        width = _BLOCK if sites[int(targets.site[first])].split else last - first
        blocks += [(start, min(start + width, last)) for start in range(first, last, width)]
    return blocks


def _cut(watch: Observer, sources: Columns, targets: Columns, first: int, last: int) -> Regression:
    """Targets of one site and position, which may all use the same sources."""
    some = Columns(*(column[first:last] for column in (targets.site, targets.unit, targets.slot)))
    one = Columns(*(column[:1] for column in (some.site, some.unit, some.slot)))
    return Regression(sources, some, _allowed(watch, sources, one).expand(-1, last - first))


def _allowed(watch: Observer, sources: Columns, targets: Columns) -> Tensor:
    """Earlier stages only; MLPs and logits see their own position, attention what its mask lets it see."""
    stage = torch.tensor([site.stage for site in watch.sites])
    attends = torch.tensor([site.attends for site in watch.sites])[targets.site]
    before = stage[sources.site][:, None] < stage[targets.site]
    s, t = sources.slot[:, None], targets.slot[None]
    visible = torch.ones_like(before) if watch.bidirectional else s <= t
    return before & ((s == t) | (attends & ((s == _POOLED) | ((s >= 0) & visible))))


# --- Statistics of blocks of prompts ---


@dataclass(frozen=True, eq=False, repr=False)
class Observations:
    """Statistics of every regression, block by block; `+` joins what several processes saw of different prompts."""

    sites: tuple[Site, ...]
    regressions: tuple[Regression, ...]
    blocks: tuple[tuple[Statistics, ...], ...] | tuple[tuple[Samples, ...], ...]
    """By regression, then by block."""
    settings: Mapping[str, Any]

    def __add__(self, other: "Observations") -> "Observations":
        """The blocks of both.

        Raises:
            SettingsError: they were observed with other settings.
        """
        if not isinstance(other, Observations):
            return NotImplemented
        common = [key for key in self.settings if key not in ("pairs_hash", "n")]
        differ = [key for key in common if self.settings[key] != other.settings.get(key)]
        if differ:
            raise SettingsError(
                f"expected observations with the same settings; {differ} differ. Observe both with one CircuitLasso, "
                "model and readout, on pairs with the same answers."
            )
        blocks = tuple((*a, *b) for a, b in zip(self.blocks, other.blocks, strict=True))
        hashes = hashlib.sha256((self.settings["pairs_hash"] + other.settings["pairs_hash"]).encode()).hexdigest()
        settings = {**self.settings, "pairs_hash": hashes, "n": self.settings["n"] + other.settings["n"]}
        return replace(self, blocks=blocks, settings=settings)

    def total(self, times: Sequence[int] | None = None) -> list[Statistics] | list[SampledStatistics]:
        """Statistics by regression of all blocks, or of block k `times[k]` times."""
        times = [1] * len(self.blocks[0]) if times is None else times
        moments: dict[int, Moments] = {}
        found: list[Any] = []
        for parts in self.blocks:
            if isinstance(parts[0], Samples):
                found.append(combine_samples([part for part in parts if isinstance(part, Samples)], times, moments))
            else:
                found.append(combine([part for part in parts if isinstance(part, Statistics)], times))
        return found

    def __repr__(self) -> str:
        return f"Observations({self.settings['n']} prompts, {len(self.sites)} sites, {len(self.blocks[0])} blocks)"


def check_prompts(tokens: TokenizedPairs, regressors: Regressors, n_blocks: int, skip: int) -> None:
    """Raise where prompts are too few, too short, or of several lengths where positions are columns.

    Raises:
        SettingsError: with the way out.
    """
    if len(tokens) < n_blocks:
        raise SettingsError(
            f"expected at least one prompt per block; got {len(tokens)} prompts for {n_blocks} blocks. Give more "
            f"prompts, or blocks={len(tokens)}."
        )
    shortest, longest = min(tokens.lengths), max(tokens.lengths)
    if skip >= shortest or bool((tokens.position < skip).any()):
        raise SettingsError(
            f"skip_positions={skip} leaves nothing of the shortest prompt ({shortest} tokens), or skips the position "
            "that the readout is taken at. Give longer prompts, or skip_positions=0."
        )
    if regressors == "earlier" and (shortest != longest or len(tokens.position.unique()) > 1):
        raise SettingsError(
            "regressors='earlier' makes a column of every position, so prompts must have one length; got "
            f"{shortest} to {longest} tokens. Keep the prompts of one length, or use 'pooled' or 'same'."
        )


def select_prompts(tokens: TokenizedPairs, rows: Sequence[int]) -> TokenizedPairs:
    """The clean prompts of these rows, with their answers."""
    index = torch.tensor(rows, device=tokens.answer.device)
    wrong = None if tokens.wrong_answer is None else tokens.wrong_answer[index]
    clean = tuple(tokens.clean[row] for row in rows)
    return TokenizedPairs(clean, tokens.answer[index], tokens.position[index], wrong_answer=wrong)


def observe_block(
    watch: Observer, batches: Iterable[Batch], regressors: Regressors, skip: int, noise: Noise | None,
    sums: tuple[Accumulator, Accumulator] | None = None,
) -> tuple[Statistics, ...]:  # fmt: skip
    """Statistics of the block's prompts: of the sites, then of the readout where there is one; added to `sums`."""
    site_sums, readout_sums = sums or (Accumulator(), Accumulator())
    for x, y, before_readout, readout in _rows(watch, batches, regressors, skip, noise):
        site_sums.add(x, y)
        if readout is not None:
            readout_sums.add(before_readout, readout)
    return tuple(sums.total() for sums in (site_sums, readout_sums) if sums.n)


def observe_samples(
    watch: Observer, batches: Iterable[Batch], regressors: Regressors, skip: int, noise: Noise | None,
    targets: Sequence[tuple[int, int]],
) -> tuple[Samples, ...]:  # fmt: skip
    """The block's observations themselves: for every block of targets, then for the readout where there is one."""
    seen = list(_rows(watch, batches, regressors, skip, noise))
    x = join_rows([rows for rows, *_ in seen], "sources")
    every = targets[-1][1]
    found = [Samples(x, x[:, first:last], (first, last, every)) for first, last in targets]
    if seen[0][3] is None:
        return tuple(found)
    before = join_rows([rows for *_, rows, _ in seen], "sources")
    return *found, Samples(before, join_rows([rows for *_, rows in seen if rows is not None], "targets"))


def _rows(
    watch: Observer, batches: Iterable[Batch], regressors: Regressors, skip: int, noise: Noise | None
) -> Iterator[tuple[Tensor, Tensor | None, Tensor, Tensor | None]]:
    """Batch by batch: sources; targets, unless they are the sources; sources of the readout; the readout."""
    for batch in batches:
        values, readout = watch.values(batch, noise)
        now = torch.cat(values, 2)
        if regressors == "earlier":
            x = now[:, skip:].flatten(1)
            yield x, None, x, readout
            continue
        x, y = now[:, skip:].flatten(0, 1), None
        if regressors == "pooled":
            y = x
            x = torch.cat([y, _pooled(now, watch.bidirectional)[:, skip:].flatten(0, 1)], 1)
        before_readout = now[torch.arange(len(batch), device=now.device), batch.position.to(now.device)]
        yield x, y, before_readout, readout


def _pooled(now: Tensor, bidirectional: bool) -> Tensor:
    """Mean over the positions that attention at each position can see."""
    if bidirectional:
        return now.mean(1, keepdim=True).expand_as(now)
    count = torch.arange(1, now.shape[1] + 1, device=now.device, dtype=torch.float64)[:, None]
    return now.double().cumsum(1) / count


Block = tuple[Statistics, ...]


def gather_blocks(processes: Processes, mine: Mapping[int, Block]) -> list[Block]:
    """Every process' blocks, in order, on every process."""
    if processes.count == 1:
        return [mine[block] for block in sorted(mine)]
    counts: dict[int, list[int]] = {}
    for part in processes.gather({block: [s.n for s in parts] for block, parts in mine.items()}):
        counts |= part
    summed = processes.total({(block, key): t for block, parts in mine.items() for key, t in _tensors(parts).items()})
    return [
        _restored({key: t for (number, key), t in summed.items() if number == block}, counts[block])
        for block in sorted(counts)
    ]


class _Notes(msgspec.Struct, forbid_unknown_fields=True):
    settings: dict[str, Any]
    n: list[Annotated[int, msgspec.Meta(ge=1)]]


def write_block(path: Path, block: int, parts: Block, settings: Mapping[str, Any]) -> None:
    """Keep a finished block, so that a killed run resumes after it."""
    tensors = {key: tensor.cpu() for key, tensor in _tensors(parts).items()}
    notes = {"settings": dict(settings), "n": [part.n for part in parts]}
    write_directory(path / f"block{block}", "observations", SCHEMA, tensors, notes)


def read_blocks(path: Path, settings: Mapping[str, Any]) -> dict[int, Block]:
    """The finished blocks at `path`.

    Raises:
        FileFormatError: they are damaged, or of another run.
    """
    blocks = {}
    written = sorted(file.parent for file in path.glob("block*/observations.safetensors"))
    for folder in written:
        tensors, notes = read_directory(folder, "observations", SCHEMA, _Notes)
        if notes.settings != dict(settings):
            differ = [key for key in settings if notes.settings.get(key) != settings[key]]
            raise FileFormatError(f"{folder} is of another run ({differ} differ). Resume from another directory.")
        number = folder.name.removeprefix("block")
        if not number.isdecimal() or len(number) > 9:
            raise FileFormatError(
                f"expected folders block0, block1 and so on in {path}; found {folder.name}. Remove it."
            )
        require_shapes(folder, tensors, _shapes(tensors, len(notes.n)))
        blocks[int(number)] = _restored(tensors, notes.n)
    return blocks


def _tensors(parts: Block) -> dict[str, Tensor]:
    return {f"{k}/{name}": tensor for k, part in enumerate(parts) for name, tensor in part.tensors().items()}


def _shapes(tensors: Mapping[str, Tensor], parts: int) -> dict[str, tuple[int | None, ...]]:
    """What each part's tensors must be, by the lengths of its means."""
    shapes: dict[str, tuple[int | None, ...]] = {}
    for k in range(parts):
        mean, target = (tensors.get(f"{k}/{name}") for name in ("mean", "target_mean"))
        n = None if mean is None else mean.numel()
        shapes |= {f"{k}/mean": (n,), f"{k}/products": (n, n)}
        if target is not None:
            m = target.numel()
            shapes |= {f"{k}/target_mean": (m,), f"{k}/target_products": (n, m), f"{k}/target_squares": (m,)}
    return shapes


def _restored(tensors: Mapping[str, Tensor], counts: Sequence[int]) -> Block:
    return tuple(
        Statistics.from_tensors(
            n, {key.removeprefix(f"{k}/"): t for key, t in tensors.items() if key.startswith(f"{k}/")}
        )
        for k, n in enumerate(counts)
    )
