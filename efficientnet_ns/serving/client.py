"""Classify photos on a server: `python -m efficientnet_ns.serving.client --model=NAME photo.jpg …`.

REST needs only the standard library; `--protocol=grpc` needs tensorflow-serving-api. The output names
every photo that the server cannot decode, every request that fails after all retries and every
response that does not come from a model exported by this package; the exit code is then 1. For
invalid usage, it is 2.
"""

from __future__ import annotations

import argparse
import base64
import contextlib
import csv
import functools
import html
import http.client
import io
import json
import math
import random
import re
import socket
import sys
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from urllib.parse import quote, urlsplit

from efficientnet_ns.files.standard_output import escaped, photo_block, printable, quiet_when_unread

_VALID = "valid"
_TOP = ("top_classes", "top_class_names", "top_probabilities")
# Overloaded or not ready yet; a retry does not help with any other status.
_RETRIED_STATUS = {408, 425, 429, 500, 502, 503, 504}
_MAX_TIMEOUT = 86_400  # A day, in seconds; sockets accept a few weeks at most.
_RETRIED_GRPC = {"UNAVAILABLE", "RESOURCE_EXHAUSTED", "DEADLINE_EXCEEDED", "ABORTED"}


class RequestFailed(RuntimeError):
    """The server refused, could not be reached, or does not serve a model of this package.

    Attributes:
      retry: whether the same request may succeed later.
    """

    def __init__(self, message: str, *, retry: bool):
        super().__init__(message)
        self.retry = retry


@dataclass(frozen=True)
class Result:
    """Predictions for one photo.

    Attributes:
      photo: path of the photo.
      predictions: {`index`, `name`, `probability`} of each class, best first; empty on error.
      error: why there are no predictions, or an empty string.
    """

    photo: str
    predictions: tuple[dict[str, Any], ...] = ()
    error: str = ""


class RestServer:
    """The REST interface of TensorFlow Serving.

    Args:
      url: e.g. `http://localhost:8501`.
      model: name of the model.
      version: version of the model; None: the server chooses.
      timeout: seconds per request.

    Raises:
      ValueError: If `url` is not an address.
    """

    def __init__(self, url: str, model: str, version: int | None = None, timeout: float = 30.0):
        kinds = {"http": http.client.HTTPConnection, "https": http.client.HTTPSConnection}
        try:
            # Without `//`, urlsplit interprets `localhost:8501` as a scheme and a path.
            parts = urlsplit(url if "//" in url else f"http://{url}")
            self._connect = functools.partial(
                kinds[parts.scheme], parts.hostname, parts.port, timeout=timeout
            )
            if "@" in parts.netloc or parts.query or parts.fragment:
                raise ValueError("parts that would not be sent")
            # Raises errors now rather than in requests: for ports out of range, invalid DNS labels
            # and control characters. `_connect` only creates an object, without connecting.
            usable = (parts.hostname or "").encode("idna") and parts.port != 0 and self._connect()
        except (KeyError, ValueError, http.client.HTTPException):
            usable = False
        if not usable:
            raise ValueError(
                f"{url!r} is not an address like http://localhost:8501, which may end in a path but "
                "has no user, password, query or fragment"
            )
        self._address, self._timeout = parts.netloc, timeout
        chosen = "" if version is None else f"/versions/{version}"
        # % is kept, because the path of an address may already be quoted.
        base = quote(parts.path.rstrip("/"), safe="/%")
        self._path = f"{base}/v1/models/{quote(model, safe='')}{chosen}:predict"

    def predict(self, images: Sequence[bytes]) -> Any:
        """Returns the outputs of `serving_default` for encoded images; see `_results`.

        Raises:
          RequestFailed: If there is no connection, an HTTP error, or an unexpected response.
        """
        encoded = [{"b64": base64.b64encode(image).decode()} for image in images]
        # The columnar format: with `instances`, the response would contain one object per image.
        body = json.dumps({"inputs": {"image_bytes": encoded}})
        connection = self._connect()
        start = time.monotonic()
        try:
            # First, because the timer needs the socket; the timeout includes the connection time.
            connection.connect()
            with _shut_after(start + self._timeout - time.monotonic(), connection.sock):
                connection.request("POST", self._path, body, {"Content-Type": "application/json"})
                response = connection.getresponse()
                content = response.read()
        except (OSError, http.client.HTTPException) as e:
            raise RequestFailed(
                f"no response from {self._address}: {str(e) or type(e).__name__}", retry=True
            ) from e
        finally:
            connection.close()
        if response.status != 200:
            target = response.getheader("Location")
            where = f" to {target}" if target else ""
            raise RequestFailed(
                f"HTTP {response.status}{where}: {_explanation(content)}",
                retry=response.status in _RETRIED_STATUS,
            )
        try:
            return json.loads(content)["outputs"]
        except (ValueError, LookupError, TypeError, RecursionError) as e:
            raise RequestFailed(
                f"{self._address} does not respond like TensorFlow Serving: {_explanation(content)}",
                retry=False,
            ) from e


@contextlib.contextmanager
def _shut_after(seconds: float, sock: socket.socket) -> Iterator[None]:
    """Ends the block with TimeoutError after `seconds`, even if the server keeps sending data.

    The timeout of the socket applies to each read.
    """
    late = threading.Event()

    def shut() -> None:
        late.set()
        with contextlib.suppress(OSError):
            # Not the method of an encrypted socket, which would not wake the reader.
            socket.socket.shutdown(sock, socket.SHUT_RDWR)

    timer = threading.Timer(max(0.0, seconds), shut)
    timer.daemon = True
    timer.start()
    try:
        yield
    except (OSError, http.client.HTTPException) as e:
        if late.is_set():
            # The reader saw only that the connection was closed.
            raise TimeoutError("timed out") from e
        raise
    finally:
        timer.cancel()
    # A response without a length ends with the connection, so a truncated one looks complete.
    if late.is_set():
        raise TimeoutError("timed out")


def _explanation(content: bytes) -> str:
    """Returns the body of a response on one line: its `error`, HTML title, or beginning."""
    text = content.decode("utf-8", "replace")
    try:
        text = str(json.loads(text)["error"])
    # RecursionError: JSON that is nested thousands of levels deep.
    except (ValueError, LookupError, TypeError, RecursionError):
        title = re.search(r"<title[^>]*>(.*?)</title", text, re.DOTALL | re.IGNORECASE)
        if title or re.match(r"\s*<(!doctype|html)", text, re.IGNORECASE):
            text = f"a web page, {html.unescape(title[1]) if title else 'without a title'}"
    return " ".join(text.split())[:300] or "an empty body"


class GrpcServer:
    """The gRPC interface of TensorFlow Serving.

    Args:
      address: `host:port`.
      model, version, timeout: see `RestServer`.

    Raises:
      ValueError: If tensorflow-serving-api is not installed.
    """

    def __init__(self, address: str, model: str, version: int | None = None, timeout: float = 30.0):
        try:
            # Not at the top, because REST needs only the standard library.
            import grpc
            import tensorflow as tf
            from tensorflow_serving.apis import predict_pb2, prediction_service_pb2_grpc
        except ImportError as e:
            raise ValueError(
                "gRPC needs tensorflow-serving-api (pip install 'efficientnet-ns[serving]', or in a "
                f"clone pip install -e '.[serving]'): {e}"
            ) from e
        self._grpc, self._tf, self._messages = grpc, tf, predict_pb2
        self._model, self._version, self._timeout = model, version, timeout
        # By default, gRPC rejects responses above 4 MB.
        unlimited = [("grpc.max_send_message_length", -1), ("grpc.max_receive_message_length", -1)]
        channel = grpc.insecure_channel(address, unlimited)
        self._stub = prediction_service_pb2_grpc.PredictionServiceStub(channel)

    def predict(self, images: Sequence[bytes]) -> Any:
        """Returns the outputs of `serving_default` for encoded images; see `RestServer.predict`."""
        request = self._messages.PredictRequest()
        request.model_spec.name = self._model
        request.model_spec.signature_name = "serving_default"
        if self._version is not None:
            request.model_spec.version.value = self._version
        tensor = self._tf.make_tensor_proto(list(images), shape=[len(images)])
        request.inputs["image_bytes"].CopyFrom(tensor)
        try:
            outputs = self._stub.Predict(request, self._timeout).outputs
        except self._grpc.RpcError as e:
            code = e.code().name
            raise RequestFailed(f"{code}: {e.details()}", retry=code in _RETRIED_GRPC) from e
        try:
            return {
                name: _texts(self._tf.make_ndarray(tensor).tolist())
                for name, tensor in outputs.items()
            }
        except (TypeError, ValueError) as e:
            raise RequestFailed(f"cannot read the outputs: {e}", retry=False) from e


def _texts(value: Any) -> Any:
    """Returns `value` with all bytes in its nested lists decoded to text."""
    if isinstance(value, list):
        return [_texts(item) for item in value]
    return value.decode("utf-8", "replace") if isinstance(value, bytes) else value


def with_retries(
    request: Callable[[], Any],
    retries: int,
    backoff: float = 0.2,
    sleep: Callable[[float], None] = time.sleep,
) -> Any:
    """Calls `request` and retries it after failures that may be temporary.

    Args:
      request: function that raises `RequestFailed` on failure.
      retries: maximum number of attempts after the first.
      backoff: seconds before the second attempt, doubled for each further one. A random addition of
        up to half of it keeps many clients from retrying at the same time.
      sleep: function that waits for a number of seconds.

    Raises:
      RequestFailed: If the last attempt fails.
    """
    for attempt in range(retries + 1):
        try:
            return request()
        except RequestFailed as e:
            if not e.retry or attempt == retries:
                raise
            sleep(backoff * 2**attempt * (1 + random.random() / 2))


def classify(
    server: RestServer | GrpcServer,
    photos: Sequence[str],
    *,
    batch_size: int = 8,
    concurrency: int = 4,
    retries: int = 5,
    top: int = 5,
    latencies: list[float] | None = None,
) -> Iterator[Result]:
    """Yields results in the order of the photos.

    Args:
      server: where the model runs.
      photos: paths of image files.
      batch_size: photos per request.
      concurrency: number of simultaneous requests.
      retries: see `with_retries`.
      top: maximum number of classes per photo; the model returns at most its own `top_k`.
      latencies: receives the seconds of every successful request, including retries.
    """

    def request(paths: Sequence[str]) -> list[Result]:
        images, results = {}, {}
        for path in paths:
            try:
                # By path: a photo given twice is sent once. Read in the thread that sends it, so no
                # more than `concurrency` batches are in memory.
                images[path] = Path(path).read_bytes()
            except OSError as e:
                results[path] = Result(path, error=e.strerror or str(e))
        if images:
            start = time.perf_counter()
            try:
                outputs = with_retries(lambda: server.predict(list(images.values())), retries)
                seconds = time.perf_counter() - start
                results.update(zip(images, _results(list(images), outputs, top)))
            except RequestFailed as e:
                results.update({path: Result(path, error=str(e)) for path in images})
            else:
                if latencies is not None:
                    latencies.append(seconds)
        return [results[path] for path in paths]

    batches = [photos[i : i + batch_size] for i in range(0, len(photos), batch_size)]
    with ThreadPoolExecutor(concurrency) as pool:
        for results in pool.map(request, batches):
            yield from results


def _results(photos: Sequence[str], outputs: Any, top: int) -> list[Result]:
    """Returns one result per photo.

    Args:
      photos: paths.
      outputs: name → one entry per photo: `valid`, and for the best classes `top_classes`,
        `top_class_names` and `top_probabilities`. Other models may return anything.
      top: classes per photo.

    Raises:
      RequestFailed: If the outputs come from another model.
    """
    _check_names(outputs)
    try:
        valid, *columns = (_of_length(outputs[name], len(photos)) for name in (_VALID, *_TOP))
        return [
            _result(photo, valid[row], [column[row] for column in columns], top)
            for row, photo in enumerate(photos)
        ]
    except (TypeError, ValueError, OverflowError) as e:
        raise RequestFailed(f"not the outputs of an exported model: {e}", retry=False) from e


def _result(photo: str, valid: Any, columns: Sequence[Any], top: int) -> Result:
    if not isinstance(valid, bool):
        raise TypeError(f"{valid!r} as {_VALID!r}")
    if not valid:
        return Result(photo, error="the server cannot decode it")
    classes = len(columns[0])
    if not classes:
        raise ValueError("a photo without classes")
    columns = [_of_length(column, classes)[:top] for column in columns]
    return Result(photo, tuple(_prediction(*values) for values in zip(*columns)))


def _of_length(values: Any, length: int) -> list:
    if not isinstance(values, list) or len(values) != length:
        raise ValueError(f"expected a list of {length}, found {str(values)[:100]!r}")
    return values


def _check_names(outputs: Any) -> None:
    # A single output comes without its name.
    found = sorted(map(str, outputs)) if isinstance(outputs, dict) else ["one without a name"]
    missing = [name for name in (_VALID, *_TOP) if name not in found]
    if missing:
        raise RequestFailed(
            "the model was not exported by efficientnet_ns.export_model: its outputs are "
            f"{', '.join(found) or 'none'}; missing: {', '.join(missing)}",
            retry=False,
        )


def _prediction(index: Any, name: Any, probability: Any) -> dict[str, Any]:
    if not isinstance(name, str):
        raise TypeError(f"{name!r} as the name of a class")
    # Also rejects bool, a subclass of int.
    if type(index) is not int or index < 0:
        raise TypeError(f"{index!r} as the index of a class")
    # Rounding in the model may give values just above 1.
    if type(probability) not in (int, float) or not 0 <= probability <= 1.001:
        raise TypeError(f"{probability!r} as a probability")
    return {"index": index, "name": name, "probability": float(probability)}


def percentile(values: Sequence[float], percent: float) -> float:
    """Returns a percentile of the values, `percent` in 0..100, by the nearest-rank method."""
    ordered = sorted(values)
    return ordered[max(0, math.ceil(percent / 100 * len(ordered)) - 1)]


def summary(latencies: Sequence[float], photos: int, seconds: float) -> str:
    """Returns `12 photos in 0.8 s (15.0 photos/s); request p50 61 ms, p90 70 ms, p99 82 ms`.

    Args:
      latencies: seconds of every successful request.
      photos: number of classified photos.
      seconds: duration of the whole run.
    """
    text = f"{photos} photos in {seconds:.1f} s ({photos / max(seconds, 1e-9):.1f} photos/s)"
    if latencies:
        shown = [f"p{p} {percentile(latencies, p) * 1e3:.0f} ms" for p in (50, 90, 99)]
        text += f"; request {', '.join(shown)}"
    return text


def as_json(results: Sequence[Result]) -> str:
    """Formats results as one JSON object per line: `photo` with `predictions` or `error`."""
    lines = []
    for result in results:
        known = {"error": result.error} if result.error else {"predictions": result.predictions}
        lines.append(json.dumps({"photo": result.photo, **known}))
    return "\n".join(lines)


def as_csv(results: Sequence[Result]) -> str:
    """Formats results as CSV with one line per photo and class."""
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(["photo", "rank", "index", "name", "probability", "error"])
    for result in results:
        if result.error:
            # Python 3.10 cannot write null characters, which other servers may send.
            error = result.error.replace("\0", "\\0")
            writer.writerow([result.photo, "", "", "", "", error])
        for rank, prediction in enumerate(result.predictions, 1):
            writer.writerow([result.photo, rank, *prediction.values(), ""])
    return text.getvalue().rstrip("\n")


def as_table(results: Sequence[Result]) -> str:
    """Formats results as one text block per photo with its classes in aligned columns."""
    blocks = []
    for result in results:
        if result.error:
            blocks.append(f"{escaped(result.photo)}\n  {escaped(result.error)}")
        else:
            blocks.append(photo_block(result.photo, result.predictions))
    return "\n".join(blocks)


FORMATS = {"table": as_table, "json": as_json, "csv": as_csv}
_SERVERS: dict[str, tuple[type[RestServer | GrpcServer], str]] = {
    "rest": (RestServer, "http://localhost:8501"),
    "grpc": (GrpcServer, "localhost:8500"),
}


def _at_least(low: int) -> Callable[[str], int]:
    def number(text: str) -> int:
        if int(text) < low:
            raise argparse.ArgumentTypeError(f"{text} is below {low}")
        return int(text)

    return number


def _seconds(text: str) -> float:
    # A comparison that also fails for NaN.
    if not 0 < float(text) <= _MAX_TIMEOUT:
        raise argparse.ArgumentTypeError(f"{text} is not above 0 and at most {_MAX_TIMEOUT}")
    return float(text)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m efficientnet_ns.serving.client",
        description=__doc__.partition("\n\n")[2],
    )
    add = parser.add_argument
    add("photos", nargs="+", help="JPEG, PNG, GIF or BMP files")
    add("--model", required=True, help="name of the model")
    add("--version", type=_at_least(0), help="version of the model; default: the server's choice")
    add("--protocol", choices=sorted(_SERVERS), default="rest")
    add("--server", help="address; default: http://localhost:8501, or localhost:8500 with grpc")
    add("--format", choices=sorted(FORMATS), default="table")
    add("--top", type=_at_least(1), default=5, help="classes per photo")
    add(
        "--batch_size",
        type=_at_least(1),
        default=8,
        help="photos per request; the exported server settings allow up to 32",
    )
    add("--concurrency", type=_at_least(1), default=4, help="number of simultaneous requests")
    add(
        "--retries",
        type=_at_least(0),
        default=5,
        help="maximum number of retries, with exponential backoff",
    )
    add("--timeout", type=_seconds, default=30.0, help="seconds per request")
    return parser


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs the command line and returns the exit code."""
    parser = _parser()
    chosen = parser.parse_args(arguments)
    kind, address = _SERVERS[chosen.protocol]
    try:
        server = kind(chosen.server or address, chosen.model, chosen.version, chosen.timeout)
    except ValueError as e:
        parser.error(str(e))
    latencies: list[float] = []
    start = time.perf_counter()
    results = list(
        classify(
            server,
            chosen.photos,
            batch_size=chosen.batch_size,
            concurrency=chosen.concurrency,
            retries=chosen.retries,
            top=chosen.top,
            latencies=latencies,
        )
    )
    print(printable(FORMATS[chosen.format](results)))
    classified = sum(not result.error for result in results)
    print(summary(latencies, classified, time.perf_counter() - start), file=sys.stderr)
    return int(any(result.error for result in results))


if __name__ == "__main__":
    with quiet_when_unread():
        sys.exit(main())
