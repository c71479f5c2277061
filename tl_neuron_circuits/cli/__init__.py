"""The command line: thin, every command a call of the Python interface with the same words.

Exit codes: 0 done; 1 the model, or a computation, failed a check; 2 bad input; 130 interrupted.
"""

from ._main import main as main
