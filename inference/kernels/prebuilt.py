"""Compile all kernels beforehand, for machines without a compiler, such as containers.

    python -m inference.kernels.prebuilt --levels avx2 avx512_vnni --output_dir kernels
    PREBUILT_KERNELS=kernels python -m inference.api_service

The best of the levels that the processor has is chosen when they are loaded (native_code.py).
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from command_line import UserError, option, parse_config, run_main
from cpu_level import ARM, ARM_LEVELS, X86_LEVELS
from machine.native_code import c_files, prebuild

HERE = [level.name for level in (ARM_LEVELS if ARM else X86_LEVELS)]


@dataclass
class PrebuildConfig:
    """The command line."""

    output_dir: str = option("kernels", "where the libraries are put")
    levels: list[str] = option(
        list, "levels of instructions (cpu_level.py); those of other processors are left out"
    )


def main(argv: list[str] | None = None) -> None:
    """Compile, and say what was made."""
    config = parse_config(PrebuildConfig, argv, description="Compile the kernels for several levels of instructions.")
    levels = [level for level in config.levels or HERE if level in HERE] or HERE
    for source in c_files():
        for level in levels:
            try:
                path = prebuild(source, level, Path(config.output_dir))
            except (RuntimeError, OSError) as error:
                raise UserError(f"{source.name} cannot be compiled for {level}: {error}") from None
            print(f"{path} ({path.stat().st_size / 1024:.0f} KiB)")


if __name__ == "__main__":
    run_main(main)
