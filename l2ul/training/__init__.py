"""Training of the classifiers that are unlearned, and of retrained models to compare with.

`recipe` holds the hyper-parameters, `loop` trains, `pretrain` trains on a data set and saves the weights. The
command of the scripts is `l2ul.cli.pretrain_command`.
"""
