#!/usr/bin/env bash
# Trains a student on the stored labels that filter_unlabel.sh wrote. If it is stopped, the same command continues.
# Settings: LABEL_DATA_DIR (data/svhn/proc), PREDICT_DIR (data/svhn/predict), MODEL_DIR (ckpt/exp_1),
# FILTERED_DATA_DIR (PREDICT_DIR/filter_data/data; PREDICT_DIR/reassign after reassign.sh).
set -euo pipefail
# shellcheck source=tpu_scripts/svhn/settings.sh
source "$(dirname "${BASH_SOURCE[0]}")/settings.sh"
parse_arguments "$@"

main --mode=train --flagfile=flags/run/svhn/student.flags \
  --label_data_dir="$LABEL_DATA_DIR" \
  --unlabel_data_dir="${FILTERED_DATA_DIR:-$PREDICT_DIR/filter_data/data}" \
  --model_dir="$MODEL_DIR"
