#!/usr/bin/env bash
# Everything that only a GPU can show, from the repository root, without installing the project:
#
#     bash bench/on_gpu.sh OUT [part [commit [size]]]
#
# Parts, in this order: first (the most important answers in about two minutes), tests (those that can run on a GPU),
# choices (what only a GPU can decide), learn (a learn step), linear, rows (log-probabilities and losses), advantages.
# Without a part all run, each cut off before nine minutes. Needs torch >= 2.11, triton >= 3.6, transformers and pytest;
# what else is missing is skipped by name. Peers in a folder of PYTHONPATH take part.
#
# OUT gets a log and a record of each part: JSON Lines, a line written as soon as it is known, so that a record is
# complete up to the moment at which its part ends, whatever ends it. A row for which memory or time is short is recorded
# as such, and the next one runs. A failing part is kept and the next part runs; the exit status is that of the worst.
# `tests` continues where an earlier run into the same OUT was cut off.
#
# OUT is a new or empty folder, or one of an earlier run.
#
# Sizes are small, default, all, and dry: the smallest, on a machine without a GPU (see bench/pretend_cuda.py).
set -uo pipefail
out=${1:?usage: bash bench/on_gpu.sh OUT [part [commit [size]]]}
only=${2:-all}
commit=${3:-$(git rev-parse HEAD 2>/dev/null || echo unknown)}
size=${4:-default}
if [ -n "$(ls -A "$out" 2>/dev/null)" ] && [ ! -f "$out/.ppo_fast" ]; then
    echo "$out holds files that this script did not write: choose a new or empty folder" >&2
    exit 2
fi
mkdir -p "$out" && echo bench/on_gpu.sh >"$out/.ppo_fast" || exit 2
export PYTHONPATH=".:tests:bench${PYTHONPATH:+:$PYTHONPATH}" PYTHONUNBUFFERED=1
worst=0
python=(python3)
scale=()
tests=(tests)
if [ "$size" = dry ]; then
    python=(python3 bench/pretend_cuda.py)
    scale=(--tiny)
    tests=(tests/llm/test_trainer_on_device.py -k "two_steps or probe")
    size=tiny
fi

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
    part "$name" "${python[@]}" -m pytest "$@" -q -rs -p no:cacheprovider -p no:benchmark --size "$size" \
        --commit "$commit" --budget 480 --record "$out/$name.jsonl"
}

case $only in
all | first | tests | choices | learn | linear | rows | advantages) ;;
*)
    echo "unknown part '$only'; the parts are first, tests, choices, learn, linear, rows, advantages" >&2
    exit 2
    ;;
esac
part first "${python[@]}" bench/first_minutes.py "$out/first.jsonl" --commit "$commit" "${scale[@]}"
part tests python3 -m pytest "${tests[@]}" -q -m gpu -p no:cacheprovider --continue-on-collection-errors \
    -p outcomes --outcomes "$out/tests.jsonl" --seconds 480
part choices "${python[@]}" bench/choices.py "$out/choices.jsonl" --commit "$commit" --budget 480 "${scale[@]}"
bench learn bench/bench_learn.py
bench linear bench/bench_linear.py
bench rows bench/bench_logprobs.py bench/bench_loss.py
bench advantages bench/bench_gae.py bench/bench_advantages.py
echo "logs and records are in $out"
exit "$worst"
