"""One dataset a file: sources, fields, prompts in our own words, metric. `catalog.datasets` walks this folder."""
