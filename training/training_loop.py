"""The one loop that every supervised trainer uses: batches, steps, evaluations, checkpoints, exact resume.

A trainer brings a model, a training and a validation data set, and its settings. A data set has `__getitem__`,
`collate(samples) -> batch` and `count(batch)`, the number of items whose mean the model's loss is; the model turns a
batch into `{"loss": mean}`. The loop weights micro-batches so that the loss and its gradient are means over the items
of the whole global batch, whatever the accumulation and the number of ranks.
"""

from __future__ import annotations

import contextlib
import math
import time
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import asdict
from functools import partial
from pathlib import Path

import torch
import torch.nn as nn

from byte_level_bpe import ByteLevelBPETokenizer
from checkpoint import load_checkpoint, require_disk_space, weight_fingerprint
from command_line import Interrupted, UserError
from data_loader import Batch, BatchOrder, length_multiple, lengthened
from gpt_model import GPTConfig
from lora import lora_settings
from machine import peak_flops, peak_memory_bytes, resolve_precision
from progress import Progress, Transcript, listening, tracked
from text.account import Account
from training import ranks
from training.expert_use import ExpertUse
from training.fused_parts import fused_parts
from training.interruptions import StopSignal, advice_if_out_of_memory
from training.micro_batches import MicroBatches
from training.optimization import Updater, build_optimizers, learning_rate_factor
from training.parallel_model import ParallelModel
from training.run_folder import alone_in, set_earlier_run_aside
from training.run_log import RunLog, training_flops_per_token
from training.saved_run import SavedRun, TrainingData
from training.training_config import TrainingConfig
from transformer_components import Positions, auxiliary_losses, takes_text_bounds, text_bounds

COMPILED_FROM = 300  # seconds that a run takes at least: to compile a model takes about one minute
USUAL_MFU = 0.3  # the share of a GPU's peak that such estimates reckon with


class TrainingLoop(MicroBatches, SavedRun):
    """Trains a model and leaves `<stage>_best.pth`, `checkpoints/step_*.pth`, `metrics.jsonl`, `run.log`, `curves.png`.

    Args:
        config: the shared settings.
        model: on any device; takes `**batch` and returns `{"loss": mean over count(batch) items}`.
        gpt_config, tokenizer: recorded in every checkpoint.
        stage: "pretrain", "sft", …; names the best checkpoint.
        train_data, val_data: see `TrainingData`; without validation data the last state counts as the best.
        device: from `prepare_machine`.
        lengths: tokens of each training sample, to batch similar lengths together.
        score: extra figures at evaluations, computed from (model, {"val_loss": …}).
    """

    shown = ("loss", "lr")  # what stands beside the progress
    epoch_figures = ("loss", "val_loss")  # of training and of validation, for the line of an epoch

    def __init__(
        self,
        config: TrainingConfig,
        model: nn.Module,
        gpt_config: GPTConfig,
        tokenizer: ByteLevelBPETokenizer,
        stage: str,
        train_data: TrainingData,
        val_data: TrainingData | None,
        device: torch.device,
        lengths: list[int] | None = None,
        score: Callable[[nn.Module, dict[str, float]], dict[str, float]] | None = None,
    ) -> None:
        self.config, self.gpt_config, self.tokenizer, self.stage = config, gpt_config, tokenizer, stage
        self.train_data, self.val_data, self.device = train_data, val_data, device
        self.score = score
        # What became of the records, by the data's name; data that is no records has no account
        data_sets = {"data": train_data, "val_data": val_data}
        accounts = {name: data.account for name, data in data_sets.items() if hasattr(data, "account")}
        if accounts.get("val_data") is accounts.get("data"):
            accounts.pop("val_data", None)
        self.accounts: dict[str, Account] = accounts
        self.folder = Path(config.output_dir)
        self.best_path = self.folder / f"{stage}_best.pth"
        self.checkpoint_folder = self.folder / "checkpoints"

        model = model.to(device)
        self.precision = resolve_precision(config.precision, device)
        for module in model.modules():
            if hasattr(module, "recompute_activations"):
                module.recompute_activations = config.recompute_activations
            if hasattr(module, "keeps_logits"):  # fp16 needs them: its scaler has no part in a loss in chunks
                module.keeps_logits = self.precision == torch.float16
        self.n_parameters = sum(parameter.numel() for parameter in model.parameters())
        self.n_trained = sum(parameter.numel() for parameter in model.parameters() if parameter.requires_grad)
        positions = [module for module in model.modules() if isinstance(module, Positions)]
        self.expert_use = ExpertUse(model)
        self.n_positions = sum(parameter.numel() for module in positions for parameter in module.parameters())
        self.lora = lora_settings(model)
        if self.lora:
            self.lora["base_fingerprint"] = weight_fingerprint(load_checkpoint(self.lora["base"]))
        self.parallel_model = ParallelModel(model, config.parallel, device, self.precision)
        self.model = model = self.parallel_model.module  # what this rank optimises
        self.ranks, self.data_rank = self.parallel_model.layout.data_ranks, self.parallel_model.data_rank
        if self.data_rank:
            torch.manual_seed(config.seed + self.data_rank)  # dropout and sampled answers of its own
        if self.precision == torch.float16 and self.parallel_model.is_sharded:
            raise UserError(f"--precision fp16 works with --parallel ddp only, not {config.parallel}; use bf16 or fp32")
        self.optimizers = self.make_optimizers()
        self.updater = Updater(
            model,
            self.optimizers,
            self.precision,
            device,
            config.max_grad_norm,
            config.max_skipped_steps,
            self.parallel_model.clip_gradients,
        )
        self.length_multiple = length_multiple(device)
        self.settle_sizes()
        self.reads_ahead = device.type == "cuda"
        self._reader = ThreadPoolExecutor(1, "batches")  # its thread starts with the first task
        self._ahead: tuple[int, Future[list[Batch]]] | None = None  # a step, and its micro-batches
        self.order = BatchOrder(len(train_data), self.global_batch(), config.seed, lengths)
        self.max_steps = config.max_steps or max(1, math.ceil(config.epochs * self.order.steps_per_epoch))
        self.warmup_steps = config.warmup_steps if config.warmup_steps >= 0 else max(10, self.max_steps // 50)
        self.warmup_steps = min(self.warmup_steps, self.max_steps // 2)
        self.eval_interval = config.eval_interval or max(1, math.ceil(self.max_steps / 10))
        self.save_interval = config.save_interval or self.eval_interval

        self.step = 0
        self.best: dict[str, float] = {}
        self.latest: dict[str, float] = {}  # what the last evaluation found
        self.epoch = {"sum": 0.0, "steps": 0, "began": 0.0}  # since the last line of an epoch
        self.evaluations_without_improvement = 0
        self.seconds = 0.0

    def make_optimizers(self) -> list[torch.optim.Optimizer]:
        """The optimisers of all trainable parameters."""
        return self.optimizers_of(self.model)

    def optimizers_of(self, model: nn.Module) -> list[torch.optim.Optimizer]:
        """The optimisers of the trainable parameters of a part of the model."""
        config, copies = self.config, self.parallel_model.copies
        return build_optimizers(model, config.optimizer, config.lr, config.weight_decay, ranks=copies)

    def global_batch(self) -> int:
        """Samples of one step over all accumulation steps and data-parallel ranks."""
        return self.n_of_step * self.ranks

    # ------------------------------------------------------------------------------------------------------ the loop

    def train(self) -> dict[str, float]:
        """Run until `max_steps`, early stopping or a signal; returns the metrics of the best state.

        Raises:
            Interrupted: a signal came; the state is saved.
            UserError: no sound checkpoint to resume from, disk full, out of memory, training diverged, or another
                process is training into the same folder.
        """
        nothing = contextlib.nullcontext()
        with (
            listening() as transcript,
            alone_in(self.folder) if ranks.is_main() else nothing,
            fused_parts() if self.device.type == "cpu" else nothing,
        ):
            return self._train(transcript)

    def _train(self, transcript: Transcript) -> dict[str, float]:
        config = self.config
        self._inputs  # noqa: B018 — as they are now: they may change while the run goes on
        if ranks.is_main():  # float weights of a step and the best, and the optimiser's two moments
            require_disk_space(self.folder, 4 * self.n_trained * (1 + 3 * (config.keep_checkpoints + 1)))
            self._remove_leftovers()
            if self.lora:
                share = f"{self.n_trained / self.n_parameters:.2%} of the parameters"
                held = " held in INT8" if self.lora["frozen_weights"] == "int8" else ""
                base = f"{self.lora['base']}{held}"
                print(f"LoRA beside {base}: training {self.n_trained:,} weights, {share}", flush=True)
        source = self.resume(config.resume) if config.resume else None
        if ranks.is_main() and (source is None or source.parent.resolve() != self.checkpoint_folder.resolve()):
            set_earlier_run_aside(self.folder, self.stage)
        ranks.barrier()
        if self.step == 0:
            with Progress("before the first step", unit="", shown=ranks.is_main()):
                self.before_first_step()
        if self.measures_at_start:
            self.parallel_model.train()
            self.fit_memory(self.largest_batch)
        if config.compile == "true" or (config.compile == "auto" and self._is_worth_compiling()):
            self.compile()
        log = RunLog(
            self.folder,
            self.stage,
            self.max_steps,
            self.step,
            config.tensorboard,
            config.tracker,
            asdict(config),
            enabled=ranks.is_main(),
            transcript=transcript,
        )
        if self.step and not ranks.gather_objects(self.best_path.is_file())[0]:  # deleted, or of another folder's run
            self.best = {}
            if self.step >= self.max_steps:
                self._evaluate_and_keep_best(log)
        peak = peak_flops(self.device, self.precision) * ranks.world_size()
        flops = self._flops_per_token()
        tokens = skipped_seconds = 0.0
        interval_start = start = time.perf_counter()
        elapsed_before = self.seconds
        try:
            with StopSignal() as stop, advice_if_out_of_memory(self._memory_advice):
                while self.step < self.max_steps and not self._patience_is_over():
                    record = self.train_step()
                    tokens += record.pop("tokens")
                    log.advance(**{key: record[key] for key in self.shown})
                    if not math.isfinite(record["grad_norm"] + record["loss"]):
                        log.say(f"step {self.step}: loss or gradient not finite, step skipped ({self.updater.skipped})")
                    last = self.step == self.max_steps
                    epoch = self._count_in_epoch(record, last)
                    if self.step % config.log_interval == 0 or last or self.step == 1 or epoch:
                        rate = tokens / (time.perf_counter() - interval_start - skipped_seconds)
                        record |= {"tokens_per_second": rate, "mfu": rate * flops / peak}
                        record["skipped_steps"] = self.updater.skipped
                        record |= self.expert_use.figures()
                        record["memory_mib"] = peak_memory_bytes(self.device) / 2**20
                        record |= epoch
                        if self.step == 1:
                            for name, account in self.accounts.items():
                                record |= account.figures(f"{name}/")
                        log.log(self.step, record)
                        interval_start, tokens, skipped_seconds = time.perf_counter(), 0.0, 0.0
                    self.seconds = elapsed_before + time.perf_counter() - start
                    pause = time.perf_counter()  # evaluating and saving do not count in tokens_per_second
                    if self.step % self.eval_interval == 0 or last:
                        self._evaluate_and_keep_best(log)
                    if epoch:
                        self._tell_epoch(log, epoch)
                    stop_early = self._patience_is_over()
                    received = self._stop_requested(stop)
                    if self.step % self.save_interval == 0 or last or received or stop_early:
                        self.save()
                    skipped_seconds += time.perf_counter() - pause
                    if received and not last:
                        raise Interrupted(
                            f"{received}: saved at step {self.step} of {self.max_steps}; continue with --resume auto"
                        )
                    if stop_early:
                        log.say(f"no improvement in {config.patience} evaluations, stopped at step {self.step}")
        finally:
            log.close()
            self._reader.shutdown(wait=False, cancel_futures=True)
        if ranks.is_main():
            self.expert_use.plot(self.folder / "experts.png")
        return self.best

    def before_first_step(self) -> None:
        """What a run does once, at its very beginning; a resumed run does not do it again."""

    def train_step(self) -> dict[str, float]:
        """One optimiser step; returns the global `loss`, `lr`, `grad_norm` and the number of `tokens` read."""
        self.parallel_model.train()
        self.order.batch(self.step)  # a batch whose numbers alone are too many does not become smaller in parts
        lr, (batches, sums) = self.learning_rate(), self.within_memory(self._gradients)
        figures = self.means({**sums, "grad_norm": self.updater.clip_gradients()})
        self.updater.apply(lr, figures["grad_norm"], figures["loss"])
        self.step += 1
        tokens = sum(int(batch["input_ids"].ne(self.tokenizer.pad_token_id).sum()) for batch in batches)
        return {**figures, "lr": lr, "tokens": tokens * self.ranks}

    def _gradients(self) -> tuple[list[Batch], dict[str, torch.Tensor]]:
        batches = self._take_batches()
        return batches, self.accumulate(batches, [self.train_data.count(batch) for batch in batches])

    def batches_of(self, step: int) -> list[Batch]:
        """This rank's micro-batches of a step, on the CPU."""
        size, indices = self.micro_batch_size, self.order.batch(step)
        sample = self.train_data.__getitem__
        if hasattr(self.train_data, "window"):  # of a text, which every pass cuts elsewhere
            sample = partial(self.train_data.window, epoch=step // self.order.steps_per_epoch)
        # Micro-batch k of all ranks is one stretch of the global batch, and this rank's share one piece of that
        starts = [(k * self.ranks + self.data_rank) * size for k in range(self.n_of_step // size)]
        parts = [indices[start : start + size] for start in starts]
        return [self.train_data.collate([sample(index) for index in part]) for part in parts]

    def _take_batches(self) -> list[Batch]:
        """The micro-batches of the step to come. Beside a GPU a thread prepares those of the next one meanwhile."""
        if not self.reads_ahead:
            return self.batches_of(self.step)

        def prepare(step: int) -> list[Batch]:
            return [self._pinned(self.prepared(batch)) for batch in self.batches_of(step)]

        step, batches = self._ahead or (self.step, self._reader.submit(prepare, self.step))
        if step != self.step:  # another one than was foreseen
            batches = self._reader.submit(prepare, self.step)
        self._ahead = self.step + 1, self._reader.submit(prepare, self.step + 1)
        return batches.result()

    def accumulate(self, batches: list[Batch], counts: list[int]) -> dict[str, torch.Tensor]:
        """Forward and backward passes of the micro-batches of one step on this rank.

        Each is weighted by its share of the items of the global batch, so that the gradients add up to those of the
        mean over all items on all ranks.

        Returns:
            this rank's part of the global means of the loss and of every other scalar that the model returns, on the
            device, for `means` to read. Layers may have losses of their own (`transformer_components.AuxiliaryLoss`):
            their sum, "aux_loss", is a part of the loss.
        """
        total = self.parallel_model.sum(float(sum(counts)))
        # Data parallelism averages gradients over ranks; a sum is wanted
        weights = [count / total * self.ranks for count in counts]
        if self.parallel_model.pipeline is not None:
            with self.updater.autocast():
                loss = self.parallel_model.pipeline.step([self._to_device(batch) for batch in batches], weights)
            return {"loss": loss / self.ranks}
        sums: dict[str, torch.Tensor] = {}
        for number, (batch, count, weight) in enumerate(zip(batches, counts, weights, strict=True), start=1):
            with self.parallel_model.synchronised(last=number == len(batches)):
                output = self._forward_and_backward(batch, weight)
            for name, value in scalars(output).items():
                sums[name] = sums.get(name, 0.0) + value * (count / total)
        return sums

    def _forward_and_backward(self, batch: Batch, weight: float) -> dict[str, torch.Tensor]:
        """Add a micro-batch's gradients, weighted; returns the model's output."""
        with self.updater.autocast(), auxiliary_losses() as of_layers:
            output = self.parallel_model(**self._to_device(batch))
        if of_layers:
            output["aux_loss"] = torch.stack(of_layers).sum()
            output["loss"] = output["loss"] + output["aux_loss"]
        self.updater.backward(output["loss"] * weight)
        return output

    def means(self, parts: dict[str, torch.Tensor]) -> dict[str, float]:
        """The figures of a step, of which `accumulate` gave this rank's parts."""
        return self.read(parts)

    def read(self, parts: dict[str, torch.Tensor]) -> dict[str, float]:
        """Read what `accumulate` gave, summed over the ranks, and "grad_norm", which is the same on all of them.

        It is the one moment of a step at which the CPU waits for a GPU: all numbers come in one copy.
        """
        numbers = dict(zip(parts, torch.stack(list(parts.values())).tolist(), strict=True))
        norm = {name: numbers.pop(name) for name in ("grad_norm",) if name in numbers}
        return dict(zip(numbers, self.parallel_model.sums(*numbers.values()), strict=True)) | norm

    def learning_rate(self) -> float:
        """The learning rate of the step to come."""
        return self.config.lr * learning_rate_factor(
            self.config.schedule,
            self.step,
            self.max_steps,
            self.warmup_steps,
            self.config.min_lr_ratio,
            self.config.n_cycles,
            self.config.T_0,
            self.config.T_mult,
        )

    @torch.no_grad()
    def evaluate(self) -> dict[str, float]:
        """The means of the loss and of every other scalar that the model returns, over each validation item once; and
        the perplexity of a model of tokens."""
        if self.val_data is None:
            return {}
        size, n_samples = self.evaluation_batch_size, len(self.val_data)
        starts = list(range(self.data_rank * size, n_samples, self.ranks * size))
        rounds = -(-n_samples // (self.ranks * size))  # as many on every rank, which exchange weights in each
        sums: dict[str, torch.Tensor] = {}
        n_items = 0.0
        self.parallel_model.eval()
        for start in tracked((starts + [None])[:rounds], "evaluating", "batch", shown=ranks.is_main()):
            first = 0 if start is None else start
            batch = self.val_data.collate([self.val_data[i] for i in range(first, min(first + size, n_samples))])
            count = 0 if start is None else self.val_data.count(batch)
            with self.updater.autocast():
                output = self.parallel_model(**self._to_device(batch))
            for name, value in scalars(output).items():
                # Many thousand batches are added up; Apple's GPUs have nothing wider than fp32
                wide = value if self.device.type == "mps" else value.double()
                sums[name] = sums.get(name, 0.0) + wide * count
            n_items += count  # nothing from a rank that computes some batch only to keep up with the others
        total = self.parallel_model.sum(n_items)
        figures = {name: value / total for name, value in self.read(sums).items()}
        if "token_accuracy" in figures:  # then a loss is in nats a token
            perplexity = math.exp(min(700.0, figures.get("cross_entropy", figures["loss"])))
            figures = {"loss": figures["loss"], "perplexity": perplexity, **figures}
        return {f"val_{name}": value for name, value in figures.items()}

    def _evaluate_and_keep_best(self, log: RunLog) -> None:
        """Evaluate, and keep the best model."""
        with self.parallel_model.as_written():
            metrics = self.within_memory(self.evaluate, "evaluation_batch_size")
            self.latest = {**metrics, "step": self.step}
            if self.score is not None:
                metrics |= self.score(self.model, metrics)
        improved = not metrics or not self.best or self.is_better(metrics, self.best)
        if improved:
            self.best = {**metrics, "step": self.step}
            self.evaluations_without_improvement = 0
            self.save_model(self.best_path)
        else:
            self.evaluations_without_improvement += 1
        if metrics:
            log.log(self.step, {**metrics, "seconds": round(self.seconds, 3)})
            figures = ", ".join(f"{key} {value:.4f}" for key, value in metrics.items())
            log.say(f"step {self.step}: {figures}{' (best so far)' if improved else ''}")

    def _count_in_epoch(self, record: dict[str, float], last: bool) -> dict[str, float]:
        """Take a step into the means of its epoch. Where one ends, its number and its mean, for the metrics; else {}.

        Epochs that are shorter than `--log_interval` are told of together.
        """
        name, epoch = self.epoch_figures[0], self.epoch
        if math.isfinite(record[name]):
            epoch["sum"] += record[name]
            epoch["steps"] += 1
        number, beyond = divmod(self.step, self.order.steps_per_epoch)
        if beyond or not epoch["steps"] or not (epoch["steps"] >= self.config.log_interval or last):
            return {}
        return {"epoch": number, f"epoch_{name.rpartition('/')[2]}": epoch["sum"] / epoch["steps"]}

    def _tell_epoch(self, log: RunLog, ended: dict[str, float]) -> None:
        """Say what an epoch brought, and begin the next one."""
        trained, validated = self.epoch_figures
        figures = [f"training {name.removeprefix('epoch_')} {mean:.4f}" for name, mean in list(ended.items())[1:]]
        if validated in self.latest:
            when = "" if self.latest["step"] == self.step else f" (at step {self.latest['step']})"
            figures.append(f"validation {validated.removeprefix('val_')} {self.latest[validated]:.4f}{when}")
        n_epochs = self.max_steps / self.order.steps_per_epoch
        minutes = (self.seconds - self.epoch["began"]) / 60
        log.say(f"epoch {ended['epoch']} of {n_epochs:.4g}: {', '.join(figures)}, {minutes:.1f} minutes")
        self.epoch = {"sum": 0.0, "steps": 0, "began": self.seconds}

    def _patience_is_over(self) -> bool:
        return 0 < self.config.patience <= self.evaluations_without_improvement

    def is_better(self, metrics: dict[str, float], best: dict[str, float]) -> bool:
        """Whether an evaluation beats the best one so far."""
        return metrics["val_loss"] < best["val_loss"] or math.isnan(best["val_loss"])

    # -------------------------------------------------------------------------------------------------------- helpers

    def compile(self) -> None:
        """torch.compile the model in place; where no compiler works, say so once and go on without."""
        try:
            torch.compile(lambda x: x * 2 + 1)(torch.ones(2, device=self.device))
        except Exception as error:  # whatever a broken toolchain raises
            reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
            print(f"warning: torch.compile does not work here ({reason}); going on without", flush=True)
            return
        self.parallel_model.compile(dynamic=self.order.lengths is not None)

    def _is_worth_compiling(self) -> bool:
        """Whether what is left to train takes so long on a GPU that making the code for it is won back."""
        if self.device.type != "cuda":
            return False
        tokens = (self.max_steps - self.step) * self.config.batch_size * self.config.grad_accum_steps
        flops = tokens * self.config.max_seq_len * self._flops_per_token()
        seconds = flops / self.parallel_model.layout.model_ranks / (USUAL_MFU * peak_flops(self.device, self.precision))
        if seconds < COMPILED_FROM and ranks.is_main():
            print(f"not compiled: the run takes some {seconds:.0f} s; --compile true does it all the same", flush=True)
        return seconds >= COMPILED_FROM

    def _flops_per_token(self) -> float:
        config = self.gpt_config
        head = 0 if config.tie_embeddings else config.vocab_size * config.d_model
        frozen = self.n_parameters - self.n_trained  # without a gradient of their own: 4 FLOP each and not 6
        return training_flops_per_token(
            # Positions and one of two tables are looked up; of experts, a token passes a few
            self.n_parameters - self.expert_use.n_idle - self.n_positions - head - frozen / 3,
            config.n_layers,
            config.n_heads * config.head_dim,
            self.config.max_seq_len,
        )

    def _stop_requested(self, stop: StopSignal) -> str | None:
        """The signal that any rank has received: all have to leave after the same step."""
        if not ranks.sum_over_ranks(float(stop.received is not None))[0]:
            return None
        return next(received for received in ranks.gather_objects(stop.received) if received)

    def prepared(self, batch: Batch) -> Batch:
        """A batch as it goes to the device, with the bounds of several texts in a row if attention takes them."""
        batch = lengthened(batch, self.length_multiple, self.tokenizer.pad_token_id, self.config.max_seq_len)
        config = self.gpt_config
        if "segments" in batch and takes_text_bounds(self.device, self.precision, config.head_dim, config.dropout):
            batch["bounds"] = text_bounds(batch["segments"])
        return batch

    def _to_device(self, batch: Batch) -> Batch:
        batch = self._pinned(self.prepared(batch))
        return {key: value.to(self.device, non_blocking=True) for key, value in batch.items()}

    def _pinned(self, batch: Batch) -> Batch:
        """A batch in memory from which it is copied to a GPU while that still computes."""
        return {key: value.pin_memory() for key, value in batch.items()} if self.device.type == "cuda" else batch


def scalars(output: dict[str, torch.Tensor | None]) -> dict[str, torch.Tensor]:
    """What of a model's output is a single number, such as the loss, without its graph."""
    return {name: value.detach() for name, value in output.items() if torch.is_tensor(value) and value.ndim == 0}
