#!/usr/bin/env bash
# The GPU machine's software without its GPU: the oldest versions that are supported, and nothing optional.
#
#     benchmarks/lookalike.sh FOLDER [LOG]
#
# Builds an environment in FOLDER once (5.4 GB: torch's CUDA build runs without a GPU) and in it collects the GPU tests,
# unpacks what travels (pack_for_gpu.sh), runs three plans of gpu_suite.py with tiny shapes and all tests that a CPU can
# run. Run it before every GPU run and before a release; LOG (default: benchmarks/results/lookalike.txt) is the record.
# PYTHON names a Python 3.12 where `python3.12` is not on the path.
set -euo pipefail
cd "$(dirname "$0")/.."
folder=$(realpath -m "${1:?usage: benchmarks/lookalike.sh FOLDER [LOG]}")
log=$(realpath -m "${2:-benchmarks/results/lookalike.txt}")

if [[ ! -e $folder/built ]]; then
  "${PYTHON:-python3.12}" -m venv "$folder"
  # Those that the machine's own list of packages has, and none of torchao, datasets, bitsandbytes, liger-kernel,
  # ruff and mypy.
  "$folder/bin/python" -m pip install -q torch==2.11.0 triton==3.6.0 transformers==5.17.0 numpy==2.5.2 \
    accelerate==1.15.0 huggingface_hub==1.33.0 safetensors==0.8.0 tokenizers==0.23.2 sentencepiece==0.2.2 \
    tiktoken==0.14.0 peft protobuf pytest pytest-xdist pytest-timeout hypothesis matplotlib pyyaml rich tqdm jinja2 tensorboard \
    setuptools wheel build pyarrow pandas scipy psutil
  touch "$folder/built"
fi
# What travels in .whl because a run needs it.
sed -n 's/^required=(\(.*\))$/\1/p' benchmarks/pack_for_gpu.sh | xargs "$folder/bin/python" -m pip install -q --no-deps

export PATH="$folder/bin:$PATH" PYTHONPATH="$PWD:$PWD/kernels" OMP_NUM_THREADS=1
# shellcheck source=benchmarks/rehearse.sh
source benchmarks/rehearse.sh
rehearse "$log" pack suite tests
