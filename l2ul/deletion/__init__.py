"""Deletion requests: a model and a folder of images in, an unlearned model with a report out.

`flow` has the steps from the settings to the unlearned model, on files and for `forget`, which is `l2ul.forget`.

In the order of a request: `options` (flags), `deployed_model` (open and write a model in its form), `request` (images
and labels), `search` (find the best settings of the method; `strategies` says which settings are run next, `candidates`
runs them and measures what they achieve), `checks` (measure the result), `report` and `report_schema` (what was done,
as data and as a page), `output` (write everything), `verify` and `signature` (check it later).
"""
