"""The sites of a model: which hook point is the gate, the neurons, a norm."""

from ._protocol import TransformerLensModel as TransformerLensModel
