"""Rules on a model: which hook point hands what to which rule. There is no formula here; those are in `rules.py`.

Every piece that a rule stands for (a norm, an activation, a gated product, a softmax) has hook points at its inputs and
one at its output. The forward pass is left alone except for the output's hook point, which is entered through `Relay`:

    hook_pre ──────────▶ activation ──▶ value ──┐ (its graph ends here: nothing goes back through it)
        └───────────────────────────────────▶ Relay ──▶ hook_post ──▶ ...

`Relay` keeps the value bit for bit and asks the piece for the gradients at its inputs, which it computes from what the
rule made constant in the forward pass. What autograd saved inside the piece is freed as soon as the value is cut off,
which is a good part of a forward pass's memory, and a forward pass that is broken off leaves no state behind.

Where each hook sits, and why:
- Inputs are read by forward hooks that always run last (`_run_last`): what a user's hook returns there is what the
  model goes on with, and what the gradient goes to.
- `Relay` runs in a forward *pre*-hook of the output's hook point. So the point's own backward hooks, which torch
  attaches to what enters and leaves it, see the gradient.
- The gradient to an input goes to the tensor as our hook saw it. Torch attaches an input point's backward hooks to
  what leaves it after that, so they would be bypassed: `through_backward_hooks` puts them in the way.
- Hooks are torch's own, not TransformerLens': they see raw values, no `hook_conversion`, and survive `reset_hooks()`.
"""

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from .._errors import PropagationError, UnsupportedModelError
from ..models._protocol import TransformerLensModel
from ..models._run_state import require_steady
from ..models._sites import AttentionSites, MLPSites, ModelSites, NormSites, bias_after_product
from ..models._threads import this_thread_only
from ._activations import find_activation
from ._checks import Checks
from ._norms import is_opaque, read_norm
from .rules import (
    ActivationPiece,
    GatedPiece,
    NormPiece,
    Piece,
    PlainActivation,
    PlainProduct,
    RuleSet,
    SoftmaxPiece,
    SoftmaxRule,
    SplitAttentionRule,
)


class Relay(torch.autograd.Function):
    """The value of a piece as it is; backward, the piece says what its inputs get. A bias gets the plain sum."""

    @staticmethod
    def forward(
        ctx: Any, piece: Piece, value: Tensor, constants: tuple[Tensor, ...], bias: Tensor | None, *inputs: Tensor
    ) -> Tensor:
        ctx.piece, ctx.bias_shape = piece, None if bias is None else bias.shape
        ctx.dtypes = [x.dtype for x in inputs]
        ctx.save_for_backward(*constants)
        return value.detach()

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        (g,) = gradients
        to_inputs = ctx.piece.gradients(g, *ctx.saved_tensors)
        to_bias = g.sum_to_size(ctx.bias_shape) if ctx.bias_shape is not None and ctx.needs_input_grad[3] else None
        return None, None, None, to_bias, *(to.to(dtype) for to, dtype in zip(to_inputs, ctx.dtypes, strict=True))


def through_backward_hooks(point: nn.Module, value: Tensor) -> Tensor:
    """`value`, whose gradient passes the backward hooks of `point` (a hook point returns what it gets) on its way."""
    if not (point._backward_hooks or point._backward_pre_hooks):
        return value
    stand_in = nn.Identity()
    stand_in._backward_hooks, stand_in._backward_pre_hooks = point._backward_hooks, point._backward_pre_hooks
    stand_in._is_full_backward_hook = point._is_full_backward_hook
    return stand_in(value)


class Wiring:
    """A set of rules on one model, from `install` to `remove`."""

    def __init__(self, model: TransformerLensModel, points: dict[str, Any], sites: ModelSites, rules: RuleSet) -> None:
        self._model, self._points, self._sites, self._rules = model, points, sites, rules
        self._handles: list[Any] = []
        self._marks: list[tuple[Any, Any]] = []
        self._frozen: list[Tensor] = []
        self._inputs: dict[str, Tensor] = {}  # what each piece under way was given, by hook point
        identity = rules.identity
        self.checks = Checks(slack=0.0 if identity is None or identity.stabilizer is None else 1e-3)

    def install(self) -> None:
        """Freeze the parameters and put every hook in place; `remove` undoes it, after an error here too."""
        self._frozen = [p for p in self._model.parameters() if p.requires_grad]
        for parameter in self._frozen:
            parameter.requires_grad_(False)
        self._install_leaves()
        for norm in self._sites.norms if self._rules.ln else ():
            self._install_norm(norm)
        split = self._rules.ln is not None and isinstance(self._rules.attention, SplitAttentionRule)
        for norm in self._sites.attention_norms if split else ():
            self._install_norm(norm)
        for attention in self._sites.attentions if self._rules.attention else ():
            self._install_attention(attention)
        for mlp in self._sites.mlps if self._rules.identity or self._rules.half else ():
            self._install_mlp(mlp)
        self._handles.append(
            self._points[self._sites.last].register_forward_hook(this_thread_only(self._end_of_forward))
        )

    def remove(self) -> None:
        """Leave the model as it was found."""
        for handle in self._handles:
            handle.remove()
        for point, mark in self._marks:
            if mark in point.fwd_hooks:  # reset_hooks() may have taken it
                point.fwd_hooks.remove(mark)
            mark.hook.remove()
        for parameter in self._frozen:
            parameter.requires_grad_(True)
        self._handles, self._marks, self._frozen = [], [], []
        self._inputs.clear()

    # --- the two ends of the graph ---

    def _install_leaves(self) -> None:
        """Without a leaf frozen parameters leave no graph, and backward hooks would capture nothing, silently.

        The leaf is made before the hook point is entered, so that torch does not warn of a backward hook there.
        """
        for name in self._sites.embeddings:
            if name == "hook_embed" or self._model.cfg.positional_embedding_type == "standard":
                point = self._points[name]
                self._handles.append(point.register_forward_pre_hook(this_thread_only(self._make_leaf)))
                # Some adapters (Granite) enter a hook point only where a TransformerLens hook sits on it.
                point.add_hook(_do_nothing, dir="fwd")
                self._marks.append((point, point.fwd_hooks[-1]))

    def _make_leaf(self, module: Any, arguments: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        self._inputs.clear()  # of a forward pass that was broken off
        if not torch.is_grad_enabled():
            raise PropagationError(
                "expected gradients to be enabled inside relp; the model was run under torch.no_grad() or "
                "inference_mode(). Run it outside relp, where the values are the same."
            )
        require_steady(self._model, gradients=False)
        value = arguments[0]
        if value.requires_grad:
            return arguments
        return (value.detach().requires_grad_(True).clone(), *arguments[1:])  # a copy: hooks may edit it in place

    def _end_of_forward(self, module: Any, arguments: tuple[Tensor, ...], output: Any) -> None:
        self._inputs.clear()
        self.checks.verify(whole_forward=True)
        if not arguments[0].requires_grad:
            raise PropagationError(
                "expected the forward pass to leave a graph; it did not, so no gradient would reach any hook. A hook "
                "replaces the embeddings, or start_at_layer was given a residual, without requires_grad: set it."
            )

    # --- one piece ---

    def _install_piece(
        self,
        piece: Piece,
        inputs: tuple[str, ...],
        output: str,
        layer: int,
        unless: Callable[[], bool] | None = None,
    ) -> None:
        for name in inputs:
            point = self._points[name]
            reading = point.register_forward_hook(this_thread_only(partial(self._read, name)))
            self._handles += [
                reading,
                point.register_forward_pre_hook(this_thread_only(partial(_run_last, reading.id))),
            ]
            self.checks.expect(name, layer)
        relay = partial(self._relay, piece, inputs, output, unless)
        self._handles.append(self._points[output].register_forward_pre_hook(this_thread_only(relay)))
        self.checks.expect(output, layer)

    def _read(self, name: str, module: Any, arguments: Any, value: Tensor) -> None:
        self.checks.fired(name)
        self._inputs[name] = value

    def _relay(
        self,
        piece: Piece,
        inputs: tuple[str, ...],
        output: str,
        unless: Callable[[], bool] | None,
        module: Any,
        arguments: tuple[Tensor, ...],
    ) -> tuple[Tensor, ...] | None:
        self.checks.fired(output)
        missing = [name for name in inputs if name not in self._inputs]
        if missing:
            raise UnsupportedModelError(
                f"expected {', '.join(missing)} to fire before {output}; this model passes it by, so the rule between "
                "them cannot be taken. Use a rule set without it: rules='relp' needs no attention scores."
            )
        given = [self._inputs.pop(name) for name in inputs]
        if unless is not None and unless():
            return None
        value = arguments[0].detach()
        with torch.no_grad():
            rebuilt, constants = piece.freeze(*given)
            self.checks.compare(output, rebuilt, value)
        entering = [through_backward_hooks(self._points[name], x) for name, x in zip(inputs, given, strict=True)]
        relayed: Any = Relay.apply(piece, value, constants, piece.bias, *entering)
        return (relayed, *arguments[1:])

    # --- which pieces there are ---

    def _install_norm(self, norm: NormSites) -> None:
        parts = norm.path.split(".")
        layer = int(parts[1]) if parts[0] == "blocks" else (self._sites.n_layers if norm.path == "ln_final" else -1)
        if norm.input is None or norm.output is None or not is_opaque(self._model, norm.path):
            assert norm.scale is not None
            enter = partial(self._enter_scale, norm.scale, None)
            self._handles.append(self._points[norm.scale].register_forward_pre_hook(this_thread_only(enter)))
            self.checks.expect(norm.scale, layer)
            return
        read = read_norm(self._model, norm.path)
        if read is None:
            return
        assert self._rules.ln is not None
        if norm.scale is not None:
            enter = partial(self._enter_scale, norm.scale, norm)
            self._handles.append(self._points[norm.scale].register_forward_pre_hook(this_thread_only(enter)))
        piece = NormPiece(self._rules.ln, read)
        self._install_piece(piece, (norm.input,), norm.output, layer, unless=partial(self._is_stepwise, norm))

    def _enter_scale(
        self, scale: str, opaque: NormSites | None, module: Any, arguments: tuple[Tensor, ...]
    ) -> tuple[Tensor, ...] | None:
        """Where the scale is in the graph, cutting it off is the whole of the rule."""
        if opaque is not None and not self._is_stepwise(opaque):
            return None  # the scale is outside the graph, and the Bridge would take a new tensor for an edit
        self.checks.fired(scale)
        return (arguments[0].detach(), *arguments[1:])

    def _is_stepwise(self, norm: NormSites) -> bool:
        """A backward hook inside an opaque norm makes TransformerBridge compute it step by step."""
        inside = (norm.scale, norm.normalized)
        return any(self._points[name].bwd_hooks for name in inside if name is not None)

    def _install_mlp(self, mlp: MLPSites) -> None:
        identity, half = self._rules.identity, self._rules.half
        if mlp.up is None and identity is None:
            return  # the half rule is about products only
        activation = find_activation(self._model, mlp.layer)
        if mlp.up is None:
            assert identity is not None
            self._install_piece(ActivationPiece(identity, activation), (mlp.pre,), mlp.activated, mlp.layer)
            return
        bias = bias_after_product(self._model, mlp.layer)
        piece = GatedPiece(identity or PlainActivation(), half or PlainProduct(), activation, bias)
        self._install_piece(piece, (mlp.pre, mlp.up), mlp.post, mlp.layer)

    def _install_attention(self, attention: AttentionSites) -> None:
        rule = self._rules.attention
        assert rule is not None
        for name, factor in (
            (attention.query, rule.query),
            (attention.key, rule.key),
            (attention.value, rule.value),
            (attention.gate, rule.query),
        ):
            if factor == 1.0 or name is None:  # `require` saw to it that values are there where they are scaled
                continue
            enter = partial(self._enter_attention, name, factor)
            self._handles.append(self._points[name].register_forward_pre_hook(this_thread_only(enter)))
            self.checks.expect(name, attention.layer)
            if factor != 0.0:
                scale = partial(_scale_gradient, factor)
                self._handles.append(self._points[name].register_full_backward_pre_hook(scale))
        if rule.temperature != 1.0:
            assert attention.scores is not None and attention.pattern is not None
            piece = SoftmaxPiece(SoftmaxRule(rule.temperature))
            self._install_piece(piece, (attention.scores,), attention.pattern, attention.layer)

    def _enter_attention(
        self, name: str, factor: float, module: Any, arguments: tuple[Tensor, ...]
    ) -> tuple[Tensor, ...] | None:
        self.checks.fired(name)
        return (arguments[0].detach(), *arguments[1:]) if factor == 0.0 else None


def _run_last(hook_id: int, module: nn.Module, arguments: Any) -> None:
    """Before a hook point is entered: our reading hook goes behind any hook that was added after it."""
    hooks = module._forward_hooks
    if next(reversed(hooks)) != hook_id:
        hooks.move_to_end(hook_id)  # pyright: ignore[reportAttributeAccessIssue]


def _do_nothing(value: Tensor, hook: Any) -> None:
    """A TransformerLens hook whose presence makes a hook point fire."""


def _scale_gradient(factor: float, module: Any, gradients: tuple[Tensor | None, ...]) -> tuple[Tensor | None, ...]:
    return tuple(None if g is None else g * factor for g in gradients)
