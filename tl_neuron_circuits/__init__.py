"""Neuron circuits with RelP on any TransformerLens model."""

from . import bases as bases
from . import tasks as tasks
from . import transcoders as transcoders
from ._errors import NeuronCircuitsError as NeuronCircuitsError
from .attribution import NodeScores as NodeScores
from .attribution import attribute as attribute
from .bases import Dictionary as Dictionary
from .bases import as_dictionary as as_dictionary
from .bases import load_demo_dictionaries as load_demo_dictionaries
from .bases import load_dictionary as load_dictionary
from .bases import save_dictionary as save_dictionary
from .circuits import Circuit as Circuit
from .circuits import trace as trace
from .evaluation import Agreement as Agreement
from .evaluation import Comparison as Comparison
from .evaluation import SparsityCurve as SparsityCurve
from .evaluation import agreement as agreement
from .evaluation import compare as compare
from .evaluation import evaluate as evaluate
from .models import load_demo_model as load_demo_model
from .propagation import ModelReport as ModelReport
from .propagation import check_model as check_model
from .propagation import relp as relp
from .tasks import PromptPairs as PromptPairs
from .tasks import TokenisedPairs as TokenisedPairs
