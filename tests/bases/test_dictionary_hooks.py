"""A dictionary's hooks are found on every family and both model classes, at the place that carries the named value."""

from typing import Any

import pytest
import torch
from torch import Tensor

from tests.families import (
    D_HEAD,
    D_MLP,
    D_MODEL,
    N_HEADS,
    ModelCase,
    all_models,
    build_bridge_from_module,
    random_tokens,
    typical_models,
)
from tests.loops import for_each
from tl_neuron_circuits._errors import DictionaryError, NumericalError, UnsupportedModelError
from tl_neuron_circuits.bases import Dictionary, fraction_variance_unexplained
from tl_neuron_circuits.bases._dictionary_basis import check_fires, resolve_hooks
from tl_neuron_circuits.bases._dictionary_variance import VarianceSums
from tl_neuron_circuits.models._protocol import submodule

AFTER_NORM = "model.layers.1.pre_feedforward_layernorm.output"


def at(
    hook_in: str, hook_out: str | None = None, width: int = D_MODEL, out: int | None = None, **metadata: Any
) -> Dictionary:
    """A dictionary of ones at these hooks."""
    out = width if out is None else out
    tensors = {
        "W_enc": torch.ones(width, 3),
        "b_enc": torch.zeros(3),
        "W_dec": torch.ones(3, out),
        "b_dec": torch.zeros(out),
    }
    kind = "standard" if hook_out is None else "transcoder"
    return Dictionary(kind, **tensors, hook_in=hook_in, hook_out=hook_out, metadata=metadata)


def values_of(model: Any, names: tuple[str, ...]) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """The values at hook points, and what the MLP module of layer 1 took and gave, in one forward."""
    seen: dict[str, Tensor] = {}
    mlp: dict[str, Tensor] = {}

    def watch(module: Any, inputs: Any, keywords: Any, output: Any) -> None:
        mlp["in"] = (inputs or tuple(keywords.values()))[0]
        mlp["out"] = output[0] if isinstance(output, tuple) else output

    def record(name: str) -> Any:
        def hook(value: Tensor, hook: Any) -> None:
            seen[name] = value.clone()

        return hook

    handle = submodule(model, "blocks.1.mlp").register_forward_hook(watch, with_kwargs=True)
    with torch.no_grad():
        model.run_with_hooks(random_tokens(model), fwd_hooks=[(name, record(name)) for name in set(names)])
    handle.remove()
    return seen, mlp


def normalized(x: Tensor, rms: bool, eps: float) -> Tensor:
    x = x if rms else x - x.mean(-1, keepdim=True)
    return x / (x.square().mean(-1, keepdim=True) + eps).sqrt()


@for_each("case", typical_models("gpt2", "gpt2_folded", "pythia", "llama", "llama_folded", "gemma2", "qwen3", "relu"))
def test_ln2_normalized_is_before_the_norms_weight_on_both_classes(case: ModelCase) -> None:
    """`ln2.hook_normalized` is x over its scale (TransformerLens 2's LN: with weight, bias), `hook_mlp_out` added."""
    model = case.build(dtype=torch.float32)
    names = resolve_hooks(model, at("blocks.1.ln2.hook_normalized", "blocks.1.hook_mlp_out"))
    parallel = case.family == "pythia"
    before = "blocks.1.hook_resid_pre" if parallel else "blocks.1.hook_resid_mid"
    attention = ("blocks.1.hook_attn_out",) if parallel else ()
    seen, _ = values_of(model, (*names, before, "blocks.1.hook_resid_post", *attention))
    rms = case.family in ("llama", "llama_folded", "gemma2", "qwen3")
    expected = normalized(seen[before], rms, model.cfg.eps)
    if build_bridge_from_module is None and model.cfg.normalization_type == "LN":  # TransformerLens 2
        norm = submodule(model, "blocks.1.ln2")
        expected = expected * norm.w + norm.b
    torch.testing.assert_close(seen[names[0]], expected, atol=1e-4, rtol=1e-4)
    added = seen["blocks.1.hook_resid_post"] - seen[before] - sum(seen[name] for name in attention)
    torch.testing.assert_close(seen[names[1]], added, atol=1e-5, rtol=1e-4)


@for_each("name", ["blocks.1.mlp.hook_in", "blocks.1.hook_mlp_in"])
@for_each("case", typical_models("gpt2", "gpt2_folded", "pythia", "llama", "llama_folded", "gemma2", "qwen3"))
def test_the_mlps_input_is_found_or_refused(case: ModelCase, name: str) -> None:
    """A transcoder of the value after the norm reads exactly what enters the MLP, or is refused with the remedy."""
    model = case.build(dtype=torch.float32)
    transcoder = at(name, "blocks.1.hook_mlp_out", hf_hook_name=AFTER_NORM)
    if case.backend == "HookedTransformer" and not case.family.endswith("_folded"):
        with pytest.raises(DictionaryError, match="Load the model as TransformerBridge"):
            resolve_hooks(model, transcoder)
        return
    names = resolve_hooks(model, transcoder)
    seen, mlp = values_of(model, names)
    assert torch.equal(seen[names[0]], mlp["in"])


@pytest.mark.parametrize("case", typical_models("gpt2", "llama", "gemma2", "pythia"))
def test_hook_mlp_in_of_an_sae_is_the_residual_stream_before_the_norm(case: ModelCase) -> None:
    """That is what TransformerLens calls `hook_mlp_in`; the hook of that name need not fire."""
    model = case.build(dtype=torch.float32)
    (name, _) = resolve_hooks(model, at("blocks.1.hook_mlp_in"))
    assert name == ("blocks.1.hook_resid_pre" if case.family == "pythia" else "blocks.1.hook_resid_mid")
    check_fires(model, random_tokens(model), [name])
    if case.family != "pythia":
        model.set_use_hook_mlp_in(True)
        (switched, _) = resolve_hooks(model, at("blocks.1.hook_mlp_in"))
        seen, _ = values_of(model, (name, switched))
        assert switched == "blocks.1.hook_mlp_in" and torch.equal(seen[name], seen[switched])


SITES = {
    "blocks.1.hook_mlp_out": D_MODEL,
    "blocks.1.mlp.hook_post": D_MLP,
    "blocks.1.mlp.out.hook_in": D_MLP,
    "blocks.1.attn.hook_z": N_HEADS * D_HEAD,
    "blocks.1.attn.o.hook_in": N_HEADS * D_HEAD,
    "blocks.1.hook_attn_out": D_MODEL,
    "blocks.1.hook_resid_pre": D_MODEL,
    "blocks.1.hook_in": D_MODEL,
    "blocks.1.hook_resid_post": D_MODEL,
    "blocks.1.hook_out": D_MODEL,
}


@pytest.mark.parametrize("case", typical_models("gpt2", "llama", "gemma2", "pythia"))
def test_every_site_of_either_class_is_found_and_fires_at_its_width(case: ModelCase) -> None:
    """Names of one class are found on the other; the shape that fires has the width that was checked."""
    model = case.build(dtype=torch.float32)
    for name, width in SITES.items():
        (found, _) = resolve_hooks(model, at(name, width=width))
        shape = check_fires(model, random_tokens(model), [found])[found]
        assert width in (shape[-1], shape[-1] * shape[-2]), name
        with pytest.raises(DictionaryError, match=f"width {width + 1} at {found}, where this model has width {width}"):
            resolve_hooks(model, at(name, width=width + 1))


@pytest.mark.parametrize("case", typical_models("gpt2", "gemma2"))
def test_the_raw_mlp_output_is_the_mlp_output_or_refused(case: ModelCase) -> None:
    """`mlp.hook_out` is before a post norm: no hook point of HookedTransformer has that where there is one."""
    model = case.build(dtype=torch.float32)
    dictionary = at("blocks.1.mlp.hook_out")
    if case.id == "gemma2-HookedTransformer":
        with pytest.raises(DictionaryError, match="before the post norm"):
            resolve_hooks(model, dictionary)
        return
    (name, _) = resolve_hooks(model, dictionary)
    seen, mlp = values_of(model, (name,))
    assert torch.equal(seen[name], mlp["out"])


@pytest.mark.parametrize("case", all_models("gpt2"))
def test_a_place_the_model_lacks_is_refused_with_what_it_has(case: ModelCase) -> None:
    """A layer too many, an unknown site, one head, the output's width and missing hooks are each said."""
    model = case.build(dtype=torch.float32)
    with pytest.raises(DictionaryError, match=r"has 2 layers and nothing under blocks\.7"):
        resolve_hooks(model, at("blocks.7.hook_mlp_out"))
    with pytest.raises(DictionaryError, match=r"hook_elsewhere, which this .* does not have; it has blocks\.1\."):
        resolve_hooks(model, at("blocks.1.hook_elsewhere"))
    with pytest.raises(DictionaryError, match="hook_head_index = 0"):
        resolve_hooks(model, at("blocks.1.attn.hook_z", hook_head_index=0))
    with pytest.raises(DictionaryError, match=r"writes width 5 at blocks\.1\.hook_mlp_out"):
        resolve_hooks(model, at("blocks.1.ln2.hook_normalized", "blocks.1.hook_mlp_out", out=5))
    with pytest.raises(DictionaryError, match=r"hook_out None\. Name both"):
        tensors = {name: getattr(at("x"), name) for name in ("W_enc", "b_enc", "W_dec", "b_dec")}
        resolve_hooks(model, Dictionary("transcoder", **tensors, hook_in="blocks.1.ln2.hook_normalized"))


@pytest.mark.parametrize("case", all_models("gpt2"))
def test_a_hook_that_never_fires_is_refused(case: ModelCase, untouched: Any) -> None:
    """`hook_mlp_in` is in `hook_dict` and switched off; the Bridge of GPT-2 never reaches the joint qkv projection."""
    model = case.build(dtype=torch.float32)
    tokens = random_tokens(model)
    model(tokens)  # TransformerBridge adds hooks of its own in the first forward
    with untouched(model):
        assert check_fires(model, tokens, ["blocks.1.hook_mlp_out"]) == {"blocks.1.hook_mlp_out": (2, 7, D_MODEL)}
        with pytest.raises(UnsupportedModelError, match=r"^blocks\.1\.hook_mlp_in"):
            check_fires(model, tokens, ["blocks.1.hook_mlp_in"])
        with pytest.raises(UnsupportedModelError, match=r"expected the hook point 'blocks\.1\.elsewhere'"):
            check_fires(model, tokens, ["blocks.1.elsewhere"])
        if case.backend == "TransformerBridge":
            with pytest.raises(UnsupportedModelError, match=r"^blocks\.1\.attn\.qkv\.hook_out did not fire"):
                check_fires(model, tokens, ["blocks.1.attn.qkv.hook_out", "blocks.1.hook_mlp_out"])


def test_variance_unexplained_adds_up_over_batches() -> None:
    """Batches of any size give the definition's number; the mean is 1, the target itself 0, large offsets no matter."""
    generator = torch.Generator().manual_seed(0)
    target = 3 * torch.randn(40, 5, generator=generator) + 1000
    guess = target + torch.randn(40, 5, generator=generator)
    wide, wide_guess = target.double(), guess.double()
    expected = float((wide - wide_guess).square().sum() / (wide - wide.mean(0)).square().sum())
    assert fraction_variance_unexplained(target.view(8, 5, 5), guess.view(8, 5, 5)) == pytest.approx(expected, rel=1e-3)
    empty = VarianceSums.measure(target[:0], guess[:0])
    parts = [VarianceSums.measure(target[a:b], guess[a:b]) for a, b in ((0, 1), (1, 17), (17, 40))]
    assert (empty + parts[0] + parts[1] + parts[2] + empty).unexplained == pytest.approx(expected, rel=1e-3)
    assert fraction_variance_unexplained(target, target) == 0
    assert fraction_variance_unexplained(target, target.mean(0).expand(40, 5)) == pytest.approx(1, rel=1e-3)
    with pytest.raises(NumericalError, match="constant over 1 positions"):
        _ = parts[0].unexplained
    with pytest.raises(NumericalError, match="NaN"):
        fraction_variance_unexplained(target, guess * float("nan"))
