#!/usr/bin/env bash
# Trains the teacher on labeled images and evaluates it. If it is stopped, the same command continues.
# Settings: LABEL_DATA_DIR (data/svhn/proc), TEACHER_CKPT (ckpt/svhn_teacher): the folder of the model.
set -euo pipefail
# shellcheck source=tpu_scripts/svhn/settings.sh
source "$(dirname "${BASH_SOURCE[0]}")/settings.sh"
parse_arguments "$@"

main --mode=train_and_eval --flagfile=flags/run/svhn/teacher.flags \
  --label_data_dir="$LABEL_DATA_DIR" \
  --model_dir="$TEACHER_CKPT"
