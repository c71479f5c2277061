"""Planted clusters are found, by two views at once."""

from typing import Any

import pandas as pd
import pytest
import torch

from tl_neuron_circuits._errors import NeuronCircuitsError, SettingsError
from tl_neuron_circuits.explain import cluster, profiles
from tl_neuron_circuits.explain._cluster import affinities, shared_names
from tl_neuron_circuits.explain._profiles import Profiles


def planted(groups: int = 3, each: int = 6) -> Profiles:
    generator = torch.Generator().manual_seed(0)
    views = []
    for width in (12, 8):
        centers = torch.eye(groups, width) * 3
        views.append(centers.repeat_interleave(each, 0) + 0.2 * torch.rand(groups * each, width, generator=generator))
    nodes = tuple(f"L0/N{i}" for i in range(groups * each))
    return Profiles(nodes, views[0], views[1], tuple("abcdefghijkl"), tuple("mnopqrst"))


def test_planted_clusters_are_found() -> None:
    pytest.importorskip("sklearn")
    found = cluster(planted(), 3)
    assert sorted(found.groups().values()) == sorted([[f"L0/N{6 * g + i}" for i in range(6)] for g in range(3)])
    assert torch.equal(found.labels, cluster(planted(), 3).labels)
    table = found.to_dataframe()
    assert (table["cohesion"] > 0.8).all() and len(found) == 3 and "3 clusters" in repr(found)
    assert "<table" in found._repr_html_()


def test_the_affinity_is_high_only_where_both_views_agree() -> None:
    a, b = torch.tensor([[1.0, 0.0], [1.0, 0.0], [0.0, 1.0]]), torch.tensor([[1.0, 0.0], [0.0, 1.0], [1.0, 0.0]])
    found = affinities(Profiles(("x", "y", "z"), a, b, ("s", "t"), ("u", "v")))
    assert float(found[0, 1]) < 1e-5 and float(found[0, 2]) < 1e-5 and torch.equal(found, found.T)
    same = affinities(Profiles(("x", "y", "z"), a, a, ("s", "t"), ("u", "v")))
    assert float(same[0, 1]) == pytest.approx(1.0)


def test_cluster_errors(monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("sklearn")
    with pytest.raises(SettingsError, match="2 to 17 clusters of 18 nodes; got 18"):
        cluster(planted(), 18)
    broken = planted()
    broken.attribution[0, 0] = float("nan")
    with pytest.raises(SettingsError, match="attribution has NaN"):
        cluster(broken, 3)
    monkeypatch.setitem(__import__("sys").modules, "sklearn.cluster", None)
    with pytest.raises(NeuronCircuitsError, match=r"tl-neuron-circuits\[explain\]"):
        cluster(planted(), 3)


def test_profiles_of_a_real_model_cluster(stories260K: Any) -> None:
    pytest.importorskip("sklearn")
    nodes = pd.DataFrame({"hook": "blocks.3.mlp.hook_post", "unit": range(30), "position": -1})
    found = profiles(stories260K, ["Lily saw a big ball.", "Tom was sad."], nodes)
    clusters = cluster(found, 4)
    assert sum(len(members) for members in clusters.groups().values()) == 30 and len(clusters) == 4


def test_names_come_from_tokens_that_say_something() -> None:
    """The first token drives most neurons most."""
    given = planted()
    sources = ("<|im_start|>", *given.sources[1:])
    attribution = given.attribution.clone()
    attribution[:, 0] = 2 * attribution.abs().max()
    found = cluster(Profiles(given.nodes, attribution, given.contribution, sources, given.targets), 3, labels={})
    assert not any("im_start" in name for name in found.names)


def test_a_name_says_what_is_read_only_if_that_is_strongest_on_average() -> None:
    nodes = ("L20/N1@4", "L22/N2@4", "L29/N3@4")
    contribution = torch.ones(3, 1)
    sources, targets = ("The", "capital", "is"), ("Paris",)

    def name(rows: list[list[float]], **known: Any) -> str:
        found = Profiles(nodes, torch.tensor(rows), contribution, sources, targets)
        return shared_names(found, [0, 0, 0], {}, **known)[0]

    agreed = [[0.1, 1.0, 0.4], [0.1, 1.0, 0.2], [0.1, 0.5, 0.3]]
    assert name(agreed) == "reads 'capital', for 'Paris'"
    split = [[0.0, 1.0, 0.9], [0.0, 1.0, 0.9], [0.0, 0.0, 5.0]]  # most have "capital" first, on average it is "is"
    assert name(split) == "layers 20-29, for 'Paris'"
    entering = torch.tensor([[0.0, 0.1, 2.0], [0.0, 0.1, 0.0], [0.0, 0.2, 0.0]])  # the circuit's edges say "is"
    tokens = dict.fromkeys(nodes, " is")
    assert name(agreed, entering=entering, token_of=tokens) == "'is', layers 20-29, for 'Paris'"
    assert name(agreed, entering=entering[:, [0, 2, 1]]) == "reads 'capital', for 'Paris'"
