"""A web server on this machine for tests: a folder of files, sent well or in the ways that servers and networks fail."""

import contextlib
import threading
from collections.abc import Callable, Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from urllib.parse import urlsplit

Fault = Callable[["Handler", bytes], None]


class Handler(BaseHTTPRequestHandler):
    """Send a file, or the part of it that a Range asks for; archives as the server's fault has it."""

    server: "Server"

    def do_GET(self) -> None:
        path = self.server.folder / urlsplit(self.path).path.lstrip("/")  # a proxy is asked for whole addresses
        self.server.asked.append((self.path, self.headers.get("Range")))
        fault = self.server.fault if self.path.endswith(self.server.faulty) else None
        with contextlib.suppress(ConnectionError):  # the client may hang up
            if not path.is_file():
                self.send_error(404)
            elif fault is not None:
                fault(self, path.read_bytes())
            else:
                self.send(path.read_bytes())

    def send(self, content: bytes, *, ranges: bool = True, only: int | None = None) -> None:
        """Send what is asked for; with `only`, promise all and hang up after so many bytes."""
        start = int((self.headers.get("Range") or "bytes=0-")[6:-1]) if ranges else 0
        if start >= len(content):
            self.send_response(416)
            self.send_header("Content-Range", f"bytes */{len(content)}")
            self.end_headers()
            return
        self.send_response(206 if start else 200)
        if start:
            self.send_header("Content-Range", f"bytes {start}-{len(content) - 1}/{len(content)}")
        self.send_header("Content-Length", str(len(content) - start))
        self.end_headers()
        self.wfile.write(content[start:][:only])

    def log_message(self, format: str, *args: object) -> None:  # noqa: A002  the name of the class above
        """Say nothing."""


class Server(ThreadingHTTPServer):
    """A folder at an address of this machine."""

    def __init__(self, folder: Path) -> None:
        super().__init__(("127.0.0.1", 0), Handler)
        self.folder = folder
        self.asked: list[tuple[str, str | None]] = []
        """Each path with its Range."""
        self.fault: Fault | None = None
        self.faulty = ".tar.gz"
        """How the paths end that the fault is for."""

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_address[1]}"

    def ranges(self) -> list[str | None]:
        """List what was asked of archives, and forget it."""
        found = [asked for path, asked in self.asked if path.endswith(".tar.gz")]
        self.asked.clear()
        return found


@contextlib.contextmanager
def served(folder: Path) -> Iterator[Server]:
    """Serve a folder as long as the block lasts."""
    server = Server(folder)
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01})
    thread.start()
    try:
        yield server
    finally:
        server.shutdown()
        thread.join()
        server.server_close()
