#!/usr/bin/env bash
# Prove what the pages say of a GPU, the most important things first; on a machine without one the same on the CPU.
#
#   tests/gpu/run.sh [SECONDS] [--device cpu|cuda]
#
# SECONDS (420) is the limit for all parts together. Nothing stops at a failure; results.json and results.md in this
# folder are written after each part. Called again it goes on with the parts that they lack. PYTHON chooses the
# interpreter.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/../.."
caches=$(mktemp -d)
trap 'rm -rf "$caches"' EXIT
# Read when the libraries are imported, which is before any test.
export HF_HUB_OFFLINE=1 HF_HOME="$caches"
"${PYTHON:-python3}" -m tests.gpu "$@"
