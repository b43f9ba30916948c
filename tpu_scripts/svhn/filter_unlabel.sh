#!/usr/bin/env bash
# Chooses the confident images of each class, balances them, and writes them to PREDICT_DIR/filter_data/data.
# With the argument 1, it stops after the statistics; with 0 or without an argument, it also writes the records.
# Settings: UNLABEL_DATA_DIR (data/svhn/proc/unlabeled), PREDICT_DIR (data/svhn/predict), NUM_SHARDS (128),
# FILTER_FLAGS: more flags for efficientnet_ns.filter_unlabel, separated by spaces.
set -euo pipefail
# shellcheck source=tpu_scripts/svhn/settings.sh
source "$(dirname "${BASH_SOURCE[0]}")/settings.sh"
parse_arguments "$@"

filter flags/run/svhn/filter.flags
