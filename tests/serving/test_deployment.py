"""Deployment files, parsed as by the programs that use them."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import tensorflow as tf
import yaml
from google.protobuf import (
    descriptor_pb2,
    descriptor_pool,
    message_factory,
    text_format,
    wrappers_pb2,
)

from efficientnet_ns.benchmarks import tables
from efficientnet_ns.serving import deployment


def test_changed_deployment_files_stay(base, model):
    path = base / "deploy" / "models.config"
    before = path.read_text()
    path.write_text("mine")
    deployment.write(str(base), model.name)
    assert path.read_text() == "mine"
    path.write_text(before)


def test_start_script_of_a_killed_run_becomes_executable(tmp_path):
    """The run was killed before it could set the file's mode."""
    deployment.write(str(tmp_path), "m")
    script = tmp_path / "deploy" / "start.sh"
    script.chmod(0o644)
    deployment.write(str(tmp_path), "m")
    assert os.access(script, os.X_OK)


def test_deployment_files_appear_whole(tmp_path, monkeypatch):
    """A run that is killed before the rename leaves no partial file under the final name."""

    def killed(*unused, **options):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(tf.io.gfile, "rename", killed)
        with pytest.raises(KeyboardInterrupt):
            deployment.write(str(tmp_path), "m")
    assert not set(os.listdir(tmp_path / "deploy")) & set(deployment.texts("m"))
    deployment.write(str(tmp_path), "m")
    for name, text in deployment.texts("m").items():
        assert (tmp_path / "deploy" / name).read_text() == text


def batching_parameters():
    """Returns an empty BatchingParameters message, whose definition the server's package lacks."""
    file = descriptor_pb2.FileDescriptorProto(
        name="batching.proto", dependency=[wrappers_pb2.DESCRIPTOR.name]
    )
    message = file.message_type.add(name="BatchingParameters")
    limits = ("max_batch_size", "batch_timeout_micros", "max_enqueued_batches", "num_batch_threads")
    for number, name in enumerate(limits, 1):
        kind = ".google.protobuf.Int64Value"
        message.field.add(name=name, number=number, label=1, type=11, type_name=kind)
    message.field.add(name="allowed_batch_sizes", number=6, label=3, type=3)
    pool = descriptor_pool.Default()
    pool.Add(file)
    return message_factory.GetMessageClass(pool.FindMessageTypeByName("BatchingParameters"))()


def test_text_protos_parse(base):
    from tensorflow_serving.config import model_server_config_pb2

    server = text_format.Parse(
        (base / "deploy" / "models.config").read_text(),
        model_server_config_pb2.ModelServerConfig(),
    )
    (model,) = server.model_config_list.config
    assert (model.name, model.model_platform) == ("efficientnet-test", "tensorflow")
    assert model.base_path == "/models/efficientnet-test"
    assert model.model_version_policy.latest.num_versions == 1
    batching = text_format.Parse(
        (base / "deploy" / "batching_parameters.txt").read_text(),
        batching_parameters(),
    )
    # The server requires the last allowed size to be the largest batch.
    assert list(batching.allowed_batch_sizes) == list(deployment.BATCH_SIZES)
    assert batching.max_batch_size.value == deployment.BATCH_SIZES[-1]


def test_start_script_is_sound(base):
    script = base / "deploy" / "start.sh"
    assert os.access(script, os.X_OK)
    shellcheck = Path(sys.executable).with_name("shellcheck")
    done = subprocess.run([shellcheck, script], capture_output=True, text=True)
    assert done.returncode == 0, done.stdout


def test_start_script_turns_onednn_on_unless_told_otherwise(base, tmp_path):
    server = tmp_path / "tensorflow_model_server"
    server.write_text('#!/bin/sh\necho "$TF_ENABLE_ONEDNN_OPTS $*"\n')
    server.chmod(0o755)
    command = [str(base / "deploy" / "start.sh"), "--version"]
    for given, expected in (({}, "1"), ({tables.ONEDNN: "0"}, "0")):
        environment = {"PATH": f"{tmp_path}:/usr/bin:/bin", **given}
        printed = subprocess.run(command, env=environment, capture_output=True, text=True).stdout
        onednn, *arguments = printed.split()
        assert onednn == expected and arguments[-1] == "--version"
        assert f"--model_base_path={base}" in arguments


def test_start_script_without_a_server_starts_a_container(base, tmp_path):
    docker = tmp_path / "docker"
    docker.write_text('#!/bin/sh\necho "$*"\n')
    docker.chmod(0o755)
    command = [str(base / "deploy" / "start.sh"), "--version"]
    environment = {"PATH": f"{tmp_path}:/usr/bin:/bin"}
    done = subprocess.run(command, env=environment, capture_output=True, text=True).stdout
    options, _, arguments = done.partition(f" tensorflow/serving:{tf.__version__} ")
    # Otherwise, signals do not reach the server.
    assert "--init --entrypoint tensorflow_model_server" in options
    assert arguments.split()[:2] == ["--port=8500", "--rest_api_port=8501"]
    assert arguments.split()[-1] == "--version"


def test_start_script_without_server_and_container_says_what_to_install(base, tmp_path):
    for name in ("bash", "dirname"):
        (tmp_path / name).symlink_to(shutil.which(name))
    done = subprocess.run(
        ["bash", str(base / "deploy" / "start.sh")],
        env={"PATH": str(tmp_path)},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 127
    assert "neither tensorflow_model_server nor docker is installed" in done.stderr


def test_files_of_another_model_are_left_with_a_warning(tmp_path, caplog):
    deployment.write(str(tmp_path), "one")
    deployment.write(str(tmp_path), "one")
    assert not caplog.records
    before = (tmp_path / "deploy" / "models.config").read_text()
    with caplog.at_level("WARNING"):
        deployment.write(str(tmp_path), "two")
    assert "models.config, which differs from the template for two" in caplog.text
    assert (tmp_path / "deploy" / "models.config").read_text() == before


def test_compose_file_and_kubernetes_manifest(base):
    compose = yaml.safe_load((base / "deploy" / "docker-compose.yml").read_text())
    service = compose["services"]["serving"]
    inside = "/models/efficientnet-test"
    assert service["volumes"] == [f"..:{inside}:ro"]
    assert f"--model_config_file={inside}/deploy/models.config" in service["command"]
    # The shell gets the check verbatim, with \\r\
    #  for printf.
    kind, *check_command = service["healthcheck"]["test"]
    assert kind == "CMD" and check_command[:2] == ["bash", "-c"]
    assert "GET /v1/models/efficientnet-test HTTP/1.0\\r\\n\\r\\n" in check_command[2]
    subprocess.run(["bash", "-n", "-c", check_command[2]], check=True)

    text = (base / "deploy" / "kubernetes.yaml").read_text()
    workload, entry = yaml.safe_load_all(text)
    pod = workload["spec"]["template"]
    assert (workload["kind"], entry["kind"]) == ("Deployment", "Service")
    labels = pod["metadata"]["labels"]
    assert labels == workload["spec"]["selector"]["matchLabels"] == entry["spec"]["selector"]
    (container,) = pod["spec"]["containers"]
    ports = {port["name"]: port["containerPort"] for port in container["ports"]}
    assert ports == {"grpc": 8500, "rest": 8501}
    assert {port["targetPort"] for port in entry["spec"]["ports"]} == set(ports)
    for probe in ("startupProbe", "readinessProbe"):
        path = container[probe]["httpGet"]["path"]
        assert path == "/v1/models/efficientnet-test/metadata"
        assert container[probe]["httpGet"]["port"] in ports
    assert container["image"] == service["image"] and container["args"] == service["command"]
    environment = {variable["name"]: variable["value"] for variable in container["env"]}
    assert environment == service["environment"] == {tables.ONEDNN: "1"}
    assert service["init"] and pod["spec"]["shareProcessNamespace"]
    assert container["command"] == service["entrypoint"] == ["tensorflow_model_server"]
    (mount,), (volume,) = container["volumeMounts"], pod["spec"]["volumes"]
    assert mount["name"] == volume["name"] and mount["mountPath"] == inside and mount["readOnly"]
