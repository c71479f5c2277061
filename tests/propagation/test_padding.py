"""A padded batch gives every prompt its own gradients (trap 12).

TransformerBridge's own logits are NaN where a row of left padding attends to nothing (most adapters, 3.9 and 4.3):
there the claim is that no gradient comes out. `attribute` and `evaluate` never pad.
"""

from functools import cache
from typing import Any, Literal

import pytest
import torch
from torch import Tensor

from tests.families import ModelCase, each_model
from tests.loops import for_each
from tests.propagation.readings import model_of
from tl_neuron_circuits._errors import NumericalError
from tl_neuron_circuits.propagation import relp
from tl_neuron_circuits.tasks import TokenizedPairs, logit_difference
from tl_neuron_circuits.tasks._metrics import measure

NAMES = ["hook_embed", "blocks.0.mlp.hook_post", "blocks.1.mlp.hook_post", "blocks.0.hook_resid_post"]


def pairs() -> TokenizedPairs:
    generator = torch.Generator().manual_seed(3)
    prompts = [torch.randint(2, 50, (length,), generator=generator) for length in (7, 4, 6)]
    return TokenizedPairs.from_tokens(prompts, torch.tensor([3, 4, 5]), None, torch.tensor([6, 7, 8]), pad_token=1)


def gradients(model: Any, batch: Any) -> tuple[Tensor, dict[str, Tensor]]:
    store: dict[str, Tensor] = {}
    hooks = [(name, lambda value, hook, name=name: store.update({name: value}) or value) for name in NAMES]
    mask = {} if batch.attention_mask is None else {"attention_mask": batch.attention_mask}
    with relp(model):
        metric = measure(logit_difference, model.run_with_hooks(batch.clean, fwd_hooks=hooks, **mask), batch)
        found = torch.autograd.grad(metric.sum(), [store[name] for name in NAMES])
    return metric.detach(), dict(zip(NAMES, found, strict=True))


@cache
def one_by_one(case: ModelCase) -> list[tuple[Tensor, dict[str, Tensor]]]:
    """Each prompt alone, in their order."""
    singles = sorted(pairs().batches(1), key=lambda batch: int(batch.index))
    return [gradients(model_of(case), single) for single in singles]


@each_model()
@for_each("side", ["left", "right"])
def test_a_padded_batch_is_its_members(case: ModelCase, side: Literal["left", "right"]) -> None:
    model, tokens = model_of(case), pairs()
    (padded,) = tokens.batches(8, equal_length=False, padding_side=side)
    if not model(padded.clean, attention_mask=padded.attention_mask).isfinite().all():
        assert side == "left" and case.backend == "TransformerBridge"
        with pytest.raises(NumericalError, match="rows of padding that attend to nothing"):
            gradients(model, padded)
        return
    metric, together = gradients(model, padded)
    for row, (alone, own) in enumerate(one_by_one(case)):
        torch.testing.assert_close(metric[row], alone[0], atol=1e-6, rtol=1e-6)
        real = padded.attention_mask[row].bool()
        for name in NAMES:
            close = {"atol": 1e-6 * max(1.0, float(own[name].abs().max())), "rtol": 0}
            torch.testing.assert_close(together[name][row][real], own[name][0], **close, msg=f"{name} of prompt {row}")
            assert torch.count_nonzero(together[name][row][~real]) == 0 or name == "hook_embed", name
