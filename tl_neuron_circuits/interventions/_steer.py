"""`steer`, `interchange` and `sweep`: run a model with and without steering hooks, and compare next tokens.

    KL = sum_v p_before(v) (log p_before(v) - log p_after(v))                    of the next token, in nats
    relative change of a watched group = sum_n sign(a_n) (a'_n - a_n) / sum_n |a_n|        a before, a' after steering

so a group scaled by m has m - 1. An interchange intervention sets nodes to the values that `node_values` reads on a
donor prompt. The run without steering is made once, however many changes it is compared with.
Source: METHODS 1.7.
"""

from collections.abc import Mapping, Sequence
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
from ._ablation import Hooks
from ._find_nodes import Dictionaries, Nodes, basis_of, find_nodes, reads_of_nodes, values_by_key
from ._steering import Amount, How, hooks_for, the_change
from ._steering_prompts import ReadPrompts, read_prompts, run, text_of, token_names

Watch = Mapping[str, Nodes]


@dataclass(frozen=True, eq=False, repr=False)
class SteeringResult:
    """The model's next token with and without steering, for every prompt.

    `before` and `after` are the logits at each prompt's last position, float32 on the CPU. `watched` holds, for every
    watched group and prompt, the relative change of its activations: sum_n sign(a_n) (a'_n - a_n) / sum_n |a_n| with a
    before and a' after steering, so that a group scaled by m has m - 1 (nan where the whole group was at zero).
    `continuations` holds (before, after) for every prompt where text was generated. `nodes` are the steered ones.

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
        for index, tokens in enumerate(_shown_tokens([self.before, self.after], self.settings["top_k"], targets)):
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
        return (
            f"SteeringResult({self.settings['how']}={amount} on {len(self.nodes)} nodes, {len(self)} prompts, "
            f"first {first}, mean KL {self.kl.mean():.4g} nats)"
        )

    def _repr_html_(self) -> str:
        first = self.to_dataframe().query("prompt == 0")
        names = {"token": "token", "probability_before": "before", "probability_after": "after"}
        names |= {"probability_change": "change", "log_probability_change": "change of log-probability"}
        shown = first[list(names)].rename(columns=names)
        tables = _html.table(self.summary(), bars=("kl",)), _html.table(shown, bars=("change",))
        return _html.block(repr(self), tables[0], _html.note(f"next token of {self.prompts[0]!r}:"), tables[1])


@dataclass(frozen=True, eq=False, repr=False)
class SteeringSweep:
    """One `SteeringResult` per multiplier, in the order given.

    Example:
        >>> import tl_neuron_circuits as tnc
        >>> model = tnc.load_demo_model()
        >>> swept = tnc.sweep(model, "The dog near the cats", ["L2/N5"], scales=(0, 1, 2))
        >>> [round(float(result.kl[0]), 6) for result in swept.results if result.settings["amount"] == 1]
        [0.0]
        >>> swept.to_dataframe()["scale"].unique().tolist()
        [0.0, 1.0, 2.0]
    """

    scales: tuple[float, ...]
    results: tuple[SteeringResult, ...]

    @property
    def prompts(self) -> tuple[str, ...]:
        """The prompts, as text."""
        return self.results[0].prompts

    def to_dataframe(self) -> pd.DataFrame:
        """Tokens that are among the top at some multiplier, one row per scale, prompt and token.

        Columns: scale, prompt (its number), token, token_id, probability, logit, kl (of the prompt, in nats).
        """
        first = self.results[0]
        runs = [first.before, *(result.after for result in self.results)]
        shown = _shown_tokens(runs, first.settings["top_k"], first.settings["targets"])
        rows = []
        for scale, result in zip(self.scales, self.results, strict=True):
            kl, probabilities = result.kl, result.after.double().softmax(-1).float()
            for prompt, tokens in enumerate(shown):
                for token in tokens:
                    values = (probabilities[prompt, token], result.after[prompt, token], kl[prompt])
                    rows.append((scale, prompt, result.token_names[token], token, *(float(value) for value in values)))
        return pd.DataFrame(rows, columns=["scale", "prompt", "token", "token_id", "probability", "logit", "kl"])

    @checked
    def plot(self, prompt: int = 0) -> Any:
        """A plotly figure: probabilities against the multiplier, for one prompt.

        It shows the targets of a steered circuit (otherwise the unsteered top token) and the five that move most.

        Raises:
            SettingsError: there is no prompt of that number.
        """
        from ..plots._steering import plot_sweep

        if not 0 <= prompt < len(self.prompts):
            raise SettingsError(f"expected a prompt between 0 and {len(self.prompts) - 1}; got {prompt}.")
        return plot_sweep(self, prompt)

    def __repr__(self) -> str:
        nodes = len(self.results[0].nodes)
        return f"SteeringSweep({nodes} nodes, {len(self.prompts)} prompts, scales {[f'{s:g}' for s in self.scales]})"

    def _repr_html_(self) -> str:
        columns = {f"{scale:g}": result.top_after for scale, result in zip(self.scales, self.results, strict=True)}
        table = pd.DataFrame({"prompt": self.prompts, "unsteered": self.results[0].top_before, **columns})
        return _html.block(repr(self), _html.table(table))


@holding
@checked
def steer(
    model: TransformerLensModel,
    prompt: str | Sequence[str] | Int[Tensor, "batch pos"],
    nodes: Nodes,
    *,
    scale: Amount | None = None,
    value: Amount | None = None,
    add: Amount | None = None,
    positions: Indices | None = None,
    basis: Dictionaries = None,
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
        prompt: one prompt, several (their lengths may differ), or tokens.
        nodes: as in `steering_hooks`; a tensor [batch, node] has one row per prompt.
        scale: as in `steering_hooks`.
        value: as in `steering_hooks`.
        add: as in `steering_hooks`.
        positions: as in `steering_hooks`.
        basis: as in `steering_hooks`; also of watched features.
        watch: other groups of nodes by name, whose relative change of activation is reported. Features are read by
            their encoders, so steering a feature shows in later features but not in itself.
        top_k: tokens listed per prompt, before and after.
        generate: continue every prompt greedily by this many tokens (until the end-of-text token), with and without
            steering. Nodes with positions are steered in the prompt only, the others at generated tokens too.
            One forward pass of the whole text per token, without a cache: no setting of `generate` can matter.
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
    steered = find_nodes(model, nodes, positions, basis, features=True)
    watched = _watched(model, watch, basis_of(nodes, basis))
    targets = _targets_of(nodes)
    return _compare(model, prompts, steered, [(how, amount)], watched, top_k, batch_size, generate, targets, verbose)[0]


@holding
@checked
def interchange(
    model: TransformerLensModel,
    prompt: str | Sequence[str] | Int[Tensor, "batch pos"],
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
def sweep(
    model: TransformerLensModel,
    prompt: str | Sequence[str] | Int[Tensor, "batch pos"],
    nodes: Nodes,
    *,
    scales: Sequence[int | float] = (-4, -2, -1, 0, 1, 2, 4),
    positions: Indices | None = None,
    basis: Dictionaries = None,
    watch: Watch | None = None,
    top_k: int = 5,
    prepend_bos: bool | None = None,
    batch_size: int = 32,
    verbose: bool | None = None,
) -> SteeringSweep:
    """Steer `nodes` by each of several multipliers, beside one unsteered run.

    Arguments as in `steer`. Scale 1 is the unsteered model, 0 ablates.

    Raises:
        SettingsError: as `steer`; no scales, or one given twice.

    Source: METHODS 1.7.

    Example:
        >>> import tl_neuron_circuits as tnc
        >>> swept = tnc.sweep(tnc.load_demo_model(), "The dog near the cats", ["L2/N5"], scales=(0, 1, 2))
        >>> figure = swept.plot()
    """
    if not scales or len(set(scales)) < len(scales):
        raise SettingsError(f"expected at least one scale, each once; got {list(scales)}.")
    prompts = read_prompts(model, prompt, prepend_bos)
    steered = find_nodes(model, nodes, positions, basis, features=True)
    watched = _watched(model, watch, basis_of(nodes, basis))
    changes: list[tuple[How, Amount]] = [("scale", scale) for scale in scales]
    results = _compare(model, prompts, steered, changes, watched, top_k, batch_size, 0, _targets_of(nodes), verbose)
    return SteeringSweep(tuple(float(scale) for scale in scales), tuple(results))


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
    free = frame[frame["position"] < 0]
    if len(free):
        raise SettingsError(f"expected a position for every node; {free['label'].iloc[0]} has none. Give positions=.")
    read = read_prompts(model, prompts, prepend_bos)
    hooks = reads_of_nodes(frame)
    out: dict[int, Tensor] = {}
    for rows, tokens in show_batches(read.batches(batch_size), len(read), desc="donors", verbose=verbose):
        _, values = run(model, tokens, hooks)
        picked = _pick(values_by_key(values, frame), frame)
        out.update(zip(rows, picked, strict=True))
    return torch.stack([out[row] for row in range(len(read))])


def _watched(model: TransformerLensModel, watch: Watch | None, basis: Dictionaries) -> dict[str, pd.DataFrame]:
    return {name: find_nodes(model, group, basis=basis, features=True) for name, group in (watch or {}).items()}


def _compare(
    model: TransformerLensModel, prompts: ReadPrompts, nodes: pd.DataFrame, changes: Sequence[tuple[How, Amount]],
    watched: Mapping[str, pd.DataFrame], top_k: int, batch_size: int, generate: int, targets: Sequence[int],
    verbose: bool | None,
) -> list[SteeringResult]:  # fmt: skip
    """One result per change; the run without steering is shared."""
    if batch_size < 1 or generate < 0:
        raise SettingsError(
            f"expected batch_size of at least 1 and generate of at least 0; got {batch_size}, {generate}."
        )
    if top_k < 1:
        raise SettingsError(f"expected top_k of at least 1; got {top_k}.")
    for _, amount in changes:
        if isinstance(amount, Tensor) and amount.dim() == 2 and amount.shape[0] not in (1, len(prompts)):
            raise SettingsError(
                f"expected a tensor [batch, node] for {len(prompts)} prompts (or one row for all); got "
                f"{amount.shape[0]} rows."
            )
    reads = list(dict.fromkeys(hook for group in watched.values() for hook in reads_of_nodes(group)))
    before: dict[int, Tensor] = {}
    after: list[dict[int, Tensor]] = [{} for _ in changes]
    moved = [{name: torch.empty(len(prompts)) for name in watched} for _ in changes]
    texts: list[list[tuple[str, str]]] = [[("", "")] * len(prompts) for _ in changes]
    for rows, tokens in show_batches(prompts.batches(batch_size), len(prompts), desc="steer", verbose=verbose):
        logits, base = run(model, tokens, reads)
        before.update(zip(rows, logits[:, -1].float().cpu(), strict=True))
        plain = _continue(model, tokens, generate, [])
        for number, (how, amount) in enumerate(progress(changes, desc="changes", verbose=verbose)):
            by_prompt = isinstance(amount, Tensor) and amount.dim() == 2 and amount.shape[0] > 1
            hooks = hooks_for(model, nodes, how, amount[rows] if by_prompt else amount)  # pyright: ignore[reportIndexIssue]
            logits, values = run(model, tokens, reads, hooks)
            after[number].update(zip(rows, logits[:, -1].float().cpu(), strict=True))
            for name, group in watched.items():
                old, new = values_by_key(base, group), values_by_key(values, group)
                moved[number][name][rows] = _relative_change(old, new, group)
            for row, *pair in zip(rows, plain, _continue(model, tokens, generate, hooks), strict=True):
                texts[number][row] = (pair[0], pair[1])
    stacked = [torch.stack([logits[row] for row in range(len(prompts))]) for logits in (before, *after)]
    shown = [tokens for other in stacked[1:] for tokens in _shown_tokens([stacked[0], other], top_k, targets)]
    ids = sorted({token for tokens in (*shown, *(part.argmax(-1).tolist() for part in stacked)) for token in tokens})
    names = dict(zip(ids, token_names(model, ids), strict=True))
    return [
        SteeringResult(
            prompts.texts, stacked[0], stacked[1 + number], nodes.drop(columns=["site", "key"]),
            {"how": how, "amount": amount, "top_k": top_k, "generate": generate, "targets": list(targets)},
            moved[number],
            tuple(texts[number]) if generate else None, names,
        )
        for number, (how, amount) in enumerate(changes)
    ]  # fmt: skip


def _continue(model: TransformerLensModel, tokens: Int[Tensor, "batch pos"], n: int, hooks: Hooks) -> list[str]:
    """Greedy continuations of every row by `n` tokens, or up to the end-of-text token."""
    end = getattr(getattr(model, "tokenizer", None), "eos_token_id", None)
    text, ended = tokens, torch.zeros(len(tokens), dtype=torch.bool, device=tokens.device)
    for _ in range(n):
        best = run(model, text, (), hooks)[0][:, -1].argmax(-1)
        if end is not None:
            best = torch.where(ended, torch.full_like(best, end), best)
            ended = ended | (best == end)
        text = torch.cat([text, best[:, None].to(text)], dim=1)
    continued = []
    for row in text[:, tokens.shape[1] :]:
        ends = (row == end).nonzero() if end is not None else []
        continued.append(text_of(model, row[: int(ends[0])] if len(ends) else row) if n else "")
    return continued


def _columns(nodes: pd.DataFrame) -> tuple[Int[Tensor, " node"], Int[Tensor, " node"]]:
    """Units and positions."""
    unit, position = (torch.as_tensor(nodes[c].to_numpy(dtype="int64", copy=True)) for c in ("unit", "position"))
    return unit, position


def _relative_change(before: Values, after: Values, group: pd.DataFrame) -> Float[Tensor, " batch"]:
    """Of a group of nodes; those without a position count at every position."""
    total, change = 0.0, 0.0
    for hook, rows in group.groupby("key", sort=False):
        old, new = (values[str(hook)].double().cpu() for values in (before, after))
        units, positions = _columns(rows)
        if int(units.max()) >= old.shape[2] or int(positions.max()) >= old.shape[1]:
            raise SettingsError(
                f"expected units below {old.shape[2]} and positions below {old.shape[1]} at {hook}; got up to unit "
                f"{int(units.max())} and position {int(positions.max())} in a watched group."
            )
        free, units_at, at = units[positions < 0], units[positions >= 0], positions[positions >= 0]
        for a, b in (
            (old[:, :, free].flatten(1), new[:, :, free].flatten(1)),
            (old[:, at, units_at], new[:, at, units_at]),
        ):
            total, change = total + a.abs().sum(-1), change + (a.sign() * (b - a)).sum(-1)
    assert isinstance(total, Tensor) and isinstance(change, Tensor)
    return (change / total).float()


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


def _targets_of(nodes: Nodes) -> list[int]:
    """The tokens that a circuit, or its table, explains."""
    table = nodes if isinstance(nodes, pd.DataFrame) else getattr(nodes, "nodes", None)
    if not isinstance(table, pd.DataFrame) or not {"kind", "unit"} <= set(table.columns):
        return []
    return [int(unit) for unit in table.loc[table["kind"] == "logit", "unit"].unique() if unit >= 0]


def _shown_tokens(
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
