#!/usr/bin/env bash
# Labels the unlabeled images with the teacher, shard by shard; it skips finished shards when started again.
# Machines with access to the same folders share the work with SHARD_ID=auto, or with one range each.
# Settings: TEACHER_MODEL (MODEL, b0), TEACHER_CKPT (ckpt/imagenet_teacher), UNLABEL_DATA_DIR (data/imagenet/proc/unlabeled),
# PREDICT_DIR (data/imagenet/predict), NUM_SHARDS (128), SHARD_ID (all: 0-127).
set -euo pipefail
# shellcheck source=tpu_scripts/imagenet/settings.sh
source "$(dirname "${BASH_SOURCE[0]}")/settings.sh"
parse_arguments "$@"

main --flagfile=flags/run/imagenet/predict.flags \
  --flagfile=flags/model/"$TEACHER_MODEL".flags \
  --predict_ckpt_path="$TEACHER_CKPT" \
  --unlabel_data_dir="$UNLABEL_DATA_DIR" \
  --num_shards="$NUM_SHARDS" \
  --shard_id="$SHARD_ID" \
  --info_dir="$PREDICT_DIR/info" \
  --output_dir="$PREDICT_DIR/predict_label"
