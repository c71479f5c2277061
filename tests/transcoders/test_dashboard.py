"""A feature's page holds what it says, shows nothing of its activations when restricted, and needs nothing else."""

import re
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from tl_neuron_circuits._errors import SettingsError
from tl_neuron_circuits.transcoders import feature_dashboard
from tl_neuron_circuits.transcoders._dashboard import FeatureDashboard
from tl_neuron_circuits.transcoders._dashboard_page import page

TEXTS = [
    "The capital of the state containing Dallas is Austin.", "The bird of Texas is Mockingbird.", "Hollas is in Texas.",
    "The capital of Texas is Austin.", "The dog near the cats barks.",
]  # fmt: skip


@pytest.fixture(scope="module")
def shown(demo: tuple[Any, Any]) -> tuple[FeatureDashboard, Any, Tensor]:
    model, dictionaries = demo
    tokens = model.to_tokens(TEXTS)
    ignored = (int(model.tokenizer.pad_token_id), int(model.tokenizer.bos_token_id))
    _, cache = model.run_with_cache(tokens)
    counts = ~torch.isin(tokens, torch.tensor(ignored))
    features = dictionaries[1].encode(cache["blocks.1.ln2.hook_normalized"]) * counts[..., None]
    unit = int((features > 0).sum((0, 1)).argmax())
    found = feature_dashboard(model, dictionaries, f"L1/F{unit}", tokens, ignore_tokens=ignored, batch_size=2)
    return found, (features[..., unit], counts), tokens


def test_frequency_and_bands_count_every_position(shown: Any) -> None:
    firing, (values, counts) = shown[0].firing, shown[1]
    assert firing.positions == int(counts.sum())
    assert firing.frequency == pytest.approx(float((values > 0).sum() / counts.sum()))
    assert firing.largest == pytest.approx(float(values.max()), abs=1e-5)
    assert [band.high for band in firing.bands] == pytest.approx([firing.largest * n / 5 for n in (5, 4, 3, 2, 1)])
    assert sum(band.count for band in firing.bands) == int((values > 0).sum())
    for band in firing.bands:
        for example in band.examples:
            assert band.low < example.activations[example.position] <= band.high + 1e-6
            near = (values[example.prompt] - example.activations[example.position]).abs().min()
            assert near < 1e-5
    strongest = firing.bands[0].examples[0]
    assert strongest.activations[strongest.position] == pytest.approx(firing.largest)
    assert "<pad>" not in "".join(strongest.tokens)


def test_restricted_pages_hold_nothing_of_the_features_own_activations(demo: Any, shown: Any, tmp_path: Path) -> None:
    model, dictionaries, tokens = *demo, shown[2]
    label, path = shown[0].feature, tmp_path / "restricted.html"
    found = feature_dashboard(model, dictionaries, label, tokens, restricted=True, path=path)
    text = path.read_text(encoding="utf-8")
    assert found.firing is None
    assert "Restricted" in text
    assert "Examples" not in text and "fires on" not in text and "largest activation" not in text
    assert "Examples" in page(shown[0])


def test_a_page_has_no_script_and_asks_for_nothing(shown: Any) -> None:
    text = page(shown[0])
    assert "default-src 'none'" in text
    assert not re.search(r"<script|<link|https?:|url\(|@import", text)
    assert "prefers-color-scheme: dark" in text
    assert text.isascii()


def test_texts_cannot_break_out_of_the_page(shown: Any) -> None:
    evil = "<script>alert(1)</script>"
    broken = FeatureDashboard(
        evil, evil, shown[0].firing, shown[0].logits.assign(token=evil), shown[0].heads, shown[0].routes
    )  # fmt: skip
    assert "<script" not in page(broken)
    assert "&lt;script&gt;" in page(broken)


def test_the_first_layer_has_heads_and_tokens_but_no_earlier_features(demo: Any, tmp_path: Path) -> None:
    model, dictionaries = demo
    found = feature_dashboard(model, dictionaries, "L0/F3", model.to_tokens(TEXTS), path=tmp_path / "first.html")
    assert found.routes[0].features is None
    assert [route.head is None for route in found.routes] == [True, False, False, False]
    assert "L0/F3" in repr(found) and found._repr_html_()


def test_a_feature_that_never_fires_says_so(demo: Any) -> None:
    model, dictionaries = demo
    tokens = model.to_tokens(TEXTS)[4:]
    _, cache = model.run_with_cache(tokens)
    silent = int(dictionaries[1].encode(cache["blocks.1.ln2.hook_normalized"])[0].sum(0).argmin())
    found = feature_dashboard(model, dictionaries, f"L1/F{silent}", tokens)
    assert found.firing is not None and found.firing.bands == ()
    assert "never fires" in page(found)
    with pytest.raises(SettingsError, match="at least 1"):
        feature_dashboard(model, dictionaries, "L1/F3", tokens, examples=0)
