"""`check_model`: does relevance propagation hold on this model? `_conservation.py` measures; here is the report."""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import pandas as pd
import torch
from jaxtyping import Int
from torch import Tensor

from .. import _html
from .._memory import is_out_of_memory
from .._typing import checked
from ..models._protocol import TransformerLensModel, hook_points, model_name
from ..models._run_state import state_problems
from ..models._sites import ModelSites, find_sites
from ..models._threads import holding, this_thread_only
from ._conservation import describe_failure, measure_conservation, short_input
from ._relp import relp
from .rules import RULE_SETS


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
        A report; problems come with their remedy. Nothing is raised, whatever the model's forward pass does, but for a
        lack of memory.

    Example:
        >>> import tl_neuron_circuits as tnc
        >>> tnc.check_model(tnc.load_demo_model()).ok
        True
    """
    sites, problems, fired = ModelSites.nothing(), [], {}
    conservation, graph_bytes, n_tokens = float("nan"), float("nan"), 1
    try:
        tokens = short_input(model) if tokens is None else tokens
        n_tokens = tokens.numel()
        sites = find_sites(model)
        needs = set(RULE_SETS["relp"].needs)
        problems += [problem.message for problem in sites.problems if needs & set(problem.rules)]
        problems += state_problems(model)
        fired = _fire(model, tokens)
        if not problems:
            measured = measure_conservation(model, sites, tokens, relp(model, check=False))
            conservation, graph_bytes = measured.ratio, measured.graph_bytes
            problems += [measured.problem] if measured.problem else []
    except Exception as error:
        if is_out_of_memory(error):
            raise
        if not problems:
            problems.append(describe_failure(error))
    return ModelReport(
        model_name=model_name(model),
        model_class=type(model).__name__,
        problems=tuple(problems),
        conservation=conservation,
        sites=tuple(_rows(sites, fired)),
        parameter_bytes=sum(p.numel() * p.element_size() for p in model.parameters()),
        graph_bytes_per_token=graph_bytes / n_tokens,
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
        yield row(int(parts[1]) if parts[0] == "blocks" else None, "norm", norm.output or norm.scale or norm.path, "ln")
