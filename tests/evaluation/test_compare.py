"""`compare`: curves under one measure, resumed from their directory, and headlines worked out by hand."""

import json
import warnings
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
import torch

from tests.bases.site_dictionaries import dictionaries, pairs
from tests.evaluation.curves import comparison, curve
from tests.families import ModelCase, all_models
from tl_neuron_circuits import Comparison, Patching, RelP, attribute, compare, evaluate
from tl_neuron_circuits._errors import FileFormatError, SettingsError
from tl_neuron_circuits.bases import Dictionaries, MLPOutputs, Neurons
from tl_neuron_circuits.evaluation import _compare as module
from tl_neuron_circuits.evaluation._comparison import CurveKey

quiet = pytest.mark.filterwarnings("ignore:dictionaries leave more than 0.9")
CASE: ModelCase = all_models("gpt2")[0].values[0]
METHODS = ("relp", "random")


@pytest.fixture(scope="module")
def model() -> Any:
    return CASE.build()


def run(model: Any, directory: Path | None = None, **changes: Any) -> Comparison:
    settings: dict[str, Any] = {"bases": [Neurons(), dictionaries("transcoder")], "methods": METHODS, "mib": True}
    settings |= {"sizes": [1, 20, 200], "bootstrap": 50, "directory": directory}
    tasks = {"one": 0, "two": 1}
    train, test = ({t: pairs(model, seed=10 * part + s) for t, s in tasks.items()} for part in (0, 1))
    return compare(model, train, test, **(settings | changes))


@pytest.fixture(scope="module")
def whole(model: Any) -> Comparison:
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "dictionaries leave more than 0.9")
        return run(model)


@quiet
def test_nothing_is_printed(model: Any, capfd: Any) -> None:
    run(model, sizes=[5], mib=False)
    assert capfd.readouterr() == ("", "")


@quiet
def test_every_curve_is_that_of_attribute_and_evaluate(model: Any, whole: Comparison) -> None:
    found = whole
    assert len(found.curves) == 2 * 2 * 2 and found.tasks == ["one", "two"]
    key = CurveKey("two", "transcoder", "relp")
    scores = attribute(model, pairs(model, seed=1), basis=dictionaries("transcoder"))
    expected = evaluate(model, pairs(model, seed=11), scores, sizes=[1, 20])  # of 130 nodes
    assert torch.equal(found.curves[key].kept, expected.kept) and found.curves[key].sizes == (1, 20)
    cpr, cmd = found.mib[key]
    grid = sorted({max(1, round(f * len(scores))) for f in (0.001, 0.002, 0.005, 0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1)})
    signed, absolute = (
        evaluate(model, pairs(model, seed=11), scores, sizes=grid, ranking=ranking) for ranking in ("signed", "abs")
    )
    assert (cpr, cmd) == pytest.approx((signed.cpr, absolute.cmd))
    fractions = scores.settings["variance_unexplained"].values()
    assert found.unexplained[key] == pytest.approx(np.mean(list(fractions)))
    assert found.unexplained[CurveKey("two", "neurons", "relp")] == 0
    summary = found.summary().set_index(["task", "basis", "method"])
    assert summary.loc[tuple(key), "n_nodes"] == 130 and summary.loc[tuple(key), "cpr"] == pytest.approx(cpr)


def test_a_table_has_bands_around_its_values(whole: Comparison) -> None:
    table = whole.to_dataframe()
    assert {"faithfulness_low", "faithfulness_high", "completeness_low", "completeness_high"} <= set(table)
    assert len(table) == 2 * 2 * (3 + 2)  # sizes of 240 and 130 nodes
    assert (table["faithfulness_low"] <= table["faithfulness_high"] + 1e-12).all()


class Stopped(Exception):
    """Stands for a killed process."""


def test_rule_sets_and_both_rankings_are_curves_of_their_own(model: Any, monkeypatch: Any) -> None:
    calls: list[str] = []
    monkeypatch.setattr(module, "attribute", lambda *a, **k: (calls.append(k["method"].label), attribute(*a, **k))[1])
    methods = ["relp", RelP(rules="attnlrp"), "relp(rules=gim)", "mask_gradient(steps=2)"]
    found = run(model, bases=[Neurons()], methods=methods, rankings=["abs", "signed"], sizes=[20], mib=False)
    names = ["relp", "relp(rules=attnlrp)", "relp(rules=gim)"]
    both = [name + how for name in names for how in ("", ", by sign")]
    assert [key.method for key in found.curves if key.task == "one"] == [*both, "mask_gradient(steps=2)"]
    assert len(calls) == 2 * 4  # both rankings are of the same scores
    plain, signed = (found.curves[CurveKey("one", "neurons", names[1] + how)] for how in ("", ", by sign"))
    scores = attribute(model, pairs(model, seed=0), method=RelP(rules="attnlrp"))
    expected = evaluate(model, pairs(model, seed=10), scores, sizes=[20], ranking="signed")
    assert torch.equal(signed.kept, expected.kept) and not torch.equal(signed.kept, plain.kept)
    assert found.plot("one").data and found.summary()["method"].nunique() == 7


@quiet
@pytest.mark.parametrize("where", ["evaluate", "save"])
def test_a_stopped_comparison_goes_on_where_it_was(
    model: Any, whole: Comparison, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, where: str
) -> None:
    real_evaluate, real_save, calls = module.sparsity_curve, Comparison.save, []

    def counted(*args: Any, **keywords: Any) -> Any:
        if keywords.get("completeness") is False:  # for MIB's grid
            return real_evaluate(*args, **keywords)
        calls.append(1)
        if where == "evaluate" and len(calls) == 6:
            raise Stopped
        return real_evaluate(*args, **keywords)

    def save(self: Comparison, path: Any) -> None:
        if where == "save" and len(calls) == 6:
            raise Stopped
        real_save(self, path)

    monkeypatch.setattr(module, "sparsity_curve", counted)
    monkeypatch.setattr(Comparison, "save", save)
    with pytest.raises(Stopped):
        run(model, tmp_path / "here")
    assert len(Comparison.load(tmp_path / "here").curves) == 5
    resumed = run(model, tmp_path / "here")
    assert len(calls) == 6 + (8 - 5)
    again = run(model, tmp_path / "here")
    assert len(calls) == 9 and list(again.curves) == list(resumed.curves) == list(whole.curves)
    for key, found in resumed.curves.items():
        assert torch.equal(found.kept, whole.curves[key].kept) and torch.equal(found.removed, whole.curves[key].removed)
    pd.testing.assert_frame_equal(resumed.summary(), whole.summary())


@quiet
def test_what_to_know_before_quoting_a_ratio_is_said_once_for_all_methods(model: Any, caplog: Any) -> None:
    """Random answers on random weights: the model does no better than without its nodes."""
    found = run(model, sizes=[5], mib=False)
    said = [record.message for record in caplog.records if "F(M) - F(0)" in record.message]
    assert said == found.notes and 1 <= len(said) <= 4
    curve = evaluate(model, pairs(model, seed=11), attribute(model, pairs(model, seed=1)), sizes=[5])
    alone = [record.message for record in caplog.records if "F(M) - F(0)" in record.message][len(said) :]
    assert alone == curve.notes and len(alone) == 1


@quiet
def test_a_directory_of_something_else_is_refused_before_any_work(model: Any, tmp_path: Path) -> None:
    done = tmp_path / "done"
    small: dict[str, Any] = {"methods": ["relp"], "sizes": [5], "mib": False}
    run(model, done, **small)
    other = CASE.build(seed=1)
    rounded = [Neurons(), dictionaries("transcoder", dtype=torch.bfloat16)]
    for changed, changes in (
        ("ablation", {"ablation": "zero"}),
        ("sizes", {"sizes": [6]}),
        ("methods", {"methods": ["gradient"]}),
        ("sites", {"bases": rounded}),
        ("sites", {"bases": [Neurons([1]), dictionaries("transcoder", [1])]}),
    ):
        with pytest.raises(FileFormatError, match=f"other .*'{changed}'"):
            run(model, done, **(small | changes))
    with pytest.raises(FileFormatError, match=r"other \['weights'\]"):
        run(other, done, **small)
    foreign = tmp_path / "foreign"
    foreign.mkdir()
    (foreign / "thesis.tex").write_text("do not touch")
    with pytest.raises(FileFormatError, match=r"holds \['thesis\.tex'\]"):
        run(model, foreign, **small)
    with pytest.raises(FileFormatError, match="there is a file"):
        run(model, foreign / "thesis.tex", **small)
    assert [entry.name for entry in foreign.iterdir()] == ["thesis.tex"]
    file = done / "comparison.safetensors"
    file.write_bytes(file.read_bytes()[:100])
    with pytest.raises(FileFormatError, match="truncated"):
        run(model, done, **small)


def test_saving_and_loading_changes_nothing(whole: Comparison, tmp_path: Path) -> None:
    first = whole
    first.save(tmp_path / "saved")
    again = Comparison.load(tmp_path / "saved")
    pd.testing.assert_frame_equal(again.to_dataframe(), first.to_dataframe())
    pd.testing.assert_frame_equal(again.summary(), first.summary())
    assert again.headline() == first.headline() and repr(again) == repr(first)
    assert again.settings == json.loads(json.dumps(first.settings))
    with pytest.raises(FileFormatError, match="expected saved comparison"):
        Comparison.load(tmp_path)


def test_ratio_and_headline_are_those_of_sizes_by_hand() -> None:
    made = comparison(
        {
            ("t", "neurons", "relp"): curve([1, 10, 100], [0.2, 0.8, 1.0]),  # reaches .8 at 10
            ("t", "sae", "relp"): curve([1, 10, 100], [0.2, 0.6, 1.0]),  # at 10 ** 1.5
            ("t", "mlp_outputs", "relp"): curve([1, 10, 100], [0.2, 0.6, 0.7]),  # never
        }
    )
    value, low, high = made.ratio("neurons", "sae", method="relp")
    assert (value, low, high) == pytest.approx((10**-0.5,) * 3, rel=1e-4)
    assert made.ratio("neurons", "sae") == (value, low, high)
    assert made.ratio("sae", "neurons", method="relp")[0] == pytest.approx(10**0.5, rel=1e-4)
    assert made.ratio("mlp_outputs", "sae", method="relp")[0] == np.inf
    assert made.ratio("neurons", "mlp_outputs", method="relp")[0] == 0
    sentences = made.headline()
    assert "at faithfulness 0.8 neurons need 0.316 x [0.316, 0.316] the nodes of sae" in sentences
    assert "the faithfulness of mlp_outputs does not stay above 0.8 at the sizes tried" in sentences
    assert "unexplained" not in sentences
    alone = replace(made, curves={key: curve for key, curve in made.curves.items() if key.basis == "sae"})
    size = made.curves[CurveKey("t", "sae", "relp")].size_at(0.8)
    assert alone.headline().startswith(f"sae reach faithfulness 0.8 with {size:,.3g} nodes")
    poor = replace(made, unexplained={key: 0.77 * (key.basis == "sae") for key in made.curves})
    assert "with sae, 77% of the variance stays unexplained: error nodes" in poor.headline()
    with pytest.raises(SettingsError, match="expected one of the curves"):
        made.ratio("neurons", "nothing", method="relp")


def test_two_bases_are_compared_draw_by_draw() -> None:
    """Prompts that are hard for both widen both bands, and not the ratio's."""
    hard = torch.linspace(-0.3, 0.3, 20)
    values = torch.tensor([[0.2], [0.7], [1.0]]) + hard
    made = comparison(
        {
            ("t", "neurons", "relp"): curve([1, 10, 100], values),
            ("t", "sae", "relp"): curve([5, 50, 500], values, n_nodes=500),
        }
    )
    value, low, high = made.ratio("neurons", "sae", method="relp")
    assert (value, low, high) == pytest.approx((0.2,) * 3, rel=1e-3)
    table = made.to_dataframe()
    assert (table["faithfulness_high"] - table["faithfulness_low"] > 0.05).all()


@quiet
def test_settings_that_do_not_fit_are_refused(model: Any, caplog: Any) -> None:
    tokens = pairs(model)
    for changes, message in (
        ({"bases": [Neurons(), Neurons()]}, "different names"),
        ({"bases": []}, "at least one basis"),
        ({"methods": []}, "at least one method"),
        ({"bases": [Neurons(), MLPOutputs([0])]}, "the same layers"),
        ({"bases": [Neurons(), Dictionaries(dictionaries("transcoder").dictionaries[:1])]}, "the same layers"),
        ({"bootstrap": 0}, "bootstrap draw"),
    ):
        with pytest.raises(SettingsError, match=message):
            run(model, **changes)
    with pytest.raises(SettingsError, match="the same tasks"):
        compare(model, {"a": tokens}, {"b": tokens})
    compare(model, tokens, tokens, methods=["random"], bases=[Neurons()], sizes=[3], bootstrap=2)
    assert "in-sample" in caplog.text


def test_two_methods_of_one_label_are_refused(model: Any) -> None:
    tokens = pairs(model)
    some, others = (Patching(attribute(model, tokens, method=method).top(3)) for method in ("relp", "random"))
    common: dict[str, Any] = {"bases": [Neurons()], "sizes": [3], "bootstrap": 2}
    with pytest.raises(SettingsError, match="both 'patching'"):
        compare(model, tokens, tokens, methods=[some, others], **common)
    assert len(compare(model, tokens, tokens, methods=["gradient", "gradient"], **common).curves) == 1
