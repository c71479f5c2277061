"""Circuits: chosen nodes, the edges between them, and what can be done with them."""

from ._choose import ByMass as ByMass
from ._choose import ByShare as ByShare
from ._circuit import Circuit as Circuit
from ._explained import ByExplained as ByExplained
from ._neuron_lists import compare_with_neuron_list as compare_with_neuron_list
from ._trace import trace as trace
