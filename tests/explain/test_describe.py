"""Descriptions against a slow, plain version; streams, interruptions and caches; files; the circuit's labels."""

import gzip
import hashlib
import json
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
import torch

import tl_neuron_circuits as tnc
from tl_neuron_circuits._errors import FileFormatError, NumericalError, SettingsError
from tl_neuron_circuits.explain import Descriptions, _describe
from tl_neuron_circuits.explain._activation_sample import MISSING, ActivationSample, SmallestKeys, mix
from tl_neuron_circuits.explain._describe_circuit import _profiles
from tl_neuron_circuits.explain._token_labels import (
    LEAST_F1,
    LEAST_SUPPORT,
    Vocabulary,
    choose_labels,
    classes_of,
    word_of,
)

NODES = ["L0/N5", "L1/N7", "L2/N30", "L3/N7"]
PROMPT = "The capital of the state containing Dallas is"
SCORES = ["precision", "recall", "base_rate", "threshold", "q01", "q50", "q99", "min", "max"]


@pytest.fixture(scope="module")
def model() -> Any:
    return tnc.load_demo_model()


@pytest.fixture(scope="module")
def texts() -> list[str]:
    """Text of several lengths, some of it repeated."""
    agreement = tnc.tasks.subject_verb_agreement("rc", n=30).clean
    return [*tnc.demo.capitals(n=110, seed=1).clean, *agreement, *tnc.demo.capitals(n=20, seed=1).clean]


Position = tuple[str, str, list[float]]


@pytest.fixture(scope="module")
def plain(model: Any, texts: list[str]) -> dict[str, list[Position]]:
    """(token, token before, activations of `NODES`) of every position of a text but the first; one text at a time."""
    found = {}
    for text in dict.fromkeys(texts):
        tokens = model.to_tokens(text)
        with torch.no_grad():
            _, cache = model.run_with_cache(tokens, names_filter=lambda name: name.endswith("mlp.hook_post"))
        names = [model.tokenizer.decode([token]) for token in tokens[0].tolist()]
        places = [node[1:].split("/N") for node in NODES]
        columns = [cache[f"blocks.{layer}.mlp.hook_post"][0, :, int(unit)].tolist() for layer, unit in places]
        found[text] = [(names[at], names[at - 1], [column[at] for column in columns]) for at in range(1, len(names))]
    return found


def half(text: str) -> int:
    """0 for discovery, 1 for held out."""
    return hashlib.sha256(text.encode()).digest()[0] % 2


def plain_label(positions: list[Position], active: list[bool]) -> tuple[str, str]:
    """Every condition that holds somewhere, tried one by one; the first of the best."""
    best, chosen = LEAST_F1, ("", "")
    for kind in ("token", "class", "after"):
        told = [conditions(kind, token, before) for token, before, _ in positions]
        for name in sorted({condition for found in told for condition in found}):
            holds = [name in found for found in told]
            both = sum(h and a for h, a in zip(holds, active, strict=True))
            f1 = 2 * both / (sum(holds) + sum(active))
            if both >= LEAST_SUPPORT and f1 > best:
                best, chosen = f1, (kind, name)
    return chosen


def conditions(kind: str, token: str, before: str) -> list[str]:
    return classes_of(token) if kind == "class" else [word_of(token if kind == "token" else before)]


def test_labels_scores_and_quantiles_are_those_of_a_slow_plain_version(
    model: Any, texts: list[str], plain: dict[str, list[Position]], untouched: Any
) -> None:
    model("The dog")
    with untouched(model):
        table = tnc.describe(model, NODES, texts, batch_size=7).to_dataframe().set_index(["node", "sign"])
    discovery, held_out = (
        [position for text in texts if half(text) == side for position in plain[text]] for side in (0, 1)
    )
    labels = 0
    for column, node in enumerate(NODES):
        own, other = (np.array([values[column] for *_, values in positions]) for positions in (discovery, held_out))
        for sign in (1, -1):
            row = table.loc[(node, sign)]
            threshold = max(np.quantile(sign * own, 0.99), 0.0)
            active, there = (sign * own > threshold).tolist(), (sign * other > threshold).tolist()
            expected: dict[str, float] = {"threshold": threshold, "min": own.min(), "max": own.max()}
            expected |= {
                "base_rate": float(np.mean(there)),
                "q50": np.quantile(own, 0.5),
                "q01": np.quantile(own, 0.01),
            }
            kind, name = plain_label(discovery, active)
            text = {"token": f'"{name}"', "class": name, "after": f'after "{name}"', "": ""}[kind]
            assert (row["kind"], row["label"]) == (kind, text), (node, sign)
            if kind:
                labels += 1
                holds = [name in conditions(kind, token, before) for token, before, _ in held_out]
                both = sum(h and a for h, a in zip(holds, there, strict=True))
                expected |= {"precision": both / sum(holds) if sum(holds) else np.nan, "recall": both / sum(there)}
            for key, value in expected.items():
                assert row[key] == pytest.approx(value, rel=1e-4, abs=1e-5, nan_ok=True), (node, sign, key)
    assert labels > 2


def test_examples_are_the_strongest_of_different_texts_of_the_discovery_half(
    model: Any, texts: list[str], plain: dict[str, list[Position]]
) -> None:
    found = tnc.describe(model, NODES[:2], texts * 3, k=4)  # repeated texts give one example
    for column, sign, name in ((0, 1, "L0/N5+"), (1, -1, "L1/N7-")):
        discovery = [text for text in plain if half(text) == 0]
        peaks = [max(sign * values[column] for *_, values in plain[text]) for text in discovery]
        examples = found.examples[name]
        got = [sign * e.activations[e.position] for e in examples]
        assert got == pytest.approx(sorted(peaks, reverse=True)[:4], rel=1e-4)
        own = [texts[e.prompt % len(texts)] for e in examples]
        assert len(set(own)) == 4
        assert all("".join(e.tokens).strip() in text for e, text in zip(examples, own, strict=True))
    effects = tnc.direct_logit_effects(model, ["L1/N7"]).to_dataframe()
    assert [token for token, _ in found.logit_effects("L1/N7")] == effects["token"].tolist()
    assert "<table" in found._repr_html_() and "2 nodes" in repr(found)


def test_a_stream_in_pieces_is_the_whole_at_once(model: Any, texts: list[str]) -> None:
    whole = tnc.describe(model, NODES, texts, batch_size=200)
    streamed = tnc.describe(model, NODES, (text for text in texts), batch_size=2)
    a, b = whole.to_dataframe(), streamed.to_dataframe()
    assert a[["node", "sign", "label", "kind"]].equals(b[["node", "sign", "label", "kind"]])
    np.testing.assert_allclose(a[SCORES], b[SCORES], rtol=1e-4, atol=1e-5)
    assert {n: [e.tokens for e in found] for n, found in whole.examples.items()} == {
        n: [e.tokens for e in found] for n, found in streamed.examples.items()
    }
    assert whole.settings == streamed.settings
    # Cut into pieces, every token but each piece's first counts once, whatever the context.
    long = [" ".join(texts[:30]), " ".join(texts[30:60])]
    pieces = tnc.describe(model, NODES[:1], long[:1], held_out=long[1:], context=16)
    assert pieces.settings["positions"] == model.to_tokens(long[0], truncate=False).shape[1] - 1
    with pytest.raises(SettingsError, match="got one string"):
        tnc.describe(model, NODES, texts[0])
    with pytest.raises(SettingsError, match="to the (discovery|held-out) half"):
        tnc.describe(model, NODES, texts[:1])
    with pytest.raises(SettingsError, match="units below"):
        tnc.describe(model, ["L0/N99999"], texts)


def test_an_interrupted_run_goes_on_to_the_same_bits(
    model: Any, texts: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(_describe, "_SHARE", 0)
    whole = tnc.describe(model, NODES, texts, batch_size=4)

    def stopped() -> Iterator[str]:
        yield from texts[:100]
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        tnc.describe(model, NODES, stopped(), batch_size=4, cache=tmp_path)
    passes = []
    run = _describe._run
    monkeypatch.setattr(_describe, "_run", lambda *arguments: (passes.append(1), run(*arguments)))
    resumed = tnc.describe(model, NODES, iter(texts), batch_size=4, cache=tmp_path)
    assert 0 < len(passes) < len(texts) / 4 * 0.8
    pd.testing.assert_frame_equal(whole.table, resumed.table)
    assert str(whole.examples) == str(resumed.examples) and whole.settings == resumed.settings
    # Once finished nothing is run again, for fewer nodes either.
    passes.clear()
    again = tnc.describe(model, [NODES[2], NODES[0]], texts, cache=tmp_path)
    rows = whole.table[whole.table["node"].isin([NODES[0], NODES[2]])]
    assert passes == [] and again.table["node"].tolist() == [NODES[2]] * 2 + [NODES[0]] * 2
    same = [frame.sort_values(["node", "sign"]).reset_index(drop=True) for frame in (again.table, rows)]
    pd.testing.assert_frame_equal(*same)
    # More texts are read on; others, or fewer, are refused.
    more = tnc.describe(model, NODES, [*texts, "The dog is"], cache=tmp_path)
    assert len(passes) == 1 and more.settings["texts"] == len(texts) + 1
    for other in (texts[:90], ["The cat is", *texts]):
        with pytest.raises(FileFormatError, match="not those that the cache was made with"):
            tnc.describe(model, NODES, other, cache=tmp_path)


def test_memory_does_not_grow_with_the_texts(model: Any, texts: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    taken, ran, waiting, sizes = [0], [0], [0], []
    run = _describe._run

    def watched(model: Any, frame: Any, pieces: Any, batch_size: int, samples: Any) -> None:
        waiting[0] = max(waiting[0], taken[0] - ran[0])
        run(model, frame, pieces, batch_size, samples)
        ran[0] += len(pieces)
        sizes.append(
            sum(array.nbytes for sample in samples for array in vars(sample).values() if hasattr(array, "nbytes"))
        )

    def stream() -> Iterator[str]:
        for text in texts:
            taken[0] += 1
            yield text

    monkeypatch.setattr(_describe, "_run", watched)
    found = tnc.describe(model, NODES, stream(), sample=200, batch_size=2)
    assert waiting[0] == 16 and len(sizes) > 8 and len(set(sizes)) == 1
    assert found.settings["positions"] > 2 * 200  # quantiles are then those of a sample
    exact = tnc.describe(model, NODES, texts).to_dataframe()
    assert (found.to_dataframe()["q50"] - exact["q50"]).abs().max() < 0.2 * (exact["q95"] - exact["q05"]).max()


def test_the_sample_is_that_of_the_smallest_keys_however_it_is_cut() -> None:
    keys = mix(np.arange(5000), 0)
    assert len(set(keys.tolist())) == 5000
    for cut in (1, 7, 1000, 5000):
        sample, held = SmallestKeys(100), np.full(100, -1)
        for start in range(0, 5000 if cut > 1 else 500, cut):
            slots, chosen = sample.admit(keys[start : start + cut])
            held[slots] = start + chosen
        seen = keys if cut > 1 else keys[:500]
        assert sorted(held.tolist()) == sorted(np.argsort(seen)[:100].tolist())
    drawn = np.argsort(keys)[:500]
    assert abs(drawn.mean() - 2500) < 4 * 5000 / 12**0.5 / 500**0.5  # uniform over the stream


def test_a_planted_label_is_found_and_chance_is_none() -> None:
    generator = np.random.default_rng(0)
    texts = [" dog", " Cats", "7", ".", "\n", " the", " running", "x"] + [f" w{i}" for i in range(40)]
    vocabulary = Vocabulary(np.arange(len(texts)), texts)
    tokens = generator.integers(0, len(texts), (20_000, 2)).astype(np.int32)
    own, before = tokens.T
    chance = generator.random(len(tokens)) < 0.01
    kept = generator.random(len(tokens)) < 0.8
    columns = [(own == 0) & kept, (own == 2) | (before == 99), (before == 5) & kept, chance]
    labels = [vocabulary.text(label) for label in choose_labels(np.stack(columns, 1), tokens, vocabulary)]
    assert labels == ['"dog"', '"7"', 'after "the"', ""]
    assert classes_of(" Running") == ["capitalized word", "word ending in -ing"] and classes_of("\n\n") == [
        "line break"
    ]
    assert {"punctuation", "end of a sentence"} == set(classes_of(".")) and word_of(" The") == word_of("the")


def test_activations_that_are_not_finite_are_refused() -> None:
    sample = ActivationSample(1, 10, 2)
    values = np.zeros((1, 3, 1), dtype=np.float32)
    values[0, 0] = np.inf  # the first position does not count
    sample.add(np.array([[1, 2, 3]]), np.array([3]), np.array([0]), values)
    assert sample.n_positions == 2 and (sample.best_tokens == MISSING).all()
    values[0, 2] = np.nan
    with pytest.raises(NumericalError, match="NaN or infinite"):
        sample.add(np.array([[1, 2, 3]]), np.array([3]), np.array([0]), values)


def test_a_writer_and_a_simulator_are_called_and_scored_on_held_out_windows(
    model: Any, texts: list[str], plain: dict[str, list[Position]]
) -> None:
    seen: list[str] = []
    known = [positions for text, positions in plain.items() if half(text) == 1]
    short = lambda token: token.strip().removeprefix("##")  # noqa: E731  within a text, and alone

    def write(name: str, examples: pd.DataFrame) -> str:
        assert examples["activation"].abs().is_monotonic_decreasing
        seen.append(name)
        return f"about {name}"

    def simulate(text: str, tokens: list[str]) -> list[float]:
        """The neuron itself, looked up in the held-out texts."""
        sign = 1 if text.endswith("+") else -1
        for positions in known:
            names = [token for token, *_ in positions]
            for start in range(len(names) - len(tokens) + 1):
                if [*map(short, names[start : start + len(tokens)])] == [*map(short, tokens)]:
                    return [sign * values[0] for *_, values in positions[start : start + len(tokens)]]
        raise AssertionError(f"{tokens} are of no held-out text")

    found = tnc.describe(model, ["L0/N5"], texts, write=write, simulate=simulate)
    assert seen == ["L0/N5+", "L0/N5-"] and found.text("L0/N5+") == "about L0/N5+"
    assert found.text("L0/N5") == "+ about L0/N5+; - about L0/N5-"
    assert found.to_dataframe()["simulation"].tolist() == pytest.approx([1.0, 1.0], abs=1e-3)
    against = lambda text, tokens: [-value for value in simulate(text, tokens)]  # noqa: E731
    backwards = tnc.describe(model, ["L0/N5"], texts, write=write, simulate=against)
    assert backwards.to_dataframe()["simulation"].tolist() == pytest.approx([-1.0, -1.0], abs=1e-3)
    with pytest.raises(SettingsError, match="finite numbers, one per token"):
        tnc.describe(model, ["L0/N5"], texts, write=write, simulate=lambda text, tokens: [1.0] * 99)
    with pytest.raises(SettingsError, match="write to return a string"):
        tnc.describe(model, ["L0/N5"], texts, write=lambda name, rows: 3)  # type: ignore[arg-type, return-value]


def test_labels_that_fail_on_other_texts_name_nothing(tmp_path: Path) -> None:
    rows = [(0, "holds", 0.3, 0.01), (1, "fails", 0.01, 0.01), (2, "absent", np.nan, 0.01), (3, "mine", np.nan, np.nan)]
    table = pd.DataFrame(rows, columns=["unit", "label", "precision", "base_rate"]).assign(layer=0, sign=1, recall=0.1)
    table.to_csv(tmp_path / "labels.csv", index=False)
    found = Descriptions.from_file(tmp_path / "labels.csv")
    names = [f"L0/N{unit}" for unit in table["unit"]]
    assert [found.text(name) for name in names] == ["holds", "", "", "mine"]
    assert ["it fails there" in found.label_line(f"{name}+") for name in names] == [False, True, True, False]
    assert found.table["label"].tolist() == table["label"].tolist()


def test_files_of_labels_come_back_and_others_are_read(model: Any, texts: list[str], tmp_path: Path) -> None:
    found = tnc.describe(model, NODES, texts, k=2)
    for name, write in (("a.csv", found.to_csv), ("a.json", found.to_json), ("n.json", found.to_neuronpedia)):
        write(tmp_path / name)
        back = Descriptions.from_file(tmp_path / name)
        for node in NODES:
            assert [back.text(f"{node}{sign}") for sign in "+-"] == [found.text(f"{node}{sign}") for sign in "+-"]
    whole = Descriptions.from_file(tmp_path / "a.json")
    pd.testing.assert_frame_equal(whole.table, found.table, check_dtype=False)
    assert str(dict(whole.examples)) == str(dict(found.examples)) and whole.settings == found.settings
    assert whole.logit_effects("L3/N7") == found.logit_effects("L3/N7")
    explanation = {"modelId": "gpt2-small", "layer": "6-res-jb", "index": "650", "description": "cats", "typeName": "x"}
    others = [
        {**explanation, "id": 1},
        {**explanation, "description": "later"},
        {**explanation, "layer": "6", "index": 1},
    ]
    (tmp_path / "export.json").write_text(json.dumps(others))
    with gzip.open(tmp_path / "batch-0.jsonl.gz", "wt") as file:
        file.write("\n".join(json.dumps(row) for row in others))
    (tmp_path / "mine.csv").write_text('layer,unit,label\n3,7,"a ""quoted"", label"\n')
    for name in ("export.json", "batch-0.jsonl.gz"):
        read = Descriptions.from_file(tmp_path / name)
        assert read.table["node"].tolist() == ["L6/F650", "L6/N1"] and read.text("L6/F650+") == "cats"
        assert read.text("L6/F650-") == ""
    mine = Descriptions.from_file(tmp_path / "mine.csv")
    assert mine.text("L3/N7-") == mine.text("L3/N7+") == 'a "quoted", label'
    for content in (
        "",
        "[]",
        "{}",
        '[{"layer": 1}]',
        "a,b\n1,2\n",
        '[{"layer":"x","unit":1,"label":"y"}]',
        "layer,unit\n1,2\n",
    ):
        (tmp_path / "broken").write_text(content)
        with pytest.raises(FileFormatError):
            Descriptions.from_file(tmp_path / "broken")


def test_a_circuit_is_named_by_neuron_and_sign_and_its_page_tells_more(
    model: Any, texts: list[str], tmp_path: Path
) -> None:
    other, model = model, tnc.load_demo_model("demo-swiglu")  # whose neurons are of both signs
    circuit = tnc.trace(model, PROMPT, " Austin", nodes=12)
    members = sorted(circuit.members)
    circuit = circuit.label({members[0]: "mine"})
    named = circuit.describe(texts, k=2)
    found = tnc.describe(model, circuit, texts, k=2)
    rows = named.nodes.set_index("node")
    assert set(rows.loc[members, "sign"]) == {1, -1}
    for node in members:
        sign = {1: "+", -1: "-"}[rows.loc[node, "sign"]]
        name = f"{node.partition('@')[0]}{sign}"
        text = found.text(name) or node
        assert rows.loc[node, "label"] == ("mine" if node == members[0] else text)
        assert named.details[node]["label"] == found.label_line(name)
        assert [e["tokens"] for e in named.details[node].get("examples", [])] == [
            list(e.tokens) for e in found.examples[name]
        ]
        assert len(named.details[node]["direct_logit_effects"]) == 10
    assert (rows["label"] != rows.index)[members].sum() > 3
    named.save(tmp_path / "saved")
    loaded = tnc.Circuit.load(tmp_path / "saved")
    assert loaded.details == named.details
    loaded.prune(count=4).to_html(tmp_path / "page.html")
    assert "base rate" in (tmp_path / "page.html").read_text(encoding="utf-8")
    # What is known can be given as a file, also where the model is gone; without anything, logit effects remain.
    found.to_csv(tmp_path / "labels.csv")
    again = tnc.Circuit.load(tmp_path / "saved").describe(labels=tmp_path / "labels.csv")
    assert again.nodes["label"].tolist() == named.nodes["label"].tolist()
    bare = circuit.describe()
    assert {tuple(told) for told in bare.details.values()} == {("direct_logit_effects",)}
    wrong: list[dict[str, Any]] = [{"texts": texts, "labels": found}, {"k": 3}, {"texts": texts, "model": other}]
    for arguments in wrong:
        with pytest.raises(SettingsError):
            circuit.describe(**arguments)
    with pytest.raises(SettingsError, match="give the model"):
        tnc.Circuit.load(tmp_path / "saved").describe(texts)


def test_groups_of_a_circuit_are_named_by_what_their_members_share(
    model: Any, texts: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    circuit = tnc.trace(model, PROMPT, " Austin", nodes=16)
    with monkeypatch.context() as patched:
        patched.setitem(sys.modules, "sklearn.cluster", None)
        with pytest.raises(tnc.NeuronCircuitsError, match="scikit-learn"):
            circuit.describe((pytest.fail("the texts were read") for _ in range(1)), groups=4)
    pytest.importorskip("sklearn")
    grouped = circuit.describe(texts, groups=4)
    groups = {name for name in grouped.nodes["group"] if name}
    assert len(groups) == 4 and all(
        name.startswith(("reads", "for", "against", "after", '"', "'", "layer")) for name in groups
    )
    assert len(grouped.collapse()) == 16


def test_groups_of_prompts_of_several_lengths(model: Any) -> None:
    pytest.importorskip("sklearn")
    prompts = [PROMPT, "The capital of Texas is"]
    circuit = tnc.trace(model, prompts, positions="sum", nodes=16)
    grouped = circuit.describe(groups=3)
    assert len({name for name in grouped.nodes["group"] if name}) == 3
    nodes = sorted(circuit.members)
    made, each = _profiles(circuit, nodes, model), [tnc.profiles(model, prompt, nodes) for prompt in prompts]
    assert torch.equal(made.attribution, torch.cat([one.attribution for one in each], 1))
    assert torch.equal(made.contribution, torch.cat([one.contribution for one in each], 1))
    assert made.sources == (*each[0].sources, *each[1].sources)


def test_groups_that_cannot_be_are_refused_before_the_texts_are_read(model: Any, tmp_path: Path) -> None:
    pytest.importorskip("sklearn")
    unread = (pytest.fail("the texts were read") for _ in range(1))
    features = tnc.bases.Dictionaries(tnc.load_demo_dictionaries("sae"))
    of_features = tnc.trace(model, PROMPT, basis=features, nodes=16)
    few = tnc.trace(model, PROMPT, nodes=4)
    for circuit, groups in ((of_features, 3), (few, 4), (few, 1)):
        with pytest.raises(SettingsError, match="expected groups from 2"):
            circuit.describe(unread, groups=groups)
    several = tnc.trace(model, [PROMPT, "The capital of Texas is"], positions="sum", nodes=16)
    several.save(tmp_path / "saved")
    with pytest.raises(SettingsError, match="a loaded circuit of pairs"):
        tnc.Circuit.load(tmp_path / "saved").describe(unread, groups=3, model=model)


def test_features_of_dictionaries_are_described_too(model: Any, texts: list[str]) -> None:
    basis = tnc.bases.Dictionaries(tnc.load_demo_dictionaries("sae"))
    found = tnc.describe(model, ["L1/F5", "L1/N5"], texts, basis=basis, k=2)
    table = found.to_dataframe().set_index(["node", "sign"])
    (site,) = [site for site in basis.sites(model) if site.layer == 1]
    tokens = model.to_tokens(texts[found.examples["L1/F5+"][0].prompt]) if found.examples["L1/F5+"] else None
    assert table.loc[("L1/F5", 1), "min"] >= 0 and table.loc[("L1/F5", -1), "active"] == 0
    assert found.logit_effects("L1/F5") == [] and found.logit_effects("L1/N5")
    if tokens is not None:
        with torch.no_grad():
            _, cache = model.run_with_cache(tokens)
        expected = site.take_apart(cache).nodes[0, 1:, 5].max()
        example = found.examples["L1/F5+"][0]
        assert example.activations[example.position] == pytest.approx(float(expected), rel=1e-4)


def test_few_positions_are_said_once_a_call(
    model: Any, texts: list[str], monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    found = tnc.describe(model, NODES[:2], texts, k=1)
    (record,) = [one for one in caplog.records if one.name == "tl_neuron_circuits.explain._describe"]
    assert f"labels come from {found.settings['positions']} positions" in record.getMessage()
    assert "tens of thousands" in record.getMessage()
    caplog.clear()
    monkeypatch.setattr(_describe, "FEW_POSITIONS", found.settings["positions"])
    tnc.describe(model, NODES[:1], texts, k=1)
    assert not caplog.records
