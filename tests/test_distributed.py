"""Several ranks train as one does: the same losses, the same gradients, the same files.

There are two starts, of 2 and of 4 CPU processes over gloo; each process runs `work_as_a_rank`, all cases one after
another, and rank 0 writes down what it saw. What one rank does is run here, in the test's own process.
"""

import json
import math
import os
import signal
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch
import torch.nn as nn

HERE = Path(__file__).resolve().parent
sys.path[:0] = [str(HERE.parent), str(HERE)]

from conftest import CORPUS, randomize  # noqa: E402
from on_ranks import run_on_ranks  # noqa: E402

from alignment.ppo import PPOConfig, rlhf_ppo  # noqa: E402
from alignment.sft import SFTConfig, sft_finetune  # noqa: E402
from byte_level_bpe import ByteLevelBPETokenizer  # noqa: E402
from checkpoint import load_checkpoint, load_model, save_checkpoint  # noqa: E402
from command_line import Interrupted, UserError, complaints_about  # noqa: E402
from gpt_model import IGNORED_LABEL, GPTConfig, GPTModel  # noqa: E402
from training import optimization, ranks  # noqa: E402
from training.parallel_model import Layout, ParallelModel, parse_layout  # noqa: E402
from training.run_log import read_metrics  # noqa: E402
from training.training_config import TrainingConfig, prepare_machine  # noqa: E402
from training.training_loop import TrainingLoop  # noqa: E402
from transformer_components import AuxiliaryLoss, FeedForwardNetwork  # noqa: E402

TOLERANCE = 1e-5
GLOBAL_BATCH = 8
STEPS = 6
# Tied embeddings, QK-norm, grouped keys and Muon in one; learned positions, biases, LayerNorm and AdamW in the other
MODELS = {
    "modern": dict(n_kv_heads=2, optimizer="muon"),
    "gpt2": dict(optimizer="adamw"),
}
BOTH = tuple(MODELS)
# mode, rows of a micro-batch, micro-batches (always 8 samples a step), models
ON_TWO = {
    "ddp": ("ddp", 2, 2, BOTH),
    "fsdp": ("fsdp", 2, 2, BOTH),
    "tp": ("tp", 4, 2, BOTH),
    "pp": ("pp", 2, 4, BOTH),  # 1F1B
    "pp, one micro-batch": ("pp", 8, 1, ("modern",)),  # GPipe, as there are fewer micro-batches than stages
    "fsdp, activations recomputed": ("fsdp", 2, 2, ("modern",)),
}
ON_FOUR = {
    "fsdp+tp": ("fsdp:2+tp:2", 2, 2, BOTH),
    "ddp+tp": ("ddp+tp:2", 2, 2, ("modern",)),
    "ddp+fsdp": ("ddp:2+fsdp:2", 1, 2, ("gpt2",)),
    "pp+ddp": ("pp:2+ddp", 1, 4, ("gpt2",)),
    "pp+fsdp": ("pp:2+fsdp", 2, 2, ("modern",)),
    "pp+tp": ("pp:2+tp", 2, 4, ("modern",)),
}


def cases(modes):
    """(name, architecture) of every run."""
    return [(name, architecture) for name, case in modes.items() for architecture in case[3]]


class RaggedData:
    """Random sequences of 6 to 20 tokens, some of which carry no label: no two micro-batches count the same."""

    def __init__(self, n_samples, vocab_size, seed):
        generator = torch.Generator().manual_seed(seed)
        self.samples = []
        for _ in range(n_samples):
            length = int(torch.randint(6, 21, (), generator=generator))
            ids = torch.randint(4, vocab_size, (length,), generator=generator)
            labels = ids.clone()
            labels[: int(torch.randint(1, 5, (), generator=generator))] = IGNORED_LABEL
            self.samples.append((ids, labels))

    def __len__(self):
        return len(self.samples)

    def __getitem__(self, index):
        return self.samples[index]

    def collate(self, samples):
        ids, labels = zip(*samples, strict=True)
        pad = nn.utils.rnn.pad_sequence
        return {
            "input_ids": pad(ids, batch_first=True, padding_value=1),
            "labels": pad(labels, batch_first=True, padding_value=IGNORED_LABEL),
        }

    def count(self, batch):
        return int(batch["labels"][:, 1:].ne(IGNORED_LABEL).sum())


def make_tokenizer():
    tokenizer = ByteLevelBPETokenizer(vocab_size=320)
    tokenizer.train(CORPUS)
    return tokenizer


def make_model(architecture):
    """The same small random model wherever it is made; large weights, so that nothing hides."""
    sizes = {name: value for name, value in MODELS[architecture].items() if name != "optimizer"}
    config = GPTConfig.for_architecture(
        architecture, vocab_size=320, d_model=32, n_layers=3, n_heads=4, max_seq_len=24, **sizes
    )
    model = GPTModel.from_config(config)
    randomize(model, seed=1)
    return model


def make_loop(architecture, folder, mode="ddp", rows=GLOBAL_BATCH, micro_batches=1, score=None, **settings):
    config = TrainingConfig(
        output_dir=str(folder),
        parallel=mode,
        batch_size=rows,
        grad_accum_steps=micro_batches,
        max_steps=STEPS,
        warmup_steps=2,
        lr=2e-3,
        optimizer=MODELS[architecture]["optimizer"],
        log_interval=1,
        eval_interval=3,
        device="cpu",
        num_threads=1,
        precision="fp32",
    )
    config = replace(config, **settings)
    model, vocab_size = make_model(architecture), 320
    return TrainingLoop(
        config,
        model,
        model.config,
        make_tokenizer(),
        "pretrain",
        RaggedData(41, vocab_size, seed=2),
        RaggedData(11, vocab_size, seed=3),
        prepare_machine(config),
        score=score,
    )


def train(loop):
    """All steps that are left, without the paperwork of `TrainingLoop.train`; returns {name: values by step}."""
    course = {"loss": [], "grad_norm": [], "val_loss": []}
    while loop.step < STEPS:
        record = loop.train_step()
        course["loss"].append(record["loss"])
        course["grad_norm"].append(record["grad_norm"])
        if loop.step % 3 == 0:
            course["val_loss"].append(loop.evaluate()["val_loss"])
            loop.save()
    loop.save_model(loop.best_path)
    return course


def continued(loop, checkpoint):
    """The course of a run that takes up a checkpoint."""
    loop.resume(str(checkpoint))
    return train(loop)


def second_half(course):
    """What a run that continues at step 3 should see."""
    return {name: values[len(values) // 2 :] for name, values in course.items()}


def logged(folder):
    """The losses and gradient norms that a trainer wrote down."""
    records = [record for record in read_metrics(folder / "metrics.jsonl") if "loss" in record]
    return {name: [record[name] for record in records] for name in ("loss", "grad_norm")}


def deviation(run, reference):
    """The largest difference between two courses; their lengths have to agree."""
    pairs = [(a, b) for name in reference for a, b in zip(run[name], reference[name], strict=True)]
    return max(abs(a - b) for a, b in pairs)


# ------------------------------------------------------------------------------------------------ what each rank runs


def work_as_a_rank(folder):
    """All cases for this number of ranks; rank 0 leaves their results in `folder/results_<ranks>.json`."""
    folder = Path(folder)
    torch.manual_seed(0)
    ranks.start(torch.device("cpu"))
    n_ranks = ranks.world_size()
    results = {}
    for name, (mode, rows, micro_batches, architectures) in (ON_TWO if n_ranks == 2 else ON_FOUR).items():
        for architecture in architectures:
            out = folder / name / architecture
            settings = dict(recompute_activations="recomputed" in name)
            loop = make_loop(architecture, out, mode, rows, micro_batches, **settings)
            local = sum(getattr(weight, "_local_tensor", weight).numel() for weight in loop.model.parameters())
            case = {"shares": [share / loop.n_parameters for share in ranks.gather_objects(local)]}
            case["whole"] = train(loop)
            # The same run from the middle, where one rank had left it
            loop = make_loop(architecture, folder / "resumed", mode, rows, micro_batches, **settings)
            case["resumed"] = continued(loop, folder / "one" / architecture / "checkpoints" / "step_00000003.pth")
            results[f"{name} {architecture}"] = case
    if n_ranks == 2:
        results |= signal_to_one_rank(folder) | fine_tuning(folder) | refusals(folder) | shared_work(folder)
    if ranks.is_main():
        (folder / f"results_{n_ranks}.json").write_text(json.dumps(results))
    ranks.stop()


def shared_work(folder):
    """How many matrices each rank orthogonalises in a step; and a step in bf16, with the types that it computes in."""
    usual, counts, results = optimization.newton_schulz, [], {}

    def counted(matrices):
        counts.append(len(matrices))
        return usual(matrices)

    optimization.newton_schulz = counted
    for mode in ("ddp", "fsdp"):
        counts.clear()
        make_loop("modern", folder / "shared", mode, 4, 1).train_step()
        results[f"matrices of {mode}"] = ranks.gather_objects(sum(counts))
    optimization.newton_schulz = usual
    loop, types = make_loop("modern", folder / "shared", "fsdp", 4, 1, precision="bf16"), set()
    for module in (loop.model.layers[0].feed_forward.up_proj, loop.model.final_norm):
        module.register_forward_pre_hook(lambda module, inputs: types.add(str((module.weight.dtype, inputs[0].dtype))))
    loop.model.final_norm.register_forward_hook(lambda *_: types.add(f"head {loop.model.lm_head.weight.dtype}"))
    record = loop.train_step()
    results["bf16"] = {"loss": record["loss"], "grad_norm": record["grad_norm"], "types": sorted(types)}
    return results


def signal_to_one_rank(folder):
    """Rank 1 alone gets a SIGTERM while step 3 is evaluated."""

    def interrupt(model, metrics):
        if ranks.rank() == 1:
            os.kill(os.getpid(), signal.SIGTERM)
        return {}

    said = ""
    try:
        make_loop("modern", folder / "signal", "fsdp", 4, 1, score=interrupt).train()
    except Interrupted as interruption:
        said = str(interruption)
    return {"signal": ranks.gather_objects(said)}


def fine_tuning(folder):
    """SFT, then a reward model and PPO, on two ranks."""
    sft_finetune(sft_settings(folder, folder / "sft", batch_size=2))
    sft_finetune(replace(sft_settings(folder, folder / "lora", batch_size=2), lora_rank=2, frozen_weights="int8"))
    best = rlhf_ppo(
        PPOConfig(
            sft_model=str(folder / "one" / "sft" / "sft_best.pth"),
            pairwise_data=str(folder / "pairs.json"),
            sft_data=str(folder / "conversations.json"),
            critic_warmup_steps=1,
            val_fraction=0.3,
            output_dir=str(folder / "rlhf"),
            max_gen_len=6,
            rollout_batch_size=4,
            batch_size=2,
            max_steps=2,
            log_interval=1,
            device="cpu",
            num_threads=1,
            precision="fp32",
        )
    )
    records = read_metrics(folder / "rlhf" / "metrics.jsonl")
    return {"ppo": {"best": ranks.gather_objects(best), "course": records}}


def refusals(folder):
    """What is said where a mode does not suit the model."""
    said = {}
    for mode, architecture, settings in (("tp", "modern", dict(n_kv_heads=1)), ("pp", "gpt2", dict(n_layers=1))):
        config = GPTConfig.for_architecture(
            architecture, **{**dict(vocab_size=320, d_model=32, n_layers=2, n_heads=4), **settings}
        )
        try:
            ParallelModel(GPTModel.from_config(config), mode, torch.device("cpu"))
        except UserError as error:
            said[mode] = str(error)
    try:
        model = make_model("gpt2")
        model.layers[1].feed_forward.__class__ = type("WithLoss", (AuxiliaryLoss, FeedForwardNetwork), {})
        ParallelModel(model, "pp", torch.device("cpu"))
    except UserError as error:
        said["pp with losses of layers"] = str(error)
    try:
        ParallelModel(nn.Linear(2, 2), "fsdp", torch.device("cpu"))
    except UserError as error:
        said["fsdp"] = str(error)
    return {"refusals": said}


def sft_settings(folder, output_dir, batch_size):
    return SFTConfig(
        data_path=str(folder / "conversations.json"),
        pretrained_model=str(folder / "one" / "long.pth"),
        output_dir=str(output_dir),
        val_fraction=0.3,
        batch_size=batch_size,
        max_steps=4,
        log_interval=1,
        device="cpu",
        num_threads=1,
        precision="fp32",
    )


# --------------------------------------------------------------------------------------------------------- the tests


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """What one rank leaves: a run of each model in `one/`, a fine-tuned model, and data for fine-tuning."""
    path = tmp_path_factory.mktemp("ranks")
    torch.set_num_threads(1)
    texts = [("法国的首都是?", "巴黎"), ("Add 12 and 30", "42"), ("Is learning fun?", "It is."), ("你好", "你好吗")]
    conversations = [{"instruction": q * (1 + i % 2), "response": a * (1 + i % 3)} for i in range(3) for q, a in texts]
    pairs = [{"instruction": f"{q}{i}", "chosen": a, "rejected": "no"} for i in range(3) for q, a in texts]
    (path / "conversations.json").write_text(json.dumps(conversations))
    (path / "pairs.json").write_text(json.dumps(pairs))
    one = {architecture: train(make_loop(architecture, path / "one" / architecture)) for architecture in MODELS}
    (path / "one.json").write_text(json.dumps(one))
    config = GPTConfig.for_architecture("modern", vocab_size=320, d_model=32, n_layers=2, n_heads=4, max_seq_len=64)
    model = GPTModel.from_config(config)
    randomize(model, seed=4)
    save_checkpoint(
        path / "one" / "long.pth", model_state=model.state_dict(), config=config, tokenizer=make_tokenizer(),
        stage="pretrain",
    )  # fmt: skip
    sft_finetune(sft_settings(path, path / "one" / "sft", batch_size=4))
    sft_finetune(replace(sft_settings(path, path / "one" / "lora", batch_size=4), lora_rank=2, frozen_weights="int8"))
    return path


def results_of(n_ranks, folder):
    run_on_ranks(n_ranks, "test_distributed", folder)
    return json.loads((folder / f"results_{n_ranks}.json").read_text())


@pytest.fixture(scope="module")
def one(folder):
    """{architecture: course} of one rank."""
    return json.loads((folder / "one.json").read_text())


@pytest.fixture(scope="module")
def on_two(folder):
    return results_of(2, folder)


@pytest.fixture(scope="module")
def on_four(folder):
    return results_of(4, folder)


@pytest.mark.parametrize(("name", "architecture"), cases(ON_TWO))
def test_two_ranks_give_the_losses_of_one(name, architecture, on_two, one):
    """Losses, gradient norms (which clip) and validation losses, with accumulation and uneven counts of tokens."""
    assert max(one[architecture]["grad_norm"]) > 1.0  # so clipping had its part
    assert deviation(on_two[f"{name} {architecture}"]["whole"], one[architecture]) < TOLERANCE


@pytest.mark.parametrize(("name", "architecture"), cases(ON_FOUR))
def test_four_ranks_over_a_mesh_give_the_losses_of_one(name, architecture, on_four, one):
    """The same for combinations of two kinds of parallelism."""
    assert deviation(on_four[f"{name} {architecture}"]["whole"], one[architecture]) < TOLERANCE


@pytest.mark.parametrize("architecture", MODELS)
def test_what_one_rank_saved_several_continue(architecture, on_two, on_four, one):
    """A checkpoint of one rank, taken up in every mode on 2 and on 4 ranks, leads to the same losses."""
    for name, case in (on_two | on_four).items():
        if name.endswith(architecture):
            assert deviation(case["resumed"], second_half(one[architecture])) < TOLERANCE, name


@pytest.mark.parametrize("architecture", MODELS)
def test_what_several_ranks_saved_one_continues(architecture, on_two, on_four, one, folder, tmp_path):
    """A checkpoint of any mode is continued by one rank, to the losses of a run that never was on several."""
    for name in [name for name, other in cases(ON_TWO | ON_FOUR) if other == architecture]:
        saved = folder / name / architecture / "checkpoints" / "step_00000003.pth"
        course = continued(make_loop(architecture, tmp_path), saved)
        assert deviation(course, second_half(one[architecture])) < TOLERANCE, name


@pytest.mark.parametrize("architecture", MODELS)
def test_the_model_that_any_mode_leaves_is_an_ordinary_file(architecture, on_two, on_four, folder):
    """It loads on one process, computes what one rank's model computes, and holds the tied embedding once."""
    path = folder / "one" / architecture / "pretrain_best.pth"
    reference, _, content = load_model(path)
    ids = torch.arange(4, 44).view(2, 20)
    for name in [name for name, other in cases(ON_TWO | ON_FOUR) if other == architecture]:
        theirs = folder / name / architecture / "pretrain_best.pth"
        model, _, their_content = load_model(theirs)
        assert set(their_content["model"]) == set(content["model"])
        torch.testing.assert_close(model(ids)["logits"], reference(ids)["logits"], atol=1e-4, rtol=1e-4, msg=name)
        assert abs(theirs.stat().st_size - path.stat().st_size) < 4000


def test_ranks_hold_their_share_only(on_two, on_four):
    """FSDP halves every parameter; tensor parallelism all layers' matrices; a pipeline's parts divide the layers."""
    assert on_two["ddp modern"]["shares"] == [1.0, 1.0]
    assert all(share == pytest.approx(0.5, abs=0.01) for share in on_two["fsdp modern"]["shares"])
    assert all(share < 0.72 for share in on_two["tp modern"]["shares"])  # the embedding stays whole
    first, last = on_two["pp modern"]["shares"]
    assert first < last < 0.8
    assert all(share < 0.4 for share in on_four["fsdp+tp modern"]["shares"])


def test_ranks_share_muons_work(on_two):
    """Of the 7 matrices of each of 3 layers, in four shapes, every rank orthogonalises half."""
    assert on_two["matrices of ddp"] == on_two["matrices of fsdp"] == [11, 10]


def test_in_bf16_shards_are_gathered_in_bf16(on_two, tmp_path):
    """The layers' only: head and embedding, and what passes between layers, stay in fp32. The step is one rank's."""
    record = make_loop("modern", tmp_path, precision="bf16").train_step()
    assert on_two["bf16"]["types"] == [
        "(torch.bfloat16, torch.float32)", "(torch.float32, torch.float32)", "head torch.float32",
    ]  # fmt: skip
    assert on_two["bf16"]["loss"] == pytest.approx(record["loss"], rel=5e-3)
    assert on_two["bf16"]["grad_norm"] == pytest.approx(record["grad_norm"], rel=2e-2)


def test_a_signal_to_one_rank_stops_all_after_the_same_step(on_two, folder):
    """SIGTERM to rank 1: both save step 3 and leave with the same words."""
    assert on_two["signal"] == ["SIGTERM: saved at step 3 of 6; continue with --resume auto"] * 2
    assert (folder / "signal" / "checkpoints" / "step_00000003.pth").is_file()


@pytest.mark.parametrize("run", ["sft", "lora"])
def test_fine_tuning_on_two_ranks_equals_one(on_two, folder, run):
    """SFT under DDP, of the whole model and of adapters, whose frozen base in INT8 takes no part in the exchange."""
    assert deviation(logged(folder / run), logged(folder / "one" / run)) < TOLERANCE
    ours, theirs = (load_checkpoint(place / run / "sft_best.pth")["model"] for place in (folder, folder / "one"))
    assert all(torch.allclose(ours[name], theirs[name], atol=1e-5) for name in theirs)


def test_reward_model_and_ppo_run_on_two_ranks(on_two, folder):
    """The ranks agree in the result, the first ratios are 1, and the policy is an ordinary model."""
    first, second = on_two["ppo"]["best"]
    assert first == second
    steps = [record for record in on_two["ppo"]["course"] if "loss" in record]
    assert len(steps) == 2
    assert all(math.isfinite(record["loss"]) and math.isfinite(record["objective/kl"]) for record in steps)
    assert abs(steps[0]["objective/kl"]) < 1e-4
    assert all(record["loss/sft_avg"] > 0 for record in steps), "the instruction data is mixed in"
    policy, _, content = load_model(folder / "rlhf" / "ppo_best.pth")
    assert content["stage"] == "ppo"


def test_modes_that_do_not_suit_the_model_are_refused(on_two):
    """Each with what does not fit."""
    assert "n_kv_heads is 1; make it a multiple of 2" in on_two["refusals"]["tp"]
    assert "at least 2 layers, not 1" in on_two["refusals"]["pp"]
    expected = "--parallel pp leaves out the losses that layers have of their own; use ddp or fsdp"
    assert on_two["refusals"]["pp with losses of layers"] == expected
    assert "use --parallel ddp here" in on_two["refusals"]["fsdp"]


@pytest.mark.parametrize(
    ("mode", "n_ranks", "layout"),
    [
        ("ddp", 1, Layout()),
        ("ddp", 8, Layout(ddp=8)),
        ("fsdp+tp:2", 8, Layout(fsdp=4, tp=2)),
        ("pp:2+ddp:2+tp:2", 8, Layout(pp=2, ddp=2, tp=2)),
        ("tp:1+fsdp", 4, Layout(fsdp=4)),
    ],
)
def test_parallel_option_is_read(mode, n_ranks, layout):
    """One kind may leave its size open and takes the ranks that the others leave."""
    assert parse_layout(mode, n_ranks) == layout
    assert layout.data_ranks * layout.model_ranks == n_ranks


@pytest.mark.parametrize(
    ("mode", "n_ranks", "words"),
    [
        ("zero", 2, "'zero' is not right; join pp, ddp, fsdp, tp by +"),
        ("fsdp:two", 2, "'fsdp:two' is not right"),
        ("tp:0", 2, "'tp:0' is not right"),
        ("tp+tp:2", 4, "'tp:2' is not right"),
        ("fsdp+tp", 4, "does not say how the 4 ranks are divided; give all kinds but one a size, such as fsdp+tp:2"),
        ("tp:2", 1, "needs 2 ranks and there is 1"),
        ("tp:2", 4, "needs 2 ranks and there are 4"),
        ("fsdp+tp:2", 3, "needs a multiple of 2 ranks and there are 3"),
    ],
)
def test_mistakes_in_the_parallel_option_are_explained(mode, n_ranks, words):
    """One sentence that names the thing and the remedy."""
    with pytest.raises(UserError) as caught:
        parse_layout(mode, n_ranks)
    assert words in str(caught.value)


def test_a_wrong_parallel_option_ends_before_any_work(monkeypatch):
    """The settings know from torchrun's environment how many ranks there will be."""
    monkeypatch.setenv("WORLD_SIZE", "3")
    assert "a multiple of 2 ranks" in complaints_about(TrainingConfig(parallel="fsdp+tp:2"))[0]
    assert complaints_about(TrainingConfig(parallel="fsdp")) == []
