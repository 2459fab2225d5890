"""Configurations, as data: no code lives here. `--gin_search_paths` finds this folder by default."""
