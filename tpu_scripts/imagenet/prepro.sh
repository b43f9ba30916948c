#!/usr/bin/env bash
# Converts folders of images to records: RAW_DATA_DIR/train and RAW_DATA_DIR/validation, with one folder per class, and
# UNLABELED_RAW_DIR, any tree or archive of images, if set. If it is stopped, the same command continues.
# Settings: DATA_DIR (data/imagenet), RAW_DATA_DIR (DATA_DIR/raw), LABEL_DATA_DIR (DATA_DIR/proc),
# UNLABEL_DATA_DIR (DATA_DIR/proc/unlabeled), NUM_SHARDS (128) of the unlabeled images.
set -euo pipefail
# shellcheck source=tpu_scripts/imagenet/settings.sh
source "$(dirname "${BASH_SOURCE[0]}")/settings.sh"
parse_arguments "$@"

make_records() {
  run "$PYTHON" -m efficientnet_ns.make_records "$@" ${arguments[@]+"${arguments[@]}"}
}

raw=${RAW_DATA_DIR:-$DATA_DIR/raw}
make_records --source="$raw/train" --image_set=train --num_shards=1024 --output_dir="$LABEL_DATA_DIR"
make_records --source="$raw/validation" --image_set=validation --num_shards=128 --output_dir="$LABEL_DATA_DIR"
if [[ -n ${UNLABELED_RAW_DIR:-} ]]; then
  make_records --source="$UNLABELED_RAW_DIR" --nolabeled --image_set=extra --num_shards="$NUM_SHARDS" \
    --output_dir="$UNLABEL_DATA_DIR"
fi
