"""Ablation as TransformerLens hooks: nodes outside a set take a baseline value, nodes inside stay live.

Live means: whatever the ablated run computes, never a cached clean value. (Resetting kept nodes to their clean values
inflates faithfulness: .65 against .23 at 20 nodes in one measured case.)
Source: METHODS, notation.
"""

from collections.abc import Callable, Collection, Iterable, Mapping
from typing import Any, Literal

import torch
from jaxtyping import Bool
from torch import Tensor

from .._errors import SettingsError
from ..bases._site import Parts, Site

Ablation = Literal["mean", "zero", "resample", "corrupt"]
Kept = Mapping[tuple[str, str], Bool[Tensor, "..."]]
"""Which nodes stay live, by (hook, kind): masks that broadcast to [pos, unit], or [pos] for vector nodes."""
Hooks = list[tuple[str, Callable[..., Any]]]


def ablation_hooks(sites: Iterable[Site], kept: Kept, baselines: Mapping[str, Parts | None]) -> Hooks:
    """Forward hooks that keep only the nodes in `kept`.

    Args:
        sites: of the basis whose nodes are ablated; other activations are not touched.
        kept: masks by (hook, kind); a block without a mask is not touched.
        baselines: by hook, the values that ablated nodes take, broadcasting over the batch; None is zero.

    Returns:
        `(name, hook)` pairs for `model.hooks(fwd_hooks=...)` or `model.run_with_hooks`.

    Raises:
        SettingsError: a site has no entry in `baselines`.

    Example:
        >>> import torch
        >>> import tl_neuron_circuits as tnc
        >>> model = tnc.load_demo_model()
        >>> from tl_neuron_circuits.interventions import ablation_hooks
        >>> (site,) = tnc.bases.Neurons(layers=[2]).sites(model)
        >>> only_ten = torch.arange(512) < 10
        >>> hooks = ablation_hooks([site], {(site.hook, "node"): only_ten}, {site.hook: None})
        >>> model.run_with_hooks("The dog", fwd_hooks=hooks).shape
        torch.Size([1, 3, 726])
    """
    switch = AblationSwitch(sites, baselines)
    switch.keep(kept)
    return [pair for site in switch.touched for pair in site.hooks()]


class AblationSwitch:
    """Ablation hooks that stay in place while the kept nodes change from run to run, as they do along a curve.

    Adding and removing hooks visits every hook point of a model, which costs more than the ablation itself. A site that
    stays whole returns nothing and computes nothing; one that loses all its nodes does not compute the live ones.

    Args:
        sites: as in `ablation_hooks`.
        baselines: as in `ablation_hooks`.

    Raises:
        SettingsError: a site has no entry in `baselines`.
    """

    def __init__(self, sites: Iterable[Site], baselines: Mapping[str, Parts | None]) -> None:
        """Every node is live until `keep` is called."""
        sites = tuple(sites)
        missing = [site.hook for site in sites if site.hook not in baselines]
        if missing:
            raise SettingsError(f"expected a baseline (None for zero) for {missing[0]}; got {list(baselines)}.")
        nodes: dict[str, Tensor] = {}
        self._sites = [_AblatedSite(site, baselines[site.hook], nodes) for site in sites]

    @property
    def hooks(self) -> Hooks:
        """`(name, hook)` pairs for `model.hooks(fwd_hooks=...)`."""
        return [pair for site in self._sites for pair in site.hooks()]

    @property
    def touched(self) -> "list[_AblatedSite]":
        """The sites that lose a node, and those into which nodes of such a site write."""
        return [site for site in self._sites if site.changes]

    def keep(self, kept: Kept | None) -> None:
        """From now on only these nodes stay live; None: all of them."""
        lost: set[str] = set()
        for site in self._sites:  # in the order of the layers
            site.keep({} if kept is None else kept, lost)
            lost |= {site.hook} if site.masks else set()


class _AblatedSite:
    """One site's hooks, and the masks they use: none where it stays whole."""

    def __init__(self, site: Site, base: Parts | None, nodes: dict[str, Tensor]) -> None:
        """`nodes` are those of sites that lost some in this run, for later sites that they write into too."""
        self._site, self._base, self._nodes = site, base, nodes
        self._seen: dict[str, Tensor] = {}
        self.masks: dict[str, Tensor] = {}
        self.changes = False
        self._empty = False

    @property
    def hook(self) -> str:
        return self._site.hook

    def keep(self, kept: Kept, lost: Collection[str]) -> None:
        kinds, hook = ("node", *self._site.vectors), self._site.hook
        masks = {kind: kept[hook, kind] for kind in kinds if (hook, kind) in kept}
        self.masks = {} if all(bool(mask.all()) for mask in masks.values()) else masks
        self.changes = bool(self.masks) or any(hook in lost for hook in self._site.earlier)
        whole = len(self.masks) == len(kinds) and not self._site.earlier and len(self._site.writes) == 1
        self._empty = whole and not any(bool(mask.any()) for mask in masks.values())
        self._seen.clear()

    def hooks(self) -> Hooks:
        others = [name for name in self._site.reads if name != self._site.hook]
        readers = [(name, lambda value, hook, name=name: self._read(value, name)) for name in others]
        return [*readers, (self._site.hook, lambda value, hook: self._write(value))]

    def _read(self, value: Tensor, name: str) -> None:
        if self.changes:
            self._seen[name] = value

    def _write(self, value: Tensor) -> Tensor | None:
        if not self.changes:
            return None
        if self._empty and self._base is not None and self._base.nodes.dim() == 3:
            return self._baseline(self._base, value)
        live, base = self._site.take_apart({**self._seen, self._site.hook: value}), self._base
        self._seen.clear()
        nodes = _choose(self.masks.get("node"), live.nodes, None if base is None else base.nodes)
        vectors = {
            name: _choose(self.masks.get(name), vector, None if base is None else base.vectors[name], vector=True)
            for name, vector in live.vectors.items()
        }
        earlier = {hook: self._nodes.get(hook, live_nodes) for hook, live_nodes in live.earlier.items()}
        if len(self._site.writes) > 1:
            self._nodes[self.hook] = nodes
        return self._site.put_together(Parts(nodes, vectors, earlier), value)

    def _baseline(self, base: Parts, value: Tensor) -> Tensor:
        """The site with all its nodes ablated: put together once where every row has the same baseline."""
        self._seen.clear()
        like = value[: base.nodes.shape[0]]
        rows, positions = like.shape[:2]
        parts = base.map(lambda part: part.to(value.device).expand(rows, positions, -1))
        same = self._site.put_together(parts, like).expand_as(value)
        # A copy: what the model edits in place must not reach the baseline.
        return same.clone(memory_format=torch.contiguous_format)


def _choose(mask: Tensor | None, live: Tensor, base: Tensor | None, *, vector: bool = False) -> Tensor:
    if mask is None:
        return live
    mask = mask.to(live.device)
    mask = mask[..., None] if vector else mask
    return torch.where(mask, live, live.new_zeros(()) if base is None else base.to(live))
