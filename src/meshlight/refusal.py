"""The base of every error that is said to the user in one line: a mistake, or a circumstance and what to do."""


class Refusal(Exception):
    """Something that cannot be done; the message says what, why, and the next step. Never a traceback."""

    advice = ""
    """What to try, shown after the message on the command line."""
