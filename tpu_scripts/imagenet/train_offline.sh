#!/usr/bin/env bash
# Trains a student on the stored labels that filter_unlabel.sh wrote. If it is stopped, the same command continues.
# Settings: MODEL (b0; b0 to b7, l2), LABEL_DATA_DIR (data/imagenet/proc), PREDICT_DIR (data/imagenet/predict), MODEL_DIR (ckpt/imagenet),
# FILTERED_DATA_DIR (PREDICT_DIR/filter_data/data; PREDICT_DIR/reassign after reassign.sh).
set -euo pipefail
# shellcheck source=tpu_scripts/imagenet/settings.sh
source "$(dirname "${BASH_SOURCE[0]}")/settings.sh"
parse_arguments "$@"

main --mode=train --flagfile=flags/run/imagenet/"$MODEL"_student.flags \
  --label_data_dir="$LABEL_DATA_DIR" \
  --unlabel_data_dir="${FILTERED_DATA_DIR:-$PREDICT_DIR/filter_data/data}" \
  --model_dir="$MODEL_DIR"
