"""A folder that `export --to web` wrote, served to a browser on this machine. Standard library only.

Any web server can host such a folder. This one adds the two headers (COOP, COEP) without which a browser gives a page
no threads, and trusts nobody: it answers GET and HEAD, with files of the folder, to who asks for it by its own name.
"""

from __future__ import annotations

import errno
import io
import ipaddress
import os
import shutil
import socket
import socketserver
import threading
import time
import webbrowser
from http import HTTPStatus
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any, BinaryIO
from urllib.parse import unquote, urlsplit

from refine_control.errors import DataError, UserError

MOST_THREADS = 32  # further requests wait in the queue of the socket
LONGEST_URL = 2048
PATIENCE = 20  # seconds for a connection to ask, and to take each piece of the answer
PIECE = 1 << 16
TYPES = {
    ".html": "text/html; charset=utf-8",
    ".css": "text/css; charset=utf-8",
    ".js": "text/javascript; charset=utf-8",
    ".mjs": "text/javascript; charset=utf-8",
    ".json": "application/json",
    ".wasm": "application/wasm",
    ".onnx": "application/octet-stream",
    ".png": "image/png",
    ".svg": "image/svg+xml",
    ".txt": "text/plain; charset=utf-8",
    ".md": "text/plain; charset=utf-8",
}
HEADERS = {
    "Cross-Origin-Opener-Policy": "same-origin",
    "Cross-Origin-Embedder-Policy": "require-corp",
    "Cross-Origin-Resource-Policy": "same-origin",
    # The page says the same of itself; a worker hears only what stands here.
    "Content-Security-Policy": "default-src 'self'; script-src 'self' 'wasm-unsafe-eval'; img-src 'self' blob:; "
    "base-uri 'none'; form-action 'none'; object-src 'none'; frame-ancestors 'none'",
    "X-Content-Type-Options": "nosniff",
    "Referrer-Policy": "no-referrer",
    "Cache-Control": "no-cache",
}


def serve(folder: Path, host: str = "127.0.0.1", port: int = 8000, open_browser: bool = True) -> None:
    """Serves until Ctrl-C.

    Raises:
        UserError: as make_server.
    """
    with make_server(folder, host, port) as server:
        print(f"serving '{folder}' at {server.url}, until Ctrl-C", flush=True)
        if open_browser:
            # aside, because some systems wait until that browser is closed
            threading.Thread(target=webbrowser.open, args=(server.url,), daemon=True).start()
        try:
            server.serve_forever()
        except KeyboardInterrupt:
            print()


def make_server(folder: Path, host: str = "127.0.0.1", port: int = 8000) -> PageServer:
    """Listens already; the caller calls serve_forever. Port 0 takes a free one.

    Raises:
        DataError: no exported site.
        UserError: host or port cannot be listened at.
    """
    for name in ("index.html", "models.json"):
        if not (folder / name).is_file():
            raise DataError(f"'{folder}' has no {name}; give the folder that `refine-control export --to web` wrote")
    if not host:
        raise UserError("--host '' would listen on every address; leave it out for this machine alone, or say 0.0.0.0")
    try:
        return PageServer(folder.resolve(), host, port)
    except (OSError, OverflowError) as error:
        if isinstance(error, OSError) and error.errno == errno.EADDRINUSE:
            raise UserError(f"port {port} of {host} is in use; choose another, --port {port + 1}") from None
        why = getattr(error, "strerror", None) or error
        raise UserError(f"cannot listen at port {port} of '{host}': {why}; choose another --host or --port") from None


class PageServer(ThreadingHTTPServer):
    request_queue_size = 256
    daemon_threads = True

    def __init__(self, folder: Path, host: str, port: int) -> None:
        self.folder, self.host = folder, host
        self._free = threading.BoundedSemaphore(MOST_THREADS)
        self.address_family = socket.AF_INET6 if ":" in host else socket.AF_INET
        super().__init__((host, port), Handler)

    def server_bind(self) -> None:
        socketserver.TCPServer.server_bind(self)  # HTTPServer's own asks the name service, which may take seconds

    @property
    def port(self) -> int:
        return int(self.server_address[1])

    @property
    def url(self) -> str:
        name = {"0.0.0.0": "localhost", "::": "localhost"}.get(self.host, self.host)
        return f"http://{f'[{name}]' if ':' in name else name}:{self.port}/"

    def is_own_name(self, host: str | None) -> bool:
        """Whether a Host header names this server. A foreign name that was made to point here (DNS rebinding) does not;
        an address cannot be made to."""
        try:
            parts = urlsplit(f"//{host}")
            name, port = parts.hostname or "", parts.port or 80
        except ValueError:
            return False
        return port == self.port and (name in ("localhost", self.host.lower()) or _is_address(name))

    def process_request(self, request: Any, client_address: Any) -> None:
        self._free.acquire()
        super().process_request(request, client_address)

    def process_request_thread(self, request: Any, client_address: Any) -> None:
        try:
            super().process_request_thread(request, client_address)
        finally:
            self._free.release()

    def handle_error(self, request: Any, client_address: Any) -> None:
        """Who hangs up half-way is no fault of ours."""


class _Hearing(io.RawIOBase):
    """All that a client says in `seconds`: who says a byte now and then would else keep a thread for good."""

    def __init__(self, connection: socket.socket, seconds: float) -> None:
        self.connection, self.seconds, self.end = connection, seconds, time.monotonic() + seconds

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> int:
        left = self.end - time.monotonic()
        if left <= 0:
            raise TimeoutError
        self.connection.settimeout(left)
        try:
            return self.connection.recv_into(buffer)
        finally:
            self.connection.settimeout(self.seconds)


class Handler(BaseHTTPRequestHandler):
    server: PageServer
    timeout = PATIENCE
    error_message_format = "%(code)d %(message)s\n"
    error_content_type = "text/plain; charset=utf-8"

    def setup(self) -> None:
        super().setup()
        self.rfile = io.BufferedReader(_Hearing(self.connection, self.timeout))

    def do_GET(self) -> None:
        if (file := self._answer()) is not None:
            with file:
                shutil.copyfileobj(file, self.wfile, PIECE)

    def do_HEAD(self) -> None:
        if (file := self._answer()) is not None:
            file.close()

    def parse_request(self) -> bool:
        if not super().parse_request():
            return False
        if self.command not in ("GET", "HEAD"):
            self.send_error(HTTPStatus.METHOD_NOT_ALLOWED)
            return False
        return True

    def _answer(self) -> BinaryIO | None:
        """Sends all but the file; None where an error was sent instead."""
        if len(self.path) > LONGEST_URL:
            self.send_error(HTTPStatus.REQUEST_URI_TOO_LONG)
        elif not self.server.is_own_name(self.headers.get("Host")):
            self.send_error(HTTPStatus.MISDIRECTED_REQUEST, f"ask for {self.server.url} instead")
        elif (path := find(self.server.folder, self.path)) is None:
            self.send_error(HTTPStatus.NOT_FOUND)
        else:
            return self._send_headers(path)
        return None

    def _send_headers(self, path: Path) -> BinaryIO | None:
        try:
            file = path.open("rb")
        except OSError:
            self.send_error(HTTPStatus.NOT_FOUND)
            return None
        self.send_response(HTTPStatus.OK)
        self.send_header("Content-Type", TYPES.get(path.suffix.lower(), "application/octet-stream"))
        self.send_header("Content-Length", str(os.fstat(file.fileno()).st_size))
        self.end_headers()
        return file

    def end_headers(self) -> None:
        if self.request_version != "HTTP/0.9":
            for name, value in HEADERS.items():
                self.send_header(name, value)
        super().end_headers()

    def version_string(self) -> str:
        return "refine-control"

    def log_message(self, format: str, *args: Any) -> None:
        """The terminal is left to the one line with the address."""


def find(folder: Path, url: str) -> Path | None:
    """The file of the folder that a URL names. None for one outside, through a link too, a hidden one, or a folder."""
    path = unquote(url.partition("?")[0].partition("#")[0])
    parts = path.lstrip("/").split("/") if path != "/" else ["index.html"]
    if any(not part or part.startswith(".") or "\\" in part or "\0" in part for part in parts):
        return None
    try:
        found = folder.joinpath(*parts).resolve()
        return found if found.is_relative_to(folder) and found.is_file() else None
    except (OSError, ValueError, RuntimeError):  # names that are too long, links that run in a circle
        return None


def _is_address(name: str) -> bool:
    try:
        ipaddress.ip_address(name)
    except ValueError:
        return False
    return True
