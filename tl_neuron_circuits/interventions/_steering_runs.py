"""`steer`, `interchange` and `sweep`: run a model with and without steering hooks, and compare.

Source: METHODS 1.7.
"""

from collections.abc import Mapping, Sequence
from typing import Any

import pandas as pd
import torch
from jaxtyping import Float, Int
from torch import Tensor

from .._errors import SettingsError
from .._typing import checked
from ..bases._runs import Values
from ..models._protocol import TransformerLensModel
from ._ablation import Hooks
from ._steering import Amount, How, hooks_for, the_change
from ._steering_nodes import Dictionaries, Nodes, basis_of, find_nodes, reads_of_nodes, values_by_key
from ._steering_prompts import ReadPrompts, read_prompts, run, text_of, token_names
from ._steering_result import SteeringResult, shown_tokens
from ._steering_sweep import SteeringSweep
from ._steering_values import node_values

Watch = Mapping[str, Nodes]


@checked
def steer(
    model: TransformerLensModel,
    prompt: str | Sequence[str] | Int[Tensor, "batch pos"],
    nodes: Nodes,
    *,
    scale: Amount | None = None,
    value: Amount | None = None,
    add: Amount | None = None,
    positions: int | Sequence[int] | None = None,
    basis: Dictionaries = None,
    watch: Watch | None = None,
    top_k: int = 10,
    generate: int = 0,
    prepend_bos: bool | None = None,
    batch_size: int = 32,
) -> SteeringResult:
    """Compare the model's next token with and without steering `nodes`.

    Args:
        model: a HookedTransformer or TransformerBridge.
        prompt: one prompt, several (their lengths may differ), or tokens.
        nodes: as in `steering_hooks`; a tensor [batch, node] has one row a prompt.
        scale: as in `steering_hooks`.
        value: as in `steering_hooks`.
        add: as in `steering_hooks`.
        positions: as in `steering_hooks`.
        basis: as in `steering_hooks`; also of watched features.
        watch: other groups of nodes by name, whose relative change of activation is reported. Features are read by
            their encoders, so steering a feature shows in later features but not in itself.
        top_k: tokens listed per prompt, before and after.
        generate: continue every prompt greedily by so many tokens (until the end-of-text token), with and without
            steering. Nodes with positions are steered in the prompt only, the others at generated tokens too.
            One forward pass of the whole text a token, without a cache: no setting of `generate` can matter.
        prepend_bos: None means the model's default.
        batch_size: prompts of one length in one pass. Cost: two forward passes a prompt.

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
    runs = Runs(model, read_prompts(model, prompt, prepend_bos), watch, batch_size, generate, basis_of(nodes, basis))
    steered = find_nodes(model, nodes, positions, basis, features=True)
    results = runs.compare(steered, [(how, amount)], top_k)
    return results[0]


@checked
def interchange(
    model: TransformerLensModel,
    prompt: str | Sequence[str] | Int[Tensor, "batch pos"],
    donor: str | Sequence[str] | Int[Tensor, "donor donor_pos"],
    nodes: Nodes,
    *,
    positions: int | Sequence[int] | None = None,
    basis: Dictionaries = None,
    watch: Watch | None = None,
    top_k: int = 10,
    generate: int = 0,
    prepend_bos: bool | None = None,
    batch_size: int = 32,
) -> SteeringResult:
    """Set `nodes` on `prompt` to what they are on `donor`, at the same positions: an interchange intervention.

    One donor for all prompts, or one a prompt. The rest as in `steer`, which this is with `value=node_values(...)`.

    Raises:
        SettingsError: a node without a position, or another number of donors than one or one a prompt.

    Source: Geiger et al. 2021, arXiv 2106.02997.

    Example:
        >>> import tl_neuron_circuits as tnc
        >>> model = tnc.load_demo_model()
        >>> result = tnc.interchange(model, "The girl near the dog", "The boys near the dog", ["L2/N5@3"])
        >>> len(result.nodes)
        1
    """
    values = node_values(
        model, donor, nodes, positions=positions, basis=basis, prepend_bos=prepend_bos, batch_size=batch_size
    )
    return steer(
        model, prompt, nodes, value=values, positions=positions, basis=basis, watch=watch, top_k=top_k,
        generate=generate, prepend_bos=prepend_bos, batch_size=batch_size,
    )  # fmt: skip


@checked
def sweep(
    model: TransformerLensModel,
    prompt: str | Sequence[str] | Int[Tensor, "batch pos"],
    nodes: Nodes,
    *,
    scales: Sequence[int | float] = (-4, -2, -1, 0, 1, 2, 4),
    positions: int | Sequence[int] | None = None,
    basis: Dictionaries = None,
    watch: Watch | None = None,
    top_k: int = 5,
    prepend_bos: bool | None = None,
    batch_size: int = 32,
) -> SteeringSweep:
    """Steer `nodes` by each of several multipliers; the unsteered run is made once.

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
    runs = Runs(model, read_prompts(model, prompt, prepend_bos), watch, batch_size, basis=basis_of(nodes, basis))
    steered = find_nodes(model, nodes, positions, basis, features=True)
    results = runs.compare(steered, [("scale", scale) for scale in scales], top_k)
    return SteeringSweep(tuple(float(scale) for scale in scales), tuple(results))


class Runs:
    """A model on some prompts, with and without steering."""

    def __init__(
        self, model: TransformerLensModel, prompts: ReadPrompts, watch: Watch | None, batch_size: int,
        generate: int = 0, basis: Dictionaries = None,
    ) -> None:  # fmt: skip
        if batch_size < 1 or generate < 0:
            raise SettingsError(
                f"expected batch_size of at least 1 and generate of at least 0; got {batch_size}, {generate}."
            )
        self._model, self._prompts, self._generate = model, prompts, generate
        self._watch = {
            name: find_nodes(model, group, basis=basis, features=True) for name, group in (watch or {}).items()
        }
        self._names = list(dict.fromkeys(hook for group in self._watch.values() for hook in reads_of_nodes(group)))
        self._batches = list(prompts.batches(batch_size))

    def compare(self, nodes: pd.DataFrame, changes: Sequence[tuple[How, Amount]], top_k: int) -> list[SteeringResult]:
        """One result a change; the run without steering is shared."""
        if top_k < 1:
            raise SettingsError(f"expected top_k of at least 1; got {top_k}.")
        for _, amount in changes:
            self._check_rows(amount)
        before: list[Tensor | None] = [None] * len(self._prompts)
        after: list[list[Tensor]] = [[*before] for _ in changes]  # pyright: ignore[reportAssignmentType]
        watched = [{name: torch.empty(len(self._prompts)) for name in self._watch} for _ in changes]
        texts: list[list[tuple[str, str]]] = [[("", "")] * len(self._prompts) for _ in changes]
        for rows, tokens in self._batches:
            logits, base = run(self._model, tokens, self._names)
            place(before, rows, logits)
            plain = self._continue(tokens, [])
            for number, (how, amount) in enumerate(changes):
                hooks = hooks_for(self._model, nodes, how, self._of_rows(amount, rows))
                logits, values = run(self._model, tokens, self._names, hooks)
                place(after[number], rows, logits)
                for name, group in self._watch.items():
                    old, new = values_by_key(base, group), values_by_key(values, group)
                    watched[number][name][rows] = relative_change(old, new, group)
                for row, *pair in zip(rows, plain, self._continue(tokens, hooks), strict=True):
                    texts[number][row] = (pair[0], pair[1])
        return self._results(nodes, changes, top_k, before, after, watched, texts)

    def _results(
        self, nodes: Any, changes: Any, top_k: int, before: Any, after: Any, watched: Any, texts: Any
    ) -> list[SteeringResult]:
        plain, steered = torch.stack(before), [torch.stack(one) for one in after]
        shown = [tokens for one in steered for tokens in shown_tokens([plain, one], top_k)]
        best = [token for one in (plain, *steered) for token in one.argmax(-1).tolist()]
        ids = sorted({token for tokens in shown for token in tokens} | set(best))
        names = dict(zip(ids, token_names(self._model, ids), strict=True))
        return [
            SteeringResult(
                self._prompts.texts, plain, steered[number], nodes.drop(columns=["site", "key"]),
                {"how": how, "amount": amount, "top_k": top_k, "generate": self._generate},
                watched[number], tuple(texts[number]) if self._generate else None, names,
            )
            for number, (how, amount) in enumerate(changes)
        ]  # fmt: skip

    def _check_rows(self, amount: Amount) -> None:
        if isinstance(amount, Tensor) and amount.dim() == 2 and amount.shape[0] not in (1, len(self._prompts)):
            raise SettingsError(
                f"expected a tensor [batch, node] for {len(self._prompts)} prompts (or one row for all); got "
                f"{amount.shape[0]} rows."
            )

    def _of_rows(self, amount: Amount, rows: list[int]) -> Amount:
        by_prompt = isinstance(amount, Tensor) and amount.dim() == 2 and amount.shape[0] > 1
        return amount[rows] if by_prompt and isinstance(amount, Tensor) else amount

    def _continue(self, tokens: Int[Tensor, "batch pos"], hooks: Hooks) -> list[str]:
        """Greedy continuations of every row; empty where none were asked for."""
        if not self._generate:
            return [""] * len(tokens)
        end = getattr(getattr(self._model, "tokenizer", None), "eos_token_id", None)
        text, ended = tokens, torch.zeros(len(tokens), dtype=torch.bool, device=tokens.device)
        for _ in range(self._generate):
            logits, _ = run(self._model, text, (), hooks)
            best = logits[:, -1].argmax(-1)
            if end is not None:
                best = torch.where(ended, torch.full_like(best, end), best)
                ended = ended | (best == end)
            text = torch.cat([text, best[:, None].to(text)], dim=1)
        return [text_of(self._model, _until(row, end)) for row in text[:, tokens.shape[1] :]]


def _until(tokens: Int[Tensor, " pos"], end: int | None) -> Int[Tensor, " until"]:
    """The tokens before the first `end`."""
    places = (tokens == end).nonzero() if end is not None else []
    return tokens[: int(places[0])] if len(places) else tokens


def place(out: list[Any], rows: list[int], logits: Float[Tensor, "batch pos d_vocab"]) -> None:
    """Keep each row's last logits, in float32 on the CPU."""
    for row, last in zip(rows, logits[:, -1].float().cpu(), strict=True):
        out[row] = last


def relative_change(before: Values, after: Values, group: pd.DataFrame) -> Float[Tensor, " batch"]:
    """sum_n sign(a_n) (a'_n - a_n) / sum_n |a_n| of a group of nodes; those without a position count at every one."""
    total, change = 0.0, 0.0
    for hook, rows in group.groupby("key", sort=False):
        old, new = (values[str(hook)].double().cpu() for values in (before, after))
        units, positions = (
            torch.as_tensor(rows[key].to_numpy(dtype="int64", copy=True)) for key in ("unit", "position")
        )
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
