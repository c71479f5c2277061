"""Circuits: chosen nodes, the edges between them, and what can be done with them."""

from ._circuit import Circuit as Circuit
from ._trace import trace as trace
