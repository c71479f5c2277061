"""What nodes are in a run: the values of an interchange intervention."""

from collections.abc import Sequence

import pandas as pd
import torch
from jaxtyping import Float, Int
from torch import Tensor

from .._errors import SettingsError
from .._typing import checked
from ..bases._runs import Values
from ..models._protocol import TransformerLensModel
from ._steering_nodes import Dictionaries, Nodes, find_nodes, reads_of_nodes, values_by_key
from ._steering_prompts import read_prompts, run


@checked
def node_values(
    model: TransformerLensModel,
    prompts: str | Sequence[str] | Int[Tensor, "batch pos"],
    nodes: Nodes,
    *,
    positions: int | Sequence[int] | None = None,
    basis: Dictionaries = None,
    prepend_bos: bool | None = None,
    batch_size: int = 32,
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
    for rows, tokens in read.batches(batch_size):
        _, values = run(model, tokens, hooks)
        picked = pick(values_by_key(values, frame), frame)
        out.update(zip(rows, picked, strict=True))
    return torch.stack([out[row] for row in range(len(read))])


def pick(values: Values, frame: pd.DataFrame) -> Float[Tensor, "batch node"]:
    """The values of nodes with positions, in the order of the frame's rows; `values` by the frame's keys.

    Raises:
        SettingsError: a position outside the prompt or a unit out of range.
    """
    like = next(iter(values.values()))
    out = like.new_empty(len(like), len(frame))
    for hook, rows in frame.reset_index(drop=True).groupby("key", sort=False):
        flat = values[str(hook)]
        units, places = (torch.as_tensor(rows[key].to_numpy(dtype="int64", copy=True)) for key in ("unit", "position"))
        for name, index, size in (("positions", places, flat.shape[1]), ("units", units, flat.shape[2])):
            if int(index.max()) >= size:
                raise SettingsError(f"expected {name} below {size} at {hook}; got {int(index.max())}.")
        out[:, torch.as_tensor(rows.index.to_numpy(dtype="int64", copy=True))] = flat[:, places, units].to(out)
    return out
