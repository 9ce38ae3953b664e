"""The errors of this package, apart from ValueError (a bad value or shape) and TypeError (a bad type)."""


class UnsupportedError(NotImplementedError):
    """The chosen backend cannot do what was asked for. The message names the backend, the request and the remedy."""


class BackendUnavailableError(RuntimeError):
    """The chosen backend cannot run here: no Triton, or tensors on a device that it does not know."""


class ShardedTensorError(TypeError):
    """A DTensor was given. These functions need the whole local tensor."""


class DoubleBackwardError(RuntimeError):
    """A gradient of a gradient was asked for."""
