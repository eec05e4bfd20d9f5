"""One file over HTTP, continued where a connection broke: in the same run, or from what an earlier run kept."""

import os
import time
from collections.abc import Iterator
from contextlib import closing
from typing import BinaryIO
from urllib.parse import urljoin, urlsplit
from urllib.request import getproxies, proxy_bypass

import urllib3

ATTEMPTS = 5
"""In a row that bring less than `RENEWED`."""
RENEWED = 1 << 20
PAUSE_S = 0.5
"""Before the second attempt; twice as long before each further one."""
TIMEOUT = urllib3.Timeout(connect=10, read=30)
PATIENCE_S = 60.0
"""From then on an answer must have brought `SLOWEST` bytes a second, for no server to hold a device for ever."""
SLOWEST = 512
CHUNK = 1 << 16
REDIRECTS = 5
TEMPORARY = {408, 425, 429}
REASONS = {
    urllib3.exceptions.NameResolutionError: "its server has no address; check its name and this device's network",
    urllib3.exceptions.NewConnectionError: "no server answers there",
    urllib3.exceptions.TimeoutError: "the server does not answer in time",
    urllib3.exceptions.SSLError: "the server's certificate is not one that this device accepts",
    urllib3.exceptions.ProxyError: "the proxy does not answer",
    ValueError: "this is no address of a file",
}
"""The first that fits: some are kinds of others."""


class Broken(Exception):
    """The server cannot be reached, or stopped before the end; what has come is in the file."""


class Refused(Exception):
    """The server answered that it does not give the file."""

    def __init__(self, message: str, status: int) -> None:
        super().__init__(message)
        self.status = status


class TooLong(Exception):
    """The server sends more than there can be."""


def fill(file: BinaryIO, url: str, limit: int, *, whole: bool) -> None:
    """Bring the rest of `url` into a file that holds its beginning, in several attempts.

    `limit` is the most that may come, and with `whole` the least too.
    """
    failures, furthest = 0, file.seek(0, os.SEEK_END)
    if furthest > limit:
        furthest = file.truncate(0)
    while not (whole and file.seek(0, os.SEEK_END) == limit):
        try:
            _attempt(file, url, limit, whole=whole)
        except Broken:
            reached = file.seek(0, os.SEEK_END)
            failures = 0 if reached - furthest >= RENEWED else failures + 1
            furthest = max(furthest, reached)
            if failures == ATTEMPTS:
                raise
            if not whole:  # of a length not known: by the next attempt it may be another file
                file.truncate(0)
            time.sleep(PAUSE_S * 2 ** max(failures - 1, 0))
        else:
            return


def _attempt(file: BinaryIO, url: str, limit: int, *, whole: bool) -> None:
    have = file.seek(0, os.SEEK_END)
    try:
        with closing(_answer(url, have)) as response:
            continued = response.status == 206 and _start(response) == have
            if not continued:
                file.truncate(0)
            if response.status == 416:
                raise Broken(f"{url} ended after {have} of {limit} bytes")
            if not continued and response.status != 200:
                raise Broken(
                    f"{url} cannot be read: the server answers {response.status} to a request from byte {have}"
                )
            file.seek(0, os.SEEK_END)
            for chunk in _chunks(response, url):
                if file.tell() + len(chunk) > limit:
                    raise TooLong(f"{url} is longer than the {limit} bytes it can have")
                file.write(chunk)
            if whole and file.tell() < limit:
                raise Broken(f"{url} ended after {file.tell()} of {limit} bytes")
    except (urllib3.exceptions.HTTPError, ValueError) as error:  # ValueError: an address that cannot be taken apart
        raise Broken(f"{url} cannot be read: {_reason(error)}") from error


def _answer(url: str, have: int) -> urllib3.BaseHTTPResponse:
    """Ask for a file from byte `have`; follow redirects of the same scheme."""
    scheme = urlsplit(url).scheme
    for _ in range(REDIRECTS + 1):
        headers = {"Range": f"bytes={have}-"} if have else {}
        response = _pool(url).request(
            "GET", url, headers=headers, preload_content=False, redirect=False, retries=False, timeout=TIMEOUT
        )
        location = response.get_redirect_location()
        if not location:
            break
        response.close()
        target = urljoin(url, location)
        if urlsplit(target).scheme != scheme:
            raise Refused(f"{url} leads to {target}, which is not {scheme}", response.status)
        url = target
    else:
        raise Refused(f"{url} leads from one address to the next without an end", response.status)
    if response.status >= 400 and response.status != 416:
        response.close()
        message = f"{url} is refused: the server answers {response.status}"
        if response.status >= 500 or response.status in TEMPORARY:
            raise Broken(message)
        raise Refused(message, response.status)
    return response


def _pool(url: str) -> urllib3.PoolManager:
    """Take the proxy that the environment names for an address, if it does."""
    parts = urlsplit(url)
    proxy = None if proxy_bypass(parts.hostname or "") else getproxies().get(parts.scheme)
    return urllib3.ProxyManager(proxy) if proxy else urllib3.PoolManager()


def _chunks(response: urllib3.BaseHTTPResponse, url: str) -> Iterator[bytes]:
    start, received = time.monotonic(), 0
    while chunk := response.read1(CHUNK, decode_content=False):
        received += len(chunk)
        yield chunk
        taken = time.monotonic() - start
        if taken > PATIENCE_S and received < taken * SLOWEST:
            raise Broken(f"{url} came too slowly: {received} bytes in {taken:.0f} s")


def _start(response: urllib3.BaseHTTPResponse) -> int | None:
    """Read where the part that the server sends begins, as in `bytes 100-199/200`."""
    unit, _, numbers = response.headers.get("Content-Range", "").partition(" ")
    first = numbers.partition("-")[0]
    return int(first) if unit == "bytes" and first.isdecimal() else None


def _reason(error: Exception) -> str:
    """Say what broke without the library's own names of objects."""
    for kind, reason in REASONS.items():
        if isinstance(error, kind):
            return reason
    return "the connection broke"
