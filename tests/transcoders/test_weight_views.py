"""Views without a prompt are the products of weights that they say, and agree with circuits on prompts."""

from collections.abc import Sequence
from typing import Any

import pytest
import torch

from tests.families import ModelCase, model_cases
from tests.loops import for_each
from tests.transcoders.weights_cases import prompt, transcoders
from tl_neuron_circuits import direct_logit_effects
from tl_neuron_circuits._errors import SettingsError, UnsupportedModelError
from tl_neuron_circuits.bases import Dictionary
from tl_neuron_circuits.transcoders import connections, contributions, deembed, logit_weights, pull_back
from tl_neuron_circuits.transcoders._connections import probe_run
from tl_neuron_circuits.transcoders._pull_back import encode_in_chunks, feature_means


@for_each("case", model_cases("gpt2", "llama", "gemma2"), ids=lambda case: case.id)
def test_connections_times_the_norms_scale_are_contributions(case: ModelCase) -> None:
    """On a prompt weight and connection differ by one number, the scale of the norm before the MLP."""
    model = case.build(torch.float32)
    found = contributions(model, transcoders(model, "transcoder"), prompt(model), "L1/F3@4").table
    features = found[found["kind"] == "feature"]
    matrix = connections(model, transcoders(model, "transcoder"), 0, 1)
    assert matrix.shape == (12, 12)
    ratio = matrix[features["unit"].tolist(), 3].double().numpy() / features["weight"].to_numpy()
    assert len(features) > 2
    assert ratio.min() == pytest.approx(ratio.max(), rel=1e-4)
    assert ratio.min() > 0


@pytest.mark.parametrize("case", model_cases("llama"), ids=lambda case: case.id)
def test_connections_through_a_head_are_products_of_its_weights(case: ModelCase) -> None:
    """With grouped queries: heads 2 and 3 share the second value head."""
    model = case.build(torch.float32)
    dictionaries = transcoders(model, "transcoder")
    matrix = connections(model, dictionaries, 0, 1, head=(1, 2), sources=[2, 5], targets=[3])
    attention, norm = model.blocks[1].attn, model.blocks[1].ln1
    W_V = attention.W_V[2 if len(attention.W_V) == 4 else 1]
    weight = norm.w if hasattr(norm, "w") else norm.weight
    read = weight * (W_V @ attention.W_O[2] @ dictionaries[1].W_enc[:, 3])
    expected = dictionaries[0].W_dec[[2, 5]] @ read
    assert matrix[:, 0].tolist() == pytest.approx(expected.tolist(), abs=1e-5)


def test_deembedding_directly_and_through_a_head(demo: tuple[Any, Any]) -> None:
    model, dictionaries = demo
    for head in (None, (1, 2)):
        table = deembed(model, dictionaries, ["L2/F5", "L2/F9"], head=head, k=4)
        reads = dictionaries[2].W_enc[:, 9]
        reads = reads - reads.mean()
        if head is not None:
            norm = model.blocks[1].ln1
            reads = model.W_V[1, 2] @ (model.W_O[1, 2] @ reads) * getattr(norm, "w", getattr(norm, "weight", 1.0))
            reads = reads - reads.mean()
        values = model.W_E @ reads
        for direction, largest in (("top", True), ("bottom", False)):
            rows = table[(table["label"] == "L2/F9") & (table["direction"] == direction)]
            best = values.topk(4, largest=largest)
            assert rows["token_id"].tolist() == best.indices.tolist()
            assert rows["value"].tolist() == pytest.approx(best.values.tolist(), abs=1e-5)


def test_logit_weights_are_the_logit_effects_of_a_neuron_that_writes_the_same(demo: tuple[Any, Any]) -> None:
    """A dictionary whose decoder is W_out has the neurons' logit effects."""
    model, dictionaries = demo
    d = dictionaries[3]
    W_out = model.blocks[3].mlp.W_out.detach()
    n = len(W_out)
    neurons = Dictionary(
        "transcoder", d.W_enc.new_zeros(d.d_in, n), W_out, d.b_dec, b_enc=d.b_dec.new_zeros(n), hook_in=d.hook_in,
        hook_out=d.hook_out,
    )  # fmt: skip
    ours = logit_weights(model, [neurons], "L3/F7", k=5)
    theirs = direct_logit_effects(model, ["L3/N7"], k=5).to_dataframe()
    assert ours["token_id"].tolist() == theirs["token_id"].tolist()
    assert ours["value"].tolist() == pytest.approx(theirs["effect"].tolist(), abs=1e-5)


def test_pull_back_ranks_all_earlier_features_and_weighs_them_by_their_mean(demo: tuple[Any, Any]) -> None:
    model, dictionaries = demo
    plain = pull_back(model, dictionaries, "L2/F5", k=3)
    whole = torch.cat([connections(model, dictionaries, layer, 2, targets=[5])[:, 0] for layer in (0, 1)])
    top = plain[plain["direction"] == "top"]
    assert top["value"].tolist() == pytest.approx(whole.topk(3).values.tolist(), abs=1e-6)
    tokens = model.to_tokens(["The capital of Texas is Austin.", "The dog near the cats barks at the man."])
    ignored = (int(model.tokenizer.pad_token_id), int(model.tokenizer.bos_token_id))
    weighed = pull_back(model, dictionaries, "L2/F5", tokens=tokens, ignore_tokens=ignored, k=3)
    _, cache = model.run_with_cache(tokens)
    counts = ~torch.isin(tokens, torch.tensor(ignored))
    for row in weighed.itertuples():
        features = dictionaries[row.layer].encode(cache[f"blocks.{row.layer}.ln2.hook_normalized"][counts])
        assert row.mean_activation == pytest.approx(float(features[:, row.unit].mean()), abs=1e-6)
        assert row.value == pytest.approx(row.weight * row.mean_activation, abs=1e-7)


def test_chunks_of_features_and_prompts_change_nothing(demo: tuple[Any, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    model, dictionaries = demo
    labels = ["L3/F1", "L3/F2", "L3/F3"]
    tokens = torch.randint(5, 500, (5, 7), generator=torch.Generator().manual_seed(0))
    whole = deembed(model, dictionaries, labels), pull_back(model, dictionaries, labels)
    run = probe_run(model, dictionaries)
    means = feature_means(model, run, tokens, (), 32, None)
    rooms = "tl_neuron_circuits.transcoders."
    monkeypatch.setattr(f"{rooms}_deembed._PRODUCTS_AT_ONCE", 1000)
    monkeypatch.setattr(f"{rooms}_pull_back._WEIGHTS_AT_ONCE", 5000)
    monkeypatch.setattr(f"{rooms}_pull_back._ACTIVATIONS_AT_ONCE", 2000)
    assert len(list(encode_in_chunks(dictionaries[0], torch.zeros(7, 128)))) == 4
    for before, after in zip(whole, (deembed(*demo, labels), pull_back(*demo, labels)), strict=True):
        assert after[["label", "direction", "rank"]].equals(before[["label", "direction", "rank"]])
        assert (after["value"] - before["value"]).abs().max() < 1e-6
    chunked = feature_means(model, run, tokens, (), 2, None)
    assert all(torch.allclose(chunked[layer], means[layer], atol=1e-6) for layer in means)


@for_each(
    ("arguments", "message"),
    [
        ((2, 2), "source layer below 2"), ((0, 9), "layer with a transcoder"), ((0, 2, (3, 0)), "layers 0 to 2"),
        ((0, 2, (1, 9)), "head below 4"), ((1, 2, (1, 0)), "head \\(1, 0\\) reads"), ((-1, 2), "got layer -1"),
    ],
)  # fmt: skip
def test_what_does_not_stand_before_is_refused(demo: tuple[Any, Any], arguments: Sequence[Any], message: str) -> None:
    source, target, *head = arguments
    with pytest.raises(SettingsError, match=message):
        connections(*demo, source, target, head=head[0] if head else None)


def test_limits_are_said(demo: tuple[Any, Any]) -> None:
    with pytest.raises(SettingsError, match="at most 1,000 bytes"):
        connections(*demo, 0, 1, max_bytes=1000)
    with pytest.raises(SettingsError, match="features from 0 to 767"):
        connections(*demo, 0, 1, sources=[768])
    for wrong in ("L1/N5", "L1/F9999", "L7/F3"):
        with pytest.raises(SettingsError):
            deembed(*demo, wrong)
    with pytest.raises(SettingsError, match="a dictionary before"):
        pull_back(*demo, "L0/F5")
    with pytest.raises(SettingsError, match="at least 1"):
        logit_weights(*demo, "L0/F5", k=0)
    with pytest.raises(SettingsError, match="not ignored"):
        pull_back(*demo, "L1/F5", tokens=torch.tensor([[3, 3]]), ignore_tokens=(3,))


def test_a_norm_on_the_embeddings_is_refused() -> None:
    for case in model_cases("bloom"):
        model = case.build(torch.float32)
        with pytest.raises(UnsupportedModelError, match="normalizes its embeddings"):
            deembed(model, transcoders(model), "L1/F3")
