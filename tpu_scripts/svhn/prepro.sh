#!/usr/bin/env bash
# Converts the .mat files of SVHN (cropped digits) in RAW_DATA_DIR to records; downloads missing ones.
# FETCH_TEACHER=1 also downloads the original's teacher to ckpt/teacher_ckpt; use it with
# TEACHER_CKPT=ckpt/teacher_ckpt/model.ckpt, or train one with train_teacher.sh.
# Settings: DATA_DIR (data/svhn), RAW_DATA_DIR (DATA_DIR/raw), LABEL_DATA_DIR (DATA_DIR/proc).
set -euo pipefail
# shellcheck source=tpu_scripts/svhn/settings.sh
source "$(dirname "${BASH_SOURCE[0]}")/settings.sh"
parse_arguments "$@"

run "$PYTHON" -m efficientnet_ns.proc_svhn --flagfile=flags/run/svhn/prepro.flags \
  --raw_data_dir="${RAW_DATA_DIR:-$DATA_DIR/raw}" \
  --output_dir="$LABEL_DATA_DIR" \
  ${arguments[@]+"${arguments[@]}"}

if [[ -n ${FETCH_TEACHER:-} ]]; then
  run mkdir -p ckpt
  run curl --fail --location --output ckpt/teacher_ckpt.tar.gz \
    https://storage.googleapis.com/noisystudent/ckpts/svhn/teacher_ckpt.tar.gz
  run tar -xzf ckpt/teacher_ckpt.tar.gz -C ckpt
fi
