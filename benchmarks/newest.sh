#!/usr/bin/env bash
# The newest versions that resolve, as a user gets them who installs without the constraint file.
#
#     benchmarks/newest.sh FOLDER [LOG]
#
# Installs this checkout with its test requirements, anew, into an environment in FOLDER (with torch's CUDA build; 6 GB) and
# runs three plans of gpu_suite.py with tiny shapes and all tests. Run it before a release; LOG (default:
# benchmarks/results/newest.txt) is the record. PYTHON names a Python 3.12 where `python3.12` is not on the path.
set -euo pipefail
cd "$(dirname "$0")/.."
folder=$(realpath -m "${1:?usage: benchmarks/newest.sh FOLDER [LOG]}")
log=$(realpath -m "${2:-benchmarks/results/newest.txt}")

"${PYTHON:-python3.12}" -m venv --clear "$folder"
export PATH="$folder/bin:$PATH" OMP_NUM_THREADS=1
python -m pip install -q -e kernels -e ".[test]" pytest-timeout  # which gpu_suite.py asks for
# shellcheck source=benchmarks/rehearse.sh
source benchmarks/rehearse.sh
rehearse "$log" suite tests
