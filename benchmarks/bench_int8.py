"""How fast and how large a model is in FP32 and in INT8: decoding on the CPU, at batch sizes 1 and 8.

    python benchmarks/bench_int8.py [--num_threads 2] [--n_tokens 64] [--shapes gpt2-124m small]

Weights are random: speed does not depend on them. FP32 and INT8 take turns, so that a drift of the machine hits both,
and the best of several runs counts. The table is followed by one line of JSON.
"""

from __future__ import annotations

import json
import platform
import sys
from dataclasses import dataclass
from datetime import date
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from command_line import option, parse_config, run_main
from gpt_model import GPTConfig, GPTModel
from inference.linear_kernels import native_function
from inference.quantizer import compare_logits, decode_speed, quantize_model_int8, weight_bytes

SHAPES = {
    "gpt2-124m": GPTConfig.for_architecture("gpt2", vocab_size=50304, d_model=768, n_layers=12, n_heads=12),
    "small": GPTConfig.for_architecture("modern", vocab_size=4096, d_model=512, n_layers=8, n_heads=8, n_kv_heads=4),
    "tiny": GPTConfig.for_architecture("modern", vocab_size=4096, d_model=192, n_layers=4, n_heads=4, n_kv_heads=2),
}
BATCH_SIZES = (1, 8)


@dataclass
class BenchmarkConfig:
    """The command line of the benchmark."""

    shapes: list[str] = option(list, f"which of {', '.join(SHAPES)}; default all")
    num_threads: int = option(0, "CPU threads; 0 means as many as torch takes")
    n_tokens: int = option(64, "tokens generated in a run")
    rounds: int = option(3, "times that FP32 and INT8 take turns")

    def validate(self) -> list[str]:
        limits = {"num_threads": 0, "n_tokens": 1, "rounds": 1}
        return [
            *(f"{name} must be at least {least}" for name, least in limits.items() if getattr(self, name) < least),
            *(f"shape {name} is unknown; take {', '.join(SHAPES)}" for name in self.shapes if name not in SHAPES),
        ]


def processor() -> str:
    """The name of the CPU, as far as the system tells."""
    info = Path("/proc/cpuinfo")
    lines = info.read_text().splitlines() if info.is_file() else []
    names = (line.split(":", 1)[1].strip() for line in lines if line.startswith("model name"))
    return next(names, platform.processor() or platform.machine())


def measure(name: str, config: BenchmarkConfig) -> list[dict[str, float | str]]:
    """One row for each batch size: tokens a second over the whole batch, size of the weights, error of the logits."""
    torch.manual_seed(0)
    model = GPTModel.from_config(SHAPES[name]).eval()
    quantized = quantize_model_int8(model)
    error, _ = compare_logits(model, quantized, torch.randint(0, SHAPES[name].vocab_size, (2, 32)))
    rows = []
    for batch_size in BATCH_SIZES:
        speeds = [
            [decode_speed(candidate, batch_size, config.n_tokens) for candidate in (model, quantized)]
            for _ in range(config.rounds)
        ]
        fp32, int8 = (max(column) for column in zip(*speeds, strict=True))
        rows.append(
            {
                "shape": name,
                "batch_size": batch_size,
                "fp32_tokens_per_second": round(fp32, 1),
                "int8_tokens_per_second": round(int8, 1),
                "speedup": round(int8 / fp32, 2),
                "fp32_mib": round(weight_bytes(model) / 2**20, 2),
                "int8_mib": round(weight_bytes(quantized) / 2**20, 2),
                "logits_relative_error": round(error, 4),
            }
        )
    return rows


def main(argv: list[str] | None = None) -> None:
    """Run the benchmark from the command line."""
    config = parse_config(BenchmarkConfig, argv, description="Decoding speed in FP32 and INT8.")
    torch.set_num_threads(config.num_threads or torch.get_num_threads())
    print(f"{'shape':<10} {'batch':>5} {'FP32 tok/s':>11} {'INT8 tok/s':>11} {'':>6} {'MiB':>18} {'logits error':>13}")
    results = []
    for name in config.shapes or SHAPES:
        for row in measure(name, config):
            size = f"{row['fp32_mib']} → {row['int8_mib']}"
            print(
                f"{row['shape']:<10} {row['batch_size']:>5} {row['fp32_tokens_per_second']:>11} "
                f"{row['int8_tokens_per_second']:>11} {row['speedup']:>5}× {size:>18} "
                f"{row['logits_relative_error']:>13.2%}",
                flush=True,
            )
            results.append(row)
    about = {
        "benchmark": "int8",
        "date": date.today().isoformat(),
        "processor": processor(),
        "capability": torch.backends.cpu.get_cpu_capability(),
        "native_kernel": native_function(torch.int8) is not None,
        "num_threads": torch.get_num_threads(),
        "n_tokens": config.n_tokens,
        "python": platform.python_version(),
        "torch": str(torch.__version__),
    }
    print(json.dumps({**about, "results": results}))


if __name__ == "__main__":
    run_main(main)
