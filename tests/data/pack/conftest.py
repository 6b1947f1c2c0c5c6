"""Servers on this machine: nginx, an S3 server, and one that fails as it is told to."""

from __future__ import annotations

import shutil
import socket
import subprocess
import threading
import time
from collections import deque
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest

from paceline.data.pack.connection import Patience
from paceline.data.pack.writer import PackConfig, write_pack
from paceline.data.whole_set import open_whole_set

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator
    from pathlib import Path

NGINX = """\
daemon off; master_process off; pid {folder}/nginx.pid; error_log {folder}/error.log;
events {{}}
http {{
  access_log {folder}/access.log;
  client_body_temp_path {folder}/body; proxy_temp_path {folder}/proxy; fastcgi_temp_path {folder}/fastcgi;
  uwsgi_temp_path {folder}/uwsgi; scgi_temp_path {folder}/scgi;
  gzip on; gzip_types *; gzip_min_length 1;
  server {{
    listen 127.0.0.1:{port};
    location / {{ root {root}; }}
    location /private/ {{ return 403; }}
    location /login/ {{ return 401; }}
    location /slow/ {{ alias {root}/; limit_rate 200k; }}
    location /whole/ {{ alias {root}/; max_ranges 0; }}
  }}
}}
"""


@pytest.fixture
def patience() -> Patience:
    """Little of it, so that no test waits."""
    return Patience(tries=4, pause_s=0.01, most_pause_s=0.05, connect_s=5, silence_s=5)


@pytest.fixture
def pack_file(make_yolo: Callable[..., Path], tmp_path: Path) -> Path:
    """A pack of 40 images for training and 5 for validation, about 150 kB."""
    root = make_yolo({"train": ["0 0.5 0.5 0.25 0.5\n"] * 40, "val": ["1 0.5 0.5 0.25 0.5\n"] * 5})
    random = np.random.default_rng(0)
    for path in sorted(root.glob("images/*/*.jpg")):
        content = path.read_bytes()
        segment = random.bytes(3000)  # a comment that cannot be compressed
        path.write_bytes(content[:2] + b"\xff\xfe" + (len(segment) + 2).to_bytes(2, "big") + segment + content[2:])
    served = tmp_path / "served"
    served.mkdir()
    out = served / "set.pack"
    write_pack(open_whole_set(str(root)).splits, out, made_from="YOLO", config=PackConfig())
    return out


@dataclass
class Nginx:
    """An nginx that serves a folder."""

    root: Path
    folder: Path
    port: int
    process: subprocess.Popen[bytes] | None = None

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.port}"

    def start(self) -> None:
        config = self.folder / "nginx.conf"
        config.write_text(NGINX.format(folder=self.folder, root=self.root, port=self.port))
        self.process = subprocess.Popen(
            [_nginx(), "-p", str(self.folder), "-c", str(config), "-e", str(self.folder / "error.log")],
            stderr=subprocess.DEVNULL,
        )
        wait_for_port(self.port)

    def stop(self) -> None:
        if self.process:
            self.process.kill()
            self.process.wait()
            self.process = None

    def requests(self) -> list[str]:
        """Lines of the access log."""
        return (self.folder / "access.log").read_text().splitlines()


def _nginx() -> str:
    return shutil.which("nginx") or shutil.which("nginx", path="/usr/sbin:/usr/local/sbin") or ""


def free_port() -> int:
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        port: int = listener.getsockname()[1]
        return port


def wait_for_port(port: int) -> None:
    deadline = time.monotonic() + 10
    while True:
        try:
            socket.create_connection(("127.0.0.1", port), timeout=1).close()
            return
        except OSError:
            assert time.monotonic() < deadline, "the server does not come up"
            time.sleep(0.01)


@pytest.fixture
def nginx(pack_file: Path, tmp_path: Path) -> Iterator[Nginx]:
    if not _nginx():
        pytest.skip("nginx is not installed")
    folder = tmp_path / "nginx"
    folder.mkdir()
    server = Nginx(root=pack_file.parent, folder=folder, port=free_port())
    server.start()
    yield server
    server.stop()


@dataclass
class Flaky:
    """A server of one file that answers ranges, and fails in the next of the ways that it is told."""

    path: Path
    faults: deque[str] = field(default_factory=deque)
    """For the next GET requests: a status, `cut` (half of the answer), `drop` (none), `hang`, `late`, or empty."""
    gets: list[str] = field(default_factory=list)
    """The ranges that were asked for."""
    released: threading.Event = field(default_factory=threading.Event)
    port: int = 0
    says_version: bool = True

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.port}/set.pack"


@pytest.fixture
def flaky(pack_file: Path) -> Iterator[Flaky]:
    state = Flaky(path=pack_file)

    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def do_HEAD(self) -> None:
            content = state.path.read_bytes()
            self.send_response(200)
            self._headers(len(content), content)

        def do_GET(self) -> None:
            content = state.path.read_bytes()
            asked = self.headers.get("Range", "")
            state.gets.append(asked)
            fault = state.faults.popleft() if state.faults else ""
            if fault.isdecimal():
                self.send_response(int(fault))
                self.send_header("Content-Length", "0")
                self.end_headers()
                return
            if fault in ("hang", "drop"):
                if fault == "hang":
                    state.released.wait(30)
                self.close_connection = True
                return
            first, last = (int(number) for number in asked.removeprefix("bytes=").split("-"))
            part = content[first : last + 1]
            self.send_response(206)
            self.send_header("Content-Range", f"bytes {first}-{last}/{len(content)}")
            self._headers(len(part), content)
            self.wfile.write(part[: len(part) // 2] if fault == "cut" else part)
            self.close_connection = fault == "cut"

        def _headers(self, length: int, content: bytes) -> None:
            self.send_header("Content-Length", str(length))
            if state.says_version:
                self.send_header("ETag", f'"{hash(content) & 0xFFFFFFFF:x}"')
            self.end_headers()

        def log_message(self, *_: Any) -> None:
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    server.daemon_threads = True
    state.port = server.server_address[1]
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01})
    thread.start()
    yield state
    state.released.set()
    server.shutdown()
    server.server_close()
    thread.join()
