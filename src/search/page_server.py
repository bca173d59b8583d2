"""Serve a search page on 127.0.0.1."""

from __future__ import annotations

from functools import partial
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

from src.utils.errors import UserError, print_message


class _PageHandler(SimpleHTTPRequestHandler):
    """Serve the files of one folder, and no file outside it that a link points to."""

    def send_head(self):  # noqa: ANN201 (as in the base class)
        try:
            path = Path(self.translate_path(self.path)).resolve()
            is_file = path.is_file()
        except (OSError, ValueError, RuntimeError):  # NUL, a link cycle, a name that is too long
            return self.send_error(404)
        host = self.headers.get("Host", "").partition(":")[0]
        # A foreign site could make its name point to 127.0.0.1 and read the images.
        if host not in ("127.0.0.1", "localhost"):
            return self.send_error(403)
        if not path.is_relative_to(Path(self.directory).resolve()):
            return self.send_error(404)
        # The base class redirects to folders, to an address that the client partly chooses.
        if not is_file and self.path.partition("?")[0] != "/":
            return self.send_error(404)
        return super().send_head()

    def list_directory(self, path: str) -> None:
        self.send_error(404)

    def end_headers(self) -> None:
        self.send_header("X-Content-Type-Options", "nosniff")
        self.send_header("Cache-Control", "no-cache")
        super().end_headers()

    def log_message(self, *args: object) -> None:
        """Print nothing: a page of 96 images would be 96 lines."""


def serve_page(folder: Path, port: int = 8000) -> None:
    """Serve a written page on 127.0.0.1 until Ctrl-C. Port 0 takes any free port.

    Raises:
        UserError: there is no page in `folder`, or the port cannot be used.
    """
    if not (folder / "index.html").is_file():
        raise UserError(f"there is no page in {folder}: write one first")
    try:
        server = ThreadingHTTPServer(
            ("127.0.0.1", port), partial(_PageHandler, directory=str(folder)))
    except (OSError, OverflowError) as error:
        reason = getattr(error, "strerror", None) or error
        raise UserError(f"cannot serve on port {port} ({reason}): choose another one") from error
    with server:
        try:
            print_message(f"http://127.0.0.1:{server.server_port}/   Ctrl-C stops it")
            server.serve_forever()
        except KeyboardInterrupt:
            print_message("")
