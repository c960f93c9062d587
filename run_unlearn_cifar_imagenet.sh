#!/usr/bin/env bash
# The CIFAR and ImageNet experiments of the paper, one after the other, then their tables; further arguments go to every
# main_unlearn.py:
#     bash run_unlearn_cifar_imagenet.sh
#     bash run_unlearn_cifar_imagenet.sh --dry-run
#     WHAT="cifar10 continual" SEEDS="0" K="16" bash run_unlearn_cifar_imagenet.sh --save-model
# Settings are the released scripts'. If D_test falls too far, search EPS in 1.0-5.0 or LR in 1e-4-1e-3.
# Published D_test at k = 256 after forgetting (StructGuard, CVPR 2026): CIFAR-10 ResNet-18 Adv 36.69, Adv+Imp 45.44;
# CIFAR-100 ResNet-50 Adv 46.45, Adv+Imp 48.71; ImageNet ResNet-50 Adv 21.27, Adv+Imp 31.19. Ours: not measured yet.
set -euo pipefail
cd "$(dirname "$0")"

PYTHON=${PYTHON:-"uv run"}        # e.g. PYTHON=python in a conda environment
DATA=${DATA:-data}                # holds cifar-10-batches-py, cifar-100-python, imagenet/train, imagenet/val, weights
RESULTS=${RESULTS:-result_data}
WHAT=${WHAT:-"cifar10 cifar100 vit imagenet relabel continual nets imagenet-a"}  # which experiments
SEEDS=${SEEDS:-"0 1 2 3 4"}
METHODS=${METHODS:-"before neggrad rawp oracle adv adv_imp distill"}
RELABEL_METHODS=${RELABEL_METHODS:-"before correct oracle adv adv_imp distill"}
NETS=${NETS:-"mobilenet_v2 squeezenet1_1 densenet121 resnet34"}  # the paper's others, on CIFAR-10
K=${K:-"16 64 128 256"}           # images to forget
VIT_K=${VIT_K:-"16 32 64 128 256"}
STEP=${STEP:-16}                  # images that arrive at a time in the continual experiment
STEPS_K=${STEPS_K:-64}            # and how many in all

EPS=${EPS:-4.0}                   # radius of the attack, L2 norm over pixels in [0,1]
ALPHA=${ALPHA:-0.1}               # length of its steps
ITERATIONS=${ITERATIONS:-100}     # number of its steps
CIFAR10_ADV=${CIFAR10_ADV:-20}    # adversarial examples of each image
OTHER_ADV=${OTHER_ADV:-200}
LR=${LR:-1e-3}
LAMBDA=${LAMBDA:-1.0}             # weight of the importance penalty
PRECISION=${PRECISION:-fp32}      # on a CUDA GPU also tf32, or bf16 in the attack: faster
RETAIN_SAMPLE=${RETAIN_SAMPLE:-50000}  # training images of ImageNet that D_r is measured on

failed=0
for word in $WHAT; do
    case "$word" in
        cifar10 | cifar100 | vit | imagenet | relabel | continual | nets | imagenet-a) ;;
        *)
            echo "WHAT names $word; expected some of cifar10 cifar100 vit imagenet relabel continual nets imagenet-a" >&2
            exit 2
            ;;
    esac
done

# run KEY NAME ARGUMENTS...: one experiment; says what is missing and goes on with the next
run() {
    local key=$1 name=$2
    shift 2
    case " $WHAT " in *" $key "*) ;; *) return 0 ;; esac
    echo "== $name"
    # shellcheck disable=SC2086  # lists of words on purpose
    $PYTHON main_unlearn.py --data-dir "$DATA" --result-dir "$RESULTS" --seed $SEEDS --pgd-eps "$EPS" \
        --pgd-alpha "$ALPHA" --pgd-iter "$ITERATIONS" --unlearn-lr "$LR" --reg-lamb "$LAMBDA" --precision "$PRECISION" "$@" || {
        local code=$?
        [ "$code" -eq 130 ] && exit 130
        echo "== $name was not run (exit code $code): $HINT" >&2
        failed=1
    }
}

# shellcheck disable=SC2086
{
    cifar10=(--dataset cifar10 --num-adv-images "$CIFAR10_ADV" --batch-size 32 --adv-batch-size 256 --max-passes 1000)
    cifar100=(--dataset cifar100 --num-adv-images "$OTHER_ADV" --batch-size 32)
    imagenet=(--dataset imagenet --model torchvision:resnet50 --num-adv-images "$OTHER_ADV" --batch-size 16
        --adv-batch-size 128 --max-passes 100 --retain-sample "$RETAIN_SAMPLE")

    HINT="CIFAR-10 is downloaded by itself; weights: $PYTHON main_pretrain_cifar10_resnet18.py, or the paper's cifar10_pretrained_models/resnet18.pt"
    run cifar10 "CIFAR-10, ResNet-18" "${cifar10[@]}" --model resnet18 --unlearn-k $K --method $METHODS "$@"

    HINT="CIFAR-100 is downloaded by itself; weights: $PYTHON main_pretrain_cifar100_resnet50.py, or the paper's cifar100_pretrained_models/resnet50.pt"
    run cifar100 "CIFAR-100, ResNet-50" "${cifar100[@]}" --model resnet50_cifar100 --unlearn-k $K \
        --adv-batch-size 256 --max-passes 100 --method $METHODS "$@"

    HINT="CIFAR-100 and the classifier Ahmed9275/Vit-Cifar100 are downloaded by themselves, where there is a network"
    run vit "CIFAR-100, ViT-B/16" "${cifar100[@]}" --model hf:Ahmed9275/Vit-Cifar100 --unlearn-k $VIT_K \
        --adv-batch-size 512 --max-passes 1000 --method $METHODS "$@"

    HINT="put ImageNet-1k into $DATA/imagenet/train and $DATA/imagenet/val, a folder a class; torchvision downloads the weights"
    run imagenet "ImageNet-1k, ResNet-50" "${imagenet[@]}" --unlearn-k $K --method $METHODS "$@"

    HINT="the weights are those of the first experiment"
    run relabel "CIFAR-10, ResNet-18, relabelled" "${cifar10[@]}" --model resnet18 --unlearn-k $K \
        --goal relabel --method $RELABEL_METHODS "$@"
    run continual "CIFAR-10, ResNet-18, $STEP images at a time" "${cifar10[@]}" --model resnet18 \
        --unlearn-k "$STEPS_K" --continual-step "$STEP" --method $METHODS "$@"

    for net in $NETS; do
        HINT="weights: $PYTHON main_pretrain_cifar10_resnet18.py --model $net"
        run nets "CIFAR-10, $net" "${cifar10[@]}" --model "$net" --unlearn-k $K --method $METHODS "$@"
    done

    HINT="put ImageNet-A's folders into $DATA/imagenet-a, and ImageNet-1k as above"
    run imagenet-a "ImageNet-A, ResNet-50, corrected" "${imagenet[@]}" --forget-dir "$DATA/imagenet-a" \
        --goal relabel --unlearn-k $K --method $RELABEL_METHODS "$@"
}

case " $* " in *" --dry-run "*) exit "$failed" ;; esac
if compgen -G "$RESULTS/runs/*.json" > /dev/null; then
    $PYTHON main_tables.py --result-dir "$RESULTS" || failed=1
fi
exit "$failed"
