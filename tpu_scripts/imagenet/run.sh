#!/usr/bin/env bash
# Runs train.sh, then eval.sh: a student whose teacher labels inside the training step. Settings: theirs.
# TEACHER_CKPT must exist: train_teacher.sh trains it.
set -euo pipefail
# shellcheck source=tpu_scripts/imagenet/settings.sh
source "$(dirname "${BASH_SOURCE[0]}")/settings.sh"
parse_arguments "$@"

run_scripts train.sh eval.sh
