"""The errors a user can meet. The command line prints them as one line and exits with 2.

::

    ToolError
    ├── UsageError          a value the user gave is not allowed
    ├── ProfileError        a TOML profile or a `--set` key is wrong
    ├── CheckpointError     the checkpoint cannot be read, or is not one we know
    ├── ArtifactError       an artifact is incomplete, altered or of another schema
    ├── Unsupported         a combination that cannot work, with the reason
    ├── MissingDependency   a package is not installed, with the pip line (also an ImportError)
    ├── ParityError         an export differs from its reference by more than its tolerance
    └── NumericsError       a component returned NaN, infinity or a degenerate image

Anything else that escapes is a defect of ours and keeps its traceback.
"""

from __future__ import annotations


class ToolError(Exception):
    """Base of every error that is the user's to solve. The message is one line."""


class UsageError(ToolError, ValueError):
    """A value is not allowed; the message names it, what is allowed and what to do next."""


class ProfileError(ToolError, ValueError):
    """A profile or an override has an unknown key or a wrong value."""


class CheckpointError(ToolError):
    """The checkpoint is missing, truncated, pickled or of an unknown class."""


class ArtifactError(ToolError):
    """The artifact on disk is not what its manifest says."""


class Unsupported(ToolError):
    """The combination asked for cannot work; the message says why and what does."""


class MissingDependency(ToolError, ImportError):
    """An optional package is not installed."""


class ParityError(ToolError):
    """An exported component differs from its reference by more than its tolerance."""


class NumericsError(ToolError):
    """A component produced NaN, infinity or a picture without content."""
