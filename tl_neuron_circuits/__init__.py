"""Neuron circuits with RelP on any TransformerLens model.

`__init__.pyi` beside this file is the table of contents: every name it lists is imported when it is first used.
"""

from ._lazy import lazy_names
from ._version import __version__ as __version__

__getattr__, __dir__ = lazy_names(__name__, __file__)
