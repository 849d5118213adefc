#!/usr/bin/env bash
# All that a GPU owes this project, within a budget of time: what a device may break, what it costs there, and rows of a
# table. A step that fails or runs out of its time leaves the others alone. Needs torch, transformers, accelerate, yacs,
# for the table pandas, pydantic, submitit and tqdm, for the tests pytest, and no network.
#
#   DATA=data/cifar100 scripts/gpu_check.sh
#
# Paths count from the root. STEPS=table goes on with the runs of an earlier call.
#
# DATA     folder of CIFAR-100; without it images are random, and no row of the table is run
# BUDGET   seconds for everything (480)
# OUT      folder of the figures, logs and runs (results/gpu)
# JOBS     runs of the table at once (2)
# STEPS    those of "doctor tests method curvature cv compiled table" to take (all)
# QUICK=1  tiny sizes, to see that it runs
# DRY_RUN=1  print the commands alone
# PYTHON   (python)
set -u
cd "$(dirname "$0")/.." || exit 2

DATA=${DATA:-}
BUDGET=${BUDGET:-480}
OUT=${OUT:-results/gpu}
JOBS=${JOBS:-2}
STEPS=${STEPS:-doctor tests method curvature cv compiled table}
QUICK=${QUICK:-}
DRY_RUN=${DRY_RUN:-}
PYTHON=${PYTHON:-python}

SAVING=20 # seconds that a stopped step has to save itself
report=()
failed=0
[[ $DRY_RUN ]] || mkdir -p "$OUT" || exit 2

# step NAME SECONDS COMMAND...: at most so many of the seconds that are left
step() {
    local name=$1 limit=$2 left=$((BUDGET - SECONDS - SAVING)) start=$SECONDS code state
    shift 2
    [[ " $STEPS " == *" $name "* ]] || return
    if [[ $DRY_RUN ]]; then
        printf '%s: %s\n' "$name" "$*"
        return
    fi
    ((limit < left)) || limit=$left
    if ((limit < 1)); then
        code=- state='no time left'
    else
        printf '%s, at most %d s: %s\n' "$name" "$limit" "$*"
        timeout -k "$SAVING" "$limit" "$@" >"$OUT/$name.log" 2>&1
        code=$? state=ok
        ((code == 0)) || state="see $OUT/$name.log"
        ((code != 124)) || state='out of time'
    fi
    if [[ $name == table && $state == *time* ]]; then
        state='a second call goes on'
    elif [[ $state != ok ]]; then
        failed=1
    fi
    report+=("$(printf '%-10s %4s %8d  %s' "$name" "$code" $((SECONDS - start)) "$state")")
}

# those with tests that are marked gpu: to look for more takes packages that others need
tests=(tests/dskd/test_on_device.py tests/cv/test_determinism.py tests/cv/test_trainer.py tests/nlp/test_pipeline.py)
benchmark=("$PYTHON" scripts/benchmark.py)
measure=(--output "$OUT" ${QUICK:+--quick})
table=(--tasks res56_res20 --seeds 1 --set "data=$DATA" --jobs "$JOBS" --output "$OUT/runs" --results "$OUT/tables")

step doctor 60 "$PYTHON" -m dskd doctor
step tests 150 "$PYTHON" -m pytest -q -m gpu "${tests[@]}"
step method 120 "${benchmark[@]}" method "${measure[@]}"
step curvature 60 "${benchmark[@]}" curvature "${measure[@]}"
step cv 150 "${benchmark[@]}" cv --cifar100 "${DATA:-random}" "${measure[@]}"
step compiled 150 "${benchmark[@]}" compiled "${measure[@]}"
# the teacher comes first, all else of the pair needs it
[[ $DATA ]] && step table "$BUDGET" "$PYTHON" scripts/reproduce.py cifar100 "${table[@]}" ${QUICK:+--smoke}

[[ $DRY_RUN ]] && exit
{
    printf '%-10s %4s %8s  %s\n' step exit seconds state
    printf '%s\n' "${report[@]}"
} | tee "$OUT/report.txt"
exit "$failed"
