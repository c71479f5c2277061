"""`estimate_memory`: what a batch of an attribution needs, measured on one and on two of its prompts.

    needed(batch) = fixed + per_prompt * batch          bytes above the model's own

Both passes are the real ones, under a meter of all tensors that torch makes, on the longest prompt; so the number holds
for any architecture, method and basis, and costs about as much as attributing six prompts. Temporaries inside kernels
and the allocator's slack come on top.
"""

import logging
import os
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

import pandas as pd
import torch

from .. import _html
from .._errors import SettingsError
from .._processes import Processes
from .._typing import checked
from ..bases import Basis, Neurons, mean_parts, sites_of
from ..models import TransformerLensModel
from ..propagation import ALL_RULES
from ..tasks import Batch, Metric, PromptPairs, TokenisedPairs, logit_difference, tokenise
from ._inputs import check_pairs, check_setting
from ._meter import Meter
from ._run import score
from ._setting import Baseline, Direction, MethodName, Setting
from ._total import Total

logger = logging.getLogger(__name__)
_FILL = 0.8  # of what is available, for "auto"
_LARGEST = 128  # a larger batch is not faster
_REFUSE = 1.5  # times what is available: beyond the estimate's own error
_ROWS = 8  # forward rows a prompt of `batch_size`, for patching


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

    def at(self, batch_size: int) -> int:
        """Bytes above the model's at another batch size."""
        return self.fixed + self.per_prompt * batch_size

    def to_dataframe(self) -> pd.DataFrame:
        """One row a batch size (powers of two): columns batch_size, bytes, fits."""
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


@checked
def estimate_memory(
    model: TransformerLensModel,
    pairs: PromptPairs | TokenisedPairs,
    *,
    method: MethodName = "relp",
    basis: Basis | Sequence[Basis] | None = None,
    metric: Metric = logit_difference,
    positions: Literal["keep", "sum"] = "keep",
    units: Literal["keep", "sum"] = "keep",
    baseline: Baseline = "corrupt",
    direction: Direction = "noising",
    rules: Sequence[str] | None = None,
    batch_size: int = 32,
    prepend_bos: bool | None = None,
    multi_token: Literal["error", "first_difference"] = "error",
    available: int | None = None,
) -> MemoryEstimate:
    """Bytes that `attribute` with these arguments needs beside the model, without running it on more than a prompt.

    Memory does not grow with the number of pairs, only with the batch, the length of the longest prompt and what is
    kept of a run. Arguments as of `attribute`.

    Args:
        available: bytes to judge by; what is free on the model's devices unless given.

    Returns:
        A `MemoryEstimate`: `.needed`, `.fits`, `.largest_batch`, `.to_dataframe()`.

    Raises:
        SettingsError: arguments contradict each other.
        PairsError: as `attribute`.

    Source: ours; docs/how-to/large-models.md says what it was compared with.

    Example:
        >>> import tl_neuron_circuits as tnc
        >>> model = tnc.load_demo_model()
        >>> estimate = tnc.estimate_memory(model, tnc.tasks.subject_verb_agreement("simple", n=8), batch_size=8)
        >>> estimate.at(16) > estimate.needed
        True
    """
    rules = tuple((ALL_RULES if method == "relp" else ()) if rules is None else rules)
    sites = sites_of(model, Neurons() if basis is None else basis)
    setting = Setting(model, sites, metric, method, rules, None, 1, baseline, direction, positions, units)
    check_setting(setting, batch_size, None)
    tokens = tokenise(model, pairs, prepend_bos=prepend_bos, multi_token=multi_token)
    check_pairs(tokens, setting)
    return measured(setting, tokens, batch_size, available)


def measured(setting: Setting, tokens: TokenisedPairs, batch_size: int, available: int | None = None) -> MemoryEstimate:
    """The estimate, from one and two rows of the longest prompt."""
    setting = replace(setting, steps=1)
    row = max(range(len(tokens)), key=lambda index: tokens.lengths[index])
    _peak(setting, _rows(tokens, row, 1))  # what is made on first use is not the batch's
    one, two = (_peak(setting, _rows(tokens, row, n)) for n in (1, 2))
    each = max(two - one, 1)
    if available is None:
        available = available_memory(setting.model)
    weights = sum(p.numel() * p.element_size() for p in setting.model.parameters())
    return MemoryEstimate(weights, max(one - each, 0), each, batch_size, tokens.lengths[row], available)


def fitting_batch(setting: Setting, tokens: TokenisedPairs, batch_size: int | str, processes: Processes) -> int:
    """The batch size to begin with; for a number, the number itself once it is known to fit.

    The estimate is made only for "auto", and where a rule of thumb comes near what is available.

    Raises:
        SettingsError: the batch needs far more than there is; the message says what would help.
    """
    available = available_memory(setting.model)
    if batch_size == "auto":
        estimate = measured(setting, tokens, 1, None if available is None else int(_FILL * available))
        most = min(_LARGEST, len(tokens))
        size = most if estimate.largest_batch is None else max(1, min(most, estimate.largest_batch))
        size = min(processes.gather(size))
        logger.info("batch_size='auto' begins with %d: %r", size, replace(estimate, batch_size=size))
        return size
    size = int(batch_size)
    if available is None or rule_of_thumb(setting.model, max(tokens.lengths), size) < 0.25 * available:
        return size
    judge(measured(setting, tokens, min(size, len(tokens)), available))
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


def available_memory(model: TransformerLensModel) -> int | None:
    """Bytes free on the devices that hold the model's parameters; None where a device does not tell."""
    free = [_free(device) for device in {parameter.device for parameter in model.parameters()}]
    known = [one for one in free if one is not None]
    return sum(known) if len(known) == len(free) else None


def _free(device: torch.device) -> int | None:
    if device.type == "cuda":
        unused = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
        return torch.cuda.mem_get_info(device)[0] + unused
    if device.type != "cpu":
        return None
    limits = [_meminfo(), _cgroup()]
    known = [limit for limit in limits if limit is not None]
    return min(known) if known else None


def _meminfo() -> int | None:
    """Linux: what can be had without swapping."""
    file = Path("/proc/meminfo")
    if not file.is_file():
        return _pages()
    fields = dict(line.split(":", 1) for line in file.read_text().splitlines() if ":" in line)
    return int(fields["MemAvailable"].split()[0]) * 1024 if "MemAvailable" in fields else None


def _pages() -> int | None:
    names = getattr(os, "sysconf_names", {})
    if "SC_AVPHYS_PAGES" not in names:
        return None
    return os.sysconf("SC_AVPHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")


def _cgroup() -> int | None:
    """A container's limit less what it uses, the file cache not counted."""
    folder = Path("/sys/fs/cgroup")
    try:
        limit = (folder / "memory.max").read_text().strip()
        used = int((folder / "memory.current").read_text())
        stat = dict(line.split() for line in (folder / "memory.stat").read_text().splitlines())
    except (OSError, ValueError):
        return None
    return None if limit == "max" else int(limit) - used + int(stat.get("inactive_file", 0))


def _rows(tokens: TokenisedPairs, row: int, n: int) -> Batch:
    index = torch.full((n,), row, device=tokens.answer.device)
    column = lambda tensor: None if tensor is None else tensor[index]  # noqa: E731
    same = TokenisedPairs(
        clean=(tokens.clean[row],) * n,
        answer=tokens.answer[index],
        position=tokens.position[index],
        corrupt=None if tokens.corrupt is None else (tokens.corrupt[row],) * n,
        wrong_answer=column(tokens.wrong_answer),
        corrupt_position=column(tokens.corrupt_position),
        labels=None if tokens.labels is None else (tokens.labels[row],) * n,
    )
    return next(same.batches(n))


def _peak(setting: Setting, batch: Batch) -> int:
    """Most bytes at once while this batch is scored."""
    chosen: Any = None
    if setting.method == "patching":  # one chunk of forward rows is like all others
        first = setting.sites[0].hook
        chosen = {(first, "node"): torch.tensor([[0, unit] for unit in range(_ROWS)])}
    means = mean_parts(setting.model, setting.sites, [batch]) if setting.baseline == "mean" else None
    with Meter() as meter:
        total = Total(setting, 0)
        score(setting, batch, means, chosen, total, rows=_ROWS * len(batch), verbose=False)
        del total
    return meter.peak


def _gb(size: int) -> str:
    return f"{size / 1e9:.3g} GB"
