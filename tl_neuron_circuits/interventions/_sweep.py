"""`sweep`: steer nodes by several multipliers; or groups of nodes, one by one, reading all the others and the output.

    group to group    sum_n sign(a_n) (a'_n - a_n) / sum_n |a_n| of every group, while one is scaled
    group to output   KL (nats), change of log p (nats), and of the logit difference for pairs with wrong answers
    interchange       the same while the group has its values of a donor prompt, and everything else is left alone
    complement        the same while everything but the group is scaled (or has the donor's values)
    controls          the same while matched random nodes are changed in the group's place (`_matched.py`)

Every row is what a single `steer` gives. Means are over prompts, with percentile intervals of a bootstrap over prompts,
those with one label together. p = (1 + #{draws with an effect as large}) / (1 + draws), of |mean over prompts|.
Source: METHODS 1.7.
"""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
import pandas as pd
import torch
from jaxtyping import Float
from torch import Tensor

from .. import _html
from .._errors import SettingsError
from .._indices import Indices
from .._typing import checked
from ..models._protocol import TransformerLensModel
from ..models._threads import holding
from ._find_nodes import Complement, Dictionaries, Nodes, Steered, basis_of, find_nodes, find_steered
from ._matched import draw_matched
from ._steer import Change, SteeringResult, Watch, compare_runs, find_watched, read_values, shown_tokens, targets_of
from ._steering_prompts import Prompts, ReadPrompts, read_prompts

_DRAWS = 2000
_OUTPUTS = ("kl", "log p", "logit difference")
_DONOR = "donor"
Column = Literal["mean", "low", "high", "control", "control_low", "control_high", "p"]


@dataclass(frozen=True, eq=False, repr=False)
class SteeringSweep:
    """One `SteeringResult` per multiplier, in the order given; with groups, one row of them after the other.

    With a donor prompt the last of `scales` is "donor": nodes have their values there. `steered` names the groups, and
    "all but NAME" their complements; without groups it is one empty name. `controls` has a row for every group, scale,
    draw and thing that was read: the mean over prompts while matched nodes were changed in the group's place, and their
    size against the group's.

    Example:
        >>> import tl_neuron_circuits as tnc
        >>> model = tnc.load_demo_model()
        >>> swept = tnc.sweep(model, "The dog near the cats", ["L2/N5"], scales=(0, 1, 2))
        >>> [round(float(result.kl[0]), 6) for result in swept.results if result.settings["amount"] == 1]
        [0.0]
        >>> swept.to_dataframe()["scale"].unique().tolist()
        [0.0, 1.0, 2.0]
    """

    scales: tuple[float | str, ...]
    results: tuple[SteeringResult, ...]
    steered: tuple[str, ...] = ("",)
    controls: pd.DataFrame | None = None

    @property
    def prompts(self) -> tuple[str, ...]:
        """The prompts, as text."""
        return self.results[0].prompts

    def to_dataframe(self) -> pd.DataFrame:
        """Tokens that are among the top at some multiplier, one row per scale, prompt and token.

        Columns: steered (with groups), scale, prompt (its number), token, token_id, probability, logit, kl (of the
        prompt, in nats).
        """
        first = self.results[0]
        runs = [first.before, *(result.after for result in self.results)]
        shown = shown_tokens(runs, first.settings["top_k"], first.settings["targets"])
        names = {token: name for result in self.results for token, name in result.token_names.items()}
        rows = []
        for name, scale, result in self._rows():
            kl, probabilities = result.kl, result.after.double().softmax(-1).float()
            for prompt, tokens in enumerate(shown):
                for token in tokens:
                    values = (probabilities[prompt, token], result.after[prompt, token], kl[prompt])
                    rows.append((name, scale, prompt, names[token], token, *(float(value) for value in values)))
        columns = ["steered", "scale", "prompt", "token", "token_id", "probability", "logit", "kl"]
        frame = pd.DataFrame(rows, columns=columns)
        return frame if self.steered != ("",) else frame.drop(columns="steered")

    def effects(self) -> pd.DataFrame:
        """One row per steered group, scale and thing read: a watched group, or what became of the next token.

        Columns: steered, scale, read, mean (over prompts), low and high (95% over prompts; nan for one prompt) and,
        where controls were drawn, control (mean over draws), control_low and control_high (95% of the draws),
        control_size (|activation| of the drawn nodes over the group's) and p (share of draws, the group counted among
        them, whose effect is as large). A read group has its relative change; "kl" and "log p" are in nats, "logit
        difference" in logits. "log p" is of the pairs' answer, otherwise of the unsteered top token.
        """
        rows = []
        for name, scale, result in self._rows():
            for read, values in readings(result).items():
                low, high = bootstrap_interval(values, result.settings.get("labels"))
                rows.append((name, scale, read, float(values.mean()), low, high))
        frame = pd.DataFrame(rows, columns=["steered", "scale", "read", "mean", "low", "high"])
        return frame if self.controls is None else _with_controls(frame, self.controls)

    def matrix(self, scale: int | float | str | None = None, column: Column = "mean") -> pd.DataFrame:
        """Steered groups by what was read, at one multiplier: group to group, then group to output.

        Args:
            scale: one of `scales`, "donor" for the interchange; None where there is one alone.
            column: of `effects()`.

        Raises:
            SettingsError: a scale that was not run, none of several, or a column of controls without any.
        """
        wanted = list(self.scales) if scale is None else [value for value in self.scales if value == scale]
        if len(wanted) != 1:
            raise SettingsError(f"expected one of the scales {list(self.scales)}; got {scale}.")
        table = self.effects()
        if column not in table.columns:
            raise SettingsError(f"expected a column of effects(), {list(table.columns[3:])}; got {column!r}.")
        table = table[table["scale"] == wanted[0]]
        reads, names = table["read"].unique(), [name for name in self.steered if name in set(table["steered"])]
        return table.pivot(index="steered", columns="read", values=column).loc[names, reads]

    @checked
    def plot(self, prompt: int = 0, steered: str | None = None) -> Any:
        """A plotly figure: probabilities against the multiplier, for one prompt and one group.

        It shows the targets of a steered circuit (otherwise the unsteered top token) and the five that move most.

        Args:
            prompt: its number.
            steered: the group; None for the first.

        Raises:
            SettingsError: there is no prompt of that number, or no group of that name.
        """
        from ..plots._steering import plot_sweep

        if not 0 <= prompt < len(self.prompts):
            raise SettingsError(f"expected a prompt between 0 and {len(self.prompts) - 1}; got {prompt}.")
        if steered is not None and steered not in self.steered:
            raise SettingsError(f"expected one of the groups {list(self.steered)}; got {steered!r}.")
        if self.scales == (_DONOR,):
            raise SettingsError("expected multipliers, which are the figure's axis; only a donor's values were given.")
        return plot_sweep(self._part(self.steered[0] if steered is None else steered), prompt)

    def _part(self, name: str) -> "SteeringSweep":
        """The multipliers of one group."""
        place, n = self.steered.index(name) * len(self.scales), len(self.scales)
        scales = tuple(scale for scale in self.scales if scale != _DONOR)
        return SteeringSweep(scales, self.results[place : place + n][: len(scales)])

    def _rows(self) -> Iterator[tuple[str, float | str, SteeringResult]]:
        labels = [(name, scale) for name in self.steered for scale in self.scales]
        return ((*label, result) for label, result in zip(labels, self.results, strict=True))

    def __repr__(self) -> str:
        what = f"{len(self.results[0].nodes)} nodes"
        if self.steered != ("",):
            what = f"{len(self.steered)} groups"
        return f"SteeringSweep({what}, {len(self.prompts)} prompts, scales {[_scale_text(s) for s in self.scales]})"

    def _repr_html_(self) -> str:
        if self.steered != ("",):
            scale = min((one for one in self.scales if not isinstance(one, str)), key=abs, default=_DONOR)
            note = _html.note(f"scale {_scale_text(scale)}; rows: what was changed, columns: what was read")
            return _html.block(repr(self), note, _html.table(self.matrix(scale).reset_index()))
        columns = {
            _scale_text(scale): result.top_after for scale, result in zip(self.scales, self.results, strict=True)
        }
        table = pd.DataFrame({"prompt": self.prompts, "unsteered": self.results[0].top_before, **columns})
        return _html.block(repr(self), _html.table(table))


@holding
@checked
def sweep(
    model: TransformerLensModel,
    prompt: Prompts,
    nodes: Nodes | Mapping[str, Nodes],
    *,
    scales: Sequence[int | float] = (-4, -2, -1, 0, 1, 2, 4),
    donor: Prompts | None = None,
    positions: Indices | None = None,
    basis: Dictionaries = None,
    complement: Complement = False,
    controls: int = 0,
    watch: Watch | None = None,
    top_k: int = 5,
    generate: int = 0,
    prepend_bos: bool | None = None,
    seed: int = 0,
    batch_size: int = 32,
    verbose: bool | None = None,
) -> SteeringSweep:
    """Steer `nodes` by each of several multipliers, beside one unsteered run; or named groups of nodes, one by one.

    Groups are watched while one of them is scaled: `.matrix()` says what each does to the others and to the output, and
    `.effects()` adds intervals over prompts and what matched random nodes do.

    Args:
        model: as in `steer`.
        prompt: as in `steer`; of pairs, `.effects()` reads the answers.
        nodes: as in `steer`, or groups of them by name.
        scales: 1 is the unsteered model, 0 ablates.
        donor: a prompt, or one for each (`pairs.corrupt`, say), on which the groups' values are read; each group is
            then also set to its own, as `interchange` does, which is the scale "donor". May go with `scales=()`. Every
            node needs a position.
        positions: as in `steer`.
        basis: as in `steer`.
        complement: for every group, steer all the rest too: True means all other nodes of the model, a circuit or other
            nodes all others among those (a donor's values need the latter).
        controls: draw this many random groups for every group, of nodes in no group at the same hook points and
            positions whose activations are about as large, and change them in its place. 19 are the fewest that can
            give p = .05.
        watch: more groups to read.
        top_k: as in `steer`.
        generate: as in `steer`.
        prepend_bos: as in `steer`.
        seed: of the controls.
        batch_size: as in `steer`. Cost: a forward pass for every prompt, group, scale and draw, and one for every
            complement.
        verbose: as in `steer`.

    Raises:
        SettingsError: as `steer`; no scales, or one given twice; controls or a complement without groups.

    Source: METHODS 1.7.

    Example:
        >>> import tl_neuron_circuits as tnc
        >>> model = tnc.load_demo_model()
        >>> swept = tnc.sweep(model, "The dog near the cats", ["L2/N5"], scales=(0, 1, 2))
        >>> figure = swept.plot()
        >>> groups = {"early": ["L0/N5@1", "L0/N7@1"], "late": ["L3/N7@4"]}
        >>> swept = tnc.sweep(model, "The dog near the cats", groups, scales=[0], controls=19)
        >>> swept.matrix().columns.tolist()
        ['early', 'late', 'kl', 'log p']
        >>> moved = tnc.sweep(model, "The dog near the cats", groups, scales=(), donor="The dogs near the cats")
        >>> moved.matrix("donor").index.tolist()
        ['early', 'late']
    """
    if not (scales or donor is not None) or len(set(scales)) < len(scales):
        raise SettingsError(f"expected at least one scale, each once; got {list(scales)}.")
    prompts = read_prompts(model, prompt, prepend_bos)
    amounts: list[float | str] = [float(scale) for scale in scales] + [_DONOR] * (donor is not None)
    if not isinstance(nodes, Mapping):
        if controls or complement is not False:
            raise SettingsError("controls= and complement= go with groups by name: give nodes={'my circuit': nodes}.")
        steered = {"": find_steered(model, nodes, positions, basis)}
        watched = find_watched(model, watch, basis_of(nodes, basis))
        targets = targets_of(nodes)
    else:
        steered = _find_groups(model, nodes, positions, basis, complement)
        groups = {name: one.nodes for name, one in steered.items() if one.complement is None}
        targets, watched = [], groups | find_watched(model, watch, basis)
        if len(watched) < len(groups) + len(watch or {}) or set(watched) & set(_OUTPUTS):
            raise SettingsError(f"expected every group's name once, and none of {list(_OUTPUTS)}; got {list(watched)}.")
    if controls < 0:
        raise SettingsError(f"expected controls of at least 0; got {controls}.")
    if donor is not None:
        given = read_prompts(model, donor, prepend_bos)
        if complement is True or len(given) not in (1, len(prompts)):
            raise SettingsError(
                f"expected one donor or {len(prompts)}, one per prompt, and for a complement the nodes among which it "
                f"is taken (complement=circuit); got {len(given)} donors and complement={complement!r}."
            )
    rows: list[tuple[Any, ...]] = []
    labels: list[tuple[str, float | str, int, float]] = []
    everything = list(steered.values())
    if controls:
        drawn = draw_matched(model, prompts, groups, controls, seed, batch_size)
        for name, draws in drawn.items():
            for number, draw in enumerate(draws):
                everything.append(Steered(draw.nodes))
                labels += [(name, scale, number, draw.size) for scale in amounts]
    moved = [] if donor is None else _donor_changes(model, given, everything, batch_size, verbose=verbose)
    changes = []
    for place, one in enumerate(everything):
        changes += [Change(one, "scale", scale) for scale in scales] + moved[place : place + 1]
    runs = compare_runs(model, prompts, changes, watched, top_k, batch_size, generate, targets, verbose=verbose)
    results = tuple(next(runs) for _ in range(len(steered) * len(amounts)))
    for label, result in zip(labels, runs, strict=True):
        rows += [(*label, read, float(values.mean())) for read, values in readings(result).items()]
    table = pd.DataFrame(rows, columns=["steered", "scale", "draw", "size", "read", "value"]) if controls else None
    return SteeringSweep(tuple(amounts), results, tuple(steered), table)


def _donor_changes(
    model: TransformerLensModel, donors: ReadPrompts, steered: Sequence[Steered], batch_size: int,
    *, verbose: bool | None,
) -> list[Change]:  # fmt: skip
    """Each set of nodes with its values on the donors, all read in one run of each; of a complement the rest's."""
    frames = []
    for one in steered:
        frame, rest = one.nodes, one.complement
        if rest is not None:
            own = pd.MultiIndex.from_frame(frame[["key", "unit", "position"]])
            frame = rest[~pd.MultiIndex.from_frame(rest[["key", "unit", "position"]]).isin(own)]
        frames.append(frame.reset_index(drop=True))
    union = pd.concat([frame for frame in frames if len(frame)], ignore_index=True)
    places = union.groupby(["key", "unit", "position"], sort=False).ngroup().to_numpy()
    first = union.assign(place=places).drop_duplicates("place").drop(columns="place").reset_index(drop=True)
    values = read_values(model, donors, first, batch_size, verbose=verbose)
    ends = np.cumsum([len(frame) for frame in frames])[:-1]
    own = [torch.tensor(part) for part in np.split(places, ends)]
    return [Change(Steered(frame), "value", values[:, at]) for frame, at in zip(frames, own, strict=True)]


def _scale_text(scale: float | str) -> str:
    return scale if isinstance(scale, str) else f"{scale:g}"


def _find_groups(
    model: TransformerLensModel, groups: Mapping[str, Nodes], positions: Indices | None, basis: Dictionaries,
    complement: Complement,
) -> dict[str, Steered]:  # fmt: skip
    """Every group, then every group's complement."""
    if not groups or "" in groups:
        raise SettingsError(f"expected at least one group, each with a name; got {list(groups)}.")
    found = {name: Steered(find_nodes(model, nodes, positions, basis, features=True)) for name, nodes in groups.items()}
    if complement is False:
        return found
    rest = {
        f"all but {name}": find_steered(model, nodes, positions, basis, complement) for name, nodes in groups.items()
    }
    return {**found, **rest}


def readings(result: SteeringResult) -> dict[str, Float[Tensor, " prompt"]]:
    """What was read of one steered run, prompt by prompt: watched groups, then the output."""
    out = {name: change.double() for name, change in result.watched.items()}
    before, after = result.before.double(), result.after.double()
    answers, wrong = result.settings["answers"], result.settings["wrong_answers"]
    rows = torch.arange(len(before))
    tokens = before.argmax(-1) if answers is None else torch.tensor(answers)
    out["kl"] = result.kl.double()
    out["log p"] = (after.log_softmax(-1) - before.log_softmax(-1))[rows, tokens]
    if wrong is not None:
        change, wrong = after - before, torch.tensor(wrong)
        out["logit difference"] = change[rows, tokens] - change[rows, wrong]
    return out


def bootstrap_interval(values: Float[Tensor, " prompt"], labels: Sequence[str] | None) -> tuple[float, float]:
    """95% of the means of bootstrap samples; prompts with one label are drawn together."""
    names = list(range(len(values))) if labels is None else list(labels)
    order = {name: place for place, name in enumerate(dict.fromkeys(names))}
    if len(order) < 2:
        return float("nan"), float("nan")
    member = torch.tensor([order[name] for name in names])
    sums = torch.zeros(len(order), dtype=torch.float64).index_add_(0, member, values.double())
    counts = torch.bincount(member, minlength=len(order)).double()
    drawn = torch.randint(len(order), (_DRAWS, len(order)), generator=torch.Generator().manual_seed(0))
    means = (sums[drawn].sum(1) / counts[drawn].sum(1)).numpy()
    low, high = np.percentile(means, [2.5, 97.5])
    return float(low), float(high)


def _with_controls(frame: pd.DataFrame, controls: pd.DataFrame) -> pd.DataFrame:
    keys = ["steered", "scale", "read"]
    rows = []
    drawn = {key: part for key, part in controls.groupby(keys, sort=False)}
    for *key, mean in frame[[*keys, "mean"]].itertuples(index=False):
        part = drawn.get(tuple(key))
        if part is None:  # of a complement
            rows.append((float("nan"),) * 5)
            continue
        values = part["value"].to_numpy()
        low, high = np.percentile(values, [2.5, 97.5])
        known = not np.isnan(values).any() and not np.isnan(mean)  # nan where a group that was read is all at zero
        p = (1 + int((np.abs(values) >= abs(mean)).sum())) / (1 + len(values)) if known else float("nan")
        rows.append((float(values.mean()), float(low), float(high), float(part["size"].mean()), p))
    columns = ["control", "control_low", "control_high", "control_size", "p"]
    return pd.concat([frame, pd.DataFrame(rows, columns=columns, index=frame.index)], axis=1)
