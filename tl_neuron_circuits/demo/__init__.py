"""The demo models, their world and their dictionaries, and the main job on them from end to end."""

from ._capitals import capitals as capitals
from ._dictionaries import load_demo_dictionaries as load_demo_dictionaries
from ._models import load_demo_model as load_demo_model
from ._run import DemoResult as DemoResult
from ._run import run_demo as run_demo
