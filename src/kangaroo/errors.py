"""Everything a user can get wrong, as one tree of exceptions.

    KangarooError
    ├── ConfigError        a setting that cannot be: exit layer out of range, temperature < 0, unknown recipe key
    ├── ModelError         a target this library cannot run exactly: unsupported family, NaN weights
    ├── AdapterError       an adapter that is damaged or was trained for something else
    ├── DataError          a malformed row, an empty file, a prompt that does not fit the context
    ├── CapacityError      a batch that does not fit in memory
    ├── QueueFull          an engine with more requests than it lets wait
    └── EngineClosed       an engine that takes no more requests

Each message says what was wrong, what was got and what to do. Broken invariants of our own are asserts, never these.
"""


class KangarooError(Exception):
    """Base of every error a user can cause; the command line prints it as one line and exits with 2."""


class ConfigError(KangarooError):
    """A setting that cannot be honoured."""


class ModelError(KangarooError):
    """A target model this library cannot run exactly."""


class AdapterError(KangarooError):
    """An adapter that is damaged, or that belongs to another target."""


class DataError(KangarooError):
    """Text, prompts or a data file that cannot be used as given."""


class CapacityError(KangarooError):
    """More memory asked for than the device has."""


class QueueFull(KangarooError):
    """An engine has as many requests waiting as it lets wait."""

    def __init__(self, message: str, retry_after: float):
        """`retry_after` is in how many seconds one may have found its way in."""
        super().__init__(message)
        self.retry_after = retry_after


class EngineClosed(KangarooError):
    """An engine that is closing, or closed, takes no requests, and has broken off those it had."""
