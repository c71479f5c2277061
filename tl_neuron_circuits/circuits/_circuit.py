"""`Circuit`: chosen nodes, the edges between them, and the settings that gave them."""

from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import networkx
import numpy as np
import pandas as pd
from torch import Tensor

from .. import _html
from .._files import read_directory, write_directory
from .._typing import checked
from ..bases._site import Basis
from ..models._protocol import TransformerLensModel
from ..nodes._scores import NodeScores
from ..tasks._pairs import PromptPairs
from ..tasks._tokenized import TokenizedPairs
from . import _algebra, _by_prompt, _circuit_file, _edge_heads, _groups, _neuronpedia, _prune, _scores
from ._attention import AttentionContributions
from ._table import (
    CHOSEN,
    EDGE_COLUMNS,
    HEAD_COLUMNS,
    NODE_COLUMNS,
    SCHEMA,
    SINGLE,
    target_shares,
    typed,
)
from ._targets import TargetLike

if TYPE_CHECKING:
    import plotly.graph_objects as go

    from ._edge_heads import Traced


@dataclass(frozen=True, eq=False, repr=False)
class Circuit:
    """Nodes and the direct effects between them.

    `nodes` has one row per node. `kind` is "neuron", "feature" (of a dictionary), "embedding" (one per position),
    "logit" (what is explained), "error" (what a dictionary misses, one per layer and position), "head" and "skip" (of
    circuits from weights), "component" (of CircuitLasso), "bias" (biases, those of dictionaries too; positional
    embeddings), "unselected" (whatever was left out, one per position), "linearization_error" (what the linearization
    of pairs or of a metric misses) or "group". `score` is the node's signed support for the target through all paths
    and `share` its share of the target; `flow` is the part of the target that reaches it along edges of this circuit
    alone, and `influence` is circuit-tracer's. `gate_sign` and `up_sign` are 0 without a gated MLP.

    `edges` has one row per edge, largest |attribution| first; `source` and `target` are nodes. `weight` is the part of
    the target node's `change` (its activation minus the baseline's) that comes directly from the source, `attribution`
    that part of the target node's score, and `relative` its share. Over all sources they sum to the change, to the
    score, and to 1.

    Example:
        >>> import tl_neuron_circuits as tnc
        >>> model = tnc.load_demo_model()
        >>> circuit = tnc.trace(model, "The capital of the state containing Dallas is", " Austin", nodes=30)
        >>> circuit
        Circuit(30 nodes, 775 edges, target 'Austin' = 18.412 (p = 99.9%) on demo-gelu, 1 prompt, 31% explained)
        >>> small = circuit.prune(count=10)
        >>> len(small & circuit), len(circuit - small)
        (10, 20)
        >>> small.group({"first two": sorted(small.members)[:2]}).collapse().save("dallas")
        >>> len(tnc.Circuit.load("dallas"))
        10
    """

    nodes: pd.DataFrame
    edges: pd.DataFrame
    settings: Mapping[str, Any]
    basis: Basis | Sequence[Basis] | None = field(default=None, kw_only=True)
    """Where the nodes live, for evaluation and steering; dictionaries are not saved with a circuit."""
    head_parts: pd.DataFrame | None = field(default=None, kw_only=True)
    """Edges split by head, once `with_heads` did it; `heads` shows them."""
    traced: "Traced | None" = field(default=None, kw_only=True)
    """The model, as long as it lives, and the prompts; neither is saved."""
    by_prompt: pd.DataFrame | None = field(default=None, kw_only=True)
    """What each prompt adds, where several were traced: columns prompt (its place), kind, source, target, weight and
    attribution.

    Rows of kind "node" have a node's change and score on that prompt, "edge" an edge's weight and attribution; their
    means over prompts, zero where there is no row, are `nodes` and `edges`. With `profiles=True`, "token" is what a
    token brings to a node or logit through all paths, and "target" what a node brings to a logit.
    """
    details: Mapping[str, Mapping[str, Any]] = field(default_factory=dict, kw_only=True)
    """More about nodes for the page, by node, as `to_html(details=...)` takes it; `describe` fills it."""

    def __post_init__(self) -> None:
        """Give the columns one type each, whatever pandas made of them; the basis of neurons needs no dictionaries."""
        if self.basis is None:
            object.__setattr__(self, "basis", _scores.own_basis(self.settings))
        object.__setattr__(self, "nodes", typed(self.nodes, NODE_COLUMNS))
        if self.settings.get("positions") == "spans":  # a table alone would pass places off as positions
            self.nodes.attrs["positions"] = "spans"
        object.__setattr__(self, "edges", typed(self.edges, EDGE_COLUMNS))
        if self.by_prompt is not None:
            object.__setattr__(self, "by_prompt", typed(self.by_prompt, _by_prompt.PROMPT_COLUMNS))
        if self.head_parts is not None:
            there = pd.MultiIndex.from_frame(self.edges[["source", "target"]])
            parts = typed(self.head_parts, HEAD_COLUMNS)
            own = pd.MultiIndex.from_frame(parts[["source", "target"]]).isin(there)
            object.__setattr__(self, "head_parts", parts[own].reset_index(drop=True))

    def __len__(self) -> int:
        """How many scalar nodes were chosen (neurons, features, components); members of supernodes count."""
        return int(self.nodes["kind"].isin(SINGLE).sum()) + int(self.settings.get("n_grouped", 0))

    @property
    def target_value(self) -> float:
        """The number that the circuit explains: the sum of its logit nodes."""
        return float(self.settings["target_value"])

    @property
    def unexplained(self) -> float:
        """Share of the target that flows to nodes left out, cut edges, and what dictionaries or linearization miss.

        It is nan where edges carry no flow, as those of a regression.
        """
        shares = target_shares(self.nodes, self.target_value)
        return shares["left"] + shares["not_linear"]

    @property
    def notes(self) -> list[str]:
        """What to know before telling a story about this circuit, and what to do; empty where nothing stands out.

        A target that is not among the model's five likeliest tokens; a token that is likelier with a leading space; a
        target that is negative; more than half of it left out.
        """
        notes, settings = [], self.settings
        probability = dict(zip(self.nodes["node"], self.nodes["probability"], strict=True))
        label = dict(zip(self.nodes["node"], self.nodes["label"], strict=True))
        predicted = ", ".join(f"{token!r} {p:.1%}" for token, p in settings.get("predicted", [])[:3])
        for name, rank in (settings.get("target_ranks") or {}).items():
            if rank > 5:
                there = (settings.get("predicted_at") or {}).get(name)
                predicted = predicted if not there else ", ".join(f"{token!r} {p:.1%}" for token, p in there[:3])
                notes.append(
                    f"the model does not predict {label[name]!r}: probability {probability[name]:.2%}, rank {rank}; it "
                    f"says {predicted}. Change the prompt, or explain its own token (target=None)."
                )
        for name, (twin, p) in (settings.get("twins") or {}).items():
            notes.append(
                f"{twin!r}, with a leading space, is likelier ({p:.2%}) than {label[name]!r} "
                f"({probability[name]:.2%}): if that is meant, give target={twin!r}."
            )
        unsaid = [one for one in settings.get("prompts") or () if (one["rank"] or 0) > 5]
        if unsaid:
            first = unsaid[0]
            notes.append(
                f"on {len(unsaid)} of {len(settings['prompts'])} prompts the model does not predict the target, as on "
                f"{first['prompt']!r} ({first['target']!r}: rank {first['rank']}; it says {first['predicted']!r}). "
                "settings['prompts'] has them all."
            )
        if self.target_value < 0 and settings.get("method") == "weights":
            notes.append(
                "the target is negative: a feature does not fire there, and what is explained is its pre-activation. "
                "Choose a position where it fires."
            )
        elif self.target_value < 0:
            notes.append("the target is negative: the model is against it, and nodes with positive scores support it.")
        if settings.get("method") == "weights" and not self.nodes["kind"].isin(CHOSEN).any():
            notes.append(
                "no feature or head was chosen: the strongest paths come from embeddings or unselected nodes alone. "
                "Give more num_branches, rank='absolute', or keep_bos=True."
            )
        if self.target_value and (self.unexplained > 0.5 or self.unexplained < -0.5):
            notes.append(self._what_is_missing())
        return notes

    def _what_is_missing(self) -> str:
        """Where the unexplained part of the target went, and what helps."""
        where = " (circuit.layers() shows where)" if self.settings.get("layer_scores") else ""
        if not 0 <= self.unexplained <= 1.05:
            return (
                f"large parts of both signs cancel: {self.unexplained:.1f} times the target comes through what was "
                f"left out{where}. More nodes may settle it."
            )
        shares = target_shares(self.nodes, self.target_value)
        left, curved = shares["left"], shares["not_linear"]
        if abs(curved) < 0.01:
            return (
                f"{left:.0%} of the target flows to what was left out{where}. More nodes explain more, slowly on deep "
                "models; steering shows what these nodes do."
            )
        return (
            f"{self.unexplained:.0%} of the target is not explained: {left:.0%} flows to what was left out{where}, "
            f"{curved:.0%} is not linear (attention patterns, norms and gates that differ between the prompts), which "
            "more nodes do not explain. Steering shows what these nodes do."
        )

    def layers(self) -> pd.DataFrame:
        """One row per layer with nodes: layer, chosen (how many), score and size of all its nodes, share of the chosen.

        `score` is the sum of all scores of the layer, chosen or not, `size` the sum of their sizes, and `chosen_size`
        that of the chosen ones: where the rest sits.
        """
        rows = self.settings.get("layer_scores") or []
        frame = pd.DataFrame(rows, columns=["layer", "score", "size"]).astype({"layer": "int64"})
        own = self.nodes[self.nodes["kind"].isin(SINGLE)]
        by_layer = own["score"].abs().groupby(own["layer"]).agg(["count", "sum"]).reindex(frame["layer"]).fillna(0)
        frame.insert(1, "chosen", by_layer["count"].to_numpy(dtype="int64"))
        return frame.assign(chosen_size=by_layer["sum"].to_numpy())

    def spans(self) -> pd.DataFrame:
        """One row per span of the prompts: marked ("{city:Dallas}"), or a turn of a chat ("user", "assistant").

        Columns span; first and last (places); chosen (how many nodes); score (the sum of theirs); tokens (the sum of
        the embeddings' scores).
        """
        return _by_prompt.span_table(self.nodes, self.settings)

    def on_prompt(self, prompt: int) -> pd.DataFrame:
        """The chosen nodes where they stand in one of the prompts, for steering it.

        Args:
            prompt: its place among those that were traced, from 0.

        Returns:
            Rows of `nodes` with the prompt's own positions, several where a place is several tokens.

        Raises:
            SettingsError: no such prompt, or one whose places are not known.

        Example:
            >>> import tl_neuron_circuits as tnc
            >>> model = tnc.load_demo_model()
            >>> prompts = ["The {subject:dogs near the cat} are", "The {subject:dogs} are"]
            >>> both = tnc.trace(model, prompts, [" old", " here"], nodes=10)
            >>> both.settings["tokens"][1:], bool(both.on_prompt(1)["position"].max() <= 3)
            (['The', '{subject}', 'are'], True)
        """
        return _by_prompt.nodes_on_prompt(self.nodes, self.settings, prompt)

    @property
    def graph_replacement(self) -> float:
        """The first of `graph_scores()`: how much of the influence on the logits starts at the tokens, 0 to 1."""
        return self.graph_scores()[0]

    @property
    def graph_completeness(self) -> float:
        """The second of `graph_scores()`: the share of all nodes' inputs that does not come from errors, 0 to 1."""
        return self.graph_scores()[1]

    def graph_scores(self, *, zero_positions: Collection[int] = ()) -> tuple[float, float]:
        """circuit-tracer's two scores of a graph: replacement and completeness, each 0 to 1.

            replacement  = I(embeddings) / (I(embeddings) + I(errors) + I(remainders) + I(linearization error))
            completeness = sum_t (1 - sum_{s left out} N_ts) I'_t / sum_t I'_t        I' = I + the logits' weights

        I is `influence`, N are the sizes of edges into t over their sum, without biases. The second sum is over all
        nodes: those without inputs (tokens, errors) count as explained. circuit-tracer's graphs have every active
        feature as a node, so that errors are all that is left out. Here nodes that were not chosen, and edges that were
        cut, are counted as errors too, since what goes into them is not known; so both numbers fall with pruning, and
        are circuit-tracer's where every active feature was chosen. Neurons have no errors. nan where nothing has an
        influence.

        Args:
            zero_positions: positions whose features, errors and remainders count as zero; `[0]` for circuit-tracer's
                numbers, which leaves them out at BOS.

        Source: circuit-tracer 0.5 (`compute_graph_scores`); METHODS 4.5.

        Example:
            >>> import tl_neuron_circuits as tnc
            >>> transcoders = tnc.bases.Dictionaries(tnc.load_demo_dictionaries("transcoder"))
            >>> prompt = "The capital of the state containing Dallas is"
            >>> circuit = tnc.trace(tnc.load_demo_model(), prompt, basis=transcoders)
            >>> replacement, completeness = circuit.graph_scores(zero_positions=[0])
            >>> 0 < replacement < completeness < 1
            True
        """
        return _prune.graph_scores(self.nodes, self.edges, zero_positions)

    @checked
    def prune(
        self,
        *,
        share: float | None = None,
        count: int | None = None,
        edges: int | None = None,
        relative: float | None = None,
        node_influence: float | None = None,
        edge_influence: float | None = None,
        zero_positions: Collection[int] = (),
    ) -> "Circuit":
        """Fewer nodes and edges. Whatever goes, its part of each target moves to the remainder at its position.

        Embeddings, logits, biases and remainders stay; then nodes without an incoming or an outgoing edge go, and
        errors without an outgoing one, until none is left. Criteria add up.

        Args:
            share: keep nodes, and errors, with |score| of at least this share of the target.
            count: keep the nodes with the largest |score|.
            edges: keep the edges with the largest |attribution| (those of remainders and biases are not counted).
            relative: keep edges with |relative weight| of at least this.
            node_influence: keep the fewest nodes, and errors, that make up this much of the influence (circuit-tracer's
                default .8).
            edge_influence: the same for edges (.98). Nodes that `node_influence` cuts are left out first, and edges
                weighed among what is left.
            zero_positions: as in `graph_scores`, for the two criteria of influence.

        Raises:
            SettingsError: no criterion, or one out of its range.

        Example:
            >>> import tl_neuron_circuits as tnc
            >>> model = tnc.load_demo_model()
            >>> circuit = tnc.trace(model, "The capital of the state containing Dallas is", " Austin", nodes=30)
            >>> len(circuit.prune(node_influence=0.8, edge_influence=0.98)) < len(circuit)
            True
        """
        rule = _prune.Rule(share, count, edges, relative, node_influence, edge_influence, zero_positions)
        nodes, kept = _prune.prune(self.nodes, self.edges, self.target_value, rule)
        by_prompt = _by_prompt.restrict_prompts(self.by_prompt, self.nodes, nodes, kept)
        settings = _neuronpedia.with_influence(self, nodes)
        return replace(self, nodes=nodes, edges=kept, settings=settings, by_prompt=by_prompt)

    def at_fdr(
        self,
        rate: float,
        *,
        null: Literal["signs", "pairs"] = "signs",
        stability: Any = None,
        model: TransformerLensModel | None = None,
        pairs: PromptPairs | TokenizedPairs | None = None,
    ) -> "Circuit":
        """The nodes whose scores pass a test over words at this rate of false discoveries; the others join remainders.

        All nodes of the model are tested, as `stability` does with RelP, and those of this circuit that pass are kept;
        so the rate is that of the whole test. With "signs" it says that a score's sign is no accident of the words,
        with "pairs" that it exceeds what a change of the word alone does. It does not say that a node belongs to the
        mechanism.

        Args:
            rate: of false discoveries, as estimated.
            null: "signs", or "pairs": each prompt beside another of the traced pairs', of other words and the same
                answer.
            stability: a `Stability` with the same basis and positions, instead of the test that is made here;
                needed for another target than the pairs' answers, other null pairs, and summed positions.
            model: the model that was traced; needed where the circuit was loaded from a file.
            pairs: those that were traced, likewise; they need labels, the words.

        Raises:
            SettingsError: not a circuit of pairs and their answers; or as `Stability.at_fdr`.
            PairsError: as `stability`.

        Example:
            >>> import tl_neuron_circuits as tnc
            >>> model = tnc.load_demo_model()
            >>> pairs = tnc.tasks.subject_verb_agreement("simple", n=32, model=model)
            >>> circuit = tnc.trace(model, pairs, nodes=300)
            >>> 0 < len(circuit.at_fdr(0.005)) < len(circuit)
            True
        """
        from ..evaluation._stability import nodes_at_fdr

        named = nodes_at_fdr(self, rate, null, stability, _edge_heads.known_model(self, model), pairs)
        return _algebra.keep(self, self.members & named)

    @checked
    def label(self, labels: Mapping[str, str]) -> "Circuit":
        """Name nodes: by node ("L3/N45@7"), or by neuron at all positions ("L3/N45").

        Raises:
            SettingsError: a name that no node has.
        """
        return replace(self, nodes=_groups.with_column(self.nodes, "label", labels))

    @checked
    def group(self, groups: Mapping[str, Sequence[str]]) -> "Circuit":
        """Put nodes into named groups; `collapse` makes a supernode of each.

        Args:
            groups: members by node ("L3/N45@7"), or by neuron at all positions ("L3/N45"). Others keep their group.

        Raises:
            SettingsError: a name that no node has, a node in two groups, or a group named like a node.
        """
        return replace(self, nodes=_groups.with_groups(self.nodes, groups))

    def describe(
        self,
        texts: Iterable[str | Tensor] | None = None,
        *,
        labels: Any = None,
        groups: int | None = None,
        model: TransformerLensModel | None = None,
        **options: Any,
    ) -> "Circuit":
        """This circuit with its neurons and features named by what they are active on, and more of that for the page.

        Nodes without a name of their own get the label (or the written description) of their neuron and of the sign of
        their activation; `details` gets it with its scores, examples and direct logit effects. METHODS 1.7.

        Args:
            texts: strings or rows of tokens, from anything that can be iterated, as for `tnc.describe`.
            labels: what is known instead: the result of `tnc.describe`, or a path that `Descriptions.from_file` reads.
                Without texts and labels the page gets logit effects alone.
            groups: how many groups of neurons to make, by what drives them, what they drive, and their labels; groups
                are named by what their members share. Needs scikit-learn.
            model: the model that was traced; needed where the circuit was loaded from a file.
            **options: of `tnc.describe`: held_out, k, write, simulate, cache, verbose and others.

        Raises:
            SettingsError: texts beside labels, options without texts, a model that is needed and not given, or as
                `tnc.describe` and `tnc.cluster`.

        Example:
            >>> import tl_neuron_circuits as tnc
            >>> model = tnc.load_demo_model()
            >>> circuit = tnc.trace(model, "The capital of the state containing Dallas is", " Austin", nodes=30)
            >>> named = circuit.describe(tnc.demo.capitals(n=512).clean, k=2)
            >>> sorted(set(named.details) - set(circuit.members))
            []
        """
        from ..explain._describe_circuit import describe_circuit

        return describe_circuit(self, texts, labels, groups, _edge_heads.known_model(self, model), options)

    def collapse(self) -> "Circuit":
        """Make one supernode of each group.

        Its score is that of its members minus the attribution of edges between them, which are gone; edges of its
        members are added up. So incoming edges still sum to the score, and flow to the target. METHODS 1.7.
        """
        return _groups.collapse(self)

    def sum_positions(self) -> "Circuit":
        """Add everything up over positions: one node per neuron, one embedding per token, one remainder. METHODS 1.6.

        Circuits of prompts of different lengths can then be compared and merged.
        """
        return _groups.sum_positions(self)

    @classmethod
    def merge(cls, circuits: Sequence["Circuit"], *, how: Literal["any", "all"] = "any") -> "Circuit":
        """Several prompts' circuits as one: every number is the mean over prompts, zero where a node is absent.

        Args:
            circuits: of one model. Sum positions first where prompts differ in length.
            how: nodes of any circuit, or only those that all have.

        Raises:
            SettingsError: no circuits, circuits of different models, or a `LassoCircuit` among them.
        """
        for circuit in circuits:
            circuit._require_mergeable()
        return _algebra.merge(circuits, how=how)

    def __or__(self, other: "Circuit") -> "Circuit":
        """Nodes of either, numbers averaged over all prompts."""
        return self.merge([self, other], how="any")

    def __and__(self, other: "Circuit") -> "Circuit":
        """Nodes of both, numbers averaged over all prompts."""
        return self.merge([self, other], how="all")

    def _require_mergeable(self) -> None:
        """Raise where means over circuits say nothing."""

    def __sub__(self, other: "Circuit") -> "Circuit":
        """This circuit without the other's nodes, which join the remainders."""
        return _algebra.without(self, other)

    def jaccard(self, other: "Circuit") -> float:
        """Nodes in both over nodes in either."""
        mine, theirs = self.members, other.members
        return len(mine & theirs) / len(mine | theirs) if mine | theirs else 1.0

    @property
    def members(self) -> frozenset[str]:
        """The chosen nodes."""
        return frozenset(self.nodes.loc[self.nodes["kind"].isin(CHOSEN), "node"])

    def to_dataframe(self) -> pd.DataFrame:
        """The nodes, largest |score| first."""
        order = self.nodes["score"].abs().sort_values(ascending=False, na_position="last", kind="stable").index
        return self.nodes.loc[order].reset_index(drop=True)

    def to_scores(self) -> NodeScores:
        """The chosen nodes' scores as `evaluate` takes them; every other node is nan, so it ranks last.

        Error nodes are nan too: `evaluate(error_nodes="keep")` keeps all of them, by default none is kept.

        Raises:
            SettingsError: the nodes are not single neurons or features of a model (supernodes, imported features).
        """
        return _scores.to_scores(self)

    @checked
    def with_heads(
        self,
        edges: int | pd.DataFrame | Sequence[tuple[str, str]] = 100,
        *,
        model: TransformerLensModel | None = None,
        pairs: PromptPairs | TokenizedPairs | None = None,
        target: TargetLike = None,
    ) -> "Circuit":
        """This circuit with edges split by the last attention head before their target.

        Between neurons at different positions everything goes through attention. An edge's weight is the sum of what
        each head brings from each position, and of a direct part (through the residual stream alone, between equal
        positions). A part counts all that the source brings to that head's values, through earlier heads too; so the
        position is where the *last* head looks. Patterns and norms are frozen, as in the edges themselves.

        Args:
            edges: how many of the strongest, rows of `edges`, or (source, target) of some.
            model: the model that was traced; needed where the circuit was loaded from a file.
            pairs: those that were traced, likewise, if not a single prompt.
            target: as given to `trace`, where it was a direction or a metric.

        Returns:
            A circuit whose `heads()` has the parts. Cost: about that of tracing the same edges.

        Raises:
            UnsupportedModelError: attention that is not a pattern times values, or no single residual stream.
            SettingsError: another model, edges that are not there, or parts that do not sum to the edges.
            PairsError: pairs are needed, or are not those that were traced.

        Example:
            >>> import tl_neuron_circuits as tnc
            >>> model = tnc.load_demo_model()
            >>> circuit = tnc.trace(model, "The capital of the state containing Dallas is", " Austin", nodes=30)
            >>> heads = circuit.with_heads(edges=10).heads()
            >>> heads[["source", "target"]].drop_duplicates().shape
            (10, 2)
        """
        return replace(self, head_parts=_edge_heads.split_edges(self, edges, model, pairs, target))

    @checked
    def heads(
        self,
        edges: int | pd.DataFrame | Sequence[tuple[str, str]] | None = None,
        *,
        model: TransformerLensModel | None = None,
        pairs: PromptPairs | TokenizedPairs | None = None,
    ) -> pd.DataFrame:
        """Which heads carry edges, and from where: one row per part, strongest edges first.

        Edges that `with_heads` has split are looked up, others are split now: see there what a part is.

        Args:
            edges: how many edges, rows of `edges`, or (source, target) of some; by default all that were split, else
                the 20 strongest.
            model: as in `with_heads`.
            pairs: as in `with_heads`.

        Returns:
            Columns source, target; kind ("head", "direct", or "rest" for parts too small for a row); layer, head,
            from_position; part (in units of the edge's weight), attribution, share (of the edge). The parts of an edge
            sum to it.

        Raises:
            SettingsError: edges that are not there, or a model that is needed and not given.

        Example:
            >>> import tl_neuron_circuits as tnc
            >>> model = tnc.load_demo_model()
            >>> circuit = tnc.trace(model, "The capital of the state containing Dallas is", " Austin", nodes=30)
            >>> bool(circuit.heads(3)["kind"].isin(["head", "direct", "rest"]).all())
            True
        """
        parts = _edge_heads.known_parts(self, edges)
        if parts is None:
            parts = _edge_heads.split_edges(self, 20 if edges is None else edges, model, pairs, None)
        return parts

    @checked
    def attention(
        self,
        at: tuple[str, str] | tuple[int, int, int, int],
        *,
        model: TransformerLensModel | None = None,
        pairs: PromptPairs | TokenizedPairs | None = None,
        top: int = 20,
        raw: bool = False,
    ) -> AttentionContributions:
        """Why a head looks where it looks: its score, split into what wrote into the residual stream at both ends.

        RelP cuts queries and keys, so this is an explanation beside the edges and never added to them.

        Args:
            at: (layer, head, query position, key position); or an edge (source, target), of which the strongest head
                is taken.
            model: as in `with_heads`.
            pairs: as in `with_heads`.
            top: how many nodes of a layer have rows of their own, and how many writes of each side are paired.
            raw: split the key's score alone, not its difference to the pattern's mean of all scores. Scores mean
                nothing up to a constant of the query.

        Returns:
            The key's score minus the pattern's mean of all scores (the change of the log of the pattern), the
            contributions of every write on the query's and on the keys' side, each side summing to it, and the
            strongest pairs of writes.

        Raises:
            SettingsError: a place that is not there.
            UnsupportedModelError: queries, keys or scores cannot be read on this model.

        Example:
            >>> import tl_neuron_circuits as tnc
            >>> model = tnc.load_demo_model()
            >>> circuit = tnc.trace(model, "The capital of the state containing Dallas is", " Austin", nodes=30)
            >>> why = circuit.attention((1, 0, 7, 6))
            >>> sides = why.writes.groupby("side")["contribution"].sum()
            >>> bool(abs(sides["query"] - sides["key"]) < 1e-3)
            True
        """
        return _edge_heads.explain_attention(self, at, model, pairs, top, raw=raw)

    @checked
    def cut_heads(
        self,
        rows: pd.DataFrame | None = None,
        *,
        model: TransformerLensModel | None = None,
        pairs: PromptPairs | TokenizedPairs | None = None,
    ) -> pd.DataFrame:
        """Test parts of edges: cut each by path patching through its head, and measure what changes.

        The source is ablated for that head alone; the target reads the head without it, all other heads and neurons
        held at their live values. Nothing is linearized, so `measured` differs from `predicted` by what norms and the
        target's own nonlinearity do.

        Args:
            rows: of `heads()`; by default the strongest 20 parts that heads bring.
            model: as in `with_heads`.
            pairs: as in `with_heads`.

        Returns:
            The rows with columns predicted (the part) and measured (live minus cut), in the target's units: a neuron's
            activation, a logit.

        Raises:
            SettingsError: rows of features, errors or groups, or of targets that are not tokens.

        Example:
            >>> import tl_neuron_circuits as tnc
            >>> model = tnc.load_demo_model()
            >>> circuit = tnc.trace(model, "The capital of the state containing Dallas is", " Austin", nodes=30)
            >>> tested = circuit.with_heads(edges=20).cut_heads()
            >>> bool(tested["predicted"].corr(tested["measured"]) > 0.5)
            True
        """
        chosen = self.heads(model=model, pairs=pairs) if rows is None else rows
        if rows is None:
            brought = chosen[chosen["kind"] == "head"]
            chosen = brought.loc[brought["attribution"].abs().sort_values(ascending=False, kind="stable").index[:20]]
        return _edge_heads.cut_parts(self, chosen, model, pairs)

    def graph(self) -> networkx.DiGraph:
        """The circuit as a networkx graph, with the tables' columns as attributes."""
        graph = networkx.DiGraph(**dict(self.settings))
        rows: Any = self.nodes.to_dict("records")
        for row in rows:
            graph.add_node(row.pop("node"), **row)
        rows = self.edges.to_dict("records")
        for row in rows:
            graph.add_edge(row.pop("source"), row.pop("target"), **row)
        return graph

    def save(self, path: str | Path) -> None:
        """Write a directory with `circuit.safetensors`, texts in its header; an existing one is replaced at once.

        Raises:
            FileFormatError: the path exists and is not a saved circuit.
            SaveError: it could not be written; what was saved there before is as it was.
        """
        tables = self.nodes, self.edges, self.settings, self.head_parts, self.by_prompt, self.details
        write_directory(path, "circuit", SCHEMA, *_circuit_file.to_file(*tables))

    @classmethod
    def load(cls, path: str | Path, *, basis: Basis | Sequence[Basis] | None = None) -> "Circuit":
        """Read what `save` wrote.

        Args:
            path: of the directory.
            basis: the dictionaries of a circuit of features, as given to `trace`; needed to evaluate or steer it.

        Raises:
            FileFormatError: missing, truncated, foreign, or of another schema.
        """
        tensors, notes = read_directory(path, "circuit", SCHEMA, _circuit_file.CircuitNotes, surrogates=True)
        nodes, edges, parts, by_prompt = _circuit_file.from_file(tensors, notes, path)
        more: dict[str, Any] = {"head_parts": parts, "by_prompt": by_prompt, "details": notes.details}
        return cls(nodes, edges, notes.settings, basis=basis, **more)

    @checked
    def plot(self, *, max_edges: int = 200) -> "go.Figure":
        """The circuit as a plotly figure: layers against positions, with the strongest edges."""
        from ..plots._circuit import plot_circuit

        return plot_circuit(self, max_edges=max_edges)

    def to_html(
        self,
        path: str | Path,
        *,
        details: Mapping[str, Mapping[str, Any]] | None = None,
        edge_share: float | None = None,
    ) -> None:
        """Write an interactive page of the circuit: one file that needs no network.

        Args:
            path: of the HTML file; an existing one is replaced.
            details: more about nodes, by node ("L3/N45@7"), by neuron at all positions ("L3/N45"), by label or by
                group. Everything is shown as text, never as markup. `"direct_logit_effects"` is a list of (token,
                number), `"examples"` a list of texts, of `Example`s of `max_activating_examples`, or of
                `{"tokens": [...], "values": [...], "note": "..."}`, tokens colored by value; any other key is a
                heading with its text. They come before those that the circuit has from `describe`.
                heading with its text. The 300 strongest neurons without details get their direct logit effects, while
                the traced model still lives.
            edge_share: edges with an |attribution| below this share of the target stay out of the file, except the
                strongest into and out of each node; the page says how many they are and what they sum to. By default
                0, or what leaves 10,000 edges.

        Raises:
            SettingsError: details of a node that is not there, or of another form; a negative share.
            SaveError: it could not be written; an older file is as it was.

        Example:
            >>> import tl_neuron_circuits as tnc
            >>> model = tnc.load_demo_model()
            >>> circuit = tnc.trace(model, "The capital of the state containing Dallas is", " Austin", nodes=30)
            >>> best = circuit.to_dataframe().query("kind == 'neuron'")["node"].iloc[0]
            >>> circuit.to_html("dallas.html", details={best: {"description": "the strongest neuron"}})
        """
        from ..plots._page import write_page

        own = {name: self.details[name] for name in self.nodes["node"] if name in self.details}
        write_page(self, path, own | dict(details or {}), edge_share)

    def to_neuronpedia(self, path: str | Path, *, slug: str | None = None, scan: str | None = None) -> None:
        """Write Neuronpedia's attribution-graph JSON, labels and groups included.

        Args:
            path: of the JSON file.
            slug: name of the graph; from the prompt unless given.
            scan: the model's name there; the model's own unless given.

        Raises:
            SettingsError: supernodes or summed positions, which the format cannot say.
            SaveError: it could not be written; an older file is as it was.
        """
        _neuronpedia.write(self, Path(path), slug, scan)

    @classmethod
    def from_neuronpedia(cls, path: str | Path, *, basis: Basis | Sequence[Basis] | None = None) -> "Circuit":
        """Read an attribution graph: one of `to_neuronpedia` comes back whole, except `by_prompt`.

        Args:
            path: of the JSON file.
            basis: as in `load`.

        Raises:
            FileFormatError: missing, not JSON, not an attribution graph, or changed since this package wrote it.
        """
        nodes, edges, settings, heads = _neuronpedia.read(Path(path))
        return cls(nodes, edges, settings, basis=basis, head_parts=heads)

    def __repr__(self) -> str:
        s = self.settings
        target, prompts = ", ".join(map(repr, s["target"])), f"{s['n_prompts']} prompt{'s' * (s['n_prompts'] != 1)}"
        return (
            f"Circuit({len(self)} nodes, {len(self.edges):,} edges, target {target} = {self.target_value:.3f}"
            f"{self._predicted()} on {s['model']}, {prompts}"
            f"{f', {1 - self.unexplained:.0%} explained' if not np.isnan(self.unexplained) else ''}"
            f"{', spans ' + ', '.join(s['spans']) if s.get('spans') else ''})"
        )

    def _predicted(self) -> str:
        """The probability that the model gives the one token that a prompt's circuit explains, and its rank."""
        ranks = self.settings.get("target_ranks") or {}
        if len(ranks) != 1:
            return ""
        ((name, rank),) = ranks.items()
        rows = self.nodes.loc[self.nodes["node"] == name, "probability"]
        rank_text = f", rank {rank}" if rank > 1 else ""
        return f" (p = {float(rows.iloc[0]):.1%}{rank_text})" if len(rows) else ""

    def _repr_html_(self) -> str:
        best = self.to_dataframe().query("kind not in ('logit', 'unselected', 'bias')").head(20)
        shown = ["label", "kind", "layer", "position", "token", "activation", "score", "share", "group"]
        pages = _html.neuron_pages(str(self.settings["model"]), best)
        notes = [_html.note(note) for note in self.notes]
        return _html.block(repr(self), *notes, _html.table(best[shown], bars=("score",), links={"label": pages}))
