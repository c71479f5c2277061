"""The primitive under every rule: keep the forward value, send the gradient where a rule says.

`Relay` sits at the end of a piece of the model (an activation, a norm). Its forward returns the value bit for bit; its
backward asks the rule for the gradients at the piece's inputs and leaves them in a `Mailbox`. A backward pre-hook on
each input's hook point adds what the mailbox holds to the gradient arriving there. The piece's own backward is skipped
where it can be: it gets no gradient at all, which torch passes on without computing. Where somebody listens inside the
piece it gets zeros instead, since hooks there would see None. Going through the hook point, rather than around it, is
what lets a user's own `bwd` hook at `mlp.hook_pre` or `ln1.hook_in` see RelP's gradient.
"""

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor

Gradients = Mapping[str, Tensor]


class Mailbox:
    """Gradients on their way from a `Relay` to hook points, by name.

    One slot a hook point suffices: autograd runs the nodes of one forward pass in reverse order, so that each slot is
    emptied before the `Relay` of another pass through the same module fills it.
    """

    def __init__(self) -> None:
        self._waiting: dict[str, tuple[Tensor, bool]] = {}
        self._forms: dict[str, tuple[torch.Size, torch.dtype]] = {}

    def address(self, name: str, value: Tensor) -> None:
        """Note what gradients at `name` look like: some hook points show hooks a reshaped view of the value."""
        self._forms[name] = (value.shape, value.dtype)

    def leave(self, gradients: Gradients, *, alone: bool = False) -> None:
        """Leave gradients; `alone` says that no other reaches these hook points, so that none need be added."""
        self._waiting.update((name, (gradient, alone)) for name, gradient in gradients.items())

    def deliver(
        self, name: str, arriving: tuple[Tensor | None, ...], *, replace: bool = False
    ) -> tuple[Tensor | None, ...] | None:
        """The gradient arriving at hook point `name` plus (or replaced by) what waits, None where nothing waits."""
        if name not in self._waiting:
            return None
        waiting, alone = self._waiting.pop(name)
        first = arriving[0]
        form = self._forms.get(name) if first is None else (first.shape, first.dtype)
        if form is not None:
            waiting = waiting.reshape(form[0]).to(form[1])  # OPT's MLP works on [batch * pos, d]
        if first is not None and not (replace or alone):
            waiting = waiting + first
        return (waiting, *arriving[1:])

    def empty(self) -> None:
        self._waiting.clear()


class Relay(torch.autograd.Function):
    """Identity in the forward pass; in the backward pass, `rule` takes the gradient and fills the mailbox.

    `bias` is what the piece adds at its end, if anything: it receives its ordinary gradient. `heard` tells whether
    somebody listens to gradients inside the piece, `alone` whether nothing else than the piece takes up its inputs.
    """

    @staticmethod
    def forward(
        ctx: Any,
        value: Tensor,
        bias: Tensor | None,
        rule: Callable[[Tensor], Gradients],
        box: Mailbox,
        heard: Callable[[], bool],
        alone: bool = False,
    ) -> Tensor:
        ctx.rule, ctx.box, ctx.heard, ctx.alone = rule, box, heard, alone
        ctx.bias_shape = None if bias is None else bias.shape
        return value.detach()

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, Tensor | None, None, None, None, None]:
        (gradient,) = gradients
        ctx.box.leave(ctx.rule(gradient), alone=ctx.alone)
        to_bias = None
        if ctx.bias_shape is not None and ctx.needs_input_grad[1]:
            to_bias = gradient.sum_to_size(ctx.bias_shape)
        return torch.zeros_like(gradient) if ctx.heard() else None, to_bias, None, None, None, None


def times(factor: Tensor, gradient: Tensor) -> Tensor:
    """Their product, in `factor`'s memory: a second large buffer costs more than the arithmetic.

    A batch of gradients (vmap, as `autograd.grad(is_grads_batched=True)` sends) does not fit there and gets its own.
    """
    try:
        return factor.mul_(gradient)
    except RuntimeError:
        return factor * gradient
