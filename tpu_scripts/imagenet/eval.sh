#!/usr/bin/env bash
# Evaluates the model in MODEL_DIR on every image of the evaluation sets.
# Settings: MODEL (b0; b0 to b7, l2), LABEL_DATA_DIR (data/imagenet/proc), MODEL_DIR (ckpt/imagenet).
set -euo pipefail
# shellcheck source=tpu_scripts/imagenet/settings.sh
source "$(dirname "${BASH_SOURCE[0]}")/settings.sh"
parse_arguments "$@"

main --mode=eval --flagfile=flags/run/imagenet/"$MODEL"_student.flags \
  --label_data_dir="$LABEL_DATA_DIR" \
  --model_dir="$MODEL_DIR"
