#!/usr/bin/env bash
# Check the project on a CUDA GPU in at most eight minutes. From the root of the checkout:
#     bash benchmarks/gpu_check.sh                      # results go to $OUT (default: ./gpu_check_out)
#     DEVICE=cpu TINY=1 bash benchmarks/gpu_check.sh    # run the script itself on a CPU
#     PARTS="env parity" bash benchmarks/gpu_check.sh   # run these parts only
# Each part has its own time limit. A part that fails does not stop the others. The last lines are a short table.
set -uo pipefail
export PYTHONUNBUFFERED=1 PYTHONDONTWRITEBYTECODE=1 HF_HUB_OFFLINE=1 TQDM_DISABLE=1
HERE=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)
PYTHON=${PYTHON:-python3}
DEVICE=${DEVICE:-cuda}
OUT=${OUT:-$PWD/gpu_check_out}
PARTS=${PARTS:-"env main parity forget tests memory graph profile decode speed torchrun"}
TINY=${TINY:+--tiny}
TOTAL=${TOTAL:-480}                # seconds for all parts
WORK=$(mktemp -d)
mkdir -p "$OUT"
SECONDS=0
summary=()

# part NAME LIMIT COMMAND...: run a command for at most LIMIT seconds, or for what is left of TOTAL
part() {
    local name=$1 limit=$2 code begun=$SECONDS
    shift 2
    case " $PARTS " in *" $name "*) ;; *) return 0 ;; esac
    local rest=$((TOTAL - SECONDS - 5))
    if [ "$rest" -lt 10 ]; then
        summary+=("$name: no time left")
        return 0
    fi
    [ "$limit" -gt "$rest" ] && limit=$rest
    echo "=== $name (at most $limit s)"
    LIMIT=$limit timeout --kill-after=5 "$limit" "$@" 2>&1 | tee -a "$OUT/log.txt"
    code=${PIPESTATUS[0]}
    summary+=("$name: $([ "$code" -eq 0 ] && echo ok || { [ "$code" -eq 124 ] && echo "stopped at its limit" || echo "FAILED, exit code $code"; }), $((SECONDS - begun)) s")
    printf '%s\n' "${summary[@]}" >"$OUT/summary.txt"
    gather
}

gather() { # write the rows so far to one file
    [ -d "$WORK/json" ] || return 0
    "$PYTHON" - "$WORK/json" "$OUT/results.json" <<'PY'
import json, sys
from pathlib import Path
found = {path.stem: json.loads(path.read_text()) for path in sorted(Path(sys.argv[1]).glob("*.json"))}
Path(sys.argv[2]).write_text(json.dumps(found, indent=1) + "\n")
PY
}

check() { # NAME LIMIT: a part of gpu_check.py, which stops by itself before its limit
    # shellcheck disable=SC2086
    part "$1" "$2" bash -c '"$0" "$1" "$2" --device "$3" --out "$4" --seconds $((LIMIT - 6)) $5' \
        "$PYTHON" "$HERE/gpu_check.py" "$1" "$DEVICE" "$WORK/json" "$TINY"
}

main_default() {
    local few=()
    [ -n "$TINY" ] && few=(--unlearn-k 2 --num-adv-images 2 --pgd-iter 2 --max-passes 2 --distill-steps 3 --distill-cycles 1 --retain-sample 64 --threads 1)
    "$PYTHON" main_unlearn.py --device "$DEVICE" --result-dir "$WORK/main" --cache-dir "$WORK/cache" --save-model \
        --evaluate membership distance relearn agreement duplicates "${few[@]}" || return
    "$PYTHON" main_unlearn.py --device "$DEVICE" --result-dir "$WORK/main" --cache-dir "$WORK/cache" \
        --method finetune random_labels neggrad_plus l1_sparse salun scrub ssd bad_teaching boundary_shrink jit amun \
        --setting epochs=1 batch=256 iterations=5 copies=5 "${few[@]}" || return
    if [ "$DEVICE" = cuda ]; then
        "$PYTHON" main_unlearn.py --device "$DEVICE" --result-dir "$WORK/bf16" --cache-dir "$WORK/cache" --method adv_imp --precision bf16 \
            --goal relabel --adv-dtype uint8
    fi
}

request() {
    "$PYTHON" - "$WORK" <<'PY'
import sys
from pathlib import Path
import l2ul
from PIL import Image
from l2ul.data import datasets
digits = datasets.load("digits", Path("data"))
for name, first, count in (("in", 0, 8), ("keep", 100, 16)):
    folder = Path(sys.argv[1]) / name
    folder.mkdir(parents=True)
    for number, image in enumerate(digits.train.images[first : first + count]):
        Image.fromarray(image.permute(1, 2, 0).numpy()).save(folder / f"{number}.png")
PY
    local how=(--setting distill_steps=100 distill_mixes=32 --minutes 1)
    [ -n "$TINY" ] && how=(--setting distill_steps=4 distill_mixes=8 distill_cycles=1 --minutes 1 --threads 1)
    "$PYTHON" main_forget.py --model resnet20 --checkpoint data/weights/digits_resnet20.safetensors --images "$WORK/in" \
        --keep-images "$WORK/keep" --also flipped --output "$WORK/forgotten" --device "$DEVICE" "${how[@]}"
    echo "exit code $? (0, or 3: not all forgotten)"
    for device in "$DEVICE" cpu; do # the report must verify on another device too
        echo "verified on $device:"
        "$PYTHON" main_forget.py --verify "$WORK/forgotten/report.json" --images "$WORK/in" --device "$device"
    done
    true
}

tests() {
    local workers=() files=(tests/methods tests/metrics tests/deletion tests/training tests/models/test_huggingface.py tests/data/test_folder.py
        tests/data/test_storage.py tests/common/test_cache.py tests/common/test_bn_folding.py tests/test_unlearn.py tests/test_attack.py
        tests/test_importance.py tests/test_main_unlearn.py tests/test_main_forget.py)
    [ -n "$TINY" ] && files=(tests/data/test_storage.py)
    "$PYTHON" -c 'import xdist' 2>/dev/null && [ -z "$TINY" ] && workers=(-n 10 --dist loadfile)
    "$PYTHON" -m pytest -q -p no:cacheprovider -m "not ray and not realdata" --durations=3 --tb=line "${workers[@]}" "${files[@]}" || true
    "$PYTHON" -m pytest -q -p no:cacheprovider -m cuda --tb=short tests || [ $? -eq 5 ]
}

one_process() { # one process initialises and destroys gloo and NCCL; one GPU allows no more
    local nodes
    nodes=$("$PYTHON" -c 'import shutil, sys; print(shutil.which("torchrun") or sys.executable + " -m torch.distributed.run")')
    # shellcheck disable=SC2086
    $nodes --nproc-per-node 1 main_unlearn.py --device "$DEVICE" --result-dir "$WORK/run" --no-cache --dry-run
}
export -f main_default request tests one_process
export PYTHON DEVICE WORK TINY

check env 30
part main 110 bash -c main_default
check parity 60
check graph 75
check profile 60
check speed 130
check memory 40
check decode 45
check together 90  # only with PARTS=together
part forget 60 bash -c request
part torchrun 30 bash -c one_process
part tests 150 bash -c tests

(cd "$WORK" && tar cf "$OUT/records.tar" --exclude='*.safetensors' --exclude='*.npz' --exclude=cache --exclude=in --exclude=keep . 2>/dev/null)
echo
echo "=== short table"
"$PYTHON" - "$OUT/results.json" <<'PY'
import json, sys
try:
    found = json.load(open(sys.argv[1]))
except OSError:
    found = {}
for part, rows in found.items():
    for row in rows if part not in ("env",) else ():
        print(part, " ".join(f"{k}={v:.3g}" if isinstance(v, float) else f"{k}={v}" for k, v in row.items())[:230])
PY
echo "=== in all $SECONDS s"
cat "$OUT/summary.txt"
rm -rf "$WORK"
