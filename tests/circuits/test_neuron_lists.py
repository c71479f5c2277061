"""Published lists of neurons against circuits: overlap, ranks, and chance by counting."""

from itertools import combinations
from pathlib import Path

import pandas as pd
import pytest

from tests.circuits.checks import small_circuit
from tests.components.test_component_edges import some_pairs
from tests.families import all_models
from tests.loops import for_each
from tl_neuron_circuits import Circuit, attribute
from tl_neuron_circuits._errors import FileFormatError, SettingsError
from tl_neuron_circuits.circuits import compare_with_neuron_list
from tl_neuron_circuits.circuits._neuron_lists import hypergeometric_tail

CASE = all_models("gpt2")[0].values[0]


@pytest.fixture(scope="module")
def circuit() -> Circuit:
    return small_circuit(CASE, 15)


def test_the_tail_is_counted() -> None:
    """All draws of 4 out of 9, of which 3 are marked."""
    draws = [len({0, 1, 2} & set(draw)) for draw in combinations(range(9), 4)]
    for shared in range(5):
        assert hypergeometric_tail(shared, 9, 3, 4) == pytest.approx(
            sum(d >= shared for d in draws) / len(draws), abs=1e-12
        )


@pytest.mark.parametrize("signed", [False, True])
def test_shared_neurons_ranks_and_chance(circuit: Circuit, tmp_path: Path, signed: bool) -> None:
    neurons = circuit.nodes.query("kind == 'neuron'")
    order = neurons.loc[neurons["score"].abs().sort_values(ascending=False).index]
    keys = ["layer", "unit", "sign"] if signed else ["layer", "unit"]
    different = order.drop_duplicates(keys)
    listed = different.iloc[[0, 2]][["layer", "unit", "sign"]]
    absent = {
        "layer": [0, 9],
        "unit": [next(u for u in range(24) if u not in set(neurons["unit"])), 3],
        "sign": [1, -1],
    }
    table = pd.concat([listed, pd.DataFrame(absent)], ignore_index=True).assign(label=["a", "b", "c", "d"])
    path = tmp_path / "neurons.csv"
    (table if signed else table.drop(columns="sign")).rename(columns={"unit": "Neuron"}).to_csv(path, index=False)
    found = compare_with_neuron_list(circuit, path)
    assert (found.n_published, found.n_shared, found.n_found) == (4, 2, len(different))
    assert found.table["rank"].tolist()[:2] == [1, 3] and found.median_rank == 2
    assert found.table["label"].tolist() == ["a", "b", "c", "d"]
    assert found.jaccard == pytest.approx(2 / (len(different) + 2))
    assert found.population == (96 if signed else 48)
    assert found.p_value == pytest.approx(hypergeometric_tail(2, found.population, 3, len(different)))  # no layer 9
    tabs = tmp_path / "nodes.tsv"
    tabs.write_text("node\tdescription\n" + "".join(f"L{r.layer}/N{r.unit}\tsome, text\n" for r in table.itertuples()))
    assert compare_with_neuron_list(circuit, tabs).n_shared == 2
    if signed:
        flipped = compare_with_neuron_list(circuit, table.assign(sign=-table["sign"]))
        both = set(map(tuple, neurons[keys].to_numpy()))
        assert flipped.n_shared == sum((row.layer, row.unit, -row.sign) in both for row in table.itertuples()) < 2


def test_scores_are_compared_by_their_best_neurons() -> None:
    model = CASE.build()
    scores = attribute(model, some_pairs(model))
    best = scores.top(200).drop_duplicates(["layer", "unit"]).head(10)
    found = compare_with_neuron_list(scores, best[["layer", "unit"]], top=10)
    assert found.jaccard == 1 and sorted(found.table["rank"]) == list(range(1, 11)) and found.p_value < 1e-9
    with pytest.raises(SettingsError, match="top="):
        compare_with_neuron_list(scores, best[["layer", "unit"]])


@for_each(
    ("text", "message"),
    [
        ("layer,weight\n1,2\n", "columns layer and unit"),
        ("layer,unit\n1,two\n", "row 0 has others"),
        ("layer,unit,sign\n1,2,up\n", "signs 1 or -1"),
        ("node,label\nhead 3,x\n", "row 0 has others"),
    ],
)
def test_what_is_no_list_of_neurons_is_refused(circuit: Circuit, tmp_path: Path, text: str, message: str) -> None:
    path = tmp_path / "list.csv"
    path.write_text(text)
    with pytest.raises(FileFormatError, match=message):
        compare_with_neuron_list(circuit, path)
    with pytest.raises(FileFormatError, match="cannot read it"):
        compare_with_neuron_list(circuit, tmp_path / "missing.csv")
