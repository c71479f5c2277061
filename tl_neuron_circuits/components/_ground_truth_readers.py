"""Known circuits of compiled models (tracr) and of InterpBench, as `GroundTruth`.

A compiled component reads and writes named directions of the residual stream, and there is an edge where one writes
what the other reads. Directions that never vary ("one") carry nothing and are left out.
"""

import re
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any, Literal

import msgspec
from torch import Tensor

from .._errors import FileFormatError, SettingsError
from .._files import read_json, read_tensors, require_shapes

Granularity = Literal["components", "neurons"]
Edge = tuple[str, str]
Truth = tuple[str, frozenset[Edge], frozenset[Edge]]
Width = Annotated[int, msgspec.Meta(ge=0, lt=2**24)]


class _Neuron(msgspec.Struct):
    reads: dict[str, float]
    writes: dict[str, float]


class _Layer(msgspec.Struct):
    active_neurons: dict[Width, _Neuron]


class _Truth(msgspec.Struct):
    residual_labels: list[str]
    layers: Annotated[list[_Layer], msgspec.Meta(max_length=10_000)]


class _Config(msgspec.Struct):
    d_model: Width
    n_heads: Width
    d_mlp: Width


_HEAD = re.compile(r"blocks\.(\d+)\.(?:attn\.)?hook_(?:result|z|q|k|v|[qkv]_input|attn_in|attn_result)\[(\d+)\]")
_MLP = re.compile(r"blocks\.(\d+)\.(?:mlp\.hook_(?:in|pre|post|out)|hook_mlp_(?:in|out))(?:\[.*\])?")
_START = re.compile(r"(?:hook_embed|hook_pos_embed|blocks\.0\.hook_resid_pre|embeds?|input)(?:\[.*\])?")


def read_tracr(path: str | Path, granularity: Granularity, constant: Sequence[str]) -> Truth:
    """What `GroundTruth.from_tracr` holds: a folder's name, its edges and the possible ones."""
    path = Path(path)
    truth, config = read_json(path / "ground_truth.json", _Truth), read_json(path / "config.json", _Config)
    weights, _, _ = read_tensors(path / "model.safetensors")
    labels = truth.residual_labels
    if len(labels) != config.d_model:
        raise FileFormatError(
            f"expected one residual label per dimension in {path / 'ground_truth.json'}; "
            f"got {len(labels)} for {config.d_model}. Compile the model again."
        )
    if beyond := [unit for layer in truth.layers for unit in layer.active_neurons if unit >= config.d_mlp]:
        raise FileFormatError(
            f"{path / 'ground_truth.json'} names neuron {beyond[0]}, but config.json says {config.d_mlp} per layer. "
            "Compile the model again."
        )
    d, heads = config.d_model, config.n_heads
    shapes: dict[str, tuple[int | None, ...]] = {"embed.W_E": (None, d), "unembed.W_U": (d, None)}
    shapes |= {"pos_embed.W_pos": (None, d)} if "pos_embed.W_pos" in weights else {}
    for layer in range(len(truth.layers)):
        shapes |= {f"blocks.{layer}.attn.W_{name}": (heads, d, None) for name in "QKV"}
        shapes |= {f"blocks.{layer}.attn.W_O": (heads, None, d)}
    read = {name: weight for name, weight in weights.items() if name in shapes}
    require_shapes(path / "model.safetensors", read, shapes)
    if bad := [name for name, weight in read.items() if not weight.isfinite().all()]:
        raise FileFormatError(f"{bad[:3]} in {path / 'model.safetensors'} are not finite. Compile the model again.")
    ignored = set(constant)

    def directions(weight: Tensor, dimension: int) -> frozenset[str]:
        """Residual directions with a weight that is not zero."""
        used = weight.abs().movedim(dimension, 0).flatten(1).sum(1).nonzero().flatten().tolist()
        return frozenset(labels[k] for k in used) - ignored

    start = directions(weights["embed.W_E"], 1)
    if "pos_embed.W_pos" in weights:
        start |= directions(weights["pos_embed.W_pos"], 1)
    nodes = [("embedding", 0, frozenset(), start)]
    for layer, content in enumerate(truth.layers):
        attention = {name: weights[f"blocks.{layer}.attn.W_{name}"] for name in "QKVO"}
        for head in range(heads):
            reads = frozenset().union(*(directions(attention[name][head], 0) for name in "QKV"))
            nodes.append((f"L{layer}/H{head}", 2 * layer + 1, reads, directions(attention["O"][head], 1)))
        nodes += _mlp_nodes(layer, content.active_neurons, config.d_mlp, granularity, ignored)
    end = directions(weights["unembed.W_U"], 0)
    nodes.append(("logits", 2 * len(truth.layers) + 1, end, frozenset()))
    return _from_directions(path.name, nodes)


def _mlp_nodes(
    layer: int, neurons: Mapping[int, _Neuron], width: int, granularity: Granularity, ignored: set[str]
) -> list[tuple[str, int, frozenset[str], frozenset[str]]]:
    reads = {unit: frozenset(neuron.reads) - ignored for unit, neuron in neurons.items()}
    writes = {unit: frozenset(neuron.writes) - ignored for unit, neuron in neurons.items()}
    stage, none = 2 * layer + 2, frozenset()
    if granularity == "neurons":
        return [(f"L{layer}/N{unit}", stage, reads.get(unit, none), writes.get(unit, none)) for unit in range(width)]
    # a neuron that reads nothing that varies writes a constant
    live = [unit for unit in reads if reads[unit]]
    every = none.union(*(reads[unit] for unit in live)), none.union(*(writes[unit] for unit in live))
    return [(f"L{layer}/MLP", stage, *every)]


def _from_directions(name: str, nodes: Sequence[tuple[str, int, frozenset[str], frozenset[str]]]) -> Truth:
    possible = {(a[0], b[0]): a[3] & b[2] for a in nodes for b in nodes if a[1] < b[1]}
    edges = {edge for edge, shared in possible.items() if shared}
    return name, _on_a_path(edges), frozenset(possible)


def _on_a_path(edges: set[Edge]) -> frozenset[Edge]:
    """Edges on some path from the embedding to the logits: the rest has no effect on the output."""

    def reached(start: str, step: Mapping[str, set[str]]) -> set[str]:
        reachable, todo = {start}, [start]
        while todo:
            new = step.get(todo.pop(), set()) - reachable
            reachable |= new
            todo += sorted(new)
        return reachable

    forward: dict[str, set[str]] = {}
    backward: dict[str, set[str]] = {}
    for source, target in edges:
        forward.setdefault(source, set()).add(target)
        backward.setdefault(target, set()).add(source)
    alive = reached("embedding", forward) & reached("logits", backward)
    return frozenset(edge for edge in edges if set(edge) <= alive)


def read_interpbench(name: str, edges: Iterable[Sequence[Any]], n_layers: int, n_heads: int) -> Truth:
    """What `GroundTruth.from_interpbench` holds: the case's name, its edges and the possible ones."""
    stage = {"embedding": 0, "logits": 2 * n_layers + 1}
    for layer in range(n_layers):
        stage |= {f"L{layer}/H{head}": 2 * layer + 1 for head in range(n_heads)} | {f"L{layer}/MLP": 2 * layer + 2}
    possible = frozenset((a, b) for a in stage for b in stage if stage[a] < stage[b])
    between = set()
    for pair in edges:
        if len(pair) != 2:
            raise SettingsError(f"{name}: expected pairs of nodes; got {pair!r}.")
        source, target = (_component_of(str(node), n_layers) for node in pair)
        if source != target:  # inside a head, or inside an MLP
            between.add((source, target))
    unknown = sorted(between - possible)
    if unknown:
        raise SettingsError(
            f"{name}: the edge {unknown[0]} points back, or is outside {n_layers} layers of {n_heads} heads."
        )
    return name, frozenset(between), possible


def _component_of(node: str, n_layers: int) -> str:
    if match := _HEAD.fullmatch(node):
        return f"L{match[1]}/H{match[2]}"
    if match := _MLP.fullmatch(node):
        return f"L{match[1]}/MLP"
    if _START.fullmatch(node):
        return "embedding"
    if node.split("[")[0] in (f"blocks.{n_layers - 1}.hook_resid_post", "logits", "output", "unembed.hook_in"):
        return "logits"
    raise SettingsError(
        f"expected a node such as 'blocks.0.attn.hook_result[3]', 'blocks.0.mlp.hook_post', 'hook_embed' or "
        f"'blocks.{n_layers - 1}.hook_resid_post'; got {node!r}."
    )
