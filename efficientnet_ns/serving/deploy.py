"""What is needed to start TensorFlow Serving on an exported model, beside its versions.

The files stand in `<base>/deploy/`; TensorFlow Serving takes no notice of entries of a base folder
that are not numbers.
"""

from __future__ import annotations

import os
import re

import tensorflow as tf
from absl import logging

FOLDER = "deploy"
BATCH_SIZES = (1, 2, 4, 8, 16, 32)

_MODELS = """\
model_config_list {{
  config {{
    name: "{model}"
    base_path: "/models/{model}"
    model_platform: "tensorflow"
    model_version_policy {{ latest {{ num_versions: 1 }} }}
  }}
}}
"""

_BATCHING = """\
max_batch_size {{ value: {largest} }}
batch_timeout_micros {{ value: 2000 }}
max_enqueued_batches {{ value: 100 }}
num_batch_threads {{ value: 2 }}
{allowed}
"""

_COMPOSE = """\
services:
  serving:
    image: tensorflow/serving:{server}
    # The image's own entrypoint is a script that does not hand on signals.
    init: true
    entrypoint: [tensorflow_model_server]
    command:
      - --port=8500
      - --rest_api_port=8501
      - --model_config_file=/models/{model}/deploy/models.config
      - --enable_batching
      - --batching_parameters_file=/models/{model}/deploy/batching_parameters.txt
    environment:
      # oneDNN's kernels are faster with AVX2 too; by itself TensorFlow takes them with AVX-512 VNNI.
      TF_ENABLE_ONEDNN_OPTS: "1"
    ports:
      - "8500:8500"
      - "8501:8501"
    volumes:
      - ..:/models/{model}:ro
    restart: unless-stopped
    healthcheck:
      # The image has no curl; bash opens the REST port and reads the state of the model.
      test:
        - CMD
        - bash
        - -c
        - >-
          exec 3<>/dev/tcp/localhost/8501 &&
          printf 'GET /v1/models/{model} HTTP/1.0\\r\\n\\r\\n' >&3 && grep -q '"AVAILABLE"' <&3
      interval: 10s
      timeout: 5s
      retries: 6
      start_period: 60s
"""

_KUBERNETES = """\
apiVersion: apps/v1
kind: Deployment
metadata:
  name: {label}
  labels: {{app: {label}}}
spec:
  replicas: 2
  selector:
    matchLabels: {{app: {label}}}
  template:
    metadata:
      labels: {{app: {label}}}
    spec:
      # The server is not process 1 then, and SIGTERM ends it.
      shareProcessNamespace: true
      containers:
        - name: serving
          image: tensorflow/serving:{server}
          command: [tensorflow_model_server]
          args:
            - --port=8500
            - --rest_api_port=8501
            - --model_config_file=/models/{model}/deploy/models.config
            - --enable_batching
            - --batching_parameters_file=/models/{model}/deploy/batching_parameters.txt
          env:
            # oneDNN's kernels are faster with AVX2 too; by itself TensorFlow takes them with AVX-512 VNNI.
            - {{name: TF_ENABLE_ONEDNN_OPTS, value: "1"}}
          ports:
            - {{name: grpc, containerPort: 8500}}
            - {{name: rest, containerPort: 8501}}
          # The path answers 200 only once a version is loaded and warmed up.
          startupProbe:
            httpGet: {{path: /v1/models/{model}/metadata, port: rest}}
            periodSeconds: 5
            failureThreshold: 60
          readinessProbe:
            httpGet: {{path: /v1/models/{model}/metadata, port: rest}}
            periodSeconds: 10
          livenessProbe:
            tcpSocket: {{port: grpc}}
            periodSeconds: 20
          # Requests in flight are answered while the service forgets the pod.
          lifecycle:
            preStop:
              exec: {{command: [sleep, "5"]}}
          resources:
            # Enough for B0 to B7; L2's weights alone are 1.9 GB.
            requests: {{cpu: "2", memory: 2Gi}}
            limits: {{memory: 4Gi}}
          volumeMounts:
            - {{name: models, mountPath: /models/{model}, readOnly: true}}
      volumes:
        # Yours: a volume that several pods can read, with the versions and this folder in it.
        - name: models
          persistentVolumeClaim: {{claimName: {label}-models}}
---
apiVersion: v1
kind: Service
metadata:
  name: {label}
spec:
  selector: {{app: {label}}}
  ports:
    - {{name: grpc, port: 8500, targetPort: grpc}}
    - {{name: rest, port: 8501, targetPort: rest}}
"""

_START = """\
#!/usr/bin/env bash
# Serves the newest version: gRPC on 8500, REST on 8501. Stops with Ctrl-C.
set -euo pipefail
# oneDNN's kernels are faster with AVX2 too; by itself TensorFlow takes them with AVX-512 VNNI.
export TF_ENABLE_ONEDNN_OPTS="${{TF_ENABLE_ONEDNN_OPTS:-1}}"
base="$(cd "$(dirname "${{BASH_SOURCE[0]}}")/.." && pwd)"
if command -v tensorflow_model_server >/dev/null; then
  exec tensorflow_model_server --port=8500 --rest_api_port=8501 \\
    --model_name='{model}' --model_base_path="$base" \\
    --enable_batching --batching_parameters_file="$base/deploy/batching_parameters.txt" "$@"
fi
# The image's own entrypoint is a script that does not hand on signals.
exec docker run --rm --init --entrypoint tensorflow_model_server -p 8500:8500 -p 8501:8501 -v "$base:/models/{model}:ro" \\
  -e TF_ENABLE_ONEDNN_OPTS tensorflow/serving:{server} --port=8500 --rest_api_port=8501 \\
  --model_config_file='/models/{model}/deploy/models.config' \\
  --enable_batching \\
  --batching_parameters_file='/models/{model}/deploy/batching_parameters.txt' "$@"
"""

FILES = {
    "models.config": _MODELS,
    "batching_parameters.txt": _BATCHING,
    "docker-compose.yml": _COMPOSE,
    "kubernetes.yaml": _KUBERNETES,
    "start.sh": _START,
}


def texts(model: str) -> dict[str, str]:
    """File name → content, for a model of that name."""
    values = {
        "model": model,
        "server": tf.__version__,  # Reads all that this TensorFlow writes.
        "label": re.sub(r"[^a-z0-9]+", "-", model.lower()).strip("-"),
        "largest": BATCH_SIZES[-1],
        "allowed": "\n".join(f"allowed_batch_sizes: {size}" for size in BATCH_SIZES),
    }
    return {name: template.format(**values) for name, template in FILES.items()}


def write(base: str, model: str) -> None:
    """Writes the files that are not there yet: those that somebody changed stay, with a warning."""
    tf.io.gfile.makedirs(os.path.join(base, FOLDER))
    for name, text in texts(model).items():
        path = os.path.join(base, FOLDER, name)
        if tf.io.gfile.exists(path):
            with tf.io.gfile.GFile(path) as f:
                if f.read() != text:
                    logging.warning("%s is not what it would be for %s: left as it is", path, model)
            continue
        with tf.io.gfile.GFile(path, "w") as f:
            f.write(text)
        if name.endswith(".sh") and os.path.exists(path):  # Not in a bucket.
            os.chmod(path, 0o755)
