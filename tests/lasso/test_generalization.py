"""Unlearning a spurious attribute: ablation, projection, probes and support are what their formulas say."""

import json
from dataclasses import replace
from pathlib import Path

import pandas as pd
import pytest
import torch

import tl_neuron_circuits as tnc
from tl_neuron_circuits._errors import FileFormatError, SettingsError, UnsupportedModelError
from tl_neuron_circuits.bases._site import basis_sites
from tl_neuron_circuits.lasso import LabeledTexts, generalize, pooled_features
from tl_neuron_circuits.lasso._generalization import Ablation, eraser, fit_probe, pooled_activations, probe_support
from tl_neuron_circuits.lasso._observations import tokenize_inputs

HOOK = "blocks.1.hook_mlp_out"


def texts(nouns: tuple[str, str], n: int = 24) -> LabeledTexts:
    """Label: which noun; attribute: one or several; the rest of the sentence changes."""
    ends = ("old", "here", "tall", "late", "happy")
    rows = [(k % 2, k // 2 % 2, f"The {nouns[k % 2]}", ends[k % 5]) for k in range(n)]
    sentences = [f"{start}{'s are' if several else ' is'} {end}." for _, several, start, end in rows]
    return LabeledTexts(sentences, [row[0] for row in rows], [row[1] for row in rows])


@pytest.fixture(scope="module")
def model():
    return tnc.load_demo_model()


@pytest.fixture(scope="module")
def basis():
    return tnc.bases.Dictionaries(tnc.load_demo_dictionaries("sae")[1:2])


@pytest.fixture(scope="module")
def plain(model, basis) -> Ablation:
    return Ablation(basis_sites(model, basis), {}, HOOK, 1, 8)


def test_ablating_a_feature_takes_its_own_vector_out(model, basis, plain: Ablation) -> None:
    tokens = tokenize_inputs(model, list(texts(("doctor", "farmer")).texts), None)
    before = pooled_activations(model, tokens, plain)
    features = pooled_features(model, tokens, basis, skip_positions=1)
    strongest = int(features.values.mean(0).argmax())
    after = pooled_activations(model, tokens, replace(plain, units={HOOK: [strongest]}))
    direction = basis.dictionaries[0].W_dec[strongest]
    assert torch.allclose(before - after, features.values[:, [strongest]] * direction, atol=1e-5)
    assert float((before - after).abs().max()) > 0.01
    rebuilt = pooled_activations(model, tokens, replace(plain, errors=False))
    sae = basis.dictionaries[0]
    assert torch.allclose(rebuilt, features.values @ sae.W_dec + sae.b_dec, atol=1e-5)


def test_support_is_activation_times_weight_where_the_probe_reads_the_site(model, basis, plain: Ablation) -> None:
    given = texts(("doctor", "farmer"))
    tokens, label = tokenize_inputs(model, list(given.texts), None), torch.tensor(given.label)
    probe = fit_probe(pooled_activations(model, tokens, plain), label)
    features = pooled_features(model, tokens, basis, skip_positions=1).values
    sign = 2.0 * label[:, None] - 1
    expected = (sign * features * (basis.dictionaries[0].W_dec @ probe.weights.float())).mean(0)
    for rules in ((), ("ln", "identity", "half", "attention")):
        assert torch.allclose(probe_support(model, tokens, plain, probe, label, rules).float(), expected, atol=1e-5)


def test_support_through_later_layers_is_the_models_gradient(model, basis, plain: Ablation) -> None:
    given = texts(("doctor", "farmer"), n=4)
    tokens, label = tokenize_inputs(model, list(given.texts), None), torch.tensor(given.label)
    later = replace(plain, hook="blocks.3.hook_mlp_out")
    probe = fit_probe(pooled_activations(model, tokens, later), label)
    support = probe_support(model, tokens, later, probe, label, ())
    unit = int(support.abs().argmax())
    direction, step = basis.dictionaries[0].W_dec[unit], 1e-2

    def moved(factor: float) -> torch.Tensor:  # the feature a little stronger at every position
        def change(value, hook):
            active = basis.dictionaries[0].encode(value)[..., [unit]]
            active[:, :1] = 0
            return value + factor * active * direction

        rows = []
        for prompt in tokens.clean:
            with model.hooks(fwd_hooks=[(HOOK, change)]):
                _, cache = model.run_with_cache(prompt[None])
            rows.append(cache[later.hook][0, 1:].mean(0))
        return probe.log_odds(torch.stack(rows).detach())

    slow = ((2.0 * label - 1) * (moved(step) - moved(-step)) / (2 * step)).mean()
    assert float(support[unit]) == pytest.approx(float(slow), rel=0.05)


def test_what_is_erased_no_probe_finds() -> None:
    generator = torch.Generator().manual_seed(0)
    attribute = torch.arange(400) % 2
    x = torch.randn(400, 6, generator=generator) @ torch.randn(6, 6, generator=generator)
    x = x + 3 * attribute[:, None] * torch.randn(6, generator=generator)
    assert (fit_probe(x, attribute).predictions(x) == attribute).float().mean() > 0.75
    gone = eraser(x, attribute)(x)
    difference = gone[attribute == 1].mean(0) - gone[attribute == 0].mean(0)
    assert float(difference.abs().max()) < 1e-5
    assert float(fit_probe(gone, attribute, ridge=1e-6).log_odds(gone).abs().max()) < 1e-3
    with pytest.raises(SettingsError, match="same value of the attribute"):
        eraser(x, 0 * attribute)


def test_a_probe_is_scikit_learns_logistic_regression() -> None:
    sklearn = pytest.importorskip("sklearn.linear_model")
    x = torch.randn(80, 5, generator=torch.Generator().manual_seed(0), dtype=torch.float64) * 3 + 1
    y = (x[:, 0] - x[:, 1] + 0.5 * x[:, 2] > 1).long()
    z = (x - x.mean(0)) / x.std(0, correction=0)
    model = sklearn.LogisticRegression(C=1 / (0.05 * 80), tol=1e-10, max_iter=10_000).fit(z.numpy(), y.numpy())
    probe = fit_probe(x, y, ridge=0.05)
    assert torch.allclose(probe.log_odds(x), torch.from_numpy(model.decision_function(z.numpy())), atol=1e-5)


def test_the_protocol_gives_a_row_a_method_and_leaves_the_model(model, basis, untouched) -> None:
    train, concept = texts(("doctor", "farmer"), 32), texts(("king", "dog"))
    with untouched(model):
        found = generalize(model, train, train, concept, basis, n_candidates=8)
    table = found.table.set_index("method")
    assert len(table) == 3 + 2 * 4 and table[["label_accuracy", "worst_group"]].stack().between(0, 1).all()
    assert table.loc["oracle", "label_accuracy"] >= table.loc["original", "label_accuracy"]
    assert table.loc["original", "spurious_accuracy"] > 0.9  # one or several is what this model sees first
    assert table.loc["random", "n_ablated"] == max(table.loc[["lasso", "lasso_rounds", "attribution"], "n_ablated"])
    chosen = found.candidates["lasso"]
    assert (chosen["chosen"] == ((chosen["contrast"] - 0.5).abs() >= 0.25)).all()
    again = generalize(model, train, train, concept, basis, n_candidates=8)
    pd.testing.assert_frame_equal(found.table.drop(columns="seconds"), again.table.drop(columns="seconds"))


def test_groups_are_drawn_as_they_are_called() -> None:
    given = texts(("doctor", "farmer"), 26)
    biased, balanced = given.biased(seed=1), given.balanced(8)
    assert biased.label == biased.spurious and biased.groups[0, 0] == biased.groups[1, 1] > 0
    assert set(balanced.groups.values()) == {2}
    with pytest.raises(SettingsError, match="texts each"):
        given.balanced(400)
    with pytest.raises(SettingsError, match="0 and 1"):
        LabeledTexts(["a"], [2], [0])
    basis = tnc.bases.Dictionaries(tnc.load_demo_dictionaries("sae")[1:2])
    with pytest.raises(SettingsError, match="between"):
        generalize(tnc.load_demo_model(), given, given, given, basis, judge=0.4)


def test_bias_in_bios_is_read_from_files_and_rows(tmp_path: Path) -> None:
    rows = [
        {"hard_text": f"text {k}", "profession": (21, 13, 0)[k % 3], "gender": k // 3 % 2, "other": 1} for k in range(9)
    ]
    lines = "\n".join(json.dumps(row) for row in rows)
    (tmp_path / "a.jsonl").write_text(lines, encoding="utf-8")
    pd.DataFrame(rows).to_csv(tmp_path / "b.csv", index=False)
    from_rows, from_lines, from_table = (
        LabeledTexts.from_bias_in_bios(source) for source in (rows, tmp_path / "a.jsonl", tmp_path / "b.csv")
    )
    assert from_rows == from_lines == from_table
    assert from_rows.texts[:2] == ("text 0", "text 1") and from_rows.label == (0, 1) * 3
    assert len(LabeledTexts.from_bias_in_bios(tmp_path)) == 12
    assert LabeledTexts.from_bias_in_bios(rows, ("accountant", "nurse")).texts[0] == "text 1"
    with pytest.raises(FileFormatError, match="columns"):
        LabeledTexts.from_bias_in_bios([{"text": "a"}])
    with pytest.raises(FileFormatError, match="folder"):
        LabeledTexts.from_bias_in_bios(tmp_path / "none.jsonl")
    with pytest.raises(SettingsError, match="expected two of"):
        LabeledTexts.from_bias_in_bios(rows, ("professor", "plumber"))
    with pytest.raises(SettingsError, match="texts of both"):
        LabeledTexts.from_bias_in_bios(rows[:1])


def test_support_names_a_site_that_no_gradient_reaches(model, basis, plain: Ablation) -> None:
    """Zero would pass for a feature without support."""
    given = texts(("doctor", "farmer"))
    tokens, label = tokenize_inputs(model, list(given.texts), None), torch.tensor(given.label)
    late = replace(plain, hook="blocks.3.hook_resid_post")
    probe = fit_probe(pooled_activations(model, tokens, late), label)
    cut = [("blocks.2.hook_resid_pre", lambda value, hook: value.detach())]
    with model.hooks(fwd_hooks=cut), pytest.raises(UnsupportedModelError, match=f"no gradient reaches {HOOK}"):
        probe_support(model, tokens, late, probe, label, rules=())
    early = replace(plain, hook="blocks.0.hook_resid_post")
    probe = fit_probe(pooled_activations(model, tokens, early), label)
    assert not probe_support(model, tokens, early, probe, label, rules=()).any()
