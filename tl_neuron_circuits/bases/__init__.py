"""Where nodes live: neurons, MLP outputs, attention outputs, the residual stream, dictionaries."""

from ._activations import ACTIVATION_BASES as ACTIVATION_BASES
from ._activations import AttentionOutputs as AttentionOutputs
from ._activations import AttentionWrites as AttentionWrites
from ._activations import MLPOutputs as MLPOutputs
from ._activations import Neurons as Neurons
from ._activations import ResidualStream as ResidualStream
from ._runs import Values as Values
from ._runs import capture as capture
from ._runs import fired as fired
from ._runs import logits_of as logits_of
from ._runs import mean_parts as mean_parts
from ._runs import reads_of as reads_of
from ._runs import run_values as run_values
from ._runs import take_apart as take_apart
from ._site import Basis as Basis
from ._site import Parts as Parts
from ._site import Site as Site
from ._site import name_of as name_of
from ._site import sites_of as sites_of
