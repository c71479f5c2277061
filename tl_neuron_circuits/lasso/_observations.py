"""Observed activations as regressions: which columns there are, which may explain which, and their statistics.

`regressors` says at which positions a source is read for a target at position t:

    "same"     at t alone: rows are (prompt, position), attention's other positions stay unseen
    "pooled"   at t and, for targets that attend, also the mean over the positions they can see
    "earlier"  at every position they can see, a column each: rows are prompts, all of one length

MLPs and logits read position t alone in every case, as they do in the model. Prompts are dealt into blocks, each with
its own statistics: held-out error and bootstrap need no second pass.
"""

import hashlib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor
from tqdm.auto import tqdm

from .._errors import FileFormatError, SettingsError
from .._files import read_directory, write_directory
from .._processes import Processes, current_processes
from ..bases._activations import Neurons
from ..bases._runs import Values, capture, require_fired, run_logits, run_values, values_at
from ..bases._site import Basis, basis_sites
from ..bases._site import Site as BasisSite
from ..components._graph import ComponentGraph, component_graph, split_heads
from ..models._protocol import TransformerLensModel
from ..nodes._scores import label
from ..tasks._metrics import Metric, measure
from ..tasks._pairs import PromptPairs
from ..tasks._tokenize import tokenize
from ..tasks._tokenized import Batch, TokenizedPairs
from ._statistics import Accumulator, Statistics, sum_of

# --- What may be observed: prompts, tokens, or pairs, of which the clean prompts are used ---


Inputs = str | list[str] | Int[Tensor, "batch pos"] | PromptPairs | TokenizedPairs


def to_tokens(model: TransformerLensModel, inputs: Inputs, prepend_bos: bool | None) -> TokenizedPairs:
    """Tokens of prompts, or of pairs with their answers.

    Raises:
        SettingsError: no prompts.
    """
    if isinstance(inputs, PromptPairs | TokenizedPairs):
        return tokenize(model, inputs, prepend_bos=prepend_bos, aligned=False)
    if isinstance(inputs, str):
        inputs = [inputs]
    if isinstance(inputs, list):
        given = {} if prepend_bos is None else {"prepend_bos": prepend_bos}
        clean = [model.to_tokens(prompt, **given)[0] for prompt in inputs]
    else:
        clean = list(inputs)
    if not clean:
        raise SettingsError("expected at least one prompt; got none.")
    return TokenizedPairs.from_tokens(clean, torch.zeros(len(clean), dtype=torch.long, device=clean[0].device))


def same_start(tokens: TokenizedPairs) -> int:
    """1 where all prompts begin with one token and go on after it, else 0."""
    same = len({int(prompt[0]) for prompt in tokens.clean}) == 1 and len(tokens) > 1
    return int(same and min(tokens.lengths) > 1 and bool((tokens.position > 0).all()))


# --- What CircuitLasso observes: the values of every component, or of every node of a basis, in the model's order ---
# A site is regressed on the sites of earlier stages. It is one node of the circuit (a head, an MLP: all its units
# together) or, where `split`, a node a unit (neurons, dictionary features).


Readout = Literal["answers", "metric", "logits", "none"]


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
        self, batch: Batch, noise: "Noise | None" = None
    ) -> tuple[list[Float[Tensor, "batch pos _"]], Float[Tensor, "batch answer"] | None]:
        """Values of all sites at all positions, and the readout of a whole prompt where there is one, on one device.

        With `noise`, every site is disturbed as it is computed, and read as it is handed on.

        Raises:
            UnsupportedModelError: a hook point did not fire.
        """
        names = self.names
        disturbing = [] if noise is None else [noise.at(name) for name in names]
        if self.readout == "none" and all(site.hook or site.basis_site is not None for site in self.sites):
            mask = batch.attention_mask
            found = values_at(self.model, batch.clean, names, attention_mask=mask, hooks=disturbing)
            return self._gathered(found, None), None
        store: Values = {}
        hooks = [*disturbing, *(capture(store, name) for name in names)]
        with torch.no_grad(), self.model.hooks(fwd_hooks=hooks):
            logits = run_logits(self.model, batch.clean, batch.attention_mask)
            store = require_fired(store, names, self.model)
            home, found = store[names[-1]].device, self._gathered(store, logits)
            if self.readout == "metric":
                return found, measure(self.metric, logits, batch)[:, None].to(home)
            if self.readout == "answers":
                rows = torch.arange(len(batch), device=logits.device)
                position = batch.position.to(logits.device)
                return found, logits[rows, position][:, list(self.answers)].to(home)
        return found, None

    def _gathered(self, store: Mapping[str, Tensor], logits: Tensor | None) -> list[Tensor]:
        """All sites' values on the last one's device: one regression takes them together."""
        home = store[self.names[-1]].device
        return [self._value(site, store, logits).to(home) for site in self.sites]

    def _value(self, site: Site, store: Mapping[str, Tensor], logits: Tensor | None) -> Tensor:
        if site.basis_site is not None:
            return site.basis_site.take_apart(store).nodes
        if not site.hook:
            assert logits is not None  # the forward pass went to its end
            return logits
        value = store[site.hook]
        return split_heads(value, self.n_heads)[:, :, site.head] if site.head >= 0 else value.flatten(2)


@dataclass(frozen=True, eq=False)
class Noise:
    """Independent Gaussian noise on every unit, `size` times its standard deviation on undisturbed prompts."""

    size: float
    deviations: Mapping[str, Float[Tensor, "..."]]
    generator: torch.Generator

    def at(self, name: str) -> tuple[str, Any]:
        """A forward hook; draws come from a CPU generator, so that devices agree."""

        def add(value: Tensor, hook: Any) -> Tensor:
            drawn = torch.randn(value.shape, generator=self.generator).to(value)
            return value + self.size * self.deviations[name] * drawn

        return name, add


def component_sites(graph: ComponentGraph, model: TransformerLensModel, neurons: bool) -> Iterator[Site]:
    """Embedding, attention and MLPs, or single neurons in their place."""
    by_layer = {site.layer: site for site in Neurons().sites(model)} if neurons else {}
    for c in graph.components:
        if c.kind == "logits":
            continue
        attends = c.kind in ("head", "attention")
        single = by_layer.get(c.layer) if c.kind == "mlp" else None
        yield Site(c.name, c.kind, c.layer, c.stage, attends, single is not None, c.hook, c.head, single)


def unit_sites(model: TransformerLensModel, basis: Basis | Sequence[Basis]) -> Iterator[Site]:
    """Every scalar node of a basis; sites of one layer are one stage. Attention lies between stages, so all attend.

    Error and skip nodes are vectors, not features: they are left out.
    """
    for site in basis_sites(model, basis):
        yield Site(site.hook, "unit", site.layer, site.layer, True, True, site.hook, basis_site=site)


def observer(
    model: TransformerLensModel,
    tokens: TokenizedPairs,
    *,
    basis: Basis | Sequence[Basis] | None,
    attention: Literal["heads", "layers"],
    mlp: Literal["outputs", "neurons"],
    readout: Readout,
    metric: Metric,
) -> Observer:
    """The observer of these settings.

    Raises:
        SettingsError: the readout needs answers that differ, and there are none.
        UnsupportedModelError: a hook point is missing.
    """
    graph = component_graph(model, attention)
    sites = list(component_sites(graph, model, mlp == "neurons") if basis is None else unit_sites(model, basis))
    if readout == "logits":
        last = graph.components[-1]
        sites.append(Site("logits", "logits", last.layer, max(s.stage for s in sites) + 1, False))
    answers: list[int] = []
    if readout == "answers":
        columns = [tokens.answer] + ([] if tokens.wrong_answer is None else [tokens.wrong_answer])
        answers = torch.cat(columns).unique().tolist()
        if len(answers) < 2:
            raise SettingsError(
                "readout='answers' is the logits of the pairs' answers, of which there must be two at least; got token "
                f"{answers}. Give pairs with different answers, or readout='logits', 'metric' or 'none'."
            )
    return Observer(model, tuple(sites), graph.n_heads, graph.bidirectional, readout, metric, answers)


# --- Observing: statistics, block by block ---


Regressors = Literal["same", "pooled", "earlier"]
SCHEMA = 1
_NOW, _POOLED = -1, -2
_FIELDS = ("mean", "products", "target_mean", "target_products", "target_squares")


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


@dataclass(frozen=True, eq=False, repr=False)
class Observations:
    """Statistics of every regression, block by block; `+` joins what several processes saw of different prompts."""

    sites: tuple[Site, ...]
    regressions: tuple[Regression, ...]
    blocks: tuple[tuple[Statistics, ...], ...]
    """By regression, then by block."""
    settings: Mapping[str, Any]

    def __add__(self, other: "Observations") -> "Observations":
        """The blocks of both.

        Raises:
            SettingsError: they were observed with other settings.
        """
        if not isinstance(other, Observations):
            return NotImplemented
        differ = [
            k for k in self.settings if k not in ("pairs_hash", "n") and self.settings[k] != other.settings.get(k)
        ]
        if differ:
            raise SettingsError(
                f"expected observations of the same settings; {differ} differ. Observe both with one CircuitLasso, "
                "model and readout, on pairs with the same answers."
            )
        blocks = tuple((*a, *b) for a, b in zip(self.blocks, other.blocks, strict=True))
        hashes = hashlib.sha256((self.settings["pairs_hash"] + other.settings["pairs_hash"]).encode()).hexdigest()
        settings = {**self.settings, "pairs_hash": hashes, "n": self.settings["n"] + other.settings["n"]}
        return replace(self, blocks=blocks, settings=settings)

    def total(self, times: Sequence[int] | None = None) -> list[Statistics]:
        """Statistics by regression of all blocks, or of block k `times[k]` times."""
        return [sum_of(parts, [1] * len(parts) if times is None else times) for parts in self.blocks]

    def __repr__(self) -> str:
        return f"Observations({self.settings['n']} prompts, {len(self.sites)} sites, {len(self.blocks[0])} blocks)"


def observe(
    watch: Observer,
    tokens: TokenizedPairs,
    *,
    regressors: Regressors,
    n_blocks: int,
    skip: int,
    batch_size: int,
    seed: int,
    settings: Mapping[str, Any],
    noise: float = 0.0,
    resume: str | Path | None = None,
    verbose: bool = False,
) -> Observations:
    """Run the model on every prompt once and keep the statistics.

    With `noise`, see `Noise`; its size is measured on the first prompts, and draws start anew with every block.
    Blocks are dealt to the processes of a launcher, and every process returns all of them.
    With `resume`, the statistics of finished blocks are kept in that directory and taken from there.

    Raises:
        SettingsError: prompts are too few or too short, or of several lengths where positions are columns.
        FileFormatError: what is at `resume` is of another run.
    """
    _check(tokens, regressors, n_blocks, skip)
    order = torch.randperm(len(tokens), generator=torch.Generator().manual_seed(seed))
    dealt = [sorted(order[block::n_blocks].tolist()) for block in range(n_blocks)]
    processes = current_processes()
    with processes.together("CircuitLasso.observe", settings):
        first = _subset(tokens, dealt[0])
        regressions = _regressions(watch, next(first.batches(1)), regressors, skip)
        deviations = watch.deviations(next(first.batches(batch_size))) if noise else {}
        done = {} if resume is None else _read_blocks(Path(resume), settings)
        mine: dict[int, tuple[Statistics, ...]] = {}
        with tqdm(total=len(tokens), desc="observed prompts", disable=not verbose, unit="prompt") as bar:
            for block in processes.share(range(n_blocks)):
                if block in done:
                    mine[block] = done[block]
                else:
                    draws = torch.Generator().manual_seed(1_000_003 * (seed + 1) + block)
                    disturbed = Noise(noise, deviations, draws) if noise else None
                    batches = _subset(tokens, dealt[block]).batches(batch_size)
                    mine[block] = _block(watch, batches, regressions, regressors, skip, disturbed)
                    if resume is not None:
                        _write_block(Path(resume), block, mine[block], settings)
                bar.update(len(dealt[block]))
        blocks = _of_all(processes, mine)
    return Observations(watch.sites, regressions, tuple(zip(*blocks, strict=True)), settings)


def _of_all(processes: Processes, mine: Mapping[int, tuple[Statistics, ...]]) -> list[tuple[Statistics, ...]]:
    """Every process' blocks, in order, on every process."""
    if processes.count == 1:
        return [mine[block] for block in sorted(mine)]
    notes: dict[int, list[tuple[int, bool]]] = {}
    for part in processes.gather({block: [(s.n, s.square) for s in parts] for block, parts in mine.items()}):
        notes |= part
    tensors = {(block, key): t for block, parts in mine.items() for key, t in _tensors(parts).items()}
    summed = processes.total(tensors)
    found = []
    for block in sorted(notes):
        own = {key: tensor for (number, key), tensor in summed.items() if number == block}
        found.append(tuple(_restored(own, k, n, square) for k, (n, square) in enumerate(notes[block])))
    return found


def _block(
    watch: Observer,
    batches: Iterator[Batch],
    regressions: Sequence[Regression],
    regressors: Regressors,
    skip: int,
    noise: Noise | None,
) -> tuple[Statistics, ...]:
    sums = [Accumulator() for _ in regressions]
    for batch in batches:
        values, readout = watch.values(batch, noise)
        now = torch.cat(values, 2)
        if regressors == "earlier":
            rows = now[:, skip:].flatten(1)
            sums[0].add(rows)
            if readout is not None:
                sums[1].add(rows, readout)
            continue
        here = now[:, skip:].flatten(0, 1)
        if regressors == "same":
            sums[0].add(here)
        else:
            sums[0].add(torch.cat([here, _pooled(now, watch.bidirectional)[:, skip:].flatten(0, 1)], 1), here)
        if readout is not None:
            rows, position = torch.arange(len(batch), device=now.device), batch.position.to(now.device)
            sums[1].add(now[rows, position], readout)
    return tuple(accumulator.total() for accumulator in sums)


def _pooled(now: Tensor, bidirectional: bool) -> Tensor:
    """Mean over the positions that attention at each position can see."""
    if bidirectional:
        return now.mean(1, keepdim=True).expand_as(now)
    count = torch.arange(1, now.shape[1] + 1, device=now.device, dtype=torch.float64)[:, None]
    return now.double().cumsum(1) / count


def _regressions(watch: Observer, first: Batch, regressors: Regressors, skip: int) -> tuple[Regression, ...]:
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
    main = Regression(sources, targets, _allowed(watch, sources, targets))
    if readout is None:
        return (main,)
    width = readout.shape[1]
    site, slot = torch.full((width,), len(widths)), torch.full((width,), int(first.position[0]))
    ends = Columns(site, torch.arange(width), slot)
    if regressors == "earlier":
        return main, Regression(sources, ends, (sources.slot == int(first.position[0]))[:, None].expand(-1, width))
    return main, Regression(now, ends, torch.ones(len(now), width, dtype=torch.bool))


def _allowed(watch: Observer, sources: Columns, targets: Columns) -> Tensor:
    """Earlier stages only; MLPs and logits see their own position, attention what its mask lets it see."""
    stage = torch.tensor([site.stage for site in watch.sites])
    attends = torch.tensor([site.attends for site in watch.sites])[targets.site]
    before = stage[sources.site][:, None] < stage[targets.site]
    s, t = sources.slot[:, None], targets.slot[None]
    seen = torch.ones_like(before) if watch.bidirectional else s <= t
    return before & ((s == t) | (attends & ((s == _POOLED) | ((s >= 0) & seen))))


def _check(tokens: TokenizedPairs, regressors: Regressors, n_blocks: int, skip: int) -> None:
    if len(tokens) < n_blocks:
        raise SettingsError(f"expected at least one prompt a block; got {len(tokens)} prompts for {n_blocks} blocks.")
    shortest, longest = min(tokens.lengths), max(tokens.lengths)
    if skip >= shortest or bool((tokens.position < skip).any()):
        raise SettingsError(
            f"skip_positions={skip} leaves nothing of the shortest prompt ({shortest} tokens), or skips the position "
            "that the readout is taken at. Give longer prompts, or skip_positions=0."
        )
    several = shortest != longest or len(tokens.position.unique()) > 1
    if regressors == "earlier" and several:
        raise SettingsError(
            "regressors='earlier' makes a column of every position, so prompts must have one length; got "
            f"{shortest} to {longest} tokens. Keep the prompts of one length, or use 'pooled' or 'same'."
        )


def _subset(tokens: TokenizedPairs, rows: list[int]) -> TokenizedPairs:
    index = torch.tensor(rows, device=tokens.answer.device)
    wrong = None if tokens.wrong_answer is None else tokens.wrong_answer[index]
    clean = tuple(tokens.clean[row] for row in rows)
    return TokenizedPairs(clean, tokens.answer[index], tokens.position[index], wrong_answer=wrong)


def _tensors(parts: Sequence[Statistics]) -> dict[str, Tensor]:
    found = {}
    for k, part in enumerate(parts):
        names = _FIELDS[:2] if part.square else _FIELDS
        found |= {f"{k}/{name}": getattr(part, name).contiguous() for name in names}
    return found


def _write_block(path: Path, block: int, parts: Sequence[Statistics], settings: Mapping[str, Any]) -> None:
    tensors = {key: tensor.cpu() for key, tensor in _tensors(parts).items()}
    notes = {"settings": dict(settings), "n": [part.n for part in parts], "square": [part.square for part in parts]}
    write_directory(path / f"block{block}", "observations", SCHEMA, tensors, notes)


def _read_blocks(path: Path, settings: Mapping[str, Any]) -> dict[int, tuple[Statistics, ...]]:
    found = {}
    for folder in sorted(path.glob("block*")):
        tensors, notes = read_directory(folder, "observations", SCHEMA, required=("settings", "n", "square"))
        if notes["settings"] != dict(settings):
            differ = [key for key in settings if notes["settings"].get(key) != settings[key]]
            raise FileFormatError(f"{folder} is of another run ({differ} differ). Resume from another directory.")
        found[int(folder.name.removeprefix("block"))] = tuple(
            _restored(tensors, k, n, square)
            for k, (n, square) in enumerate(zip(notes["n"], notes["square"], strict=True))
        )
    return found


def _restored(tensors: Mapping[str, Tensor], k: int, n: int, square: bool) -> Statistics:
    mean, products = tensors[f"{k}/mean"], tensors[f"{k}/products"]
    if square:
        return Statistics(n, mean, products, mean, products, products.diagonal().clone())
    return Statistics(n, mean, products, *(tensors[f"{k}/{name}"] for name in _FIELDS[2:]))
