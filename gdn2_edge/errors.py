"""The errors a caller may meet. Each message says what was found, what was expected and the next step."""


class Gdn2EdgeError(Exception):
    """Root of every error raised on purpose; the command line prints it as one sentence and exits with 1."""


class CheckpointError(Gdn2EdgeError):
    """A checkpoint file or folder cannot be read, does not fit together, or cannot be written."""


class SpecError(Gdn2EdgeError):
    """A model configuration is incomplete, out of range or contradicts the tensors beside it."""


class FormatError(Gdn2EdgeError):
    """A quantization format or recipe is unknown or cannot hold a tensor."""


class SessionError(Gdn2EdgeError):
    """A session file cannot be read, belongs to another model, or cannot do what was asked."""


class BackendError(Gdn2EdgeError):
    """A device, runtime or optional package that was asked for is missing or gave an impossible result."""
