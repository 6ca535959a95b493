"""The programs that bench_inference.py measures beside ours, on the same weights: each an optional package.

    pip install transformers llama-cpp-python ctranslate2 openvino-genai onnxruntime-genai onnx-ir

With CPU_LEVEL set (cpu_level.py), a peer that chooses its instructions at run time is held to them by its own switch,
as far as it has one; llama.cpp has what it was compiled for: LLAMA_CPP_LIB_PATH names a folder with another build.
"""

from __future__ import annotations

import json
import logging
import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from benchmarks.model_files import LeftOut, ModelFiles, size_of
from benchmarks.peers import BatchGenerator, Generator, Prompt, Transformers, position_bytes
from cpu_level import cpu_level

# CT2_FORCE_CPU_ISA at each CPU_LEVEL; its oneDNN and MKL obey the variables of cpu_level.py
CTRANSLATE2_LEVELS = {
    "sse2": "GENERIC",
    "avx2": "AVX2",
    "avx2_vnni": "AVX2",
    "avx512": "AVX512",
    "avx512_vnni": "AVX512",
    "amx": "AVX512",
    "neon": "NEON",
    "neon_dotprod": "NEON",
}
WIDE = ("AVX_VNNI", "AVX512", "AVX512_VBMI", "AVX512_VNNI", "AVX512_BF16", "AMX_INT8")  # as llama.cpp names them
AT_LEVEL = {  # what a level has of these
    "avx2_vnni": WIDE[:1],
    "avx512": WIDE[1:3],
    "avx512_vnni": WIDE[1:4],
    "amx": WIDE,
}
if level := cpu_level():  # before a peer is loaded
    os.environ["CT2_FORCE_CPU_ISA"] = CTRANSLATE2_LEVELS[level.name]


@dataclass(frozen=True)
class Setting:
    """What every peer is told.

    Attributes:
        context: tokens of one stream, its prompt included.
        n_streams: how many there are at most, then of `stream_context` tokens each.
    """

    n_threads: int
    context: int
    n_streams: int
    stream_context: int

    @property
    def tokens_at_once(self) -> int:
        """How many tokens a pass has at most."""
        return max(self.context, self.n_streams * self.stream_context)


class LlamaCpp(BatchGenerator):
    """llama.cpp through `llama-cpp-python`'s C functions; of many streams, each is a sequence (a slot of its server).

    The tokens are chosen with NumPy's argmax straight from its logits, which costs less than its own samplers.
    """

    def __init__(self, files: ModelFiles, weights: str, setting: Setting) -> None:
        import llama_cpp as api

        logging.getLogger("llama-cpp-python").setLevel(logging.CRITICAL + 1)  # how it silences llama.cpp, too
        self.api, self.setting = api, setting
        path = files.gguf(weights)
        self.weight_bytes = size_of(path) - position_bytes(files.model)  # FP32 in each of its files
        self.model = api.llama_model_load_from_file(str(path).encode(), api.llama_model_default_params())
        if not self.model:
            raise LeftOut("it cannot read the file")
        self.n_vocab = api.llama_vocab_n_tokens(api.llama_model_get_vocab(self.model))
        self.contexts: dict[int, Any] = {}  # by the number of sequences
        self.batch = api.llama_batch_init(setting.tokens_at_once, 0, 1)
        self.tokens, self.positions, self.wanted, counts = (
            np.ctypeslib.as_array(pointer, shape=(setting.tokens_at_once,))
            for pointer in (self.batch.token, self.batch.pos, self.batch.logits, self.batch.n_seq_id)
        )
        counts[:] = 1

    def _context(self, n_sequences: int) -> Any:
        """A context with an empty cache."""
        api, setting = self.api, self.setting
        if n_sequences not in self.contexts:
            params = api.llama_context_default_params()
            own = setting.context if n_sequences == 1 else -(-setting.stream_context // 256) * 256  # of its own steps
            params.n_ctx, params.n_seq_max, params.n_batch = own * n_sequences, n_sequences, setting.tokens_at_once
            params.n_threads = params.n_threads_batch = setting.n_threads
            self.contexts[n_sequences] = api.llama_init_from_model(self.model, params)
        context = self.contexts[n_sequences]
        api.llama_memory_clear(api.llama_get_memory(context), True)
        return context

    def _next(self, context: Any, texts: Sequence[Prompt], start: int) -> np.ndarray:
        """Logits (B, V) after a piece of each text, as long for all, that begins at the position `start`."""
        n_texts, length = len(texts), len(texts[0])
        n_tokens = self.batch.n_tokens = n_texts * length
        self.tokens[:n_tokens] = np.concatenate(texts)
        self.positions[:n_tokens] = np.tile(np.arange(start, start + length), n_texts)
        self.wanted[:n_tokens] = 0
        ends = range(length - 1, n_tokens, length)
        self.wanted[ends] = 1
        for index in range(n_tokens):
            self.batch.seq_id[index][0] = index // length
        if code := self.api.llama_decode(context, self.batch):
            raise RuntimeError(f"llama_decode says {code}")
        rows = [self.api.llama_get_logits_ith(context, index) for index in ends]
        return np.stack([np.ctypeslib.as_array(row, shape=(self.n_vocab,)) for row in rows])

    def prefill(self, prompt: Prompt) -> np.ndarray:
        return self._next(self._context(1), [prompt], 0)[0]

    def _generate_all(self, prompts: Sequence[Prompt], n_tokens: int) -> list[list[int]]:
        context, length = self._context(len(prompts)), len(prompts[0])
        steps = [self._next(context, prompts, 0).argmax(1)]
        for position in range(length, length + n_tokens - 1):
            steps.append(self._next(context, steps[-1][:, None], position).argmax(1))
        return np.stack(steps, axis=1).tolist()

    @staticmethod
    def instructions() -> str:
        """What it was compiled for."""
        import llama_cpp

        words = llama_cpp.llama_print_system_info().decode()
        compiled = [name for name in WIDE if f" {name} = 1" in words]
        listed = ", ".join(compiled) or "none wider than AVX2"
        if level and not set(compiled) <= set(AT_LEVEL.get(level.name, ())):
            return f"not held to {level.name}: compiled for {listed}"
        return f"compiled for {listed}"


class CTranslate2(BatchGenerator):
    """CTranslate2's `Generator`."""

    def __init__(self, files: ModelFiles, weights: str, setting: Setting) -> None:
        import ctranslate2

        folder = files.ctranslate2("int8" if weights.startswith("int8") else None)
        self.vocabulary = json.loads((folder / "vocabulary.json").read_text(encoding="utf-8"))
        self.weight_bytes = size_of(folder / "model.bin")
        self.generator = ctranslate2.Generator(
            str(folder), "cpu", compute_type=weights, inter_threads=1, intra_threads=setting.n_threads
        )

    def _generate(self, prompts: Sequence[Prompt], **options: Any) -> list[Any]:
        texts = [[self.vocabulary[token] for token in prompt] for prompt in prompts]
        return self.generator.generate_batch(texts, sampling_topk=1, include_prompt_in_result=False, **options)

    def prefill(self, prompt: Prompt) -> np.ndarray:
        return np.array(self._generate([prompt], max_length=1, return_logits_vocab=True)[0].logits[0][0])

    def _generate_all(self, prompts: Sequence[Prompt], n_tokens: int) -> list[list[int]]:
        return [each.sequences_ids[0] for each in self._generate(prompts, max_length=n_tokens, min_length=n_tokens)]

    @staticmethod
    def instructions() -> str:
        """What it chooses from."""
        return f"held to {os.environ['CT2_FORCE_CPU_ISA']}" if level else "all that it finds"


class OpenVINO(BatchGenerator):
    """OpenVINO GenAI with its continuous batching, which reads GGUF files by itself; it shows tokens, no logits."""

    def __init__(self, files: ModelFiles, weights: str, setting: Setting) -> None:
        import openvino
        import openvino_genai

        if files.architecture == "gpt2":
            raise LeftOut("its reader of GGUF files knows no GPT-2")
        path = files.gguf(weights)
        self.weight_bytes = size_of(path)
        scheduler = openvino_genai.SchedulerConfig()
        scheduler.cache_size, scheduler.enable_prefix_caching = 1, False
        scheduler.max_num_batched_tokens = setting.tokens_at_once
        options: dict[str, Any] = {"INFERENCE_NUM_THREADS": setting.n_threads}
        # It takes bfloat16 where the processor has it: not what a level has, and with FP16 files it ends the process
        if level or weights == "F16":
            options["INFERENCE_PRECISION_HINT"] = "f32"
        self.pipeline = openvino_genai.ContinuousBatchingPipeline(str(path), scheduler, "CPU", options)
        self.tensor, self.settings = openvino.Tensor, openvino_genai.GenerationConfig
        if level:
            try:
                self.generate([0], 1)
            except RuntimeError as error:
                raise LeftOut(f"with its oneDNN held to {level.name} it fails: {str(error).strip()}") from None

    def prefill(self, prompt: Prompt) -> int:
        return self.generate(prompt, 1)[0]

    def _generate_all(self, prompts: Sequence[Prompt], n_tokens: int) -> list[list[int]]:
        settings = self.settings(max_new_tokens=n_tokens, ignore_eos=True, do_sample=False)
        tensors = [self.tensor(np.array([prompt], dtype=np.int64)) for prompt in prompts]
        return [each.m_generation_ids[0] for each in self.pipeline.generate(tensors, [settings] * len(prompts))]

    @staticmethod
    def instructions() -> str:
        """What it chooses from."""
        if not level:
            return "all that it finds"
        return f"not held to {level.name}: its oneDNN is, its other products (MLAS) take what they find"


class OnnxRuntime(BatchGenerator):
    """onnxruntime-genai, with a model of its own builder; a batch's prompts are equally long."""

    def __init__(self, files: ModelFiles, weights: str, setting: Setting) -> None:
        import onnxruntime_genai

        if files.architecture == "gpt2":
            raise LeftOut("its builder of models knows no GPT-2")
        folder = files.onnx(weights)
        self.weight_bytes = size_of(folder / "model.onnx.data")
        if weights == "int8":  # the embedding, of which a token reads a row, stays FP32; otherwise it is the head's
            self.weight_bytes -= 4 * files.model.token_embedding.weight.numel()
        settings = onnxruntime_genai.Config(str(folder))
        session = {"session_options": {"intra_op_num_threads": setting.n_threads}}
        settings.overlay(json.dumps({"model": {"decoder": session}}))
        self.api, self.model = onnxruntime_genai, onnxruntime_genai.Model(settings)

    def _read(self, prompts: Sequence[Prompt], n_tokens: int) -> Any:
        length = len(prompts[0]) + n_tokens
        params = self.api.GeneratorParams(self.model)
        params.set_search_options(batch_size=len(prompts), min_length=length, max_length=length, do_sample=False)
        generator = self.api.Generator(self.model, params)
        generator.append_tokens(np.array(prompts, dtype=np.int32))
        return generator

    def prefill(self, prompt: Prompt) -> np.ndarray:
        return self._read([prompt], 1).get_logits()[0, -1]

    def _generate_all(self, prompts: Sequence[Prompt], n_tokens: int) -> list[list[int]]:
        generator = self._read(prompts, n_tokens)
        for _ in range(n_tokens):
            generator.generate_next_token()
        return [generator.get_sequence(index)[len(prompts[0]) :].tolist() for index in range(len(prompts))]

    @staticmethod
    def instructions() -> str:
        """What it chooses from."""
        return f"not held to {level.name}: it has no switch" if level else "all that it finds"


@dataclass(frozen=True)
class Program:
    """A peer.

    Attributes:
        module: by which it is imported.
        packages: that bring it, the first of which has its version.
        bits: of each kind of weights that it is measured with; 8 and 4 are those of the large matrices.
        open: (files, kind of weights, setting) → a generator.
        instructions: says what it uses of the processor.
    """

    name: str
    module: str
    packages: str
    bits: dict[str, int]
    open: Callable[[ModelFiles, str, Setting], Generator]
    instructions: Callable[[], str]


PROGRAMS = (
    Program(
        "transformers",
        "transformers",
        "transformers",
        {"FP32": 32},
        lambda files, weights, setting: Transformers(files.model),
        lambda: f"held to {level.name}" if level else "all that it finds",
    ),
    Program(
        "llama.cpp",
        "llama_cpp",
        "llama-cpp-python",
        {"F32": 32, "Q8_0": 8, "Q4_0": 4, "Q4_K_M": 4},
        LlamaCpp,
        LlamaCpp.instructions,
    ),
    Program(
        "CTranslate2",
        "ctranslate2",
        "ctranslate2 transformers",
        {"float32": 32, "int8_float32": 8},  # which is also what its "int8" is on a CPU
        CTranslate2,
        CTranslate2.instructions,
    ),
    Program(
        "OpenVINO",
        "openvino_genai",
        "openvino-genai",
        {"F16": 16, "Q8_0": 8, "Q4_0": 4, "Q4_K_M": 4},
        OpenVINO,
        OpenVINO.instructions,
    ),
    Program(
        "onnxruntime-genai",
        "onnxruntime_genai",
        "onnxruntime-genai onnx-ir transformers",
        {"fp32": 32, "int8": 8, "int4": 4},
        OnnxRuntime,
        OnnxRuntime.instructions,
    ),
)
