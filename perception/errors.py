"""Every error a user can cause. The message says what was given, what was expected, and what to do."""


class PerceptionError(Exception):
    """The base of every error this project raises on purpose."""


class CheckpointError(PerceptionError, ValueError):
    """A file of weights that is missing, damaged, hostile, or not what the model needs."""


class ConfigError(PerceptionError, ValueError):
    """A setting that cannot be true."""


class UnknownName(PerceptionError, LookupError):
    """A name that nothing here has. The message has the nearest ones."""


class MediaError(PerceptionError, ValueError):
    """A picture or a video that cannot be read."""


class IndexError_(PerceptionError, ValueError):
    """A search index that cannot be read, or a query that does not fit it."""


class RequestError(PerceptionError, ValueError):
    """A request a server will not serve."""


class LimitError(PerceptionError, ValueError):
    """Input beyond a named limit: refused before it costs memory or time."""


class MissingExtra(PerceptionError, ImportError):
    """An optional package that is not installed, or does not work here."""


def missing_extra(package: str, extra: str, why: str | None = None) -> MissingExtra:
    """The error for an optional package, with the line that installs it."""
    because = f" ({why})" if why else ""
    return MissingExtra(
        f"this needs {package}, which could not be imported{because}; pip install 'perception-vision[{extra}]'"
    )
