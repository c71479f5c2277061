"""Every error of this package that is not a plain type or shape error.

Each message says what was expected, what came, and what to do.
"""


class NeuronCircuitsError(Exception):
    """The parent of every error this package raises on purpose.

    Example:
        >>> import tl_neuron_circuits as tnc
        >>> model = tnc.load_demo_model()
        >>> try:
        ...     tnc.attribute(model, tnc.PromptPairs(clean=["The dog"], answer=[" is near"]))
        ... except tnc.NeuronCircuitsError as error:
        ...     print(type(error).__name__)
        PairsError
    """


class UnsupportedModelError(NeuronCircuitsError):
    """The model lacks what a rule or a basis needs; `check_model(model)` lists what and why.

    Example:
        >>> import tl_neuron_circuits as tnc
        >>> from tl_neuron_circuits.models._protocol import hook_point
        >>> hook_point(tnc.load_demo_model(), "blocks.0.no_such_hook")
        Traceback (most recent call last):
        tl_neuron_circuits._errors.UnsupportedModelError: expected the hook point 'blocks.0.no_such_hook'; ...
    """


class PropagationError(NeuronCircuitsError):
    """A rule of relevance propagation did not apply as it must: the gradient would be silently wrong.

    Example:
        >>> import torch
        >>> import tl_neuron_circuits as tnc
        >>> model = tnc.load_demo_model()
        >>> with torch.no_grad(), tnc.relp(model):
        ...     logits = model("The dog")
        Traceback (most recent call last):
        tl_neuron_circuits._errors.PropagationError: expected gradients to be enabled; relp was entered under ...
    """


class PairsError(NeuronCircuitsError):
    """Prompts, answers or their tokens do not fit together.

    Example:
        >>> import tl_neuron_circuits as tnc
        >>> model = tnc.load_demo_model()
        >>> tnc.attribute(model, tnc.PromptPairs(clean=["The dog"], answer=[" is near"]))
        Traceback (most recent call last):
        tl_neuron_circuits._errors.PairsError: pair 0 ('The dog'): the answer ' is near' ...
    """


class NumericalError(NeuronCircuitsError):
    """A number that should be finite, or non-zero, is not.

    Example:
        >>> import tl_neuron_circuits as tnc
        >>> model, pairs = tnc.load_demo_model(), tnc.tasks.subject_verb_agreement("simple", n=2)
        >>> tnc.attribute(model, pairs, metric=lambda logits, batch: logits[:, -1, 0] / 0)
        Traceback (most recent call last):
        tl_neuron_circuits._errors.NumericalError: metric ...
    """


class FileFormatError(NeuronCircuitsError):
    """A saved file is missing, truncated, foreign, or of another schema.

    Example:
        >>> import tl_neuron_circuits as tnc
        >>> tnc.NodeScores.load("no such folder")
        Traceback (most recent call last):
        tl_neuron_circuits._errors.FileFormatError: expected saved scores at no such folder, but scores.safetensors ...
    """


class SaveError(NeuronCircuitsError, OSError):
    """A file could not be written: a full or read-only disk, or no permission. What was there before is unchanged.

    `errno` is that of the system's error.

    Example:
        >>> import tl_neuron_circuits as tnc
        >>> pairs = tnc.PromptPairs(clean=["The dog"], answer=[" is"])
        >>> pairs.to_jsonl("/proc/pairs.jsonl")
        Traceback (most recent call last):
        tl_neuron_circuits._errors.SaveError: /proc/pairs.jsonl could not be written ...
    """


class DictionaryError(NeuronCircuitsError):
    """A sparse dictionary (SAE or transcoder) does not fit the model or is of an unknown kind.

    Example:
        >>> import tl_neuron_circuits as tnc
        >>> tnc.as_dictionary("a text")
        Traceback (most recent call last):
        tl_neuron_circuits._errors.DictionaryError: str is not a dictionary: it lacks decode, ...
    """


class SettingsError(NeuronCircuitsError):
    """Arguments of a call contradict each other or ask for what cannot be done.

    Example:
        >>> import tl_neuron_circuits as tnc
        >>> model = tnc.load_demo_model()
        >>> tnc.steer(model, "The dog", ["L2/N5"], scale=0, value=1.0)
        Traceback (most recent call last):
        tl_neuron_circuits._errors.SettingsError: expected exactly one of scale, value and add; got ...
    """


class ProcessesError(NeuronCircuitsError):
    """Another of the processes that share the work raised, died, hangs, or made another call.

    `told`: whether the other processes already know, or cannot be reached.

    Example:
        >>> import tl_neuron_circuits as tnc
        >>> issubclass(tnc.ProcessesError, tnc.NeuronCircuitsError)
        True
    """

    def __init__(self, message: str, *, told: bool = False) -> None:
        super().__init__(message)
        self.told = told
