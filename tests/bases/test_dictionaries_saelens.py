"""The same numbers as sae-lens 6 for every kind it saves, in files and live; skipped where it is not installed."""

import json
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

from tests.bases.dictionaries import CASES, D_DICT, D_IN, DictionaryCase, K
from tests.loops import for_each
from tl_neuron_circuits._errors import DictionaryError
from tl_neuron_circuits.bases import Dictionary, as_dictionary, load_dictionary, save_dictionary

with warnings.catch_warnings():
    warnings.simplefilter("ignore")  # what sae-lens and its dependencies warn of while they are imported
    sae_lens = pytest.importorskip("sae_lens")

pytestmark = pytest.mark.filterwarnings("ignore:.*:DeprecationWarning:sae_lens")
each_case = for_each("case", CASES, ids=repr)


def make_sae(case: DictionaryCase, **settings: Any) -> Any:
    """A live object of sae-lens with this case's weights."""
    sae_class, config_class = sae_lens.registry.get_sae_class(case.architecture)
    metadata = sae_lens.saes.sae.SAEMetadata(**case.metadata)
    sae = sae_class(config_class(**(case.config | settings), metadata=metadata))
    sae.load_state_dict(case.tensors())
    return sae.eval()


@torch.no_grad()
def assert_same(ours: Dictionary, theirs: Any, x: torch.Tensor, tolerance: float = 1e-5) -> None:
    """Encode, decode and forward agree; `decode` of sae-lens uses what its last `encode` saw."""
    features = theirs.encode(x)
    decoded = theirs.decode(features)
    whole = theirs(x)
    assert features.count_nonzero() and not torch.equal(features, torch.zeros_like(features))
    torch.testing.assert_close(ours.encode(x), features, atol=tolerance, rtol=tolerance)
    torch.testing.assert_close(ours.decode(features, x), decoded, atol=tolerance, rtol=tolerance)
    torch.testing.assert_close(ours(x), whole, atol=tolerance, rtol=tolerance)


@each_case
def test_loads_what_sae_lens_saves(case: DictionaryCase, tmp_path: Path) -> None:
    """A folder of `save_model` gives the numbers of the object that wrote it, skip included."""
    sae = make_sae(case)
    sae.save_model(tmp_path / "sae")
    ours = load_dictionary(tmp_path / "sae")
    assert_same(ours, sae, case.inputs())
    assert (ours.hook_in, ours.hook_out) == (
        case.metadata["hook_name"],
        case.metadata.get("hook_name_out", case.metadata["hook_name"]),
    )


@each_case
def test_sae_lens_loads_what_we_save(case: DictionaryCase, tmp_path: Path) -> None:
    """`SAE.load_from_disk` reads our folder and computes the same."""
    ours = load_dictionary(case.write(tmp_path / "first"))
    theirs = sae_lens.SAE.load_from_disk(save_dictionary(ours, tmp_path / "second"))
    assert theirs.cfg.architecture() == case.architecture
    assert theirs.cfg.metadata.hook_name == ours.hook_in
    assert_same(ours, theirs, case.inputs())


@each_case
def test_a_live_object_equals_its_file(case: DictionaryCase, tmp_path: Path) -> None:
    """`as_dictionary` of an object and `load_dictionary` of its folder are the same dictionary."""
    sae = make_sae(case)
    sae.save_model(tmp_path / "sae")
    live, loaded = as_dictionary(sae), load_dictionary(tmp_path / "sae")
    assert_same(live, sae, case.inputs())
    assert live.kind == loaded.kind == case.architecture
    assert torch.equal(live(case.inputs()), loaded(case.inputs()))
    assert not any(tensor.requires_grad for tensor in live.tensors().values())


@pytest.mark.parametrize("rescale", [False, True])
@pytest.mark.parametrize("name", ["BatchTopK", "MatryoshkaBatchTopK"])
def test_batch_topk_is_saved_as_jumprelu(name: str, rescale: bool, tmp_path: Path) -> None:
    """Trained batch-topk SAEs, matryoshka included, come back as jumprelu with one threshold."""
    settings: dict[str, Any] = {"d_in": D_IN, "d_sae": D_DICT, "k": K, "rescale_acts_by_decoder_norm": rescale}
    settings |= {"matryoshka_widths": [5, D_DICT]} if name.startswith("Matryoshka") else {}
    trained = getattr(sae_lens, f"{name}TrainingSAE")(getattr(sae_lens, f"{name}TrainingSAEConfig")(**settings))
    tensors = CASES[0].tensors()
    trained.load_state_dict(tensors | {"topk_threshold": torch.tensor(0.7, dtype=torch.double)})
    trained.save_inference_model(tmp_path / "sae")
    ours, theirs = load_dictionary(tmp_path / "sae"), sae_lens.SAE.load_from_disk(tmp_path / "sae")
    assert ours.kind == "jumprelu" and torch.allclose(ours.threshold, torch.tensor(0.7))
    assert_same(ours, theirs, CASES[0].inputs())
    with pytest.raises(DictionaryError, match="save_inference_model"):
        as_dictionary(trained, hook_in="blocks.0.hook_mlp_out")


OLD = {
    "relu": {"hook_point": "blocks.0.hook_resid_pre"},
    "hook_z": {"hook_point": "blocks.0.attn.hook_z", "activation_fn_str": "relu"},
    "topk": {"hook_name": "blocks.0.hook_mlp_out", "activation_fn_str": "topk", "activation_fn_kwargs": {"k": K}},
    "average": {"hook_name": "blocks.0.hook_mlp_out", "normalize_activations": True, "sae_lens_version": "3.2.0"},
    "layer_norm": {"hook_name": "blocks.0.hook_mlp_out", "normalize_activations": "layer_norm"},
    "kept": {"hook_name": "blocks.0.hook_mlp_out", "apply_b_dec_to_input": False, "finetuning_scaling_factor": False},
}


@for_each("old", OLD)
def test_reads_the_layout_before_sae_lens_6(old: str, tmp_path: Path) -> None:
    """An old `cfg.json` without a version means the same to us as to sae-lens 6.54."""
    config = {"d_in": D_IN, "d_sae": D_DICT, "dtype": "torch.float32", "device": "cpu", "model_name": "gpt2-small"}
    (tmp_path / "cfg.json").write_text(json.dumps(config | OLD[old]))
    ones = {"scaling_factor": torch.ones(D_DICT)} if old == "average" else {}
    save_file(CASES[0].tensors() | ones, tmp_path / "sae_weights.safetensors")
    ours, theirs = load_dictionary(tmp_path), sae_lens.SAE.load_from_disk(tmp_path)
    x = CASES[0].inputs()
    assert_same(ours, theirs, x.unflatten(-1, (2, -1)) if old == "hook_z" else x)
    assert ours.kind == theirs.cfg.architecture() and ours.hook_in == theirs.cfg.metadata.hook_name
    assert ours.metadata["prepend_bos"] is True and ours.metadata["model_name"] == "gpt2-small"
    again = sae_lens.SAE.load_from_disk(save_dictionary(ours, tmp_path / "new"))
    assert again.cfg.metadata.hook_name == ours.hook_in
    assert_same(ours, again, x.unflatten(-1, (2, -1)) if old == "hook_z" else x)


def test_an_old_activation_that_sae_lens_would_drop_is_refused(tmp_path: Path) -> None:
    """sae-lens 6 loads tanh-relu as relu; a wrong number is worse than an error."""
    config = {"d_in": D_IN, "d_sae": D_DICT, "dtype": "float32", "activation_fn_str": "tanh-relu"}
    (tmp_path / "cfg.json").write_text(json.dumps(config))
    save_file(CASES[0].tensors(), tmp_path / "sae_weights.safetensors")
    with pytest.raises(DictionaryError, match="tanh-relu"):
        load_dictionary(tmp_path)


def test_a_bfloat16_file_is_computed_more_precisely_than_by_sae_lens(tmp_path: Path) -> None:
    """On a float32 input sae-lens rounds to bfloat16 throughout, we only the weights; both agree to bfloat16."""
    case = next(case for case in CASES if case.name == "jumprelu_skip_transcoder")
    make_sae(case, dtype="bfloat16").save_model(tmp_path / "sae")
    ours, theirs = load_dictionary(tmp_path / "sae"), sae_lens.SAE.load_from_disk(tmp_path / "sae")
    assert ours.dtype == theirs.W_enc.dtype == torch.bfloat16
    x = case.inputs().bfloat16().float()
    exact = ours.to(dtype=torch.float64)
    close = (ours.encode(x) != 0) == (theirs.encode(x.bfloat16()) != 0)  # a pre-activation may round past its threshold
    assert close.float().mean() > 0.99
    assert (ours(x) - exact(x)).abs().max() < 1e-5 < (theirs(x.bfloat16()) - exact(x)).abs().max() < 1


def test_a_matching_pursuit_object_keeps_its_own_encoder() -> None:
    """A live object of a kind without a file form is used through its encode, and cannot be saved."""
    config = sae_lens.MatchingPursuitSAEConfig(d_in=D_IN, d_sae=D_DICT, max_iterations=4, residual_threshold=0.01)
    sae = sae_lens.MatchingPursuitSAE(config)
    x = CASES[0].inputs()
    ours = as_dictionary(sae, hook_in="blocks.0.hook_mlp_out", hook_out="blocks.0.hook_mlp_out")
    assert_same(ours, sae, x)
    assert ours.kind == "custom"


def test_a_temporal_object_is_refused() -> None:
    """Its reconstruction is not the decoder rows times the features."""
    temporal = sae_lens.TemporalSAE(sae_lens.TemporalSAEConfig(d_in=D_IN, d_sae=D_DICT, n_heads=2, bottleneck_factor=1))
    with pytest.raises(DictionaryError, match="earlier positions"):
        as_dictionary(temporal, hook_in="blocks.0.hook_mlp_out", hook_out="blocks.0.hook_mlp_out")


def test_a_live_object_without_hooks_is_refused() -> None:
    """A transcoder that names only its input is not taken for an SAE."""
    case = next(case for case in CASES if case.architecture == "transcoder")
    sae = make_sae(case)
    sae.cfg.metadata.hook_name_out = None
    with pytest.raises(DictionaryError, match="does not say where it belongs"):
        as_dictionary(sae)
    named = as_dictionary(sae, hook_out="blocks.1.hook_mlp_out")
    assert (named.hook_in, named.hook_out) == ("blocks.1.ln2.hook_normalized", "blocks.1.hook_mlp_out")
