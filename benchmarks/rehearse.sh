# What lookalike.sh and newest.sh run in their environments: sourced, with its `python` first on the path.
#
#     rehearse LOG [pack] [suite] [tests]      ends with 1 if a part failed; LOG gets versions, date and what each part said

rehearse() {
  local log=$1 failed=0
  shift
  mkdir -p "$(dirname "$log")"
  {
    echo "$(date +%F), commit $(git describe --always --dirty 2>/dev/null || echo unknown)"
    python - << 'PYTHON'
import importlib.metadata as metadata, platform
names = ("torch", "triton", "transformers", "numpy", "accelerate", "peft", "huggingface_hub", "safetensors", "pytest",
         "torchao", "datasets", "bitsandbytes", "liger-kernel", "jsonschema")
def version(name):
    try:
        return metadata.version(name)
    except metadata.PackageNotFoundError:
        return "absent"
print(f"python {platform.python_version()};", "; ".join(f"{name} {version(name)}" for name in names))
PYTHON
  } | tee "$log"
  part "$log" "GPU tests collected" collect || failed=1
  for name in "$@"; do
    case $name in
      pack) part "$log" "what travels" pack || failed=1 ;;
      suite)
        part "$log" "gpu_suite, plan first" suite first || failed=1
        part "$log" "gpu_suite, plan second" suite second || failed=1
        part "$log" "gpu_suite, plan third" suite third || failed=1
        ;;
      tests) part "$log" "all tests" tests || failed=1 ;;
    esac
  done
  return $failed
}

part() { # LOG TITLE FUNCTION ARGUMENTS...: runs it; what it prints at last goes to the log
  local log=$1 title=$2 begin=$SECONDS status
  shift 2
  "$@" > "$log.part" 2>&1 && status=ok || status=FAILED
  {
    echo
    echo "$title: $status, $((SECONDS - begin)) s"
    "summary_of_$1" "$log.part"
  } | tee -a "$log"
  [[ $status == ok ]] && rm "$log.part"
}

collect() { python -m pytest --collect-only -m gpu tests; }
summary_of_collect() { tail -n 1 "$1"; }
pack() { benchmarks/pack_for_gpu.sh "$(command -v python)"; }
summary_of_pack() { grep -E '^(carry|unpacked)' "$1" || tail -n 5 "$1"; }
suite() { python benchmarks/gpu_suite.py --plan "$1" --smoke --out "$(mktemp -d)"; }
summary_of_suite() { cat "$1"; }
tests() { python -m pytest tests; }
summary_of_tests() { sed -n '/short test summary/,$p' "$1"; }
