#!/usr/bin/env bash
# Trains a student whose teacher labels inside the training step. If it is stopped, the same command continues.
# Settings: MODEL (b0; b0 to b7, l2), LABEL_DATA_DIR (data/imagenet/proc), UNLABEL_DATA_DIR (data/imagenet/proc/unlabeled),
# TEACHER_MODEL (MODEL), TEACHER_CKPT (ckpt/imagenet_teacher), MODEL_DIR (ckpt/imagenet).
set -euo pipefail
# shellcheck source=tpu_scripts/imagenet/settings.sh
source "$(dirname "${BASH_SOURCE[0]}")/settings.sh"
parse_arguments "$@"

main --mode=train --flagfile=flags/run/imagenet/"$MODEL"_student_on_the_fly.flags \
  --label_data_dir="$LABEL_DATA_DIR" \
  --unlabel_data_dir="$UNLABEL_DATA_DIR" \
  --teacher_model_name=efficientnet-"$TEACHER_MODEL" \
  --teacher_model_path="$TEACHER_CKPT" \
  --model_dir="$MODEL_DIR"
