"""What `--json` prints, command by command: the keys, their types, and the number of this description.

Every object begins with `command` and `schema`. A key that is added leaves the number as it is; a key that goes, or
means something else, raises it. `tl-neuron-circuits schema COMMAND` prints all of it as JSON Schema.
"""

from typing import Annotated, Any, Literal

import msgspec
from msgspec import Meta

SCHEMA = 1

Number = float | None  # null stands for NaN and infinity
Files = Annotated[list[str], Meta(description="The files and folders that were written.")]
Summary = Annotated[str, Meta(description="The result in one line, as its repr in Python.")]


class _Output(msgspec.Struct, kw_only=True, forbid_unknown_fields=True):
    schema: Annotated[Literal[1], Meta(description="The number of this description.")]


class _DemoRow(msgspec.Struct):
    task: str
    method: str
    size: int
    faithfulness: Number
    completeness: Number


class Demo(_Output, kw_only=True):
    """`demo`: faithfulness and completeness on the demo model's tasks."""

    command: Literal["demo"]
    conservation: Annotated[Number, Meta(description="Relevance that arrives, as a share; 1 is exact.")]
    table: list[_DemoRow]
    files: Files


class _Site(msgspec.Struct):
    layer: int | None
    role: str
    hook: str
    fires: bool | None
    shape: str | None
    rule: str | None


class Check(_Output, kw_only=True):
    """`check`: whether relevance propagation holds on a model."""

    command: Literal["check"]
    ok: Annotated[bool, Meta(description="False goes with exit code 1.")]
    conservation: Annotated[Number, Meta(description="Relevance that arrives, as a share; 1 is exact.")]
    problems: Annotated[list[str], Meta(description="What is wrong, and what to do.")]
    model: Annotated[str, Meta(description="Layers, widths, activation, norms, parameters, in one line.")]
    prompts: Annotated[str, Meta(description="What the model needs of its prompts.")]
    sites: Annotated[list[_Site], Meta(description="Every hook point.")]


class _Node(msgspec.Struct):
    label: str
    layer: int
    unit: int
    position: Annotated[int | None, Meta(description="Counted from 0; -1 is all of them.")]
    score: Annotated[Number, Meta(description="Positive supports the answer.")]
    kind: Annotated[str, Meta(description="node, or error: what a dictionary misses.")]
    hook: str


class Attribute(_Output, kw_only=True):
    """`attribute`: the nodes with the largest scores."""

    command: Literal["attribute"]
    scores: Summary
    files: Files
    nodes: Annotated[list[_Node], Meta(description="The --top best.")]


class _Basis(msgspec.Struct):
    task: str
    basis: str
    method: str
    n_nodes: int
    metric_full: Number
    metric_empty: Number
    size_at_0_5: Annotated[Number, Meta(description="Nodes from which faithfulness stays at .5.")] = msgspec.field(
        name="size_at_0.5"
    )
    size_at_0_8: Annotated[Number, Meta(description="Nodes from which faithfulness stays at .8.")] = msgspec.field(
        name="size_at_0.8"
    )
    log_area: Annotated[Number, Meta(description="Mean faithfulness over the logarithm of the size.")]
    compactness: Number
    overshoot: Number
    cpr: Annotated[Number, Meta(description="With --mib.")]
    cmd: Annotated[Number, Meta(description="With --mib.")]
    unexplained: Annotated[Number, Meta(description="Variance that the dictionaries miss, as a share.")]


class Compare(_Output, kw_only=True):
    """`compare`: sparsity curves, summed up."""

    command: Literal["compare"]
    headline: str
    notes: Annotated[list[str], Meta(description="What to know before quoting a ratio.")]
    files: Files
    summary: list[_Basis]


class _CircuitNode(msgspec.Struct):
    node: str
    label: str
    kind: Annotated[str, Meta(description="neuron, feature, error, embedding, unselected, bias, ...")]
    layer: int
    unit: int
    position: int
    token: str
    activation: Number
    change: Annotated[Number, Meta(description="Of the activation, from corrupt to clean.")]
    sign: int
    gate_sign: int
    up_sign: int
    score: Number
    share: Annotated[Number, Meta(description="Of the target.")]
    flow: Number
    influence: Number
    probability: Number
    group: str


class _Answer(msgspec.Struct):
    prompt: str
    target: str
    value: Number
    probability: Number
    rank: int | None
    predicted: str
    predicted_probability: Number


class Trace(_Output, kw_only=True):
    """`trace`: the circuit that was written, and its first nodes."""

    command: Literal["trace"]
    circuit: Summary
    notes: Annotated[list[str], Meta(description="What to mind, such as how much was left out.")]
    files: Files
    prompts: Annotated[list[_Answer], Meta(description="Of several prompts: what the model says on each.")]
    spans: Annotated[list[dict[str, Any]], Meta(description="Marked spans of the prompts.")]
    explained: Annotated[dict[str, Any], Meta(description="With --explained: the share that the nodes give alone.")]
    nodes: Annotated[list[_CircuitNode], Meta(description="The first 20; the folder has all, and the edges.")]


class _Token(msgspec.Struct):
    token: str
    token_id: int
    probability_before: Number
    probability_after: Number
    probability_change: Number
    log_probability_before: Number
    log_probability_after: Number
    log_probability_change: Number
    logit_before: Number
    logit_after: Number
    logit_change: Number


class Steer(_Output, kw_only=True):
    """`steer`: the next token before and after."""

    command: Literal["steer"]
    kl: Annotated[Number, Meta(description="Of the next token's distribution, in nats.")]
    top_before: str
    top_after: str
    tokens: Annotated[list[str], Meta(description="The prompt's, from position 0.")]
    nodes: Annotated[list[str], Meta(description="Labels of the steered nodes.")]
    table: list[_Token]
    watched: Annotated[
        dict[str, Number], Meta(description="Relative change of each watched group's activations; -1 is gone.")
    ]
    continuations: Annotated[list[str] | None, Meta(description="With --generate: before and after.")]


class _Edge(msgspec.Struct):
    source: str
    target: str
    weight: Number
    relative: Number
    attribution: Number
    norm: Number
    n_weights: Number
    reach: Number
    stability: Annotated[Number, Meta(description="With --bootstrap.")]


class Lasso(_Output, kw_only=True):
    """`lasso`: the edges of a circuit by regression."""

    command: Literal["lasso"]
    circuit: Summary
    notes: Annotated[list[str], Meta(description="What to know before telling a story.")]
    files: Files
    edges: list[_Edge]


class Export(_Output, kw_only=True):
    """`export`: what was converted."""

    command: Literal["export"]
    saved: Summary
    format: Literal["html", "neuronpedia", "csv"]
    files: Files


OUTPUTS: dict[str, type[_Output]] = {
    kind.__name__.lower(): kind for kind in (Demo, Check, Attribute, Compare, Trace, Steer, Lasso, Export)
}


def json_schema(command: str) -> dict[str, Any]:
    """The JSON Schema (2020-12) of what `command --json` prints."""
    schema = msgspec.json.schema(OUTPUTS[command])
    return {"$schema": "https://json-schema.org/draft/2020-12/schema", "title": f"{command} --json"} | schema
