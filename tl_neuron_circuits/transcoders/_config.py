"""Settings of training; with the model, the tokens and the machine they determine the result."""

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

from .._errors import SettingsError
from .._typing import checked

_CHOICES: dict[str, tuple[str, ...]] = {
    "target": ("transcoder", "sae"),
    "activation": ("relu", "topk", "batchtopk", "jumprelu"),
    "dead_features": ("auxiliary", "resample", "none"),
    "precision": ("float32", "bfloat16"),
}
_POSITIVE = (
    *("d_dict", "k", "steps", "batch_size", "forward_rows", "learning_rate", "bandwidth", "dead_after"),
    *("auxiliary_k", "log_every", "checkpoint_every"),
)
_NOT_NEGATIVE = (
    *("penalty", "penalty_warmup", "learning_rate_warmup", "learning_rate_decay", "buffer_size", "resample_every"),
    *("auxiliary_coefficient", "keep_checkpoints"),
)

KINDS: dict[tuple[str, str, bool], str] = {
    ("sae", "relu", False): "standard",
    ("sae", "topk", False): "topk",
    ("sae", "batchtopk", False): "jumprelu",
    ("sae", "jumprelu", False): "jumprelu",
    ("transcoder", "relu", False): "transcoder",
    ("transcoder", "relu", True): "skip_transcoder",
    ("transcoder", "topk", False): "topk_transcoder",
    ("transcoder", "topk", True): "topk_skip_transcoder",
    ("transcoder", "batchtopk", False): "jumprelu_transcoder",
    ("transcoder", "batchtopk", True): "jumprelu_skip_transcoder",
    ("transcoder", "jumprelu", False): "jumprelu_transcoder",
    ("transcoder", "jumprelu", True): "jumprelu_skip_transcoder",
}
"""SAELens' architecture of (target, activation, skip); sae-lens has no topk transcoders, batchtopk becomes jumprelu."""


@checked
@dataclass(frozen=True)
class TrainingConfig:
    """Settings of `train`. Inputs and outputs are centered and scaled, so that no setting depends on units.

    Attributes:
        target: "transcoder" (MLP input to MLP output) or "sae" (MLP output to itself).
        layers: the layers, one dictionary each from the same forward passes; None for all.
        hook_in: the hook point read, with `{layer}` for the number. None: `blocks.{layer}.ln2.hook_normalized` for a
            transcoder (one value on both model classes from TransformerLens 3 on; `mlp.hook_in` is after the norm's
            weight), `hook_out` for an SAE.
        hook_out: the hook point to rebuild.
        activation: "relu" with an L1 penalty, "topk", "batchtopk", or "jumprelu" with an L0 penalty.
        skip: an affine path beside the features, from zero (transcoders only).
        d_dict: number of features.
        k: features per position, exactly (topk) or on average (batchtopk).
        penalty: weight of sum|f| / sqrt(d_out) (relu, about 0.1) or of L0 (jumprelu, about 0.003) relative to the
            fraction of variance unexplained.
        penalty_warmup: share of the steps over which the penalty grows from 0.
        bandwidth: width of the kernel that gives jumprelu's threshold a gradient.
        steps: updates of the weights.
        batch_size: positions per update, of all processes together.
        learning_rate: Adam's.
        learning_rate_warmup: share of the steps over which it grows from 0.
        learning_rate_decay: share of the steps at the end over which it falls to 0.
        buffer_size: positions in the shuffle buffer, of all processes together. It bounds memory: the buffer and one
            forward pass, for every hook point, in `precision`, and as much again while a checkpoint is written.
            0: no shuffling, positions come in the order of the forward passes.
        forward_rows: prompts per forward pass, where tokens are one tensor.
        ignore_tokens: positions with these tokens are left out (padding).
        precision: dtype of the buffer and of matrix products; weights and sums stay float32.
        dead_features: "auxiliary" (they rebuild what the others leave; Gao et al. 2024), "resample" (they restart at
            badly rebuilt positions; Bricken et al. 2023), "none".
        dead_after: positions without firing after which a feature counts as dead.
        auxiliary_k: dead features that join in rebuilding what the others leave.
        auxiliary_coefficient: weight of that loss.
        resample_every: steps between resamplings, which end halfway through the training.
        log_every: steps between rows of the report, which are means over these steps.
        checkpoint_every: steps between checkpoints, where there is a directory.
        keep_checkpoints: how many are kept, 0 for all.
        seed: for weights, order of prompts and shuffling.

    Raises:
        SettingsError: a value is impossible.

    Example:
        >>> from tl_neuron_circuits.transcoders import TrainingConfig
        >>> TrainingConfig(layers=(0,), activation="batchtopk", k=12).dictionary_kind
        'jumprelu_transcoder'
    """

    target: Literal["transcoder", "sae"] = "transcoder"
    layers: tuple[int, ...] | None = None
    hook_in: str | None = None
    hook_out: str = "blocks.{layer}.hook_mlp_out"
    activation: Literal["relu", "topk", "batchtopk", "jumprelu"] = "batchtopk"
    skip: bool = False
    d_dict: int = 1024
    k: int = 16
    penalty: float = 3e-3
    penalty_warmup: float = 0.1
    bandwidth: float = 0.1
    steps: int = 2000
    batch_size: int = 1024
    learning_rate: float = 2e-3
    learning_rate_warmup: float = 0.05
    learning_rate_decay: float = 0.3
    buffer_size: int = 32768
    forward_rows: int = 32
    ignore_tokens: tuple[int, ...] = ()
    precision: Literal["float32", "bfloat16"] = "float32"
    dead_features: Literal["auxiliary", "resample", "none"] = "auxiliary"
    dead_after: int = 50_000
    auxiliary_k: int = 64
    auxiliary_coefficient: float = 1 / 32
    resample_every: int = 250
    log_every: int = 50
    checkpoint_every: int = 500
    keep_checkpoints: int = 2
    seed: int = 0

    def __post_init__(self) -> None:
        for name, choices in _CHOICES.items():
            if getattr(self, name) not in choices:
                raise SettingsError(f"expected {name} to be one of {choices}; got {getattr(self, name)!r}.")
        for name in (*_POSITIVE, *_NOT_NEGATIVE):
            value, may_be_zero = getattr(self, name), name in _NOT_NEGATIVE
            if not (value >= 0 if may_be_zero else value > 0):
                raise SettingsError(f"expected {name} {'>=' if may_be_zero else '>'} 0; got {value}.")
        if self.skip and self.target == "sae":
            raise SettingsError("an SAE with a skip would rebuild its input by the skip alone: pass skip=False.")
        if self.k > self.d_dict:
            raise SettingsError(f"expected k <= d_dict; got k = {self.k}, d_dict = {self.d_dict}.")
        if 0 < self.buffer_size < 2 * self.batch_size:
            raise SettingsError(
                f"expected buffer_size to be 0 or at least two batches ({2 * self.batch_size}); got {self.buffer_size}."
            )
        if "{layer}" not in self.hook_out or "{layer}" not in self.input_template:
            raise SettingsError(
                f"expected '{{layer}}' in hook_in and hook_out; got {self.input_template!r} and {self.hook_out!r}."
            )
        if self.layers is not None and (not self.layers or len(set(self.layers)) < len(self.layers)):
            raise SettingsError(f"expected layers to be distinct numbers, or None for all; got {self.layers}.")

    @property
    def input_template(self) -> str:
        """`hook_in` with its default filled in."""
        default = self.hook_out if self.target == "sae" else "blocks.{layer}.ln2.hook_normalized"
        return default if self.hook_in is None else self.hook_in

    @property
    def dictionary_kind(self) -> str:
        """SAELens' name for the architecture that is trained."""
        return KINDS[self.target, self.activation, self.skip]

    @property
    def sparsity_setting(self) -> Literal["k", "penalty"]:
        """The setting that controls how many features fire."""
        return "k" if self.activation in ("topk", "batchtopk") else "penalty"

    def replace(self, **changes: Any) -> "TrainingConfig":
        """A copy with some settings changed.

        Example:
            >>> from tl_neuron_circuits.transcoders import TrainingConfig
            >>> TrainingConfig().replace(k=8).k
            8
        """
        return dataclasses.replace(self, **changes)

    def to_json(self) -> dict[str, Any]:
        """The settings as JSON values."""
        values = dataclasses.asdict(self)
        return {name: list(value) if isinstance(value, tuple) else value for name, value in values.items()}

    @classmethod
    def from_json(cls, values: Mapping[str, Any]) -> "TrainingConfig":
        """The settings that `to_json` gave.

        Raises:
            SettingsError: a setting is unknown or impossible.
        """
        unknown = set(values) - {field.name for field in dataclasses.fields(cls)}
        if unknown:
            known = sorted(field.name for field in dataclasses.fields(cls))
            raise SettingsError(f"expected training settings out of {known}; got {sorted(unknown)}.")
        settings: dict[str, Any] = {n: tuple(v) if isinstance(v, list) else v for n, v in values.items()}
        return cls(**settings)
