"""Neuron circuits with RelP on any TransformerLens model."""

from ._errors import NeuronCircuitsError as NeuronCircuitsError
from .propagation import relp as relp
