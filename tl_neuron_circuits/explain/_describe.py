"""`describe`: one pass over any number of texts, for all nodes at once, from activations to labels with scores.

Texts are cut into pieces, a block of pieces is run, and two `ActivationSample`s take in what comes out: one of the
discovery texts, from which examples, quantiles, thresholds and labels come, one of the held-out texts, which only score
them. Which side a text is on follows from a hash of the text, so that repeated texts never stand on both. Between
blocks everything that matters is in the samples: that is what the cache keeps, so a run that was stopped continues as
if it had not been.
"""

import hashlib
import json
import logging
import re
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence, Sized
from contextlib import suppress
from pathlib import Path
from typing import Annotated, Any

import msgspec
import numpy as np
import pandas as pd
import torch
from jaxtyping import Int
from torch import Tensor

from .._errors import FileFormatError, PairsError, SettingsError, UnsupportedModelError
from .._files import fingerprint, read_directory, require_shapes, write_directory
from .._progress import progress
from .._typing import checked
from ..bases._runs import Values, require_fired, run_logits
from ..interventions._direct_logit_effects import direct_logit_effects
from ..interventions._find_nodes import Dictionaries, Nodes, basis_of, find_nodes, reads_of_nodes, values_by_key
from ..interventions._steering_prompts import device_of, text_pieces, token_names
from ..models._protocol import TransformerLensModel, model_name
from ..models._threads import holding, hooked
from ..tasks._text_tokens import text_tokens
from ._activation_sample import BEFORE, MISSING, SIGNS, ActivationSample
from ._descriptions import QUANTILES, SIGN_TEXT, Descriptions
from ._max_activating_examples import Describe, Example
from ._token_labels import Vocabulary, choose_labels, score_label

logger = logging.getLogger(__name__)

SCHEMA = 1
KIND = "activation_samples"
ACTIVE_ABOVE = 0.99
FEW_POSITIONS = 2_000
"""On the discovery half: with fewer, less than 20 active positions decide a label."""
Texts = Iterable[str | Int[Tensor, " _"]]
Simulate = Callable[[str, list[str]], Sequence[float]]
"""From a description and the tokens of a text to an activation per token, on any scale."""
_SHARE = 20  # of the time may go by for one part that writing the cache takes
_NODES_AT_ONCE = 64
_NEURON = re.compile(r"blocks\.(\d+)\.mlp\.hook_post")


@holding
@checked
def describe(
    model: TransformerLensModel,
    nodes: Nodes,
    texts: Texts,
    *,
    held_out: Texts | None = None,
    k: int = 5,
    logit_tokens: int = 10,
    write: Describe | None = None,
    simulate: Simulate | None = None,
    basis: Dictionaries = None,
    context: int = 128,
    sample: int = 50_000,
    batch_size: int = 16,
    cache: str | Path | None = None,
    prepend_bos: bool | None = None,
    verbose: bool | None = None,
) -> Descriptions:
    """Say what nodes are active on, and how well that says it: examples, quantiles, labels, scores of the labels.

    A sign of a node is active at a position above its 99th percentile on the discovery texts (and above 0). Its label
    is the word, the class of words, or the word before that tells best where it is active there; precision, recall and
    base rate are of that label on the other texts. There is none where nothing tells it. With few hundred positions
    there is nothing to tell: give tens of thousands.

    Args:
        model: a HookedTransformer or TransformerBridge.
        nodes: as in `steering_hooks`, features too; positions and signs do not matter, both signs are described.
        texts: strings, or rows of tokens, from anything that can be iterated, once. A half of them, chosen by a hash of
            each text, is held out, unless `held_out` is given.
        held_out: other texts, which score the labels.
        k: examples for each node and sign, from different pieces of the discovery texts.
        logit_tokens: tokens that a neuron promotes, and as many that it suppresses; other nodes have none.
        write: gives a description from a name ("L3/N5+") and the examples (columns as of
            `max_activating_examples(...).to_dataframe()`, and tokens and activations), such as by a language model.
        simulate: gives activations from a description (the label where nothing was written) and a list of tokens. Its
            score is the correlation with the node on held-out windows of 17 tokens: the `k` strongest and 8 at random.
        basis: the dictionaries of features.
        context: tokens in one piece of text, at most; with BOS first where the model has it.
        sample: positions of each half that are kept, drawn uniformly; memory is 8 bytes times this, times nodes.
        batch_size: pieces in one pass.
        cache: a folder for what was read so far, in one folder per model. The same call continues there after it was
            stopped, takes everything from there once it was finished, also for fewer nodes, and reads on where texts
            were added.
        prepend_bos: None means the model's default.
        verbose: a progress bar. None: after two seconds, in a notebook or a terminal.

    Raises:
        SettingsError: numbers below 1, a unit out of range, a single text, no position in one of the halves, or a
            callable that returned something else.
        PairsError: text for a model without a tokenizer.
        FileFormatError: the cache was made with other texts.
        UnsupportedModelError: attention that looks ahead.

    Source: correlation of simulated activations: Bills et al. 2023; METHODS 1.7.

    Example:
        >>> import tl_neuron_circuits as tnc
        >>> model, texts = tnc.load_demo_model(), tnc.demo.capitals(n=512).clean
        >>> found = tnc.describe(model, ["L0/N5", "L1/N7"], texts, k=2)
        >>> found.to_dataframe()[["node", "sign", "label"]].shape
        (4, 3)
    """
    numbers = {"k": k, "sample": sample, "batch_size": batch_size, "logit_tokens": logit_tokens, "context": context - 1}
    if min(numbers.values()) < 1:
        raise SettingsError(f"expected numbers of at least 1, and a context of at least 2; got {numbers}.")
    if isinstance(texts, str) or isinstance(held_out, str):
        raise SettingsError("expected several texts, such as a list of strings; got one string.")
    if getattr(model.cfg, "attention_dir", "causal") == "bidirectional":
        raise UnsupportedModelError("describe pads texts on the right, which attention that looks ahead would see.")
    context = min(context, int(getattr(model.cfg, "n_ctx", None) or context))
    basis = basis_of(nodes, basis)
    frame = find_nodes(model, nodes, basis=basis, features=True).drop_duplicates(["key", "unit"]).reset_index(drop=True)
    frame["label"] = frame["label"].str.replace(r"[+-]?(@\d+)?$", "", regex=True)
    settings = {
        "model": model_name(model), "weights": fingerprint(model.parameters()), "context": context, "k": k,  # pyright: ignore[reportAttributeAccessIssue]
        "sample": sample, "prepend_bos": prepend_bos, "halves": held_out is None,
    }  # fmt: skip
    samples = [ActivationSample(len(frame), sample, k) for _ in range(2)]
    stream = _Stream(texts, held_out)
    saved = None if cache is None else _Cache(Path(cache), settings, frame)
    if saved is not None:
        stream.skip, stream.skipped = saved.load(samples)
    for pieces in _blocks(model, stream, context, prepend_bos, 8 * batch_size, verbose):
        _run(model, frame, pieces, batch_size, samples)
        if saved is not None:
            saved.save(samples, stream)
    if saved is not None:
        saved.save(samples, stream, last=True)
    for side, one in zip(("discovery", "held-out"), samples, strict=True):
        if one.n_positions == 0:
            raise SettingsError(
                f"none of the {stream.number} texts gave a position to the {side} half: the first token of a text does "
                "not count, and a hash of each text says its half. Give more texts, or held_out=."
            )
    settings |= {"texts": stream.number, "texts_hash": stream.digest.hex()}
    settings |= {"positions": samples[0].n_positions, "held_out_positions": samples[1].n_positions}
    if samples[0].n_positions < FEW_POSITIONS:
        logger.warning(
            "labels come from %d positions (the discovery half of the texts), of which about %d are active: with so "
            "few a label can be chance. Give more text; tens of thousands of positions are wanted.",
            samples[0].n_positions,
            round((1 - ACTIVE_ABOVE) * samples[0].n_positions),
        )
    found = _assemble(model, frame, samples, settings, k, logit_tokens)
    return _written(model, found, samples[1], write, simulate, k)


# --- Reading texts ---


class _Stream:
    """(side, text) of every text, side 0 for discovery and 1 for held out; what was read, and a hash of it."""

    def __init__(self, texts: Texts, held_out: Texts | None) -> None:
        self._parts = [texts] if held_out is None else [texts, held_out]
        self.total = sum(len(part) for part in self._parts if isinstance(part, Sized)) or None
        if not all(isinstance(part, Sized) for part in self._parts):
            self.total = None
        self.number, self.digest = 0, b""
        self.skip, self.skipped = 0, b""

    def __iter__(self) -> Iterator[tuple[int, int, str | Tensor]]:
        """Number, side and text, for every text after those to skip.

        Raises:
            FileFormatError: the texts to skip are not those that were read before.
        """
        for part, texts in enumerate(self._parts):
            for text in texts:
                if not isinstance(text, str | Tensor) or (isinstance(text, Tensor) and text.dim() != 1):
                    raise SettingsError(f"expected strings or rows of tokens as texts; got {type(text).__name__}.")
                plain = text.encode("utf-8", "surrogatepass") if isinstance(text, str) else _bytes(text)
                own = hashlib.sha256(plain).digest()
                side = own[0] % 2 if len(self._parts) == 1 else part
                self.digest = hashlib.sha256(self.digest + bytes([side]) + own).digest()
                self.number += 1
                if self.number > self.skip:
                    yield self.number - 1, side, text
                elif self.number == self.skip and self.digest != self.skipped:
                    raise FileFormatError(self._other())
        if self.number < self.skip:
            raise FileFormatError(self._other())

    def _other(self) -> str:
        return (
            f"the first {self.skip} texts are not those that the cache was made with. Give the same texts in the same "
            "order, or another folder."
        )


def _bytes(tokens: Tensor) -> bytes:
    return tokens.detach().cpu().to(torch.int64).numpy().tobytes()


_Piece = tuple[int, int, np.ndarray]  # side, place of the first token, tokens


def _blocks(
    model: TransformerLensModel,
    stream: _Stream,
    context: int,
    prepend_bos: bool | None,
    size: int,
    verbose: bool | None,
) -> Iterator[list[_Piece]]:
    """Pieces of whole texts, at least `size` of them at a time."""
    block: list[_Piece] = []
    with progress(total=stream.total, desc="described texts", verbose=verbose, unit="text") as bar:
        for number, side, text in stream:
            block += [(side, (number << 32) + start, piece) for start, piece in _cut(model, text, context, prepend_bos)]
            if len(block) >= size:
                yield block
                block = []
                bar.update(stream.number - bar.n)
        if block:
            yield block
        bar.update(stream.number - bar.n)


def _cut(
    model: TransformerLensModel, text: str | Tensor, context: int, prepend_bos: bool | None
) -> Iterator[tuple[int, np.ndarray]]:
    """Pieces of at most `context` tokens and where they start, each with BOS first if the text has one."""
    tokenizer = getattr(model, "tokenizer", None)
    if isinstance(text, str):
        if tokenizer is None:
            raise PairsError(f"this {type(model).__name__} has no tokenizer: give rows of tokens.")
        if not text:
            return
        text = text_tokens(model, text, prepend_bos, truncate=False)[0]
    tokens = text.detach().cpu().to(torch.int64).numpy()
    bos = getattr(tokenizer, "bos_token_id", None)
    lead = tokens[: int(len(tokens) > 0 and bos is not None and tokens[0] == bos)]
    body, step = tokens[len(lead) :], context - len(lead)
    for start in range(0, len(body), step):
        piece = np.concatenate([lead, body[start : start + step]])
        if len(piece) > 1:  # the first token does not count
            yield start, piece


def _batches(pieces: Sequence[_Piece], batch_size: int) -> Iterator[Sequence[_Piece]]:
    """Pieces of similar lengths together, so that little is padded."""
    ordered = sorted(pieces, key=lambda piece: -len(piece[2]))
    for start in range(0, len(ordered), batch_size):
        yield ordered[start : start + batch_size]


def _run(
    model: TransformerLensModel, frame: pd.DataFrame, pieces: Sequence[_Piece], batch_size: int,
    samples: Sequence[ActivationSample],
) -> None:  # fmt: skip
    """Run a block, padded on the right, where causal attention never looks, and hand out its activations.

    Hooks are put on once for the block: on a TransformerBridge that takes a third as long as a pass.
    """
    store: Values = {}
    with torch.no_grad(), hooked(model, _reading(model, frame, store)):
        for batch in _batches(pieces, batch_size):
            lengths = np.array([len(piece) for _, _, piece in batch])
            tokens = np.stack([np.pad(piece, (0, lengths.max() - len(piece)), mode="edge") for _, _, piece in batch])
            store.clear()
            with suppress(_AllRead):
                run_logits(model, torch.from_numpy(tokens).to(device_of(model)))
            values = _activations(require_fired(store, reads_of_nodes(frame), model), frame, tokens.shape)
            sides, places = (np.array([piece[column] for piece in batch]) for column in (0, 1))
            for side, one in enumerate(samples):
                rows = np.flatnonzero(sides == side)
                if len(rows):
                    longest = lengths[rows].max()
                    one.add(tokens[rows, :longest], lengths[rows], places[rows], values[rows, :longest])


class _AllRead(Exception):
    """Every hook point was read: ends the forward pass, before the unembedding."""


def _reading(
    model: TransformerLensModel, frame: pd.DataFrame, store: Values
) -> list[tuple[str, Callable[..., Tensor]]]:
    """Hooks that keep what is read: of a hook point's own units only those that are asked for."""
    whole = {name for site in frame["site"] if site is not None for name in site.reads}
    units = {str(name): _units(rows) for name, rows in frame[frame["site"].isna()].groupby("hook", sort=False)}
    names = reads_of_nodes(frame)
    # Where accelerate moves weights in and out (offloading), only the end of the pass puts them back.
    modules = torch.nn.Module.modules(model)  # pyright: ignore[reportArgumentType]
    to_the_end = any(hasattr(module, "_hf_hook") for module in modules)

    def keep(name: str) -> Callable[..., Tensor]:
        def hook(value: Tensor, hook: Any) -> Tensor:
            if name in units and int(units[name].max()) >= value.flatten(2).shape[2]:
                raise SettingsError(
                    f"expected units below {value.flatten(2).shape[2]} at {name}; got {int(units[name].max())}."
                )
            if name in whole:
                store[name] = value
            else:
                store[name] = value.flatten(2)[..., units[name].to(value.device)].float().cpu()
            if len(store) == len(names) and not to_the_end:
                raise _AllRead
            return value

        return hook

    return [(name, keep(name)) for name in names]


def _activations(values: Values, frame: pd.DataFrame, shape: tuple[int, ...]) -> np.ndarray:
    """The nodes' activations `[batch, pos, node]` from what the hooks kept."""
    out = np.empty((*shape, len(frame)), dtype=np.float32)
    plain, features = frame[frame["site"].isna()], frame[frame["site"].notna()]
    whole = {name for site in features["site"] for name in site.reads}
    for name, rows in plain.groupby("hook", sort=False):
        read = values[str(name)]
        read = read.flatten(2)[..., _units(rows).to(read.device)].float().cpu() if name in whole else read
        out[..., rows.index.to_numpy()] = read.numpy()
    for key, read in values_by_key(values, features).items() if len(features) else ():
        rows = features[features["key"] == key]
        units = _units(rows)
        if int(units.max()) >= read.shape[2]:
            raise SettingsError(f"expected features below {read.shape[2]} for {key}; got {int(units.max())}.")
        out[..., rows.index.to_numpy()] = read[..., units.to(read.device)].float().cpu().numpy()
    return out


def _units(rows: pd.DataFrame) -> Int[Tensor, " node"]:
    return torch.from_numpy(rows["unit"].to_numpy(dtype=np.int64, copy=True))


# --- From samples to descriptions ---


def _assemble(
    model: TransformerLensModel, frame: pd.DataFrame, samples: Sequence[ActivationSample],
    settings: Mapping[str, Any], k: int, logit_tokens: int,
) -> Descriptions:  # fmt: skip
    discovery, held_out = samples
    (tokens, values), (other_tokens, other_values) = discovery.sampled(), held_out.sampled()
    ids = np.unique(np.concatenate([tokens.reshape(-1), other_tokens.reshape(-1)]))
    vocabulary = Vocabulary(ids, token_names(model, ids.tolist()))
    other_words = vocabulary.words_at(other_tokens)
    rows: list[dict[str, Any]] = []
    examples: dict[str, tuple[Example, ...]] = {}
    for start in range(0, len(frame), _NODES_AT_ONCE):
        chunk = slice(start, start + _NODES_AT_ONCE)
        own, other = values[:, chunk], other_values[:, chunk]
        quantiles = np.quantile(own, list(QUANTILES.values()), axis=0)
        for side, sign in enumerate(SIGNS):
            threshold = np.maximum(np.quantile(sign * own, ACTIVE_ABOVE, axis=0), 0.0)
            active, active_there = sign * own > threshold, sign * other > threshold
            conditions = choose_labels(active, tokens, vocabulary)
            for column, condition in enumerate(conditions):
                node = start + column
                score = score_label(condition, active_there[:, column], other_tokens, other_words, vocabulary)
                name = f"{frame['label'][node]}{SIGN_TEXT[sign]}"
                rows.append({
                    "node": frame["label"][node], "layer": _layer(frame, node), "unit": int(frame["unit"][node]),
                    "sign": sign, "label": vocabulary.text(condition), "kind": condition.kind,
                    "precision": score.precision, "recall": score.recall, "base_rate": score.base_rate,
                    "threshold": float(threshold[column]), "active": float(active[:, column].mean()),
                    "min": float(discovery.low[node]),
                    **dict(zip(QUANTILES, quantiles[:, column].astype(float), strict=True)),
                    "max": float(discovery.high[node]),
                })  # fmt: skip
                examples[name] = tuple(_examples(model, discovery, side, node, k))
    table = pd.DataFrame(rows)
    place = {label: number for number, label in enumerate(frame["label"])}
    table = table.iloc[np.lexsort((-table["sign"].to_numpy(), table["node"].map(place).to_numpy()))]
    neurons = frame.loc[frame["site"].isna() & frame["hook"].str.fullmatch(_NEURON), "label"].tolist()
    effects = direct_logit_effects(model, neurons, k=logit_tokens).to_dataframe() if neurons else None
    return Descriptions(table.reset_index(drop=True), examples, effects, settings)


def _layer(frame: pd.DataFrame, node: int) -> int:
    site = frame["site"][node]
    found = re.search(r"blocks\.(\d+)\.", frame["hook"][node])
    return int(site.layer) if site is not None else int(found[1]) if found else -1


def _examples(model: TransformerLensModel, sample: ActivationSample, side: int, node: int, k: int) -> Iterator[Example]:
    """The strongest windows, each once."""
    seen: set[bytes] = set()
    for slot in range(sample.best_value.shape[2]):
        tokens = sample.best_tokens[side, node, slot]
        if not np.isfinite(sample.best_value[side, node, slot]) or tokens.tobytes() in seen:
            continue
        seen.add(tokens.tobytes())
        there = tokens != MISSING
        pieces = text_pieces(model, torch.from_numpy(tokens[there].astype(np.int64)))
        number = int(sample.best_place[side, node, slot] >> 32)
        position = int(there[:BEFORE].sum())
        yield Example(number, tuple(pieces), tuple(sample.best_values[side, node, slot][there].tolist()), position)
        if len(seen) == k:
            return


def _written(
    model: TransformerLensModel, found: Descriptions, held_out: ActivationSample, write: Describe | None,
    simulate: Simulate | None, k: int,
) -> Descriptions:  # fmt: skip
    """With descriptions by the user's callable, and scores by the user's simulator, where there are any."""
    table = found.table.copy()
    if write is not None:
        texts = []
        for node, sign in zip(table["node"], table["sign"], strict=True):
            name = f"{node}{SIGN_TEXT[sign]}"
            text = write(name, found.example_table(name))
            if not isinstance(text, str):
                raise SettingsError(f"expected write to return a string for {name}; got {type(text).__name__}.")
            texts.append(text)
        table["description"] = texts
    if simulate is not None:
        spoken = table["description"] if write is not None else table["label"]
        place = {node: number for number, node in enumerate(dict.fromkeys(table["node"]))}
        table["simulation"] = [
            _simulation(model, held_out, place[node], int(sign), text, simulate, k) if text else float("nan")
            for node, sign, text in zip(table["node"], table["sign"], spoken, strict=True)
        ]
    return Descriptions(table, found.examples, found.effects, found.settings)


def _simulation(
    model: TransformerLensModel, held_out: ActivationSample, node: int, sign: int, text: str, simulate: Simulate, k: int
) -> float:
    """Correlation of simulated and real activations over held-out windows, strongest and random."""
    side = SIGNS.index(sign)
    tokens = np.concatenate([held_out.best_tokens[side, node, :k], held_out.window_tokens[: held_out.windows.count]])
    real = [*held_out.best_values[side, node, :k], *held_out.window_values[: held_out.windows.count, :, node]]
    pairs: list[tuple[float, float]] = []
    for window, values in zip(tokens, real, strict=True):
        there = window != MISSING
        if not there.any():
            continue
        pieces = text_pieces(model, torch.from_numpy(window[there].astype(np.int64)))
        simulated = [float(value) for value in simulate(text, pieces)]
        if len(simulated) != len(pieces) or not np.isfinite(simulated).all():
            raise SettingsError(
                f"expected simulate to return {len(pieces)} finite numbers, one per token; got {simulated!r:.200}."
            )
        pairs += zip(simulated, (sign * values[there]).tolist(), strict=True)
    a, b = np.array(pairs, dtype=float).reshape(-1, 2).T
    return float(np.corrcoef(a, b)[0, 1]) if len(a) and a.std() and b.std() else float("nan")


# --- The cache ---


class _Notes(msgspec.Struct, forbid_unknown_fields=True):
    settings: dict[str, Any]
    nodes: list[str]
    texts: Annotated[int, msgspec.Meta(ge=0)]
    digest: Annotated[str, msgspec.Meta(pattern="^[0-9a-f]{64}$")]
    positions: tuple[Annotated[int, msgspec.Meta(ge=0)], Annotated[int, msgspec.Meta(ge=0)]]


class _Cache:
    """Both samples on disk, in a folder per model and a folder per set of nodes and settings in it."""

    def __init__(self, folder: Path, settings: Mapping[str, Any], frame: pd.DataFrame) -> None:
        name = re.sub(r"[^\w.-]+", "-", str(settings["model"]))
        self._model = folder / f"{name}-{settings['weights']}"
        self._settings = json.loads(json.dumps(settings))
        sites = [key if site is None else site.identity for key, site in zip(frame["key"], frame["site"], strict=True)]
        self._nodes = [f"{site} {unit}" for site, unit in zip(sites, frame["unit"], strict=True)]
        content = json.dumps([self._settings, self._nodes])
        self._own = self._model / hashlib.sha256(content.encode()).hexdigest()[:12]
        self._written_at, self._cost = time.monotonic(), 0.0

    def load(self, samples: Sequence[ActivationSample]) -> tuple[int, bytes]:
        """Fill the samples from this run's folder, or from that of one with all of its nodes; how many texts it read.

        Raises:
            FileFormatError: a file there is damaged or foreign.
        """
        others = sorted(path.parent for path in self._model.glob(f"*/{KIND}.safetensors"))
        for folder in (self._own, *(path for path in others if path != self._own)):
            if not (folder / f"{KIND}.safetensors").exists():
                continue
            tensors, notes = read_directory(folder, KIND, SCHEMA, _Notes)
            if notes.settings != self._settings or not set(self._nodes) <= set(notes.nodes):
                continue
            expected = ActivationSample(len(notes.nodes), 1, self._settings["k"])
            names = [(side, name, array) for side in range(2) for name, array in expected.state().items()]
            any_length = {"tokens", "values", "keys", "window_keys"}  # one row per position, or window, so far
            require_shapes(folder, tensors, {
                f"{side}/{name}": (None, *array.shape[1:]) if name in any_length else array.shape
                for side, name, array in names
            })  # fmt: skip
            columns = [notes.nodes.index(node) for node in self._nodes]
            for side, one in enumerate(samples):
                state = {
                    name.removeprefix(f"{side}/"): tensor.numpy()
                    for name, tensor in tensors.items()
                    if name.startswith(f"{side}/")
                }
                one.restore(_columns(state, columns), notes.positions[side])
            return notes.texts, bytes.fromhex(notes.digest)
        return 0, b""

    def save(self, samples: Sequence[ActivationSample], stream: _Stream, *, last: bool = False) -> None:
        """Write the samples after a block, unless writing was just done and more follows."""
        started = time.monotonic()
        if stream.number <= stream.skip or (not last and started - self._written_at < _SHARE * self._cost):
            return
        tensors = {
            f"{side}/{name}": torch.from_numpy(np.ascontiguousarray(array))
            for side, one in enumerate(samples)
            for name, array in one.state().items()
        }
        notes = {
            "settings": self._settings, "nodes": self._nodes, "texts": stream.number, "digest": stream.digest.hex(),
            "positions": [one.n_positions for one in samples],
        }  # fmt: skip
        write_directory(self._own, KIND, SCHEMA, tensors, notes)
        self._written_at = time.monotonic()
        self._cost = self._written_at - started


def _columns(state: Mapping[str, np.ndarray], columns: Sequence[int]) -> dict[str, np.ndarray]:
    """The state of some of the nodes."""
    axes = {"values": 1, "low": 0, "high": 0, "window_values": 2}
    axes |= dict.fromkeys(("best_value", "best_place", "best_piece", "best_tokens", "best_values"), 1)
    return {name: np.take(array, columns, axes[name]) if name in axes else array for name, array in state.items()}
