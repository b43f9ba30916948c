#!/usr/bin/env bash
# Trains the teacher on labeled images and evaluates it. If it is stopped, the same command continues.
# Settings: MODEL (b0; b0 to b7, l2), LABEL_DATA_DIR (data/imagenet/proc), TEACHER_CKPT (ckpt/imagenet_teacher): the folder of the model.
set -euo pipefail
# shellcheck source=tpu_scripts/imagenet/settings.sh
source "$(dirname "${BASH_SOURCE[0]}")/settings.sh"
parse_arguments "$@"

main --mode=train_and_eval --flagfile=flags/run/imagenet/"$MODEL"_teacher.flags \
  --label_data_dir="$LABEL_DATA_DIR" \
  --model_dir="$TEACHER_CKPT"
