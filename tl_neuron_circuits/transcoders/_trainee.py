"""One dictionary in training: its weights, its optimizer, and one step.

    loss = mean (y_n - y_n_hat)^2 + penalty * cost + coefficient * auxiliary

in the units of `_scaling`, in which the first term is the fraction of variance unexplained. The decoder's rows are kept
at norm 1: the gradient along them is removed before a step, and they are normalized after it. Several processes average
their gradients over batches of equal size, so that their weights are the same.
"""

import math
from collections.abc import Mapping
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from .._errors import NumericalError
from .._processes import Processes
from ..bases._dictionary import Dictionary
from ._config import TrainingConfig
from ._dead_features import auxiliary_loss, resample
from ._features import INITIAL_THRESHOLD, running_threshold, sparse_features, sparsity_cost
from ._scaling import Scaling
from ._sites import TrainingSite

MEASURES: tuple[str, ...] = ("loss", "l0", "variance_explained", "dead_share")
"""What every step measures; see `TrainingReport`."""


class Trainee:
    """The dictionary of one site while it is trained."""

    def __init__(
        self,
        site: TrainingSite,
        config: TrainingConfig,
        scaling: Scaling,
        generator: torch.Generator,
        device: torch.device,
        processes: Processes | None = None,
    ) -> None:
        self.site, self.config, self.scaling = site, config, scaling
        self._generator, self._processes = generator, processes or Processes()
        self._dtype = torch.bfloat16 if config.precision == "bfloat16" else torch.float32
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
            missing = y - self._rebuilt(x, features)
            unexplained = missing.square().mean()
            loss = unexplained
            cost = sparsity_cost(pre, features, w, config)
            if cost is not None:
                loss = loss + config.penalty * _ramp(step, config.penalty_warmup * config.steps) * cost
            dead = self._dead_after(features)
            if config.dead_features == "auxiliary" and dead.any():
                auxiliary = auxiliary_loss(pre, missing, w["W_dec"], dead, config.auxiliary_k)
                loss = loss + config.auxiliary_coefficient * auxiliary
        self._check(loss, dead, step)
        self._update(loss, step)
        if config.activation == "batchtopk":
            self._threshold = running_threshold(self._threshold, features, self._processes, first=step == 0)
        self._maybe_resample(dead, x, missing, step)
        return self._measured(loss.detach(), features.detach(), missing.detach(), y, dead)

    def check_weights(self, step: int) -> None:
        """See that the weights can be kept.

        Raises:
            NumericalError: the last update made some of them NaN or infinite.
        """
        bad = [name for name, weight in self.weights.items() if not weight.detach().isfinite().all()]
        if bad:
            raise NumericalError(
                f"{bad} of layer {self.site.layer} are not finite after step {step}: lower learning_rate "
                f"({self.config.learning_rate:g}) or lengthen learning_rate_warmup."
            )

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
        """Tensors from which `restore` goes on bit for bit."""
        tensors = {name: value.detach() for name, value in self.weights.items()}
        for name, value in self.weights.items():
            tensors |= {f"adam.{key}.{name}": moment for key, moment in self._optimizer.state[value].items()}
        tensors |= {f"scaling.{name}": value for name, value in self.scaling.tensors().items()}
        return tensors | {"silent_for": self._silent_for, "threshold": self._threshold}

    @torch.no_grad()
    def restore(self, tensors: Mapping[str, Tensor]) -> None:
        """Take up what `state` gave."""
        for name, value in self.weights.items():
            value.copy_(tensors[name])
            moments = {key: tensors[f"adam.{key}.{name}"] for key in ("step", "exp_avg", "exp_avg_sq")}
            device = {key: "cpu" if key == "step" else value.device for key in moments}
            self._optimizer.state[value] = {key: moment.to(device[key], copy=True) for key, moment in moments.items()}
        self._silent_for = tensors["silent_for"].to(self._silent_for)
        self._threshold = tensors["threshold"].to(self._threshold)

    def _rebuilt(self, x: Tensor, features: Tensor) -> Tensor:
        rebuilt = self._product(features, self.weights["W_dec"]) + self.weights["b_dec"]
        return rebuilt + self._product(x, self.weights["W_skip"].mT) if "W_skip" in self.weights else rebuilt

    def _product(self, a: Tensor, b: Tensor) -> Tensor:
        return (a.to(self._dtype) @ b.to(self._dtype)).float()

    @torch.no_grad()
    def _dead_after(self, features: Tensor) -> Tensor:
        fired = (features > 0).any(0)
        if self._processes.count > 1:
            fired = self._processes.total({"fired": fired.float()})["fired"] > 0
        self._silent_for = torch.where(fired, 0, self._silent_for + len(features) * self._processes.count)
        return self._silent_for > self.config.dead_after

    def _check(self, loss: Tensor, dead: Tensor, step: int) -> None:
        if not math.isfinite(value := float(loss.detach())):
            raise NumericalError(
                f"the loss of layer {self.site.layer} is {value} at step {step}: lower learning_rate "
                f"({self.config.learning_rate:g}) or lengthen learning_rate_warmup."
            )
        if dead.all():
            raise NumericalError(
                f"every feature of layer {self.site.layer} is dead at step {step}: none fired in "
                f"{self.config.dead_after:,} positions. Lower penalty ({self.config.penalty:g}) or learning_rate "
                f"({self.config.learning_rate:g})."
            )

    def _measured(self, loss: Tensor, features: Tensor, missing: Tensor, y: Tensor, dead: Tensor) -> dict[str, float]:
        explained = 1 - missing.square().mean() / (y - y.mean(0)).square().mean()
        l0 = (features > 0).sum(-1).float().mean()
        values = (loss, l0, explained, dead.float().mean())
        return {name: float(value) for name, value in zip(MEASURES, values, strict=True)}

    def _update(self, loss: Tensor, step: int) -> None:
        config, W_dec = self.config, self.weights["W_dec"]
        gradients = torch.autograd.grad(loss, list(self.weights.values()), allow_unused=True)
        pairs = zip(self.weights.items(), gradients, strict=True)
        shared = self._processes.total({n: torch.zeros_like(w) if g is None else g for (n, w), g in pairs})
        for name, weight in self.weights.items():
            weight.grad = shared[name] / self._processes.count
        with torch.no_grad():
            along = (W_dec.grad * W_dec).sum(-1, keepdim=True)  # pyright: ignore[reportOptionalOperand]
            W_dec.grad -= along * W_dec  # pyright: ignore[reportOperatorIssue]
            rate = _ramp(step + 1, config.learning_rate_warmup * config.steps)
            rate *= _ramp(config.steps - step, config.learning_rate_decay * config.steps)
            self._optimizer.param_groups[0]["lr"] = config.learning_rate * rate
            self._optimizer.step()
            W_dec /= W_dec.norm(dim=-1, keepdim=True)
        self._optimizer.zero_grad(set_to_none=True)

    def _maybe_resample(self, dead: Tensor, x: Tensor, missing: Tensor, step: int) -> None:
        config = self.config
        due = config.resample_every and (step + 1) % config.resample_every == 0 and 2 * (step + 1) <= config.steps
        if config.dead_features == "resample" and due and dead.any():
            # One process' rows for all, so that all restart alike.
            mine = {"x": x, "missing": missing.detach()}
            rows = self._processes.total({n: v if self._processes.first else v * 0 for n, v in mine.items()})
            resample(self.weights, self._optimizer, dead, rows["x"], rows["missing"], self._generator)
            self._silent_for = torch.where(dead, 0, self._silent_for)


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
        weights["log_threshold"] = torch.full((config.d_dict,), INITIAL_THRESHOLD).log()
    if config.skip:
        weights["W_skip"] = torch.zeros(site.d_out, site.d_in)
    return weights
