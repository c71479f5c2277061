"""`steer` and `interchange`: run a model with and without steering hooks, and compare next tokens.

    KL = sum_v p_before(v) (log p_before(v) - log p_after(v))                    of the next token, in nats
    relative change of a watched group = sum_n sign(a_n) (a'_n - a_n) / sum_n |a_n|        a before, a' after steering

so a group scaled by m has m - 1. An interchange intervention sets nodes to the values that `node_values` reads on a
donor prompt. The run without steering is made once, however many changes it is compared with.
Source: METHODS 1.7.
"""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import pandas as pd
import torch
from jaxtyping import Float, Int
from torch import Tensor

from .. import _html
from .._errors import SettingsError
from .._indices import Indices
from .._progress import progress, show_batches
from .._typing import checked
from ..bases._runs import Values
from ..models._protocol import TransformerLensModel
from ..models._threads import holding
from ._continue import continue_greedily
from ._find_nodes import (
    Complement,
    Dictionaries,
    Nodes,
    Steered,
    basis_of,
    find_nodes,
    find_steered,
    reads_of_nodes,
    values_by_key,
)
from ._steering import Amount, How, hooks_for, the_change
from ._steering_prompts import Prompts, ReadPrompts, read_prompts, run, token_names

Watch = Mapping[str, Nodes]


@dataclass(frozen=True, eq=False, repr=False)
class SteeringResult:
    """The model's next token with and without steering, for every prompt.

    `before` and `after` are the logits at each prompt's last position, float32 on the CPU. `watched` holds, for every
    watched group and prompt, the relative change of its activations: sum_n sign(a_n) (a'_n - a_n) / sum_n |a_n| with a
    before and a' after steering, so that a group scaled by m has m - 1 (nan where the whole group was at zero).
    `continuations` holds (before, after) for every prompt where text was generated. `nodes` are the steered ones; with
    `complement=` those that were left alone.

    Example:
        >>> import tl_neuron_circuits as tnc
        >>> model = tnc.load_demo_model()
        >>> result = tnc.steer(model, "The dog near the cats", ["L2/N5"], scale=-2)
        >>> result.summary().columns.tolist()
        ['prompt', 'top_before', 'top_after', 'kl']
        >>> len(result), result.before.shape == result.after.shape
        (1, True)
    """

    prompts: tuple[str, ...]
    before: Float[Tensor, "prompt d_vocab"]
    after: Float[Tensor, "prompt d_vocab"]
    nodes: pd.DataFrame
    settings: Mapping[str, Any]
    watched: Mapping[str, Float[Tensor, " prompt"]]
    continuations: tuple[tuple[str, str], ...] | None
    token_names: Mapping[int, str]

    @property
    def kl(self) -> Float[Tensor, " prompt"]:
        """KL(before || after) = sum_v p_before (log p_before - log p_after) of the next token, in nats."""
        before, after = (logits.double().log_softmax(-1) for logits in (self.before, self.after))
        return (before.exp() * (before - after)).sum(-1).clamp(min=0).float()

    @property
    def top_before(self) -> list[str]:
        """The most probable next token of every prompt, without steering."""
        return [self.token_names[token] for token in self.before.argmax(-1).tolist()]

    @property
    def top_after(self) -> list[str]:
        """The most probable next token of every prompt, with steering."""
        return [self.token_names[token] for token in self.after.argmax(-1).tolist()]

    def __len__(self) -> int:
        """How many prompts."""
        return len(self.prompts)

    def to_dataframe(self) -> pd.DataFrame:
        """The top tokens before and after, most probable after steering first.

        Columns: prompt (its number), token, token_id, and before, after and change (as in probability_change) of
        probability, log_probability (nats) and logit, minus the mean over the vocabulary: what raises all logits alike
        changes no probability. Targets of a steered circuit are always among them.
        """
        frames = []
        targets = self.settings["targets"]
        for index, tokens in enumerate(shown_tokens([self.before, self.after], self.settings["top_k"], targets)):
            frame = pd.DataFrame({"prompt": index, "token": [self.token_names[t] for t in tokens], "token_id": tokens})
            for name, values in (
                ("probability", _probabilities),
                ("log_probability", lambda logits: logits.double().log_softmax(-1).float()),
                ("logit", lambda logits: (logits.double() - logits.double().mean(-1, keepdim=True)).float()),
            ):
                before, after = (values(logits[index])[tokens].numpy() for logits in (self.before, self.after))
                columns = {f"{name}_before": before, f"{name}_after": after, f"{name}_change": after - before}
                frame = frame.assign(**columns)
            frames.append(frame)
        return pd.concat(frames, ignore_index=True)

    def summary(self) -> pd.DataFrame:
        """One row per prompt: prompt, top_before, top_after, kl, a column per watched group, and any continuations."""
        table = {
            "prompt": self.prompts,
            "top_before": self.top_before,
            "top_after": self.top_after,
            "kl": self.kl.numpy(),
        }
        table |= {f"change of {name}": change.numpy() for name, change in self.watched.items()}
        if self.continuations is not None:
            table["continuation_before"], table["continuation_after"] = zip(*self.continuations, strict=True)
        return pd.DataFrame(table)

    def __repr__(self) -> str:
        first = f"{self.prompts[0]!r}: {self.top_before[0]!r} → {self.top_after[0]!r}"
        amount = self.settings["amount"]
        amount = amount if isinstance(amount, int | float) else f"tensor {list(amount.shape)}"
        on = f"all but {len(self.nodes)}" if self.settings.get("complement") else f"{len(self.nodes)}"
        return (
            f"SteeringResult({self.settings['how']}={amount} on {on} nodes, {len(self)} prompts, "
            f"first {first}, mean KL {self.kl.mean():.4g} nats)"
        )

    def _repr_html_(self) -> str:
        first = self.to_dataframe().query("prompt == 0")
        names = {"token": "token", "probability_before": "before", "probability_after": "after"}
        names |= {"probability_change": "change", "log_probability_change": "change of log-probability"}
        shown = first[list(names)].rename(columns=names)
        tables = _html.table(self.summary(), bars=("kl",)), _html.table(shown, bars=("change",))
        return _html.block(repr(self), tables[0], _html.note(f"next token of {self.prompts[0]!r}:"), tables[1])


@holding
@checked
def steer(
    model: TransformerLensModel,
    prompt: Prompts,
    nodes: Nodes,
    *,
    scale: Amount | None = None,
    value: Amount | None = None,
    add: Amount | None = None,
    positions: Indices | None = None,
    basis: Dictionaries = None,
    complement: Complement = False,
    watch: Watch | None = None,
    top_k: int = 10,
    generate: int = 0,
    prepend_bos: bool | None = None,
    batch_size: int = 32,
    verbose: bool | None = None,
) -> SteeringResult:
    """Compare the model's next token with and without steering `nodes`.

    Args:
        model: a HookedTransformer or TransformerBridge.
        prompt: one prompt, several (their lengths may differ), tokens, or the clean prompts of pairs.
        nodes: as in `steering_hooks`; a tensor [batch, node] has one row per prompt.
        scale: as in `steering_hooks`.
        value: as in `steering_hooks`.
        add: as in `steering_hooks`.
        positions: as in `steering_hooks`.
        basis: as in `steering_hooks`; also of watched features.
        complement: as in `steering_hooks`: steer everything but `nodes`.
        watch: other groups of nodes by name, whose relative change of activation is reported. Features are read by
            their encoders, so steering a feature shows in later features but not in itself.
        top_k: tokens listed per prompt, before and after.
        generate: continue every prompt greedily by this many tokens (until the end-of-text token), with and without
            steering. Nodes with positions are steered in the prompt only, the others at generated tokens too. One pass
            per token with the model's key-value cache, once it was seen to give what a pass over the whole text gives;
            without it where it does not.
        prepend_bos: None means the model's default.
        batch_size: prompts of one length in one pass. Cost: two forward passes per prompt.
        verbose: a progress bar. None: after two seconds, in a notebook or a terminal.

    Returns:
        Logits, top tokens, KL and groups' changes; see `SteeringResult`.

    Raises:
        SettingsError: as `steering_hooks`; `top_k` below 1.
        PairsError: no prompts, or text without a tokenizer.
        UnsupportedModelError: as `steering_hooks`.

    Source: METHODS 1.7.

    Example:
        >>> import tl_neuron_circuits as tnc
        >>> model = tnc.load_demo_model()
        >>> result = tnc.steer(model, "The dog near the cats", ["L2/N5"], scale=-2)
        >>> result.kl.shape
        torch.Size([1])
    """
    how, amount = the_change(scale, value, add)
    prompts = read_prompts(model, prompt, prepend_bos)
    change = Change(find_steered(model, nodes, positions, basis, complement), how, amount)
    watched = find_watched(model, watch, basis_of(nodes, basis))
    targets = targets_of(nodes)
    runs = compare_runs(model, prompts, [change], watched, top_k, batch_size, generate, targets, verbose=verbose)
    return next(runs)


@holding
@checked
def interchange(
    model: TransformerLensModel,
    prompt: Prompts,
    donor: str | Sequence[str] | Int[Tensor, "donor donor_pos"],
    nodes: Nodes,
    *,
    positions: Indices | None = None,
    basis: Dictionaries = None,
    watch: Watch | None = None,
    top_k: int = 10,
    generate: int = 0,
    prepend_bos: bool | None = None,
    batch_size: int = 32,
    verbose: bool | None = None,
) -> SteeringResult:
    """Set `nodes` on `prompt` to what they are on `donor`, at the same positions: an interchange intervention.

    One donor for all prompts, or one per prompt. The rest as in `steer`, which this is with `value=node_values(...)`.

    Raises:
        SettingsError: a node without a position, or a number of donors that is neither one nor one per prompt.

    Source: Geiger et al. 2021, arXiv 2106.02997.

    Example:
        >>> import tl_neuron_circuits as tnc
        >>> model = tnc.load_demo_model()
        >>> result = tnc.interchange(model, "The girl near the dog", "The boys near the dog", ["L2/N5@3"])
        >>> len(result.nodes)
        1
    """
    values = node_values(
        model, donor, nodes, positions=positions, basis=basis, prepend_bos=prepend_bos, batch_size=batch_size,
        verbose=verbose,
    )  # fmt: skip
    return steer(
        model, prompt, nodes, value=values, positions=positions, basis=basis, watch=watch, top_k=top_k,
        generate=generate, prepend_bos=prepend_bos, batch_size=batch_size, verbose=verbose,
    )  # fmt: skip


@holding
@checked
def node_values(
    model: TransformerLensModel,
    prompts: str | Sequence[str] | Int[Tensor, "batch pos"],
    nodes: Nodes,
    *,
    positions: Indices | None = None,
    basis: Dictionaries = None,
    prepend_bos: bool | None = None,
    batch_size: int = 32,
    verbose: bool | None = None,
) -> Float[Tensor, "batch node"]:
    """The activations of `nodes` on `prompts`, each at its position: what `steering_hooks(value=...)` takes.

    Steering another prompt with them moves what these nodes carry from the donor to the recipient, at the same
    positions. For other positions in the donor, give its nodes with those: values go by the order of the nodes.

    Args:
        model: a HookedTransformer or TransformerBridge.
        prompts: the donors; their lengths may differ.
        nodes: as in `steering_hooks`; every node needs a position.
        positions: see `nodes`.
        basis: as in `steering_hooks`.
        prepend_bos: None means the model's default.
        batch_size: prompts in one pass.
        verbose: a progress bar. None: after two seconds, in a notebook or a terminal.

    Returns:
        In the model's dtype, on its device; with `positions`, nodes outer and positions inner.

    Raises:
        SettingsError: a node without a position, outside a prompt, or a unit out of range.

    Example:
        >>> import tl_neuron_circuits as tnc
        >>> model, nodes = tnc.load_demo_model(), ["L2/N5@3", "L3/N7@4"]
        >>> values = tnc.node_values(model, "The boys near the dog", nodes)
        >>> hooks = tnc.steering_hooks(model, nodes, value=values)
        >>> logits = model.run_with_hooks("The girl near the dog", fwd_hooks=hooks)
    """
    frame = find_nodes(model, nodes, positions, basis, features=True)
    return read_values(model, read_prompts(model, prompts, prepend_bos), frame, batch_size, verbose=verbose)


def read_values(
    model: TransformerLensModel, read: ReadPrompts, frame: pd.DataFrame, batch_size: int, *, verbose: bool | None
) -> Float[Tensor, "batch node"]:
    """`node_values` of nodes that are known.

    Raises:
        SettingsError: a node without a position, outside a prompt, or a unit out of range.
    """
    free = frame[frame["position"] < 0]
    if len(free):
        raise SettingsError(f"expected a position for every node; {free['label'].iloc[0]} has none. Give positions=.")
    hooks = reads_of_nodes(frame)
    out: dict[int, Tensor] = {}
    for rows, tokens in show_batches(read.batches(batch_size), len(read), desc="donors", verbose=verbose):
        _, values = run(model, tokens, hooks)
        picked = _pick(values_by_key(values, frame), frame)
        out.update(zip(rows, picked, strict=True))
    return torch.stack([out[row] for row in range(len(read))])


def find_watched(
    model: TransformerLensModel, watch: Watch | None, basis: Dictionaries
) -> dict[str, pd.DataFrame]:  # fmt: skip
    """The nodes of every watched group."""
    return {name: find_nodes(model, group, basis=basis, features=True) for name, group in (watch or {}).items()}


@dataclass(frozen=True, eq=False)
class Change:
    """One way to steer a model."""

    steered: Steered
    how: How
    amount: Amount


def compare_runs(
    model: TransformerLensModel, prompts: ReadPrompts, changes: Sequence[Change],
    watched: Mapping[str, pd.DataFrame], top_k: int, batch_size: int, generate: int = 0, targets: Sequence[int] = (),
    *, verbose: bool | None = False,
) -> Iterator[SteeringResult]:  # fmt: skip
    """One result per change, as it is asked for; the run without steering is shared, and what it read is kept."""
    if batch_size < 1 or generate < 0:
        raise SettingsError(
            f"expected batch_size of at least 1 and generate of at least 0; got {batch_size}, {generate}."
        )
    if top_k < 1:
        raise SettingsError(f"expected top_k of at least 1; got {top_k}.")
    for change in changes:
        amount = change.amount
        if isinstance(amount, Tensor) and amount.dim() == 2 and amount.shape[0] not in (1, len(prompts)):
            raise SettingsError(
                f"expected a tensor [batch, node] for {len(prompts)} prompts (or one row for all); got "
                f"{amount.shape[0]} rows."
            )
    reads = list(dict.fromkeys(hook for group in watched.values() for hook in reads_of_nodes(group)))
    plain = []  # of every batch: its rows, tokens, groups' activations and continuations
    before: dict[int, Tensor] = {}
    for rows, tokens in show_batches(prompts.batches(batch_size), len(prompts), desc="steer", verbose=verbose):
        logits, base = run(model, tokens, reads)
        before.update(zip(rows, logits[:, -1].float().cpu(), strict=True))
        groups = {name: pick_group(values_by_key(base, group), group) for name, group in watched.items()}
        plain.append((rows, tokens, groups, continue_greedily(model, tokens, generate, [])))
    unsteered = torch.stack([before[row] for row in range(len(prompts))])
    settings = {
        "top_k": top_k, "generate": generate, "targets": list(targets), "answers": prompts.answers,
        "wrong_answers": prompts.wrong_answers, "labels": prompts.labels,
    }  # fmt: skip
    for change in progress(changes, desc="changes", verbose=verbose):
        after: dict[int, Tensor] = {}
        moved = {name: torch.empty(len(prompts)) for name in watched}
        texts = [("", "")] * len(prompts)
        how, amount = change.how, change.amount
        for rows, tokens, groups, continued in plain:
            by_prompt = isinstance(amount, Tensor) and amount.dim() == 2 and amount.shape[0] > 1
            hooks = hooks_for(model, change.steered, how, amount[rows] if by_prompt else amount)  # pyright: ignore[reportIndexIssue]
            logits, values = run(model, tokens, reads, hooks)
            after.update(zip(rows, logits[:, -1].float().cpu(), strict=True))
            for name, group in watched.items():
                moved[name][rows] = _relative_change(groups[name], pick_group(values_by_key(values, group), group))
            for row, *pair in zip(rows, continued, continue_greedily(model, tokens, generate, hooks), strict=True):
                texts[row] = (pair[0], pair[1])
        steered = torch.stack([after[row] for row in range(len(prompts))])
        shown = shown_tokens([unsteered, steered], top_k, targets)
        tops = [part.argmax(-1).tolist() for part in (unsteered, steered)]
        ids = sorted({token for tokens in (*shown, *tops) for token in tokens})
        yield SteeringResult(
            prompts.texts, unsteered, steered, change.steered.nodes.drop(columns=["site", "key"]),
            {"how": how, "amount": amount, "complement": change.steered.complement is not None, **settings},
            moved, tuple(texts) if generate else None, dict(zip(ids, token_names(model, ids), strict=True)),
        )  # fmt: skip


def _columns(nodes: pd.DataFrame) -> tuple[Int[Tensor, " node"], Int[Tensor, " node"]]:
    """Units and positions."""
    unit, position = (torch.as_tensor(nodes[c].to_numpy(dtype="int64", copy=True)) for c in ("unit", "position"))
    return unit, position


def pick_group(values: Values, group: pd.DataFrame) -> Float[Tensor, "batch place"]:
    """The activations of a group of nodes; those without a position at every position.

    Raises:
        SettingsError: a position outside the prompt or a unit out of range.
    """
    parts = []
    for key, rows in group.groupby("key", sort=False):
        value = values[str(key)].double().cpu()
        units, positions = _columns(rows)
        if int(units.max()) >= value.shape[2] or int(positions.max()) >= value.shape[1]:
            raise SettingsError(
                f"expected units below {value.shape[2]} and positions below {value.shape[1]} at {key}; got up to unit "
                f"{int(units.max())} and position {int(positions.max())} in a watched group."
            )
        free, units_at, at = units[positions < 0], units[positions >= 0], positions[positions >= 0]
        parts += [value[:, :, free].flatten(1), value[:, at, units_at]]
    return torch.cat(parts, dim=1)


def _relative_change(
    before: Float[Tensor, "batch place"], after: Float[Tensor, "batch place"]
) -> Float[Tensor, " batch"]:  # fmt: skip
    return ((before.sign() * (after - before)).sum(-1) / before.abs().sum(-1)).float()


def _pick(values: Values, frame: pd.DataFrame) -> Float[Tensor, "batch node"]:
    """The values of nodes with positions, in the order of the frame's rows; `values` by the frame's keys.

    Raises:
        SettingsError: a position outside the prompt or a unit out of range.
    """
    like = next(iter(values.values()))
    out = like.new_empty(len(like), len(frame))
    for key, rows in frame.reset_index(drop=True).groupby("key", sort=False):
        flat = values[str(key)]
        units, places = _columns(rows)
        for name, index, size in (("positions", places, flat.shape[1]), ("units", units, flat.shape[2])):
            if int(index.max()) >= size:
                raise SettingsError(f"expected {name} below {size} at {key}; got {int(index.max())}.")
        out[:, torch.as_tensor(rows.index.to_numpy(dtype="int64", copy=True))] = flat[:, places, units].to(out)
    return out


def _probabilities(logits: Tensor) -> Tensor:
    return logits.double().softmax(-1).float()


def targets_of(nodes: Nodes) -> list[int]:
    """The tokens that a circuit, or its table, explains."""
    table = nodes if isinstance(nodes, pd.DataFrame) else getattr(nodes, "nodes", None)
    if not isinstance(table, pd.DataFrame) or not {"kind", "unit"} <= set(table.columns):
        return []
    return [int(unit) for unit in table.loc[table["kind"] == "logit", "unit"].unique() if unit >= 0]


def shown_tokens(
    logits: Sequence[Float[Tensor, "prompt d_vocab"]], top_k: int, always: Sequence[int]
) -> list[list[int]]:
    """For every prompt the tokens among the `top_k` of any of these runs, by their logits in the last run.

    Those of `always` come too.
    """
    tops: list[Int[Tensor, "prompt k"]] = [part.topk(min(top_k, part.shape[-1]), dim=-1).indices for part in logits]
    out = []
    for index, last in enumerate(logits[-1]):
        tokens = torch.cat([*(top[index] for top in tops), torch.tensor(always, dtype=torch.long)]).unique()
        out.append(tokens[last[tokens].argsort(descending=True, stable=True)].tolist())
    return out
