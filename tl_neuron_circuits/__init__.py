"""Neuron circuits with RelP on any TransformerLens model."""
