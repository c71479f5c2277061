"""One dictionary in training: its units, its loss, its dead features, and one step.

Units. Dictionaries are trained on centered inputs and outputs of mean squared norm d, so that no setting depends on the
model's units:

    x_n = (x - mean_in) / scale_in,   y_n = (y - mean_out) / scale_out,   scale^2 = E |x - mean|^2 / d

Afterwards the units are folded back into the weights; decoder rows stay at norm 1, features grow by scale_out instead:

    W_enc' = W_enc * scale_out / scale_in       b_enc' = scale_out * (b_enc - (mean_in / scale_in) @ W_enc)
    b_dec' = scale_out * b_dec + mean_out - W_skip' @ mean_in         W_skip' = W_skip * scale_out / scale_in

Loss, with f = features(pre), pre = x_n @ W_enc + b_enc, and missing = y_n - (f @ W_dec + b_dec + W_skip @ x_n):

    loss = mean missing^2 + penalty * cost(f) + auxiliary_coefficient * auxiliary

The first term is the fraction of variance unexplained. Features and what they cost, by activation:

    relu       f = relu(pre)                                             cost: mean_b sum_i |f| / sqrt(d_out)
    topk       f = relu of the k largest pre of each position            cost: none
    batchtopk  f = relu of the k * batch largest pre of the batch        cost: none
    jumprelu   f = pre where pre > threshold                             cost: mean_b sum_i [pre > threshold]

The decoder's rows have norm 1, so |f| is what a feature writes. jumprelu's threshold has a gradient through a kernel of
width `bandwidth` around it (straight-through), and the cost reaches the threshold alone. batchtopk needs a threshold
once there is no batch: the running mean of the smallest feature that was kept.

Dead features, those that have not fired in `dead_after` positions:

    auxiliary  the `auxiliary_k` dead features with the largest pre rebuild `missing`; the loss is the share they leave
    resample   they restart at positions drawn in proportion to |missing|^2: the decoder row is what was missing there,
               the encoder reads the input there

Several processes average their gradients over batches of equal size, so that their weights are the same.
Source: Bricken et al. 2023, Towards Monosemanticity (relu, resample); Gao et al. 2024, arXiv 2406.04093 (topk,
auxiliary); Rajamanoharan et al. 2024, arXiv 2407.14435 (jumprelu); Bussmann et al. 2024, arXiv 2412.06410 (batchtopk).
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from .._errors import NumericalError
from .._processes import Processes
from ..bases._dictionary import Dictionary
from ._buffer import TrainingSite
from ._config import TrainingConfig

MEASURES: tuple[str, ...] = ("loss", "l0", "variance_explained", "dead_share")
"""What every step measures; see `TrainingReport`."""

_INITIAL_THRESHOLD = 0.5
_THRESHOLD_DECAY = 0.95
_ENCODER_SHARE = 0.2
"""Norm of a resampled encoder, as a share of the others' mean norm."""
_SAMPLE, _ROWS = 65_536, 4096
"""Positions that means and scales are measured on, at most, and how many at a time in float64."""


class Trainee:
    """The dictionary of one site while it is trained."""

    def __init__(
        self,
        site: TrainingSite,
        config: TrainingConfig,
        scaling: "Scaling",
        generator: torch.Generator,
        processes: Processes | None = None,
    ) -> None:
        self.site, self.config, self.scaling = site, config, scaling
        self._generator, self._processes = generator, processes or Processes()
        self._dtype = torch.bfloat16 if config.precision == "bfloat16" else torch.float32
        device = scaling.mean_in.device
        weights = _initial(site, config, generator)
        self.weights = {name: value.to(device).requires_grad_() for name, value in weights.items()}
        self._optimizer = torch.optim.Adam(list(self.weights.values()), lr=config.learning_rate)
        self._silent_for = torch.zeros(config.d_dict, dtype=torch.long, device=device)
        self._threshold = torch.zeros((), device=device)

    def step(self, x: Float[Tensor, "batch d_in"], y: Float[Tensor, "batch d_out"], step: int) -> dict[str, float]:
        """One update; returns `MEASURES`.

        Raises:
            NumericalError: the loss is not finite, or every feature is dead.
        """
        config, w = self.config, self.weights
        x, y = self.scaling.apply(x, y)
        with torch.enable_grad():
            pre = self._product(x, w["W_enc"]) + w["b_enc"]
            features = sparse_features(pre, w, config)
            rebuilt = self._product(features, w["W_dec"]) + w["b_dec"]
            rebuilt = rebuilt + self._product(x, w["W_skip"].mT) if "W_skip" in w else rebuilt
            missing = y - rebuilt
            loss = missing.square().mean()
            cost = sparsity_cost(pre, features, w, config)
            if cost is not None:
                loss = loss + config.penalty * _ramp(step, config.penalty_warmup * config.steps) * cost
            dead = self._count_silence(features)
            if config.dead_features == "auxiliary" and dead.any():
                auxiliary = auxiliary_loss(pre, missing, w["W_dec"], dead, config.auxiliary_k)
                loss = loss + config.auxiliary_coefficient * auxiliary
        loss_value = float(loss.detach())
        if not math.isfinite(loss_value):
            raise NumericalError(f"the loss of layer {self.site.layer} is {loss_value} at step {step}: {self._remedy}")
        if dead.all():
            raise NumericalError(
                f"every feature of layer {self.site.layer} is dead at step {step}: none fired in "
                f"{config.dead_after:,} positions. Lower penalty ({config.penalty:g}) or learning_rate "
                f"({config.learning_rate:g})."
            )
        self._update(loss, step)
        missing, features = missing.detach(), features.detach()
        if config.activation == "batchtopk":
            self._threshold = running_threshold(self._threshold, features, self._processes, first=step == 0)
        due = config.resample_every and (step + 1) % config.resample_every == 0 and 2 * (step + 1) <= config.steps
        if config.dead_features == "resample" and due and dead.any():
            # One process' rows for all, so that all restart alike.
            mine = {"x": x, "missing": missing}
            rows = self._processes.total({n: v if self._processes.first else v * 0 for n, v in mine.items()})
            resample(self.weights, self._optimizer, dead, rows["x"], rows["missing"], self._generator)
            self._silent_for = torch.where(dead, 0, self._silent_for)
        variance_explained = 1 - missing.square().mean() / (y - y.mean(0)).square().mean()
        l0 = (features > 0).sum(-1).float().mean()
        values = (loss_value, l0, variance_explained, dead.float().mean())
        return {name: float(value) for name, value in zip(MEASURES, values, strict=True)}

    def _update(self, loss: Tensor, step: int) -> None:
        """One step of Adam, along the sphere of each decoder row."""
        config, W_dec = self.config, self.weights["W_dec"]
        gradients = torch.autograd.grad(loss, list(self.weights.values()), allow_unused=True)
        pairs = zip(self.weights.items(), gradients, strict=True)
        shared = self._processes.total({n: torch.zeros_like(w) if g is None else g for (n, w), g in pairs})
        shared = {name: gradient / self._processes.count for name, gradient in shared.items()}
        with torch.no_grad():
            # Without its part along the row: normalizing would undo that part, but Adam's moments would keep it.
            shared["W_dec"] -= (shared["W_dec"] * W_dec).sum(-1, keepdim=True) * W_dec
            for name, weight in self.weights.items():
                weight.grad = shared[name]
            rate = _ramp(step + 1, config.learning_rate_warmup * config.steps)
            rate *= _ramp(config.steps - step, config.learning_rate_decay * config.steps)
            self._optimizer.param_groups[0]["lr"] = config.learning_rate * rate
            self._optimizer.step()
            W_dec /= W_dec.norm(dim=-1, keepdim=True)
        self._optimizer.zero_grad(set_to_none=True)

    @torch.no_grad()
    def _count_silence(self, features: Tensor) -> Bool[Tensor, " d_dict"]:
        """Count the positions since each feature fired, of all processes; return which are dead."""
        fired = (features > 0).any(0)
        if self._processes.count > 1:
            fired = self._processes.total({"fired": fired.float()})["fired"] > 0
        self._silent_for = torch.where(fired, 0, self._silent_for + len(features) * self._processes.count)
        return self._silent_for > self.config.dead_after

    def _product(self, a: Tensor, b: Tensor) -> Tensor:
        return (a.to(self._dtype) @ b.to(self._dtype)).float()

    @property
    def _remedy(self) -> str:
        return f"lower learning_rate ({self.config.learning_rate:g}) or lengthen learning_rate_warmup."

    def check_weights(self, step: int) -> None:
        """Refuse to keep weights that the last update made NaN or infinite.

        Raises:
            NumericalError: some are.
        """
        bad = [name for name, weight in self.weights.items() if not weight.detach().isfinite().all()]
        if bad:
            raise NumericalError(f"{bad} of layer {self.site.layer} are not finite after step {step}: {self._remedy}")

    def dictionary(self, metadata: Mapping[str, Any]) -> Dictionary:
        """The dictionary as it is now, in the model's units, decoder rows of norm 1."""
        config, site = self.config, self.site
        weights = {name: value.detach() for name, value in self.weights.items()}
        if "log_threshold" in weights:
            weights["threshold"] = weights.pop("log_threshold").exp()
        if config.activation == "batchtopk":
            weights["threshold"] = self._threshold.expand(config.d_dict)
        tensors: dict[str, Any] = {
            name: value.contiguous().clone() for name, value in self.scaling.folded(weights).items()
        }
        return Dictionary(
            config.dictionary_kind, **tensors, k=config.k if config.activation == "topk" else None,
            hook_in=site.named_in, hook_out=site.named_out, metadata=dict(metadata),
            name=f"{config.target} of layer {site.layer}",
        )  # fmt: skip

    def state(self) -> dict[str, Tensor]:
        """Tensors from which `restore` resumes bit for bit."""
        tensors = {name: value.detach() for name, value in self.weights.items()}
        for name, value in self.weights.items():
            tensors |= {f"adam.{key}.{name}": moment for key, moment in self._optimizer.state[value].items()}
        tensors |= {f"scaling.{name}": value for name, value in vars(self.scaling).items()}
        return tensors | {"silent_for": self._silent_for, "threshold": self._threshold}

    @torch.no_grad()
    def restore(self, tensors: Mapping[str, Tensor]) -> None:
        """Return to a `state`, except for the scaling, which is given when the trainee is made."""
        for name, value in self.weights.items():
            value.copy_(tensors[name])
            moments = {key: tensors[f"adam.{key}.{name}"] for key in ("step", "exp_avg", "exp_avg_sq")}
            device = {key: "cpu" if key == "step" else value.device for key in moments}
            self._optimizer.state[value] = {key: moment.to(device[key], copy=True) for key, moment in moments.items()}
        self._silent_for = tensors["silent_for"].to(self._silent_for)
        self._threshold = tensors["threshold"].to(self._threshold)


def _ramp(step: int, length: float) -> float:
    return min(1.0, step / length) if length > 0 else 1.0


def _initial(site: TrainingSite, config: TrainingConfig, generator: torch.Generator) -> dict[str, Tensor]:
    W_dec = torch.randn(config.d_dict, site.d_out, generator=generator)
    W_dec = W_dec / W_dec.norm(dim=-1, keepdim=True)
    if config.target == "sae" and site.d_in == site.d_out:
        W_enc = W_dec.mT.contiguous().clone()
    else:
        W_enc = torch.randn(site.d_in, config.d_dict, generator=generator)
        W_enc = W_enc / W_enc.norm(dim=0)
    weights = {"W_enc": W_enc, "W_dec": W_dec, "b_enc": torch.zeros(config.d_dict), "b_dec": torch.zeros(site.d_out)}
    if config.activation == "jumprelu":
        weights["log_threshold"] = torch.full((config.d_dict,), _INITIAL_THRESHOLD).log()
    if config.skip:
        weights["W_skip"] = torch.zeros(site.d_out, site.d_in)
    return weights


def sparse_features(
    pre: Float[Tensor, "batch d_dict"], weights: dict[str, Tensor], config: TrainingConfig
) -> Float[Tensor, "batch d_dict"]:
    """Features of a batch."""
    if config.activation == "relu":
        return pre.relu()
    if config.activation == "jumprelu":
        return _JumpReLU.apply(pre, weights["log_threshold"].exp(), config.bandwidth)  # pyright: ignore[reportReturnType]
    flat = pre if config.activation == "topk" else pre.flatten()
    k = config.k if config.activation == "topk" else min(config.k * len(pre), flat.numel())
    values, index = flat.relu().topk(k, dim=-1, sorted=False)
    return torch.zeros_like(flat).scatter(-1, index, values).view_as(pre)


def sparsity_cost(
    pre: Float[Tensor, "batch d_dict"],
    features: Float[Tensor, "batch d_dict"],
    weights: dict[str, Tensor],
    config: TrainingConfig,
) -> Float[Tensor, ""] | None:
    """The term that the penalty multiplies; None where the number of features is fixed."""
    if config.activation == "relu":
        return features.sum(-1).mean() / weights["W_dec"].shape[1] ** 0.5
    if config.activation == "jumprelu":
        fires = _Step.apply(pre, weights["log_threshold"].exp(), config.bandwidth)
        return fires.sum(-1).mean()  # pyright: ignore[reportOptionalMemberAccess, reportAttributeAccessIssue]
    return None


class _JumpReLU(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, pre: Tensor, threshold: Tensor, bandwidth: float) -> Tensor:
        ctx.save_for_backward(pre, threshold)
        ctx.bandwidth = bandwidth
        return pre * (pre > threshold)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, Tensor, None]:
        (gradient,), (pre, threshold) = gradients, ctx.saved_tensors
        near = (pre - threshold).abs() < ctx.bandwidth / 2
        to_threshold = -(threshold / ctx.bandwidth) * (near * gradient).sum(0)
        return gradient * (pre > threshold), to_threshold, None


class _Step(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, pre: Tensor, threshold: Tensor, bandwidth: float) -> Tensor:
        ctx.save_for_backward(pre, threshold)
        ctx.bandwidth = bandwidth
        return (pre > threshold).to(pre.dtype)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[None, Tensor, None]:
        (gradient,), (pre, threshold) = gradients, ctx.saved_tensors
        near = (pre - threshold).abs() < ctx.bandwidth / 2
        return None, -(near * gradient).sum(0) / ctx.bandwidth, None


def running_threshold(
    running: Float[Tensor, ""], features: Float[Tensor, "batch d_dict"], processes: Processes, *, first: bool
) -> Float[Tensor, ""]:
    """The running mean of the smallest feature that fired, itself a mean over processes."""
    fired = features[features > 0]
    mine = torch.stack([fired.min(), fired.new_ones(())]) if len(fired) else running.new_zeros(2)
    smallest, count = processes.total({"smallest": mine})["smallest"]
    if not count:
        return running
    smallest = smallest / count
    return smallest if first else _THRESHOLD_DECAY * running + (1 - _THRESHOLD_DECAY) * smallest


def auxiliary_loss(
    pre: Float[Tensor, "batch d_dict"],
    missing: Float[Tensor, "batch d_out"],
    W_dec: Float[Tensor, "d_dict d_out"],
    dead: Bool[Tensor, " d_dict"],
    k: int,
) -> Float[Tensor, ""]:
    """The share of `missing` that the best dead features leave; only they learn from it."""
    missing = missing.detach()
    candidates = pre[:, dead]
    values, index = candidates.topk(min(k, candidates.shape[1]), dim=-1, sorted=False)
    features = torch.zeros_like(candidates).scatter(-1, index, values.relu())
    left = missing - features @ W_dec[dead]
    return left.square().mean() / missing.square().mean().clamp(min=torch.finfo(missing.dtype).tiny)


@torch.no_grad()
def resample(
    weights: dict[str, Tensor],
    optimizer: torch.optim.Optimizer,
    dead: Bool[Tensor, " d_dict"],
    x: Float[Tensor, "batch d_in"],
    missing: Float[Tensor, "batch d_out"],
    generator: torch.Generator,
) -> None:
    """Restart the dead features, in place, and reset the optimizer's moments of them."""
    chances = missing.square().sum(-1).double().cpu()
    if not chances.sum() > 0:
        return

    def unit(rows: Tensor) -> Tensor:
        return rows / rows.norm(dim=-1, keepdim=True).clamp(min=1e-8)

    index = torch.multinomial(chances, int(dead.sum()), replacement=True, generator=generator).to(x.device)
    alive = weights["W_enc"][:, ~dead]
    size = _ENCODER_SHARE * (alive.norm(dim=0).mean() if alive.shape[1] else 1.0)
    weights["W_dec"][dead] = unit(missing[index])
    weights["W_enc"][:, dead] = (unit(x[index]) * size).mT
    weights["b_enc"][dead] = 0
    if "log_threshold" in weights:
        weights["log_threshold"][dead] = torch.tensor(_INITIAL_THRESHOLD).log()
    for name, axis in (("W_dec", 0), ("W_enc", 1), ("b_enc", 0), ("log_threshold", 0)):
        for moment in ("exp_avg", "exp_avg_sq"):
            if name in weights and moment in optimizer.state[weights[name]]:
                optimizer.state[weights[name]][moment].movedim(axis, 0)[dead] = 0


@dataclass(frozen=True, eq=False)
class Scaling:
    """Means and scales of one site, float32."""

    mean_in: Float[Tensor, " d_in"]
    mean_out: Float[Tensor, " d_out"]
    scale_in: Float[Tensor, ""]
    scale_out: Float[Tensor, ""]

    @classmethod
    def measure(
        cls,
        x: Float[Tensor, "position d_in"],
        y: Float[Tensor, "position d_out"],
        site: TrainingSite,
        processes: Processes | None = None,
    ) -> "Scaling":
        """Means and scales of a sample, or of those of all processes together.

        Raises:
            NumericalError: the input or the output does not vary: a dead layer.
        """
        moments = [_moments(value, processes or Processes()) for value in (x, y)]
        for name, (_, scale) in zip((site.hook_in, site.hook_out), moments, strict=True):
            if not scale > 0:
                raise NumericalError(
                    f"expected activations that vary at {name}; they are constant over {len(x)} positions, so layer "
                    f"{site.layer} is dead or the tokens are all the same. Leave it out: TrainingConfig(layers=...)."
                )
        (mean_in, scale_in), (mean_out, scale_out) = moments
        return cls(mean_in, mean_out, scale_in, scale_out)

    def apply(self, x: Tensor, y: Tensor) -> tuple[Float[Tensor, "batch d_in"], Float[Tensor, "batch d_out"]]:
        """Input and output in the units of training, float32."""
        return (x.float() - self.mean_in) / self.scale_in, (y.float() - self.mean_out) / self.scale_out

    def folded(self, weights: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """The trained weights, as weights on the model's own activations."""
        ratio = self.scale_out / self.scale_in
        W_enc = weights["W_enc"]
        folded = {
            "W_enc": W_enc * ratio,
            "b_enc": self.scale_out * (weights["b_enc"] - (self.mean_in / self.scale_in) @ W_enc),
            "W_dec": weights["W_dec"],
            "b_dec": self.scale_out * weights["b_dec"] + self.mean_out,
        }
        if "threshold" in weights:
            folded["threshold"] = weights["threshold"] * self.scale_out
        if "W_skip" in weights:
            folded["W_skip"] = weights["W_skip"] * ratio
            folded["b_dec"] = folded["b_dec"] - folded["W_skip"] @ self.mean_in
        return folded


def _moments(value: Tensor, processes: Processes) -> tuple[Tensor, Tensor]:
    """Mean by unit, and the root of the mean variance over units; 0 where it is the rounding of a constant."""
    parts = value[:_SAMPLE].split(_ROWS)
    count = torch.tensor(float(sum(map(len, parts))), dtype=torch.float64, device=value.device)
    summed = torch.stack([part.sum(0, dtype=torch.float64) for part in parts]).sum(0)
    total = processes.total({"count": count, "sum": summed})
    mean = total["sum"] / total["count"]
    squares = torch.stack([(part.double() - mean).square().sum() for part in parts]).sum()
    variance = processes.total({"squares": squares})["squares"] / total["count"] / value.shape[1]
    negligible = variance <= 1e-12 * (1e-12 + mean.square().mean())
    return mean.float(), torch.where(negligible, torch.zeros_like(variance), variance.sqrt()).float()
