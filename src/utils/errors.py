"""The exception for mistakes of the user, and how a script reports it."""

from __future__ import annotations

import os
import sys
from collections.abc import Callable

SHOWN_NAMES = 3  # names in a message that counts more


class UserError(Exception):
    """An error that only the user can correct; the message says how. Not for bugs of this code.

    Attributes:
        status: exit status of the script.
    """

    def __init__(self, message: str, status: int = 2) -> None:
        super().__init__(message)
        self.status = status


def print_error(error: UserError) -> None:
    """Print the message of an error on standard error."""
    print(f"error: {printable(str(error))}", file=sys.stderr, flush=True)


def run_script(main: Callable[[], int]) -> None:
    """Run the main function of a script and exit with the status that it returns.

    A UserError is printed as one message, without a traceback, and gives its own status; Ctrl-C
    gives 130. Characters that the encoding of standard output lacks are escaped.
    """
    if sys.stdout is None:  # closed by the shell, as in >&-
        print("note: standard output is closed", file=sys.stderr)
        sys.stdout = open(os.devnull, "w")
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
    except BrokenPipeError:  # the reader of the output has exited, as in `| head`
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        status = 141
    sys.exit(status)


def printable(text: str) -> str:
    """Escape all characters of `text` that could control a terminal, except newlines.

    File names and caption files are untrusted input.
    """
    if text.isprintable():
        return text
    return "".join(c if c.isprintable() or c == "\n" else c.encode("unicode_escape").decode()
                   for c in text)


def shorten(names: list[str], separator: str = ", ") -> str:
    """Return the first names of a list as text, and how many more there are."""
    more = f" and {len(names) - SHOWN_NAMES:,} more" if len(names) > SHOWN_NAMES else ""
    return printable(separator.join(names[:SHOWN_NAMES])) + more
