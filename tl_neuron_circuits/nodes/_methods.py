"""The methods of `attribute` by name, and the form in which a command line writes them.

relp                                  RelP()
relp(rules=ln+identity+half)          RelP(rules=("ln", "identity", "half"))
integrated_gradients(steps=20)        IntegratedGradients(steps=20)
"""

import dataclasses
import re
from typing import Any, Literal

from .._errors import SettingsError
from ..propagation.rules import RULE_SETS
from ._controls import ActivationDifference, Random
from ._integrated_gradients import IntegratedGradients, IntegratedGradientsInputs
from ._method import Method
from ._patching import Patching
from ._relp import Gradient, RelP

MethodName = Literal[
    "relp",
    "gradient",
    "integrated_gradients",
    "integrated_gradients_inputs",
    "patching",
    "activation_difference",
    "random",
]
METHODS: dict[str, type[Method]] = {
    method.name: method
    for method in (
        *(RelP, Gradient, IntegratedGradients, IntegratedGradientsInputs, Patching),
        *(ActivationDifference, Random),
    )
}


def as_method(method: str | Method) -> Method:
    """The method itself, or the one with default options that a name stands for.

    Raises:
        SettingsError: an unknown name.
    """
    return parse_method(method) if isinstance(method, str) else method


def parse_method(text: str) -> Method:
    """What a method's `label` says: `integrated_gradients(steps=20, rules=ln+half)`.

    Raises:
        SettingsError: the name or an option is unknown, or the text has another form.
    """
    form = re.fullmatch(r"\s*(\w+)\s*(?:\(([^()]*)\))?\s*", text)
    if form is None or form[1] not in METHODS:
        raise SettingsError(
            f"expected a method out of {list(METHODS)}, with options as in 'integrated_gradients(steps=20)'; got "
            f"{text!r}."
        )
    kind = METHODS[form[1]]
    known = [field.name for field in dataclasses.fields(kind) if field.name != "nodes"]
    options: dict[str, Any] = {}
    for part in (form[2] or "").split(",") if (form[2] or "").strip() else ():
        name, equals, value = (piece.strip() for piece in part.partition("="))
        if not equals or name not in known or not value:
            raise SettingsError(f"expected options of {form[1]} out of {known}, as name=value; got {part.strip()!r}.")
        options[name] = _read(name, value)
    return kind(**options)


def _read(name: str, value: str) -> Any:
    if name == "rules":
        return value if value in RULE_SETS else tuple(value.split("+"))
    try:
        return float(value) if name == "stabilizer" else int(value)
    except ValueError:
        raise SettingsError(f"expected a number for {name}; got {value!r}.") from None
