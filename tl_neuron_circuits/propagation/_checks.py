"""How we know that the rules really applied: what fired, and what each rule rebuilt.

Every piece of the model that a rule stands for is rebuilt from its inputs and compared with the value the model
computed. Deviations stay on their device and are read once, at the end of the forward pass, so that checks cost no
synchronization.
"""

import math

import torch
from torch import Tensor

from .._errors import NumericalError, PropagationError, UnsupportedModelError

_TOLERANCE = {torch.float64: 1e-5, torch.float32: 1e-5, torch.float16: 1e-2, torch.bfloat16: 5e-2}


class Checks:
    """What is expected to fire in a forward pass, what did, and how far rebuilt values were off."""

    def __init__(self, *, slack: float) -> None:
        self._expected: dict[str, int] = {}  # hook name -> layer
        self._slack = slack
        self._fired: set[str] = set()
        self._deviations: list[tuple[str, Tensor, float]] = []

    def expect(self, name: str, layer: int) -> None:
        """Expect the hook point to fire in every forward pass that runs through `layer`."""
        self._expected[name] = layer

    def fired(self, name: str) -> None:
        """Note that a hook fired.

        Raises:
            PropagationError: without gradients, as inside reentrant checkpointing.
        """
        if not torch.is_grad_enabled():
            raise PropagationError(
                f"expected gradients to be enabled at {name}; the model runs its layers without a graph there, as "
                "reentrant gradient checkpointing does. Use gradient_checkpointing_enable("
                "gradient_checkpointing_kwargs={'use_reentrant': False}), or model.eval()."
            )
        self._fired.add(name)

    def compare(self, name: str, rebuilt: Tensor, value: Tensor) -> None:
        """Note how far the rule's value is from the model's own, relative to the largest."""
        if rebuilt.shape != value.shape:
            raise UnsupportedModelError(
                f"{name} has shape {tuple(value.shape)}, and the rule before it gives {tuple(rebuilt.shape)}: the "
                "module does not compute what its hook points say (fused projections have twice the width)."
            )
        off, size = _largest(rebuilt.to(value.dtype) - value), _largest(value)
        relative = off.float() / (size.float() + torch.finfo(torch.float32).tiny)
        self._deviations.append((name, relative, _TOLERANCE[value.dtype] + self._slack))

    def verify(self, *, whole_forward: bool) -> None:
        """Raise for what did not fire or did not match since the last call.

        A forward that started at a later layer (`start_at_layer`) is judged from the first layer that fired.

        Raises:
            UnsupportedModelError: a hook did not fire.
            PropagationError: a rule does not stand for what the model computes.
            NumericalError: the model's values are not finite.
        """
        fired, deviations = self._fired, self._deviations
        self._fired, self._deviations = set(), []
        if whole_forward:
            self._verify_fired(fired)
        if not deviations:
            return
        worst = torch.stack([relative.to("cpu") for _, relative, _ in deviations]).tolist()
        for (name, _, tolerance), off in zip(deviations, worst, strict=True):
            if not math.isfinite(off):
                raise NumericalError(
                    f"expected finite activations at {name}; the model computed NaN or infinite values there. "
                    "Look for broken weights, fp16 overflow, or rows of padding that attend to nothing."
                )
            if off > tolerance:
                raise PropagationError(
                    f"the rule at {name} does not rebuild what the model computes (off by {off:.1e} of the largest "
                    f"value, allowed {tolerance:.0e}): the module does not compute what its hook points say (a "
                    "norm or a quantization in between), or than when relp was entered. Enter relp after "
                    "changing the model."
                )

    def _verify_fired(self, fired: set[str]) -> None:
        start = min((self._expected[name] for name in fired if name in self._expected), default=0)
        missing = [name for name, layer in self._expected.items() if layer >= start and name not in fired]
        if missing:
            raise UnsupportedModelError(
                f"expected the hooks of relp to fire at every site; {len(missing)} of {len(self._expected)} did not, "
                f"the first at {missing[0]}: the model skips that module (check_model(model) tells)."
            )


def _largest(value: Tensor) -> Tensor:
    """The largest |value|, NaN where one is, without a copy (vector_norm(inf) takes ten times as long)."""
    low, high = value.aminmax()
    return torch.maximum(-low, high)
