#!/usr/bin/env bash
# Serves the newest version: gRPC on 8500, REST on 8501. Stops with Ctrl-C.
set -euo pipefail
# oneDNN kernels are also faster with AVX2; by default, TensorFlow uses them only with AVX-512 VNNI.
export TF_ENABLE_ONEDNN_OPTS="${TF_ENABLE_ONEDNN_OPTS:-1}"
base="$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)"
if command -v tensorflow_model_server >/dev/null; then
  exec tensorflow_model_server --port=8500 --rest_api_port=8501 \
    --model_name='%{model}' --model_base_path="$base" \
    --enable_batching --batching_parameters_file="$base/deploy/batching_parameters.txt" "$@"
fi
if ! command -v docker >/dev/null; then
  echo "start.sh: neither tensorflow_model_server nor docker is installed; Docker: https://docs.docker.com/engine/install" >&2
  exit 127
fi
# The image's own entrypoint is a script that does not forward signals.
exec docker run --rm --init --entrypoint tensorflow_model_server -p 8500:8500 -p 8501:8501 -v "$base:/models/%{model}:ro" \
  -e TF_ENABLE_ONEDNN_OPTS tensorflow/serving:%{server} --port=8500 --rest_api_port=8501 \
  --model_config_file='/models/%{model}/deploy/models.config' \
  --enable_batching \
  --batching_parameters_file='/models/%{model}/deploy/batching_parameters.txt' "$@"
