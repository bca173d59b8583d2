"""The one exception for a user's mistake, and how a script shows it."""

from __future__ import annotations

import sys
from collections.abc import Callable


class UserError(Exception):
    """A mistake only the user can mend; the message names the cure. Never for our own bugs."""


def run_script(main: Callable[[], int]) -> None:
    """Run a script's main and exit: 0 or its own status, 2 for a user's mistake, 130 for Ctrl-C.

    A UserError is one message on standard error; any other exception is ours and keeps its
    traceback.
    """
    try:
        status = main()
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        status = 2
    except KeyboardInterrupt:
        print("\nstopped", file=sys.stderr)
        status = 130
    sys.exit(status)
