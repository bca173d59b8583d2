"""The start of a script: what it shows on a terminal, and a missing package."""

from __future__ import annotations

import os
import pty
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
SCRIPT = """
from src.utils.script import run_script, start_script, status
if __name__ == "__main__":
    start_script("a package")
import sys
def main():
    with status("counting"):
        print("counted", file=sys.stderr)
    return 0
run_script(main)
"""


def run_in_terminal(*command: str, **environment: str) -> str:
    """Return what a command writes to a terminal."""
    reader, writer = pty.openpty()
    with subprocess.Popen(command, stdout=writer, stderr=writer, cwd=ROOT,
                          env={**os.environ, **environment}) as process:
        os.close(writer)
        output = b""
        try:
            while part := os.read(reader, 4096):
                output += part
        except OSError:  # the other end is closed
            pass
        os.close(reader)
    assert process.returncode == 0
    return output.decode().replace("\r\n", "\n")


def test_a_terminal_shows_what_is_loaded_and_done() -> None:
    """Each line is erased when its work is done; only the first process of a machine prints."""
    erase = "\r\x1b[K"
    assert run_in_terminal(sys.executable, "-c", SCRIPT) == (
        f"loading a package ...{erase}counting ...counted\n{erase}")
    assert run_in_terminal(sys.executable, "-c", SCRIPT, LOCAL_RANK="1") == "counted\n"


def test_a_log_has_none_of_these_lines() -> None:
    """What is no terminal gets only the output of the script."""
    done = subprocess.run([sys.executable, "-c", SCRIPT], cwd=ROOT, capture_output=True, text=True)
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "counted\n")


def test_errors_are_wrapped_on_a_terminal_only() -> None:
    """Lines break between words at 80 columns; commands and the lines of a log stay whole."""
    command = "    pip install " + 12 * "some-package "
    text = 12 * "a-long-word and --a-flag " + "\\n" + command
    code = ("from src.utils.script import run_script\nfrom src.utils.errors import UserError\n"
            f"def main():\n    raise UserError('{text}', status=0)\nrun_script(main)")
    shown = run_in_terminal(sys.executable, "-c", code, COLUMNS="80").replace("\r\x1b[K", "")
    logged = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    lines = shown.splitlines()
    assert lines[-1] == command and max(map(len, lines[:-1])) <= 80
    assert shown.split() == logged.stderr.split()
    assert [len(line) > 80 for line in logged.stderr.splitlines()] == [True, True]


@pytest.mark.parametrize(("end", "status"), [
    ("return 3", 3), ("sys.exit(4)", 4), ("raise UserError('no', status=5)", 5)])
def test_a_process_of_torchrun_ends_without_finalization(end: str, status: int) -> None:
    """Its output is complete and its status kept, but what Python runs at its end is not run: a
    thread of the process group could abort it there."""
    code = ("import atexit, sys\nfrom src.utils.script import run_script\n"
            "from src.utils.errors import UserError\natexit.register(print, 'finalized')\n"
            f"def main():\n    print('done')\n    {end}\nrun_script(main)")
    for rank, expected in (({"RANK": "1"}, "done\n"), ({}, "done\nfinalized\n")):
        environment = {name: value for name, value in os.environ.items() if name != "RANK"} | rank
        done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True,
                              text=True, env=environment)
        assert (done.returncode, done.stdout) == (status, expected)


def test_parts_of_a_list_keep_its_indentation() -> None:
    """A note's list items of two spaces are wrapped too, and escaped."""
    code = ("from src.utils.errors import print_message\n"
            "print_message('photos:\\n  ' + 50 * '/' + ' ' + 30 * 'name\\x1b[2J ')")
    title, path, *lines = run_in_terminal(sys.executable, "-c", code, COLUMNS="40").splitlines()
    assert title == "photos:" and path == "  " + 50 * "/"
    assert len(lines) > 5 and max(map(len, lines)) <= 40
    assert all(line.startswith("  name\\x1b[2J") for line in lines)


def test_messages_do_not_go_to_standard_output() -> None:
    """With standard error closed, messages do not go to standard output."""
    code = ("from src.utils.errors import print_message\nprint_message('note')\n"
            "from src.utils.script import run_script\nfrom tqdm import tqdm\nimport sys\n"
            "def main():\n    print_message('note')\n    for _ in tqdm([1], file=sys.stderr):\n"
            "        print('result')\n    return 0\nrun_script(main)")
    done = subprocess.run(["sh", "-c", 'exec "$@" 2>&-', "sh", sys.executable, "-c", code],
                          cwd=ROOT, capture_output=True, text=True)
    assert (done.returncode, done.stdout) == (0, "result\n")


@pytest.mark.parametrize("script", ["main.py", "train.py", "evaluate.py", "search.py",
                                    "train_image_only.py"])
def test_a_missing_package_is_one_message(script: str) -> None:
    """Without the packages of requirements.txt each script says how to get them."""
    # -S leaves out site-packages, -E the packages that PYTHONPATH adds.
    done = subprocess.run([sys.executable, "-S", "-E", script, "--demo"], cwd=ROOT,
                          capture_output=True, text=True)
    assert done.returncode == 2 and done.stderr.count("\n") == 1
    assert done.stderr.startswith("error: the package ")
    assert ". .venv/bin/activate" in done.stderr and "requirements.txt" in done.stderr


@pytest.mark.parametrize("code", ["1 / 0", "import src.missing"])
def test_other_errors_keep_their_traceback(code: str) -> None:
    """A bug, such as a missing module of this project, is not reported as a missing package."""
    done = subprocess.run(
        [sys.executable, "-c", "from src.utils.script import start_script\n"
         f"start_script()\n{code}"], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 1 and done.stderr.startswith("Traceback")
