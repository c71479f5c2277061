"""Does relevance propagation hold on this model? Measured with all four rules on a short input, not looked up.

    at the embeddings   sum(e * g_e) + sum(b * g_b over all biases)             = sum_v (d m / d z_v) z_v
    at an inner cut     sum(x * g_x) + sum(b * g_b over the biases after it)    = the same
    at every MLP        sum(gate * g_gate) + sum(up * g_up)                     = sum(neuron * g_neuron)

m is the largest logit z_v at the last position before any soft cap (through which nothing is conserved). A gap
is |left - right| over the sum of the |terms|: one term per token, per bias, and for the logits. (A ratio would explode
where they cancel.) The sum at every MLP also shows that both of its rules took effect there, and the embeddings alone
would not: an embedding that conserves says nothing of neurons that are none.
"""

import weakref
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from .._errors import NumericalError, PropagationError, UnsupportedModelError
from .._memory import is_out_of_memory
from ..models._protocol import TransformerLensModel, hook_points, submodule
from ..models._sites import ModelSites, bias_after_product, find_sites
from ..models._threads import hooked, keep_value, this_thread_only
from ._biases import biases_in_graph
from .rules import RULE_SETS

_ALLOWED = {torch.float64: 1e-5, torch.float32: 1e-3, torch.float16: 0.05, torch.bfloat16: 0.05}
_COVERED = ("attn", "self_attn", "mlp", "ln")  # what a block may have: the rest is named where relevance is lost
_HOOKS = (
    "_forward_hooks", "_forward_pre_hooks", "_forward_hooks_with_kwargs", "_forward_pre_hooks_with_kwargs",
    "_forward_hooks_always_called", "_backward_hooks", "_backward_pre_hooks", "fwd_hooks", "bwd_hooks",
)  # fmt: skip

_HOLDS: "weakref.WeakKeyDictionary[TransformerLensModel, tuple[Any, str | None]]" = weakref.WeakKeyDictionary()
"""What was found on each model, with the state of the model that it was found in."""


@dataclass(frozen=True)
class Conservation:
    """What was measured, and what is wrong with it."""

    ratio: float
    """Relevance of embeddings and biases over that of the logits."""
    graph_bytes: float
    problem: str | None


def require_conservation(
    model: TransformerLensModel, needs: tuple[str, ...], all_rules: AbstractContextManager[None]
) -> None:
    """Raise where relevance propagation does not hold on `model`; measured anew when its weights or flags change.

    Where the model has no site for a rule that is not in `needs`, nothing can be measured: the user left that rule out.
    `all_rules` is the context in which all four rules apply, whatever the user chose.

    Raises:
        UnsupportedModelError: with what `check_model` would say.
        NumericalError: the model's values are not finite.
    """
    state = _state(model)
    known = _HOLDS.get(model)
    if known is None or known[0] != state:
        sites = find_sites(model)
        lacking = {rule for problem in sites.problems for rule in problem.rules} & set(RULE_SETS["relp"].needs)
        if lacking - set(needs):
            return
        known = state, find_problem(model, sites, all_rules)
        _HOLDS[model] = known
    if known[1] is not None:
        raise UnsupportedModelError(
            f"relevance propagation does not hold on this model: {known[1]} check_model(model) has the measurement; "
            "check=False goes on without it, and the numbers are then no relevance."
        )


def find_problem(model: TransformerLensModel, sites: ModelSites, all_rules: AbstractContextManager[None]) -> str | None:
    """What is wrong, in one sentence or two; None where everything holds."""
    try:
        return measure_conservation(model, sites, short_input(model), all_rules).problem
    except Exception as error:
        if is_out_of_memory(error) or isinstance(error, NumericalError):  # these weights' fault, not the architecture's
            raise
        return describe_failure(error)


def describe_failure(error: Exception) -> str:
    """What a forward or backward pass raised, as a problem of the model."""
    if isinstance(error, PropagationError | UnsupportedModelError | NumericalError):
        return str(error)
    lines = str(error).strip().splitlines() or ["no message"]
    return f"a pass over a short input raised {type(error).__name__}: {lines[0][:300]}."


def short_input(model: TransformerLensModel) -> Tensor:
    """Eight tokens spread over the vocabulary, fewer where the context is shorter."""
    device = next(iter(nn.Module.parameters(model))).device  # pyright: ignore[reportArgumentType]
    spread = torch.linspace(0, model.cfg.d_vocab - 1, 10, dtype=torch.float64, device=device).long()[1:9]
    return spread[None, : max(1, min(8, int(getattr(model.cfg, "n_ctx", 8) or 8)))]


def measure_conservation(
    model: TransformerLensModel, sites: ModelSites, tokens: Tensor, all_rules: AbstractContextManager[None]
) -> Conservation:
    """Run one forward and one backward pass with all four rules, with users' hooks set aside.

    Raises:
        PropagationError: a rule does not stand for what the model computes, or the logits were not seen.
        UnsupportedModelError: a hook did not fire.
    """
    points = hook_points(model)
    cut = f"blocks.{(sites.n_layers - 1) // 2}.hook_resid_post"
    positional = model.cfg.positional_embedding_type == "standard"
    embeddings = [name for name in sites.embeddings if name == "hook_embed" or positional]
    first = "blocks.0.hook_resid_pre"
    constant = positional and "hook_pos_embed" not in points and first in points  # XGLM adds its positions unseen
    store: dict[str, Tensor] = {}
    raw_logits: list[Tensor] = []
    ends = ("ln_final.hook_out", f"blocks.{sites.n_layers - 1}.hook_resid_post")
    end = next((name for name in ends if name in points), None)
    if end != ends[0] and "ln_final.hook_scale" in points:
        end = None  # HookedTransformer's final norm shows no output

    starts = [name for name in (*embeddings, cut) if name in points]
    kept = [name for mlp in sites.mlps for name in (mlp.pre, mlp.up, mlp.post) if name is not None]
    kept += [name for attention in sites.attentions for name in (attention.query, attention.key)]
    kept += [first] if constant else []
    kept += [end] if end is not None and end != cut else []
    hooks = [(name, partial(_start_leaf, store, name)) for name in starts]
    hooks += [(name, partial(keep_value, store, name)) for name in dict.fromkeys(kept)]
    unembed = submodule(model, "unembed")
    if unembed is None:
        raise UnsupportedModelError("expected an unembedding; this model has none, so it gives no logits.")

    with _users_hooks_aside(model, points):
        handle = unembed.register_forward_hook(this_thread_only(partial(_keep_logits, store, raw_logits)))
        try:
            with all_rules, biases_in_graph(model) as biases, _graph_size(model) as size:
                with hooked(model, hooks):
                    logits = model(tokens)
                if not raw_logits or not isinstance(logits, Tensor):
                    raise PropagationError("expected the unembedding to give logits as a module; it was not run.")
                gradients = _gradients(raw_logits[-1][0, -1].max(), raw_logits[-1], store, cut, biases)
        finally:
            handle.remove()
        shared = _unseen_positions(model, tokens, first) if constant else None

    dtype = min(
        (value.dtype for value in store.values() if value.is_floating_point()), key=lambda d: torch.finfo(d).bits
    )
    allowed = _ALLOWED.get(dtype, 1e-3)
    total = _dots(raw_logits[-1], gradients.end["logits"]).sum()
    if total == 0:
        raise PropagationError("expected a logit that depends on its input; the largest one is exactly zero.")
    leaves = {name: store[name] for name in embeddings if name in store}
    if shared is not None:
        leaves[first] = shared
    everywhere = [_dots(leaf, gradients.at(name), by_token=True) for name, leaf in leaves.items()]
    everywhere += [_dots(bias, gradients.at(name)) for name, bias in biases.items()]
    later = [_dots(leaf, gradients.end.get(name), by_token=True) for name, leaf in leaves.items()]
    later += [_dots(bias, gradients.end.get(name)) for name, bias in biases.items()]
    later.append(_dots(store.get(cut), gradients.end.get(cut), by_token=True))
    relevance = float(torch.cat(everywhere).sum())
    others = _uncovered_parts(model)
    if end in store and not _same_direction(store[end].detach(), store["unembedded"]):
        others.append("the prediction head before the unembedding")
    if others:  # then a gap that rounding could explain is theirs
        allowed = min(allowed, _ALLOWED[torch.float32])
    gaps = {"the embeddings": _gap(everywhere, total), cut: _gap(later, total)}
    problem = _lost(others, gaps, allowed, relevance / float(total)) or _ineffective(
        model, sites, store, gradients, allowed
    )
    return Conservation(relevance / float(total), float(size[0]), problem)


def _start_leaf(store: dict[str, Tensor], name: str, value: Tensor, hook: Any) -> Tensor:
    """As a hook: the model continues from a leaf. Biases before an embedding are part of it."""
    store[f"{name} before"] = value
    store[name] = value.detach().requires_grad_(True)
    return store[name]


def _keep_logits(
    store: dict[str, Tensor], raw_logits: list[Tensor], module: Any, arguments: tuple[Any, ...], output: Tensor
) -> None:
    store["unembedded"] = arguments[0].detach()
    raw_logits.append(output)


@dataclass(frozen=True)
class _Gradients:
    """Of the metric, in two stages: from the end to the cut, and from the cut to the embeddings."""

    end: dict[str, Tensor]
    start: dict[str, Tensor]

    def at(self, name: str) -> Tensor | None:
        own = [stage[name] for stage in (self.end, self.start) if name in stage]
        return None if not own else own[0] if len(own) == 1 else own[0] + own[1]


def _gradients(
    metric: Tensor, logits: Tensor, store: dict[str, Tensor], cut: str, biases: dict[str, Tensor]
) -> _Gradients:
    inner = {name: x for name, x in store.items() if not name.endswith(" before")} | biases
    end = _stage(metric, {"logits": logits, **inner}, None)
    if "logits" not in end:
        raise PropagationError("expected a logit that depends on its input; no gradient reaches the logits.")
    if cut not in end:
        return _Gradients(end, {})
    return _Gradients(end, _stage(store[f"{cut} before"], inner, end[cut]))


def _stage(outputs: Tensor, inputs: dict[str, Tensor], seed: Tensor | None) -> dict[str, Tensor]:
    live = {name: x for name, x in inputs.items() if x.requires_grad}
    if not outputs.requires_grad or not live:
        return {}
    found = torch.autograd.grad(outputs, list(live.values()), seed, allow_unused=True, retain_graph=True)
    return {name: g for name, g in zip(live, found, strict=True) if g is not None}


def _dots(value: Tensor | None, gradient: Tensor | None, *, by_token: bool = False) -> Tensor:
    """value * gradient, summed; by position where asked."""
    if value is None or gradient is None:
        return torch.zeros(1, dtype=torch.float64)
    product = (value.detach().double() * gradient.double()).cpu()
    return product.sum(-1).flatten() if by_token else product.sum()[None]


def _gap(terms: list[Tensor], total: Tensor) -> float:
    parts = torch.cat(terms)
    size = parts.abs().sum() + total.abs()
    return float((parts.sum() - total).abs() / size)


def _same_direction(one: Tensor, other: Tensor) -> bool:
    """Whether one is the other times a number: some models scale what they unembed."""
    one, other = one.double().flatten(), other.double().flatten()
    return one.shape == other.shape and bool((one @ other).abs() > 0.999 * one.norm() * other.norm())


def _lost(others: list[str], gaps: dict[str, float], allowed: float, ratio: float) -> str | None:
    worst = max(gaps, key=lambda place: gaps[place] if gaps[place] == gaps[place] else float("inf"))
    if gaps[worst] <= allowed:
        return None
    because = (
        f"It has parts that no rule covers: {', '.join(others)}."
        if others
        else "A part of this architecture is not covered by the rules."
    )
    return (
        f"relevance is not conserved: at {worst} {gaps[worst]:.2g} of it is missing or too much, allowed {allowed:g} "
        f"(embeddings and biases have {ratio:.6f} of what the logits have). {because} Use method='patching', or "
        "'gradient'."
    )


def _ineffective(
    model: TransformerLensModel, sites: ModelSites, store: dict[str, Tensor], gradients: _Gradients, allowed: float
) -> str | None:
    """A rule that had no effect at some layer."""
    for mlp in sites.mlps:
        neurons, g = store.get(mlp.activated, store[mlp.post]), gradients.at(mlp.post)
        if g is None or mlp.activated != mlp.post:
            continue  # no path from there to the logit, or a norm in between
        bias = bias_after_product(model, mlp.layer)
        neurons = neurons if bias is None else neurons - bias
        ins = [_dots(store[name], gradients.at(name)) for name in (mlp.pre, mlp.up) if name is not None]
        size = float((neurons.detach().double() * g.double()).abs().sum())
        off = abs(float(torch.cat(ins).sum()) - float(_dots(neurons, g).sum()))
        if not off <= allowed * size:
            return (
                f"the rules at blocks.{mlp.layer}.mlp have no effect: what {mlp.pre} gets is off by "
                f"{off / size:.2g} of what {mlp.post} passes on, allowed {allowed:g}. The "
                "model computes its neurons on another path."
            )
    for attention in sites.attentions:
        for name in (attention.query, attention.key):
            if name in store and store[name].requires_grad:
                return f"the attention rule has no effect at {name}: a gradient still goes through it."
    return None


def _uncovered_parts(model: TransformerLensModel) -> list[str]:
    """Parts of the blocks that are neither attention, nor an MLP, nor a norm of the residual stream, by name."""
    parts: dict[str, None] = {}
    unembed = getattr(submodule(model, "unembed"), "original_component", None)
    predictions: Any = getattr(getattr(getattr(model, "original_model", None), "cls", None), "predictions", None)
    heads = (unembed, getattr(predictions, "transform", None), getattr(unembed, "dense", None))
    if any(any(True for _ in child.parameters()) for head in heads if head is not None for child in head.children()):
        parts["the prediction head before the unembedding"] = None
    for layer in range(int(model.cfg.n_layers)):
        block = submodule(model, f"blocks.{layer}")
        for name, part in () if block is None else block.named_children():
            known = name.startswith(_COVERED) or name.startswith("_") or "norm" in name.lower()
            if not known and any(True for _ in part.parameters()):
                parts[f"{name} ({type(part).__name__})"] = None
    return list(parts)


def _unseen_positions(model: TransformerLensModel, tokens: Tensor, first: str) -> Tensor | None:
    """What is added to the embeddings before the first block, where that is the same on every prompt."""
    seen: list[dict[str, Tensor]] = []
    for prompt in (tokens, tokens.flip(-1)):
        store: dict[str, Tensor] = {}
        hooks = [(n, lambda v, hook, n=n, store=store: store.update({n: v}) or v) for n in ("hook_embed", first)]
        with torch.no_grad(), hooked(model, hooks):
            model(prompt)
        seen.append(store)
    one, other = (store[first].double() - store["hook_embed"].double() for store in seen)
    same = float((one - other).abs().max()) <= 1e-3 * float(one.abs().max())
    return one if same else None


@contextmanager
def _users_hooks_aside(model: TransformerLensModel, points: dict[str, Any]) -> Iterator[None]:
    """The model with its libraries' own hooks only; everybody's are back in their places afterwards."""
    aside: list[tuple[Any, str, Any]] = []
    at_points = set(points.values())
    # HookedTransformer caches the biases of ALiBi at the longest length yet, which rounds shorter prompts differently.
    caches = [(m, m.alibi) for m in nn.Module.modules(model) if hasattr(m, "alibi")]  # pyright: ignore[reportArgumentType]
    try:
        for module in at_points | set(nn.Module.modules(model)):  # pyright: ignore[reportArgumentType]
            for name in _HOOKS:
                hooks = vars(module).get(name)
                if not hooks:
                    continue
                kept = type(hooks)()
                if module not in at_points and isinstance(hooks, dict):
                    kept.update((key, hook) for key, hook in hooks.items() if _is_a_librarys(hook))
                aside.append((module, name, hooks))
                vars(module)[name] = kept
        yield
    finally:
        for module, name, hooks in aside:
            vars(module)[name] = hooks
        for module, alibi in caches:
            module.alibi = alibi


def _is_a_librarys(hook: Any) -> bool:
    function = getattr(hook, "func", hook)
    where = getattr(function, "__module__", None) or type(function).__module__
    return where.split(".")[0] in ("torch", "transformer_lens", "transformers", "accelerate")


@contextmanager
def _graph_size(model: TransformerLensModel) -> Iterator[list[int]]:
    """Bytes of distinct storages that autograd saves inside the context, parameters aside."""
    seen = {p.untyped_storage().data_ptr() for p in model.parameters()}
    size = [0]

    def pack(saved: Tensor) -> Tensor:
        storage = saved.untyped_storage()
        if storage.data_ptr() not in seen:
            seen.add(storage.data_ptr())
            size[0] += storage.nbytes()
        return saved

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda saved: saved):
        yield size


def _state(model: TransformerLensModel) -> tuple[Any, ...]:
    """What the answer depends on, cheaply: weights by address and version, the configuration's flags, train or eval.

    Of the buffers only biases: others are caches (masks, rotary angles, ALiBi) that a longer prompt makes anew.
    """
    buffers = nn.Module.named_buffers(model)  # pyright: ignore[reportArgumentType]
    tensors = [*nn.Module.parameters(model), *(b for name, b in buffers if name.rpartition(".")[2] in ("bias", "b_U"))]  # pyright: ignore[reportArgumentType]
    weights = [(tensor.data_ptr(), tensor._version, tensor.dtype) for tensor in tensors]
    flags = [(key, value) for key, value in vars(model.cfg).items() if isinstance(value, bool | torch.dtype)]
    return hash(tuple(weights)), tuple(flags), model.training  # pyright: ignore[reportAttributeAccessIssue]
