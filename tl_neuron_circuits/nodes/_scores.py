"""`NodeScores`: one number per node, with what is needed to name, rank, save and evaluate it."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any, Literal

import msgspec
import numpy as np
import pandas as pd
import torch
from torch import Tensor

from .. import _html
from .._errors import FileFormatError, NumericalError
from .._files import formed, read_directory, require_shapes, write_directory
from .._indices import as_count
from .._typing import checked
from ..bases._activations import ACTIVATION_BASES
from ..bases._site import Basis, Site

SCHEMA = 3


@dataclass(frozen=True)
class SiteLabels:
    """What a saved score knows of its site."""

    layer: Annotated[int, msgspec.Meta(ge=-1, lt=2**31)]
    letter: str


class _Notes(msgspec.Struct, forbid_unknown_fields=True):
    sites: dict[str, SiteLabels]
    settings: dict[str, Any]


class _Settings(msgspec.Struct):
    """What scores need of their settings."""

    method: str
    metric: str
    model: str
    basis: str
    n_pairs: int
    positions: Literal["keep", "sum"]


@dataclass(frozen=True, eq=False, repr=False)
class NodeScores:
    """Signed support of every node for the metric, averaged over pairs; positive helps the answer.

    `values` maps each hook point to float32 scores `[pos, unit]`, or `[unit]` where positions were summed; `errors` and
    `skips` hold one score per position (`[pos]`, or `[]`) where the basis has error or skip nodes. `nan` means: not
    measured (exact patching of chosen nodes, positions left out by `skip_special`).

    Example:
        >>> import tl_neuron_circuits as tnc
        >>> model = tnc.load_demo_model()
        >>> pairs = tnc.tasks.subject_verb_agreement("simple", n=8)
        >>> scores = tnc.attribute(model, pairs)
        >>> scores.top(3)[["label", "score"]].round(1)
               label  score
        0  L3/N425@2    0.9
        1   L0/N25@2    0.6
        2    L3/N1@2    0.6
        >>> scores.save("scores")
        >>> len(tnc.NodeScores.load("scores")) == len(scores)
        True
    """

    values: Mapping[str, Tensor]
    errors: Mapping[str, Tensor]
    skips: Mapping[str, Tensor]
    sites: Mapping[str, SiteLabels]
    settings: Mapping[str, Any]
    basis: Basis | Sequence[Basis] | None = field(default=None)

    @property
    def positions(self) -> Literal["keep", "sum"]:
        """Whether positions were kept or summed."""
        return self.settings["positions"]

    @property
    def ranking(self) -> Literal["abs", "signed"]:
        """How these scores rank nodes: by |score|, or by score, as a learned order does."""
        return self.settings.get("ranking", "abs")

    def __len__(self) -> int:
        """How many nodes there are."""
        return sum(t.numel() for _, _, t in self.blocks())

    def blocks(self) -> list[tuple[str, str, Tensor]]:
        """(hook, kind, scores) in a fixed order: the order of `flat`. Kinds: "node", "error", "skip"."""
        out = []
        for hook in self.values:
            out.append((hook, "node", self.values[hook]))
            out += [(hook, kind, of[hook]) for kind, of in (("error", self.errors), ("skip", self.skips)) if hook in of]
        return out

    def flat(self) -> Tensor:
        """All scores as one vector, on the CPU."""
        return torch.cat([t.reshape(-1).cpu() for _, _, t in self.blocks()])

    @checked
    def top(self, k: int = 10, *, by: Literal["abs", "signed"] | None = None) -> pd.DataFrame:
        """The `k` nodes with the largest |score| (or the largest score), best first; `by` is `.ranking` unless given.

        Columns: label, layer, unit, position, score, kind, hook. `unit` is -1 for error and skip nodes, `position` -1
        where positions were summed.
        """
        flat = self.flat()
        key = flat.abs() if (by or self.ranking) == "abs" else flat
        key = torch.where(key.isnan(), torch.full_like(key, -torch.inf), key)
        k = min(as_count(k, "k", 0), int((~flat.isnan()).sum()))
        return self._rows(key.topk(k).indices.numpy())

    def to_dataframe(self) -> pd.DataFrame:
        """Every node, in the order of `flat`; columns as in `top`."""
        return self._rows(np.arange(len(self)))

    def map(self) -> pd.DataFrame:
        """Scores summed over units, one row per hook point (or layer) and one column per position."""
        kept = self.positions == "keep"
        rows = {hook: (t.sum(-1) if kept else t.sum()[None]).cpu().numpy() for hook, t in self.values.items()}
        for extra in (self.errors, self.skips):
            for hook, t in extra.items():
                rows[hook] = rows[hook] + (t if kept else t[None]).cpu().numpy()
        return pd.DataFrame.from_dict(rows, orient="index").rename_axis("hook").rename_axis("position", axis=1)

    def save(self, path: str | Path) -> None:
        """Write a directory with `scores.safetensors`, settings in its header; an existing one is replaced at once.

        Raises:
            FileFormatError: the path exists and is not saved scores.
            SaveError: it could not be written; what was saved there before is as it was.
        """
        tensors = {f"{kind}/{hook}": t.contiguous().cpu() for hook, kind, t in self.blocks()}
        sites = {hook: {"layer": s.layer, "letter": s.letter} for hook, s in self.sites.items()}
        write_directory(path, "scores", SCHEMA, tensors, {"sites": sites, "settings": dict(self.settings)})

    @classmethod
    def load(cls, path: str | Path) -> "NodeScores":
        """Read what `save` wrote.

        The basis comes back where it is one of the model's own activations; with dictionaries pass `basis=` to
        `evaluate`.

        Raises:
            FileFormatError: missing, truncated, foreign, or of another schema.
        """
        tensors, notes = read_directory(path, "scores", SCHEMA, _Notes)
        settings = formed(notes.settings, _Settings, path)
        by_kind: dict[str, dict[str, Tensor]] = {"node": {}, "error": {}, "skip": {}}
        shapes: dict[str, tuple[int | None, ...]] = {}
        for hook in notes.sites:
            places = tensors[f"node/{hook}"].shape[:1] if f"node/{hook}" in tensors else ()
            kept = (places[0] if places else None,) if settings.positions == "keep" else ()
            for kind, found in by_kind.items():
                if kind == "node" or f"{kind}/{hook}" in tensors:
                    shapes[f"{kind}/{hook}"] = (*kept, None) if kind == "node" else kept
                    found[hook] = tensors.get(f"{kind}/{hook}", torch.empty(0))
        require_shapes(path, tensors, shapes)
        if bad := [name for name, tensor in tensors.items() if not tensor.is_floating_point() or tensor.isinf().any()]:
            raise FileFormatError(f"expected finite scores in {path}; {bad[:3]} are not. Save them again.")
        names = settings.basis.split("+")
        bases: list[Basis] = [ACTIVATION_BASES[name]() for name in names if name in ACTIVATION_BASES]
        basis = bases if len(bases) == len(names) else None
        return cls(by_kind["node"], by_kind["error"], by_kind["skip"], notes.sites, notes.settings, basis)

    def __repr__(self) -> str:
        s = self.settings
        return (
            f"NodeScores({s['method']} of {s['metric']} on {s['model']}, basis {s['basis']}, {len(self):,} nodes, "
            f"{s['n_pairs']} pairs, positions {s['positions']})"
        )

    def _repr_html_(self) -> str:
        return self.to_html()

    @checked
    def to_html(self, k: int = 20) -> str:
        """The `k` nodes with the largest |score| as a table with bars; neurons link to their page where one exists."""
        best = self.top(k)
        pages = _html.neuron_pages(str(self.settings["model"]), best)
        return _html.block(
            repr(self), _html.table(best.drop(columns="hook"), bars=("score",), rows=k, links={"label": pages})
        )

    def _rows(self, index: np.ndarray) -> pd.DataFrame:
        blocks = self.blocks()
        sizes = np.array([t.numel() for _, _, t in blocks])
        ends = np.cumsum(sizes)
        block = np.searchsorted(ends, index, side="right")
        inside = index - (ends - sizes)[block]
        kept = self.positions == "keep"
        width = np.array([t.shape[-1] if kind == "node" else 1 for _, kind, t in blocks])[block]
        kinds = np.array([kind for _, kind, _ in blocks])[block]
        unit = np.where(kinds == "node", inside % width, -1)
        position = inside // width if kept else np.full(len(index), -1)
        hooks = np.array([hook for hook, _, _ in blocks], dtype=object)[block]
        layer = np.array([self.sites[hook].layer for hook, _, _ in blocks])[block]
        frame = pd.DataFrame(
            {"layer": layer, "unit": unit, "position": position, "score": self.flat().numpy()[index], "kind": kinds}
        )
        columns = (layer.tolist(), unit.tolist(), position.tolist(), kinds.tolist(), hooks.tolist())
        labels = [label(lay, self.sites[h].letter, u, p, kind) for lay, u, p, kind, h in zip(*columns, strict=True)]
        frame.insert(0, "label", labels)
        frame["hook"] = hooks
        return frame


def label(layer: int, letter: str, unit: int, position: int, kind: str) -> str:
    """`L12/N345@7`; `L12/error@7` for vector nodes; without `@` where positions were summed."""
    name = f"{letter}{unit}" if kind == "node" else kind
    return f"L{layer}/{name}" + (f"@{position}" if position >= 0 else "")


def site_labels(sites: Sequence[Site]) -> dict[str, SiteLabels]:
    """What scores keep of their sites."""
    return {site.hook: SiteLabels(site.layer, site.letter) for site in sites}


def without_positions(scores: NodeScores, positions: Sequence[int]) -> NodeScores:
    """The scores with nan at these positions, so that no node there is chosen; positions must be kept."""
    rows = list(positions)

    def blank(blocks: Mapping[str, Tensor]) -> dict[str, Tensor]:
        blocks = {hook: t.clone() for hook, t in blocks.items()}
        for t in blocks.values():
            t[rows] = torch.nan
        return blocks

    settings = {**scores.settings, "skipped_positions": rows}
    fields = (blank(scores.values), blank(scores.errors), blank(scores.skips))
    return NodeScores(*fields, scores.sites, settings, scores.basis)


def require_finite(scores: NodeScores) -> NodeScores:
    """The scores, unless some of them are infinite, or not a number where all were measured.

    Raises:
        NumericalError: with the hook points at fault.
    """
    bad = [f"{hook} ({kind})" for hook, kind, t in scores.blocks() if not torch.isfinite(t).all()]
    if bad:
        raise NumericalError(
            f"scores at {bad[:5]} contain NaN or inf: the model's values or gradients overflow. Try dtype float32 or "
            "bfloat16, and check_model(model)."
        )
    return scores
