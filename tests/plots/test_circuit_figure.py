"""The plotly figure of a circuit: every node once, the strongest edges, texts escaped."""

import numpy as np

from tests.plots.made_up import large_circuit, nasty_circuit
from tl_neuron_circuits import Circuit


def markers(circuit: Circuit) -> tuple[list[tuple[float, float]], list[str]]:
    traces = [trace for trace in circuit.plot().data if trace.mode == "markers"]
    places = [place for trace in traces for place in zip(trace.x, trace.y, strict=True)]
    return places, [text for trace in traces for text in trace.hovertext]


def test_every_node_has_one_place_of_its_own(dallas: Circuit) -> None:
    for circuit in (dallas, large_circuit(), dallas.sum_positions()):
        places, texts = markers(circuit)
        assert len(places) == len(circuit.nodes) == len(texts)
        assert len({(round(x, 6), round(y, 6)) for x, y in places}) == len(places)


def test_nodes_do_not_overlap_however_many_there_are(dallas: Circuit) -> None:
    """One unit of both axes is the largest node, and the figure has that many pixels."""
    for circuit in (dallas, large_circuit()):
        places, _ = markers(circuit)
        by_row = np.array(places)[np.lexsort(np.array(places).T)]
        same = np.diff(by_row[:, 1]) < 1e-6
        assert (np.diff(by_row[:, 0])[same] > 1 - 1e-6).all()
        assert (np.diff(by_row[:, 1])[~same] > 0.5 - 1e-6).all()
        figure = circuit.plot()
        low, high = figure.layout.yaxis.range
        assert (figure.layout.height - 180) / (high - low) >= 18 - 1e-6
        left, right = figure.layout.xaxis.range
        assert (figure.layout.width or 1000) - 180 >= 18 * (right - left - 1) or figure.layout.width is None


def test_hovering_tells_the_numbers_of_the_tables(dallas: Circuit) -> None:
    _, texts = markers(dallas)
    row = dallas.to_dataframe().query("kind == 'neuron'").iloc[0]
    (text,) = [text for text in texts if text.startswith(f"<b>{row['label']}</b>")]
    assert f"score {row['score']:.4g}" in text and f"activation {row['activation']:.4g}" in text
    assert f"token “{row['token']}” at {row['position']}" in text


def test_layers_go_up_and_positions_to_the_right(dallas: Circuit) -> None:
    figure = dallas.plot()
    assert list(figure.layout.yaxis.ticktext) == ["embeddings", "left out", "0", "1", "2", "3", "logits"]
    assert list(np.diff(figure.layout.xaxis.tickvals) > 0) == [True] * (len(figure.layout.xaxis.tickvals) - 1)
    assert figure.layout.xaxis.ticktext[1:3] == ("&lt;bos&gt;<br>0", "The<br>1")


def test_only_the_strongest_edges_are_drawn(dallas: Circuit) -> None:
    lines = [trace for trace in dallas.plot(max_edges=50).data if trace.mode == "lines"]
    assert sum(value is None for trace in lines for value in trace.x) == 50


def test_nasty_texts_are_escaped() -> None:
    figure = nasty_circuit().plot()
    for text in (figure.layout.title.text, *figure.layout.xaxis.ticktext, *markers(nasty_circuit())[1]):
        assert "<script" not in text and "<img" not in text
        text.encode("utf-8")
    figure.to_json()
