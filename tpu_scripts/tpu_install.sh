#!/usr/bin/env bash
# Installs the package on a TPU VM, depending on its Python and TensorFlow (docs/two_stacks.md). `tpu_vm.sh setup` runs
# it on every worker.
#
#   tpu_install.sh [--dry_run]
#
# Python 3.10 or 3.11 with TensorFlow 2.15, as on Google's images of that name: the reference stack around the image's own
# TensorFlow, which drives the TPU. Python 3.12 or 3.13: tensorflow-tpu 2.20, the latest release, with its Keras 2
# and the libtpu released with it, because it accepts any later one. Anything else is rejected: without TensorFlow 2.15,
# older Python versions have no stack.
# Settings: STACK=current first installs Python 3.12 in .venv if the machine has an older one.
set -euo pipefail
# shellcheck source=tpu_scripts/common.sh
source "$(dirname "${BASH_SOURCE[0]}")/common.sh"
parse_arguments "$@"

look() { # prints the versions of Python and TensorFlow
  "$PYTHON" -c '
import sys
from importlib import metadata

def version(name):
    try:
        return metadata.version(name)
    except metadata.PackageNotFoundError:
        return ""

print("%d.%d" % sys.version_info[:2], version("tensorflow") or version("tensorflow-tpu") or "none")'
}

found=$(look)
if [[ ${STACK:-} == current && ! $found =~ ^3\.1[23]\  ]]; then
  run "$PYTHON" -m pip install --user uv
  run "$PYTHON" -m uv venv --clear --seed --python=3.12 .venv
  PYTHON=.venv/bin/python found="3.12 none"
fi

install() { # names to leave out of requirements.txt, then packages to add
  local left_out=$1
  shift
  run bash -c "grep -vE '^($left_out)==' requirements.txt > others.txt"
  run "$PYTHON" -m pip install -r others.txt "$@"
}

case $found in
  "3.10 2.15."* | "3.11 2.15."*) install tensorflow ;;
  "3.12 "* | "3.13 "*)
    install 'tensorflow|tf-keras|tensorboard' tensorflow-tpu==2.20.0 libtpu==0.0.14
    # It requires plain tensorflow, which would overwrite the one for TPUs.
    run "$PYTHON" -m pip install --no-deps tf-keras==2.20.1
    ;;
  *)
    echo "This machine has Python ${found% *} and TensorFlow ${found#* }. Use an image with TensorFlow 2.15" \
      "(TF_VERSION=2.15.1), or STACK=current." >&2
    exit 1
    ;;
esac
