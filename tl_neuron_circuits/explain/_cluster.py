"""Groups of neurons that are driven by the same inputs and drive the same outputs: spectral clustering on two views.

The affinity of two nodes in a view is the cosine of their profiles, 0 where it is negative; the two views are combined
by their harmonic mean, which is high only where both are. With labels, the affinity is the mean of that and of 1 where
two nodes have the same label. Spectral clustering is scikit-learn's (extra `explain`).

With labels a cluster is named by what at least half of its members share: the label, else the token that drives most
of them (by |attribution|) if it is also the strongest on average, or their layers, and the target that they support or
oppose most (by |contribution|).

Source: METHODS 1.7 (multi-view spectral clustering, combined harmonically).
"""

import math
import re
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import pandas as pd
import torch
from jaxtyping import Float, Int
from torch import Tensor

from .. import _html
from .._errors import NeuronCircuitsError, SettingsError
from .._typing import checked
from ._profiles import Profiles

_FLOOR = 1e-6  # keeps the graph connected, as spectral clustering expects
_SPECIAL = re.compile(r"<\|.*\|>|</?s>|<[a-z_]+>|\[[A-Z]+\]")


@dataclass(frozen=True, eq=False, repr=False)
class Clusters:
    """A cluster number for every node, and the affinities they come from.

    Example:
        >>> import tl_neuron_circuits as tnc
        >>> model = tnc.load_demo_model()
        >>> nodes = [f"L3/N{unit}" for unit in range(12)]
        >>> clusters = tnc.cluster(tnc.profiles(model, "The dog near the cats", nodes), 3)
        >>> len(clusters), sum(len(members) for members in clusters.groups().values())
        (3, 12)
    """

    nodes: tuple[str, ...]
    labels: Int[Tensor, " node"]
    affinity: Float[Tensor, "node node"]
    settings: Mapping[str, Any]
    names: tuple[str, ...] = ()
    """Of the clusters, where labels gave them names."""

    def groups(self) -> dict[str, list[str]]:
        """Members by "cluster 0", "cluster 1" and so on, or by what they share; as `Circuit.group` takes them.

        The largest comes first.
        """
        members = [[node for node, label in self._pairs() if label == number] for number in range(len(self))]
        names = self.names or [f"cluster {number}" for number in range(len(self))]
        return dict(zip(names, members, strict=True))

    def to_dataframe(self) -> pd.DataFrame:
        """Columns label, cluster, cohesion (mean affinity to the other members; nan for a single one)."""
        rows = []
        for index, (node, label) in enumerate(self._pairs()):
            others = (self.labels == label).nonzero()[:, 0]
            others = others[others != index]
            rows.append((node, label, float(self.affinity[index, others].mean())))
        return pd.DataFrame(rows, columns=["label", "cluster", "cohesion"])

    def __len__(self) -> int:
        """How many clusters."""
        return int(self.labels.max()) + 1

    def __repr__(self) -> str:
        return f"Clusters({len(self.nodes)} nodes in {len(self)} clusters)"

    def _repr_html_(self) -> str:
        rows = [(name, len(members), " ".join(members)) for name, members in self.groups().items()]
        table = pd.DataFrame(rows, columns=["cluster", "nodes", "members"])
        return _html.block(repr(self), _html.table(table, bars=("nodes",), rows=40))

    def _pairs(self) -> list[tuple[str, int]]:
        return list(zip(self.nodes, self.labels.tolist(), strict=True))


def require_scikit_learn() -> None:
    """Raise where clustering could not run, before long work is done for it.

    Raises:
        NeuronCircuitsError: scikit-learn is not installed.
    """
    try:
        import sklearn.cluster  # noqa: F401
    except ImportError as error:
        raise NeuronCircuitsError(
            "clustering needs scikit-learn, which is not installed: pip install 'tl-neuron-circuits[explain]'."
        ) from error


@checked
def cluster(
    profiles: Profiles, n_clusters: int = 8, *, labels: Mapping[str, str] | None = None, seed: int = 0
) -> Clusters:
    """Cluster nodes by what drives them and what they drive, and by labels where there are any.

    Args:
        profiles: from `profiles(model, prompts, nodes)`.
        n_clusters: how many groups.
        labels: of nodes, such as from `describe`; "" and nodes that are missing have none. Clusters are then named by
            what their members share.
        seed: of the clustering's k-means.

    Raises:
        NeuronCircuitsError: scikit-learn is not installed.
        SettingsError: fewer than two clusters, or not fewer than nodes; profiles that are not finite.

    Source: METHODS 1.7.

    Example:
        >>> import tl_neuron_circuits as tnc
        >>> nodes = [f"L3/N{unit}" for unit in range(20)]
        >>> found = tnc.profiles(tnc.load_demo_model(), "The dog near the cats", nodes)
        >>> len(tnc.cluster(found, 4))
        4
    """
    require_scikit_learn()
    from sklearn.cluster import SpectralClustering

    if not 2 <= n_clusters < len(profiles.nodes):
        raise SettingsError(
            f"expected 2 to {len(profiles.nodes) - 1} clusters of {len(profiles.nodes)} nodes; got {n_clusters}."
        )
    affinity = affinities(profiles)
    if labels is not None:
        affinity = (affinity + _same_label(profiles.nodes, labels)) / 2
    method = SpectralClustering(n_clusters, affinity="precomputed", random_state=seed)
    found = torch.as_tensor(method.fit_predict(affinity.double().numpy())).long()
    numbers = _by_size(found)
    names = () if labels is None else shared_names(profiles, numbers.tolist(), labels)
    return Clusters(profiles.nodes, numbers, affinity, {"n_clusters": n_clusters, "seed": seed}, names)


def _same_label(nodes: Sequence[str], labels: Mapping[str, str]) -> Float[Tensor, "node node"]:
    """1 where two nodes have the same label, and on the diagonal."""
    own = [labels.get(node) or place for place, node in enumerate(nodes)]
    return torch.tensor([[float(a == b) for b in own] for a in own])


def shared_names(
    profiles: Profiles,
    numbers: Sequence[int],
    labels: Mapping[str, str],
    entering: Float[Tensor, "node source"] | None = None,
    token_of: Mapping[str, str] | None = None,
) -> tuple[str, ...]:
    """A name for every cluster, each once.

    A cluster is said to read a token if that drives most of its members and takes the largest part of them on average;
    with `entering`, the attributions of tokens' edges into the nodes, also the largest of those. Without one it is
    named by where it is, with the tokens of nodes from `token_of`.
    """
    # The first token takes the largest part in most neurons, and says nothing about any.
    special = torch.tensor([bool(_SPECIAL.fullmatch(token.strip())) for token in profiles.sources])
    told = profiles.attribution.abs().masked_fill(special, 0.0)
    part = told / told.sum(1, keepdim=True).clamp(min=torch.finfo(told.dtype).tiny)
    driver = [profiles.sources[column].strip() for column in told.argmax(1).tolist()]
    most = profiles.contribution.abs().argmax(1).tolist()
    signs = profiles.contribution[torch.arange(len(most)), torch.tensor(most)] >= 0
    drives = [
        f"{'for' if sign else 'against'} {profiles.targets[column].strip()!r}"
        for column, sign in zip(most, signs.tolist(), strict=True)
    ]
    names: list[str] = []
    for number in range(max(numbers) + 1):
        members = [place for place, own in enumerate(numbers) if own == number]
        nodes = [profiles.nodes[place] for place in members]
        shared = _half_share([labels.get(node, "") for node in nodes])
        if not shared:
            read = _half_share([driver[place] for place in members])
            strongest = [part[members].mean(0)]
            if entering is not None:
                strongest.append(entering[members].sum(0).abs().masked_fill(special, 0.0))
            reads = all(profiles.sources[int(one.argmax())].strip() == read for one in strongest if bool(one.any()))
            place = f"reads {read!r}" if read and reads else _place(nodes, token_of or {})
            parts = (place, _half_share([drives[place] for place in members]))
            shared = ", ".join(part for part in parts if part) or f"cluster {number}"
        taken = sum(name == shared or name.startswith(f"{shared} (") for name in names)
        names.append(f"{shared} ({taken + 1})" if taken else shared)
    return tuple(names)


def _place(nodes: Sequence[str], token_of: Mapping[str, str]) -> str:
    """The token at which at least half of the nodes are, and the fewest layers that hold three quarters of them."""
    token = _half_share([token_of.get(node, "").strip() for node in nodes])
    layers = sorted(int(found[1]) for node in nodes if (found := re.match(r"L(\d+)/", node)))
    if not layers:
        return ""
    many = math.ceil(0.75 * len(layers))
    low, high = min(zip(layers, layers[many - 1 :], strict=False), key=lambda ends: ends[1] - ends[0])
    return f"{token!r}, " * bool(token) + (f"layer {low}" if low == high else f"layers {low}-{high}")


def _half_share(texts: Sequence[str]) -> str:
    """The text that at least half have; "" where there is none."""
    text, count = Counter(texts).most_common(1)[0]
    return text if 2 * count >= len(texts) else ""


def affinities(profiles: Profiles) -> Float[Tensor, "node node"]:
    """Harmonic mean over the views of max(cosine, 0), at least 1e-6; 1 on the diagonal.

    Raises:
        SettingsError: a profile is not finite.
    """
    views = []
    for name, values in (("attribution", profiles.attribution), ("contribution", profiles.contribution)):
        if not values.isfinite().all():
            raise SettingsError(f"expected finite profiles; the {name} has NaN or infinite entries.")
        unit = torch.nn.functional.normalize(values.double(), dim=1)
        views.append((unit @ unit.T).clamp(min=_FLOOR))
    combined = 2 * views[0] * views[1] / (views[0] + views[1])
    combined = (combined + combined.T) / 2
    return combined.fill_diagonal_(1.0).float()


def _by_size(labels: Int[Tensor, " node"]) -> Int[Tensor, " node"]:
    """The same clusters, numbered from the largest; of equal ones, in the order of their first members."""
    found, counts = labels.unique(return_counts=True)
    first = torch.tensor([int((labels == label).nonzero()[0]) for label in found])
    order = sorted(range(len(found)), key=lambda place: (-int(counts[place]), int(first[place])))
    out = torch.empty_like(labels)
    for number, place in enumerate(order):
        out[labels == found[place]] = number
    return out
