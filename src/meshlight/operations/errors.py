"""What a verb could not do, said so that its user can go on."""

from __future__ import annotations

from meshlight.refusal import Refusal


class OperationError(Refusal):
    """The message says what was expected, what was found and what to do next."""
