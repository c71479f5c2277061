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
from ..models._sites import ModelSites, activation_names, find_sites
from ..models._threads import held, this_thread_only
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
    model_line: str
    """Layers, widths, activation, norms, attention, parameters, dtype and device."""
    input_line: str
    """What the tokenizer does with a prompt: BOS, leading spaces, a chat template."""

    @property
    def ok(self) -> bool:
        """True when there is no problem."""
        return not self.problems

    @checked
    def memory_bytes(self, batch: int, pos: int) -> int:
        """Estimated peak of one RelP attribution: weights plus the graph of `batch` prompts of `pos` tokens."""
        return int(self.parameter_bytes + self.graph_bytes_per_token * batch * pos)

    def summary(self) -> str:
        """The report in one screen: verdict, model, sites by role, rules, memory, what prompts need, what is next."""
        table = self.to_dataframe()
        silent = table[~table["fires"].astype(bool)]
        sites = ", ".join(f"{role} {count}" for role, count in table.groupby("role", sort=False).size().items())
        rules: dict[str, int] = {}
        once = table["fires"].astype(bool) & table["role"].isin(
            ["norm", "neurons", "query"]
        )  # the other ends of the same pieces
        for text in table.loc[once, "rule"]:
            for rule in filter(None, text.split(", ")):
                rules[rule] = rules.get(rule, 0) + 1
        lines = [
            ("verdict", "relevance propagation holds" if self.ok else "relevance propagation does not hold"),
            ("model", self.model_line),
            ("conserved", f"{self.conservation:.7f} of the logits' relevance is in embeddings and biases"),
            ("sites", f"{sites}; {'all fire' if silent.empty else f'{len(silent)} do not fire'}"),
            *(("silent", f"{row.hook} ({row.role})") for row in silent.head(5).itertuples()),
            ("rules", ", ".join(f"{rule} at {count}" for rule, count in rules.items()) or "none"),
            ("memory", self._memory_line()),
            ("prompts", self.input_line),
            *(("problem", problem) for problem in self.problems),
            ("next", "trace(model, prompt)" if self.ok else "method='patching' needs no rules"),
        ]
        return "\n".join(f"{name:<9} {text}" for name, text in lines if text)

    def _memory_line(self) -> str:
        weights = f"{self.parameter_bytes / 2**20:,.0f} MiB of weights"
        if not self.graph_bytes_per_token > 0:
            return weights
        total = self.memory_bytes(32, 20) / 2**30
        return (
            f"{weights}, {self.graph_bytes_per_token / 2**10:,.0f} KiB a token; 32 prompts of 20 tokens take about "
            f"{total:.2g} GiB"
        )

    def to_dataframe(self) -> pd.DataFrame:
        """One row per site: layer, role, hook name, whether it fires, its shape without batch, the rule there."""
        return pd.DataFrame(list(self.sites)).astype({"layer": "Int64"})  # missing: a site of no layer

    def __repr__(self) -> str:
        verdict = "ok" if self.ok else f"{len(self.problems)} problem(s): {self.problems[0]}"
        return f"ModelReport({self.model_name}, {self.model_class}, conservation={self.conservation:.7f}, {verdict})"

    def _repr_html_(self) -> str:
        notes = [_html.note(line) for line in self.summary().splitlines()]
        return _html.block(repr(self), *notes, _html.table(self.to_dataframe(), rows=10))


@checked
def check_model(model: TransformerLensModel, tokens: Int[Tensor, "batch pos"] | None = None) -> ModelReport:
    """Check which sites of `model` exist and fire, which rules apply, and that relevance is conserved.

    Args:
        model: any TransformerLens model.
        tokens: a short input to measure on; by default eight tokens spread over the vocabulary.

    Returns:
        A report; problems come with their remedy. Nothing is raised, whatever the model's forward pass does, unless
        memory runs out.

    Example:
        >>> import tl_neuron_circuits as tnc
        >>> tnc.check_model(tnc.load_demo_model()).ok
        True
    """
    with held(model, "check_model"):
        return _report(model, tokens)


def _report(model: TransformerLensModel, tokens: Int[Tensor, "batch pos"] | None) -> ModelReport:
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
        model_line=_describe_model(model, sites),
        input_line=_describe_input(model),
    )


def _describe_model(model: TransformerLensModel, sites: ModelSites) -> str:
    config, parameters = model.cfg, list(model.parameters())
    n_kv = getattr(config, "n_key_value_heads", None)
    activation = (activation_names(model) or ["unknown activation"])[0]
    gated = "gated " if any(mlp.up is not None for mlp in sites.mlps) else ""
    d_mlp = getattr(config, "d_mlp", None)
    first = parameters[0] if parameters else torch.zeros(0)
    parts = [
        f"{config.n_layers} layers, d_model {config.d_model}",
        f"{config.n_heads} heads" + (f" ({n_kv} of keys and values)" if n_kv not in (None, config.n_heads) else ""),
        f"d_mlp {d_mlp} ({gated}{activation})" if d_mlp else "",
        f"norm {getattr(config, 'normalization_type', None) or 'none'}",
        f"positions {getattr(config, 'positional_embedding_type', 'unknown')}",
        f"vocabulary {config.d_vocab:,}",
        f"{sum(p.numel() for p in parameters) / 1e6:,.1f} M parameters",
        f"{str(first.dtype).removeprefix('torch.')} on {first.device}",
    ]
    return ", ".join(part for part in parts if part)


def _describe_input(model: TransformerLensModel) -> str:
    tokenizer: Any = getattr(model, "tokenizer", None)
    if tokenizer is None:
        return "no tokenizer: give tokens"
    bos = getattr(tokenizer, "bos_token", None)
    prepends = bool(getattr(model.cfg, "default_prepend_bos", True))
    parts = [f"BOS {bos!r} is {'prepended' if prepends else 'not prepended'} by default" if bos else "no BOS token"]
    template = getattr(tokenizer, "chat_template", None)
    if bos and prepends and isinstance(template, str) and bos in template:
        parts[0] += " and is a mark of the chat template: plain text may do better with prepend_bos=False"
    try:
        spaced = tokenizer.tokenize(" the") != tokenizer.tokenize("the")
    except (AttributeError, NotImplementedError, TypeError, ValueError):  # a user's own tokenizer may lack it
        spaced = False
    parts += ["an answer inside a sentence begins with a space (' the')"] if spaced else []
    if template:
        parts.append("it has a chat template (tasks.apply_chat_template)")
    return "; ".join(parts)


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
