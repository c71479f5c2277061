"""What drives a neuron and what it drives: its attribution to every input token, its contribution to every target.

    attribution(n, s)   = e_s . d a_n / d e_s           how much of the neuron's activation comes from the token at s
    contribution(n, g)  = a_n * d target_g / d a_n      how much of target g it supports

under RelP, at chosen prompts; targets are the logits of the most probable next tokens, minus the mean logit. A node
without a position stands for its sum over positions. Source: METHODS 1.6 and 1.7.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import pandas as pd
import torch
from jaxtyping import Float, Int
from torch import Tensor

from .. import _html
from .._errors import SettingsError
from .._progress import progress
from .._typing import checked
from ..bases._runs import Values, capture, require_fired
from ..interventions._find_nodes import Nodes, find_nodes
from ..interventions._steering_prompts import Prompts, read_prompts, text_pieces, token_names
from ..models._protocol import TransformerLensModel
from ..models._threads import holding, hooked
from ..propagation._gradients import gradients_by_name
from ..propagation._relp import relp
from ..propagation.rules import ALL_RULES

_EMBEDDING = "hook_embed"


@dataclass(frozen=True, eq=False, repr=False)
class Profiles:
    """One row per node; columns are, prompt by prompt, its tokens (`attribution`) and its targets (`contribution`).

    Example:
        >>> import tl_neuron_circuits as tnc
        >>> model = tnc.load_demo_model()
        >>> found = tnc.profiles(model, "The dogs near the cat", ["L1/N5@2", "L2/N7@5"], targets=3)
        >>> found, tuple(found.contribution.shape)
        (Profiles(2 nodes, 6 sources, 3 targets), (2, 3))
    """

    nodes: tuple[str, ...]
    attribution: Float[Tensor, "node source"]
    contribution: Float[Tensor, "node target"]
    sources: tuple[str, ...]
    targets: tuple[str, ...]

    def to_dataframe(self) -> pd.DataFrame:
        """Columns label, view ("attribution" or "contribution"), place (column), name (token), value."""
        frames = []
        for view, values, names in (
            ("attribution", self.attribution, self.sources),
            ("contribution", self.contribution, self.targets),
        ):
            wide = pd.DataFrame(values.numpy(), index=list(self.nodes)).rename_axis("label").reset_index()
            long = wide.melt("label", var_name="place", value_name="value")
            frames.append(long.assign(view=view, name=[names[place] for place in long["place"]]))
        return pd.concat(frames, ignore_index=True)[["label", "view", "place", "name", "value"]]

    def __repr__(self) -> str:
        return f"Profiles({len(self.nodes)} nodes, {len(self.sources)} sources, {len(self.targets)} targets)"

    def _repr_html_(self) -> str:
        table = self.to_dataframe()
        largest = table["value"].abs().sort_values(ascending=False, kind="stable").index
        return _html.block(repr(self), _html.table(table.loc[largest], bars=("value",)))


@holding
@checked
def profiles(
    model: TransformerLensModel,
    prompts: Prompts,
    nodes: Nodes,
    *,
    targets: int = 5,
    rules: Sequence[str] = ALL_RULES,
    chunk: int = 32,
    prepend_bos: bool | None = None,
    verbose: bool | None = None,
) -> Profiles:
    """Attribution and contribution profiles of nodes over one prompt or several.

    Args:
        model: a HookedTransformer or TransformerBridge.
        prompts: as in `steer`, of any lengths. Profiles stand side by side: nodes are compared over all prompts.
        nodes: as in `steering_hooks`; positions must fit every prompt.
        targets: how many of each prompt's most probable next tokens.
        rules: of relevance propagation.
        chunk: nodes in one backward pass (the prompt is repeated as often).
        prepend_bos: None means the model's default.
        verbose: a progress bar. None: after two seconds, in a notebook or a terminal.

    Raises:
        SettingsError: a position or unit out of range, or targets or chunk below 1.

    Source: METHODS 1.6, 1.7.

    Example:
        >>> import tl_neuron_circuits as tnc
        >>> found = tnc.profiles(tnc.load_demo_model(), "The dog near the cats", ["L2/N5", "L3/N7"])
        >>> found.contribution.shape
        torch.Size([2, 5])
    """
    if targets < 1 or chunk < 1:
        raise SettingsError(f"expected targets and chunk of at least 1; got {targets} and {chunk}.")
    frame = find_nodes(model, nodes)
    read = read_prompts(model, prompts, prepend_bos)
    attribution, contribution, sources, names = [], [], [], []
    for prompt in progress(read.tokens, desc="profiles", verbose=verbose):
        with relp(model, rules):
            effects, tokens = _contributions(model, prompt, frame, targets)
            parts = [_attributions(model, prompt, frame[i : i + chunk]) for i in range(0, len(frame), chunk)]
        contribution.append(effects)
        attribution.append(torch.cat(parts))
        sources += text_pieces(model, prompt)
        names += token_names(model, tokens)
    columns = (torch.cat(attribution, 1), torch.cat(contribution, 1))
    return Profiles(tuple(frame["label"]), *columns, tuple(sources), tuple(names))


def _run(model: TransformerLensModel, tokens: Int[Tensor, "batch pos"], hooks: list[str]) -> tuple[Tensor, Values]:
    store: Values = {}
    with hooked(model, [capture(store, name) for name in hooks]):
        logits = model(tokens)
    return logits, require_fired(store, hooks, model)


def _contributions(
    model: TransformerLensModel, prompt: Int[Tensor, " pos"], frame: pd.DataFrame, targets: int
) -> tuple[Float[Tensor, "node target"], list[int]]:
    hooks = list(frame["hook"].unique())
    logits, values = _run(model, prompt[None], hooks)
    last = logits[0, -1]
    tokens = last.topk(min(targets, len(last))).indices.tolist()
    columns = []
    for token in tokens:
        at_hooks = {hook: values[hook] for hook in hooks}
        gradients = gradients_by_name(last[token] - last.mean(), at_hooks, retain_graph=True)
        products = {hook: values[hook].detach() * g for hook, g in gradients.items()}
        columns.append(_gather(products, frame, 0))
    return torch.stack(columns, 1).float().cpu(), tokens


def _attributions(
    model: TransformerLensModel, prompt: Int[Tensor, " pos"], frame: pd.DataFrame
) -> Float[Tensor, "node pos"]:
    """The prompt is repeated, one row per node, so that one backward pass serves all nodes."""
    tokens = prompt[None].repeat(len(frame), 1)
    _, values = _run(model, tokens, [_EMBEDDING, *frame["hook"].unique()])
    total = torch.stack([_gather(values, frame[row : row + 1], row)[0] for row in range(len(frame))]).sum()
    gradient = gradients_by_name(total, {_EMBEDDING: values[_EMBEDDING]})[_EMBEDDING]
    return (values[_EMBEDDING].detach() * gradient).sum(-1).float().cpu()


def _gather(values: Values, frame: pd.DataFrame, row: int) -> Float[Tensor, " node"]:
    """The numbers of the frame's nodes in one row of the batch, gathered on one device.

    A node without a position is summed over positions.
    """
    found, home = [], next(iter(values.values())).device
    for hook, unit, position in zip(frame["hook"], frame["unit"], frame["position"], strict=True):
        flat = values[hook].flatten(2)[row]
        if position >= flat.shape[0] or unit >= flat.shape[1]:
            raise SettingsError(
                f"expected positions below {flat.shape[0]} and units below {flat.shape[1]} at {hook}; got {position} "
                f"and {unit}."
            )
        found.append((flat[:, unit].sum() if position < 0 else flat[position, unit]).to(home))
    return torch.stack(found)
