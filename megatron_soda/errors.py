"""The one exception that users are meant to see."""


class SodaError(Exception):
    """Something the user can put right: the message says what was wrong, where, and what to do.

    The commands print the message alone, without a traceback, and exit with status 2. Everything else that
    is raised is a defect of ours and keeps its traceback.
    """
