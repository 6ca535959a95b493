"""Whatever is wrong with what a user gives: one sentence that names it and the remedy, status 2, nothing half-written.

Every case calls the real `main` of a script, in a folder that holds sound and unsound files of every kind.
"""

import gzip
import json
import re
import shlex
import shutil

import pytest
import torch

import byte_level_bpe
import evaluator
import finetune
import pretrain_trainer
from alignment.reward_model import RewardModel
from byte_level_bpe import ByteLevelBPETokenizer
from checkpoint import save_checkpoint
from command_line import run_main
from evaluation import ngram_baseline
from gpt_model import GPTConfig, GPTModel
from inference import kv_cache_infer, quantizer

LINES = [f"{number} 的平方是 {number * number}；the cube is {number**3}." for number in range(20)]
TALKS = [{"instruction": f"问题 {number}", "response": f"答案 {number}"} for number in range(12)]
PAIRS = [{"instruction": f"问题 {number}", "chosen": f"答案 {number}", "rejected": "不"} for number in range(12)]

QUICK = " --device cpu --num_threads 1 --max_steps 2 --output_dir out"
PRETRAIN = "--d_model 16 --n_layers 1 --n_heads 2 --max_seq_len 16 --batch_size 2 --sample_tokens 0 --shard_dir shards"
PRETRAIN += " --tokenizer_dir tokenizer --train_data_dir good.txt --val_data_dir good.txt" + QUICK
SCRIPTS = {
    "tokenizer": (byte_level_bpe.main, "--output_dir out --vocab_size 300 --input"),
    "pretrain": (pretrain_trainer.main, PRETRAIN),
    "sft": (finetune.main, "--mode sft --data_path sft.json --pretrained_model base.pth" + QUICK),
    "reward": (finetune.main, "--mode reward --pairwise_data pairs.json --sft_model base.pth" + QUICK),
    "ppo": (
        finetune.main,
        "--mode ppo --pairwise_data pairs.json --sft_model base.pth --reward_model reward.pth --max_gen_len 4 "
        "--rollout_batch_size 4 --batch_size 4" + QUICK,
    ),
    "dpo": (finetune.main, "--mode dpo --pairwise_data pairs.json --sft_model base.pth" + QUICK),
    "kto": (finetune.main, "--mode kto --pairwise_data pairs.json --sft_model base.pth" + QUICK),
    "distill": (finetune.main, "--mode distill --data_path sft.json --teacher_model base.pth" + QUICK),
    "finetune": (finetune.main, ""),
    "evaluate": (evaluator.main, "--test_data_path sft.json --device cpu --output_path out/report.json --model_path"),
    "generate": (kv_cache_infer.main, "--prompt 问题 --device cpu --num_threads 1 --model_path"),
    "prompt": (kv_cache_infer.main, "--device cpu --num_threads 1 --model_path"),
    "quantize": (quantizer.main, "--output_path out/int8.pth --model_path"),
    "ngram": (ngram_baseline.main, "--tokenizer_dir tokenizer --train_data_dir good.txt --sft_data_path sft.json "
                                   "--test_data_path sft.json --output_path out/ngram.json"),
}  # fmt: skip

# script | what is wrong: further options, which win | words of the sentence
CASES = """
tokenizer | missing.txt | there is no data at missing.txt; check the path
tokenizer | empty.txt | empty.txt holds no text; give a file
tokenizer | blank.txt | blank.txt holds no text
tokenizer | binary.txt | binary.txt is a binary file; give a text file
tokenizer | gbk.txt | gbk.txt is not UTF-8 text; save it as UTF-8
tokenizer | utf16.txt | utf16.txt is not UTF-8 text; save it as UTF-8
tokenizer | picture.png | picture.png is none of the supported kinds of file; convert it
tokenizer | cut.txt.gz | cut.txt.gz is not a sound gzip file; create it again
tokenizer | empty_folder | the folder empty_folder holds no file that ends in .txt; put the data there
tokenizer | no_text.jsonl | line 2 of no_text.jsonl has no field "text"
tokenizer | good.txt --vocab_size 10 --min_frequency 0 | --vocab_size must be at least 260; --min_frequency must be at
tokenizer | good.txt --output_dir file/tokenizer | file/tokenizer
tokenizer | good.txt --vocab 300 | unrecognized arguments: --vocab; --help

pretrain | --train_data_dir missing | there is no data at missing; check the path
pretrain | --val_data_dir missing | there is no data at missing; check the path
pretrain | --train_data_dir empty.txt | empty.txt holds no text
pretrain | --train_data_dir binary.txt | binary.txt is a binary file
pretrain | --train_data_dir gbk.txt | gbk.txt is not UTF-8 text; save it as UTF-8
pretrain | --val_data_dir utf16.txt | utf16.txt is not UTF-8 text; save it as UTF-8
pretrain | --train_data_dir no_text.jsonl | line 2 of no_text.jsonl has no field "text"
pretrain | --train_data_dir short.txt | short.txt has 7 tokens, less than one window; lower --max_seq_len
pretrain | --val_data_dir short.txt | the validation text has 7 tokens, less than one window; lower --max_seq_len
pretrain | --train_data_dir one_line.txt --val_data_dir '' --val_fraction 0.5 | one_line.txt has too few documents
pretrain | --tokenizer_dir missing | there is no tokenizer folder missing
pretrain | --tokenizer_dir broken_tokenizer | broken_tokenizer cannot be used
pretrain | --output_dir file/run | file/run cannot be a folder; file is a file; choose another --output_dir
pretrain | --shard_dir file/shards | file/shards; --shard_dir
pretrain | --nonsense 1 | unrecognized arguments: --nonsense 1; --help
pretrain | --preset enormous | --preset: invalid choice: 'enormous'; tiny; medium
pretrain | --optimizer sgd | --optimizer: invalid choice: 'sgd'; adamw
pretrain | --batch_size many | --batch_size: invalid int value: 'many'
pretrain | --batch_size 0 | --batch_size must be at least 1, not 0
pretrain | --lr -1 --grad_accum_steps 0 | --lr must be above 0 and below 10, not -1.0; --grad_accum_steps must be
pretrain | --lr nan | --lr must be above 0 and below 10, not nan
pretrain | --max_steps 0 --epochs nan | --epochs must be above 0, not nan
pretrain | --max_steps 0 --epochs inf | --epochs must be above 0, not inf
pretrain | --max_steps -3 | --max_steps must be at least 0, not -3
pretrain | --seed 99999999999999999999 | --seed must be at least 0 and below 2147483648
pretrain | --max_seq_len 1 | --max_seq_len must be at least 2
pretrain | --max_seq_len -8 | --max_seq_len must be at least
pretrain | --n_heads 3 | d_model 16 must be a multiple of n_heads 3
pretrain | --n_heads 0 | n_heads must be at least 1
pretrain | --n_kv_heads -1 | --n_kv_heads must be at least 0, not -1
pretrain | --d_ff -5 | --d_ff must be at least 0, not -5
pretrain | --weight_decay -1 --keep_checkpoints 0 | --weight_decay must be at least 0; --keep_checkpoints must be
pretrain | --max_grad_norm nan --max_skipped_steps 0 | --max_grad_norm must be at least 0; --max_skipped_steps must be
pretrain | --warmup_steps -5 --min_lr_ratio 2 | --warmup_steps must be at least -1; --min_lr_ratio must be
pretrain | --sample_tokens -1 | --sample_tokens must be at least 0, not -1
pretrain | --dropout 1.5 --n_layers 0 | --n_layers must be at least 1; --dropout must be at least 0 and below 1
pretrain | --position absolute | position must be one of learned, rotary, sinusoidal, not 'absolute'
pretrain | --val_fraction 2 | --val_fraction must be at least 0 and below 1, not 2.0
pretrain | --depth -2 | --depth must be at least 0, not -2
pretrain | --device cuda:99 | the device 'cuda:99' is not available here; use --device cpu or auto
pretrain | --device abacus | the device 'abacus' is not available here
pretrain | --precision fp16 | --precision fp16 needs a GPU; on a CPU use fp32 or bf16
pretrain | --tracker wandb | --tracker wandb needs the package wandb; pip install wandb
pretrain | --resume missing.pth | the checkpoint missing.pth does not exist
pretrain | --resume empty_folder | the checkpoint empty_folder is a folder, not a file
pretrain | --resume good.txt | the checkpoint good.txt is damaged
pretrain | --resume damaged.pth | the checkpoint damaged.pth is damaged; use another one
pretrain | --resume base.pth | base.pth is of another architecture; d_model 32 there, 16 here; --output_dir
pretrain | --d_model 32 --max_seq_len 48 --resume base.pth | base.pth holds; no training state; resume from
pretrain | --d_model 32 --max_seq_len 48 --resume reward.pth | reward.pth is a reward checkpoint; give a
pretrain | --d_model 32 --max_seq_len 48 --resume other.pth | other.pth was trained with another tokenizer; use that one

finetune | --data_path sft.json | --mode is missing; it must be one of sft, reward, ppo
finetune | --mode rlfh | --mode rlfh is not known; it must be one of sft, reward, ppo
finetune | --mode | --mode (empty) is not known
finetune | --mode ppo --sft_model base.pth | --mode ppo needs --reward_model PATH; --mode rlhf trains one first
finetune | --mode sft --nonsense 1 | unrecognized arguments: --nonsense 1

sft | --data_path missing.json | there is no data at missing.json
sft | --data_path empty.json | empty.json; JSON
sft | --data_path empty_list.json | empty_list.json holds no record; give at least one
sft | --data_path not_json.json | not_json.json is not valid JSON; mend it
sft | --data_path not_a_list.json | not_a_list.json must hold a list of records
sft | --data_path no_response.json | record 2 of no_response.json: the field "response" is missing
sft | --data_path no_instruction.jsonl | record 2 of no_instruction.jsonl: the field "instruction" is missing
sft | --data_path wrong_type.json | record 1 of wrong_type.json: the field "response" is not a text
sft | --data_path bad_role.json | turn 1 of record 1 of bad_role.json has the role 'robot'; it must be one of
sft | --data_path bad_line.jsonl | record 3 of bad_line.jsonl is not valid JSON
sft | --data_path gbk.json | gbk.json is not UTF-8 text; save it as UTF-8
sft | --data_path cut.json.gz | cut.json.gz is not a sound gzip file; create it again
sft | --data_path good.txt | good.txt is none of the supported kinds of file; convert it to .json
sft | --pretrained_model missing.pth | missing.pth does not exist; run pretrain_trainer.py first
sft | --pretrained_model empty_folder | empty_folder is a folder, not a file
sft | --pretrained_model damaged.pth | damaged.pth is damaged; use another one, or train it again
sft | --pretrained_model nan.pth | nan.pth is damaged: final_norm.weight holds NaN or infinity; use another checkpoint
sft | --pretrained_model cut.pth | cut.pth is damaged; use another one, or train it again
sft | --pretrained_model good.txt | good.txt is damaged
sft | --pretrained_model foreign.pth | foreign.pth is not a checkpoint of this project
sft | --pretrained_model pickled.pth | pickled.pth is not a checkpoint of this project
sft | --pretrained_model reward.pth | reward.pth is a reward model, which writes no text
sft | --pretrained_model int8.pth | int8.pth is quantized (int8); give the checkpoint it was made from
sft | --pretrained_model mislabelled.pth | mislabelled.pth holds another architecture than expected
sft | --max_seq_len 1000 | 1000 is beyond the model's context of 48, which was fixed in pretraining; lower
sft | --max_seq_len 5 | can be used; no answer within 5 tokens; raise --max_seq_len (now 5; the model's context is 48)
sft | --val_data_path missing.json | there is no data at missing.json
sft | --val_fraction 0 | --val_fraction must be above 0, unless --val_data_path is given
sft | --val_fraction 1 | --val_fraction must be at least 0 and below 1, not 1.0
sft | --output_dir file | file cannot be a folder; choose another --output_dir

reward | --pairwise_data no_chosen.json | record 2 of no_chosen.json: the field "chosen" is missing
reward | --pairwise_data sft.json | record 1 of sft.json: the field "chosen" is missing; a preference has "chosen" and
reward | --pairwise_data missing.json | there is no data at missing.json
reward | --sft_model missing.pth | missing.pth does not exist; run finetune.py --mode sft first
reward | --sft_model reward.pth | reward.pth is a reward model
reward | --max_seq_len 5 | can be used; longer than 5 tokens; raise --max_seq_len (now 5; the model's context is 48)
reward | --batch_size -1 | --batch_size must be at least 1, not -1

ppo | --reward_model missing.pth | missing.pth does not exist
ppo | --reward_model base.pth | base.pth is a pretrain model; give one that finetune.py --mode reward wrote
ppo | --reward_model other_reward.pth | other_reward.pth and base.pth have different tokenizers; use a matching pair
ppo | --sft_model reward.pth | reward.pth is a reward model, which writes no text
ppo | --max_gen_len 100 | --max_gen_len 100 leaves no room for a prompt in 48 tokens; lower it
ppo | --rollout_batch_size 6 | --rollout_batch_size 6 must be a multiple of --batch_size
ppo | --pairwise_data one_pair.json | one_pair.json has 1 prompts, of which 1 can be used, too few to set some aside
ppo | --temperature 0 | --temperature must be above 0, not 0.0

dpo | --pairwise_data sft.json | record 1 of sft.json: the field "chosen" is missing
dpo | --sft_model reward.pth | reward.pth is a reward model, which writes no text
dpo | --sft_data missing.json | there is no data at missing.json
dpo | --beta 0 --label_smoothing 0.6 | --beta must be above 0; --label_smoothing must be at least 0 and below 0.5
dpo | --lora_rank 2 --lora_targets nothing | --lora_targets nothing is no linear layer of the model

kto | --pairwise_data sft.json | record 1 of sft.json: the field "label" is missing; true or false
kto | --beta 0 --desirable_weight -1 | --beta must be above 0; --desirable_weight must be at least 0

distill | --teacher_model reward.pth | reward.pth is a reward model, which writes no text
distill | --teacher_model missing.pth | the teacher missing.pth does not exist; train it first
distill | --student_model other.pth | other.pth and base.pth have different tokenizers
distill | --student_model base.pth --d_model 16 | --student_model brings its own size; leave out --n_layers
distill | --n_heads 3 | no student has these sizes; must be a multiple of n_heads 3
distill | --text_data gbk.txt --shard_dir shards | gbk.txt is not UTF-8 text
distill | --alpha 2 --temperature 0 | --alpha must be at least 0 and at most 1; --temperature must be above 0

evaluate | missing.pth | missing.pth does not exist
evaluate | damaged.pth | damaged.pth is damaged
evaluate | base.pth --test_data_path missing.json | missing.json
evaluate | base.pth --model_type sft --test_data_path no_response.json | record 2 of no_response.json: the field
evaluate | base.pth --model_type poem | --model_type: invalid choice: 'poem'
evaluate | base.pth --model_type pretrain --test_data_path gbk.txt | gbk.txt is not UTF-8 text
evaluate | reward.pth --model_type sft | reward.pth is a reward model
evaluate | base.pth --model_type reward --test_data_path pairs.json | base.pth is a pretrain model; give one
evaluate | base.pth --model_type sft --batch_size 0 | --batch_size must be at least 1
evaluate | base.pth --model_type sft --max_gen_len 0 | --max_gen_len must be at least 1
evaluate | base.pth --model_type sft --temperature nan | --temperature must be at least 0, not nan

evaluate | base.pth --model_type sft --max_samples 0 | --max_samples must be at least 1
evaluate | base.pth --model_type sft --temperature -1 | --temperature must
evaluate | base.pth --model_type sft --top_k -1 | --top_k must

evaluate | nan.pth | nan.pth is damaged: final_norm.weight holds NaN or infinity; use another checkpoint

generate | missing.pth | missing.pth does not exist
generate | damaged.pth | damaged.pth is damaged
generate | reward.pth | reward.pth is a reward model
generate | nan.pth | nan.pth is damaged: final_norm.weight holds NaN or infinity; use another checkpoint
prompt | base.pth --prompt | --prompt is missing; give a text
prompt | base.pth --prompt '' | --prompt is empty; give at least one character
prompt | base.pth --prompt LONG | tokens and the model's context only 48; shorten it
prompt | base.pth --prompt LONG --num_beams 2 | tokens; a context of 48 takes 1 to 47
generate | base.pth --max_gen_len 0 | --max_gen_len must be a whole number of at least 1, not 0
generate | base.pth --top_k 321 | top_k must be a whole number from 0 to 320, the size of the vocabulary, not 321
generate | base.pth --temperature nan --top_p 2 | --temperature must be a number of at least 0, not nan; --top_p must be
generate | base.pth --stop . '' | --stop must be a tuple of strings of at least one character
generate | base.pth --overflow wrap | --overflow: invalid choice: 'wrap'; slide
generate | base.pth --num_beams 3 --num_beam_groups 2 | --num_beams 3 must be a multiple of num_beam_groups 2
generate | base.pth --num_beams 2 --repetition_penalty 2 | --num_beams and repetition_penalty do not go together

quantize | missing.pth | missing.pth does not exist
quantize | damaged.pth | damaged.pth is damaged
quantize | reward.pth | reward.pth is a reward model
quantize | int8.pth | int8.pth is quantized (int8); give the checkpoint it was made from
quantize | base.pth --output_path file/int8.pth | file/int8.pth
quantize | base.pth --text_tokens 1 --num_threads -1 | --text_tokens must be at least 2; --num_threads must be at least
quantize | base.pth --output_path base.pth | --output_path base.pth is the model itself

ngram | --order 0 --max_gen_len 0 | --order must be at least 1, not 0; --max_gen_len must be at least 1, not 0
ngram | --train_data_dir gbk.txt | gbk.txt is not UTF-8 text
ngram | --test_data_path missing.json | missing.json
"""
TABLE = [tuple(part.strip() for part in line.split("|")) for line in CASES.splitlines() if line]


@pytest.fixture(scope="module")
def world(tmp_path_factory, tokenizer):
    """A folder with sound and unsound text, records, tokenizers and checkpoints."""
    folder = tmp_path_factory.mktemp("world")
    write_texts(folder)
    write_records(folder)
    tokenizer.save(folder / "tokenizer")
    shutil.copytree(folder / "tokenizer", folder / "broken_tokenizer")
    (folder / "broken_tokenizer" / "tokenizer.json").write_text('{"model": ')
    write_checkpoints(folder, tokenizer)
    return folder


def write_texts(folder):
    text = "\n".join(LINES)
    (folder / "good.txt").write_text(text, encoding="utf-8")
    (folder / "one_line.txt").write_text(LINES[0] * 3, encoding="utf-8")
    (folder / "short.txt").write_text("巴黎")
    (folder / "empty.txt").write_bytes(b"")
    (folder / "blank.txt").write_text("\n \n\t\n")
    (folder / "binary.txt").write_bytes(b"abc\0\1\2\3" * 100)
    (folder / "gbk.txt").write_bytes(text.encode("gbk"))
    (folder / "utf16.txt").write_bytes(text.encode("utf-16"))
    (folder / "picture.png").write_bytes(b"\x89PNG\r\n")
    (folder / "cut.txt.gz").write_bytes(gzip.compress(text.encode())[:-20])
    (folder / "no_text.jsonl").write_text('{"text": "one"}\n{"txt": "two"}\n')
    (folder / "empty_folder").mkdir()
    (folder / "file").write_text("a file stands where a folder should")


def write_records(folder):
    def without(records, field):
        return [{k: v for k, v in r.items() if n != 1 or k != field} for n, r in enumerate(records)]

    contents = {
        "sft.json": TALKS,
        "pairs.json": PAIRS,
        "one_pair.json": PAIRS[:1],
        "empty_list.json": [],
        "not_a_list.json": {"instruction": "a", "response": "b"},
        "no_response.json": without(TALKS, "response"),
        "no_chosen.json": without(PAIRS, "chosen"),
        "wrong_type.json": [{"instruction": "a", "response": 42}],
        "bad_role.json": [{"messages": [{"role": "robot", "content": "a"}]}],
    }
    for name, content in contents.items():
        (folder / name).write_text(json.dumps(content), encoding="utf-8")
    lines = [json.dumps(record) for record in without(TALKS, "instruction")]
    (folder / "no_instruction.jsonl").write_text("\n".join(lines))
    (folder / "bad_line.jsonl").write_text("\n".join([json.dumps(TALKS[0])] * 2 + ["{oops"]))
    (folder / "empty.json").write_bytes(b"")
    (folder / "not_json.json").write_text("[{'instruction': 'a'}]")
    (folder / "gbk.json").write_bytes(json.dumps(TALKS, ensure_ascii=False).encode("gbk"))
    (folder / "cut.json.gz").write_bytes(gzip.compress(json.dumps(TALKS).encode())[:-20])


def write_checkpoints(folder, tokenizer):
    torch.manual_seed(0)
    other = ByteLevelBPETokenizer(320)
    other.train(CASES.splitlines())
    assert len(other) == len(tokenizer) == 320
    config = GPTConfig.for_architecture("modern", vocab_size=320, d_model=32, n_layers=1, n_heads=2, max_seq_len=48)
    model = GPTModel.from_config(config)

    def save(name, model, stage="pretrain", tokenizer=tokenizer, **more):
        state = model.state_dict()
        save_checkpoint(folder / name, model_state=state, config=config, tokenizer=tokenizer, stage=stage, **more)

    save("base.pth", model)
    save("other.pth", model, tokenizer=other)
    save("reward.pth", RewardModel(model), "reward")
    save("other_reward.pth", RewardModel(model), "reward", other)
    damaged = GPTModel.from_config(config)
    with torch.no_grad():
        damaged.final_norm.weight[0] = float("nan")
    save("nan.pth", damaged)
    save("mislabelled.pth", RewardModel(model), "pretrain")
    content = (folder / "base.pth").read_bytes()
    (folder / "cut.pth").write_bytes(content[: len(content) // 2])
    middle = len(content) // 2
    (folder / "damaged.pth").write_bytes(content[:middle] + bytes([content[middle] ^ 1]) + content[middle + 1 :])
    torch.save({"weights": torch.ones(2)}, folder / "foreign.pth")
    torch.save(torch.nn.Linear(2, 2), folder / "pickled.pth")
    quantizer.save_quantized_model(
        quantizer.quantize_model_int8(model), folder / "int8.pth", torch.load(folder / "base.pth", weights_only=True)
    )


def files_in(folder):
    files = [path for path in folder.rglob("*") if path.is_file() and "shards" not in path.parts]
    return {path: path.stat().st_mtime_ns for path in files}


def call(script, options, capsys):
    """Run a script's `main`; returns the exit status and what it wrote to stderr, without progress bars."""
    main, usual = SCRIPTS[script]
    capsys.readouterr()
    with pytest.raises(SystemExit) as exit:
        run_main(lambda: main(shlex.split(f"{usual} {options}")))
    err = capsys.readouterr().err.replace("\r", "\n").splitlines()
    return exit.value.code, [line for line in err if line.strip() and not re.search(r"\d\d:\d\d", line)]


@pytest.mark.parametrize(("script", "options", "words"), TABLE, ids=[f"{s} {o}" for s, o, _ in TABLE])
def test_bad_input_gives_one_sentence_and_status_2(world, monkeypatch, capsys, script, options, words):
    monkeypatch.chdir(world)
    before = files_in(world)
    status, err = call(script, options.replace("LONG", "x" * 100), capsys)
    assert status == 2, err
    (sentence,) = err
    assert sentence.startswith("error: ")
    for word in words.split("; "):
        assert word in sentence.replace("`", "")
    assert "Error" not in sentence and "Traceback" not in sentence
    assert files_in(world) == before, "nothing was written"
    assert not list(world.rglob("*.tmp"))


@pytest.mark.parametrize("script", ["pretrain", "sft", "reward", "ppo", "dpo", "distill"])
def test_too_little_disk_is_noticed_before_any_work(world, monkeypatch, capsys, script):
    """The sentence says how much there is, how much is needed, and what to lower."""
    monkeypatch.chdir(world)
    usage = shutil.disk_usage(world)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage._replace(free=100_000))
    before = files_in(world)
    status, (sentence,) = call(script, "", capsys)
    assert status == 2
    assert sentence.startswith("error: out has 0 MiB of free disk and this run needs about")
    assert "free some space, choose another --output_dir or lower --keep_checkpoints" in sentence
    assert files_in(world) == before


@pytest.mark.parametrize("script", ["pretrain", "sft", "reward", "ppo", "dpo", "distill"])
def test_the_same_calls_with_sound_input_work(world, tmp_path, monkeypatch, capsys, script):
    """So that it is the bad input which the cases above are refused for."""
    monkeypatch.chdir(world)
    status, _ = call(script, f"--output_dir {tmp_path}/out --max_steps 1", capsys)
    assert status == 0
    assert len(list(tmp_path.glob("out/*_best.pth"))) == 1


@pytest.mark.parametrize("options", ["--max_seq_len 2", "--max_seq_len 5", "--max_seq_len 7 --val_data_dir short.txt"])
def test_the_smallest_contexts_and_texts_work_with_samples_too(world, tmp_path, monkeypatch, capsys, options):
    """Samples take what prompts there are."""
    monkeypatch.chdir(world)
    status, _ = call("pretrain", f"{options} --output_dir {tmp_path}/out --sample_tokens 8", capsys)
    assert status == 0
    assert (tmp_path / "out" / "samples.txt").read_text(encoding="utf-8").startswith("--- step 1")
