# Settings of the SVHN scripts and their defaults, which are the original's paths. Sourced by them, not run.
# shellcheck shell=bash disable=SC2034

# shellcheck source=tpu_scripts/common.sh
source "$(dirname "${BASH_SOURCE[0]}")/../common.sh"

HARDWARE=${HARDWARE:-gpu}
DATA_DIR=${DATA_DIR:-data/svhn}
LABEL_DATA_DIR=${LABEL_DATA_DIR:-$DATA_DIR/proc}
UNLABEL_DATA_DIR=${UNLABEL_DATA_DIR:-$DATA_DIR/proc/unlabeled}
PREDICT_DIR=${PREDICT_DIR:-$DATA_DIR/predict}
TEACHER_CKPT=${TEACHER_CKPT:-ckpt/svhn_teacher}
MODEL_DIR=${MODEL_DIR:-ckpt/exp_1}
NUM_SHARDS=${NUM_SHARDS:-128}
SHARD_ID=${SHARD_ID:-0-$((NUM_SHARDS - 1))}
