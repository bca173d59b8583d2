"""How a script starts, shows on a terminal what takes a while, and ends."""

from __future__ import annotations

import contextlib
import os
import sys
from collections.abc import Callable, Iterator
from types import TracebackType

from src.utils.errors import UserError, on_terminal, print_message

ERASE = "\r\x1b[K"  # back to the start of the line, and erase it


def start_script(loading: str = "") -> None:
    """Show what is being loaded, and report a missing package as one message.

    A script calls this before the imports that take seconds; `run_script` erases the line.

    Args:
        loading: what the imports load, such as 'PyTorch'.
    """
    sys.excepthook = _report_missing_package
    if loading and _is_terminal():
        print(f"loading {loading} ...", end="", file=sys.stderr, flush=True)


def _report_missing_package(
    kind: type[BaseException], error: BaseException, traceback: TracebackType | None
) -> None:
    """Print an uncaught error; one about a missing package without a traceback."""
    package = (getattr(error, "name", None) or "").partition(".")[0]
    if not issubclass(kind, ModuleNotFoundError) or package in ("", "src"):
        return sys.__excepthook__(kind, error, traceback)
    if _is_terminal():
        print(ERASE, end="", file=sys.stderr)
    print_message(
        f"error: the package {package} is not installed in {sys.prefix}: activate the environment "
        "that has it with . .venv/bin/activate, or install it with pip install -r requirements.txt")
    sys.exit(2)


def _is_terminal() -> bool:
    """Return whether standard error is a terminal, and this the first process of the machine."""
    is_first = os.environ.get("LOCAL_RANK", "0") == "0"
    return is_first and on_terminal()


@contextlib.contextmanager
def status(text: str) -> Iterator[None]:
    """Show what takes a while, as a line on a terminal that is erased when the block ends.

    A log has no such line. Work of known length has a progress bar of tqdm instead.
    """
    shown = _is_terminal()
    if shown:
        print(f"{text} ...", end="", file=sys.stderr, flush=True)
    try:
        yield
    finally:
        if shown:
            print(ERASE, end="", file=sys.stderr, flush=True)


def run_script(main: Callable[[], int]) -> None:
    """Run the main function of a script and exit with the status that it returns.

    A UserError is printed as one message, without a traceback, and gives its own status; Ctrl-C
    gives 130. Characters that the encoding of standard output lacks are escaped. A process of
    torchrun ends without Python's finalization, unless it raises another exception.
    """
    if _is_terminal():
        print(ERASE, end="", file=sys.stderr, flush=True)
    if sys.stdout is None:  # closed by the shell, as in >&-
        print_message("note: standard output is closed")
        sys.stdout = open(os.devnull, "w")
    if sys.stderr is None:  # progress bars write to it
        sys.stderr = open(os.devnull, "w")
    sys.stdout.reconfigure(errors="backslashreplace")
    try:
        exit_status = main()
        sys.stdout.flush()
    except UserError as error:
        print_message(f"error: {error}")
        exit_status = error.status
    except KeyboardInterrupt:
        print_message("\nstopped")
        exit_status = 130
    except BrokenPipeError:  # the reader of the output has exited, as in `| head`
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        exit_status = 141
    except SystemExit as exit_request:
        if not isinstance(exit_request.code, int):
            raise
        exit_status = exit_request.code
    if "RANK" in os.environ:
        # A thread of PyTorch's process group that frees a tensor during finalization aborts the
        # process, even shortly after the group was left (pytorch/pytorch issue 190489).
        with contextlib.suppress(OSError):  # its reader has exited
            sys.stdout.flush()
        sys.stderr.flush()
        os._exit(exit_status)
    sys.exit(exit_status)
