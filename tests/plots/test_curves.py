"""Figures of curves: what is drawn, with which color and dash, and what the subtitle owns up to."""

from typing import Any

import numpy as np
import plotly.graph_objects as go
import plotly.io
import pytest

from tests.evaluation.curves import comparison, curve
from tl_neuron_circuits import Comparison
from tl_neuron_circuits._errors import SettingsError
from tl_neuron_circuits.plots import plot_curves

GROUPS = ("dog", "dog", "cat", "cat")


@pytest.fixture
def made() -> Comparison:
    curves = {}
    for task, shift in (("one", 0.0), ("two", 0.2)):
        for basis, n_nodes in (("neurons", 100), ("sae", 1000)):
            for method in ("relp", "random"):
                sizes, f = [1, 10, n_nodes], [0.1 + shift, 0.5 + shift, 1.0]
                settings: dict[str, Any] = {"basis": basis, "method": method, "baseline": "corrupt"}
                curves[task, basis, method] = curve(sizes, f, n_nodes, groups=GROUPS, **settings)
    return comparison(curves)


def lines(figure: go.Figure, name: str) -> list[Any]:
    return [trace for trace in figure.data if trace.name == name and trace.x[0] is not None]


def test_one_task_is_drawn_as_it_was_measured_with_bands(made: Comparison) -> None:
    figure = made.plot("one")
    faithfulness, completeness = lines(figure, "neurons, RelP")
    assert tuple(faithfulness.x) == (1, 10, 100)
    np.testing.assert_allclose(np.array(faithfulness.y), [0.1, 0.5, 1.0], atol=1e-6)
    np.testing.assert_allclose(np.array(completeness.y), [0.9, 0.5, 0.0], atol=1e-6)
    assert (faithfulness.xaxis, completeness.xaxis) == ("x", "x2") and figure.layout.xaxis.type == "log"
    assert len([trace for trace in figure.data if trace.fill == "toself"]) == 2 * 2 * 2
    title = figure.layout.title.text
    assert all(word in title for word in ("made", "one", "4 held-out pairs", "mean ablation", "95%"))


def test_several_tasks_are_averaged_and_stay_where_they_end(made: Comparison) -> None:
    figure = made.plot()
    (faithfulness, _) = lines(figure, "neurons, RelP")
    np.testing.assert_allclose(np.array(faithfulness.y), [0.2, 0.6, 1.0], atol=1e-6)
    assert "averaged over 2 tasks" in figure.layout.title.text and "95%" not in figure.layout.title.text
    curves = {key: value for key, value in made.curves.items() if key.task == "one"}
    longer = curve([1, 1000], [0.0, 1.0], 1000, groups=GROUPS)
    both = comparison({**curves, ("two", "neurons", "relp"): longer, ("two", "neurons", "random"): longer})
    (faithfulness, _) = lines(both.plot(), "neurons, RelP")
    assert tuple(faithfulness.x) == (1, 10, 100, 1000)
    np.testing.assert_allclose(np.array(faithfulness.y), [0.05, (0.5 + 1 / 3) / 2, (1 + 2 / 3) / 2, 1.0], atol=1e-6)


def test_one_color_a_basis_and_one_dash_a_method_with_a_legend_of_each(made: Comparison) -> None:
    figure = made.plot("one")
    color = {name: lines(figure, name)[0].line.color for name in ("neurons, RelP", "neurons, random", "sae, RelP")}
    dash = {name: lines(figure, name)[0].line.dash for name in color}
    assert color["neurons, RelP"] == color["neurons, random"] != color["sae, RelP"]
    assert dash["neurons, RelP"] == dash["sae, RelP"] != dash["neurons, random"]
    named = [trace.name for trace in figure.data if trace.showlegend is not False]
    assert named == ["neurons", "sae", "RelP", "random"]


def test_trust_compares_summed_scores_with_the_measured_drop(made: Comparison) -> None:
    figure = made.plot_trust("two")
    (trace,) = lines(figure, "neurons, RelP")
    np.testing.assert_allclose(trace.x, [0.6, 1.4, 2.0], atol=1e-6)
    np.testing.assert_allclose(trace.y, [0.6, 1.4, 2.0], atol=1e-6)
    assert not lines(figure, "neurons, random") and lines(figure, "as promised")
    assert "corrupt" in figure.layout.xaxis.title.text and "mean" in figure.layout.yaxis.title.text


def test_a_single_curve_and_size_0_on_a_log_axis() -> None:
    figure = plot_curves([curve([0, 1, 10], [0.0, 0.2, 0.9])])
    (faithfulness, _) = lines(figure, "neurons, RelP")
    assert tuple(faithfulness.x) == (1, 10)


def test_what_leaves_the_panel_is_marked_with_how_far_it_goes() -> None:
    figure = plot_curves([curve([1, 10, 30, 100], [-0.6, 2.3, 1.9, 1.0])])
    up, down, *rest = [trace for trace in figure.data if trace.mode == "markers+text"]
    assert up.marker.symbol == "triangle-up" and tuple(up.x) == (10, 30) and tuple(up.text) == ("2.3", "")
    assert down.marker.symbol == "triangle-down" and tuple(down.text) == ("-0.6",)
    low, high = figure.layout.yaxis.range
    assert all(low < y < high for trace in (up, down) for y in trace.y)
    assert {trace.xaxis for trace in rest} == {"x2"}
    assert not [t for t in plot_curves([curve([1, 10], [0.2, 0.9])]).data if t.mode == "markers+text"]


def test_what_is_not_there_is_refused(made: Comparison) -> None:
    for plot in (made.plot, made.plot_trust):
        with pytest.raises(SettingsError, match=r"one of the tasks \['one', 'two'\]; got 'three'"):
            plot("three")
    controls = comparison({key: value for key, value in made.curves.items() if key.method == "random"})
    with pytest.raises(SettingsError, match="only controls were compared"):
        controls.plot_trust()


def test_the_global_template_is_not_touched_and_nothing_is_shown(made: Comparison, capfd: Any) -> None:
    before = plotly.io.templates.default
    made.plot()
    assert plotly.io.templates.default == before and capfd.readouterr() == ("", "")
