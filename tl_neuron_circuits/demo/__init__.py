"""The demo models, their world and their dictionaries; `tl-neuron-circuits demo` does the main job on them."""

from ._capitals import capitals as capitals
from ._dictionaries import load_demo_dictionaries as load_demo_dictionaries
from ._models import load_demo_model as load_demo_model
