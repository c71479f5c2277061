"""Where on a model a dictionary reads and writes: its maker's hook names, found again on either model class.

Which hook point carries the value that enters the MLP (measured with random norm weights):

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
classes; Gemma Scope 2's transcoders mean the value after the norm. Told apart by `hf_hook_name`, else by the flag, else
by whether it is a transcoder. `hook_mlp_out` is what is added to the residual stream on both classes, after a post norm
(Gemma) where there is one; the Bridge's `mlp.hook_out` is before it.
"""

import re
from collections.abc import Iterable
from contextlib import ExitStack
from typing import Any

import torch
from torch import Tensor

from .._errors import DictionaryError, UnsupportedModelError
from ..models._protocol import TransformerLensModel, hook_point, hook_points
from ._dictionary import Dictionary

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
    `model.hook_dict[name].name` is the canonical one. Whether they fire shows in a forward only: `check_fires`.

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
    hook_in = _find(model, dictionary, dictionary.hook_in, is_input=True)
    hook_out = hook_in
    if dictionary.hook_out != dictionary.hook_in:
        hook_out = _find(model, dictionary, dictionary.hook_out, is_input=False)
    _check_width(model, dictionary, hook_in, dictionary.d_in, "reads")
    _check_width(model, dictionary, hook_out, dictionary.d_out, "writes")
    return hook_in, hook_out


def check_fires(model: TransformerLensModel, tokens: Any, names: Iterable[str]) -> dict[str, tuple[int, ...]]:
    """The shape each hook point carries in one forward over `tokens`.

    Raises:
        UnsupportedModelError: a hook point is missing, switched off, or was never reached.
    """
    shapes: dict[str, tuple[int, ...]] = {}
    wanted = list(dict.fromkeys(names))
    for name in wanted:
        hook_point(model, name)

    def seen(name: str) -> Any:
        def hook(value: Tensor, hook: Any) -> None:
            shapes[name] = tuple(value.shape)

        return hook

    with ExitStack() as stack:
        stack.enter_context(torch.no_grad())
        try:
            stack.enter_context(model.hooks(fwd_hooks=[(name, seen(name)) for name in wanted]))
        except (
            AssertionError,
            ValueError,
        ) as error:  # what TransformerLens raises for a hook point that is switched off
            raise UnsupportedModelError(f"{', '.join(wanted)}: a hook point cannot be used. {error}") from error
        model(tokens)
    silent = [name for name in wanted if name not in shapes]
    if silent:
        raise UnsupportedModelError(
            f"{', '.join(silent)} did not fire in a forward of this {type(model).__name__}, so nothing can be read or "
            "written there. Name a site that fires: as_dictionary(dictionary, hook_in=..., hook_out=...)."
        )
    return shapes


def _find(model: TransformerLensModel, dictionary: Dictionary, name: str, *, is_input: bool) -> str:
    points = hook_points(model)
    match = _LAYER.fullmatch(name)
    if match is None:
        return _require(model, dictionary, name, name)
    block, site = f"blocks.{match[1]}.", match[2]
    is_bridge = "blocks.0.hook_in" in points
    if site == "hook_mlp_in":
        switched_on = bool(getattr(model.cfg, "use_hook_mlp_in", False))
        if switched_on and not _means_after_norm(dictionary, False):
            return _require(model, dictionary, name, name)
        site = "mlp.hook_in" if _means_after_norm(dictionary, dictionary.is_transcoder) else _residual_before_mlp(model)
    if is_bridge or block + site in points:
        return _require(model, dictionary, block + site, name)
    if site in _AFTER_NORM:
        return _require(model, dictionary, block + _mlp_input_of_hooked(model, dictionary, name), name)
    if site in _BEFORE_POST_NORM and getattr(model.cfg, "use_normalization_before_and_after", False):
        raise DictionaryError(
            f"{dictionary.name}: {name} is the output before the post norm, which HookedTransformer has no hook point "
            "for. Load the model as TransformerBridge."
        )
    return _require(model, dictionary, block + _BRIDGE_TO_HOOKED.get(site, site), name)


def _means_after_norm(dictionary: Dictionary, otherwise: bool) -> bool:
    """Whether `hook_mlp_in` means the value after the norm: what the Hugging Face name says, else `otherwise`."""
    hugging_face = dictionary.metadata.get("hf_hook_name")
    return otherwise if not hugging_face else bool(re.search(r"norm\.output$|mlp(\.input)?$", str(hugging_face)))


def _residual_before_mlp(model: TransformerLensModel) -> str:
    return "hook_resid_pre" if getattr(model.cfg, "parallel_attn_mlp", False) else "hook_resid_mid"


def _mlp_input_of_hooked(model: TransformerLensModel, dictionary: Dictionary, name: str) -> str:
    normalization = getattr(model.cfg, "normalization_type", None)
    if normalization in ("LNPre", "RMSPre"):
        return "ln2.hook_normalized"
    if normalization is None:
        return _residual_before_mlp(model)
    raise DictionaryError(
        f"{dictionary.name} reads {name}, the MLP's input after the norm's weight. A HookedTransformer with unfolded "
        f"norms (normalization_type {normalization!r}) has no hook point there: its ln2.hook_normalized is before the "
        "weight. Load the model as TransformerBridge, which has mlp.hook_in."
    )


def _require(model: TransformerLensModel, dictionary: Dictionary, found: str, named: str) -> str:
    points = hook_points(model)
    if found in points:
        return found
    block = ".".join(found.split(".")[:2]) + "."
    near = [name for name in points if name.startswith(block) and name.count(".") <= 3][:12]
    says = f"has {', '.join(near)}" if near else f"has {model.cfg.n_layers} layers and nothing under {block[:-1]}"
    via = "" if found == named else f" (looked for as {found})"
    raise DictionaryError(
        f"{dictionary.name} is attached to {named}{via}, which this {type(model).__name__} does not have; it {says}. "
        f"Was it made for this model ({dictionary.metadata.get('model_name') or 'its metadata has no model_name'})? "
        "Otherwise name the site: as_dictionary(dictionary, hook_in=..., hook_out=...)."
    )


def _check_width(model: TransformerLensModel, dictionary: Dictionary, name: str, width: int, verb: str) -> None:
    expected = site_width(model, name)
    if expected is not None and expected != width:
        raise DictionaryError(
            f"{dictionary.name} {verb} width {width} at {name}, where this model has width {expected}: it was made for "
            f"another model ({dictionary.metadata.get('model_name') or 'its metadata has no model_name'})."
        )


def site_width(model: TransformerLensModel, name: str) -> int | None:
    """The width a hook point carries by the model's configuration, heads concatenated; None where that is not known."""
    cfg = model.cfg
    if name.endswith(("attn.hook_z", "attn.o.hook_in")):
        return cfg.n_heads * cfg.d_head
    if name.endswith(("mlp.hook_post", "mlp.hook_pre", "mlp.hook_pre_linear", "mlp.out.hook_in")):
        return cfg.d_mlp
    on_residual = (
        r"hook_(resid_\w+|mlp_out|mlp_in|attn_out|embed|in|out)|ln\w*\.hook_(normalized|in|out)|mlp\.hook_(in|out)"
    )
    return cfg.d_model if re.fullmatch(rf"(blocks\.\d+\.)?({on_residual})", name) else None
