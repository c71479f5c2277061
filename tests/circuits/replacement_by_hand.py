"""The local replacement model in the open: a HookedTransformer with all frozen that a circuit of features freezes.

Attention patterns, norms' scales and which features fire are held at the prompt; errors are constants. What is left is
linear, so finite differences of any size are its derivatives.
"""

from collections.abc import Callable
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor

Feature = tuple[int, int, int]
"""Layer, position, unit."""


class FrozenReplacement:
    """Runs of the replacement model with embeddings, errors or features changed."""

    def __init__(self, model: Any, tokens: Int[Tensor, "1 pos"], basis: Any) -> None:
        self._model, self._tokens = model, tokens
        self.dictionaries: dict[int, Any] = {d.layer: d for d in basis.dictionaries}
        with torch.no_grad():
            _, self._clean = model.run_with_cache(tokens)
            self.features = {layer: d.encode(self._read(d)) for layer, d in self.dictionaries.items()}
            self.errors = {
                layer: self._clean[d.hook_out] - d(self._read(d)) - self._from_earlier(layer, self.features)
                for layer, d in self.dictionaries.items()
            }

    def _from_earlier(self, layer: int, features: dict[int, Tensor]) -> Tensor:
        """What features of earlier layers of a cross-layer transcoder write into a layer's output."""
        total = torch.zeros_like(self._clean[self.dictionaries[layer].hook_out])
        for earlier, dictionary in self.dictionaries.items():
            if earlier < layer and dictionary.W_dec_later is not None:
                total = total + features[earlier] @ dictionary.W_dec_later[layer - earlier - 1]
        return total

    def _read(self, dictionary: Any) -> Tensor:
        return self._clean[dictionary.hook_in]

    def __call__(
        self, read: Callable[[Tensor, dict[int, Tensor]], Tensor], *, embedding: Float[Tensor, "pos d"] | None = None,
        error: Float[Tensor, "layer pos d"] | None = None, feature: tuple[Feature, float] | None = None,
        direct: bool = False,
    ) -> float:  # fmt: skip
        """`read` of the logits and of each layer's pre-activations, after the changes.

        With `direct` every layer's features stay at their clean values, so that only direct effects arrive.
        """
        seen: dict[int, Tensor] = {}
        inputs: dict[str, Tensor] = {}
        live: dict[int, Tensor] = {}

        def mlp(layer: int) -> Callable[..., Tensor]:
            dictionary = self.dictionaries[layer]

            def replace(value: Tensor, hook: Any) -> Tensor:
                x = inputs[dictionary.hook_in]
                seen[layer] = x @ dictionary.W_enc + dictionary.b_enc
                fires = self.features[layer] != 0
                features = self.features[layer].clone() if direct else torch.where(fires, seen[layer], 0.0)
                if feature is not None and feature[0][0] == layer:
                    features[0, feature[0][1], feature[0][2]] += feature[1]
                live[layer] = features
                out = features @ dictionary.W_dec + dictionary.b_dec + self.errors[layer]
                out = out + self._from_earlier(layer, live)
                out = out if dictionary.W_skip is None else out + x @ dictionary.W_skip.T
                return out if error is None else out + error[layer]

            return replace

        def embed(value: Tensor, hook: Any) -> Tensor:
            return value if embedding is None else value + embedding

        frozen = [(n, lambda v, hook: self._clean[hook.name]) for n in self._clean if _is_frozen(n)]
        keep = [(d.hook_in, lambda v, hook: inputs.update({hook.name: v})) for d in self.dictionaries.values()]
        replaced = [(d.hook_out, mlp(layer)) for layer, d in self.dictionaries.items()]
        with torch.no_grad():
            hooks = [("hook_embed", embed), *frozen, *keep, *replaced]
            logits = self._model.run_with_hooks(self._tokens, fwd_hooks=hooks)
            return float(read(logits, seen))


def _is_frozen(name: str) -> bool:
    return name.endswith(("hook_scale", "attn.hook_pattern"))
