"""Table of contents: what `import tl_neuron_circuits as tnc` gives, each name imported when it is first used."""

from ._version import __version__ as __version__

# Rooms.
from . import bases as bases
from . import circuits as circuits
from . import cli as cli
from . import components as components
from . import demo as demo
from . import evaluation as evaluation
from . import explain as explain
from . import interventions as interventions
from . import lasso as lasso
from . import models as models
from . import nodes as nodes
from . import plots as plots
from . import propagation as propagation
from . import tasks as tasks
from . import transcoders as transcoders

# Models, and relevance propagation on them.
from .demo._dictionaries import load_demo_dictionaries as load_demo_dictionaries
from .demo._models import load_demo_model as load_demo_model
from .propagation._check_model import ModelReport as ModelReport
from .propagation._check_model import check_model as check_model
from .propagation._relp import relp as relp

# Pairs of prompts.
from .tasks._pairs import PromptPairs as PromptPairs
from .tasks._tokenized import TokenizedPairs as TokenizedPairs

# Scores of nodes.
from .nodes._attribute import attribute as attribute
from .nodes._attribute import estimate_memory as estimate_memory
from .nodes._scores import NodeScores as NodeScores

# Methods with options, and the form in which a command line writes them.
from .nodes._relp import RelP as RelP
from .nodes._relp import Gradient as Gradient
from .nodes._integrated_gradients import IntegratedGradients as IntegratedGradients
from .nodes._integrated_gradients import IntegratedGradientsInputs as IntegratedGradientsInputs
from .nodes._patching import Patching as Patching
from .nodes._learned_mask import LearnedMask as LearnedMask
from .nodes._mask_gradient import MaskGradient as MaskGradient
from .nodes._controls import ActivationDifference as ActivationDifference
from .nodes._controls import Random as Random

# Dictionaries: SAEs and transcoders.
from .bases._dictionary import Dictionary as Dictionary
from .bases._dictionary_files import load_dictionary as load_dictionary
from .bases._dictionary_files import save_dictionary as save_dictionary
from .bases._dictionary_objects import as_dictionary as as_dictionary

# Circuits, and how many nodes they have.
from .circuits._circuit import Circuit as Circuit
from .circuits._trace import trace as trace
from .circuits._choose import ByMass as ByMass
from .circuits._explained import ByExplained as ByExplained
from .circuits._choose import ByShare as ByShare

# How good scores and circuits are.
from .evaluation._compare import compare as compare
from .evaluation._compare_with_patching import compare_with_patching as compare_with_patching
from .evaluation._comparison import Comparison as Comparison
from .evaluation._curve import SparsityCurve as SparsityCurve
from .evaluation._evaluate import evaluate as evaluate
from .evaluation._reliability import reliability as reliability
from .evaluation._stability import stability as stability

# What nodes do, and what they are about.
from .interventions._direct_logit_effects import direct_logit_effects as direct_logit_effects
from .interventions._steering import steering_hooks as steering_hooks
from .interventions._steer import SteeringResult as SteeringResult
from .interventions._steer import interchange as interchange
from .interventions._steer import steer as steer
from .interventions._sweep import sweep as sweep
from .interventions._steer import node_values as node_values
from .explain._cluster import cluster as cluster
from .explain._describe import describe as describe
from .explain._max_activating_examples import max_activating_examples as max_activating_examples
from .explain._node_details import node_details as node_details
from .explain._profiles import profiles as profiles
from .explain._prompt_scores import prompt_scores as prompt_scores
from .explain._score_features import score_features as score_features

# Several processes, and errors.
from ._processes import single_process as single_process
from ._errors import DictionaryError as DictionaryError
from ._errors import FileFormatError as FileFormatError
from ._errors import NeuronCircuitsError as NeuronCircuitsError
from ._errors import NumericalError as NumericalError
from ._errors import PairsError as PairsError
from ._errors import ProcessesError as ProcessesError
from ._errors import PropagationError as PropagationError
from ._errors import SaveError as SaveError
from ._errors import SettingsError as SettingsError
from ._errors import UnsupportedModelError as UnsupportedModelError
