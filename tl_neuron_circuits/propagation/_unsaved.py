"""What a piece of the model would save for a backward pass that never runs through it.

A rule gives the gradients at a piece's inputs itself, so autograd's tensors inside (tanh and powers of a GELU, both
branches of a product) are memory for nothing. Between the piece's input and its end they are not kept.
"""

from typing import Any

import torch
from torch import Tensor


class Unsaved:
    """Opened at a piece's first hook point and closed at its last, in the same forward pass.

    The tensors of a piece that somebody listens to are needed: then it is not opened.
    """

    def __init__(self) -> None:
        self._open: Any = None

    def open(self) -> None:
        """From here on saved tensors are dropped."""
        if self._open is None:
            self._open = torch.autograd.graph.saved_tensors_hooks(_drop, _gone)
            self._open.__enter__()

    def close(self) -> bool:
        """Tensors are saved again. Returns whether it was open: nobody else reads or writes inside the piece then."""
        if self._open is None:
            return False
        opened, self._open = self._open, None
        opened.__exit__(None, None, None)
        return True


def _drop(value: Tensor) -> Any:
    if not value.is_floating_point():
        return value
    return value.shape, value.dtype, value.device


def _gone(kept: Any) -> Tensor:
    """A stand-in of the tensor's shape and no memory: what arrives at its node is no gradient, or zeros.

    Ones, so that zeros stay zeros whatever the node computes from them, a quotient too.
    """
    if isinstance(kept, Tensor):
        return kept
    shape, dtype, device = kept
    return torch.ones((), dtype=dtype, device=device).expand(shape)
