"""The prompts and tokens that drive a neuron most, over a set of prompts that is read as a stream.

One position per prompt: where the neuron is largest (or smallest, or largest in size). Only the best prompts of every
neuron are kept, so memory does not grow with the number of prompts.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from html import escape
from typing import Literal

import pandas as pd
import torch
from jaxtyping import Float, Int
from torch import Tensor

from .. import _html
from .._errors import SettingsError
from .._progress import show_batches
from .._typing import checked
from ..interventions._find_nodes import Nodes, find_nodes
from ..interventions._steering_prompts import read_prompts, run, text_pieces
from ..models._protocol import TransformerLensModel
from ..models._threads import holding
from ._highlight import color_scale, highlight

By = Literal["largest", "smallest", "absolute"]
Describe = Callable[[str, pd.DataFrame], str]
"""From a neuron's label and its examples (rows of `to_dataframe`) to a description."""


@dataclass(frozen=True, eq=False)
class Example:
    """A neuron on one prompt: its activation at every token, and where it is strongest."""

    prompt: int
    tokens: tuple[str, ...]
    activations: tuple[float, ...]
    position: int


@dataclass(frozen=True, eq=False, repr=False)
class MaxActivatingExamples:
    """The strongest examples of every neuron, best first, and descriptions where a callable gave them.

    Example:
        >>> import tl_neuron_circuits as tnc
        >>> model = tnc.load_demo_model()
        >>> found = tnc.max_activating_examples(model, ["The dog is", "The dogs are"], ["L2/N5"], k=2)
        >>> found
        MaxActivatingExamples(1 neurons over 2 prompts)
        >>> found.to_dataframe()["rank"].tolist()
        [0, 1]
    """

    examples: dict[str, tuple[Example, ...]]
    n_prompts: int
    descriptions: dict[str, str] = field(default_factory=dict)

    def to_dataframe(self) -> pd.DataFrame:
        """Columns label, rank (from 0), prompt (its number), position, token, activation, text; description if any."""
        rows = []
        for label, found in self.examples.items():
            for rank, e in enumerate(found):
                place = (label, rank, e.prompt, e.position, e.tokens[e.position], e.activations[e.position])
                rows.append((*place, "".join(e.tokens)))
        columns = ["label", "rank", "prompt", "position", "token", "activation", "text"]
        frame = pd.DataFrame(rows, columns=columns)
        return frame.assign(description=frame["label"].map(self.descriptions)) if self.descriptions else frame

    def html(self, label: str) -> str:
        """One neuron's examples, tokens colored by activation and escaped.

        Raises:
            SettingsError: no such neuron.
        """
        if label not in self.examples:
            raise SettingsError(f"expected one of the neurons {list(self.examples)[:8]}; got {label!r}.")
        found = self.examples[label]
        largest = color_scale(example.activations for example in found)
        lines = [f"<li>{highlight(e.tokens, e.activations, largest)}</li>" for e in found]
        title = f"<b>{escape(label)}</b> {escape(self.descriptions.get(label, ''))}"
        return f"<div>{title}<ol>{''.join(lines)}</ol></div>"

    def to_html(self) -> str:
        """Every neuron's examples."""
        return "".join(self.html(label) for label in self.examples)

    def __repr__(self) -> str:
        return f"MaxActivatingExamples({len(self.examples)} neurons over {self.n_prompts} prompts)"

    def _repr_html_(self) -> str:
        return _html.block(repr(self), *(self.html(label) for label in list(self.examples)[:20]))


@holding
@checked
def max_activating_examples(
    model: TransformerLensModel,
    prompts: Sequence[str] | Int[Tensor, "batch pos"],
    nodes: Nodes,
    *,
    k: int = 5,
    by: By = "largest",
    describe: Describe | None = None,
    skip_bos: bool = True,
    batch_size: int = 32,
    prepend_bos: bool | None = None,
    verbose: bool | None = None,
) -> MaxActivatingExamples:
    """Find the `k` prompts on which each neuron is strongest.

    Args:
        model: a HookedTransformer or TransformerBridge.
        prompts: text or tokens.
        nodes: as in `steering_hooks`; positions do not matter.
        k: examples per neuron, from different prompts.
        by: the largest activation, the smallest (for neurons with negative activations), or the largest in size.
        describe: gives a description from a neuron's label and its examples.
        skip_bos: leave the first token of every prompt out of the search where it is the tokenizer's BOS, on which many
            neurons are extreme.
        batch_size: prompts of one length in one pass.
        prepend_bos: None means the model's default.
        verbose: a progress bar. None: after two seconds, in a notebook or a terminal.

    Raises:
        SettingsError: k below 1, a unit out of range, or a description that is not a string.
        PairsError: no prompts, or text without a tokenizer.

    Example:
        >>> import tl_neuron_circuits as tnc
        >>> pairs = tnc.tasks.subject_verb_agreement("simple", n=16)
        >>> examples = tnc.max_activating_examples(tnc.load_demo_model(), pairs.clean, ["L3/N7"], k=3)
        >>> len(examples.to_dataframe())
        3
    """
    if k < 1 or batch_size < 1:
        raise SettingsError(f"expected k and batch_size of at least 1; got {k} and {batch_size}.")
    frame = find_nodes(model, nodes).drop_duplicates(["hook", "unit"]).reset_index(drop=True)
    labels = list(frame["label"].str.partition("@")[0])
    read = read_prompts(model, prompts, prepend_bos)
    bos = getattr(getattr(model, "tokenizer", None), "bos_token_id", None) if skip_bos else None
    best: list[list[tuple[float, int, Tensor]]] = [[] for _ in labels]
    for rows, tokens in show_batches(read.batches(batch_size), len(read), desc="examples", verbose=verbose):
        _, values = run(model, tokens, list(frame["hook"].unique()))
        for hook, part in frame.groupby("hook", sort=False):
            flat = values[str(hook)].flatten(2).float().cpu()
            units = torch.as_tensor(part["unit"].to_numpy(dtype="int64", copy=True))
            if int(units.max()) >= flat.shape[2]:
                raise SettingsError(f"expected units below {flat.shape[2]} at {hook}; got {int(units.max())}.")
            _merge(best, list(part.index), rows, flat[:, :, units], _may_be_chosen(tokens.cpu(), bos), k, by)
    examples = {}
    for label, found in zip(labels, best, strict=True):
        examples[label] = tuple(_example(model, row, read.tokens[row], values, by, bos) for _, row, values in found)
    result = MaxActivatingExamples(examples, len(read))
    return result if describe is None else _described(result, describe)


def _may_be_chosen(tokens: Int[Tensor, "batch pos"], bos: int | None) -> Tensor:
    """Which positions are searched: all but a leading BOS (and that too where the prompt is nothing else)."""
    searched = torch.ones_like(tokens, dtype=torch.bool)
    if bos is not None and tokens.shape[1] > 1:
        searched[:, 0] = tokens[:, 0] != bos
    return searched


def _strength(values: Tensor, by: By) -> Tensor:
    return {"largest": values, "smallest": -values, "absolute": values.abs()}[by]


def _merge(
    best: list[list[tuple[float, int, Tensor]]],
    places: list[int],
    rows: list[int],
    values: Float[Tensor, "batch pos node"],
    searched: Tensor,
    k: int,
    by: By,
) -> None:
    """Put this batch's best prompts of every node among the best so far."""
    strength = _strength(values, by).masked_fill(~searched[:, :, None], -torch.inf).amax(1)
    top = strength.topk(min(k, len(rows)), dim=0)
    for column, place in enumerate(places):
        found = zip(top.values[:, column].tolist(), top.indices[:, column].tolist(), strict=True)
        added = [(key, rows[index], values[index, :, column].clone()) for key, index in found]
        best[place] = sorted([*best[place], *added], key=lambda entry: (-entry[0], entry[1]))[:k]


def _example(model: TransformerLensModel, row: int, tokens: Tensor, values: Tensor, by: By, bos: int | None) -> Example:
    key = _strength(values, by).masked_fill(~_may_be_chosen(tokens.cpu()[None], bos)[0], -torch.inf)
    return Example(row, tuple(text_pieces(model, tokens)), tuple(values.tolist()), int(key.argmax()))


def _described(result: MaxActivatingExamples, describe: Describe) -> MaxActivatingExamples:
    frame = result.to_dataframe()
    descriptions = {}
    for label in result.examples:
        text = describe(label, frame[frame["label"] == label].reset_index(drop=True))
        if not isinstance(text, str):
            raise SettingsError(f"expected describe to return a string for {label}; got {type(text).__name__}.")
        descriptions[label] = text
    return MaxActivatingExamples(result.examples, result.n_prompts, descriptions)
