#!/usr/bin/env bash
# Run the paper's CIFAR and ImageNet experiments one after the other, then make their tables. Further arguments go to
# every main_unlearn.py:
#     bash run_unlearn_cifar_imagenet.sh
#     bash run_unlearn_cifar_imagenet.sh --dry-run
#     WHAT="cifar10 continual" SEEDS="0" K="16" bash run_unlearn_cifar_imagenet.sh --save-model
#     WHAT="mnist fashion_mnist" bash run_unlearn_cifar_imagenet.sh     # not part of the paper: only when named
# The settings are those of the released scripts. If D_test (accuracy on the test set) falls too far, search EPS in
# 1.0-5.0 or LR in 1e-4-1e-3. Published and measured values: docs/reproducing.md.
set -euo pipefail
cd "$(dirname "$0")"

PYTHON=${PYTHON:-"uv run"}        # e.g. PYTHON=python in a conda environment
DATA=${DATA:-data}                # contains cifar-10-batches-py, cifar-100-python, imagenet/train, imagenet/val, MNIST, weights
RESULTS=${RESULTS:-result_data}
WHAT=${WHAT:-"cifar10 cifar100 vit imagenet relabel continual nets imagenet-a"}  # experiments to run
SEEDS=${SEEDS:-"0 1 2 3 4"}
METHODS=${METHODS:-"before neggrad rawp oracle adv adv_imp distill"}
RELABEL_METHODS=${RELABEL_METHODS:-"before correct oracle adv adv_imp distill"}
NETS=${NETS:-"mobilenet_v2 squeezenet1_1 densenet121 resnet34"}  # other nets, on CIFAR-10
K=${K:-"16 64 128 256"}           # number of images to forget
VIT_K=${VIT_K:-"16 32 64 128 256"}
STEP=${STEP:-16}                  # continual experiment: images per step
STEPS_K=${STEPS_K:-64}            # continual experiment: images in all steps

EPS=${EPS:-4.0}                   # radius of the attack, L2 norm over pixels in [0,1]
ALPHA=${ALPHA:-0.1}               # step size of the attack
ITERATIONS=${ITERATIONS:-100}     # number of steps of the attack
CIFAR10_ADV=${CIFAR10_ADV:-20}    # adversarial examples per image, CIFAR-10
OTHER_ADV=${OTHER_ADV:-200}       # adversarial examples per image, CIFAR-100 and ImageNet
LR=${LR:-1e-3}                    # learning rate of unlearning
LAMBDA=${LAMBDA:-1.0}             # weight of the importance penalty
PRECISION=${PRECISION:-}          # default: tf32 on a CUDA GPU, else fp32; bf16 makes the attack faster
RETAIN_SAMPLE=${RETAIN_SAMPLE:-50000}  # training images of ImageNet to measure D_r on

failed=0
for word in $WHAT; do
    case "$word" in
        cifar10 | cifar100 | vit | imagenet | relabel | continual | nets | imagenet-a | mnist | fashion_mnist) ;;
        *)
            echo "WHAT names $word; expected one or more of cifar10 cifar100 vit imagenet relabel continual nets imagenet-a mnist fashion_mnist" >&2
            exit 2
            ;;
    esac
done

# run KEY NAME ARGUMENTS...: run one experiment. If it fails, print HINT and continue with the next one.
run() {
    local key=$1 name=$2
    shift 2
    case " $WHAT " in *" $key "*) ;; *) return 0 ;; esac
    echo "== $name"
    # shellcheck disable=SC2086  # word splitting is intended
    $PYTHON main_unlearn.py --data-dir "$DATA" --result-dir "$RESULTS" --seed $SEEDS --pgd-eps "$EPS" \
        --pgd-alpha "$ALPHA" --pgd-iter "$ITERATIONS" --unlearn-lr "$LR" --reg-lamb "$LAMBDA" ${PRECISION:+--precision "$PRECISION"} "$@" || {
        local code=$?
        case "$code" in 130 | 143) exit "$code" ;; esac  # stopped by Ctrl-C or SIGTERM
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

    HINT="train its weights with: $PYTHON main_pretrain_cifar10_resnet18.py, or use the authors' cifar10_pretrained_models/resnet18.pt"
    run cifar10 "CIFAR-10, ResNet-18" "${cifar10[@]}" --model resnet18 --unlearn-k $K --method $METHODS "$@"

    HINT="train its weights with: $PYTHON main_pretrain_cifar100_resnet50.py, or use the authors' cifar100_pretrained_models/resnet50.pt"
    run cifar100 "CIFAR-100, ResNet-50" "${cifar100[@]}" --model resnet50_cifar100 --unlearn-k $K \
        --adv-batch-size 256 --max-passes 100 --method $METHODS "$@"

    HINT="it needs network access to download CIFAR-100 and the classifier Ahmed9275/Vit-Cifar100"
    run vit "CIFAR-100, ViT-B/16" "${cifar100[@]}" --model hf:Ahmed9275/Vit-Cifar100 --unlearn-k $VIT_K \
        --adv-batch-size 512 --max-passes 1000 --method $METHODS "$@"

    HINT="put ImageNet-1k into $DATA/imagenet/train and $DATA/imagenet/val, one folder per class; torchvision downloads the weights"
    run imagenet "ImageNet-1k, ResNet-50" "${imagenet[@]}" --unlearn-k $K --method $METHODS "$@"

    HINT="it uses the weights of the first experiment"
    run relabel "CIFAR-10, ResNet-18, relabelled" "${cifar10[@]}" --model resnet18 --unlearn-k $K \
        --goal relabel --method $RELABEL_METHODS "$@"
    run continual "CIFAR-10, ResNet-18, $STEP images per step" "${cifar10[@]}" --model resnet18 \
        --unlearn-k "$STEPS_K" --continual-step "$STEP" --method $METHODS "$@"

    for net in $NETS; do
        HINT="train its weights with: $PYTHON main_pretrain_cifar10_resnet18.py --model $net"
        run nets "CIFAR-10, $net" "${cifar10[@]}" --model "$net" --unlearn-k $K --method $METHODS "$@"
    done

    HINT="put the folders of ImageNet-A into $DATA/imagenet-a, and ImageNet-1k as above"
    run imagenet-a "ImageNet-A, ResNet-50, corrected" "${imagenet[@]}" --forget-dir "$DATA/imagenet-a" \
        --goal relabel --unlearn-k $K --method $RELABEL_METHODS "$@"

    for data in mnist fashion_mnist; do
        HINT="train its weights with: $PYTHON main_pretrain_mnist_lenet.py --dataset $data"
        run "$data" "$data, LeNet" --dataset "$data" --model lenet --unlearn-k $K --method $METHODS "$@"
    done
}

case " $* " in *" --dry-run "*) exit "$failed" ;; esac
if compgen -G "$RESULTS/runs/*.json" > /dev/null; then
    $PYTHON main_tables.py --result-dir "$RESULTS" || failed=1
fi
exit "$failed"
