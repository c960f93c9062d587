"""The values that options accept, each list defined once. Free of torch, so that parsers and `--help` are quick."""

GOALS = ("misclassify", "relabel")  # what forgetting means
BN_MODES = ("train", "eval")  # mode of batch-norm and dropout while a method trains
PRECISIONS = ("fp32", "tf32", "bf16")  # of forward and backward passes, see `common.precision`
DTYPES = ("float32", "float16", "uint8")  # in which adversarial examples are stored; names of torch dtypes
DEVICES = ("cuda", "mps", "cpu")
DECODERS = ("cpu", "gpu")  # of images on disk
PREFETCH = 2  # default number of batches that a worker decodes ahead
SCHEDULES = ("cosine", "onecycle")  # of the learning rate in training
TRACKERS = ("tensorboard",)  # of training curves
CHANGES = ("flipped", "cropped", "jpeg")  # kinds of changed copies that a deletion request can forget as well
AGE_GROUPINGS = {  # of UTKFace: upper bounds in years; the class of an age is the first bound above it
    "TNN": (10, 15, 20, 25, 30, 40, 50, 60, 120),
    "MFD": (20, 41, 120),
    "balanced": (20, 30, 45, 120),
    "groups": (4, 13, 20, 31, 46, 61, 120),
    "tens": (11, 21, 31, 41, 51, 61, 71, 81, 91, 101, 111, 120),
}
EVALUATIONS = {  # groups of additional metrics and what they measure, see `metrics.groups`
    "membership": "membership inference: AUC and true-positive rate at 1 % false positives of five attacks",
    "distance": "relative distance of the weights from the original ones, ‖θ - θ⁰‖ / ‖θ⁰‖",
    "retrained": "differences from the --retrained model in accuracy, membership inference, outputs and features",
    "rmia": "membership inference by RMIA, calibrated with the --references models",
    "relearn": "steps of fine-tuning on D_f until its accuracy is that of the original model again",
    "duplicates": "number of near-duplicates of D_f in D_r",
    "agreement": "agreement with the original model on held-out adversarial examples",
}
