"""Groups of neurons that are driven by the same inputs and drive the same outputs: spectral clustering on two views.

The affinity of two nodes in a view is the cosine of their profiles, 0 where it is negative; the two views are combined
by their harmonic mean, which is high only where both are. Spectral clustering is scikit-learn's (extra `explain`).
Source: METHODS 1.7 (multi-view spectral clustering, combined harmonically).
"""

from collections.abc import Mapping
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

    def groups(self) -> dict[str, list[str]]:
        """Members by "cluster 0", "cluster 1" and so on, as `Circuit.group` takes them; the largest first."""
        members = [[node for node, label in self._pairs() if label == number] for number in range(len(self))]
        return {f"cluster {number}": found for number, found in enumerate(members)}

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


@checked
def cluster(profiles: Profiles, n_clusters: int = 8, *, seed: int = 0) -> Clusters:
    """Cluster nodes by what drives them and what they drive.

    Args:
        profiles: from `profiles(model, prompts, nodes)`.
        n_clusters: how many groups.
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
    try:
        from sklearn.cluster import SpectralClustering
    except ImportError as error:
        raise NeuronCircuitsError(
            "clustering needs scikit-learn, which is not installed: pip install 'tl-neuron-circuits[explain]'."
        ) from error
    if not 2 <= n_clusters < len(profiles.nodes):
        raise SettingsError(
            f"expected 2 to {len(profiles.nodes) - 1} clusters of {len(profiles.nodes)} nodes; got {n_clusters}."
        )
    affinity = affinities(profiles)
    method = SpectralClustering(n_clusters, affinity="precomputed", random_state=seed)
    found = torch.as_tensor(method.fit_predict(affinity.double().numpy())).long()
    return Clusters(profiles.nodes, _by_size(found), affinity, {"n_clusters": n_clusters, "seed": seed})


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
