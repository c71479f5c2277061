"""The sites of a model: which hook point is the gate, the neurons, a norm."""

from .._lazy import explain_old_names
from ._protocol import TransformerLensModel as TransformerLensModel

explain_old_names(__name__)
