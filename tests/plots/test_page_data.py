"""The page as a text: small, whole, and with nothing in its JSON that HTML could read."""

import json
import re
from dataclasses import replace
from html.parser import HTMLParser
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pandas as pd
import pytest

from tests.loops import for_each
from tests.plots.conftest import PROMPT
from tests.plots.made_up import BYTES, NASTY, large_circuit, nasty_circuit
from tl_neuron_circuits import Circuit, demo, direct_logit_effects, load_demo_model, trace
from tl_neuron_circuits._errors import SettingsError
from tl_neuron_circuits.circuits._table import NODE_COLUMNS
from tl_neuron_circuits.explain._max_activating_examples import Example
from tl_neuron_circuits.plots._page import embedded_json, page, page_data
from tl_neuron_circuits.plots._word_pieces import word_ends


class Scripts(HTMLParser):
    """The contents of a page's scripts, and every address that it mentions in an attribute."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.inside, self.scripts, self.addresses = False, [], []
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.addresses += [value for name, value in attrs if name in ("src", "href", "action", "data")]
        if tag == "script":
            self.inside = True
            self.scripts.append("")

    def handle_endtag(self, tag: str) -> None:
        self.inside = self.inside and tag != "script"

    def handle_data(self, data: str) -> None:
        if self.inside:
            self.scripts[-1] += data


@for_each("text", [*NASTY, BYTES])
def test_embedded_json_holds_nothing_that_html_could_read(text: str) -> None:
    written = embedded_json({"text": text})
    assert written.isascii() and not set("<>&\n\r") & set(written)
    assert json.loads(written)["text"] == text


def test_embedded_json_refuses_numbers_that_json_lacks() -> None:
    with pytest.raises(ValueError, match="JSON"):
        embedded_json([float("nan")])


def test_the_page_holds_every_number_of_the_tables(dallas: Circuit) -> None:
    data = json.loads(Scripts(page(dallas)).scripts[0])
    assert data == json.loads(embedded_json(page_data(dallas)))
    for name, kind in NODE_COLUMNS.items():
        column, expected = data["nodes"][name], dallas.nodes[name]
        if kind == "float64":
            column = np.array([np.nan if value is None else value for value in column])
            np.testing.assert_allclose(column, expected, rtol=1e-4)
        else:
            assert column == expected.tolist()
    names = data["nodes"]["node"]
    for end in ("source", "target"):
        assert [names[index] for index in data["edges"][end]] == dallas.edges[end].tolist()
    for name in ("weight", "relative", "attribution"):
        np.testing.assert_allclose(data["edges"][name], dallas.edges[name], rtol=1e-4)


def test_nasty_texts_come_back_and_open_no_element() -> None:
    circuit = nasty_circuit()
    text = page(circuit)
    parsed = Scripts(text)
    assert len(parsed.scripts) == 2
    assert json.loads(parsed.scripts[0])["nodes"]["token"][: 2 * len(NASTY) : 2] == list(NASTY)
    assert "<title>Circuit for “&lt;/script" in text.replace("&#8220;", "“")
    assert BYTES not in text and text.encode("utf-8")


def test_the_page_asks_for_nothing_from_outside(dallas: Circuit) -> None:
    text = page(dallas)
    assert set(Scripts(text).addresses) == {"data:,", "#panel"}
    assert "default-src 'none'" in text
    names = r"https?://(?!www\.w3\.org/(?:2000/(?:svg|xmlns/)|1999/(?:xhtml|xlink)|XML/1998/namespace))"
    assert re.findall(names, text) == []  # but for the names of XML's namespaces, which nothing fetches
    assert "@import" not in text and re.findall(r"\[\[(?!data)\w\w+\]\]", text) == []


def test_a_page_of_300_nodes_and_3000_edges_is_small(tmp_path: Path) -> None:
    large_circuit().to_html(tmp_path / "page.html")
    assert (tmp_path / "page.html").stat().st_size < 400_000


def test_details_come_by_node_by_neuron_by_label_and_by_group(dallas: Circuit) -> None:
    chosen = dallas.nodes[dallas.nodes["kind"] == "neuron"]["node"].tolist()
    circuit = dallas.label({chosen[0]: "capital city"}).group({"places": chosen[1:3]})
    neuron = chosen[3].rpartition("@")[0]
    everywhere = [name for name in chosen if name.rpartition("@")[0] == neuron]
    details = {chosen[1]: {"note": "a"}, "capital city": {"note": "b"}, "places": {"note": "c"}, neuron: {"note": "d"}}
    data = page_data(circuit, details)
    found = {name: data["details"][form] for name, form in data["detail_of"].items()}
    assert len(data["details"]) == 4  # once in the file, however many nodes have them
    expected = {chosen[1]: "a", chosen[0]: "b", "places": "c"} | dict.fromkeys(everywhere, "d")
    assert {name: dict(one["texts"])["note"] for name, one in found.items()} == expected


def test_strongest_examples_can_be_given_as_they_are(dallas: Circuit) -> None:
    given = Example(prompt=0, tokens=("Dal", "las"), activations=(0.0, 2.0), position=1)
    found = page_data(dallas, {"logit/539": {"examples": [given]}})["details"][0]["examples"]
    assert found == [{"tokens": ["Dal", "las"], "values": [0.0, 2.0], "note": "", "first": True, "peak": 2.0}]
    at_first = Example(prompt=0, tokens=("Dal", "las"), activations=(90.0, 2.0), position=0)  # no scale for the others
    (found,) = page_data(dallas, {"logit/539": {"examples": [at_first]}})["details"][0]["examples"]
    assert found["first"] is True and "peak" not in found


def test_pieces_of_words_are_known_from_the_vocabulary() -> None:
    order = "the enthus great Great strugg enthusi Thailand struggle enthusiasm greater Thai Paris Parish horse horses"
    numbers = {f"Ġ{word}": 100 + place for place, word in enumerate(order.split())} | {
        "Paris": 5,
        "Ġenthusiastically": 400,
    }
    model = SimpleNamespace(tokenizer=SimpleNamespace(get_vocab=lambda: numbers))
    asked = [f" {word}" for word in order.split()] + ["strugg", " x1", " "]
    assert word_ends(model, asked) == {" strugg": "le", " enthus": "iasm", " enthusi": "asm"}
    assert word_ends(None, asked) == word_ends(load_demo_model(), asked) == {}


def test_without_details_there_are_logit_effects_while_the_model_lives(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = load_demo_model()
    dallas = trace(model, PROMPT, " Austin", nodes=5)
    data = page_data(dallas)
    neuron = dallas.nodes.query("kind == 'neuron'")["node"].iloc[0]
    effects = dict(data["details"][data["detail_of"][neuron]]["direct_logit_effects"])
    table = direct_logit_effects(model, [neuron.partition("@")[0]], k=8).to_dataframe()
    assert effects == pytest.approx(dict(zip(table["token"], table["effect"], strict=True)), rel=1e-4)
    dallas.save(tmp_path / "dallas")
    assert page_data(Circuit.load(tmp_path / "dallas"))["details"] == []
    monkeypatch.setattr("tl_neuron_circuits.plots._page._MOST_EFFECTS", 2)  # of the strongest neurons, in any layer
    strongest = dallas.nodes.query("kind == 'neuron'").sort_values("score", key=abs)["node"].tail(2)
    assert set(page_data(dallas)["detail_of"]) == set(strongest)
    monkeypatch.undo()
    given = {neuron: {"direct_logit_effects": [("given", 1.0)]}}
    data = page_data(dallas, given)
    assert data["details"][data["detail_of"][neuron]]["direct_logit_effects"] == [["given", 1.0]]
    assert len(data["detail_of"]) == 5


def test_weak_edges_stay_out_of_the_file_and_their_sums_are_in_it(dallas: Circuit) -> None:
    table = dallas.nodes.query("kind == 'neuron'")
    grouped = dallas.group({"a": table["node"].iloc[:20].tolist(), "b": table["node"].iloc[20:40].tolist()})
    data = page_data(grouped, {}, edge_share=0.02)
    names, cut = data["nodes"]["node"], data["cut"]
    ends = [[names[index] for index in data["edges"][end]] for end in ("source", "target")]
    kept = pd.MultiIndex.from_arrays(ends)
    lost = dallas.edges[~pd.MultiIndex.from_frame(dallas.edges[["source", "target"]]).isin(kept)]
    assert 0 < len(kept) < len(dallas.edges) and cut["count"] == len(lost) and cut["share"] == 0.02
    assert (lost["attribution"].abs() < 0.02 * dallas.target_value).all()
    assert set(ends[0]) == set(dallas.edges["source"]) and set(ends[1]) == set(dallas.edges["target"])
    assert cut["sum"] == pytest.approx(lost["attribution"].sum(), rel=1e-4)
    one = table["node"].iloc[45]
    into = lost[lost["target"] == one]["attribution"]
    assert cut["incoming"][names.index(one)] == (len(into), pytest.approx(into.sum(), rel=1e-4))
    group_of = grouped.nodes.set_index("node")["group"]
    for source, target, weight, attribution in cut["groups"]:
        rows = lost
        for end, place in (("source", source), ("target", target)):
            own = group_of[rows[end]].to_numpy() == "ab"[-1 - place] if place < 0 else rows[end] == names[place]
            rows = rows[own]
        assert (weight, attribution) == pytest.approx(tuple(rows[["weight", "attribution"]].sum()), rel=1e-3, abs=1e-6)
    inside = {(source, target) for source, target, *_ in cut["groups"] if source < 0 and target < 0}
    assert inside <= {(-1, -1), (-1, -2), (-2, -1), (-2, -2)} and inside


def test_a_file_has_about_ten_thousand_edges_at_most(tmp_path: Path) -> None:
    circuit = large_circuit(300, 12_000, layers=30, positions=60)
    cut = page_data(circuit)["cut"]
    assert cut["count"] > 0 and 9_000 < len(circuit.edges) - cut["count"] < 10_100
    circuit.to_html(tmp_path / "page.html")
    assert (tmp_path / "page.html").stat().st_size < 1_500_000
    with pytest.raises(SettingsError, match="edge_share"):
        circuit.to_html(tmp_path / "page.html", edge_share=-0.1)


def test_the_target_has_a_unit(dallas: Circuit) -> None:
    def fact(**nodes: str) -> tuple[str, str]:
        names = dallas.nodes.replace({"node": nodes})
        made = replace(dallas, nodes=names, edges=dallas.edges.replace({"target": nodes}), traced=None)
        return next((text, meaning) for name, text, meaning, _ in page_data(made)["facts"] if name == "target")

    value = f"{dallas.target_value:.4g}"
    text, meaning = fact()
    assert text == f"Austin: logit {value}" and "minus the mean" in meaning
    assert fact(**{"logit/539": "logit/539-12@9"})[0] == f"Austin: logit difference {value}"
    assert fact(**{"logit/539": "direction"})[0] == f"Austin: value {value}"


def test_numbers_over_several_prompts_say_so_and_symbols_stand_in_quotes(dallas: Circuit) -> None:
    said = {"predicted": [(" -", 0.5), (" Paris", 0.25), ("\n", 0.1)], "target": [" -"]}

    def facts(n_prompts: int) -> dict[str, tuple[str, str]]:
        made = replace(dallas, settings={**dallas.settings, **said, "n_prompts": n_prompts}, traced=None)
        return {name: (text, meaning) for name, text, meaning, _ in page_data(made)["facts"]}

    one, several = facts(1), facts(20)
    assert one["target"][0].startswith("“-”: ")
    assert one["the model says"] == ("“-” 50.0%, Paris 25.0%, '\\n' 10.0%", "The model's likeliest next tokens")
    assert several["the model says"][0] == "on average " + one["the model says"][0]
    assert "mean probability over 20 prompts" in several["the model says"][1]


def test_the_target_is_split_into_explained_left_out_and_not_linear(dallas: Circuit) -> None:
    pairs = trace(load_demo_model(), demo.capitals(n=4), nodes=20)
    flow = pairs.nodes.groupby("kind")["flow"].sum() / pairs.target_value
    ends = page_data(pairs)["ends"]
    shares = dict(ends["shares"])
    assert shares["not-linear"] == pytest.approx(flow["linearization_error"]) and shares["not-linear"] != 0
    assert shares["left"] == pytest.approx(flow["unselected"]) and sum(shares.values()) == pytest.approx(1)
    assert shares["explained"] == pytest.approx(flow.reindex(["embedding", "bias"]).sum(), abs=1e-4)
    assert f"{100 * shares['not-linear']:.1f}% is not linear" in ends["text"] and not ends["cancels"]
    ends = page_data(dallas)["ends"]  # of one prompt nothing but what was left out is missing
    assert [name for name, _ in ends["shares"]] == ["explained", "left"]
    assert ends["text"].endswith(f"the other {100 * dallas.unexplained:.1f}%.")
    # Parts that cancel are no shares.
    nodes = dallas.nodes.copy()
    nodes.loc[nodes["kind"] == "unselected", "flow"] *= 20
    made = page_data(replace(dallas, nodes=nodes, traced=None))
    assert made["ends"]["cancels"] and "times the target" in made["ends"]["text"] and "%" not in made["ends"]["text"]
    assert next(text for name, text, *_ in made["facts"] if name == "explained").endswith("(parts cancel)")


@for_each(
    ("details", "message"),
    [
        ({"L9/N9": {}}, "got 'L9/N9'"),
        ({"logit/539": {"direct_logit_effects": ["Austin"]}}, "pairs of a token and a number"),
        ({"logit/539": {"direct_logit_effects": [("Austin", "x")]}}, "expected numbers"),
        ({"logit/539": {"direct_logit_effects": [("Austin", float("nan"))]}}, "finite"),
        ({"logit/539": {"examples": [{"tokens": ["a"]}]}}, "with tokens and values"),
        ({"logit/539": {"examples": [{"tokens": ["a"], "values": [1.0, 2.0]}]}}, "1 tokens and 2 values"),
    ],
)
def test_details_of_another_form_are_refused(dallas: Circuit, tmp_path: Path, details: dict, message: str) -> None:
    with pytest.raises(SettingsError, match=message):
        dallas.to_html(tmp_path / "page.html", details=details)
    assert not (tmp_path / "page.html").exists()
