"""The client with this package's server and with others."""

from __future__ import annotations

import base64
import contextlib
import csv
import json
import os
import re
import socket
import subprocess
import sys
import threading
from concurrent import futures
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import numpy as np
import pytest
import tensorflow as tf
from served_models import (
    NAMES,
    Session,
    expected,
    jpeg,
)

from efficientnet_ns.serving import client


@pytest.mark.parametrize(
    "wrong",
    [
        "--server=localhost:abc",
        "--server=ftp://localhost",
        "--server=http://ho st",
        "--server=http://a..b",
        "--server=http://[::1",
        "--timeout=-1",
        "--timeout=inf",
        "--timeout=nan",
        "--version=-1",
    ],
)
def test_client_refuses_what_cannot_work(wrong, capsys):
    with pytest.raises(SystemExit):
        client.main(["--model=m", wrong, "photo.jpg"])
    assert wrong.partition("=")[2] in capsys.readouterr().err


def decoded(value):
    """Converts JSON to NumPy input like the published REST API: {"b64": …} are bytes."""
    if isinstance(value, dict) and set(value) == {"b64"}:
        return base64.b64decode(value["b64"], validate=True)
    return [decoded(item) for item in value] if isinstance(value, list) else value


def rest_answer(served: Session, body: dict) -> dict:
    """Returns the response to `POST …:predict`, by the published row and column formats."""
    signature = body.get("signature_name", "serving_default")
    (name,) = served.signatures[signature].inputs
    rows = "instances" in body
    content = body["instances" if rows else "inputs"]
    if rows:  # One input: each instance is its value or an object keyed by its name.
        content = [x[name] if isinstance(x, dict) and name in x else x for x in content]
    elif isinstance(content, dict) and name in content:
        content = content[name]
    outputs = served(signature, **{name: decoded(content)})
    lists = {
        key: [x.decode() if isinstance(x, bytes) else x for x in value.ravel().tolist()]
        for key, value in outputs.items()
    }
    lists = {k: np.array(v, object).reshape(outputs[k].shape).tolist() for k, v in lists.items()}
    if not rows:
        return {"outputs": lists}
    return {"predictions": [dict(zip(lists, row)) for row in zip(*lists.values())]}


@pytest.fixture(scope="module")
def rest(served):
    """Address and log of a REST server, which first sends the statuses in `failures`."""

    class Handler(BaseHTTPRequestHandler):
        failures: list[int] = []
        paths: list[str] = []

        def do_POST(self):
            content = self.rfile.read(int(self.headers["Content-Length"]))
            Handler.paths.append(self.path)
            status, text = 200, b""
            if Handler.failures:
                status, text = Handler.failures.pop(0), b'{"error": "busy"}'
            else:
                text = json.dumps(rest_answer(served, json.loads(content))).encode()
            self.send_response(status)
            self.end_headers()
            self.wfile.write(text)

        def log_message(self, *_):
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield f"http://127.0.0.1:{server.server_port}", Handler
    server.shutdown()


@pytest.mark.parametrize("wrap", [lambda x: x, lambda x: {"image_bytes": x}])
def test_rest_bodies(model, served, wrap):
    images = [jpeg(1), jpeg(2)]
    objects = [{"b64": base64.b64encode(image).decode()} for image in images]
    rows = rest_answer(served, {"instances": [wrap(item) for item in objects]})["predictions"]
    columns = rest_answer(served, {"inputs": wrap(objects)})["outputs"]
    np.testing.assert_allclose(columns["probabilities"], expected(model, images), atol=1e-5)
    assert [row["class_names"] for row in rows] == columns["class_names"]
    assert not any(name.endswith("_bytes") for name in columns)  # They would be returned as base64.


@pytest.fixture
def photos(tmp_path) -> list[str]:
    paths = []
    for i, content in enumerate([jpeg(1), jpeg(2), b"broken", jpeg(3)]):
        paths.append(str(tmp_path / f"{i}.jpg"))
        Path(paths[-1]).write_bytes(content)
    return paths


def test_client_by_rest(model, rest, photos, capsys):
    address, handler = rest
    handler.failures, handler.paths = [503, 429], []
    arguments = ["--model=m", "--version=3", f"--server={address}", "--format=json", "--top=2"]
    assert client.main([*arguments, "--batch_size=2", *photos, "missing.jpg"]) == 1
    shown = capsys.readouterr()
    answers = [json.loads(line) for line in shown.out.splitlines()]
    assert [answer["photo"] for answer in answers] == [*photos, "missing.jpg"]
    assert "cannot decode" in answers[2]["error"] and "No such file" in answers[4]["error"]
    best = expected(model, [jpeg(1)])[0]
    first = answers[0]["predictions"]
    assert [g["index"] for g in first] == np.argsort(-best)[:2].tolist()
    assert first[0]["name"] == NAMES[best.argmax()]
    assert first[0]["probability"] == pytest.approx(best.max(), abs=1e-5)
    assert set(handler.paths) == {"/v1/models/m/versions/3:predict"} and len(handler.paths) == 4
    assert "3 photos in" in shown.err and "p99" in shown.err


def test_client_gives_up(rest, photos, capsys):
    address, handler = rest
    handler.failures, handler.paths = [404], []
    assert client.main(["--model=m", f"--server={address}", photos[0]]) == 1
    assert "HTTP 404" in capsys.readouterr().out and len(handler.paths) == 1
    handler.failures = []
    assert client.main(["--model=m", f"--server={address}", "--format=csv", photos[0]]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[0] == "photo,rank,index,name,probability,error" and len(lines) == 4
    assert client.main(["--model=m", "--server=127.0.0.1:1", "--retries=0", photos[0]]) == 1
    with pytest.raises(SystemExit) as stop:
        client.main(["--model=m", "--server=ftp://x", photos[0]])
    assert stop.value.code == 2


def answering(status: int, body: bytes, **headers: str):
    """Runs a server that always sends this response; yields its address."""

    class Handler(BaseHTTPRequestHandler):
        def do_POST(self):
            self.rfile.read(int(self.headers["Content-Length"]))
            self.send_response(status)
            for name, value in headers.items():
                self.send_header(name, value)
            self.end_headers()
            self.wfile.write(body)

        def log_message(self, *_):
            pass

    @contextlib.contextmanager
    def running():
        with ThreadingHTTPServer(("127.0.0.1", 0), Handler) as server:
            threading.Thread(target=server.serve_forever, daemon=True).start()
            yield f"http://127.0.0.1:{server.server_port}"
            server.shutdown()

    return running()


def outputs(**changed) -> dict:
    """Returns an export's outputs for two photos, with changes; None removes an output."""
    good = {
        "valid": [True, True],
        "top_classes": [[1, 0], [0, 1]],
        "top_class_names": [["b", "a"], ["a", "b"]],
        "top_probabilities": [[0.7, 0.3], [0.6, 0.4]],
    }
    return {key: value for key, value in {**good, **changed}.items() if value is not None}


_HTML = b"<!DOCTYPE html><html><head><title>502 Bad\n Gateway &lt;nginx&gt;</title></head></html>"


_OTHER_SERVERS = {
    "other model": (200, {"outputs": {"scores": [[0.1, 0.9]] * 2}}, "missing: valid, top_classes"),
    "one output": (200, {"outputs": [[0.1, 0.9]] * 2}, "one without a name"),
    "no outputs": (200, {"outputs": {}}, "its outputs are none"),
    "null": (200, {"outputs": None}, "one without a name"),
    "some missing": (200, {"outputs": outputs(valid=None)}, "missing: valid"),
    "fewer rows": (200, {"outputs": outputs(valid=[True])}, "expected a list of 2"),
    "no lists": (200, {"outputs": outputs(top_classes=[1, 0])}, "not the outputs of an exported"),
    "fewer names": (200, {"outputs": outputs(top_class_names=[["b"], ["a"]])}, "a list of 2"),
    "numbers as names": (200, {"outputs": outputs(top_class_names=[[1, 0]] * 2)}, "as the name"),
    "texts as numbers": (200, {"outputs": outputs(top_classes=[["x", "y"]] * 2)}, "'x'"),
    "no classes": (
        200,
        {"outputs": {"valid": [True] * 2, **dict.fromkeys(client._TOP, [[], []])}},
        "a photo without classes",
    ),
    "rows": (200, {"predictions": [1, 2]}, "does not respond like TensorFlow Serving"),
    "error in a good answer": (200, {"error": "no such thing"}, "no such thing"),
    "a list": (200, ["x"], "does not respond like TensorFlow Serving"),
    "a page": (200, _HTML, "a web page, 502 Bad Gateway <nginx>"),
    "nothing": (200, b"", "an empty body"),
    "no text": (200, b"\xff\xfe\x00", "does not respond like TensorFlow Serving"),
    "deep": (200, b"[" * 100_000, "does not respond like TensorFlow Serving"),
    "wrong input": (400, {"error": "missing inputs: x\nof the signature"}, "HTTP 400: missing inp"),
    "unknown model": (
        404,
        {"error": "Servable not found for request: Latest(m)"},
        "HTTP 404: Serv",
    ),
    "no interface": (404, _HTML, "HTTP 404: a web page, 502 Bad Gateway"),
    "fails": (500, b"Internal\nerror", "HTTP 500: Internal error"),
    "nothing known": (503, b"", "HTTP 503: an empty body"),
}


@pytest.mark.parametrize("case", _OTHER_SERVERS)
@pytest.mark.parametrize("shown", client.FORMATS)
def test_client_names_what_other_servers_answer(case, shown, tmp_path, capsys):
    status, body, message = _OTHER_SERVERS[case]
    photos = [str(tmp_path / name) for name in ("a.jpg", "b.jpg")]
    for path in photos:
        Path(path).write_bytes(b"x")
    body = body if isinstance(body, bytes) else json.dumps(body).encode()
    with answering(status, body) as address:
        arguments = ["--model=m", f"--server={address}", "--retries=0", f"--format={shown}"]
        assert client.main([*arguments, *photos]) == 1
    out, err = capsys.readouterr()
    lines = {
        "json": lambda: [json.loads(line)["error"] for line in out.splitlines()],
        "csv": lambda: [row["error"] for row in csv.DictReader(out.splitlines())],
        "table": lambda: [line.strip() for line in out.splitlines()[1::2]],
    }[shown]()
    assert len(lines) == 2 and all(message in line for line in lines)
    assert "0 photos in" in err


def test_client_names_where_it_is_sent(tmp_path, capsys):
    (tmp_path / "a.jpg").write_bytes(b"x")
    with answering(301, b"", Location="https://elsewhere") as address:
        assert client.main(["--model=m", f"--server={address}", str(tmp_path / "a.jpg")]) == 1
    assert "HTTP 301 to https://elsewhere" in capsys.readouterr().out


@pytest.mark.parametrize("reply", [b"", b"SSH-2.0-OpenSSH_9\r\n", None])
def test_client_of_servers_without_http(reply, tmp_path, capsys):
    """The server closes, speaks another protocol, or sends nothing before the timeout."""
    (tmp_path / "a.jpg").write_bytes(b"x")
    with socket.create_server(("127.0.0.1", 0)) as server:

        def serve():
            connection, _ = server.accept()
            with connection:
                connection.recv(1 << 16)
                if reply is None:
                    asked.wait(30)
                else:
                    connection.sendall(reply)

        asked = threading.Event()
        thread = threading.Thread(target=serve)
        thread.start()
        arguments = ["--model=m", f"--server=127.0.0.1:{server.getsockname()[1]}", "--retries=0"]
        seconds = "0.2" if reply is None else "30"
        photo = str(tmp_path / "a.jpg")
        assert client.main([*arguments, f"--timeout={seconds}", photo]) == 1
        asked.set()
        thread.join()
    assert re.search(r"no response from 127\.0\.0\.1:\d+: \S", capsys.readouterr().out)


def test_names_of_models_are_quoted(rest, tmp_path):
    address, handler = rest
    handler.failures, handler.paths = [404], []
    (tmp_path / "a.jpg").write_bytes(b"x")
    client.main(["--model=Käfer/a b?", f"--server={address}/x y", str(tmp_path / "a.jpg")])
    assert handler.paths == ["/x%20y/v1/models/K%C3%A4fer%2Fa%20b%3F:predict"]


def test_client_prints_names_that_are_no_text(rest, tmp_path, capsys):
    path = os.fsdecode(bytes(tmp_path / "caf") + b"\xe9.jpg")
    Path(path).write_bytes(jpeg())
    address, handler = rest
    handler.failures = []
    assert client.main(["--model=m", f"--server={address}", path]) == 0
    assert "caf\\udce9.jpg" in capsys.readouterr().out


def test_back_off():
    waits, attempts = [], []

    def request():
        attempts.append(1)
        raise client.RequestFailed("busy", retry=True)

    with pytest.raises(client.RequestFailed, match="busy"):
        client.with_retries(request, 3, 1.0, waits.append)
    assert len(attempts) == 4
    assert all(low <= wait <= 1.5 * low for low, wait in zip([1, 2, 4], waits))


def test_percentile():
    values = list(range(1, 101))
    assert [client.percentile(values, p) for p in (50, 99, 100)] == [50, 99, 100]
    assert client.percentile([7], 50) == 7


def test_rest_loads_no_tensorflow():
    code = "import sys, efficientnet_ns.serving.client; print(sorted(sys.modules))"
    done = subprocess.run(
        [sys.executable, "-c", code],
        cwd=Path(__file__).parents[2],
        capture_output=True,
        text=True,
        check=True,
    )
    for name in ("tensorflow", "numpy", "grpc", "absl", "efficientnet_ns.config"):
        assert f"'{name}'" not in done.stdout


def test_client_by_grpc(model, served, photos, capsys):
    import grpc
    from tensorflow_serving.apis import predict_pb2, prediction_service_pb2_grpc

    class Service(prediction_service_pb2_grpc.PredictionServiceServicer):
        calls = 0

        def Predict(self, request, context):  # noqa: N802 - name of the service's method
            Service.calls += 1
            if Service.calls == 1:
                context.abort(grpc.StatusCode.UNAVAILABLE, "loading")
            assert request.model_spec.name == "m"
            inputs = {name: tf.make_ndarray(value) for name, value in request.inputs.items()}
            outputs = served(request.model_spec.signature_name, **inputs)
            answer = predict_pb2.PredictResponse()
            for name, value in outputs.items():
                answer.outputs[name].CopyFrom(tf.make_tensor_proto(value))
            return answer

    server = grpc.server(futures.ThreadPoolExecutor(2))
    prediction_service_pb2_grpc.add_PredictionServiceServicer_to_server(Service(), server)
    port = server.add_insecure_port("127.0.0.1:0")
    server.start()
    try:
        arguments = ["--protocol=grpc", "--model=m", f"--server=127.0.0.1:{port}"]
        assert client.main([*arguments, *photos]) == 1
    finally:
        server.stop(None)
    shown = capsys.readouterr().out
    assert NAMES[expected(model, [jpeg(1)]).argmax()] in shown.splitlines()[1]
    assert "cannot decode" in shown and Service.calls == 2


@pytest.mark.parametrize(
    "answer, message",
    [
        ({"scores": [[0.1, 0.9]]}, "its outputs are scores; missing: valid, top_classes"),
        (outputs(valid=[True]), "expected a list of 1"),
        ({**outputs(), "valid": [True, True]}, "expected a list of 1"),
    ],
)
def test_grpc_answers_of_other_models(answer, message, photos, capsys):
    import grpc
    from tensorflow_serving.apis import predict_pb2, prediction_service_pb2_grpc

    class Service(prediction_service_pb2_grpc.PredictionServiceServicer):
        def Predict(self, request, context):  # noqa: N802 - name of the service's method
            found = predict_pb2.PredictResponse()
            for name, value in answer.items():
                found.outputs[name].CopyFrom(tf.make_tensor_proto(value))
            return found

    server = grpc.server(futures.ThreadPoolExecutor(2))
    prediction_service_pb2_grpc.add_PredictionServiceServicer_to_server(Service(), server)
    port = server.add_insecure_port("127.0.0.1:0")
    server.start()
    try:
        arguments = ["--protocol=grpc", "--model=m", f"--server=127.0.0.1:{port}"]
        assert client.main([*arguments, photos[0]]) == 1
    finally:
        server.stop(None)
    assert message in capsys.readouterr().out
