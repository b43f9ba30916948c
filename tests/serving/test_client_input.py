"""Addresses and predictions that the client accepts, and how it prints them."""

from __future__ import annotations

import contextlib
import math
import socket
import threading

import pytest

from efficientnet_ns.files.standard_output import escaped
from efficientnet_ns.inference import photo_files
from efficientnet_ns.serving import client


def outputs(index=1, probability=0.5) -> dict:
    return {
        "valid": [True],
        "top_classes": [[index]],
        "top_class_names": [["cat"]],
        "top_probabilities": [[probability]],
    }


@pytest.mark.parametrize(
    "wrong",
    [
        {"probability": math.nan},
        {"probability": math.inf},
        {"probability": "0.7"},
        {"probability": -0.1},
        {"probability": True},
        {"index": 1.7},
        {"index": "1"},
        {"index": -1},
        {"index": True},
    ],
)
def test_numbers_that_no_exported_model_returns_are_refused(wrong):
    (value,) = wrong.values()
    with pytest.raises(client.RequestFailed, match=f"{value!r} as "):
        client._results(["photo.jpg"], outputs(**wrong), 1)


def test_whole_probabilities_are_taken():
    (result,) = client._results(["photo.jpg"], outputs(probability=1), 1)
    assert result.predictions == ({"index": 1, "name": "cat", "probability": 1.0},)


@pytest.mark.parametrize(
    "url",
    ["http://user:word@host", "user@host:8501", "http://host/?x=1", "http://host/base#part"],
)
def test_parts_of_an_address_that_would_be_dropped_are_refused(url):
    with pytest.raises(ValueError, match="no user, password, query or fragment"):
        client.RestServer(url, "model")


def test_control_characters_reach_no_terminal():
    name, photo = "cat\x1b[2J\nfake  0.9999", "a\nb.jpg"
    prediction = {"index": 0, "name": name, "probability": 0.5}
    line = r"  cat\x1b[2J\nfake  0.9999  0.5000"
    assert client.as_table([client.Result(photo, (prediction,))]) == "a\\nb.jpg\n" + line
    text = photo_files._text({"photo": photo, "predictions": [prediction]})
    assert text == "a\\nb.jpg\n" + line
    assert escaped("né 日本") == "né 日本"


@pytest.mark.parametrize("head", [b"HTTP/1.1 200 OK\r\n\r\n", b"HTTP/1.1 200 OK\r\nX-Long: "])
def test_a_server_that_sends_a_little_at_a_time_meets_the_deadline(head):
    stop = threading.Event()
    with socket.create_server(("127.0.0.1", 0)) as listener:

        def drip() -> None:
            taken, _ = listener.accept()
            with taken, contextlib.suppress(OSError):
                taken.sendall(head)
                while not stop.wait(0.02):
                    taken.sendall(b".")

        thread = threading.Thread(target=drip)
        thread.start()
        server = client.RestServer(f"127.0.0.1:{listener.getsockname()[1]}", "model", timeout=0.5)
        try:
            with pytest.raises(client.RequestFailed, match="timed out") as failed:
                server.predict([b"image"])
        finally:
            stop.set()
            thread.join()
    assert failed.value.retry
