"""Random dictionaries of every kind: tensors, hand-written SAELens folders, and loops close to the definition."""

import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor

D_IN, D_DICT, D_OUT, K, N_HEADS = 8, 20, 6, 3, 2


@dataclass(frozen=True)
class DictionaryCase:
    """One kind with one set of settings, named as SAELens names them."""

    name: str
    architecture: str
    settings: dict[str, Any] = field(default_factory=dict)

    def __repr__(self) -> str:
        return self.name

    @property
    def is_transcoder(self) -> bool:
        return "transcoder" in self.architecture

    @property
    def needs_k(self) -> bool:
        return "topk" in self.architecture

    @property
    def config(self) -> dict[str, Any]:
        """The settings that a constructor of sae-lens takes and `cfg.json` holds."""
        config = {"d_in": D_IN, "d_sae": D_DICT, "apply_b_dec_to_input": not self.is_transcoder}
        config |= {"d_out": D_OUT} if self.is_transcoder else {}
        config |= {"k": K} if self.needs_k else {}
        return config | self.settings

    @property
    def metadata(self) -> dict[str, Any]:
        if self.is_transcoder:
            return {"hook_name": "blocks.1.ln2.hook_normalized", "hook_name_out": "blocks.1.hook_mlp_out"}
        site = "attn.hook_z" if self.settings.get("reshape_activations") == "hook_z" else "hook_mlp_out"
        return {"hook_name": f"blocks.1.{site}", "model_name": "tiny", "prepend_bos": False}

    def tensors(self, seed: int = 0) -> dict[str, Tensor]:
        """Random tensors; decoder rows have norms from about 0.3 to 3, thresholds and biases are not zero."""
        generator = torch.Generator().manual_seed(seed)

        def random(*shape: int) -> Tensor:
            return torch.randn(*shape, generator=generator)

        d_out = D_OUT if self.is_transcoder else D_IN
        norms = torch.linspace(0.3, 3, D_DICT)[torch.randperm(D_DICT, generator=generator), None]
        rows = random(D_DICT, d_out)
        tensors = {"W_enc": random(D_IN, D_DICT) / D_IN**0.5, "W_dec": rows / rows.norm(dim=-1, keepdim=True) * norms}
        tensors["b_dec"] = 0.5 * random(d_out)
        vectors = ("r_mag", "b_gate", "b_mag") if self.architecture == "gated" else ("b_enc",)
        tensors |= {name: 0.3 * random(D_DICT) for name in vectors}
        if "jumprelu" in self.architecture:
            tensors["threshold"] = random(D_DICT).abs()
        if "skip" in self.architecture:
            tensors["W_skip"] = random(d_out, D_IN) / D_IN**0.5
        return tensors

    def inputs(self, seed: int = 1) -> Tensor:
        """Activations [batch, pos, d_in], with heads for a dictionary on `attn.hook_z`."""
        x = 2 * torch.randn(3, 5, D_IN, generator=torch.Generator().manual_seed(seed)) + 0.4
        return x.unflatten(-1, (N_HEADS, -1)) if self.settings.get("reshape_activations") == "hook_z" else x

    def write(self, folder: Path, **changes: Any) -> Path:
        """Write the folder that `save_model` of sae-lens 6 writes, by hand; `changes` go into `cfg.json`."""
        folder.mkdir(parents=True, exist_ok=True)
        metadata = {"sae_lens_version": "6.54.12", "sae_lens_training_version": None} | self.metadata
        config = self.config | {"dtype": "float32", "device": "cpu", "architecture": self.architecture}
        config |= {"metadata": metadata} | changes
        (folder / "cfg.json").write_text(json.dumps(config))
        save_file(self.tensors(), folder / "sae_weights.safetensors")
        return folder


def _sae(architecture: str, label: str = "", **settings: Any) -> DictionaryCase:
    return DictionaryCase("-".join(filter(None, (architecture, label))), architecture, settings)


CASES = [
    _sae("standard"),
    _sae("standard", "b_dec_kept", apply_b_dec_to_input=False),
    _sae("standard", "layer_norm", normalize_activations="layer_norm"),
    _sae("standard", "constant_norm", normalize_activations="constant_norm_rescale"),
    _sae("standard", "average", normalize_activations="expected_average_only_in"),
    _sae("standard", "whitened", normalize_activations="covariance_whitening"),
    _sae("standard", "hook_z", reshape_activations="hook_z"),
    _sae("standard", "hook_z-layer_norm", reshape_activations="hook_z", normalize_activations="layer_norm"),
    _sae("gated"),
    _sae("gated", "layer_norm", normalize_activations="layer_norm", apply_b_dec_to_input=False),
    _sae("topk"),
    _sae("topk", "rescaled", rescale_acts_by_decoder_norm=True),
    _sae("topk", "rescaled-layer_norm", rescale_acts_by_decoder_norm=True, normalize_activations="layer_norm"),
    _sae("abstopk"),
    _sae("abstopk", "rescaled", rescale_acts_by_decoder_norm=True),
    _sae("jumprelu"),
    _sae("jumprelu", "constant_norm", normalize_activations="constant_norm_rescale"),
    _sae("transcoder"),
    _sae("transcoder", "layer_norm", normalize_activations="layer_norm"),
    _sae("skip_transcoder"),
    _sae("jumprelu_transcoder"),
    _sae("jumprelu_skip_transcoder"),
    _sae("jumprelu_skip_transcoder", "constant_norm", normalize_activations="constant_norm_rescale"),
]


def slow_encode(case: DictionaryCase, x: Tensor) -> Tensor:
    """Features of one flat activation, one feature after the other, close to the definition."""
    w, config = case.tensors(), case.config
    z, _, _ = _slow_normalize(config.get("normalize_activations", "none"), x)
    if config["apply_b_dec_to_input"]:
        z = z - w["b_dec"]
    bias = w.get("b_enc", torch.zeros(D_DICT))
    norms = [float(w["W_dec"][f].norm()) if config.get("rescale_acts_by_decoder_norm") else 1.0 for f in range(D_DICT)]
    pre = [float(z @ w["W_enc"][:, f] + bias[f]) * norms[f] for f in range(D_DICT)]
    size = [abs(value) for value in pre] if case.architecture == "abstopk" else pre
    largest = sorted(range(D_DICT), key=lambda f: size[f])[-K:]
    features = []
    for f in range(D_DICT):
        value = max(pre[f], 0.0)
        if case.architecture == "gated":
            magnitude = float(z @ (w["W_enc"][:, f] * w["r_mag"][f].exp()) + w["b_mag"][f])
            value = max(magnitude, 0.0) if pre[f] + float(w["b_gate"][f]) > 0 else 0.0
        elif "jumprelu" in case.architecture:
            value = value if pre[f] > float(w["threshold"][f]) else 0.0
        elif case.needs_k:
            value = (pre[f] if case.architecture == "abstopk" else value) if f in largest else 0.0
        features.append(value)
    return torch.tensor(features)


def slow_decode(case: DictionaryCase, features: Tensor, x: Tensor) -> Tensor:
    """The reconstruction of one flat activation, without the skip."""
    w, config = case.tensors(), case.config
    output = w["b_dec"].clone()
    for f in range(D_DICT):
        norm = w["W_dec"][f].norm() if config.get("rescale_acts_by_decoder_norm") else 1.0
        output += features[f] * w["W_dec"][f] / norm
    if case.is_transcoder:  # SAELens does not undo the normalization of a transcoder's input
        return output
    _, scale, shift = _slow_normalize(config.get("normalize_activations", "none"), x)
    return output * scale + shift


def _slow_normalize(how: str, x: Tensor) -> tuple[Tensor, float, float]:
    if how == "layer_norm":
        mean = float(x.mean())
        deviation = float(((x - mean) ** 2).sum() / (len(x) - 1)) ** 0.5
        return (x - mean) / (deviation + 1e-5), deviation, mean
    if how == "constant_norm_rescale":
        length = float((x**2).sum()) ** 0.5
        return x * len(x) ** 0.5 / length, length / len(x) ** 0.5, 0.0
    return x, 1.0, 0.0
