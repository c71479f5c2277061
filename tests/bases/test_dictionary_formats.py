"""Other programs' dictionaries: files laid out as they write them give what their own code computes, and come back.

The layouts were checked on files of circuit-tracer 0.5.0, eai-sparsify 1.3.3 and sae-lens 6.54.12; the encoders beside
them are those programs' formulas.
"""

import json
from collections.abc import Callable
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
import yaml
from safetensors.torch import save_file
from torch import Tensor

from tests.loops import for_each
from tl_neuron_circuits import as_dictionary, load_dictionary, save_dictionary
from tl_neuron_circuits._errors import DictionaryError, FileFormatError, SettingsError
from tl_neuron_circuits.bases import Dictionary, load_dictionaries
from tl_neuron_circuits.bases._dictionary_basis import DictionarySite

D_IN, D_DICT = 6, 10
Tensors = dict[str, Tensor]


def random_tensors(seed: int = 0) -> Tensors:
    generator = torch.Generator().manual_seed(seed)
    make = lambda *shape: torch.randn(*shape, generator=generator)  # noqa: E731
    return {
        "W_enc": make(D_IN, D_DICT), "W_dec": make(D_DICT, D_IN), "b_enc": make(D_DICT), "b_dec": make(D_IN),
        "threshold": make(D_DICT).abs() / 2, "W_skip": make(D_IN, D_IN),
    }  # fmt: skip


def pick(tensors: Tensors, *names: str) -> Tensors:
    return {name: tensors[name].contiguous() for name in names}


def write_circuit_tracer(folder: Path, *, threshold: bool, skip: bool) -> list[Tensors]:
    folder.mkdir()
    layers = [random_tensors(layer) for layer in range(11)]
    for layer, t in enumerate(layers):
        tensors = pick(t, "W_dec", "b_enc", "b_dec") | {"W_enc": t["W_enc"].T.contiguous()}
        tensors |= {"activation_function.threshold": t["threshold"]} if threshold else {}
        save_file(tensors | ({"W_skip": t["W_skip"]} if skip else {}), folder / f"layer_{layer}.safetensors")
    config = {
        "model_kind": "transcoder_set",
        "feature_input_hook": "mlp.hook_in",
        "feature_output_hook": "mlp.hook_out",
    }
    (folder / "config.yaml").write_text(yaml.safe_dump({**config, "scan": "me/mine", "model_name": "gpt2"}))
    return layers


@pytest.mark.parametrize("threshold", [False, True])
@pytest.mark.parametrize("skip", [False, True])
def test_a_folder_of_circuit_tracer_is_one_transcoder_per_layer(tmp_path: Path, threshold: bool, skip: bool) -> None:
    layers = write_circuit_tracer(tmp_path / "set", threshold=threshold, skip=skip)
    read = load_dictionaries(tmp_path / "set")
    assert [d.layer for d in read] == list(range(11))  # layer 2 before layer 10
    x = torch.randn(5, D_IN, generator=torch.Generator().manual_seed(1))
    for d, t in zip(read, layers, strict=True):
        pre = x @ t["W_enc"] + t["b_enc"]
        features = pre * (pre > t["threshold"]) if threshold else pre.relu()
        torch.testing.assert_close(d.encode(x), features)
        expected = features @ t["W_dec"] + t["b_dec"] + (x @ t["W_skip"].T if skip else 0)
        torch.testing.assert_close(d(x), expected)
    assert (read[3].hook_in, read[3].hook_out) == ("blocks.3.mlp.hook_in", "blocks.3.mlp.hook_out")
    assert_comes_back(read[3], tmp_path / "back")


def test_files_on_the_hub_are_taken_from_its_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """`hf://owner/repository/path?revision=x`, as circuit-tracer's configurations name them; offline it says so."""
    write_circuit_tracer(tmp_path / "set", threshold=True, skip=False)
    config = yaml.safe_load((tmp_path / "set" / "config.yaml").read_text())
    expected = load_dictionaries(tmp_path / "set")
    names = [f"hf://me/mine/deep/layer_{layer}.safetensors?revision=v2" for layer in range(len(expected))]
    (tmp_path / "hub").mkdir()
    (tmp_path / "hub" / "config.yaml").write_text(yaml.safe_dump(config | {"transcoders": names}))
    with pytest.raises(FileFormatError, match=r"cannot get hf://me/mine/deep/layer_0"):
        load_dictionaries(tmp_path / "hub")
    asked = []

    def from_cache(repo_id: str, filename: str, revision: str | None) -> str:
        asked.append((repo_id, revision))
        return str(tmp_path / "set" / Path(filename).name)

    monkeypatch.setattr("huggingface_hub.hf_hub_download", from_cache)
    found = load_dictionaries(tmp_path / "hub")
    assert asked == [("me/mine", "v2")] * len(expected)
    for one, other in zip(found, expected, strict=True):
        assert torch.equal(one.W_enc, other.W_enc) and one.hook_in == other.hook_in
    (tmp_path / "hub" / "config.yaml").write_text(yaml.safe_dump(config | {"transcoders": ["hf://mine"]}))
    with pytest.raises(FileFormatError, match="owner/repository/path"):
        load_dictionaries(tmp_path / "hub")


def assert_comes_back(dictionary: Dictionary, path: Path) -> None:
    """Written as SAELens writes, and read again: the same in every tensor, hook and kind."""
    back = load_dictionary(save_dictionary(dictionary, path))
    assert (back.kind, back.hook_in, back.hook_out, back.k) == (
        dictionary.kind, dictionary.hook_in, dictionary.hook_out, dictionary.k,
    )  # fmt: skip
    assert back.apply_b_dec_to_input == dictionary.apply_b_dec_to_input
    for name, tensor in dictionary.tensors().items():
        assert torch.equal(back.tensors()[name], tensor)


def write_cross_layer(folder: Path, n_layers: int = 3, *, threshold: bool = False) -> list[Tensors]:
    folder.mkdir()
    layers = []
    for layer in range(n_layers):
        t = random_tensors(layer)
        t["decoder"] = torch.randn(D_DICT, n_layers - layer, D_IN, generator=torch.Generator().manual_seed(layer + 7))
        encoder = {
            f"W_enc_{layer}": t["W_enc"].T.contiguous(),
            f"b_enc_{layer}": t["b_enc"],
            f"b_dec_{layer}": t["b_dec"],
        }
        save_file(
            encoder | ({f"threshold_{layer}": t["threshold"]} if threshold else {}),
            folder / f"W_enc_{layer}.safetensors",
        )
        save_file({f"W_dec_{layer}": t["decoder"]}, folder / f"W_dec_{layer}.safetensors")
        layers.append(t)
    hooks = {"feature_input_hook": "hook_resid_mid", "feature_output_hook": "hook_mlp_out"}
    (folder / "config.yaml").write_text(yaml.safe_dump({"model_kind": "cross_layer_transcoder", **hooks}))
    return layers


@pytest.mark.parametrize("threshold", [False, True])
def test_a_cross_layer_transcoder_writes_to_every_later_layer(tmp_path: Path, threshold: bool) -> None:
    layers = write_cross_layer(tmp_path / "clt", threshold=threshold)
    read = load_dictionaries(tmp_path / "clt")
    assert [d.n_later for d in read] == [2, 1, 0] and all(d.is_transcoder for d in read)
    for d, t in zip(read, layers, strict=True):
        assert torch.equal(d.W_dec, t["decoder"][:, 0])
        assert d.W_dec_later is not None and torch.equal(d.W_dec_later, t["decoder"][:, 1:].transpose(0, 1))
        assert (d.threshold is not None) == threshold
        assert_comes_back(d, tmp_path / d.name.replace(" ", "-"))


@for_each("site", ["res", "mlp", "att", "transcoders", "nowhere"])
def test_gemma_scope_arrays_take_their_hooks_from_the_path(tmp_path: Path, site: str) -> None:
    t = random_tensors()
    path = tmp_path / f"gemma-scope-2b-pt-{site}" / "layer_7" / "width_16k" / "average_l0_80" / "params.npz"
    path.parent.mkdir(parents=True)
    np.savez(path, **{name: t[name].numpy() for name in ("W_enc", "W_dec", "b_enc", "b_dec", "threshold")})
    d = load_dictionary(path)
    hooks = {
        "res": ("hook_resid_post", "hook_resid_post"), "mlp": ("hook_mlp_out", "hook_mlp_out"),
        "att": ("attn.hook_z", "attn.hook_z"), "transcoders": ("ln2.hook_normalized", "hook_mlp_out"),
    }.get(site)  # fmt: skip
    assert (d.hook_in, d.hook_out) == ((None, None) if hooks is None else tuple(f"blocks.7.{hook}" for hook in hooks))
    x = torch.randn(5, D_IN, generator=torch.Generator().manual_seed(1))
    pre = x @ t["W_enc"] + t["b_enc"]
    torch.testing.assert_close(d.encode(x), pre.relu() * (pre > t["threshold"]))
    torch.testing.assert_close(d(x), d.encode(x) @ t["W_dec"] + t["b_dec"])
    assert load_dictionaries(path.parent)[0].kind == load_dictionaries(path.parents[1])[0].kind == d.kind
    if hooks is None:
        d = as_dictionary(d, hook_in="blocks.7.ln2.hook_normalized", hook_out="blocks.7.hook_mlp_out")
    assert_comes_back(d, tmp_path / "back")


@pytest.mark.parametrize("kind", ["sae", "transcoder", "skip"])
def test_sparsify_folders_are_read(tmp_path: Path, kind: str) -> None:
    t = random_tensors()
    for layer in (2, 10):
        folder = tmp_path / "run" / f"layers.{layer}.mlp"
        folder.mkdir(parents=True)
        tensors = {"encoder.weight": t["W_enc"].T.contiguous(), "encoder.bias": t["b_enc"], **pick(t, "W_dec", "b_dec")}
        save_file(tensors | (pick(t, "W_skip") if kind == "skip" else {}), folder / "sae.safetensors")
        config = {"activation": "topk", "k": 3, "d_in": D_IN, "num_latents": D_DICT, "transcode": kind != "sae"}
        (folder / "cfg.json").write_text(json.dumps(config | {"skip_connection": kind == "skip"}))
    read = load_dictionaries(tmp_path / "run")
    assert [d.layer for d in read] == [2, 10]
    d = read[0]
    assert (d.hook_in, d.hook_out) == (
        "blocks.2.mlp." + ("hook_out" if kind == "sae" else "hook_in"),
        "blocks.2.mlp.hook_out",
    )
    x = torch.randn(5, D_IN, generator=torch.Generator().manual_seed(1))
    pre = ((x - t["b_dec"] if kind == "sae" else x) @ t["W_enc"] + t["b_enc"]).relu()
    top = pre.topk(3).indices
    features = torch.zeros_like(pre).scatter(1, top, pre.gather(1, top))
    expected = features @ t["W_dec"] + t["b_dec"] + (x @ t["W_skip"].T if kind == "skip" else 0)
    torch.testing.assert_close(d(x), expected)
    assert_comes_back(d, tmp_path / "back")


class TracerLayer:
    """A layer as circuit-tracer holds it."""

    def __init__(self, t: Tensors, activation_function: Any) -> None:
        self.W_enc, self.W_dec, self.b_enc, self.b_dec = t["W_enc"].T, t["W_dec"], t["b_enc"], t["b_dec"]
        self.W_skip, self.activation_function = None, activation_function

    def encode(self, x: Tensor) -> Tensor:
        return self.activation_function(x @ self.W_enc.T + self.b_enc)

    def decode(self, features: Tensor, input_acts: Tensor | None = None) -> Tensor:
        return features @ self.W_dec + self.b_dec

    def __call__(self, x: Tensor) -> Tensor:
        return self.decode(self.encode(x))


class TopK:
    """circuit-tracer's: what it keeps may be negative."""

    k = 7

    def __call__(self, x: Tensor) -> Tensor:
        index = x.topk(self.k).indices
        return torch.zeros_like(x).scatter(-1, index, x.gather(-1, index))


class JumpReLU:
    def __init__(self, threshold: Tensor) -> None:
        self.threshold = threshold

    def __call__(self, x: Tensor) -> Tensor:
        return x * (x > self.threshold)


@pytest.mark.parametrize("activation", ["relu", "jumprelu", "topk"])
def test_objects_of_circuit_tracer_are_told_apart_by_their_activation(activation: str) -> None:
    t = random_tensors()
    functions: dict[str, Callable] = {
        "relu": torch.nn.functional.relu,
        "jumprelu": JumpReLU(t["threshold"]),
        "topk": TopK(),
    }
    source = TracerLayer(t, functions[activation])
    hooks = {"hook_in": "blocks.0.hook_resid_mid", "hook_out": "blocks.0.hook_mlp_out"}
    d = as_dictionary(source, **hooks)
    kinds = {"relu": "transcoder", "jumprelu": "jumprelu_transcoder", "topk": "signed_topk_transcoder"}
    assert d.kind == kinds[activation]
    x = torch.randn(9, D_IN, generator=torch.Generator().manual_seed(1))
    torch.testing.assert_close(d.encode(x), source.encode(x))
    assert bool((d.encode(x) < 0).any()) == (activation == "topk")
    other = TracerLayer(t, lambda pre: pre.relu() ** 2)  # none of its own: kept as it is
    assert as_dictionary(other, **hooks).kind == "custom"


@pytest.mark.parametrize("architecture", ["batchtopk", "matryoshka_batchtopk"])
@pytest.mark.parametrize("rescale", [False, True])
def test_training_checkpoints_are_jumprelu_at_the_threshold_of_training(
    tmp_path: Path, architecture: str, rescale: bool
) -> None:
    t = random_tensors()
    save_file(
        pick(t, "W_enc", "W_dec", "b_enc", "b_dec") | {"topk_threshold": torch.tensor(0.7)},
        tmp_path / "sae_weights.safetensors",
    )
    config = {"d_in": D_IN, "d_sae": D_DICT, "dtype": "float32", "k": 4.5, "architecture": architecture,
              "rescale_acts_by_decoder_norm": rescale, "apply_b_dec_to_input": True, "sae_lens_version": "6.54.12",
              "metadata": {"hook_name": "blocks.1.hook_mlp_out"}}  # fmt: skip
    (tmp_path / "cfg.json").write_text(json.dumps(config))
    d = load_dictionary(tmp_path)
    x = torch.randn(5, D_IN, generator=torch.Generator().manual_seed(1))
    norm = t["W_dec"].norm(dim=1) if rescale else torch.ones(D_DICT)
    pre = ((x - t["b_dec"]) @ t["W_enc"] + t["b_enc"]) * norm
    features = pre * (pre > 0.7)
    torch.testing.assert_close(d.encode(x), features)
    torch.testing.assert_close(d(x), features @ (t["W_dec"] / norm[:, None]) + t["b_dec"])


def test_a_name_that_is_no_path_is_a_release_of_sae_lens(monkeypatch: pytest.MonkeyPatch) -> None:
    t = random_tensors()

    class SAE:
        @staticmethod
        def from_pretrained(release: str, sae_id: str) -> Any:
            layer = int(sae_id[-1])
            hooks = {"hook_in": f"blocks.{layer}.hook_mlp_out"}
            return Dictionary(
                "standard", **pick(t, "W_enc", "W_dec", "b_enc", "b_dec"), **hooks, name=f"{release}:{sae_id}"
            )

    directory = ModuleType("sae_lens.loading.pretrained_saes_directory")
    known = {"our-release": SimpleNamespace(saes_map={"layer_0": "a", "layer_1": "b"})}
    vars(directory)["get_pretrained_saes_directory"] = lambda: known
    package = ModuleType("sae_lens")
    vars(package)["SAE"] = SAE
    for name, module in (("sae_lens", package), ("sae_lens.loading", ModuleType("sae_lens.loading")),
                         ("sae_lens.loading.pretrained_saes_directory", directory)):  # fmt: skip
        monkeypatch.setitem(__import__("sys").modules, name, module)
    assert [d.name for d in load_dictionaries("our-release")] == ["our-release:layer_0", "our-release:layer_1"]
    assert [d.layer for d in load_dictionaries("our-release/layer_1")] == [1]
    with pytest.raises(FileFormatError, match="Did you mean our-release"):
        load_dictionaries("our-releas")
    with pytest.raises(FileFormatError, match="Did you mean layer_1"):
        load_dictionaries("our-release/layer_7")


def test_damaged_and_unknown_files_say_so(tmp_path: Path) -> None:
    write_circuit_tracer(tmp_path / "set", threshold=True, skip=False)
    (tmp_path / "set" / "layer_4.safetensors").write_bytes(b"short")
    with pytest.raises(FileFormatError, match=r"layer_4.safetensors is missing, truncated"):
        load_dictionaries(tmp_path / "set")
    (tmp_path / "set" / "config.yaml").write_text("model_kind: transcoder_set\n")
    with pytest.raises(FileFormatError, match="feature_input_hook"):
        load_dictionaries(tmp_path / "set")
    (tmp_path / "set" / "config.yaml").unlink()
    with pytest.raises(FileFormatError, match=r"no config.yaml"):
        load_dictionaries(tmp_path / "set")
    write_cross_layer(tmp_path / "clt")
    (tmp_path / "clt" / "W_enc_2.safetensors").unlink()
    with pytest.raises(DictionaryError, match=r"W_dec_0 should have shape \[d_dict, 2, d_out\]"):
        load_dictionaries(tmp_path / "clt")
    np.savez(tmp_path / "params.npz", W_enc=np.zeros((2, 3)))
    with pytest.raises(FileFormatError, match="arrays"):
        load_dictionary(tmp_path / "params.npz")
    with pytest.raises(FileFormatError, match="found none"):
        (tmp_path / "empty").mkdir()
        load_dictionaries(tmp_path / "empty")
    t = random_tensors()
    negative = {name: t[name].numpy() for name in ("W_enc", "W_dec", "b_enc", "b_dec")}
    np.savez(tmp_path / "params.npz", **negative, threshold=-t["threshold"].numpy())
    with pytest.raises(DictionaryError, match="10 thresholds are below zero"):
        load_dictionary(tmp_path / "params.npz")


def private_memory() -> int:
    """Bytes of this process that no file backs."""
    (line,) = (row for row in Path("/proc/self/status").read_text().splitlines() if row.startswith("RssAnon"))
    return 1024 * int(line.split()[1])


@pytest.mark.parametrize("kind", ["set", "cross-layer"])
def test_lazy_weights_stay_in_their_files_and_give_the_same(kind: str, tmp_path: Path) -> None:
    folder = tmp_path / kind
    if kind == "set":
        write_circuit_tracer(folder, threshold=True, skip=True)
    else:
        write_cross_layer(folder, threshold=True)
    x = torch.randn(2, 5, D_IN, generator=torch.Generator().manual_seed(1))
    for lazy, eager in zip(load_dictionaries(folder, lazy=True), load_dictionaries(folder), strict=True):
        assert lazy.lazy and not eager.lazy and lazy.W_enc.mT.is_contiguous()
        for name, tensor in eager.tensors().items():
            assert torch.equal(lazy.tensors()[name], tensor)
        assert DictionarySite(lazy, "in", "out", 0).identity == DictionarySite(eager, "in", "out", 0).identity
        torch.testing.assert_close(lazy.encode(x), eager.encode(x))
        torch.testing.assert_close(lazy(x), eager(x))
        features = eager.encode(x).requires_grad_(True)  # inactive features have a gradient too
        (found,) = torch.autograd.grad(lazy.decode(features, x).sum(), features)
        (expected,) = torch.autograd.grad(eager.decode(features, x).sum(), features)
        torch.testing.assert_close(found, expected)
        silent = torch.zeros(2, lazy.d_dict)
        torch.testing.assert_close(lazy.decode(silent, x[0, :2]), eager.decode(silent, x[0, :2]))
        assert_comes_back(lazy, tmp_path / f"{kind}-{lazy.layer}")


@pytest.mark.skipif(not Path("/proc/self/status").is_file(), reason="memory is read from /proc")
def test_lazy_weights_take_no_memory_of_their_own(tmp_path: Path) -> None:
    d_dict, width, megabyte = 65536, 256, 2**20  # 64 MB a matrix: blocks that malloc maps, and gives back when freed
    tensors = {"W_enc": torch.randn(d_dict, width), "W_dec": torch.randn(d_dict, width)}
    tensors |= {"b_enc": torch.full((d_dict,), -30.0), "b_dec": torch.zeros(width)}
    save_file(tensors, tmp_path / "layer_0.safetensors")
    hooks = {"feature_input_hook": "hook_resid_mid", "feature_output_hook": "hook_mlp_out"}
    (tmp_path / "config.yaml").write_text(yaml.safe_dump(hooks))
    del tensors
    before = private_memory()
    (lazy,) = load_dictionaries(tmp_path, lazy=True)
    after = lazy(torch.randn(4, width)) is not None and private_memory()
    (eager,) = load_dictionaries(tmp_path)
    assert after - before < 32 * megabyte <= private_memory() - after and eager.W_enc.is_contiguous()


def test_formats_that_are_read_whole_refuse_to_be_lazy(tmp_path: Path) -> None:
    folder = save_dictionary(
        Dictionary("standard", torch.eye(3), torch.eye(3), torch.zeros(3), torch.zeros(3)), tmp_path
    )
    for path in (folder, [folder]):
        with pytest.raises(SettingsError, match="Leave lazy out"):
            load_dictionaries(path, lazy=True)
    with pytest.raises(FileFormatError, match="nowhere"):
        load_dictionaries(tmp_path / "nowhere", lazy=True)
