"""`check_model`: does relevance propagation hold on this model? Measured on a short input, not looked up.

Conservation with all four rules: relevance at the token and positional embeddings plus the biases' share, divided by
sum_v (d m / d z_v) z_v with z the logits before any soft cap. 1 is exact. (The metric itself is not conserved through a
soft cap, hence z.)
"""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import pandas as pd
import torch
from jaxtyping import Int
from torch import Tensor

from .. import _html
from .._errors import NeuronCircuitsError, PropagationError
from .._typing import checked
from ..models._protocol import TransformerLensModel, hook_points, model_name, submodule
from ..models._sites import ModelSites, find_sites, require
from ..models._threads import holding, hooked, this_thread_only
from ._biases import biases_in_graph
from ._relp import relp
from .rules import RULE_SETS

_ALLOWED = {torch.float64: 1e-5, torch.float32: 1e-3, torch.float16: 0.05, torch.bfloat16: 0.3}


@dataclass(frozen=True)
class ModelReport:
    """What `check_model` found. `ok` means: every rule applies at every layer, and relevance is conserved.

    Example:
        >>> import tl_neuron_circuits as tnc
        >>> model = tnc.load_demo_model()
        >>> report = tnc.check_model(model)
        >>> report.ok, round(report.conservation, 3)
        (True, 1.0)
        >>> report.memory_bytes(batch=8, pos=32) > report.parameter_bytes
        True
        >>> int((report.to_dataframe()["role"] == "neurons").sum())
        4
    """

    model_name: str
    model_class: str
    problems: tuple[str, ...]
    conservation: float
    """Relevance of embeddings and biases over that of the logits before any soft cap; 1 is exact, nan: not measured."""
    sites: tuple[dict[str, Any], ...]
    parameter_bytes: int
    graph_bytes_per_token: float
    """Bytes that one token of one prompt holds between forward and backward, measured on the short input."""

    @property
    def ok(self) -> bool:
        """True when there is no problem."""
        return not self.problems

    @checked
    def memory_bytes(self, batch: int, pos: int) -> int:
        """Estimated peak of one RelP attribution: weights plus the graph of `batch` prompts of `pos` tokens."""
        return int(self.parameter_bytes + self.graph_bytes_per_token * batch * pos)

    def to_dataframe(self) -> pd.DataFrame:
        """One row per site: layer, role, hook name, whether it fires, its shape without batch, the rule there."""
        return pd.DataFrame(list(self.sites)).astype({"layer": "Int64"})  # missing: a site of no layer

    def __repr__(self) -> str:
        verdict = "ok" if self.ok else f"{len(self.problems)} problem(s): {self.problems[0]}"
        return f"ModelReport({self.model_name}, {self.model_class}, conservation={self.conservation:.7f}, {verdict})"

    def _repr_html_(self) -> str:
        memory = (
            f"{self.parameter_bytes / 2**20:.1f} MiB of weights, {self.graph_bytes_per_token / 2**10:.1f} KiB a token"
        )
        problems = [_html.note(f"problem: {problem}") for problem in self.problems]
        return _html.block(repr(self), _html.note(memory), *problems, _html.table(self.to_dataframe(), rows=40))


@holding
@checked
def check_model(model: TransformerLensModel, tokens: Int[Tensor, "batch pos"] | None = None) -> ModelReport:
    """Check which sites of `model` exist and fire, which rules apply, and that relevance is conserved.

    Args:
        model: any TransformerLens model.
        tokens: a short input to measure on; by default eight tokens spread over the vocabulary.

    Returns:
        A report; problems come with their remedy. Nothing is raised for a model that cannot be propagated through.

    Example:
        >>> import tl_neuron_circuits as tnc
        >>> tnc.check_model(tnc.load_demo_model()).ok
        True
    """
    if tokens is None:
        spread = torch.linspace(0, model.cfg.d_vocab - 1, 10).long()[1:9]
        tokens = spread[None, : max(1, min(8, int(model.cfg.n_ctx)))]
    sites = find_sites(model)
    problems = [problem.message for problem in sites.problems]
    fired = _fire(model, tokens)
    conservation, graph_bytes = float("nan"), float("nan")
    try:
        require(sites, RULE_SETS["relp"].needs)
        conservation, graph_bytes = _measure(model, tokens)
    except NeuronCircuitsError as error:
        if not problems:
            problems.append(str(error))
    else:
        allowed = _ALLOWED.get(model.cfg.dtype, 1e-3)
        if not abs(conservation - 1) <= allowed:
            problems.append(
                f"relevance is not conserved: expected 1 +- {allowed:g}, measured {conservation:.6f}. A part of this "
                "architecture is not covered by the rules; compare scores with method='patching' before trusting them."
            )
    return ModelReport(
        model_name=model_name(model),
        model_class=type(model).__name__,
        problems=tuple(problems),
        conservation=conservation,
        sites=tuple(_rows(sites, fired)),
        parameter_bytes=sum(p.numel() * p.element_size() for p in model.parameters()),
        graph_bytes_per_token=graph_bytes / tokens.numel(),
    )


def _fire(model: TransformerLensModel, tokens: Tensor) -> dict[str, tuple[int, ...]]:
    """Shape of what each hook point saw, by every name it has."""
    points = hook_points(model)
    seen: dict[int, tuple[int, ...]] = {}

    def note(module: Any, arguments: Any, value: Any) -> None:
        seen[id(module)] = tuple(getattr(value, "shape", ()))

    handles = [point.register_forward_hook(this_thread_only(note)) for point in set(points.values())]
    try:
        with torch.no_grad():
            model(tokens)
    finally:
        for handle in handles:
            handle.remove()
    return {name: seen[id(point)] for name, point in points.items() if id(point) in seen}


def _rows(sites: ModelSites, fired: Mapping[str, tuple[int, ...]]) -> Iterator[dict[str, Any]]:
    def row(layer: int | None, role: str, hook: str, rule: str) -> dict[str, Any]:
        shape = fired.get(hook)
        return {
            "layer": layer, "role": role, "hook": hook, "fires": shape is not None,
            "shape": "" if shape is None else "x".join(map(str, shape[1:])), "rule": rule,
        }  # fmt: skip

    for name in sites.embeddings:
        if name in fired:
            yield row(None, "embedding", name, "")
    for attention in sites.attentions:
        yield row(attention.layer, "query", attention.query, "attention")
        yield row(attention.layer, "key", attention.key, "attention")
    for mlp in sites.mlps:
        yield row(mlp.layer, "activation input", mlp.pre, "identity")
        if mlp.up is not None:
            yield row(mlp.layer, "linear branch", mlp.up, "half")
        yield row(mlp.layer, "neurons", mlp.post, "identity" if mlp.up is None else "identity, half")
    for norm in sites.norms:
        parts = norm.path.split(".")
        yield row(int(parts[1]) if parts[0] == "blocks" else None, "norm", norm.output or norm.scale, "ln")


def _measure(model: TransformerLensModel, tokens: Tensor) -> tuple[float, float]:
    """Conservation and graph size with all four rules, for the largest logit at the last position."""
    with (
        relp(model),
        biases_in_graph(model) as biases,
        _captured(model) as (embeddings, raw_logits),
        _graph_size(model) as size,
    ):
        logits = model(tokens)
        metric = logits[0, -1].max()
        if not raw_logits:
            raise PropagationError("expected the unembedding to run as a module; it did not, so logits were not seen.")
        leaves = [*embeddings, *biases.values()]
        gradients = torch.autograd.grad(metric, [*leaves, raw_logits[-1]], allow_unused=True)
    relevance = _dot(leaves, gradients[:-1])
    total = _dot(raw_logits[-1:], gradients[-1:])
    if total == 0:
        raise PropagationError("expected a logit that depends on its input; the largest one is exactly zero.")
    return relevance / total, float(size[0])


def _dot(values: list[Tensor], gradients: tuple[Tensor | None, ...]) -> float:
    pairs = ((v, g) for v, g in zip(values, gradients, strict=True) if g is not None)
    return float(sum((v.detach().double() * g.double()).sum().cpu() for v, g in pairs))


@contextmanager
def _captured(model: TransformerLensModel) -> Iterator[tuple[list[Tensor], list[Tensor]]]:
    """The embeddings and the raw logits of the next forward pass, attached to the graph."""
    embeddings: list[Tensor] = []
    raw_logits: list[Tensor] = []

    def keep(value: Tensor, hook: Any) -> Tensor:
        leaf = value.detach().requires_grad_(True)  # biases before it (BLOOM's embedding norm) are part of it
        embeddings.append(leaf)
        return leaf

    names = ["hook_embed"]
    if model.cfg.positional_embedding_type == "standard" and "hook_pos_embed" in hook_points(model):
        names.append("hook_pos_embed")
    unembed = submodule(model, "unembed")
    assert unembed is not None

    def keep_logits(module: Any, arguments: Any, output: Tensor) -> None:
        raw_logits.append(output)

    handle = unembed.register_forward_hook(this_thread_only(keep_logits))
    try:
        with hooked(model, [(name, keep) for name in names]):
            yield embeddings, raw_logits
    finally:
        handle.remove()


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
