#!/usr/bin/env bash
# Labels the unlabeled images with the teacher, shard by shard; it skips finished shards when started again.
# Machines with access to the same folders share the work with SHARD_ID=auto, or with one range each.
# Settings: TEACHER_CKPT (ckpt/svhn_teacher), UNLABEL_DATA_DIR (data/svhn/proc/unlabeled),
# PREDICT_DIR (data/svhn/predict), NUM_SHARDS (128), SHARD_ID (all: 0-127).
set -euo pipefail
# shellcheck source=tpu_scripts/svhn/settings.sh
source "$(dirname "${BASH_SOURCE[0]}")/settings.sh"
parse_arguments "$@"

main --flagfile=flags/run/svhn/predict.flags \
  --predict_ckpt_path="$TEACHER_CKPT" \
  --unlabel_data_dir="$UNLABEL_DATA_DIR" \
  --num_shards="$NUM_SHARDS" \
  --shard_id="$SHARD_ID" \
  --info_dir="$PREDICT_DIR/info" \
  --output_dir="$PREDICT_DIR/predict_label"
