"""Steering as TransformerLens hooks: multiply, set or add to chosen activations, at some positions or everywhere.

    scale:  a <- scale * a      (0 ablates, 1 changes nothing, bit for bit)
    value:  a <- value          (a number; or what the nodes were in another run: an interchange intervention)
    add:    a <- a + add

A feature of a dictionary is read by its encoder and written by its decoder, and what the dictionary misses stays:

    value at hook_out  <-  value + sum_f (new_f - old_f) * W_dec[f]

The old feature is what this run computes, so that steering upstream is seen. Where nothing changes the value stays, bit
for bit.

The complement of some nodes is everything else: all units of their hook points' basis, in every layer and at every
position, or all of a given set (a circuit). It is changed first, and the nodes are then set back to what they were when
their hook point was reached, which may not be what they are without steering: earlier layers were changed too.

Positions count the tokens of the prompt from 0, BOS and padding included. In `generate` they belong to the prompt: a
pass that continues a key-value cache is not touched by them (the cached keys and values keep what the prompt's pass
computed), and without a cache every pass contains the prompt again, so both give the same text. Nodes without a
position are steered at every position, generated ones included. The two kinds of passes are told apart by the shape
[.., query, key] of an attention pattern. (The `generate` of a TransformerBridge whose cache stays empty, as with
transformers 5.24, gives wrong text with or without steering; there positions raise, and `use_past_kv_cache=False` is
right. `steer(generate=...)` fills the cache, `_continue.py`.)
Source: METHODS 1.7.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal, cast

import pandas as pd
import torch
from jaxtyping import Float, Int
from torch import Tensor

from .._errors import SettingsError, UnsupportedModelError
from .._indices import Indices
from .._typing import checked
from ..bases._dictionary_basis import DictionarySite
from ..models._protocol import TransformerLensModel, hook_points
from ..models._threads import this_thread_only
from ._ablation import Hooks
from ._find_nodes import EVERY_UNIT, Complement, Dictionaries, Nodes, Steered, find_steered

Amount = int | float | Float[Tensor, "..."]
"""One number for all nodes, or a tensor [node], or [batch, node]: nodes in the order given."""
How = Literal["scale", "value", "add"]

_EMPTY_CACHE = (
    " If this is generate(...) on a TransformerBridge, its key-value cache is empty and generated tokens see only "
    "themselves (TransformerLens 3.9 and 4.3 with transformers 5.24): call generate(..., use_past_kv_cache=False)."
)
_THREAD = (
    "steering hooks act in the thread that made them alone: call steering_hooks in the thread that runs the model (and "
    "use one thread at a time, or a copy of the model, copy.deepcopy, for each)"
)
_CHANGES: dict[How, Callable[[Tensor, Any], Tensor]] = {
    "scale": lambda x, amount: x * amount,
    "value": lambda x, amount: torch.as_tensor(amount).to(x).expand_as(x),
    "add": lambda x, amount: x + amount,
}


@checked
def steering_hooks(
    model: TransformerLensModel,
    nodes: Nodes,
    *,
    scale: Amount | None = None,
    value: Amount | None = None,
    add: Amount | None = None,
    positions: Indices | None = None,
    basis: Dictionaries = None,
    complement: Complement = False,
) -> Hooks:
    """Forward hooks that steer `nodes`, for `model.hooks(fwd_hooks=...)` or `model.run_with_hooks`; also in `generate`.

    Args:
        model: a HookedTransformer or TransformerBridge; it is only read.
        nodes: labels ("L12/N345@7", or "L12/N345" for every position), rows of `NodeScores.top` (columns hook, unit,
            position; -1 is every position), or a `Circuit`, whose neurons and features are steered. Units of hook
            points with heads (`attn.hook_z`) count over heads concatenated.
        scale: multiply by it.
        value: set to it; with `node_values` of another prompt this is an interchange intervention.
        add: add it.
        positions: steer every node at these positions of the prompt, counted from 0 (or a boolean mask of them); only
            for nodes without positions of their own. In `generate`, positions apply to the prompt; None applies to
            generated tokens too.
        basis: the dictionaries of features ("L2/F5@3"), as given to `attribute` or `trace`; a circuit from `trace` has
            its own.
        complement: steer everything but `nodes`: True means all other nodes of their basis in the model (`[]` has none
            to spare; `basis`, by default neurons, then says which are steered), a circuit or other nodes all others
            among those. Takes numbers only.

    Exactly one of `scale`, `value` and `add`: a number, or a tensor [node] or [batch, node] in the order of the nodes
    (with `positions`: nodes outer, positions inner).

    Raises:
        SettingsError: not exactly one change, a node that cannot be read or stands twice, a tensor of another shape;
            while the model runs: a unit out of range, a position outside the prompt.
        PropagationError: while the model runs: in another thread than the one that made the hooks.
        UnsupportedModelError: the model lacks a hook point; or, for positions, one that fires before the first
            attention pattern, where the prompt's pass cannot be told from a generated token's.

    Source: METHODS 1.7.

    Example:
        >>> import tl_neuron_circuits as tnc
        >>> model = tnc.load_demo_model()
        >>> hooks = tnc.steering_hooks(model, ["L2/N5", "L3/N7@4"], scale=0)
        >>> logits = model.run_with_hooks("The dog near the cats", fwd_hooks=hooks)
        >>> transcoders = tnc.bases.Dictionaries(tnc.load_demo_dictionaries("transcoder"))
        >>> hooks = tnc.steering_hooks(model, ["L1/F7"], scale=2, basis=transcoders)
    """
    how, amount = the_change(scale, value, add)
    hooks = hooks_for(model, find_steered(model, nodes, positions, basis, complement), how, amount)
    return [(name, this_thread_only(hook, _THREAD)) for name, hook in hooks]


def the_change(scale: Amount | None, value: Amount | None, add: Amount | None) -> tuple[How, Amount]:
    """The one change that was asked for."""
    changes: dict[How, Amount | None] = {"scale": scale, "value": value, "add": add}
    given = [(how, amount) for how, amount in changes.items() if amount is not None]
    if len(given) != 1:
        raise SettingsError(f"expected exactly one of scale, value and add; got {[how for how, _ in given] or 'none'}.")
    how, amount = given[0]
    return cast(How, how), amount


def hooks_for(model: TransformerLensModel, steered: Steered, how: How, amount: Amount) -> Hooks:
    """The hooks for nodes that `find_steered` has checked."""
    frame = steered.nodes
    if steered.complement is not None:
        return _hooks_for_complement(model, steered, how, amount)
    if isinstance(amount, Tensor) and (amount.dim() > 2 or (amount.dim() and amount.shape[-1] != len(frame))):
        raise SettingsError(
            f"expected {how} to be a number or a tensor [node] or [batch, node] of {len(frame)} nodes (a node at "
            f"several positions counts at each); got the shape {list(amount.shape)}."
        )
    edits, hooks = [], []
    for _, rows in frame.groupby("key", sort=False):
        edit = _edit(rows["hook"].iloc[0], rows, how, amount)
        site = rows["site"].iloc[0]
        edits.append(edit)
        hooks += [(edit.hook, edit)] if site is None else _FeatureEdit(site, edit, edit.units_steered).hooks()
    return _with_passes(model, edits, hooks)


def _hooks_for_complement(model: TransformerLensModel, steered: Steered, how: How, amount: Amount) -> Hooks:
    assert steered.complement is not None
    if isinstance(amount, Tensor) and amount.dim():
        raise SettingsError(f"expected {how} to be a number with complement=; got a tensor {list(amount.shape)}.")
    kept = {key: rows for key, rows in steered.nodes.groupby("key", sort=False)}
    edits, hooks = [], []
    for key, rows in steered.complement.groupby("key", sort=False):
        hook, site = rows["hook"].iloc[0], rows["site"].iloc[0]
        every = (rows["unit"] == EVERY_UNIT).any()
        change = None if every else _edit(hook, rows, how, amount)
        keep = _edit(hook, kept[key], "scale", 1) if key in kept else None
        edits += [edit for edit in (change, keep) if edit is not None]
        rest = _Rest(how, amount, change, keep)
        hooks += [(str(hook), rest)] if site is None else _FeatureEdit(site, rest, None).hooks()
    return _with_passes(model, edits, hooks)


def _with_passes(model: TransformerLensModel, edits: "Sequence[_Edit]", hooks: Hooks) -> Hooks:
    with_positions = [edit for edit in edits if len(edit.positions)]
    return [(_pattern(model), _Passes(with_positions)), *hooks] if with_positions else hooks


@dataclass(eq=False, repr=False)
class _Edit:
    """The hook at one hook point. `_Passes` sets `continues` in every pass; until then it is None."""

    hook: str
    how: How
    everywhere: Int[Tensor, " free"]
    units: Int[Tensor, " fixed"]
    positions: Int[Tensor, " fixed"]
    amount_everywhere: Any
    amount_fixed: Any
    continues: bool | None = None

    def __call__(self, value: Tensor, hook: Any) -> Tensor:
        return self.edited(value, value)

    def edited(self, value: Tensor, source: Tensor) -> Tensor:
        """`value` where the chosen activations are those of `source`, changed."""
        if value.dim() < 3:
            raise SettingsError(f"expected {self.hook} to hold [batch, pos, unit]; got the shape {list(value.shape)}.")
        out, source = value.flatten(2).clone(), source.flatten(2)
        self._check_units(out.shape[-1])
        change = _CHANGES[self.how]
        if len(self.everywhere):
            amount = _fit(self.amount_everywhere, out, 1)
            out[:, :, self.everywhere] = change(source[:, :, self.everywhere], amount)
        if len(self.units) and not self._continues():
            self._check_positions(out.shape[1])
            amount = _fit(self.amount_fixed, out, 0)
            out[:, self.positions, self.units] = change(source[:, self.positions, self.units], amount)
        return out.reshape(value.shape)

    @property
    def units_steered(self) -> Int[Tensor, " unit"]:
        """Each unit once."""
        return torch.cat([self.everywhere, self.units]).unique()

    def _continues(self) -> bool:
        known, self.continues = self.continues, None
        if known is None:
            raise UnsupportedModelError(
                f"{self.hook} fires before the first attention pattern (or the pattern did not fire), so the prompt's "
                "pass cannot be told from a generated token's. Steer it without positions, or steer a later hook point."
            )
        return known

    def _check_units(self, width: int) -> None:
        units = torch.cat([self.everywhere, self.units])
        if int(units.max()) >= width:
            raise SettingsError(f"expected units below {width} at {self.hook}; got {int(units.max())}.")

    def _check_positions(self, length: int) -> None:
        if int(self.positions.max()) >= length:
            raise SettingsError(
                f"expected positions below {length}, the tokens of this prompt; got {int(self.positions.max())} at "
                f"{self.hook}.{_EMPTY_CACHE if length == 1 else ''}"
            )


@dataclass(eq=False, repr=False)
class _Rest:
    """The hook that changes all of a hook point, or what `change` does, and sets back what `keep` names."""

    how: How
    amount: Any
    change: _Edit | None
    keep: _Edit | None

    def __call__(self, value: Tensor, hook: Any) -> Tensor:
        out = _CHANGES[self.how](value, self.amount) if self.change is None else self.change(value, hook)
        return out if self.keep is None else self.keep.edited(out, value)


@dataclass(eq=False, repr=False)
class _Passes:
    """Tell the edits with positions whether this pass continues a key-value cache: more keys than queries."""

    edits: list[_Edit]

    def __call__(self, pattern: Tensor, hook: Any) -> Tensor:
        for edit in self.edits:
            edit.continues = pattern.shape[-1] > pattern.shape[-2]
        return pattern


@dataclass(eq=False, repr=False)
class _FeatureEdit:
    """The hooks that steer features of one dictionary; `edit` changes features `[batch, pos, unit]`.

    `units` are those that it may change, None for all.
    """

    site: DictionarySite
    edit: Callable[..., Tensor]
    units: Int[Tensor, " unit"] | None
    _seen: dict[str, Tensor] = field(default_factory=dict)

    def hooks(self) -> Hooks:
        """One hook that writes, and one that reads where that is elsewhere."""
        reads = [] if self.site.hook_in == self.site.hook else [(self.site.hook_in, self._read)]
        return [*reads, (self.site.hook, self._write)]

    def _read(self, value: Tensor, hook: Any) -> None:
        self._seen[self.site.hook_in] = value

    def _write(self, value: Tensor, hook: Any) -> Tensor:
        nodes = self.site.take_apart({**self._seen, self.site.hook: value}).nodes
        self._seen.clear()
        steered = self.edit(nodes, hook)
        units = slice(None) if self.units is None else self.units.to(nodes.device)
        change = steered[..., units] - nodes[..., units]
        written = (change @ self.site.dictionary.W_dec.to(change)[units]).reshape(value.shape)
        return torch.where(written == 0, value, (value + written).to(value.dtype))


def _edit(hook: Any, rows: pd.DataFrame, how: How, amount: Amount) -> _Edit:
    """`rows` keep their index in the whole frame, which says where their amounts are."""
    fixed = rows["position"].to_numpy() >= 0
    column = {key: torch.as_tensor(rows[key].to_numpy(dtype="int64", copy=True)) for key in ("unit", "position")}
    index, keep = torch.as_tensor(rows.index.to_numpy(dtype="int64", copy=True)), torch.as_tensor(fixed)
    whole, own = (
        amount[..., index[chosen].to(amount.device)] if isinstance(amount, Tensor) and amount.dim() else amount
        for chosen in (~keep, keep)
    )
    return _Edit(str(hook), how, column["unit"][~keep], column["unit"][keep], column["position"][keep], whole, own)


def _fit(amount: Any, like: Tensor, extra: int) -> Any:
    """The amount on the activation's device and dtype; [batch, node] gets `extra` dimensions of positions between."""
    if not isinstance(amount, Tensor):
        return amount
    if amount.dim() == 2 and amount.shape[0] not in (1, like.shape[0]):
        raise SettingsError(
            f"expected a tensor for a batch of {like.shape[0]} prompts; got one for {amount.shape[0]}: [batch, node]."
        )
    amount = amount.to(like)
    return amount[:, None] if amount.dim() == 2 and extra else amount


def _pattern(model: TransformerLensModel) -> str:
    points = hook_points(model)
    names = (f"blocks.{layer}.attn.hook_pattern" for layer in range(int(model.cfg.n_layers)))
    name = next((name for name in names if name in points), None)
    if name is None:
        raise UnsupportedModelError(
            f"expected attn.hook_pattern in some layer of this {type(model).__name__}, to tell the prompt's pass from "
            "a generated token's; it has none. Steer without positions."
        )
    return name
