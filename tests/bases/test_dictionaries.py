"""Dictionaries give the numbers of their definition, of sae-lens, and of their own files."""

import dataclasses
import json
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.bases.dictionaries import CASES, D_DICT, D_IN, DictionaryCase, K, slow_decode, slow_encode
from tests.loops import for_each
from tl_neuron_circuits._errors import DictionaryError, FileFormatError
from tl_neuron_circuits.bases import Dictionary, load_dictionary, save_dictionary

each_case = for_each("case", CASES, ids=repr)
STANDARD = CASES[0]
LAYER_NORM = next(case for case in CASES if case.name == "standard-layer_norm")


@each_case
def test_a_folder_gives_the_numbers_of_the_definition(case: DictionaryCase, tmp_path: Path) -> None:
    """Features, reconstruction and skip equal loops over features, position by position."""
    dictionary = load_dictionary(case.write(tmp_path / "folder"))
    x = case.inputs()
    features, decoded, whole = dictionary.encode(x), None, dictionary(x)
    decoded = dictionary.decode(features, x)
    assert decoded.shape == whole.shape and features.shape == (3, 5, D_DICT)
    assert 0 < (features != 0).float().mean() < 0.9
    flat_x, flat = x.reshape(15, D_IN), features.reshape(15, D_DICT)
    w_skip = case.tensors().get("W_skip")
    for i in range(15):
        torch.testing.assert_close(flat[i], slow_encode(case, flat_x[i]), atol=1e-5, rtol=1e-5)
        expected = slow_decode(case, flat[i], flat_x[i])
        torch.testing.assert_close(decoded.reshape(15, -1)[i], expected, atol=1e-5, rtol=1e-5)
        expected = expected if w_skip is None else expected + w_skip @ flat_x[i]
        torch.testing.assert_close(whole.reshape(15, -1)[i], expected, atol=1e-5, rtol=1e-5)


@each_case
def test_a_unit_of_a_feature_writes_its_scaled_decoder_row(case: DictionaryCase, tmp_path: Path) -> None:
    """dictionary(x) = decoder_scale(x) * (features @ W_dec) + bias(x) + skip(x), which is what scores are read off."""
    dictionary = load_dictionary(case.write(tmp_path / "folder"))
    x = case.inputs()
    flat = x.flatten(-2) if x.ndim == 4 else x
    rebuilt = dictionary.decoder_scale(flat) * (dictionary.encode(x) @ dictionary.W_dec) + dictionary.bias(flat)
    skip = dictionary.skip(x)
    assert (skip is not None) == ("skip" in case.architecture) == dictionary.has_skip
    rebuilt = rebuilt if skip is None else rebuilt + skip
    torch.testing.assert_close(dictionary(x).reshape(rebuilt.shape), rebuilt, atol=1e-5, rtol=1e-5)


@each_case
def test_saving_and_loading_changes_nothing(case: DictionaryCase, tmp_path: Path) -> None:
    """A saved and loaded dictionary has the same tensors, bit for bit, hooks and numbers."""
    dictionary = load_dictionary(case.write(tmp_path / "first"))
    again = load_dictionary(save_dictionary(dictionary, tmp_path / "deep" / "second"))
    assert (again.hook_in, again.hook_out, again.layer) == (dictionary.hook_in, dictionary.hook_out, 1)
    assert again.is_transcoder == dictionary.is_transcoder == case.is_transcoder
    assert again.tensors().keys() == dictionary.tensors().keys()
    assert all(torch.equal(tensor, again.tensors()[name]) for name, tensor in dictionary.tensors().items())
    assert torch.equal(again(case.inputs()), dictionary(case.inputs()))
    assert again.metadata.get("model_name") == case.metadata.get("model_name")
    assert [entry.name for entry in (tmp_path / "deep").iterdir()] == ["second"]


def test_own_kinds_survive_the_round_trip(tmp_path: Path) -> None:
    """A topk skip transcoder, which sae-lens does not have, is saved and loaded by this package."""
    tensors = DictionaryCase("x", "skip_transcoder").tensors()
    hooks = {"hook_in": "blocks.0.ln2.hook_normalized", "hook_out": "blocks.0.hook_mlp_out"}
    dictionary = Dictionary("topk_skip_transcoder", **tensors, k=K, **hooks)
    again = load_dictionary(save_dictionary(dictionary, tmp_path / "own"))
    x = STANDARD.inputs()
    assert torch.equal(again(x), dictionary(x))
    assert ((again.encode(x) != 0).sum(-1) <= K).all()


@for_each("x_dtype", [torch.float32, torch.bfloat16, torch.float64])
@for_each("dtype", ["float32", "bfloat16", "float64"])
def test_precision_is_the_widest_and_float32_at_least(dtype: str, x_dtype: torch.dtype, tmp_path: Path) -> None:
    """A bfloat16 dictionary on a float32 input computes in float32: only its weights are rounded."""
    dictionary = load_dictionary(STANDARD.write(tmp_path / "folder", dtype=dtype))
    x = STANDARD.inputs().to(x_dtype)
    widest = torch.promote_types(torch.promote_types(getattr(torch, dtype), x_dtype), torch.float32)
    assert dictionary.dtype == getattr(torch, dtype)
    assert dictionary.encode(x).dtype == dictionary(x).dtype == widest
    exact = dictionary.to(dtype=torch.float64)(x.double())
    assert torch.allclose(dictionary(x).double(), exact, atol=1e-5)


def test_heads_are_concatenated_for_any_dictionary_on_hook_z() -> None:
    """The hook's name is enough: the result has the input's heads, and is that of the flat input."""
    tensors = STANDARD.tensors()
    dictionary = Dictionary("standard", **tensors, hook_in="blocks.0.attn.hook_z")
    x = STANDARD.inputs()
    heads = x.unflatten(-1, (2, -1))
    assert torch.equal(dictionary.encode(heads), dictionary.encode(x))
    assert torch.equal(dictionary(heads), dictionary(x).unflatten(-1, (2, -1)))
    with pytest.raises(DictionaryError, match="reads activations of width 8"):
        Dictionary("standard", **tensors, hook_in="blocks.0.hook_mlp_out").encode(heads)


@each_case
def test_weights_follow_the_inputs_device(case: DictionaryCase, tmp_path: Path) -> None:
    """An input elsewhere is answered there, whether or not the dictionary was moved first."""
    dictionary = load_dictionary(case.write(tmp_path / "folder"))
    there = case.inputs().to("meta")
    assert dictionary(there).device == dictionary.encode(there).device == there.device
    assert dictionary.to("meta").W_dec.device == there.device and dictionary.device.type == "cpu"


def test_gradients_reach_the_input_and_no_weight() -> None:
    """Encoding is differentiable in the input, as integrated gradients need it; weights carry no gradient."""
    eye = torch.eye(D_IN)
    identity = Dictionary(
        "standard", eye, eye, torch.zeros(D_IN), b_enc=torch.zeros(D_IN), hook_in="blocks.0.hook_mlp_out"
    )
    x = STANDARD.inputs().abs().requires_grad_()
    assert torch.equal(identity(x), x)
    (gradient,) = torch.autograd.grad(identity(x).sum(), x)
    assert torch.equal(gradient, torch.ones_like(x))


def test_decode_without_the_input_is_refused_where_the_scale_depends_on_it(tmp_path: Path) -> None:
    """Under layer_norm a reconstruction has no scale without its input."""
    dictionary = load_dictionary(LAYER_NORM.write(tmp_path / "folder"))
    assert dictionary.scale_depends_on_input
    with pytest.raises(DictionaryError, match=r"decode\(features, x\)"):
        dictionary.decode(dictionary.encode(LAYER_NORM.inputs()))


def test_a_dead_decoder_row_folds_to_zero_not_nan(tmp_path: Path) -> None:
    """With rescaling, a row of norm 0 gives a feature that is never active, rather than NaN."""
    case = next(case for case in CASES if case.name == "topk-rescaled")
    tensors = case.tensors()
    tensors["W_dec"][0] = 0
    folder = case.write(tmp_path / "folder")
    _save_tensors(tensors, folder)
    dictionary = load_dictionary(folder)
    assert dictionary(case.inputs()).isfinite().all()
    assert (dictionary.encode(case.inputs())[..., 0] == 0).all()


# What is wrong with a file is said.


def _save_tensors(tensors: dict[str, torch.Tensor], folder: Path) -> None:
    from safetensors.torch import save_file

    save_file(tensors, folder / "sae_weights.safetensors")


def _change(folder: Path, **changes: Any) -> None:
    config = json.loads((folder / "cfg.json").read_text())
    (folder / "cfg.json").write_text(json.dumps(config | changes))


def _change_tensor(folder: Path, name: str, value: torch.Tensor | None) -> None:
    tensors = STANDARD.tensors() | ({name: value} if value is not None else {})
    _save_tensors({key: tensor for key, tensor in tensors.items() if value is not None or key != name}, folder)


DAMAGE = {
    "no folder": (lambda f: f.rename(f.with_name("gone")), FileFormatError, "no such folder"),
    "no config": (lambda f: (f / "cfg.json").unlink(), FileFormatError, "cfg.json is missing"),
    "no weights": (lambda f: (f / "sae_weights.safetensors").unlink(), FileFormatError, "safetensors is missing"),
    "config cut": (lambda f: (f / "cfg.json").write_text('{"d_in": 8'), FileFormatError, "is not JSON"),
    "config a list": (lambda f: (f / "cfg.json").write_text("[1]"), FileFormatError, "holds a list"),
    "weights cut": (
        lambda f: (f / "sae_weights.safetensors").write_bytes((f / "sae_weights.safetensors").read_bytes()[:-100]),
        FileFormatError,
        "truncated",
    ),
    "tensor missing": (lambda f: _change_tensor(f, "b_enc", None), DictionaryError, "lacks b_enc"),
    "tensor unknown": (lambda f: _change_tensor(f, "W_skip", torch.ones(8, 8)), DictionaryError, "has W_skip"),
    "wrong shape": (lambda f: _change_tensor(f, "b_enc", torch.ones(3)), DictionaryError, r"should have shape \[20\]"),
    "transposed": (
        lambda f: _change_tensor(f, "W_enc", torch.ones(20, 8)),
        DictionaryError,
        r"cfg.json says \[8, 20\]",
    ),
    "not a number": (
        lambda f: _change_tensor(f, "W_dec", torch.full((20, 8), float("nan"))),
        DictionaryError,
        "160 of 160 numbers of W_dec are NaN",
    ),
    "finetuned": (lambda f: _change_tensor(f, "scaling_factor", torch.ones(20) * 2), DictionaryError, "scaling_factor"),
    "wrong width": (lambda f: _change(f, d_sae=21), DictionaryError, r"cfg.json says \[8, 21\]"),
    "no width": (lambda f: _change(f, d_in=None), DictionaryError, "needs the integer 'd_in'"),
    "temporal": (lambda f: _change(f, architecture="temporal"), DictionaryError, "earlier positions"),
    "matching pursuit": (lambda f: _change(f, architecture="matching_pursuit"), DictionaryError, "as_dictionary"),
    "checkpoint": (lambda f: _change(f, architecture="batchtopk"), DictionaryError, "lacks threshold"),
    "unknown kind": (lambda f: _change(f, architecture="novel"), DictionaryError, "it is unknown. Known architectures"),
    "unknown norm": (
        lambda f: _change(f, normalize_activations="l2"),
        DictionaryError,
        "normalize_activations is 'l2'",
    ),
    "unknown dtype": (lambda f: _change(f, dtype="int8"), DictionaryError, "dtype 'int8'"),
    "no version": (lambda f: _change(f, sae_lens_version="new"), DictionaryError, "not a version number"),
}


@for_each("what", DAMAGE)
def test_a_damaged_or_foreign_folder_is_a_clear_error(what: str, tmp_path: Path) -> None:
    """Each kind of damage raises the right error, which names the folder and the fault."""
    damage, error, message = DAMAGE[what]
    folder = STANDARD.write(tmp_path / "sae")
    damage(folder)
    with pytest.raises(error, match=message) as caught:
        load_dictionary(folder)
    assert str(folder) in str(caught.value)


def test_saving_never_replaces_by_accident(tmp_path: Path) -> None:
    """An existing dictionary is kept unless `overwrite`, a foreign folder always."""
    first = load_dictionary(STANDARD.write(tmp_path / "sae"))
    second = dataclasses.replace(first, b_dec=first.b_dec + 1)
    with pytest.raises(FileFormatError, match="overwrite=True"):
        save_dictionary(second, tmp_path / "sae")
    assert torch.equal(load_dictionary(tmp_path / "sae").b_dec, first.b_dec)
    save_dictionary(second, tmp_path / "sae", overwrite=True)
    assert torch.equal(load_dictionary(tmp_path / "sae").b_dec, second.b_dec)
    (tmp_path / "sae" / "notes.txt").write_text("mine")
    with pytest.raises(FileFormatError, match="choose another path"):
        save_dictionary(first, tmp_path / "sae", overwrite=True)
    assert (tmp_path / "sae" / "notes.txt").exists()


def test_a_failed_save_leaves_nothing_behind(tmp_path: Path) -> None:
    """Metadata that JSON cannot hold is refused before anything is written."""
    dictionary = load_dictionary(STANDARD.write(tmp_path / "in" / "sae"))
    with pytest.raises(DictionaryError, match="JSON"):
        save_dictionary(dataclasses.replace(dictionary, metadata={"x": object()}), tmp_path / "out" / "sae")
    assert not (tmp_path / "out").exists()


def test_what_does_not_fit_together_is_refused_on_construction() -> None:
    """Shapes, settings and kinds are checked before any number is computed."""
    t = STANDARD.tensors()
    with pytest.raises(DictionaryError, match="needs the tensor b_enc"):
        Dictionary("standard", t["W_enc"], t["W_dec"], t["b_dec"])
    with pytest.raises(DictionaryError, match="0 < k <= 20, got k = 21"):
        Dictionary("topk", **t, k=21)
    with pytest.raises(DictionaryError, match="no meaning for a transcoder"):
        Dictionary("transcoder", **t, apply_b_dec_to_input=True)
    with pytest.raises(DictionaryError, match="share one floating dtype"):
        Dictionary("standard", **(t | {"b_dec": t["b_dec"].half()}))
    with pytest.raises(DictionaryError, match="no layer in hook_out = None"):
        _ = Dictionary("transcoder", **t, hook_in="blocks.0.ln2.hook_normalized").layer
    with pytest.raises(DictionaryError, match="reads activations of width 8"):
        Dictionary("standard", **t).encode(torch.ones(2, 7))
