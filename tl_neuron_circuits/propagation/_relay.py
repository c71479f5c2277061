"""The primitive under every rule: keep the forward value, send the gradient where a rule says.

`Relay` sits at the end of a piece of the model (an activation, a norm). Its forward returns the value bit for bit; its
backward asks the rule for the gradients at the piece's inputs and leaves them in a `Mailbox`. A backward pre-hook on
each input's hook point adds what the mailbox holds to the gradient arriving there. The piece's own backward still runs,
with zeros: with None instead, backward hooks between the two would silently never fire. Going through the hook point,
rather than around it, is what lets a user's own `bwd` hook at `mlp.hook_pre` or `ln1.hook_in` see RelP's gradient.
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
        self._waiting: dict[str, Tensor] = {}

    def leave(self, gradients: Gradients) -> None:
        self._waiting.update(gradients)

    def deliver(
        self, name: str, arriving: tuple[Tensor | None, ...], *, replace: bool = False
    ) -> tuple[Tensor | None, ...] | None:
        """The gradient arriving at hook point `name` plus (or replaced by) what waits, None where nothing waits."""
        waiting = self._waiting.pop(name, None)
        if waiting is None:
            return None
        first = arriving[0]
        if first is not None:  # some hook points show hooks a reshaped view: OPT's MLP works on [batch * pos, d]
            waiting = waiting.reshape(first.shape).to(first.dtype)
            waiting = waiting if replace else waiting + first
        return (waiting, *arriving[1:])

    def empty(self) -> None:
        self._waiting.clear()


class Relay(torch.autograd.Function):
    """Identity in the forward pass; in the backward pass, `rule` takes the gradient and fills the mailbox.

    `bias` is what the piece adds at its end, if anything: it receives its ordinary gradient.
    """

    @staticmethod
    def forward(
        ctx: Any, value: Tensor, bias: Tensor | None, rule: Callable[[Tensor], Gradients], box: Mailbox
    ) -> Tensor:
        ctx.rule, ctx.box = rule, box
        ctx.bias_shape = None if bias is None else bias.shape
        return value.detach()

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, Tensor | None, None, None]:
        (gradient,) = gradients
        ctx.box.leave(ctx.rule(gradient))
        to_bias = None
        if ctx.bias_shape is not None and ctx.needs_input_grad[1]:
            to_bias = gradient.sum_to_size(ctx.bias_shape)
        return torch.zeros_like(gradient), to_bias, None, None
