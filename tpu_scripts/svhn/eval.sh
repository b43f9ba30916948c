#!/usr/bin/env bash
# Evaluates the model in MODEL_DIR on every image of the evaluation sets.
# Settings: LABEL_DATA_DIR (data/svhn/proc), MODEL_DIR (ckpt/exp_1).
set -euo pipefail
# shellcheck source=tpu_scripts/svhn/settings.sh
source "$(dirname "${BASH_SOURCE[0]}")/settings.sh"
parse_arguments "$@"

main --mode=eval --flagfile=flags/run/svhn/student.flags \
  --label_data_dir="$LABEL_DATA_DIR" \
  --model_dir="$MODEL_DIR"
