"""`python -m tune_ego`: the command line."""

from tune_ego.cli import main

main()
