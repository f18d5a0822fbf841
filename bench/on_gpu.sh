#!/usr/bin/env bash
# Everything that only a GPU can show, from the repository root, without installing the project:
#
#     bash bench/on_gpu.sh OUT [part [commit [size]]]
#
# Parts, each cut off before nine minutes: tests, rows (log-probabilities and losses), advantages, linear, learn. Without
# a part all run. Needs torch >= 2.11, triton >= 3.6, pytest and pytest-benchmark; learn needs transformers, too. Rivals
# in a folder of PYTHONPATH take part. OUT gets a log and a JSON record for each part (rows for which no time is left are
# skipped by name, so that the record is written); a failing part is kept and the next one runs; the exit status is that
# of the worst. Sizes are small, default, all, and tiny for a dry run without a GPU: see bench/pretend_cuda.py.
set -uo pipefail
out=${1:?usage: bash bench/on_gpu.sh OUT [part [commit [size]]]}
only=${2:-all}
commit=${3:-$(git rev-parse HEAD 2>/dev/null || echo unknown)}
size=${4:-default}
mkdir -p "$out"
export PYTHONPATH=".${PYTHONPATH:+:$PYTHONPATH}" PYTHONUNBUFFERED=1
worst=0

part() { # name, command...
    local name=$1
    shift
    if [ "$only" != all ] && [ "$only" != "$name" ]; then return; fi
    echo "== $name: $*"
    timeout 540 "$@" 2>&1 | tee "$out/$name.log"
    local status=${PIPESTATUS[0]}
    echo "== $name ended with status $status"
    if [ "$status" -gt "$worst" ]; then worst=$status; fi
}

bench() { # name, files...
    local name=$1
    shift
    part "$name" python3 -m pytest "$@" -q -p no:cacheprovider --size "$size" --commit "$commit" \
        --budget 480 --benchmark-json "$out/$name.json" --benchmark-columns=median,iqr
}

case $only in
all | tests | rows | advantages | linear | learn) ;;
*)
    echo "unknown part '$only'; the parts are tests, rows, advantages, linear, learn" >&2
    exit 2
    ;;
esac
part tests python3 -m pytest tests -q -m gpu -p no:cacheprovider --continue-on-collection-errors
bench rows bench/bench_logprobs.py bench/bench_loss.py
bench advantages bench/bench_gae.py bench/bench_advantages.py
bench linear bench/bench_linear.py
bench learn bench/bench_learn.py
exit "$worst"
