"""Edge ablation by path patching: every target sees its own version of its sources.

One forward pass holds a row for each target with a view of its own, a row in which everything is live, and a row for
the output. At each layer a target's value is read from its own row, in which the sources whose edges are cut hold their
baseline values while all other neurons hold their live ones; then every row gets the live values of that layer, with
its own cuts. So a cut removes what goes from the source to the target through the residual stream and attention, whose
patterns and norms respond as they would, and nothing that goes through other neurons.
Source: path patching (Goldowsky-Dill et al. 2023, arXiv 2304.05969), many targets at once.
"""

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Any, Literal

import torch
from jaxtyping import Float, Int
from torch import Tensor

from .._errors import SettingsError
from ..bases._activations import Neurons
from ..bases._runs import run_logits
from ..models._protocol import TransformerLensModel
from ..models._threads import hooked
from ._ablation import Hooks

Neuron = tuple[int, int, int]
"""Layer, position, unit."""
Edge = tuple[Neuron, Neuron | None]
"""Source and target; None is the output."""
EdgeMode = Literal["keep", "cut"]


@dataclass(frozen=True)
class _View:
    """One row: its listed sources are live and all others ablated ("keep"), or the reverse ("cut")."""

    sources: frozenset[Neuron]
    layer: int
    targets: tuple[Neuron, ...]


def run_with_edges(
    model: TransformerLensModel,
    tokens: Int[Tensor, "batch pos"],
    edges: Iterable[Edge],
    baselines: Mapping[str, Tensor | None],
    *,
    mode: EdgeMode,
    attention_mask: Tensor | None = None,
) -> Float[Tensor, "batch pos d_vocab"]:
    """Logits with only these edges between neurons kept, or with these edges cut.

    Embeddings and attention are never ablated. With "keep" a target sees every neuron but its kept sources at the
    baseline, neurons outside the circuit included; so keeping all edges between some nodes is keeping those nodes.

    Args:
        model: any TransformerLens model with dense MLPs.
        tokens: prompts of one length.
        edges: from neuron to neuron, or to None for the output.
        baselines: by hook point, the value of ablated neurons, broadcasting over the batch; None is zero.
        mode: "keep" or "cut".
        attention_mask: as the model takes it.

    Raises:
        SettingsError: an edge that does not lead to a later layer, or a layer without a baseline.
    """
    views = _views(list(edges), mode)
    ablation = _Rows(model, views, len(tokens), baselines, mode)
    rows = len(views) + 1
    mask = None if attention_mask is None else attention_mask.repeat(rows, 1)
    with torch.no_grad(), hooked(model, ablation.hooks()):
        logits = run_logits(model, tokens.repeat(rows, 1), mask)
    return logits.reshape(rows, len(tokens), *logits.shape[1:])[_OUTPUT]


_LIVE, _OUTPUT = 0, 1


def _views(edges: list[Edge], mode: EdgeMode) -> list[_View]:
    """The output's view first, then one for all targets of a layer that see the same."""
    sources: dict[Neuron | None, set[Neuron]] = {None: set()}
    for source, target in edges:
        if target is not None and source[0] >= target[0]:
            raise SettingsError(f"expected edges to later layers; got {source} to {target} (layer, position, unit).")
        sources.setdefault(target, set()).add(source)
        if mode == "keep":  # a source that nothing is kept into sees everything ablated
            sources.setdefault(source, set())
    alike: dict[tuple[int, frozenset[Neuron]], list[Neuron]] = {}
    for target, seen in sources.items():
        if target is not None:
            alike.setdefault((target[0], frozenset(seen)), []).append(target)
    views = [_View(seen, layer, tuple(targets)) for (layer, seen), targets in alike.items()]
    return [_View(frozenset(sources[None]), -1, ()), *views]


class _Rows:
    """What each row sees at each layer: row 0 sees everything live, row 1 is the output's, then the targets'."""

    def __init__(
        self, model: TransformerLensModel, views: list[_View], batch: int, baselines: Mapping[str, Tensor | None],
        mode: EdgeMode,
    ) -> None:  # fmt: skip
        self._sites = Neurons().sites(model)
        missing = [site.hook for site in self._sites if site.hook not in baselines]
        if missing:
            raise SettingsError(f"expected a baseline (None for zero) for every layer; {missing[:3]} have none.")
        self._views, self._batch, self._baselines, self._mode = views, batch, baselines, mode

    def hooks(self) -> Hooks:
        """One hook a layer."""
        return [(site.hook, self._hook(site.hook, site.layer)) for site in self._sites]

    def _hook(self, name: str, layer: int) -> Callable[..., Tensor]:
        targets = [(row, p, u) for row, view in enumerate(self._views, 1) for at, p, u in view.targets if at == layer]
        sources = [(row, p, u) for row, view in enumerate(self._views, 1) for at, p, u in view.sources if at == layer]
        own, seen = (torch.tensor(rows, dtype=torch.long).reshape(-1, 3).T for rows in (targets, sources))

        def see(value: Tensor, hook: Any) -> Tensor:
            by_row = value.reshape(-1, self._batch, *value.shape[1:])
            row, place, unit = own.to(value.device)
            live = by_row[_LIVE].clone()
            live[:, place, unit] = by_row[row, :, place, unit].T
            base = self._baselines[name]
            base = torch.zeros_like(live) if base is None else base.to(live).expand_as(live)
            view, listed = (base, live) if self._mode == "keep" else (live, base)
            view = view.expand_as(by_row).clone()
            row, place, unit = seen.to(value.device)
            view[row, :, place, unit] = listed[:, place, unit].T
            view[_LIVE] = live
            return view.reshape(value.shape)

        return see
