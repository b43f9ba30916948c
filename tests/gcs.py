"""An object store for tests that serves TensorFlow's own `gs://` file system.

TensorFlow reaches storage.googleapis.com through the proxy that `https_proxy` names. `Store` is that
proxy: it terminates TLS with a certificate created at startup, and replies like Cloud
Storage from memory. It logs every request with its bytes, and can delay or refuse any request, or
answer it by killing the client.

It runs in a separate process because TensorFlow holds Python's lock during some of its requests.
"""

from __future__ import annotations

import base64
import bisect
import collections
import contextlib
import dataclasses
import json
import multiprocessing
import multiprocessing.managers
import os
import re
import signal
import socketserver
import ssl
import subprocess
import threading
import time
import urllib.parse
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import NamedTuple

_HOSTS = ("www.googleapis.com", "storage.googleapis.com", "oauth2.googleapis.com")
_PAGE = 1000  # Names per page of a listing, as in Cloud Storage.


class Request(NamedTuple):
    """A request of a client.

    Attributes:
      kind: `get`, `stat`, `list`, `probe` (a listing of one name), `bucket`, `start` (of an upload),
        `upload`, `mkdir`, `copy`, `delete`.
      bucket, name: of the object; `name` is the prefix of a listing.
      code: status code of the reply.
      up, down: bytes of object content sent and received.
      client: name of the client; see `Store.environment`.
    """

    kind: str
    bucket: str
    name: str
    code: int
    up: int
    down: int
    client: str


@dataclasses.dataclass
class Fault:
    """A fault in requests, from the `skip`-th on, whose `<kind> <bucket>/<name>` matches.

    Attributes:
      pattern: regular expression.
      code: status code to reply with; 0: kill the client before the request takes effect or, with
        `after`, once it has taken effect.
      skip: matching requests to leave unaffected first.
      times: number of requests to affect.
      client: client whose requests are affected; empty: all.
    """

    pattern: str
    code: int = 0
    skip: int = 0
    times: int = 1
    client: str = ""
    after: bool = False
    signal: signal.Signals = signal.SIGKILL


class _Object(NamedTuple):
    content: bytes
    generation: int
    updated: str


class _Reply(NamedTuple):
    code: int
    body: bytes = b""
    headers: tuple[tuple[str, str], ...] = ()


class Store:
    """A server that starts immediately. All methods may be called from any thread.

    Args:
      folder: folder for the certificate.
    """

    def __init__(self, folder: Path):
        self._requests: list[Request] = []
        self._latency, self._faults, self._pids = 0.0, [], {}
        self._objects: dict[str, dict[str, _Object]] = collections.defaultdict(dict)
        self._names: dict[str, list[str]] = collections.defaultdict(list)
        self._uploads: dict[str, tuple[str, str, bytearray]] = {}
        self._generation, self._lock = 0, threading.RLock()
        self._certificate = _certificate(folder)
        context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
        context.load_cert_chain(self._certificate, folder / "key.pem")
        self._server = _Server(("127.0.0.1", 0), _Connection)
        self._server.store, self._server.context = self, context
        threading.Thread(target=self._server.serve_forever, daemon=True).start()

    def environment(self, client: str = "test") -> dict[str, str]:
        """Returns the variables with which a process reaches this store as `client`."""
        port = self._server.server_address[1]
        return {
            "https_proxy": f"http://{client}:x@127.0.0.1:{port}",
            "no_proxy": "",
            "CURL_CA_BUNDLE": str(self._certificate),
            "GOOGLE_AUTH_TOKEN_FOR_TESTING": "x",
            "NO_GCE_CHECK": "true",
        }

    # --- What goes wrong ------------------------------------------------------------------------------

    def delay(self, seconds: float) -> None:
        """Makes every request take at least this long from now on."""
        self._latency = seconds

    def fail(self, pattern: str, **fault) -> None:
        """Adds a `Fault`."""
        self._faults.append(Fault(pattern, **fault))

    def heal(self) -> int:
        """Ends delays and faults; returns the number of faults that were still pending."""
        left, self._faults, self._latency = len(self._faults), [], 0.0
        return left

    def watch(self, client: str, pid: int) -> None:
        """Sets the process that a fault of a client kills."""
        self._pids[client] = pid

    # --- What is stored -----------------------------------------------------------------------------

    def create(self, bucket: str) -> str:
        """Creates an empty bucket; returns its address."""
        self._objects[bucket].clear()
        self._names[bucket].clear()
        return f"gs://{bucket}"

    def put(self, bucket: str, name: str, content: bytes) -> _Object:
        """Writes an object, as another machine would."""
        with self._lock:
            self._generation += 1
            now = time.time()
            stamp = time.strftime("%Y-%m-%dT%H:%M:%S", time.gmtime(now))
            made = _Object(content, self._generation, f"{stamp}.{int(now % 1 * 1000):03d}Z")
            if name not in self._objects[bucket]:
                bisect.insort(self._names[bucket], name)
            self._objects[bucket][name] = made
            return made

    def delete(self, bucket: str, name: str) -> None:
        with self._lock:
            del self._objects[bucket][name]
            self._names[bucket].remove(name)

    def names(self, bucket: str, prefix: str = "") -> list[str]:
        """Returns the sorted names in a bucket that begin with `prefix`."""
        with self._lock:
            names = self._names[bucket]
            first = bisect.bisect_left(names, prefix)
            last = bisect.bisect_left(names, prefix + "\U0010ffff")
            return names[first:last]

    def content(self, bucket: str, name: str) -> bytes:
        return self._objects[bucket][name].content

    def requests(self, first: int = 0) -> list[Request]:
        """Returns the requests from the `first`-th on, in the order of the replies."""
        return self._requests[first:]

    # --- Replies ------------------------------------------------------------------------------------

    def reply(self, method: str, url: str, headers: dict[str, str], body: bytes, client: str):
        """Returns the reply to a request, or None if the client was killed."""
        time.sleep(self._latency)
        kind, bucket, name, act = self._understood(method, url, headers, body)
        fault = self._fault(f"{kind} {bucket}/{name}", client)
        if fault and not fault.after:
            reply = self._strike(fault, client)
        else:
            with self._lock:
                missing = bucket not in self._objects
                reply = _error(404) if missing else act()
            if fault:
                self._strike(fault, client)
        down = len(reply.body) if kind == "get" else 0
        up = len(body) if kind == "upload" else 0
        self._requests.append(Request(kind, bucket, name, reply.code, up, down, client))
        return reply

    def _fault(self, what: str, client: str) -> Fault | None:
        with self._lock:
            for fault in self._faults:
                if fault.client not in ("", client) or not re.search(fault.pattern, what):
                    continue
                fault.skip -= 1
                if fault.skip >= 0:
                    continue
                fault.times -= 1
                if not fault.times:
                    self._faults.remove(fault)
                return fault
        return None

    def _strike(self, fault: Fault, client: str) -> _Reply:
        if fault.code:
            return _error(fault.code)
        os.kill(self._pids[client], fault.signal)
        return _error(503)

    def _understood(
        self, method: str, url: str, headers: dict[str, str], body: bytes
    ) -> tuple[str, str, str, Callable[[], _Reply]]:
        """Parses a request into (kind, bucket, name, action)."""
        parts = urllib.parse.urlsplit(url)
        query = dict(urllib.parse.parse_qsl(parts.query))
        path, unquote = parts.path, urllib.parse.unquote
        if "upload_id" in query:
            bucket, name, _ = self._uploads.get(query["upload_id"], ("", "", None))
            return "upload", bucket, name, lambda: self._upload(query["upload_id"], headers, body)
        if found := re.fullmatch(r"/upload/storage/v1/b/([^/]+)/o", path):
            bucket, name = found[1], query["name"]
            if query["uploadType"] == "resumable":
                return "start", bucket, name, lambda: self._start(bucket, name)
            return "mkdir", bucket, name, lambda: self._make(bucket, name, query, body)
        if found := re.fullmatch(r"/storage/v1/b/([^/]+)/o/(.+)/rewriteTo/b/([^/]+)/o/(.+)", path):
            bucket, source, to = found[1], unquote(found[2]), (found[3], unquote(found[4]))
            return "copy", to[0], to[1], lambda: self._copy(bucket, source, *to)
        if found := re.fullmatch(r"/storage/v1/b/([^/]+)/o/(.+)", path):
            bucket, name = found[1], unquote(found[2])
            act = self._delete if method == "DELETE" else self._stat
            return (
                ("delete" if method == "DELETE" else "stat"),
                bucket,
                name,
                lambda: act(bucket, name),
            )
        if found := re.fullmatch(r"/storage/v1/b/([^/]+)/o", path):
            bucket, kind = found[1], "probe" if query.get("maxResults") == "1" else "list"
            return kind, bucket, query.get("prefix", ""), lambda: self._list(bucket, query)
        if found := re.fullmatch(r"/storage/v1/b/([^/]+)(/storageLayout)?", path):
            return "bucket", found[1], "", lambda: _json({"name": found[1], "location": "US"})
        if found := re.fullmatch(r"/([^/]+)/(.+)", path):
            bucket, name = found[1], unquote(found[2])
            return "get", bucket, name, lambda: self._get(bucket, name, headers)
        raise ValueError(f"{method} {url}: not a request of TensorFlow")

    def _start(self, bucket: str, name: str) -> _Reply:
        upload = f"{len(self._uploads)}"
        self._uploads[upload] = bucket, name, bytearray()
        place = f"https://www.googleapis.com/upload/storage/v1/b/{bucket}/o?upload_id={upload}"
        return _Reply(200, b"", (("Location", place),))

    def _upload(self, upload: str, headers: dict[str, str], body: bytes) -> _Reply:
        if upload not in self._uploads:
            return _error(404)
        bucket, name, received = self._uploads[upload]
        asked = headers.get("content-range", f"bytes 0-/{len(body)}")
        total = asked.rpartition("/")[2]
        if not asked.startswith("bytes */"):
            received[int(asked.split()[1].partition("-")[0]) :] = body
        if total == "*" or len(received) < int(total):
            # The range received so far; without the header, nothing has arrived.
            held = (("Range", f"bytes=0-{len(received) - 1}"),) if received else ()
            return _Reply(308, b"", held)
        return _described(self.put(bucket, name, bytes(received)))

    def _make(self, bucket: str, name: str, query: dict[str, str], body: bytes) -> _Reply:
        if query.get("ifGenerationMatch") == "0" and name in self._objects[bucket]:
            return _error(412)
        return _described(self.put(bucket, name, body))

    def _copy(self, bucket: str, source: str, to: str, name: str) -> _Reply:
        if source not in self._objects[bucket]:
            return _error(404)
        self.put(to, name, self._objects[bucket][source].content)
        return _json({"done": True})

    def _delete(self, bucket: str, name: str) -> _Reply:
        if name not in self._objects[bucket]:
            return _error(404)
        self.delete(bucket, name)
        return _Reply(204)

    def _stat(self, bucket: str, name: str) -> _Reply:
        found = self._objects[bucket].get(name)
        return _described(found) if found else _error(404)

    def _list(self, bucket: str, query: dict[str, str]) -> _Reply:
        prefix, delimiter = query.get("prefix", ""), query.get("delimiter", "\n")
        limit, after = int(query.get("maxResults", _PAGE)), query.get("pageToken", "")
        shown: list[str] = []
        for name in self.names(bucket, prefix):
            head, found, _ = name[len(prefix) :].partition(delimiter)
            entry = prefix + head + found
            if entry <= after or shown and shown[-1] == entry:
                continue
            if len(shown) == min(limit, _PAGE):
                return self._page(bucket, shown, shown[-1], delimiter, prefix)
            shown.append(entry)
        return self._page(bucket, shown, "", delimiter, prefix)

    def _page(self, bucket: str, shown: list[str], token: str, delimiter: str, prefix: str):
        folders = [n for n in shown if n.endswith(delimiter) and n != prefix]
        files = [{"name": n} for n in shown if n not in set(folders)]
        page = {"items": files, "prefixes": folders, "nextPageToken": token}
        return _json({key: value for key, value in page.items() if value})

    def _get(self, bucket: str, name: str, headers: dict[str, str]) -> _Reply:
        found = self._objects[bucket].get(name)
        if found is None:
            return _error(404)
        span = re.fullmatch(r"bytes=(\d+)-(\d*)", headers.get("range", ""))
        if not span:
            return _Reply(200, found.content)
        if int(span[1]) >= len(found.content):
            return _error(416)
        end = int(span[2]) + 1 if span[2] else None
        return _Reply(206, found.content[int(span[1]) : end])


def _json(value: object) -> _Reply:
    return _Reply(200, json.dumps(value).encode())


def _error(code: int) -> _Reply:
    return _Reply(code, json.dumps({"error": {"code": code}}).encode())


def _described(found: _Object) -> _Reply:
    size, generation = str(len(found.content)), str(found.generation)
    return _json({"size": size, "generation": generation, "updated": found.updated})


def _certificate(folder: Path) -> Path:
    """Creates a certificate for the API hosts, trusted by clients that are given its path."""
    path, names = folder / "certificate.pem", ",".join(f"DNS:{host}" for host in _HOSTS)
    command = ["openssl", "req", "-x509", "-newkey", "rsa:2048", "-nodes", "-days", "2"]
    command += ["-keyout", folder / "key.pem", "-out", path, "-subj", "/CN=test"]
    command += ["-addext", f"subjectAltName={names}"]
    subprocess.run(command, check=True, capture_output=True)
    return path


class _Manager(multiprocessing.managers.BaseManager):
    """Runs a `Store` in another process."""


_Manager.register("Store", Store)


@contextlib.contextmanager
def running(folder: Path) -> Iterator[Store]:
    """Yields a store in another process, which ends with the block."""
    with _Manager(ctx=multiprocessing.get_context("spawn")) as manager:
        yield manager.Store(folder)


class Counted(collections.Counter):
    """Requests within a block by kind, and their bytes, `up` and `down`."""

    @property
    def requests(self) -> int:
        return self.total() - self["up"] - self["down"]


@contextlib.contextmanager
def counted(store: Store, client: str = "") -> Iterator[Counted]:
    """Yields a counter, filled when the block ends, of the requests of a client or of all."""
    before, counter = len(store.requests()), Counted()
    yield counter
    for request in store.requests(before):
        if client in ("", request.client):
            counter.update({request.kind: 1, "up": request.up, "down": request.down})


class _Server(socketserver.ThreadingTCPServer):
    daemon_threads = allow_reuse_address = True
    request_queue_size = 256
    store: Store
    context: ssl.SSLContext

    def handle_error(self, request, client_address) -> None:
        """Ignores the broken connections that killed clients leave."""


class _Connection(socketserver.StreamRequestHandler):
    disable_nagle_algorithm = True

    def handle(self) -> None:
        # libcurl requests a tunnel to the host, with the user name from the proxy's address.
        _, _, headers = self._head()
        user = base64.b64decode(headers.get("proxy-authorization", "").partition(" ")[2])
        client = user.decode().partition(":")[0]
        self._send(b"HTTP/1.1 200 OK\r\n\r\n")
        with self.server.context.wrap_socket(self.request, server_side=True) as encrypted:
            self.rfile, self.wfile = encrypted.makefile("rb"), encrypted.makefile("wb")
            with contextlib.suppress(OSError, EOFError):
                while True:
                    self._one(client)

    def _one(self, client: str) -> None:
        method, url, headers = self._head()
        if headers.get("expect"):
            self._send(b"HTTP/1.1 100 Continue\r\n\r\n")
        body = self._body(headers)
        code, content, more = self.server.store.reply(method, url, headers, body, client)
        lines = [f"HTTP/1.1 {code} -", f"Content-Length: {len(content)}"]
        head = "\r\n".join([*lines, *(f"{k}: {v}" for k, v in more)]) + "\r\n\r\n"
        self._send(head.encode() + content)

    def _head(self) -> tuple[str, str, dict[str, str]]:
        first, headers = self.rfile.readline().decode("latin-1"), {}
        while line := self.rfile.readline().decode("latin-1").strip():
            key, _, value = line.partition(":")
            headers[key.lower()] = value.strip()
        if not first:
            raise EOFError
        method, url, _ = first.split(" ", 2)
        return method, url, headers

    def _body(self, headers: dict[str, str]) -> bytes:
        if headers.get("transfer-encoding", "") != "chunked":
            return self.rfile.read(int(headers.get("content-length", 0)))
        parts = []
        while size := int(self.rfile.readline(), 16):
            parts.append(self.rfile.read(size))
            self.rfile.readline()
        self.rfile.readline()
        return b"".join(parts)

    def _send(self, content: bytes) -> None:
        self.wfile.write(content)
        self.wfile.flush()
