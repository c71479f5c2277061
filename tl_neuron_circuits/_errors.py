"""Every error of this package that is not a plain type or shape error.

Each message says what was expected, what came, and what to do.
"""


class NeuronCircuitsError(Exception):
    """The parent of every error this package raises on purpose."""


class UnsupportedModelError(NeuronCircuitsError):
    """The model lacks what a rule or a basis needs; `check_model(model)` lists what and why."""


class PropagationError(NeuronCircuitsError):
    """A rule of relevance propagation did not apply as it must: the gradient would be silently wrong."""


class PairsError(NeuronCircuitsError):
    """Prompts, answers or their tokens do not fit together."""


class NumericalError(NeuronCircuitsError):
    """A number that should be finite, or non-zero, is not."""


class FileFormatError(NeuronCircuitsError):
    """A saved file is missing, truncated, foreign, or of another schema."""


class DictionaryError(NeuronCircuitsError):
    """A sparse dictionary (SAE or transcoder) does not fit the model or is of an unknown kind."""


class SettingsError(NeuronCircuitsError):
    """Arguments of a call contradict each other or ask for what cannot be done."""


class ProcessesError(NeuronCircuitsError):
    """Another of the processes that share the work raised, died, hangs, or made another call.

    `told`: the other processes know already, or cannot be reached.
    """

    def __init__(self, message: str, *, told: bool = False) -> None:
        super().__init__(message)
        self.told = told
