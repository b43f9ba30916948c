#!/usr/bin/env bash
# Relabels the filtered images with another teacher, into PREDICT_DIR/reassign; see FILTERED_DATA_DIR in
# train_offline.sh. It skips finished shards when started again.
# Settings: TEACHER_MODEL (MODEL, b0), TEACHER_CKPT (ckpt/imagenet_teacher), PREDICT_DIR (data/imagenet/predict),
# NUM_SHARDS (128), SHARD_ID (all: 0-127).
set -euo pipefail
# shellcheck source=tpu_scripts/imagenet/settings.sh
source "$(dirname "${BASH_SOURCE[0]}")/settings.sh"
parse_arguments "$@"

main --flagfile=flags/run/imagenet/reassign.flags \
  --flagfile=flags/model/"$TEACHER_MODEL".flags \
  --predict_ckpt_path="$TEACHER_CKPT" \
  --unlabel_data_dir="$PREDICT_DIR/filter_data/data" \
  --num_shards="$NUM_SHARDS" \
  --shard_id="$SHARD_ID" \
  --info_dir="$PREDICT_DIR/reassign_info" \
  --output_dir="$PREDICT_DIR/reassign"
