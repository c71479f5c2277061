"""The main job on a demo model, from end to end: what `tl-neuron-circuits demo` runs."""

from ._run import DemoResult as DemoResult
from ._run import run_demo as run_demo
