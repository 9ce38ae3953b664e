#!/usr/bin/env bash
# What a GPU machine without a network needs beside this checkout, in .whl (which git ignores): what is
# required and not there, and the peers.
#
#     benchmarks/pack_for_gpu.sh            downloads them for Python 3.12 on x86-64 and prints what to carry and to run
#     benchmarks/pack_for_gpu.sh PYTHON     also unpacks them as that machine would, beside PYTHON's packages, and imports
#                                           them: with the look-alike's PYTHON (lookalike.sh) this is the rehearsal
set -euo pipefail
cd "$(dirname "$0")/.."
limit_mib=64 # of everything that travels

# What setup.py requires and the machine lacks, with what that requires: checkpoints have checksums and a schema.
required=(xxhash==4.1.0 jsonschema==4.26.0 jsonschema-specifications==2025.9.1 referencing==0.37.0 rpds-py==2026.9.1 attrs==26.1.0)
# Pure Python, or Triton compiled on the machine. Liger's Hopper kernels would need nvidia-cutlass-dsl and its libraries,
# which alone are larger than the limit.
peers=(liger-kernel==0.8.5 cut-cross-entropy==25.1.1)

rm -rf .whl
platforms=()
for platform in manylinux_2_28 manylinux_2_27 manylinux_2_17 manylinux2014 manylinux1; do
  platforms+=(--platform "${platform}_x86_64")
done
python3 -m pip download -q --no-deps --only-binary=:all: --python-version 3.12 --implementation cp "${platforms[@]}" \
  -d .whl "${required[@]}" "${peers[@]}"

bytes=$(git ls-files -z --cached --others --exclude-standard | xargs -0 cat -- 2>/dev/null | wc -c)
bytes=$((bytes + $(cat .whl/*.whl | wc -c)))
echo "carry: .whl ($(ls .whl | wc -l) wheels); with the working tree $((bytes / 1048576 + 1)) of $limit_mib MiB"
((bytes < limit_mib * 1048576)) || { echo "more than $limit_mib MiB would travel" >&2; exit 1; }

install='-m pip install -q --no-index --no-deps --no-compile --no-cache-dir --upgrade --target'
echo "run:   python3 $install /tmp/site .whl/*.whl && PYTHONPATH=/tmp/site AMOPO_COMMIT=$(git rev-parse --short=12 HEAD)" \
  'python3 benchmarks/gpu_suite.py --plan first --out $OUT'

if [[ $# -gt 0 ]]; then
  site=$(mktemp -d)
  trap 'rm -rf "$site"' EXIT
  "$1" $install "$site" .whl/*.whl
  PYTHONPATH="$site" "$1" - << 'PYTHON'
import importlib.metadata
import cut_cross_entropy
import jsonschema
import xxhash
import liger_kernel.chunked_loss
import liger_kernel.ops.fused_linear_cross_entropy
from cut_cross_entropy import linear_cross_entropy
names = ("xxhash", "jsonschema", "liger-kernel", "cut-cross-entropy", "torch", "triton")
print("unpacked and imported:", *(f"{name} {importlib.metadata.version(name)}" for name in names))
PYTHON
fi
