"""Every error that this package raises on purpose.

FlamingoExportError
├── InputError            what a user passed in a request: nothing was run
│   ├── ImageError        an image or video that cannot be used
│   ├── PromptError       a prompt, shots file or tokenizer that does not fit
│   └── CapacityError     longer than the cache, or more media than the bank
│       └── NoMemory      fits the bundle, but this machine has no memory for it now; a RequestRefused too
├── CheckpointError       weights or config that cannot become a bundle
├── CalibrationError      calibration data or a table that cannot be used
├── EvaluationError       a task, its data or its metric that cannot be evaluated
├── UnsupportedModel      a live model with parts that the builder does not know
├── BuildError            a build that cannot start or resume: output taken, disk full, another build running
├── BundleError           a bundle that is incomplete, altered or of a newer schema
├── BackendError          a backend that is not installed or cannot run here
│   ├── IncompatibleEngine  an engine for another version, device or plugin
│   └── BackendLost       a device that the process cannot use any more
├── RequestRefused        the engine does not take a request now, or gives it up; the same request may succeed later
│   ├── QueueFull         too many wait already
│   ├── DeadlineExceeded  it was not finished in time
│   └── EngineClosed      the model was closed; a BackendError too
└── ParityError           parity could not be established (a failed gate is a result, not an error)

The command line turns them into one line on stderr and exit code 1 (2 for usage); messages say what was found, what was
expected and what to do next.
"""

from __future__ import annotations


def pip_install(*extras: str) -> str:
    """How to get extras of this package. It is on no public index, so it is installed from its source folder."""
    return f"pip install '.[{','.join(extras)}]' in flamingo-export's source folder"


class FlamingoExportError(Exception):
    """Base of all errors below."""


class InputError(FlamingoExportError, ValueError):
    """A request that cannot be carried out as asked."""


class ImageError(InputError):
    """An image or video that cannot be read or is refused."""


class PromptError(InputError):
    """A prompt, shots file or tokenizer that does not fit the model or the media."""


class CapacityError(InputError):
    """A request that needs more cache slots or bank rows than there are."""


class CheckpointError(FlamingoExportError, ValueError):
    """Weights or configuration that cannot become a bundle."""


class CalibrationError(FlamingoExportError, ValueError):
    """Calibration data that give no statistics, or a table that is not of these weights."""


class EvaluationError(FlamingoExportError, ValueError):
    """A task, its data, its metric or earlier results that cannot be evaluated."""


class UnsupportedModel(FlamingoExportError, TypeError):
    """A live model with modules, hooks or forwards that the builder does not know."""


class BuildError(FlamingoExportError, RuntimeError):
    """A build that cannot start or resume."""


class BundleError(FlamingoExportError, RuntimeError):
    """A bundle that is incomplete, altered, or of a schema this version does not know."""


class BackendError(FlamingoExportError, RuntimeError):
    """A backend that is not installed or cannot run here."""


class IncompatibleEngine(BackendError):
    """An engine that was built for another version, device or plugin."""


class RequestRefused(FlamingoExportError, RuntimeError):
    """A request that the engine does not take now, or gives up. Nothing is wrong with it."""


class QueueFull(RequestRefused):
    """More requests wait than the engine keeps."""


class NoMemory(CapacityError, RequestRefused):
    """A request that the bundle has room for, and this machine no memory at the moment."""


class DeadlineExceeded(RequestRefused):
    """A request that was not finished by its deadline."""


class EngineClosed(RequestRefused, BackendError):
    """A request to a model that is closed, or was closed before it was finished."""


class BackendLost(BackendError):
    """A device that this process cannot use any more, as a GPU after an error that CUDA does not recover from. A new process may."""


class ParityError(FlamingoExportError, RuntimeError):
    """Parity could not be established."""


def first_line(error: BaseException) -> str:
    """The first line of an exception's text, for messages of one line; the name of its class where it has no text."""
    return (str(error).strip().splitlines() or [type(error).__name__])[0]


def named_line(error: BaseException) -> str:
    """The class of an exception and the first line of its text."""
    name, text = type(error).__name__, first_line(error)
    return name if text == name else f"{name}: {text}"
