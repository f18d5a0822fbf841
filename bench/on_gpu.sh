#!/usr/bin/env bash
# Everything that only a GPU can show, from the repository root, without installing the project:
#
#     bash bench/on_gpu.sh OUT [part [commit [size]]]
#
# Parts, each under nine minutes on one H200: tests, rows (log-probabilities and losses), advantages, linear, learn.
# Without a part all run. Needs torch >= 2.11, triton >= 3.6, pytest and pytest-benchmark; learn needs transformers, too.
# OUT gets a log and a JSON record for each part; a failing part is kept and the next one runs; the exit status is that
# of the worst. Sizes are tiny (a dry run on a CPU, with TRITON_INTERPRET=1), small, default and all.
set -uo pipefail
out=${1:?usage: bash bench/on_gpu.sh OUT [part [commit [size]]]}
only=${2:-all}
commit=${3:-$(git rev-parse HEAD 2>/dev/null || echo unknown)}
size=${4:-default}
mkdir -p "$out"
export PYTHONPATH=. PYTHONUNBUFFERED=1
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
        --benchmark-json "$out/$name.json" --benchmark-save-data --benchmark-columns=median,iqr
}

case $only in
all | tests | rows | advantages | linear | learn) ;;
*)
    echo "unknown part '$only'; the parts are tests, rows, advantages, linear, learn" >&2
    exit 2
    ;;
esac
part tests python3 -m pytest tests -q -m gpu -p no:cacheprovider
bench rows bench/bench_logprobs.py bench/bench_loss.py
bench advantages bench/bench_gae.py
bench linear bench/bench_linear.py
bench learn bench/bench_learn.py
exit "$worst"
