"""What CircuitLasso observes: the values of every component, or of every node of a basis, in the model's order.

A site is regressed on the sites of earlier stages. It is one node of the circuit (a head, an MLP: all its units
together) or, where `split`, a node a unit (neurons, dictionary features).
"""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch
from jaxtyping import Float
from torch import Tensor

from .._errors import SettingsError
from ..bases._activations import Neurons
from ..bases._runs import Values, capture, fired, logits_of, run_values, values_at
from ..bases._site import Basis, sites_of
from ..bases._site import Site as BasisSite
from ..components._graph import ComponentGraph, component_graph, split_heads
from ..models._protocol import TransformerLensModel
from ..nodes._scores import label
from ..tasks._metrics import Metric, measure
from ..tasks._tokenized import Batch, TokenizedPairs

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
            logits = logits_of(self.model, batch.clean, batch.attention_mask)
            store = fired(store, names, self.model)
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


def basis_sites(model: TransformerLensModel, basis: Basis | Sequence[Basis]) -> Iterator[Site]:
    """Every scalar node of a basis; sites of one layer are one stage. Attention lies between stages, so all attend.

    Error and skip nodes are vectors, no features: they are left out.
    """
    for site in sites_of(model, basis):
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
    sites = list(component_sites(graph, model, mlp == "neurons") if basis is None else basis_sites(model, basis))
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
