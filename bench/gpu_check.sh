#!/usr/bin/env bash
# Everything that needs a GPU, in one command without a network, in less than 9 minutes:
#   builds the native module with CUDA, runs the tests marked gpu, compute-sanitizer on the CUDA overlap test,
#   `python -m bench kernels`, `step`, `weight_sync` and, where PyAV is installed, `decode`. Prints a short table last;
#   exits 1 when a stage failed.
#
# usage: bench/gpu_check.sh [WHEELS] [OUT] [--dry-run] [--only PART]...
#   WHEELS     folder of wheels to use besides what is installed (default: $WHEELS, else none); see gpu_wheels.txt
#   OUT        folder for the JSON files, the plots and the log (default: $OUT, else gpu_check_out)
#   --dry-run  the same stages without a GPU: CPU build, gpu tests skip, smallest benchmark sizes
#   --only     a part, and again for more: build, tests, sanitizer, kernels, head (of kernels, alone), step, weight_sync,
#              decode. tests and sanitizer build first
# PYTHON names another interpreter than python3, LIMIT_S another total than 525 seconds.
set -uo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.." || exit 2

dry_run=0
places=()
only=" "
while [ $# -gt 0 ]; do
  case $1 in
    --dry-run) dry_run=1 ;;
    --only)
      case ${2:-} in
        tests | sanitizer) only+="build $2 " ;;
        build | kernels | head | step | weight_sync | decode) only+="$2 " ;;
        *)
          echo "--only got '${2:-}', wanted build, tests, sanitizer, kernels, head, step, weight_sync or decode" >&2
          exit 2
          ;;
      esac
      shift
      ;;
    *) places+=("$1") ;;
  esac
  shift
done

wanted() { # wanted PART: head is a part of kernels, and runs alone only when it is asked for
  case "$only" in
    " ") [ "$1" != head ] ;;
    *" $1 "*) true ;;
    *) false ;;
  esac
}

wheels=${places[0]:-${WHEELS:-}}
out=${places[1]:-${OUT:-gpu_check_out}}
python=${PYTHON:-python3}
limit_s=${LIMIT_S:-525}

mkdir -p "$out"
out=$(cd "$out" && pwd)
scratch=$(mktemp -d)
trap 'rm -rf "$scratch"' EXIT
log=$out/gpu_check.log
stages=$scratch/stages.tsv
: > "$log"
: > "$stages"
export PYTHONPATH=$scratch/site:$PWD:$PWD/kernels${PYTHONPATH:+:$PYTHONPATH}
export PYTHONUNBUFFERED=1 TRITON_CACHE_DIR=$scratch/triton HF_HUB_OFFLINE=1
export LC_ALL=C.UTF-8 # lines are cut by characters, not bytes, and everything prints UTF-8, also where there is no locale
unset TRITON_INTERPRET # the tests set it themselves where there is no GPU

left_s() { echo $((limit_s - SECONDS)); }

note() { # note NAME RESULT SECONDS DETAIL
  printf '%s\t%s\t%s\t%s\n' "$1" "$2" "$3" "$4" >> "$stages"
  printf '[%3d s] %-10s %-8s %4s s  %s\n' "$SECONDS" "$1" "$2" "$3" "$4"
}

# What a stage printed besides JSON lines, as text: grep would take odd bytes for a binary file. A tab or a carriage
# return, which progress bars print, would end a field of $stages.
said() { tr '\t\r' '  ' < "$scratch/output" | tr -d '\000' | grep -av '^{' | grep -av '^ *$'; }

shortened() { # shortened CHARACTERS: each line; an odd byte counts as one
  local line
  while IFS= read -r line; do printf '%s\n' "${line:0:$1}"; done
}

stage() { # stage NAME MOST_SECONDS COMMAND...: runs it with what is left of the time, notes how it ended
  local name=$1 most_s=$2 began_s=$SECONDS code result
  shift 2
  if [ "$(left_s)" -lt 10 ]; then
    note "$name" "no time" 0 "the $limit_s s are spent"
    return 1
  fi
  if [ "$(left_s)" -lt "$most_s" ]; then most_s=$(left_s); fi
  printf '\n===== %s: %s\n' "$name" "$*" >> "$log"
  # TERM lets a benchmark write what it has; KILL comes 15 s later
  timeout -k 15 "$most_s" "$@" > "$scratch/output" 2>&1
  code=$?
  cat "$scratch/output" >> "$log"
  case $code in
    0) result=ok ;;
    124 | 137) result="over $most_s s" ;;
    *) result="exit $code" ;;
  esac
  note "$name" "$result" $((SECONDS - began_s)) "$(said | tail -n 1 | shortened 110)"
  if [ $code -ne 0 ]; then said | tail -n 25 | shortened 200; fi
  return $code
}

failed=0

if [ -n "$wheels" ]; then
  stage wheels 40 "$python" -m pip install -q --no-index --no-deps --no-compile --no-cache-dir --upgrade \
    --target "$scratch/site" "$wheels"/*.whl || failed=1
fi

native=cuda
if [ $dry_run = 1 ]; then native=cpu; fi
if wanted build; then
  VCR1_NATIVE=$native stage build 100 "$python" setup.py -q build_ext --inplace --build-temp "$scratch/build" || failed=1
fi

# only files with gpu tests: the others may import what a GPU machine lacks (a video decoder, say)
mapfile -t gpu_tests < <(grep -rlE 'mark\.gpu' tests --include='test_*.py' | sort)
workers=() # most of their time goes into compiling kernels, so several processes share the GPU where pytest-xdist is there
if "$python" -c 'import xdist' 2> /dev/null; then workers=(-n 4); fi
if wanted tests; then
  stage tests 150 "$python" -m pytest -q -m gpu -p no:cacheprovider "${workers[@]}" "${gpu_tests[@]}" || failed=1
fi

if ! wanted sanitizer; then
  :
elif [ $dry_run = 1 ]; then
  note sanitizer skipped 0 "dry run"
elif ! command -v compute-sanitizer > /dev/null; then
  note sanitizer skipped 0 "compute-sanitizer is not installed"
else
  # every tensor an allocation of its own: inside torch's cache an access past the end of one would go unseen
  if ! PYTORCH_NO_CUDA_MEMORY_CACHING=1 stage sanitizer 45 compute-sanitizer --tool memcheck --error-exitcode 9 \
    "$python" -m pytest -q -m gpu -p no:cacheprovider tests/native/test_overlap.py; then
    if grep -qi 'device not supported' "$scratch/output"; then
      note sanitizer skipped 0 "compute-sanitizer does not support this device or virtual machine"
    else
      failed=1
    fi
  fi
fi

if [ $dry_run = 1 ]; then
  kernels_options=(--quick)
else
  kernels_options=(--seconds 100)
fi
sync_s=25 decode_s=0 # kept for the last stages
if "$python" -c 'import av' 2> /dev/null; then decode_s=60; fi
if wanted kernels; then
  stage kernels 135 "$python" -m bench kernels --output "$out" "${kernels_options[@]}" || failed=1
elif wanted head; then
  stage head 135 "$python" -m bench kernels --op head --output "$out" "${kernels_options[@]}" || failed=1
fi
if [ $dry_run = 1 ]; then
  step_options=(--quick)
else # all that is left, less the start of Python and the building of the model
  step_options=(--seconds $(($(left_s) - decode_s - sync_s > 60 ? $(left_s) - decode_s - sync_s - 30 : 30)))
fi
if wanted step; then stage step 400 "$python" -m bench step --output "$out" "${step_options[@]}" || failed=1; fi
sync_options=(--repeats 5)
if [ $dry_run = 1 ]; then sync_options=(--quick); fi
if wanted weight_sync; then
  stage weight_sync $((sync_s + 15)) "$python" -m bench weight_sync --output "$out" "${sync_options[@]}" || failed=1
fi
if [ $dry_run = 1 ]; then
  decode_options=(--quick)
else
  decode_options=(--seconds $((decode_s - 20)))
fi
if ! wanted decode; then
  :
elif [ $decode_s = 0 ]; then
  note decode skipped 0 "PyAV is not installed"
elif [ "$(left_s)" -lt 45 ] && [ $dry_run = 0 ]; then
  note decode skipped 0 "less than 45 s are left"
else
  stage decode 120 "$python" -m bench decode --output "$out" "${decode_options[@]}" || failed=1
fi

timeout 20 "$python" -m bench.gpu_summary "$out" "$stages" || failed=1
exit $failed
