"""Connection: ranges of a file behind an https:// or s3:// address, by fsspec, tried again where that may help."""

from __future__ import annotations

import importlib
import logging
import time
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from paceline.addresses import shown
from paceline.data.pack.medium import ShortReadError
from paceline.errors import UserError

if TYPE_CHECKING:
    from collections.abc import Callable

log = logging.getLogger("paceline")

_NEEDS = {"https": ("aiohttp", "http"), "http": ("aiohttp", "http"), "s3": ("s3fs", "s3")}
"""Scheme -> module that fsspec needs for it, and the extra that brings it."""
_WORTH_ANOTHER_TRY = frozenset({408, 425, 429})


class RemoteError(UserError):
    """An address that cannot be read from; whoever reads images from it cannot go on."""


@dataclass(frozen=True, kw_only=True)
class Patience:
    """How long to wait, and how often to try."""

    tries: int = 8
    pause_s: float = 0.5
    """After the first failure; doubled after each further one."""
    most_pause_s: float = 15.0
    connect_s: float = 10.0
    """To reach the server."""
    silence_s: float = 30.0
    """Without a byte from it."""


@dataclass(frozen=True, kw_only=True)
class Version:
    """What tells whether a remote file is still the same."""

    num_bytes: int
    mark: str
    """Its ETag, else the time of its last change; empty where the server says neither."""


class Connection:
    """A file behind an address. Threads read beside each other. Whatever fails for good is a RemoteError.

    `address` is what may be shown of it.
    """

    def __init__(self, address: str, patience: Patience) -> None:
        self.address = shown(address)
        self._secret = address
        self.scheme = address.partition("://")[0].lower()
        self._patience = patience
        self._anonymous = False
        self._files = self._connect()

    def version(self) -> Version:
        """Ask for size and version."""
        info = self._persist(self._info)
        if info.get("size") is None:
            raise RemoteError(f"{self.address}: the server does not say how large it is; put it on one that does.")
        mark = next((str(info[name]) for name in ("ETag", "LastModified", "Last-Modified") if info.get(name)), "")
        return Version(num_bytes=int(info["size"]), mark=mark)

    def read(self, start: int, end: int) -> bytes:
        """Return the bytes from `start` to `end`."""
        content: bytes = self._persist(lambda: self._range(start, end))
        return content

    def require_ranges(self, num_bytes: int) -> None:
        """Raise RemoteError where the server would send the whole file instead of a part."""
        if self.scheme == "s3" or num_bytes < 2:
            return

        def last_byte() -> bytes:
            with self._files.open(self._secret, block_size=1, cache_type="none", size=num_bytes) as file:
                file.seek(num_bytes - 1)
                content: bytes = file.read(1)
                return content

        try:
            self._persist(last_byte)
        except ValueError as error:
            raise RemoteError(
                f"{self.address}: the server sends whole files only, no parts of them (HTTP ranges); put the pack on "
                "one that does, or download it."
            ) from error

    def _connect(self) -> Any:
        module, extra = _NEEDS[self.scheme]
        try:
            fsspec = importlib.import_module("fsspec")
            importlib.import_module(module)
        except ImportError as error:
            raise UserError(
                f"{self.address} needs the package {module}; install it with `pip install 'paceline[{extra}]'`."
            ) from error
        patience = self._patience
        if self.scheme == "s3":
            limits = {"connect_timeout": patience.connect_s, "read_timeout": patience.silence_s}
            return fsspec.filesystem(
                "s3",
                anon=self._anonymous,
                config_kwargs=limits | {"retries": {"max_attempts": 1}},
                skip_instance_cache=True,
            )
        import aiohttp

        waiting = aiohttp.ClientTimeout(total=None, sock_connect=patience.connect_s, sock_read=patience.silence_s)
        return fsspec.filesystem(
            self.scheme,
            client_kwargs={"timeout": waiting, "trust_env": True},
            headers={"Accept-Encoding": "identity"},
            skip_instance_cache=True,
        )

    def _info(self) -> dict[str, Any]:
        found: dict[str, Any] = (
            self._files.info(self._secret, refresh=True) if self.scheme == "s3" else self._files.info(self._secret)
        )
        return found

    def _range(self, start: int, end: int) -> bytes:
        content: bytes = self._files.cat_file(self._secret, start=start, end=end)
        if len(content) != end - start:
            raise ShortReadError(f"{len(content):,} bytes came where {end - start:,} were asked for")
        return content

    def _persist(self, ask: Callable[[], Any]) -> Any:
        """Ask until there is an answer, patience is at its end, or asking again would not help."""
        pause_s, said = self._patience.pause_s, False
        for attempt in range(1, self._patience.tries + 1):
            try:
                return ask()
            except Exception as error:
                if not self._anonymous and type(error).__name__ == "NoCredentialsError":
                    self._anonymous = True  # a bucket may be open to all
                    self._files = self._connect()
                    continue
                reason = self._hopeless(error)
                if reason:
                    raise RemoteError(f"{self.address}: {reason}") from error
                if isinstance(error, ValueError) and not isinstance(error, OSError):
                    raise
                if attempt == self._patience.tries:
                    raise RemoteError(
                        f"{self.address} cannot be read ({_words(error)}), after {attempt} tries; check the network "
                        "and the server, and start again."
                    ) from error
                if not said:
                    log.warning("%s: %s; trying again.", self.address, _words(error))
                    said = True
                time.sleep(pause_s)
                pause_s = min(2 * pause_s, self._patience.most_pause_s)
        raise AssertionError("the last try returns or raises")

    def _hopeless(self, error: Exception) -> str:
        """Say why asking again would not help; empty where it may."""
        status = _status(error)
        if status in (401, 403) or isinstance(error, PermissionError):
            mend = (
                "set the credentials (AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY, or a profile)"
                if self.scheme == "s3"
                else "ask its owner for access, or use an address that carries it"
            )
            return f"the server refuses access (403); {mend}."
        if status == 404 or (isinstance(error, FileNotFoundError) and error.__cause__ is None and status is None):
            return "there is no such file on the server (404); correct the address."
        if status is not None and 400 <= status < 500 and status not in _WORTH_ANOTHER_TRY and status != 416:
            return f"the server answers with status {status}; correct the address."
        return ""


def _status(error: BaseException) -> int | None:
    """Find the HTTP status in an error or in what caused it."""
    seen: BaseException | None = error
    while seen is not None:
        status = getattr(seen, "status", None)
        if isinstance(status, int):
            return status
        response = getattr(seen, "response", None)
        if isinstance(response, dict):
            code = response.get("ResponseMetadata", {}).get("HTTPStatusCode")
            if isinstance(code, int):
                return code
        seen = seen.__cause__
    return None


def _words(error: BaseException) -> str:
    """Say in a few words what an error of the network is."""
    status = _status(error)
    if status is not None:
        return f"the server answers with status {status}"
    cause = error.__cause__ if isinstance(error, FileNotFoundError) and error.__cause__ else error
    if isinstance(cause, TimeoutError):
        return "the server does not answer in time"
    return shown(f"{type(cause).__name__}: {cause}".rstrip(": "))
