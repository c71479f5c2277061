"""Circuits: chosen nodes, the edges between them, and what can be done with them."""

from ._circuit import Circuit as Circuit
from ._from_tables import from_tables as from_tables
from ._table import remainder_row as remainder_row
from ._trace import trace as trace
