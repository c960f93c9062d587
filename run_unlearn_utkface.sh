#!/usr/bin/env bash
# Run the UTKFace experiments for all five age groupings: pretrain if there are no weights yet, unlearn, make the
# tables. Further arguments go to every main_unlearn.py:
#     bash run_unlearn_utkface.sh
#     GROUPINGS="TNN MFD" SEEDS="0" K="16" bash run_unlearn_utkface.sh --dry-run
# A reduced run for a CPU, with weights and records in a separate folder:
#     WEIGHTS=try RESULTS=try IMAGE_SIZE=32 EPOCHS=2 K=16 ADV=5 ITERATIONS=10 PASSES=20 LR=0.01 SEEDS=0 \
#         METHODS="before neggrad rawp adv adv_imp" bash run_unlearn_utkface.sh
# The settings are those of the released scripts. If D_test (accuracy on the test set) falls too far, search EPS in
# 1.0-5.0 or LR in 1e-4-1e-3. Not measured on all of UTKFace. Results of the reduced run: docs/reproducing.md.
set -euo pipefail
cd "$(dirname "$0")"

PYTHON=${PYTHON:-"uv run"}        # e.g. PYTHON=python in a conda environment
DATA=${DATA:-data}                # contains utkface, the aligned and cropped images
WEIGHTS=${WEIGHTS:-$DATA/weights} # folder of the pretrained classifiers
RESULTS=${RESULTS:-result_data}
GROUPINGS=${GROUPINGS:-"TNN MFD balanced groups tens"}
SEEDS=${SEEDS:-"0 1 2 3 4"}
METHODS=${METHODS:-"before neggrad rawp oracle adv adv_imp distill"}
K=${K:-"16 32 64 128 256"}        # number of images to forget

IMAGE_SIZE=${IMAGE_SIZE:-128}     # pixels per side; the crop has 15/16 of them
SPLIT_SEED=${SPLIT_SEED:-0}       # seed of the split into training, validation and test images
EPOCHS=${EPOCHS:-100}             # epochs of pretraining; learning rate and weight decay depend on the grouping
EPS=${EPS:-2.0}                   # radius of the attack, L2 norm over pixels in [0,1]
ALPHA=${ALPHA:-0.1}               # step size of the attack
ITERATIONS=${ITERATIONS:-100}     # number of steps of the attack
ADV=${ADV:-300}                   # adversarial examples per image
BATCH=${BATCH:-128}               # images of D_f (the forget set) per step
ADV_BATCH=${ADV_BATCH:-128}       # adversarial examples per step
PASSES=${PASSES:-1000}            # maximum number of passes over the adversarial examples
LR=${LR:-1e-3}                    # learning rate of unlearning
LAMBDA=${LAMBDA:-1.0}             # weight of the importance penalty
PRECISION=${PRECISION:-}          # default: tf32 on a CUDA GPU, else fp32; bf16 makes the attack faster

failed=0
dry=
case " $* " in *" --dry-run "*) dry=1 ;; esac

# shellcheck disable=SC2086  # word splitting is intended
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
                --max-passes "$PASSES" --unlearn-lr "$LR" --reg-lamb "$LAMBDA" ${PRECISION:+--precision "$PRECISION"} "$@"
    } || {
        code=$?
        case "$code" in 130 | 143) exit "$code" ;; esac  # stopped by Ctrl-C or SIGTERM
        echo "== UTKFace, $grouping was not finished (exit code $code)" >&2
        failed=1
    }
done

if [ -z "$dry" ] && compgen -G "$RESULTS/runs/*.json" > /dev/null; then
    $PYTHON main_tables.py --result-dir "$RESULTS" || failed=1
fi
exit "$failed"
