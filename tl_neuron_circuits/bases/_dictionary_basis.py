"""Dictionaries as a basis: features, one error node and, for skip transcoders, one skip node per layer and position.

    value = nodes @ W_dec + b_dec + skip + error,   node(f) = decoder_scale(x) * encode(x)[f]

so that the value at the hook point is rebuilt exactly whatever the dictionary misses: error is all that is left. The
value is linear in the nodes, hence gradients need no splice: with g the model's own gradient at the hook point,
d m / d node(f) = W_dec[f] . g, and features + error + skip add up to the MLP output's own scores.
A transcoder reads the MLP's input and writes at its output. Features of a cross-layer transcoder write at the outputs
of their own and all later layers: d m / d node(f) is then a sum over these, and error is what all layers up to its own
leave. Source: Marks et al. 2025; METHODS 1.1 (caution) and 4.3.

A dictionary names its hook points as its author did; `resolve_hooks` finds the same places on either model class. Which
hook point carries the value that enters the MLP (measured with random norm weights):

| model | the MLP's input | `ln2.hook_normalized` |
|---|---|---|
| TransformerBridge, every family | `mlp.hook_in` | before the norm's weight and bias |
| HookedTransformer, folded norms (LNPre, RMSPre) | `ln2.hook_normalized` | the MLP's input |
| HookedTransformer 3, unfolded norms (LN, RMS), and 2, RMS | no hook point | before the norm's weight and bias |
| HookedTransformer 2, unfolded LN | `ln2.hook_normalized` | the MLP's input |
| HookedTransformer, no norm | `hook_resid_mid` (`hook_resid_pre` in parallel blocks) | absent |

So from TransformerLens 3 on `ln2.hook_normalized` is one value on both classes, folded or not, and is kept as named; a
dictionary trained on an unfolded LayerNorm model under TransformerLens 2 reads `mlp.hook_in` instead. `hook_mlp_in` is
TransformerLens' name for the residual stream before ln2 and fires only after `set_use_hook_mlp_in(True)`, on both
classes; Gemma Scope 2's transcoders mean the value after the norm. `hf_hook_name` decides, else that flag, else whether
it is a transcoder. `hook_mlp_out` is what is added to the residual stream on both classes, after a post norm (Gemma)
where there is one; the Bridge's `mlp.hook_out` is before it.
"""

import re
from collections.abc import Iterable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, replace
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from .._errors import DictionaryError, SettingsError, UnsupportedModelError
from .._files import fingerprint
from ..models._protocol import TransformerLensModel, hook_point, hook_points
from ..models._threads import hooked
from ._dictionary import Dictionary
from ._dictionary_variance import VarianceSums
from ._site import Parts, refuse_cross_layer


@dataclass(frozen=True, eq=False)
class DictionarySite:
    """One dictionary at the hook points it reads and writes on this model."""

    dictionary: Dictionary
    hook_in: str
    hook: str
    layer: int
    letter: str = "F"
    before: "tuple[DictionarySite, ...]" = ()
    """Sites of earlier layers of a cross-layer transcoder, whose features write here too."""
    later: tuple[str, ...] = ()
    """Hook points of later layers that its features write to."""

    @property
    def reads(self) -> tuple[str, ...]:
        """The hook points it reads and writes, and those that earlier layers' features are read from."""
        return tuple(dict.fromkeys((self.hook_in, self.hook, *(site.hook_in for site in self.before))))

    @property
    def writes(self) -> tuple[str, ...]:
        """The hook points its features write to."""
        return (self.hook, *self.later)

    @property
    def earlier(self) -> tuple[str, ...]:
        """Hooks of the sites whose features write here too."""
        return tuple(site.hook for site in self.before)

    def decoder(self, hook: str) -> Float[Tensor, "d_dict d_out"]:
        """What its features write at one of `writes`."""
        later = self.dictionary.W_dec_later
        if hook == self.hook or later is None:
            return self.dictionary.W_dec
        return later[self.later.index(hook)]

    @property
    def identity(self) -> str:
        """The hook points, the kind, and a fingerprint of the weights."""
        tensors = self.dictionary.tensors()
        weights = fingerprint(tensors[name] for name in sorted(tensors))
        return f"{self.hook_in} -> {self.hook} {self.dictionary.kind} {weights}"

    @property
    def vectors(self) -> tuple[str, ...]:
        """The error, and the skip where there is one."""
        return ("error", "skip") if self.dictionary.has_skip else ("error",)

    def take_apart(self, values: Mapping[str, Tensor]) -> Parts:
        """Features, error and skip of a run."""
        x, output = values[self.hook_in], _flat(values[self.hook])
        nodes = self.dictionary.encode(x)
        if self.dictionary.scale_depends_on_input:
            nodes = nodes * self.dictionary.decoder_scale(x)
        skip = self.dictionary.skip(x)
        earlier = {site.hook: site.dictionary.encode(values[site.hook_in]).to(nodes) for site in self.before}
        rebuilt = self._decode(nodes, earlier) if skip is None else self._decode(nodes, earlier) + skip
        vectors = {"error": output.to(rebuilt) - rebuilt}
        return Parts(nodes, vectors if skip is None else {**vectors, "skip": skip}, earlier)

    def put_together(self, parts: Parts, like: Tensor) -> Tensor:
        """The value given by these nodes, those of earlier layers, error and skip."""
        if set(parts.earlier) != set(self.earlier):
            refuse_cross_layer([self], "putting a layer's output together from its own features alone")
        value = self._decode(parts.nodes, parts.earlier)
        for vector in parts.vectors.values():
            value = value + vector
        return value.reshape(like.shape).to(like.dtype)

    def node_gradient(self, gradients: Mapping[str, Tensor]) -> Float[Tensor, "batch pos unit"]:
        """W_dec[f] . gradient for every feature, summed over the places it writes to."""
        total: Any = 0
        for hook in self.writes:
            gradient = _flat(gradients[hook])
            dtype = torch.promote_types(torch.promote_types(gradient.dtype, self.dictionary.dtype), torch.float32)
            total = total + gradient.to(dtype) @ self.decoder(hook).to(gradient.device, dtype).mT
        return total

    def vector_gradient(self, gradient: Tensor) -> Float[Tensor, "batch pos d"]:
        """The gradient itself, heads concatenated."""
        return _flat(gradient)

    def variance(self, values: Mapping[str, Tensor]) -> VarianceSums:
        """Sums for the fraction of variance that the dictionary leaves unexplained on a run."""
        if self.before:
            error = self.take_apart(values).vectors["error"]
            value = _flat(values[self.hook]).to(error)
            return VarianceSums.measure(value, value - error)
        return VarianceSums.measure(_flat(values[self.hook]), _flat(self.dictionary(values[self.hook_in])))

    def written(self, nodes: Tensor, earlier: Mapping[str, Tensor]) -> Tensor:
        """What features write at `hook`: its own, and those of earlier layers by their hooks."""
        value = self.dictionary.write(nodes, self.dictionary.W_dec)
        for site in self.before:
            value = value + site.dictionary.write(earlier[site.hook].to(nodes), site.decoder(self.hook))
        return value

    def _decode(self, nodes: Tensor, earlier: Mapping[str, Tensor]) -> Tensor:
        return self.written(nodes, earlier) + self.dictionary.b_dec.to(nodes)


def _flat(value: Tensor) -> Tensor:
    return value.flatten(2) if value.dim() > 3 else value


@dataclass(frozen=True, eq=False)
class Dictionaries:
    """SAEs or transcoders, one per hook point, in any order.

    Attributes:
        dictionaries: `Dictionary` objects; see `load_dictionary`, `as_dictionary`, `load_demo_dictionaries`.
        name: for tables and plots; "sae" or "transcoder" by their kind unless given.

    Example:
        >>> import tl_neuron_circuits as tnc
        >>> tnc.bases.Dictionaries(tnc.load_demo_dictionaries("sae")).name
        'sae'
    """

    dictionaries: Sequence[Dictionary]
    name: str = ""

    def __post_init__(self) -> None:
        if not self.dictionaries:
            raise SettingsError("expected at least one dictionary; got an empty list.")
        if not self.name:
            kinds = {"transcoder" if d.is_transcoder else "sae" for d in self.dictionaries}
            object.__setattr__(self, "name", kinds.pop() if len(kinds) == 1 else "dictionaries")

    def sites(self, model: TransformerLensModel) -> tuple[DictionarySite, ...]:
        """One site per dictionary, by layer.

        Raises:
            DictionaryError: a dictionary's hook points do not exist on the model, or its width differs.
            SettingsError: two dictionaries write at the same hook point, or layers of a cross-layer transcoder are
                missing.
        """
        sites = [DictionarySite(d, *resolve_hooks(model, d), d.layer) for d in self.dictionaries]
        hooks = [site.hook for site in sites]
        twice = sorted({hook for hook in hooks if hooks.count(hook) > 1})
        if twice:
            raise SettingsError(f"expected one dictionary per hook point; got several that write at {twice}.")
        return _joined(tuple(sorted(sites, key=lambda site: site.layer)))


def _joined(sites: tuple[DictionarySite, ...]) -> tuple[DictionarySite, ...]:
    """The sites, layers of a cross-layer transcoder knowing each other."""
    cross = {site.layer: site for site in sites if site.dictionary.W_dec_later is not None}
    if not cross:
        return sites
    last = max(layer + site.dictionary.n_later for layer, site in cross.items())
    missing = sorted(set(range(last + 1)) - set(cross))
    if missing or any(layer + site.dictionary.n_later != last for layer, site in cross.items()):
        raise SettingsError(
            f"expected the layers 0 to {last} of one cross-layer transcoder, each writing up to layer {last}; got "
            f"{sorted(cross)}: a layer's error is what all earlier layers leave of it. Pass all that "
            "load_dictionaries gave."
        )
    made: dict[int, DictionarySite] = {}
    for layer in range(last + 1):
        later = tuple(cross[beyond].hook for beyond in range(layer + 1, last + 1))
        made[layer] = replace(cross[layer], before=tuple(made.values()), later=later)
    return tuple(made[site.layer] if site.dictionary.W_dec_later is not None else site for site in sites)


_LAYER = re.compile(r"blocks\.(\d+)\.(.+)")
_AFTER_NORM = ("mlp.hook_in", "ln2.hook_out", "mlp.in.hook_in", "mlp.gate.hook_in")
_BRIDGE_TO_HOOKED = {
    "hook_in": "hook_resid_pre",
    "hook_out": "hook_resid_post",
    "ln2.hook_in": "hook_resid_mid",
    "attn.o.hook_in": "attn.hook_z",
    "attn.hook_out": "hook_attn_out",
    "mlp.out.hook_in": "mlp.hook_post",
    "mlp.hook_out": "hook_mlp_out",
    "mlp.out.hook_out": "hook_mlp_out",
    "ln1_post.hook_out": "hook_attn_out",
    "ln2_post.hook_out": "hook_mlp_out",
}
_BEFORE_POST_NORM = ("attn.hook_out", "mlp.hook_out", "mlp.out.hook_out")


def resolve_hooks(model: TransformerLensModel, dictionary: Dictionary) -> tuple[str, str]:
    """The names of the hook points of `model` that a dictionary reads and writes; both are in `model.hook_dict`.

    Names are those of TransformerLens where the model has them (`blocks.3.hook_mlp_out`), so they may be aliases:
    `model.hook_dict[name].name` is the canonical one. Only a forward pass shows whether they fire: `check_fires`.

    Raises:
        DictionaryError: no hooks are named, the model has no such site, or the widths differ; with the remedy.
    """
    if dictionary.hook_in is None or dictionary.hook_out is None:
        raise DictionaryError(
            f"{dictionary.name}: hook_in is {dictionary.hook_in!r} and hook_out {dictionary.hook_out!r}. Name both: "
            'as_dictionary(dictionary, hook_in="blocks.3.ln2.hook_normalized", hook_out="blocks.3.hook_mlp_out").'
        )
    for key in ("hook_head_index", "hook_head_index_out"):
        if dictionary.metadata.get(key) is not None:
            raise DictionaryError(
                f"{dictionary.name} belongs to one attention head ({key} = {dictionary.metadata[key]}), which is not "
                "supported. Use a dictionary on all heads (attn.hook_z) or on hook_attn_out."
            )
    hook_in = _find(model, dictionary, dictionary.hook_in)
    is_sae = dictionary.hook_out == dictionary.hook_in
    hook_out = hook_in if is_sae else _find(model, dictionary, dictionary.hook_out)
    for name, width, verb in ((hook_in, dictionary.d_in, "reads"), (hook_out, dictionary.d_out, "writes")):
        expected = _site_width(model, name)
        if expected is not None and expected != width:
            raise DictionaryError(
                f"{dictionary.name} {verb} width {width} at {name}, where this model has width {expected}: it was made "
                f"for another model ({dictionary.metadata.get('model_name') or 'its metadata has no model_name'})."
            )
    return hook_in, hook_out


def check_fires(model: TransformerLensModel, tokens: Any, names: Iterable[str]) -> dict[str, tuple[int, ...]]:
    """The shape that each hook point carries in one forward pass over `tokens`.

    Raises:
        UnsupportedModelError: a hook point is missing, switched off, or was never reached.
    """
    shapes: dict[str, tuple[int, ...]] = {}
    wanted = list(dict.fromkeys(names))
    for name in wanted:
        hook_point(model, name)

    def keep_shape(name: str) -> Any:
        def hook(value: Tensor, hook: Any) -> None:
            shapes[name] = tuple(value.shape)

        return hook

    with ExitStack() as stack:
        stack.enter_context(torch.no_grad())
        try:
            stack.enter_context(hooked(model, [(name, keep_shape(name)) for name in wanted]))
        except (AssertionError, ValueError) as error:  # TransformerLens, of a hook point that is switched off
            raise UnsupportedModelError(f"{', '.join(wanted)}: a hook point cannot be used. {error}") from error
        model(tokens)
    silent = [name for name in wanted if name not in shapes]
    if silent:
        raise UnsupportedModelError(
            f"{', '.join(silent)} did not fire in a forward pass of this {type(model).__name__}, so nothing can be "
            "read or written there. Name a site that fires: as_dictionary(dictionary, hook_in=..., hook_out=...)."
        )
    return shapes


def _find(model: TransformerLensModel, dictionary: Dictionary, name: str) -> str:
    """The hook point of this model that carries what the dictionary's author calls `name`."""
    points = hook_points(model)
    match = _LAYER.fullmatch(name)
    if match is None:
        return _require(model, dictionary, name, name)
    block, site = f"blocks.{match[1]}.", match[2]
    is_bridge = "blocks.0.hook_in" in points
    before_mlp = "hook_resid_pre" if getattr(model.cfg, "parallel_attn_mlp", False) else "hook_resid_mid"
    if site == "hook_mlp_in":
        hugging_face = dictionary.metadata.get("hf_hook_name")
        after_norm = bool(re.search(r"norm\.output$|mlp(\.input)?$", str(hugging_face or "")))
        if getattr(model.cfg, "use_hook_mlp_in", False) and not after_norm:
            return _require(model, dictionary, name, name)
        after_norm = after_norm if hugging_face else dictionary.is_transcoder
        site = "mlp.hook_in" if after_norm else before_mlp
    if is_bridge or block + site in points:
        return _require(model, dictionary, block + site, name)
    if site in _AFTER_NORM:
        normalization = getattr(model.cfg, "normalization_type", None)
        if normalization not in (None, "LNPre", "RMSPre"):
            raise DictionaryError(
                f"{dictionary.name} reads {name}, the MLP's input after the norm's weight. A HookedTransformer with "
                f"unfolded norms (normalization_type {normalization!r}) has no hook point there: its "
                "ln2.hook_normalized is before the weight. Load the model as TransformerBridge, which has mlp.hook_in."
            )
        return _require(model, dictionary, block + ("ln2.hook_normalized" if normalization else before_mlp), name)
    if site in _BEFORE_POST_NORM and getattr(model.cfg, "use_normalization_before_and_after", False):
        raise DictionaryError(
            f"{dictionary.name}: {name} is the output before the post norm, for which HookedTransformer has no hook "
            "point. Load the model as TransformerBridge."
        )
    return _require(model, dictionary, block + _BRIDGE_TO_HOOKED.get(site, site), name)


def _require(model: TransformerLensModel, dictionary: Dictionary, name: str, named: str) -> str:
    points = hook_points(model)
    if name in points:
        return name
    block = ".".join(name.split(".")[:2]) + "."
    near = [point for point in points if point.startswith(block) and point.count(".") <= 3][:12]
    has = ", ".join(near) if near else f"{model.cfg.n_layers} layers and nothing under {block[:-1]}"
    via = "" if name == named else f" (looked for as {name})"
    raise DictionaryError(
        f"{dictionary.name} is attached to {named}{via}, which this {type(model).__name__} does not have; it has "
        f"{has}. Was it made for this model "
        f"({dictionary.metadata.get('model_name') or 'its metadata has no model_name'})? "
        "Otherwise name the site: as_dictionary(dictionary, hook_in=..., hook_out=...)."
    )


def _site_width(model: TransformerLensModel, name: str) -> int | None:
    """The width of a hook point by the model's configuration, heads concatenated; None where that is not known."""
    cfg = model.cfg
    if name.endswith(("attn.hook_z", "attn.o.hook_in")):
        return cfg.n_heads * cfg.d_head
    if name.endswith(("mlp.hook_post", "mlp.hook_pre", "mlp.hook_pre_linear", "mlp.out.hook_in")):
        return cfg.d_mlp
    on_residual = (
        r"hook_(resid_\w+|mlp_out|mlp_in|attn_out|embed|in|out)|ln\w*\.hook_(normalized|in|out)|mlp\.hook_(in|out)"
    )
    return cfg.d_model if re.fullmatch(rf"(blocks\.\d+\.)?({on_residual})", name) else None
