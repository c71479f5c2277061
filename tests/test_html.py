"""How results look in a notebook: escaped text, bars to scale, links only where a page is known to exist."""

import dataclasses
import inspect

import pandas as pd

import tl_neuron_circuits as tnc
from tests.loops import for_each
from tests.test_examples import PUBLIC
from tl_neuron_circuits import _html
from tl_neuron_circuits.plots._style import PALETTE


def test_every_result_with_a_table_shows_it_in_a_notebook() -> None:
    results = {
        name: value for name, value in PUBLIC.items() if inspect.isclass(value) and hasattr(value, "to_dataframe")
    }
    assert len(results) > 20
    assert [name for name, value in results.items() if not hasattr(value, "_repr_html_")] == []


def test_texts_are_escaped_wherever_they_stand() -> None:
    evil = "<script>alert(1)</script>"
    frame = pd.DataFrame({evil: [evil, ["a", evil]], "n": [1.0, float("nan")]})
    links = {evil: [f'https://x/"{evil}', None]}
    page = _html.document(evil, _html.block(evil, _html.note(evil), _html.table(frame, bars=("n",), links=links)))
    assert "<script" not in page and page.count("&lt;script&gt;") == 7 and 'x/"<' not in page


def test_bars_are_to_scale_and_go_left_for_what_is_negative() -> None:
    shown = _html.table(pd.DataFrame({"score": [3.0, -1.0, 0.0, float("nan"), float("inf")]}), bars=("score",))
    widths = [part.split(";")[0] for part in shown.split("px; width: ")[1:]]
    assert widths == ["75px", "25px", "0px"]
    assert shown.count(f"margin-left: 25px; width: 75px; background: {_html.POSITIVE}") == 1
    assert shown.count(f"margin-left: 0px; width: 25px; background: {_html.NEGATIVE}") == 1
    assert (_html.POSITIVE, _html.NEGATIVE) == PALETTE[:2]


def test_more_rows_than_are_shown_are_counted() -> None:
    shown = _html.table(pd.DataFrame({"a": range(25)}), rows=20)
    assert shown.count("<tr>") == 21 and "20 of 25 rows" in shown


@for_each(
    ("model", "layer", "unit", "page"),
    [
        ("gpt2", 6, 650, "https://www.neuronpedia.org/gpt2-small/6/650"),
        ("gpt2-small", 0, 0, "https://www.neuronpedia.org/gpt2-small/0/0"),
        ("gpt2", 12, 0, None),
        ("gpt2", 0, 3072, None),
        ("gpt2", 0, -1, None),
        ("demo-gelu", 0, 0, None),
    ],
)
def test_only_neurons_of_known_models_have_pages(model: str, layer: int, unit: int, page: str | None) -> None:
    assert _html.neuron_page(model, layer, unit) == page


def test_scores_link_their_neurons_and_nothing_else() -> None:
    model, pairs = tnc.load_demo_model(), tnc.tasks.subject_verb_agreement("simple", n=4)
    bases = [tnc.bases.Neurons([0]), tnc.bases.MLPOutputs([0])]
    scores = tnc.attribute(model, pairs, basis=bases)
    assert "href" not in scores._repr_html_()
    on_gpt2 = dataclasses.replace(scores, settings={**scores.settings, "model": "gpt2"})
    best = scores.top(20)
    assert set(best["hook"]) == {"blocks.0.mlp.hook_post", "blocks.0.hook_mlp_out"}
    assert (
        on_gpt2._repr_html_().count("neuronpedia.org/gpt2-small/0/") == (best["hook"] == "blocks.0.mlp.hook_post").sum()
    )
