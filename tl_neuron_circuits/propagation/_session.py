"""One installation of the rules on a model: which hook does what, and its removal.

Hooks that replace a value run first at their hook point (prepended), hooks that read one run last, so that whatever the
user attached before is seen. Reads and replacements of one layer meet in `_inputs`, emptied as soon as they are used.
"""

import functools
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor

from .._errors import PropagationError
from ..models._protocol import TransformerLensModel, submodule
from ..models._sites import MLPSites, ModelSites, NormSites, bias_after_product
from ._activations import Activation, find_activation
from ._checks import Checks
from ._linear import end_linears, others_hooks, skip_zero_rows
from ._norms import FrozenNorm, is_opaque, read_norm
from ._relay import Gradients, Mailbox, Relay, times
from ._rules import RULES, AttentionRule, HalfRule, IdentityRule, LnRule
from ._unsaved import Unsaved

Hook = Callable[..., Tensor | None]


class Session:
    """The rules installed on one model, from `install` to `remove`."""

    def __init__(
        self,
        model: TransformerLensModel,
        points: dict[str, Any],
        sites: ModelSites,
        rules: tuple[str, ...],
        stabilizer: float | None,
    ) -> None:
        self.model, self.sites, self.stabilizer = model, sites, stabilizer
        self._points = points  # looked up once: TransformerBridge builds them anew every time
        self.rules = {name: RULES[name] for name in rules}
        self.mailbox, self.unsaved = Mailbox(), Unsaved()
        self._inputs: dict[str, Tensor] = {}
        self._installed: list[tuple[Any, Any]] = []  # (hook point, TransformerLens' handle)
        self._raw_handles: list[Any] = []
        self._inside: dict[str, Any] = {}  # handles at hook points inside norms
        self._frozen: list[Tensor] = []
        self._expected: dict[str, int] = {}
        self.checks = Checks(self._expected, slack=0.0 if stabilizer is None else 1e-3)

    def install(self) -> None:
        self._frozen = [p for p in self.model.parameters() if p.requires_grad]
        for parameter in self._frozen:
            parameter.requires_grad_(False)
        for name in self.sites.embeddings:
            if name == "hook_embed" or self.model.cfg.positional_embedding_type == "standard":
                point = self._points[name]
                self._raw_handles.append(point.register_forward_pre_hook(self._make_leaf))
        if "ln" in self.rules:
            for norm in self.sites.norms:
                self._install_norm(norm)
        if "attention" in self.rules:
            for site in self.sites.attentions:
                for name in (site.query, site.key):
                    self._add(name, partial(self._cut, name), first=True, layer=site.layer)
        if "identity" in self.rules or "half" in self.rules:
            for mlp in self.sites.mlps:
                self._install_mlp(mlp)
        end = self._points[self.sites.last]
        self._raw_handles.append(end.register_forward_hook(self._end_of_forward))
        if self.rules:  # without any, the gradient is torch's own bit for bit
            for linear in end_linears(self.model, self.sites.n_layers):
                self._raw_handles.append(skip_zero_rows(linear, lambda: self._own))

    def remove(self) -> bool:
        """Take everything off again; True if all of our hooks were still there."""
        self.unsaved.close()
        complete = True
        for point, handle in self._installed:
            if handle in point.fwd_hooks:
                point.fwd_hooks.remove(handle)
            else:
                complete = False
            handle.hook.remove()
        for raw in (*self._raw_handles, *self._inside.values()):
            raw.remove()
        for parameter in self._frozen:
            parameter.requires_grad_(True)
        self._installed, self._raw_handles, self._frozen = [], [], []
        self._inputs.clear()
        self._inside.clear()
        self.mailbox.empty()
        return complete

    @functools.cached_property
    def _own(self) -> set[int]:
        """Ids of our hooks, read when all are installed."""
        return {raw.id for raw in (*self._raw_handles, *(handle.hook for _, handle in self._installed))}

    def _add(self, name: str, hook: Hook, *, first: bool, layer: int | None) -> None:
        point = self._points[name]
        point.add_hook(hook, dir="fwd", prepend=first)
        self._installed.append((point, point.fwd_hooks[0 if first else -1]))
        if layer is not None:
            self._expected[name] = layer

    def _receive(self, name: str, *, replace: bool = False) -> None:
        """Let hook point `name` take gradients out of the mailbox."""
        address = self.mailbox.address
        note = lambda module, inputs, value: address(name, value)  # noqa: E731
        self._raw_handles += [self._points[name].register_forward_hook(note), self._receiver(name, replace=replace)]

    def _receiver(self, name: str, *, replace: bool) -> Any:
        deliver = self.mailbox.deliver
        point = self._points[name]
        return point.register_full_backward_pre_hook(lambda _, gradients: deliver(name, gradients, replace=replace))

    def _receive_inside(self, names: list[str]) -> None:
        """Let hook points inside a norm receive while a backward hook makes the Bridge compute it step by step.

        Not otherwise: receiving wraps the value, which the Bridge would take for an edit of it.
        """
        stepwise = any(self._points[name].bwd_hooks for name in names)
        for name in names:
            if stepwise and name not in self._inside:
                self._inside[name] = self._receiver(name, replace=True)
            elif not stepwise and name in self._inside:
                self._inside.pop(name).remove()

    def _read(self, name: str, layer: int) -> None:
        self._add(name, partial(self._note, name), first=False, layer=layer)

    def _note(self, name: str, value: Tensor, hook: Any) -> None:
        self.checks.fired(name)
        self._inputs[name] = value.detach()

    def _take(self, name: str, asked_by: str) -> Tensor:
        if name not in self._inputs:
            raise PropagationError(f"expected {name} to fire before {asked_by}; it did not. Was reset_hooks() called?")
        return self._inputs.pop(name)

    def _make_leaf(self, module: Any, arguments: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        """Frozen parameters leave no graph without a leaf; backward hooks would then capture nothing, silently.

        The leaf comes before the hook point, so that torch does not warn of a backward hook there, and is copied, so
        that a user's hook may edit the embeddings in place.
        """
        self.unsaved.close()  # a forward pass that was broken off left it open
        if not torch.is_grad_enabled():
            raise PropagationError(
                "expected gradients to be enabled inside relp; the model was run under torch.no_grad() or "
                "inference_mode(). Run it outside relp, where the values are the same."
            )
        value = arguments[0]
        return arguments if value.requires_grad else (value.detach().requires_grad_(True).clone(), *arguments[1:])

    def _end_of_forward(self, module: Any, arguments: tuple[Tensor, ...], output: Any) -> None:
        self._inputs.clear()
        self.checks.verify(whole_forward=True)
        if not arguments[0].requires_grad:
            raise PropagationError(
                "expected the forward pass to leave a graph; it did not, so no gradient would reach any hook. A hook "
                "replaces the embeddings, or start_at_layer was given a residual, without requires_grad: set it."
            )

    # --- attention ---

    def _cut(self, name: str, value: Tensor, hook: Any) -> Tensor:
        rule = self.rules["attention"]
        assert isinstance(rule, AttentionRule)
        self.checks.fired(name)
        return rule.cut(value)

    # --- norms ---

    def _install_norm(self, norm: NormSites) -> None:
        parts = norm.path.split(".")
        layer = int(parts[1]) if parts[0] == "blocks" else (self.sites.n_layers if norm.path == "ln_final" else -1)
        if norm.input is None or norm.output is None or not is_opaque(self.model, norm.path):
            self._add(norm.scale, partial(self._detach, norm.scale), first=True, layer=layer)
            return
        frozen = read_norm(self.model, norm.path)
        if frozen is None:
            return
        self._read(norm.input, layer)
        self._receive(norm.input, replace=True)
        inside = [name for name in (norm.normalized, norm.scale) if name is not None]
        start = self._points[norm.input]
        self._raw_handles.append(start.register_forward_hook(lambda *_: self._receive_inside(inside)))
        self._add(norm.output, self._relay_norm(norm, frozen), first=True, layer=layer)

    def _detach(self, name: str, value: Tensor, hook: Any) -> Tensor:
        self.checks.fired(name)
        return value.detach()

    def _relay_norm(self, norm: NormSites, frozen: FrozenNorm) -> Hook:
        rule = self.rules["ln"]
        assert isinstance(rule, LnRule) and norm.input is not None and norm.output is not None
        source, target = norm.input, norm.output
        heard = self._listening(f"{norm.path}.", source, target)

        self._forget_inside(norm.path, (source,), target)

        def relay(value: Tensor, hook: Any) -> Tensor:
            self.unsaved.close()
            self.checks.fired(target)
            rebuilt, scale = frozen.rebuild(self._take(source, target))
            self.checks.rebuilt(target, rebuilt.to(value.dtype), value)
            del rebuilt

            def share(gradient: Tensor) -> Gradients:
                gradient = gradient.to(scale.dtype)
                weight = frozen.weight.to(gradient)
                gradients = {source: rule.gradient(gradient, weight, scale, frozen.centered)}
                # A backward hook on these two makes TransformerBridge compute the norm step by step: show it the truth.
                if norm.normalized is not None and self._points[norm.normalized].bwd_hooks:
                    gradients[norm.normalized] = gradient * weight
                if self._points[norm.scale].bwd_hooks:
                    gradients[norm.scale] = torch.zeros_like(scale)
                return gradients

            return Relay.apply(value, frozen.bias, share, self.mailbox, heard)  # pyright: ignore[reportReturnType]

        return relay

    # --- MLPs ---

    def _install_mlp(self, mlp: MLPSites) -> None:
        if mlp.up is None and "identity" not in self.rules:
            return  # the half rule is about products only
        activation = find_activation(self.model, mlp.layer)
        self._read(mlp.pre, mlp.layer)
        self._receive(mlp.pre)
        if mlp.up is None:
            self._add(mlp.activated, self._relay_activation(mlp, activation), first=True, layer=mlp.layer)
            return
        self._read(mlp.up, mlp.layer)
        self._receive(mlp.up)
        bias = bias_after_product(self.model, mlp.layer)
        self._add(mlp.post, self._relay_product(mlp, activation, bias), first=True, layer=mlp.layer)

    def _coefficient(
        self, rule: IdentityRule, activation: Activation, pre: Tensor, activated: Tensor | None
    ) -> Callable[[], Tensor]:
        """The constant of the identity rule, in memory that the caller may overwrite: one large buffer at a time.

        It is computed anew at every call where its closed form allows: kept from the forward to the backward pass it
        would be the largest tensor that relp adds to the graph.
        """

        def compute() -> Tensor:
            with torch.no_grad():
                return rule.ratio(activation, pre, activated, self.stabilizer)

        if activation.ratio is not None and self.stabilizer is None:
            activated = None  # not needed then
            return compute
        kept = compute()
        return kept.clone

    def _forget_inside(self, path: str, starts: tuple[str, ...], *ends: str) -> None:
        """Let autograd keep nothing of a piece, from where the last of its inputs was read to where its relay closes.

        Not where somebody may need it: a hook inside the piece, or one that runs after ours at an input.
        """
        outer = {id(self._points[name]) for name in (*starts, *ends)}
        piece = submodule(self.model, path)
        inside = [part for part in (piece.modules() if piece else ()) if part is not piece and id(part) not in outer]
        points = [self._points[name] for name in starts]
        last: list[int] = []

        def opened(*_: Any) -> None:
            read = all(name in self._inputs for name in starts)
            alone = all(next(reversed(p._forward_hooks)) in last for p in points)
            if read and alone and not any(others_hooks(part, self._own) for part in inside):
                self.unsaved.open()

        handles = [point.register_forward_hook(opened) for point in points]
        last += [handle.id for handle in handles]
        self._raw_handles += handles

    def _listening(self, prefix: str, *ends: str | None) -> Callable[[], bool]:
        """Whether a backward hook sits inside the piece with these ends."""
        known = {id(self._points[name]) for name in ends if name is not None}
        inside = [p for name, p in self._points.items() if name.startswith(prefix) and id(p) not in known]
        return lambda: any(point.bwd_hooks for point in inside)

    def _relay_activation(self, mlp: MLPSites, activation: Activation) -> Hook:
        rule = self.rules["identity"]
        assert isinstance(rule, IdentityRule)

        heard = self._listening(f"blocks.{mlp.layer}.mlp.", mlp.pre, mlp.up, mlp.activated, mlp.post)
        self._forget_inside(f"blocks.{mlp.layer}.mlp", (mlp.pre,), mlp.activated, mlp.post)

        def relay(value: Tensor, hook: Any) -> Tensor:
            alone = self.unsaved.close()
            some = _some_rows if alone else _all_rows
            self.checks.fired(mlp.activated)
            pre = self._take(mlp.pre, mlp.activated)
            ratio = self._coefficient(rule, activation, pre, value)
            rows, seen = some(pre), some(value.detach())
            with torch.no_grad():
                rebuilt = rule.ratio(activation, rows, seen, self.stabilizer).mul_(rows)
            self.checks.rebuilt(mlp.activated, rebuilt, seen, whole=value)
            share = lambda gradient: {mlp.pre: times(ratio(), gradient)}  # noqa: E731
            return Relay.apply(value, None, share, self.mailbox, heard, alone)  # pyright: ignore[reportReturnType]

        return relay

    def _relay_product(self, mlp: MLPSites, activation: Activation, bias: Tensor | None) -> Hook:
        identity, half = self.rules.get("identity"), self.rules.get("half")
        share = half.share if isinstance(half, HalfRule) else 1.0
        pre, up = mlp.pre, mlp.up
        assert up is not None
        heard = self._listening(f"blocks.{mlp.layer}.mlp.", mlp.pre, mlp.up, mlp.activated, mlp.post)
        self._forget_inside(f"blocks.{mlp.layer}.mlp", (pre, up), mlp.post)

        def relay(value: Tensor, hook: Any) -> Tensor:
            alone = self.unsaved.close()
            some = _some_rows if alone else _all_rows
            self.checks.fired(mlp.post)
            gate, linear = self._take(pre, mlp.post), self._take(up, mlp.post)
            ratio = None
            if isinstance(identity, IdentityRule):
                ratio = self._coefficient(identity, activation, gate, None)
            with torch.no_grad():
                rows, factor = some(gate), some(linear)
                if isinstance(identity, IdentityRule):
                    product = identity.ratio(activation, rows, None, self.stabilizer).mul_(rows).mul_(factor)
                else:
                    product = activation.apply(rows) * factor
                product = product if bias is None else product.add_(bias)
                self.checks.rebuilt(mlp.post, product, some(value.detach()), whole=value)
                del product

            def send(gradient: Tensor) -> Gradients:
                gradient = gradient * share
                slope = _derivative(activation, gate) if ratio is None else ratio()
                activated = activation.apply(gate).clone() if ratio is None else gate * slope
                return {pre: times(slope * linear, gradient), up: times(activated, gradient)}

            return Relay.apply(value, bias, send, self.mailbox, heard, alone)  # pyright: ignore[reportReturnType]

        return relay


def _all_rows(value: Tensor) -> Tensor:
    return value


def _some_rows(value: Tensor) -> Tensor:
    """Every eighth position: enough to see that a rule knows the function, where no hook can change single values."""
    return value.flatten(0, -2)[::8]


def _derivative(activation: Activation, pre: Tensor) -> Tensor:
    """f'(pre): the slope of the gate where the half rule is used without the identity rule."""
    with torch.enable_grad():
        leaf = pre.detach().requires_grad_(True)
        (slope,) = torch.autograd.grad(activation.apply(leaf).sum(), leaf)
    return slope
