#!/usr/bin/env bash
# The age groups of UTKFace: pretrain where there are no weights yet, then unlearn, all five groupings one after the
# other, then their tables; further arguments go to every main_unlearn.py:
#     bash run_unlearn_utkface.sh
#     GROUPINGS="TNN MFD" SEEDS="0" K="16" bash run_unlearn_utkface.sh --dry-run
# To try it on a CPU, with weights and records in a folder of their own:
#     WEIGHTS=try RESULTS=try IMAGE_SIZE=32 EPOCHS=2 K=16 ADV=5 ITERATIONS=10 PASSES=20 LR=0.01 SEEDS=0 \
#         METHODS="before neggrad rawp adv adv_imp" bash run_unlearn_utkface.sh
# Settings are the released scripts'. If D_test falls too far, search EPS in 1.0-5.0 or LR in 1e-4-1e-3.
# On the whole of UTKFace: not measured yet. The last command on 2,505 of its images: README.md, "Measured".
set -euo pipefail
cd "$(dirname "$0")"

PYTHON=${PYTHON:-"uv run"}        # e.g. PYTHON=python in a conda environment
DATA=${DATA:-data}                # holds utkface: the aligned and cropped images
WEIGHTS=${WEIGHTS:-$DATA/weights} # where the pretrained classifiers go, or are
RESULTS=${RESULTS:-result_data}
GROUPINGS=${GROUPINGS:-"TNN MFD balanced groups tens"}
SEEDS=${SEEDS:-"0 1 2 3 4"}
METHODS=${METHODS:-"before neggrad rawp oracle adv adv_imp distill"}
K=${K:-"16 32 64 128 256"}        # images to forget

IMAGE_SIZE=${IMAGE_SIZE:-128}     # pixels a side, of which 15/16 are cut out
SPLIT_SEED=${SPLIT_SEED:-0}       # of the split into training, validation and test images
EPOCHS=${EPOCHS:-100}             # of pretraining; learning rate and weight decay depend on the grouping
EPS=${EPS:-2.0}                   # radius of the attack, L2 norm over pixels in [0,1]
ALPHA=${ALPHA:-0.1}               # length of its steps
ITERATIONS=${ITERATIONS:-100}     # number of its steps
ADV=${ADV:-300}                   # adversarial examples of each image
BATCH=${BATCH:-128}               # images of D_f a step
ADV_BATCH=${ADV_BATCH:-128}       # images of D_adv a step
PASSES=${PASSES:-1000}            # times through D_adv before giving up
LR=${LR:-1e-3}
LAMBDA=${LAMBDA:-1.0}             # weight of the importance penalty
PRECISION=${PRECISION:-fp32}      # on a CUDA GPU also tf32, or bf16 in the attack: faster

failed=0
dry=
case " $* " in *" --dry-run "*) dry=1 ;; esac

# shellcheck disable=SC2086  # lists of words on purpose
for grouping in $GROUPINGS; do
    weights="$WEIGHTS/utkface_${grouping}_resnet18_cifar100.safetensors"
    common=(--data-dir "$DATA" --age-grouping "$grouping" --image-size "$IMAGE_SIZE" --split-seed "$SPLIT_SEED")
    echo "== UTKFace, $grouping"
    pretrain=($PYTHON main_pretrain_utkface_resnet18.py "${common[@]}" --epochs "$EPOCHS" --output "$weights" --resume)
    if [ -n "$dry" ] && [ ! -f "$weights" ]; then
        echo "would train first: ${pretrain[*]}"
        continue
    fi
    {
        "${pretrain[@]}" &&
            $PYTHON main_unlearn.py --dataset utkface "${common[@]}" --checkpoint "$weights" --result-dir "$RESULTS" \
                --seed $SEEDS --method $METHODS --unlearn-k $K --num-adv-images "$ADV" --pgd-eps "$EPS" \
                --pgd-alpha "$ALPHA" --pgd-iter "$ITERATIONS" --batch-size "$BATCH" --adv-batch-size "$ADV_BATCH" \
                --max-passes "$PASSES" --unlearn-lr "$LR" --reg-lamb "$LAMBDA" --precision "$PRECISION" "$@"
    } || {
        code=$?
        [ "$code" -eq 130 ] && exit 130
        echo "== UTKFace, $grouping was not finished (exit code $code)" >&2
        failed=1
    }
done

if [ -z "$dry" ] && compgen -G "$RESULTS/runs/*.json" > /dev/null; then
    $PYTHON main_tables.py --result-dir "$RESULTS" || failed=1
fi
exit "$failed"
