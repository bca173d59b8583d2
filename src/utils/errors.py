"""The one exception for a user's mistake, and how a script shows it."""

from __future__ import annotations

import os
import sys
from collections.abc import Callable


class UserError(Exception):
    """A mistake only the user can mend; the message names the cure. Never for our own bugs.

    Attributes:
        status: the exit status of the script that it ends.
    """

    def __init__(self, message: str, status: int = 2) -> None:
        super().__init__(message)
        self.status = status


def print_error(error: UserError) -> None:
    """Print the message of an error on standard error."""
    print(f"error: {printable(str(error))}", file=sys.stderr, flush=True)


def run_script(main: Callable[[], int]) -> None:
    """Run a script's main and exit: 0 or its own status, a UserError's, or 130 for Ctrl-C.

    A UserError is one message on standard error; any other exception is ours and keeps its
    traceback. What the screen's encoding has no character for is printed as its code.
    """
    sys.stdout.reconfigure(errors="backslashreplace")
    try:
        status = main()
        sys.stdout.flush()
    except UserError as error:
        print_error(error)
        status = error.status
    except KeyboardInterrupt:
        print("\nstopped", file=sys.stderr)
        status = 130
    except BrokenPipeError:  # whoever read the output has left, such as `| head`
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        status = 141
    sys.exit(status)


def printable(text: str) -> str:
    """`text` with the characters that could steer a terminal, line ends excepted, as their codes.

    Names of files and rows of caption files are other people's text.
    """
    if text.isprintable():
        return text
    return "".join(c if c.isprintable() or c == "\n" else c.encode("unicode_escape").decode()
                   for c in text)
