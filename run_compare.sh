#!/usr/bin/env bash
# Compare all methods on one forget set D_f with a model that was retrained without it. Further arguments go to every
# main_unlearn.py:
#     bash run_compare.sh --max-passes 30
#     SCRIPT=my_method.py OURS=bounded OTHERS= TRAINED= bash run_compare.sh    # a method of your own
#     DATASET=digits MODEL=resnet20 PRETRAIN=main_pretrain_digits_resnet20.py RECIPE="" AUGMENT=1 K=64 bash run_compare.sh
# Trains what is missing: the original model, the retrained model and two reference models for RMIA. All use the same
# recipe, so that differences in the schedule do not affect the comparison. The repository has those of the default
# settings. Results: docs/reproducing.md.
set -euo pipefail
cd "$(dirname "$0")"

PYTHON=${PYTHON:-"uv run"}        # e.g. PYTHON=python in a conda environment
DATA=${DATA:-data}
RESULTS=${RESULTS:-result_data/compare}
DATASET=${DATASET:-cifar10}
MODEL=${MODEL:-resnet20}
PRETRAIN=${PRETRAIN:-main_pretrain_cifar10_resnet18.py}
RECIPE=${RECIPE-"--schedule onecycle --lr 0.2 --epochs 8"}
K=${K:-256}                       # number of images to forget
SEED=${SEED:-0}                   # seed of D_f and of unlearning
NETS=${NETS:-data/weights/compare/${DATASET}_${MODEL}_k${K}_seed$SEED}  # folder of the trained models
REFERENCES=${REFERENCES:-"2 3"}   # seeds of the reference models for RMIA
SCRIPT=${SCRIPT:-main_unlearn.py} # or a script with a method of your own, see docs/extending.md
OURS=${OURS-"before neggrad rawp oracle adv adv_imp distill"}
OTHERS=${OTHERS-"boundary_shrink jit"}             # do not train on D_r, the retain set
TRAINED=${TRAINED-"finetune random_labels neggrad_plus l1_sparse salun scrub ssd bad_teaching amun"}  # train on D_r
AUGMENT=${AUGMENT:-2}             # of TRAINED: 1 crops, 2 crops and mirrors, as in training
SETTINGS=${SETTINGS:-}            # other settings of TRAINED, such as "epochs=2"
EVALUATE=${EVALUATE:-"membership distance retrained rmia relearn duplicates"}

case " $* " in *" --dry-run "*) dry=1 ;; *) dry= ;; esac
lacking=

# train NAME SEED ARGUMENTS...: train a model, or check that its file is of this training; resume an interrupted one
train() {
    local file="$NETS/$1.safetensors" seed=$2
    shift 2
    if [ -n "$dry" ]; then
        if [ -e "$file" ]; then return 0; fi
        echo "would train first: $file"
        lacking=1
        return 0
    fi
    mkdir -p "$NETS"
    if [ -e "$file" ]; then echo "== checking $file"; else echo "== training $file"; fi
    # shellcheck disable=SC2086  # word splitting is intended
    $PYTHON "$PRETRAIN" --data-dir "$DATA" --model "$MODEL" $RECIPE --seed "$seed" --output "$file" --resume "$@"
}

train original 0
models=()                         # that metrics of EVALUATE compare with
case " $EVALUATE " in *" retrained "* | *" relearn "*)
    train retrained 1 --exclude-k "$K" --exclude-seed "$SEED"
    models+=(--retrained "$NETS/retrained.safetensors")
esac
case " $EVALUATE " in *" rmia "*)
    models+=(--references)
    for seed in $REFERENCES; do
        train "reference$seed" "$seed" --exclude-k "$K" --exclude-seed "$SEED"
        models+=("$NETS/reference$seed.safetensors")
    done
esac

if [ -n "$lacking" ]; then exit 0; fi

# compare METHODS ARGUMENTS...: unlearn and measure
compare() {
    local methods=$1
    shift
    if [ -z "$methods" ]; then return 0; fi
    # shellcheck disable=SC2086
    $PYTHON "$SCRIPT" --data-dir "$DATA" --result-dir "$RESULTS" --dataset "$DATASET" --model "$MODEL" \
        --checkpoint "$NETS/original.safetensors" --unlearn-k "$K" --seed "$SEED" --save-model --evaluate $EVALUATE \
        ${models[@]+"${models[@]}"} --method $methods "$@"
}

compare "$OURS" "$@"
compare "$OTHERS" "$@"
# shellcheck disable=SC2086
compare "$TRAINED" --setting "augment=$AUGMENT" $SETTINGS "$@"

if [ -n "$dry" ]; then exit 0; fi
$PYTHON main_tables.py --result-dir "$RESULTS"
