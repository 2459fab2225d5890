"""Tasks of the study as seqio tasks and mixtures: data, prompts, metrics. Importing it registers nothing.

So far the package only holds the place; training and evaluation, which need tasks, are not here yet either.
"""
