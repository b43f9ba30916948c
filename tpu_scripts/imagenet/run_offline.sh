#!/usr/bin/env bash
# Runs a whole round with stored labels: predict.sh, filter_unlabel.sh (statistics, then records), train_offline.sh,
# eval.sh. Settings: theirs. TEACHER_CKPT must exist: train_teacher.sh trains it. If it is stopped, the same command continues.
set -euo pipefail
# shellcheck source=tpu_scripts/imagenet/settings.sh
source "$(dirname "${BASH_SOURCE[0]}")/settings.sh"
parse_arguments "$@"

run_scripts predict.sh "filter_unlabel.sh 1" "filter_unlabel.sh 0" train_offline.sh eval.sh
