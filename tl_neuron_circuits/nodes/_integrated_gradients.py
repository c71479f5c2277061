"""Integrated gradients, over one site at a time or over the token embeddings.

    score(n) = (a_clean - a_base) * mean_k d metric / d a |_{x = clean + k/K (base - clean)},  k = 0 .. K-1

`integrated_gradients`: x is the whole activation of n's site; the rest of the network runs on the clean prompt. A
dictionary's decoder is linear, so moving its nodes together is moving the activation they make up.
`integrated_gradients_inputs`: x is the token embeddings, so that one path serves all sites.
Left Riemann sum: it includes the clean end, so K = 1 is attribution patching (`gradient`).
Sign: positive supports the answer. Cost: K forwards and backwards, times the number of sites for the first.
Source: Marks et al. 2025, arXiv 2403.19647; Hanna et al. 2024, arXiv 2403.17806; METHODS 1.2.
"""

from typing import Any

import torch
from torch import Tensor

from .._errors import PairsError
from ..bases._runs import Values, answers_only, logits_of, run_values
from ..bases._site import Site
from ..propagation._relp import relp
from ..tasks._metrics import measure
from ..tasks._tokenized import Batch
from ._gradients import run_gradients
from ._setting import Gradients, Runs, Setting


def per_site(setting: Setting, batch: Batch, runs: Runs, clean: Values) -> Gradients:
    """The mean gradient at every site, along that site's own path."""
    return {site.hook: _along_site(setting, batch, site, runs, clean[site.hook]) for site in setting.sites}


def _along_site(setting: Setting, batch: Batch, site: Site, runs: Runs, clean: Tensor) -> Tensor:
    base = runs.base[site.hook]
    target = torch.zeros_like(clean) if base is None else site.put_together(base, clean)
    total = torch.zeros_like(clean, dtype=torch.float32 if clean.dtype != torch.float64 else clean.dtype)
    for step in range(setting.steps):
        point = torch.lerp(clean, target, step / setting.steps).requires_grad_(True)
        with relp(setting.model, setting.rules, stabilizer=setting.stabilizer):
            replace = [(site.hook, lambda value, hook, point=point: point)]
            with answers_only(setting.model, batch, setting.metric) as seen, setting.model.hooks(fwd_hooks=replace):
                logits = logits_of(setting.model, batch.clean, batch.attention_mask)
            (gradient,) = torch.autograd.grad(measure(setting.metric, logits, seen).sum(), point)
        total += gradient / setting.steps
    return total


def along_inputs(setting: Setting, batch: Batch) -> Gradients:
    """The mean gradient at every site, along the path from clean to corrupt (or zero) token embeddings.

    Raises:
        PairsError: the baseline is the corrupt prompt and there is none.
    """
    name = "hook_embed"
    clean = run_values(setting.model, batch, [name])[name]
    if setting.baseline == "zero":
        target = torch.zeros_like(clean)
    elif batch.corrupt is None:
        raise PairsError("integrated gradients over inputs need corrupt prompts, or baseline='zero'; there are none.")
    else:
        target = run_values(setting.model, batch.on_corrupt(), [name])[name]
    totals: dict[str, Any] = {}
    for step in range(setting.steps):
        point = torch.lerp(clean, target, step / setting.steps)
        with relp(setting.model, setting.rules, stabilizer=setting.stabilizer):
            hook = (name, lambda value, hook, point=point: point.clone().requires_grad_(True))
            _, gradients = run_gradients(setting.model, batch, setting.sites, setting.metric, hooks=[hook])
        for site, gradient in gradients.items():
            totals[site] = (
                totals.get(site, 0) + gradient.to(torch.promote_types(gradient.dtype, torch.float32)) / setting.steps
            )
    return totals
