"""The export of adapters by its former name; it is `python -m alignment.lora_export` now, and LoRA is lora.py."""

from alignment.lora_export import main
from command_line import run_main

if __name__ == "__main__":
    run_main(main)
