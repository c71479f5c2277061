"""`estimate_memory`: what a batch of an attribution needs, measured on one and on two of its prompts.

    needed(batch) = fixed + per_prompt * batch          bytes above the model's own

Both passes are the real ones, under a meter of all tensors that torch makes, on the longest prompt; so the number holds
for any architecture, method and basis, and costs about as much as attributing six prompts. Temporaries inside kernels
and the allocator's slack come on top.
"""

import logging
from dataclasses import dataclass, replace

import pandas as pd

from .. import _html
from .._errors import SettingsError
from .._memory import available_memory, first_batch, growth
from .._meter import Meter
from .._processes import Processes
from .._progress import progress
from .._typing import checked
from ..bases._runs import mean_parts
from ..models._protocol import TransformerLensModel
from ..tasks._tokenized import Batch, TokenizedPairs
from ._integrated_gradients import IntegratedGradients, IntegratedGradientsInputs
from ._mask_gradient import MaskGradient
from ._method import Method
from ._patching import Patching
from ._scope import Scope
from ._sums import ROWS

logger = logging.getLogger(__name__)
_REFUSE = 1.5  # times what is available: beyond the estimate's own error


@dataclass(frozen=True, repr=False)
class MemoryEstimate:
    """Bytes that an attribution needs above the model's own, by batch size.

    Example:
        >>> import tl_neuron_circuits as tnc
        >>> model = tnc.load_demo_model()
        >>> pairs = tnc.tasks.subject_verb_agreement("simple", n=8)
        >>> estimate = tnc.estimate_memory(model, pairs)
        >>> estimate.to_dataframe().columns.tolist()
        ['batch_size', 'bytes', 'fits']
    """

    model: int
    """Bytes of the weights and buffers themselves."""
    fixed: int
    per_prompt: int
    batch_size: int
    length: int
    """Tokens of the longest prompt."""
    available: int | None
    """Bytes free on the model's devices; None where that cannot be told."""

    @property
    def needed(self) -> int:
        """Bytes above the model's at `batch_size`."""
        return self.at(self.batch_size)

    @property
    def fits(self) -> bool:
        """Whether `needed` is available, as far as known."""
        return self.available is None or self.needed <= self.available

    @property
    def largest_batch(self) -> int | None:
        """The most prompts that fit; 0 where not even one does, None where it cannot be told."""
        if self.available is None:
            return None
        return max(0, (self.available - self.fixed) // max(self.per_prompt, 1))

    @checked
    def at(self, batch_size: int) -> int:
        """Bytes above the model's at another batch size."""
        return self.fixed + self.per_prompt * batch_size

    def to_dataframe(self) -> pd.DataFrame:
        """One row per batch size (powers of two): columns batch_size, bytes, fits."""
        sizes = [2**k for k in range(11)]
        return pd.DataFrame(
            {
                "batch_size": sizes,
                "bytes": [self.at(size) for size in sizes],
                "fits": [self.available is None or self.at(size) <= self.available for size in sizes],
            }
        )

    def __repr__(self) -> str:
        there = "unknown" if self.available is None else f"{_gb(self.available)}, at most {self.largest_batch} prompts"
        return (
            f"MemoryEstimate({self.batch_size} prompts of {self.length} tokens need {_gb(self.needed)} beside the "
            f"model's {_gb(self.model)}; available {there})"
        )

    def _repr_html_(self) -> str:
        return _html.block(repr(self), _html.table(self.to_dataframe(), bars=("bytes",), rows=60))


def measured(
    scope: Scope, method: Method, tokens: TokenizedPairs, batch_size: int, available: int | None = None,
    *, verbose: bool | None = False,
) -> MemoryEstimate:  # fmt: skip
    """The estimate, from one and two rows of the longest prompt, and four and eight where there is room."""
    if isinstance(method, IntegratedGradients | IntegratedGradientsInputs | MaskGradient):
        method = replace(method, steps=1)  # one step after the other: memory is that of one
    if available is None:
        available = available_memory(scope.model)
    wanted = len(tokens) if batch_size == 1 else batch_size
    with progress(desc="estimate_memory", verbose=verbose, unit="pass") as bar:

        def peak(n: int) -> int:
            bytes_at_once = _peak(scope, method, next(tokens.longest(n).batches(n)))
            bar.update()
            return bytes_at_once

        fixed, each = growth(peak, available, wanted)
    weights = sum(p.numel() * p.element_size() for p in scope.model.parameters())
    return MemoryEstimate(weights, fixed, each, batch_size, max(tokens.lengths), available)


def fitting_batch(
    scope: Scope, method: Method, tokens: TokenizedPairs, batch_size: int | str, processes: Processes
) -> int:
    """The batch size to begin with; for a number, the number itself once it is known to fit.

    The estimate is made only for "auto", and where a rule of thumb comes near what is available.

    Raises:
        SettingsError: the batch needs far more than there is; the message says what would help.
    """
    available = available_memory(scope.model)
    if batch_size == "auto":
        estimate = measured(scope, method, tokens, 1, available)
        size = min(processes.gather(first_batch(estimate.fixed, estimate.per_prompt, available, len(tokens))))
        logger.info("batch_size='auto' begins with %d: %r", size, replace(estimate, batch_size=size))
        return size
    size = int(batch_size)
    if available is None or rule_of_thumb(scope.model, max(tokens.lengths), size) < 0.25 * available:
        return size
    judge(measured(scope, method, tokens, min(size, len(tokens)), available))
    return size


def judge(estimate: MemoryEstimate) -> None:
    """Warn where it will be tight, refuse where it cannot do.

    Raises:
        SettingsError: with the numbers, and the arguments that would help.
    """
    if estimate.available is None or estimate.needed < 0.9 * estimate.available:
        return
    fitting = estimate.largest_batch or 0
    if fitting >= 1:
        remedy = f"Use batch_size={fitting} or less, or batch_size='auto'."
    else:
        remedy = (
            "Not even one prompt fits: use shorter prompts, fewer layers (bases.Neurons(layers=...)), "
            "positions='sum', or a model in bfloat16."
        )
    message = f"expected a batch that fits into memory; {estimate!r}. {remedy}"
    if estimate.needed > _REFUSE * estimate.available:
        raise SettingsError(message)
    logger.warning(message)


def rule_of_thumb(model: TransformerLensModel, length: int, batch_size: int) -> int:
    """Bytes of the graph of a dense transformer, roughly and rather too many: is it worth measuring?"""
    cfg = model.cfg
    width, hidden, heads = int(cfg.d_model), int(cfg.d_mlp or 0), int(cfg.n_heads or 0)
    a_layer = 16 * width + 8 * hidden + 4 * heads * length
    size = next(iter(model.parameters())).element_size()
    return batch_size * length * (int(cfg.n_layers) * a_layer * size + 8 * int(cfg.d_vocab))


def _peak(scope: Scope, method: Method, batch: Batch) -> int:
    """Most bytes at once while this batch is scored."""
    if isinstance(method, Patching):  # one chunk of forward rows is like all others
        first = scope.sites[0].hook
        rows = [{"hook": first, "kind": "node", "position": 0, "unit": unit} for unit in range(ROWS)]
        method = Patching(pd.DataFrame(rows))
    means = mean_parts(scope.model, scope.sites, [batch]) if scope.baseline == "mean" else None
    with Meter() as meter:
        method.score(scope, batch, means, rows=ROWS * len(batch), verbose=False)
    return meter.peak


def _gb(size: int) -> str:
    return f"{size / 1e9:.3g} GB"
