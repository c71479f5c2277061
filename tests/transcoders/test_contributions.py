"""A feature's pre-activation is the sum of its sources, and every source is what a plain forward computation says."""

from importlib.metadata import version
from typing import Any

import pytest
import torch
from torch import Tensor

from tests.bases.site_dictionaries import dictionary
from tests.families import N_LAYERS, ModelCase, all_models, model_cases, typical_models
from tests.loops import for_each
from tests.transcoders.weights_cases import EVERY_MODEL, LENGTH, prompt, transcoders
from tl_neuron_circuits import load_demo_dictionaries
from tl_neuron_circuits._errors import DictionaryError, NumericalError, SettingsError
from tl_neuron_circuits.bases import Dictionary
from tl_neuron_circuits.transcoders import contributions

SOME_MODELS = typical_models("gpt2", "llama_biased", "pythia", "qwen2", "no_norm")
TEXT = "The capital of the state containing Dallas is"


def values_of(model: Any, tokens: Tensor, *names: str) -> dict[str, Tensor]:
    found: dict[str, Tensor] = {}
    hooks = [(name, lambda value, hook, name=name: found.__setitem__(name, value.detach())) for name in names]
    with torch.no_grad(), model.hooks(fwd_hooks=hooks):
        found["logits"] = model(tokens[None])
    return {name: value.reshape(1, len(tokens), *value.shape[2 if value.dim() > 2 else 1 :])[0] if "pattern" not in name
            else value[0] for name, value in found.items()}  # fmt: skip


@for_each("case", EVERY_MODEL)
def test_sources_sum_to_the_pre_activation(case: ModelCase, untouched: Any) -> None:
    model = case.build(torch.float32)
    dictionaries, tokens = transcoders(model), prompt(model)
    unit, position = (int(n) for n in torch.randint(LENGTH, (2,), generator=torch.Generator().manual_seed(1)))
    reads = dictionaries[1]
    x = values_of(model, tokens, reads.hook_in)[reads.hook_in][position]
    with untouched(model):
        found = contributions(model, dictionaries, tokens, f"L1/F{unit}@{position}")
    assert found.value == pytest.approx(float(x @ reads.W_enc[:, unit] + reads.b_enc[unit]), abs=1e-4)
    assert abs(found.residual) < 1e-4
    assert set(found.table["kind"]) <= {"feature", "error", "skip", "head", "embedding", "bias"}


@pytest.mark.parametrize("case", SOME_MODELS)
def test_a_logit_and_a_neuron_are_the_models_own(case: ModelCase) -> None:
    model, layer = case.build(torch.float32), N_LAYERS - 1
    dictionaries, tokens = transcoders(model), prompt(model)
    pre = f"blocks.{layer}.mlp.hook_pre"
    values = values_of(model, tokens, pre)
    logit = contributions(model, dictionaries, tokens, 7)
    assert logit.value == pytest.approx(float(values["logits"][-1, 7] - values["logits"][-1].mean()), abs=1e-4)
    neuron = contributions(model, dictionaries, tokens, f"L{layer}/N5@2")
    assert neuron.value == pytest.approx(float(values[pre][2, 5]), abs=1e-4)
    assert max(abs(logit.residual), abs(neuron.residual)) < 1e-4


@pytest.mark.parametrize("case", model_cases("gpt2", "llama_folded"), ids=lambda case: case.id)
def test_sources_are_what_a_forward_computation_gives(case: ModelCase) -> None:
    """Each source's own vector is carried forward through the frozen norm and read by the encoder."""
    model = case.build(torch.float64)
    dictionaries = [d.to(dtype=torch.float64) for d in transcoders(model)]
    tokens, t, f, target = prompt(model), 4, 3, dictionaries[1]
    blocks = [f"blocks.{layer}" for layer in range(N_LAYERS)]
    names = [f"{b}.{n}" for b in blocks for n in ("hook_resid_pre", "hook_resid_mid", "attn.hook_pattern")]
    values = values_of(model, tokens, *names, *(d.hook_in for d in dictionaries), "blocks.0.hook_mlp_out")
    centered = case.family == "gpt2"

    def normalized(x: Tensor, by: Tensor) -> Tensor:
        if centered:
            x, by = x - x.mean(-1, keepdim=True), by - by.mean(-1, keepdim=True)
        return x / (by.pow(2).mean(-1, keepdim=True) + float(model.cfg.eps)).sqrt()

    ln2 = model.blocks[1].ln2
    after_weight = version("transformer-lens").startswith("2.") and hasattr(ln2, "w")  # what hook_normalized has there

    def read(vector: Tensor) -> float:
        seen = normalized(vector, values["blocks.1.hook_resid_mid"][t])
        return float((seen * ln2.w.detach() if after_weight else seen) @ target.W_enc[:, f])

    found = contributions(model, dictionaries, tokens, f"L1/F{f}@{t}").table.set_index("node")["contribution"]
    x, source = values[dictionaries[0].hook_in][t], dictionaries[0]
    features = source.encode(x)
    for unit in features.nonzero().flatten().tolist():
        assert found[f"L0/F{unit}@{t}"] == pytest.approx(read(features[unit] * source.W_dec[unit]), abs=1e-8)
    assert source.W_skip is not None
    assert found[f"L0/skip@{t}"] == pytest.approx(read(x @ source.W_skip.T), abs=1e-8)
    error = values["blocks.0.hook_mlp_out"][t] - source(x)
    assert found[f"L0/error@{t}"] == pytest.approx(read(error), abs=1e-8)
    for layer in range(N_LAYERS):
        stream, attention = values[f"blocks.{layer}.hook_resid_pre"], model.blocks[layer].attn
        y = normalized(stream, stream)
        norm = model.blocks[layer].ln1
        weight, bias = (getattr(norm, name, None) for name in (("weight", "bias") if hasattr(norm, "weight") else "wb"))
        y = y if weight is None else y * weight + bias
        heads = torch.einsum("sd,hdk,hke->hse", y, attention.W_V, attention.W_O)
        for head in range(4):
            for s in range(t + 1):
                write = values[f"blocks.{layer}.attn.hook_pattern"][head, t, s] * heads[head, s]
                assert found[f"L{layer}/H{head}@{s}→{t}"] == pytest.approx(read(write.detach()), abs=1e-8)


@pytest.mark.parametrize("kind", ["gated", "topk_transcoder", "jumprelu_transcoder", "layer_norm", "constant_norm"])
def test_encoders_of_every_kind_add_up_and_fire_as_they_say(kind: str) -> None:
    model = model_cases("llama")[-1].build(torch.float32)
    generator = torch.Generator().manual_seed(3)
    make = lambda *shape: torch.randn(*shape, generator=generator)  # noqa: E731
    dictionaries = []
    for layer in range(N_LAYERS):
        names = {"gated": ("r_mag", "b_gate", "b_mag"), "jumprelu_transcoder": ("b_enc", "threshold")}.get(
            kind, ("b_enc",)
        )
        tensors = {"W_enc": make(16, 12) / 3, "W_dec": make(12, 16) / 3, "b_dec": make(16)}
        tensors |= {name: make(12).abs() / 3 for name in names}
        hooks = {"hook_in": f"blocks.{layer}.ln2.hook_normalized", "hook_out": f"blocks.{layer}.hook_mlp_out"}
        how = {"layer_norm": "layer_norm", "constant_norm": "constant_norm_rescale"}.get(kind, "none")
        settings = {"k": 4} if kind.startswith("topk") else {}
        plain = "transcoder" if how != "none" else kind
        dictionaries.append(Dictionary(plain, **tensors, **hooks, **settings, normalize_activations=how))
    tokens, seen = prompt(model), 0
    x = values_of(model, tokens, dictionaries[1].hook_in)[dictionaries[1].hook_in]
    features = dictionaries[1].encode(x)
    for position, unit in features.nonzero()[:2].tolist():
        found = contributions(model, dictionaries, tokens, f"L1/F{unit}@{position}")
        assert found.value == pytest.approx(float(features[position, unit]), abs=1e-4)
        assert abs(found.residual) < 1e-4
        seen += 1
    assert seen


@pytest.mark.parametrize("case", [c for c in all_models("gemma2") if "Bridge" in c.id])
def test_what_is_written_before_a_post_norm_goes_through_it(case: ModelCase) -> None:
    model = case.build(torch.float32)
    before = [transcoders(model, hook_out=f"blocks.{layer}.mlp.hook_out")[layer] for layer in range(N_LAYERS)]
    found = contributions(model, before, prompt(model), "L1/F3@4")
    after = contributions(model, transcoders(model), prompt(model), "L1/F3@4")
    assert abs(found.residual) < 1e-4
    assert found.value == pytest.approx(after.value, abs=1e-6)
    assert found.by("kind")["feature"] != pytest.approx(after.by("kind")["feature"], rel=0.01)


def test_saes_are_sources_but_not_targets(demo: tuple[Any, Any]) -> None:
    model, saes = demo[0], load_demo_dictionaries("sae")
    found = contributions(model, saes, TEXT, " Austin")
    assert abs(found.residual) < 1e-4
    assert {"feature", "error"} <= set(found.table["kind"])
    with pytest.raises(SettingsError, match="sources but not targets"):
        contributions(model, saes, TEXT, "L3/F7@-1")


def test_an_mlp_without_a_dictionary_is_all_error(demo: tuple[Any, Any]) -> None:
    model, dictionaries = demo
    whole = contributions(model, dictionaries, TEXT, "L3/F7@-1").by("layer")
    part = contributions(model, dictionaries[2:], TEXT, "L3/F7@-1")
    assert abs(part.residual) < 1e-4
    assert not ((part.table["kind"] == "feature") & (part.table["layer"] < 2)).any()
    assert part.by("layer")[1] == pytest.approx(whole[1], abs=1e-5)


def test_results_sort_sum_and_say_what_they_are(demo: tuple[Any, Any]) -> None:
    found = contributions(*demo, TEXT, "L3/F7@-1")
    assert found.target == "L3/F7@9"
    sizes = found.table["contribution"].abs()
    assert (sizes.diff().dropna() <= 0).all()
    assert found.by("kind").sum() == pytest.approx(found.value, abs=1e-4)
    assert set(found.top(3, "head")["kind"]) == {"head"}
    for columns in ((), ("kind", "nothing")):
        with pytest.raises(SettingsError, match="expected columns among"):
            found.by(*columns)
    assert "242 sources" in repr(found)
    features = found.table[found.table["kind"] == "feature"]
    assert (features["activation"] * features["weight"] - features["contribution"]).abs().max() < 1e-6


@for_each(
    ("target", "message"),
    [
        ("L9/F7@1", "layer with a transcoder"), ("L3/F9999@1", "below 768"), ("L3/F7", "expected a target such as"),
        ("L3/F7@50", "position from"), ("L3/N9999@1", "neuron"), ("L3/A7@1", "expected a target"), (99999, "token"),
        ("no such token at all", "expected a target such as"),
    ],
)  # fmt: skip
def test_targets_that_are_not_there(demo: tuple[Any, Any], target: str | int, message: str) -> None:
    with pytest.raises(SettingsError, match=message):
        contributions(*demo, TEXT, target)


def test_dictionaries_elsewhere_and_encoders_of_their_own_are_refused() -> None:
    model = model_cases("gpt2")[-1].build(torch.float32)
    tokens = prompt(model)
    with pytest.raises(DictionaryError, match="writes at blocks.0.hook_resid_post"):
        contributions(model, [dictionary("sae_residual", 0, torch.float32)], tokens, 3)
    transcoder = transcoders(model, "transcoder")[1]
    other = transcoders(model, "transcoder", hook_in="blocks.1.hook_resid_post")[1]
    with pytest.raises(DictionaryError, match="not a norm of the residual stream"):
        contributions(model, [other], tokens, "L1/F3@2")
    own = Dictionary(
        "custom", transcoder.W_enc, transcoder.W_dec, transcoder.b_dec, hook_in=transcoder.hook_in,
        hook_out=transcoder.hook_out, own_encode=transcoder.encode,
    )  # fmt: skip
    with pytest.raises(DictionaryError, match="encoder of its own"):
        contributions(model, [own], tokens, "L1/F3@2")


def test_a_write_that_is_not_known_is_an_error_not_a_number() -> None:
    model = model_cases("gpt2")[-1].build(torch.float32)
    push = ("blocks.0.hook_resid_post", lambda value, hook: value + 1.0 + 0.1 * torch.arange(16.0))
    with model.hooks(fwd_hooks=[push]), pytest.raises(NumericalError, match="need gradients only"):
        contributions(model, transcoders(model), prompt(model), "L1/F3@4")


def test_real_text_on_a_model_with_grouped_queries(stories260K: Any) -> None:
    model, generator = stories260K, torch.Generator().manual_seed(0)
    width, dictionaries = int(model.cfg.d_model), []
    for layer in range(int(model.cfg.n_layers)):
        make = lambda *shape: torch.randn(*shape, generator=generator)  # noqa: E731
        hooks = {"hook_in": f"blocks.{layer}.ln2.hook_normalized", "hook_out": f"blocks.{layer}.hook_mlp_out"}
        weights = (make(width, 32) / 8, make(32, width) / 8, make(width))
        dictionaries.append(Dictionary("transcoder", *weights, b_enc=make(32) / 4, **hooks))
    for target in ("L4/F3@-1", "L2/F7@5", "L1/F1@3"):
        found = contributions(model, dictionaries, "Once upon a time there was a little girl", target)
        assert abs(found.residual) < 1e-4
