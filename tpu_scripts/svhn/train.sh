#!/usr/bin/env bash
# Trains a student whose teacher labels inside the training step. If it is stopped, the same command continues.
# Settings: LABEL_DATA_DIR (data/svhn/proc), UNLABEL_DATA_DIR (data/svhn/proc/unlabeled),
# TEACHER_CKPT (ckpt/svhn_teacher), MODEL_DIR (ckpt/exp_1).
set -euo pipefail
# shellcheck source=tpu_scripts/svhn/settings.sh
source "$(dirname "${BASH_SOURCE[0]}")/settings.sh"
parse_arguments "$@"

main --mode=train --flagfile=flags/run/svhn/student_on_the_fly.flags \
  --label_data_dir="$LABEL_DATA_DIR" \
  --unlabel_data_dir="$UNLABEL_DATA_DIR" \
  --teacher_model_path="$TEACHER_CKPT" \
  --model_dir="$MODEL_DIR"
