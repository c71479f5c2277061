"""Where nodes live: neurons, MLP outputs, attention outputs, the residual stream, dictionaries."""

from .._lazy import explain_old_names
from ._activations import AttentionBlockOutputs as AttentionBlockOutputs
from ._activations import HeadOutputs as HeadOutputs
from ._activations import MLPOutputs as MLPOutputs
from ._activations import Neurons as Neurons
from ._activations import ResidualStream as ResidualStream
from ._dictionary import Dictionary as Dictionary
from ._dictionary_basis import Dictionaries as Dictionaries
from ._dictionary_files import load_dictionary as load_dictionary
from ._dictionary_files import save_dictionary as save_dictionary
from ._dictionary_objects import as_dictionary as as_dictionary
from ._dictionary_variance import fraction_variance_unexplained as fraction_variance_unexplained
from ._load_dictionaries import load_dictionaries as load_dictionaries

explain_old_names(__name__)
