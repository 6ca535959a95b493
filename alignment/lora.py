"""The export of adapters by its former name; it is `python -m alignment.lora_export` now, and LoRA is lora.py."""

import sys
from pathlib import Path

if not __package__:  # run as a file: modules are imported from the repository's root, not from this folder
    sys.path[0] = str(Path(__file__).resolve().parent.parent)

from alignment.lora_export import main
from command_line import run_main

if __name__ == "__main__":
    run_main(main)
