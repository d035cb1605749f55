"""The server: what it hands out, with which headers, and to whom it hands out nothing."""

from __future__ import annotations

import http.client
import re
import socket
import subprocess
import sys
import threading
from collections import Counter
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from refine_control.errors import DataError, UserError
from refine_control.serve import server as server_module
from refine_control.serve.server import HEADERS, PageServer, make_server, serve

PAGE = Path(server_module.__file__).parent / "page"
FILES = {
    "index.html": "text/html; charset=utf-8",
    "models.json": "application/json",
    "app.js": "text/javascript; charset=utf-8",
    "lib/ort.mjs": "text/javascript; charset=utf-8",
    "lib/ort.wasm": "application/wasm",
    "models/a b/denoiser.onnx": "application/octet-stream",
    "examples/cat.png": "image/png",
    "style.css": "text/css; charset=utf-8",
}


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    site = tmp_path / "site"
    for name in FILES:
        (site / name).parent.mkdir(parents=True, exist_ok=True)
        (site / name).write_text(f"this is {name}")
    (tmp_path / "secret.txt").write_text("secret")
    return site


@pytest.fixture
def server(folder: Path) -> Iterator[PageServer]:
    with make_server(folder, port=0) as made:
        thread = threading.Thread(target=made.serve_forever, args=(0.02,), daemon=True)
        thread.start()
        yield made
        made.shutdown()
        thread.join()


def ask(
    server: PageServer, path: str, method: str = "GET", headers: dict[str, str] | None = None
) -> tuple[http.client.HTTPResponse, bytes]:
    connection = http.client.HTTPConnection("127.0.0.1", server.port, timeout=20)
    try:
        connection.putrequest(method, path, skip_host=True)
        for name, value in {"Host": f"127.0.0.1:{server.port}", **(headers or {})}.items():
            connection.putheader(name, value)
        connection.endheaders()
        answer = connection.getresponse()
        return answer, answer.read()
    finally:
        connection.close()


@pytest.mark.parametrize(("name", "kind"), FILES.items())
def test_files_come_whole_with_type_and_headers(server: PageServer, name: str, kind: str) -> None:
    for method in ("GET", "HEAD"):
        answer, body = ask(server, "/" + name.replace(" ", "%20"), method)
        text = f"this is {name}"
        assert answer.status == 200
        assert body.decode() == (text if method == "GET" else "")
        assert answer.headers["Content-Type"] == kind
        assert answer.headers["Content-Length"] == str(len(text))
        assert {header: answer.headers[header] for header in HEADERS} == HEADERS


def test_the_root_is_the_page_and_a_query_changes_nothing(server: PageServer) -> None:
    for path in ("/", "/?a=b", "/index.html?/../secret.txt"):
        assert ask(server, path)[1] == b"this is index.html"


@pytest.mark.parametrize(
    "path",
    [
        *("/../secret.txt", "/%2e%2e/secret.txt", "/..%2fsecret.txt", "/models/../../secret.txt", "/..\\secret.txt"),
        *("//etc/passwd", "/%2fetc/passwd", "/%00", "/index.html%00.png", "/.hidden", "/models/.git/config"),
        *("/models", "/models/", "/models//", "/nothing", "/link.txt", "/out/secret.txt", "/loop", "/" + "a" * 400),
        "http://127.0.0.1/../secret.txt",
    ],
)
def test_nothing_else_is_handed_out(server: PageServer, folder: Path, path: str) -> None:
    (folder / ".hidden").write_text("hidden")
    (folder / "models" / ".git").mkdir()
    (folder / "models" / ".git" / "config").write_text("hidden")
    (folder / "link.txt").symlink_to(folder.parent / "secret.txt")
    (folder / "out").symlink_to(folder.parent)
    (folder / "loop").symlink_to(folder / "loop")
    answer, body = ask(server, path)
    assert answer.status == 404
    assert body == b"404 Not Found\n"
    assert answer.headers["X-Content-Type-Options"] == "nosniff"


def test_a_link_within_the_folder_is_followed(server: PageServer, folder: Path) -> None:
    (folder / "again.html").symlink_to("index.html")
    assert ask(server, "/again.html")[1] == b"this is index.html"


@pytest.mark.parametrize("method", ["POST", "PUT", "DELETE", "OPTIONS", "TRACE", "CONNECT", "BREW"])
def test_there_is_nothing_to_do_but_read(server: PageServer, method: str) -> None:
    assert ask(server, "/", method)[0].status == 405


@pytest.mark.parametrize(
    ("host", "status"),
    [
        *((name, 200) for name in ["127.0.0.1:{}", "localhost:{}", "LOCALHOST:{}", "[::1]:{}", "192.168.1.2:{}"]),
        *((name, 421) for name in ["evil.example:{}", "localhost", "localhost:1", "localhost.evil.example:{}"]),
        *((name, 421) for name in ["", "a@b:{}", "localhost:x", "[::1", "127.0.0.1.evil.example:{}"]),
    ],
)
def test_only_its_own_names_are_answered_to(server: PageServer, host: str, status: int) -> None:
    """Else a page elsewhere could have its name point here, and read (DNS rebinding)."""
    assert ask(server, "/", headers={"Host": host.format(server.port)})[0].status == status


def test_long_addresses_are_refused(server: PageServer) -> None:
    assert ask(server, "/" + "a" * 3000)[0].status == 414
    assert ask(server, "/" + "a" * 70_000)[0].status == 414


def test_two_hundred_at_once_and_some_who_never_finish_asking(
    server: PageServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(server_module.Handler, "timeout", 1)
    silent = [socket.create_connection(("127.0.0.1", server.port)) for _ in range(server_module.MOST_THREADS + 8)]
    with ThreadPoolExecutor(200) as pool:
        answers = list(pool.map(lambda _: ask(server, "/app.js")[1], range(200)))
    for connection in silent:
        connection.close()
    assert answers == [b"this is app.js"] * 200
    assert ask(server, "/")[0].status == 200


def test_who_asks_a_byte_at_a_time_is_hung_up_on(server: PageServer, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(server_module.Handler, "timeout", 1)
    slow = [socket.create_connection(("127.0.0.1", server.port)) for _ in range(server_module.MOST_THREADS)]
    done = threading.Event()

    def say() -> None:
        while not done.wait(0.2):
            for connection in slow:
                with suppress(OSError):
                    connection.send(b"G")

    saying = threading.Thread(target=say)
    saying.start()
    try:
        assert ask(server, "/")[0].status == 200
    finally:
        done.set()
        saying.join()
        for connection in slow:
            connection.close()


METHODS = st.sampled_from([b"GET", b"HEAD", b"POST", b"get", b"G\0T", b"", b"TRACE"]) | st.binary(max_size=5)
TARGETS = st.lists(
    st.sampled_from(
        [b"/", b"..", b"secret.txt", b"index.html", b"%2e%2e", b"%00", b"%", b"?", b"#", b"\\", b"\xff", b"out"]
    )
    | st.binary(max_size=4),
    max_size=8,
).map(b"".join)
VERSIONS = st.sampled_from([b"HTTP/1.1", b"HTTP/1.0", b"HTTP/0.9", b"HTTP/2.0", b"HTTP/9999999999.1", b"HTTP/x", b""])
HOSTS = st.sampled_from([b"Host: localhost:%d", b"Host: [::1", b"Host: evil.example:%d", b"Host:"])
LINES = HOSTS | st.binary(max_size=30) | st.sampled_from([b"A: LONG", b"Content-Length: 99999999999", b" folded"])
REQUESTS = (
    st.binary(max_size=100)
    | st.builds(lambda target: b"GET /" + target + b" HTTP/1.1\r\nHost: localhost:%d\r\n\r\n", TARGETS)
    | st.builds(
        lambda method, target, version, lines: b"\r\n".join([b" ".join([method, target, version]), *lines, b"", b""]),
        METHODS,
        TARGETS,
        VERSIONS,
        st.lists(LINES, max_size=3) | st.just([b"A: b"] * 200),
    )
)


def said(server: PageServer, request: bytes) -> bytes:
    """All that it answers to raw bytes."""
    with socket.create_connection(("127.0.0.1", server.port), timeout=20) as connection:
        with suppress(OSError):  # it may hang up before it has heard all
            connection.sendall(request)
            connection.shutdown(socket.SHUT_WR)
        heard = b""
        with suppress(ConnectionError):
            while piece := connection.recv(1 << 16):
                heard += piece
    return heard


@pytest.mark.parametrize("count", [150, pytest.param(5000, marks=pytest.mark.long)])
def test_whatever_it_is_asked_it_goes_on_serving(
    server: PageServer,
    folder: Path,
    count: int,
    tally: Callable[..., None],
    capfd: pytest.CaptureFixture[str],
) -> None:
    """A client that says anything: it hears a status other than 500, or nothing, and never what lies elsewhere."""
    (folder / "out").symlink_to(folder.parent)
    seen: Counter[str] = Counter()

    @settings(
        max_examples=count, derandomize=True, deadline=None, database=None, suppress_health_check=list(HealthCheck)
    )
    @given(REQUESTS)
    def holds(request: bytes) -> None:
        answer = said(server, request.replace(b"%d", b"%d" % server.port).replace(b"LONG", b"a" * 70_000))
        assert answer != b"secret"
        assert not answer.endswith(b"\nsecret")
        status = re.match(rb"HTTP/1\.[01] (\d{3}) ", answer)
        assert status or not answer or answer.startswith((b"this is", b"4", b"5"))  # a body alone, in HTTP/0.9
        seen[status[1].decode() if status else "no status"] += 1
        assert status is None or status[1] != b"500"
        assert not answer.startswith(b"500")

    holds()
    for _ in range(server_module.MOST_THREADS + 1):
        assert ask(server, "/")[0].status == 200
    assert capfd.readouterr() == ("", "")
    tally("requests of any bytes", requests=seen.total(), answers=dict(sorted(seen.items())))
    assert {"200", "400", "404", "405"} <= set(seen)


def test_who_hangs_up_half_way_harms_nobody(
    server: PageServer, folder: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    (folder / "big.onnx").write_bytes(bytes(8_000_000))
    for _ in range(server_module.MOST_THREADS + 1):
        with socket.create_connection(("127.0.0.1", server.port)) as connection:
            connection.sendall(f"GET /big.onnx HTTP/1.0\r\nHost: localhost:{server.port}\r\n\r\n".encode())
            connection.recv(10)
    assert ask(server, "/")[0].status == 200
    assert capfd.readouterr() == ("", "")


@pytest.mark.parametrize("name", ["index.html", "models.json"])
def test_a_folder_that_is_no_site_is_refused(folder: Path, name: str) -> None:
    (folder / name).unlink()
    with pytest.raises(DataError, match=rf"no {name}; give the folder that `refine-control export --to web` wrote"):
        make_server(folder, port=0)


def test_a_port_in_use_is_named(server: PageServer, folder: Path) -> None:
    with pytest.raises(UserError, match=f"port {server.port} of 127.0.0.1 is in use; choose another, --port"):
        make_server(folder, port=server.port)


@pytest.mark.parametrize(("host", "port"), [("127.0.0.1", 70_000), ("192.0.2.1", 0)])
def test_where_it_cannot_listen_is_named(folder: Path, host: str, port: int) -> None:
    with pytest.raises(UserError, match="cannot listen at port"):
        make_server(folder, host, port)


def test_an_empty_host_is_not_every_address(folder: Path) -> None:
    with pytest.raises(UserError, match="would listen on every address"):
        make_server(folder, "", 0)


def test_control_c_ends_it_quietly(
    folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    opened: list[str] = []
    done = threading.Event()
    monkeypatch.setattr(server_module.webbrowser, "open", lambda url: (opened.append(url), done.set()))

    def interrupted(self: PageServer) -> None:
        done.wait(20)
        raise KeyboardInterrupt

    monkeypatch.setattr(PageServer, "serve_forever", interrupted)
    serve(folder, port=0)
    assert opened
    assert opened[0].startswith("http://127.0.0.1:")
    assert opened[0] in capsys.readouterr().out
    serve(folder, port=0, open_browser=False)
    assert len(opened) == 1


def test_page_and_header_forbid_the_same() -> None:
    header = HEADERS["Content-Security-Policy"].split("; ")
    page = (PAGE / "index.html").read_text(encoding="utf-8")
    assert f'content="{"; ".join(header[:-1])}"' in page
    assert header[-1].startswith("frame-ancestors"), "which a page cannot say of itself"


def test_nothing_in_the_page_names_another_host() -> None:
    for path in PAGE.rglob("*"):
        if path.is_file() and path.suffix != ".png":
            text = path.read_text(encoding="utf-8").replace("http://www.w3.org/2000/svg", "")
            assert "http://" not in text, path
            assert "https://" not in text, path


def test_it_needs_neither_torch_nor_numpy() -> None:
    code = (
        "import sys, refine_control.serve.server; "
        "print(*[name for name in ('torch', 'numpy', 'PIL', 'pydantic') if name in sys.modules])"
    )
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, timeout=120)
    assert result.stdout.split() == []
