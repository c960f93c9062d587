"""From records to tables (Markdown, CSV, LaTeX), figures and a page of all results. The modules of this package read
files and compute nothing but statistics and figures; they take the records that `l2ul.experiments` wrote.
"""

FIGURES = {  # number of a figure: what it shows, which is part of the names of its files
    1: "accuracy_against_k",
    2: "adversarial_examples",
    3: "new_classes",
    4: "layer_similarity",
    5: "feature_maps",
    6: "ablations",
    7: "curves",
}
