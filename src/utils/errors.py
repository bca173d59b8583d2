"""The exception for mistakes of the user; messages, and how they are printed."""

from __future__ import annotations

import importlib
import re
import shutil
import sys
import textwrap
from types import ModuleType

SHOWN_NAMES = 3  # names in a message that counts more
MAX_LINES = 10  # of a list that is printed


class UserError(Exception):
    """An error that only the user can correct; the message says how. Not for bugs of this code.

    Attributes:
        status: exit status of the script.
    """

    def __init__(self, message: str, status: int = 2) -> None:
        super().__init__(message)
        self.status = status


def print_message(text: str) -> None:
    """Print a note, a warning or an error on standard error, on a terminal in lines of its width.

    Characters that could control a terminal are escaped.
    """
    if sys.stderr is not None:  # closed by the shell, as in 2>&-
        print(fit_terminal(printable(text)), file=sys.stderr, flush=True)


def fit_terminal(text: str) -> str:
    """Break lines between words at the width of the terminal on which standard error is shown.

    The parts of a line have its indentation. Lines with four spaces or more are commands, and stay
    whole; so does everything in a log.
    """
    if not on_terminal():
        return text
    width = shutil.get_terminal_size().columns

    def wrap(line: str) -> str:
        indent = line[: len(line) - len(line.lstrip(" "))]
        return line if len(indent) >= 4 else textwrap.fill(
            line.lstrip(" "), width, initial_indent=indent, subsequent_indent=indent,
            break_long_words=False, break_on_hyphens=False)

    return "\n".join(map(wrap, text.split("\n")))


def on_terminal() -> bool:
    """Return whether standard error is shown on a terminal."""
    return sys.stderr is not None and sys.stderr.isatty()


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


def import_optional(module: str, message: str) -> ModuleType:
    """Import a module of a package that requirements.txt does not have.

    Args:
        module: its full name.
        message: of the error; it has the pip command.

    Raises:
        UserError: the package is not installed, or cannot be imported.
    """
    try:
        return importlib.import_module(module)
    except ImportError as error:
        raise UserError(message) from error


def shorten_lines(lines: list[str]) -> list[str]:
    """Return the first lines of a list, and a line that says how many more there are."""
    more = len(lines) - MAX_LINES
    return lines if more <= 0 else [*lines[:MAX_LINES], f"and {more:,} more"]


def counted(number: int, things: str) -> str:
    """Return '2 photos embedded' or '1 photo embedded': the first plural s is dropped for one.

    Args:
        number: of the things.
        things: begins with a noun in the plural.
    """
    return f"{number:,} " + (re.sub(r"s\b", "", things, count=1) if number == 1 else things)
