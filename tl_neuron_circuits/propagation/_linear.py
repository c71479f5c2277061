"""Linear maps near the end of the model: their backward pass only where there is a gradient.

A metric reads the logits of one position, so up to the last attention layer the gradient is zero at all others. The
product of these zeros with the unembedding is as dear as the forward pass through it (a third of GPT-2's); it is left
out. The gradient is the same, for every rule, and the same module computed the forward value.
"""

import functools
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor, nn

from ..models._protocol import TransformerLensModel, submodule


def end_linears(model: TransformerLensModel, n_layers: int) -> Iterator[nn.Module]:
    """Linear maps of the last block and the unembedding that are modules of their own, of types known exactly.

    On `HookedTransformer` only the unembedding is; its blocks keep their weights beside other operations.
    """
    for path in (f"blocks.{n_layers - 1}", "unembed"):
        module = submodule(model, path)
        for part in () if module is None else module.modules():
            if to_input(part) is not None:
                yield part


def to_input(module: nn.Module) -> tuple[Tensor, bool] | None:
    """The module's weight, and whether it is stored `[in, out]`; None for what is not known to be linear."""
    kind = type(module)
    if kind is nn.Linear:
        return module.weight, False  # pyright: ignore[reportReturnType]
    named = f"{kind.__module__}.{kind.__qualname__}"
    if named == "transformers.pytorch_utils.Conv1D":
        return module.weight, True  # pyright: ignore[reportReturnType]
    if named == "transformer_lens.components.unembed.Unembed":
        return module.W_U, True  # pyright: ignore[reportReturnType]
    return None


def skip_zero_rows(module: nn.Module, ours: Callable[[], set[int]]) -> Any:
    """Install on a linear map; returns torch's handle. `ours` are the ids of the raw hooks that may be inside it."""
    return module.register_forward_hook(functools.partial(_skip, ours))


def _skip(ours: Callable[[], set[int]], module: nn.Module, arguments: tuple[Any, ...], output: Any) -> Tensor | None:
    found = to_input(module)
    if found is None or len(arguments) != 1 or _watched(module, ours()):
        return None
    (x,), (weight, stored_in_out) = arguments, found
    frozen = not any(p.requires_grad for p in module.parameters())
    if not (frozen and output.requires_grad and x.dtype == weight.dtype == output.dtype) or weight.is_meta:
        return None
    return LinearEnd.apply(x, output, weight.T if stored_in_out else weight)  # pyright: ignore[reportReturnType]


def _watched(module: nn.Module, ours: set[int]) -> bool:
    """Whether somebody else's hook sits on the module or inside it: it may edit values, or ask for gradients.

    What runs before the module only changes the input, which is seen here as it is then.
    """
    parts = (part for part in module.modules() if part is not module)
    return others_hooks(module, ours, before=False) or any(others_hooks(part, ours) for part in parts)


def others_hooks(module: nn.Module, ours: set[int], *, before: bool = True) -> bool:
    """Whether a torch hook that is not one of `ours` sits on the module; without `before`, one that sees its value."""
    kinds = ("_forward_hooks", "_backward_hooks", "_backward_pre_hooks", *(("_forward_pre_hooks",) if before else ()))
    return any(not ours.issuperset(getattr(module, kind)) for kind in kinds)


class LinearEnd(torch.autograd.Function):
    """`output` as it is; backward, the rows of the gradient that are not zero times `weight` `[out, in]`."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, output: Tensor, weight: Tensor) -> Tensor:
        ctx.weight, ctx.shape, ctx.device = weight.detach(), x.shape, x.device
        return output.detach()

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None, None]:
        rows = gradients[0].reshape(-1, gradients[0].shape[-1])
        return _times_nonzero(rows, ctx.weight).reshape(ctx.shape).to(ctx.device), None, None


def _times_nonzero(rows: Tensor, weight: Tensor) -> Tensor:
    try:
        chosen = rows.any(-1).nonzero().flatten()
    except RuntimeError:  # a batch of gradients (vmap) has no rows of its own
        return rows @ weight
    if 2 * len(chosen) > len(rows):
        return rows @ weight
    found = rows.new_zeros(len(rows), weight.shape[1])
    return found.index_copy_(0, chosen, rows[chosen] @ weight)
