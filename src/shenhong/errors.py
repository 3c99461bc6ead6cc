"""Errors for people: each is one line that says what, where and the remedy; the command line exits with 2.

Internal invariants use ``assert``; whatever a person can cause (a file, a recipe, a prompt) raises one of these.
"""


class ShenhongError(Exception):
    """Base of everything a person can cause and mend."""


class UsageError(ShenhongError):
    """The command line names an unknown verb or flag, or lacks an argument."""


class RecipeError(ShenhongError):
    """A setting is unknown, of the wrong type, out of bounds, or impossible together with another."""


class DataError(ShenhongError):
    """A corpus file is missing, empty, damaged or not text."""


class ModelError(ShenhongError):
    """A model folder, its configuration, its tensors or its tokenizer do not fit together."""


class CheckpointError(ShenhongError):
    """A checkpoint is truncated, corrupted or of another run."""


class RunError(ShenhongError):
    """A run folder is in use, of another version, or was made under other conditions."""


class TrainingError(ShenhongError):
    """Training met a NaN or a loss spike and stopped; the last good checkpoint is kept."""


class RequestError(ShenhongError):
    """A prompt or a sampling setting cannot be honoured. ``param`` and ``code``: as an API names what is wrong."""

    def __init__(self, message: str, param: str | None = None, code: str | None = None) -> None:
        super().__init__(message)
        self.param, self.code = param, code


class ServeError(ShenhongError):
    """An address, a key file, a database or a chat template cannot be used to serve."""
