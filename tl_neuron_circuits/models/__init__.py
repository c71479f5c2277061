"""The models this package works on: their sites by role, and the two demo models it ships."""

from ._demo import DEMO_MODELS as DEMO_MODELS
from ._demo import demo_model_path as demo_model_path
from ._demo import load_demo_model as load_demo_model
from ._protocol import TransformerLensModel as TransformerLensModel
from ._protocol import hook_point as hook_point
from ._protocol import hook_points as hook_points
from ._protocol import submodule as submodule
from ._sites import AttentionSites as AttentionSites
from ._sites import MLPSites as MLPSites
from ._sites import ModelSites as ModelSites
from ._sites import NormSites as NormSites
from ._sites import Problem as Problem
from ._sites import activation_names as activation_names
from ._sites import bias_after_product as bias_after_product
from ._sites import find_sites as find_sites
from ._sites import require as require
