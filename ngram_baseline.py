"""The n-gram baseline by its former name; it is `python -m evaluation.ngram_baseline` now."""

from command_line import run_main
from evaluation.ngram_baseline import main

if __name__ == "__main__":
    run_main(main)
