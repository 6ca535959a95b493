"""Training of the encoder–decoder: the sample pairs, what is learned, resuming, the files it leaves, bad input."""

import json
from random import Random

import pytest
import torch

import seq2seq_trainer
from checkpoint import load_checkpoint, load_model
from command_line import UserError
from data.sample_translation import prove_combinations_are_new, translation_pairs
from evaluation.text_metrics import sacre_bleu
from inference import quantizer, translate
from inference.kernels.linear_layers import InferenceEmbedding
from inference.quantizer import load_translator
from seq2seq_trainer import PairDataset, Seq2SeqTrainer, Seq2SeqTrainingConfig
from training.optimization import learning_rate_factor

SMALL = ["--d_model", "32", "--num_heads", "2", "--num_encoder_layers", "1", "--num_decoder_layers", "1",
         "--dropout", "0", "--batch_size", "16", "--num_threads", "1", "--max_seq_len", "24",
         "--vocab_size", "280"]  # fmt: skip
ANIMALS = {"猫": "cat", "狗": "dog", "马": "horse", "鸟": "bird", "鱼": "fish", "牛": "cow"}
COLOURS = {"红": "red", "黑": "black", "白": "white", "绿": "green"}


@pytest.fixture(scope="module")
def pairs_file(tmp_path_factory):
    """A red cat and its kind, in two languages."""
    path = tmp_path_factory.mktemp("pairs") / "pairs.jsonl"
    pairs = [{"src": c + a, "tgt": f"{COLOURS[c]} {ANIMALS[a]}"} for c in COLOURS for a in ANIMALS]
    path.write_text("".join(json.dumps(pair, ensure_ascii=False) + "\n" for pair in pairs * 4), encoding="utf-8")
    return path


@pytest.fixture(scope="module")
def trained(pairs_file, tmp_path_factory):
    """The folder of a model that was trained on them from the command line."""
    folder = tmp_path_factory.mktemp("translator")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        seq2seq_trainer.main(
            ["--pairs", str(pairs_file), "--output_dir", "out", "--max_steps", "160", "--lr", "1e-2",
             "--warmup_steps", "10", "--tokenizer_dir", tokenizer_folder(pairs_file, folder),
             "--test_pairs", str(pairs_file), *SMALL]
        )  # fmt: skip
    return folder / "out"


def tokenizer_folder(pairs_file, folder):
    from byte_level_bpe import ByteLevelBPETokenizer

    tokenizer = ByteLevelBPETokenizer(vocab_size=280)
    tokenizer.train([pairs_file.read_text(encoding="utf-8")], min_frequency=2)
    tokenizer.save(folder / "tokenizer")
    return str(folder / "tokenizer")


def test_sample_pairs_hold_out_combinations_of_known_words():
    """No person of the test does there what training has seen them do, and yet every word is known."""
    train, test = translation_pairs(Random(0))
    assert (len(train), len(test)) == (6000, 300)
    assert len({pair["src"] for pair in train + test}) == 6300
    seen = {"triple": ("I", "eat", "egg")}, {"triple": ("we", "eat", "apple")}
    with pytest.raises(ValueError, match="yet in training"):
        prove_combinations_are_new(seen, [{"triple": ("I", "eat", "egg")}])
    with pytest.raises(ValueError, match="never shows"):
        prove_combinations_are_new(seen, [{"triple": ("I", "eat", "hat")}])
    prove_combinations_are_new(seen, [{"triple": ("we", "eat", "egg")}])


def test_it_learns_to_translate_both_ways(trained, capsys):
    """The pairs come out right, from the command line as from the trainer."""
    report = json.loads((trained / "translations.json").read_text(encoding="utf-8"))
    right = [record["translation"] == record["reference"] for record in report["translations"]]
    assert sum(right) / len(right) > 0.95
    assert "BLEU" in report["scores"][0] and "tok:zh" in report["scores"][1]
    model = ["--model_path", str(trained / "translate_best.pth"), "--num_threads", "1"]
    for text, translation in {"红猫": "red cat", "black dog": "黑狗"}.items():
        translate.main(["--text", text, *model])
        assert capsys.readouterr().out.splitlines()[-1] == translation


def test_files_go_in_and_out(trained, tmp_path, capsys):
    """A line each, in their order, whatever their lengths."""
    (tmp_path / "in.txt").write_text("白马\nred fish\n绿鸟\n", encoding="utf-8")
    model = ["--model_path", str(trained / "translate_best.pth"), "--num_threads", "1", "--batch_size", "2"]
    translate.main(["--input", str(tmp_path / "in.txt"), "--output", str(tmp_path / "out.txt"), *model])
    assert (tmp_path / "out.txt").read_text(encoding="utf-8").splitlines() == ["white horse", "红鱼", "green bird"]


@pytest.mark.parametrize("weights", ["int8", "fp16"])
def test_a_quantized_translator_is_smaller_and_says_the_same(trained, tmp_path, weights):
    source, output = trained / "translate_best.pth", tmp_path / "small.pth"
    quantizer.main(["--model_path", str(source), "--output_path", str(output), "--weights", weights])
    assert output.stat().st_size < source.stat().st_size
    model, tokenizer, content = load_translator(output)
    assert content["quantization"] == weights
    assert isinstance(model.src_embedding, InferenceEmbedding)
    texts = [c + a for c in COLOURS for a in ANIMALS]
    plain, *_ = load_translator(source)
    both = [translate.translate(version, tokenizer, texts, num_beams=2) for version in (model, plain)]
    assert both[0] == both[1]


def test_resuming_changes_nothing(pairs_file, trained, tmp_path):
    """10 steps in two goes are 10 steps in one, to the last bit."""

    def train(folder, steps, *more):
        settings = ["--pairs", str(pairs_file), "--tokenizer_dir", str(trained.parent / "tokenizer"), "--output_dir"]
        config = parsed([*settings, str(folder), "--eval_interval", "100", "--save_interval", "5", *SMALL, *more])
        config.max_steps = 10
        trainer = Seq2SeqTrainer(config)
        trainer.loop.max_steps = steps
        trainer.train()
        return load_checkpoint(folder / "checkpoints" / f"step_{steps:08d}.pth")["model"]

    whole = train(tmp_path / "whole", 10)
    train(tmp_path / "parts", 5)
    resumed = train(tmp_path / "parts", 10, "--resume", "auto")
    assert all(torch.equal(whole[name], resumed[name]) for name in whole)


def parsed(arguments):
    from command_line import parse_config

    return parse_config(Seq2SeqTrainingConfig, arguments, description="")


def test_targets_stand_between_their_marks(trained):
    _, tokenizer, _ = load_translator(trained / "translate_best.pth")
    data = PairDataset([("红猫", "red cat"), ("a" * 60, "b"), ("狗", "dog")], tokenizer, 24)
    assert (len(data), data.account.left_out) == (2, {"too long": 1})
    batch = data.collate([data[0], data[1]])
    start, end = tokenizer.bos_token_id, tokenizer.eos_token_id
    red_cat = tokenizer.encode("red cat")["input_ids"]
    assert batch["decoder_input_ids"][0].tolist() == [start, *red_cat]
    assert batch["labels"][0].tolist() == [*red_cat, end]
    assert data.count(batch) == len(red_cat) + len(tokenizer.encode("dog")["input_ids"]) + 2


def test_what_is_left_out_is_said_before_training_and_recorded(pairs_file, tmp_path, capsys):
    """Read, left out and why, held out; other names of fields; a pair's two directions on one side of the split."""
    records = [json.loads(line) for line in pairs_file.read_text(encoding="utf-8").splitlines()[:40]]
    renamed = [{"zh": record["src"], "en": record["tgt"]} for record in records]
    renamed += [{"zh": "猫" * 60, "en": "cats"}, {"zh": "猫"}]
    (tmp_path / "p.jsonl").write_text("\n".join(map(json.dumps, renamed)), encoding="utf-8")
    settings = ["--pairs", str(tmp_path / "p.jsonl"), "--columns", "src=zh,tgt=en", "--skip_bad_records", "true",
                "--output_dir", str(tmp_path / "out"), "--tokenizer_dir", tokenizer_folder(pairs_file, tmp_path),
                "--val_fraction", "0.2", "--max_steps", "1", *SMALL]  # fmt: skip
    trainer = Seq2SeqTrainer(parsed(settings))
    printed = capsys.readouterr().out
    held_out = trainer.loop.val_data
    assert f"p.jsonl: 42 pairs read; 1 left out (malformed); 1 left out (too long); {len(held_out)} held out" in printed
    assert set(held_out.texts) == {pair[::-1] for pair in held_out.texts}
    assert len(held_out) + len(trainer.loop.train_data) == 80
    trainer.train()
    assert load_checkpoint(tmp_path / "out" / "translate_best.pth")["data"]["data"]["read"] == 42


def test_noam_rises_to_its_peak_and_falls_with_the_root_of_the_step():
    factors = [learning_rate_factor("noam", step, 1000, 100) for step in range(1000)]
    assert max(factors) == factors[99] == 1.0
    assert factors[399] == pytest.approx(0.5)
    d_model, warmup = 512, 100  # the paper's formula, up to the scale
    paper = [d_model**-0.5 * min((s + 1) ** -0.5, (s + 1) * warmup**-1.5) for s in range(1000)]
    assert factors == pytest.approx([value / max(paper) for value in paper])


def test_chinese_is_scored_by_characters():
    """Identical texts score 100 in either language; one wrong character of many costs little."""
    assert sacre_bleu(["昨天我们在公园。"] * 2, ["昨天我们在公园。"] * 2)[0] == pytest.approx(100)
    score, signature = sacre_bleu(["昨天我们在公园读书。"], ["昨天我们在公园写书。"])
    assert 50 < score < 100 and "tok:zh" in signature
    assert sacre_bleu(["a b c d"], ["w x y z"])[0] == 0
    with pytest.raises(ValueError, match="cannot be compared"):
        sacre_bleu([], [])


def test_mistakes_are_named(trained, tmp_path):
    """Other files, other models and other options, a sentence each."""
    (tmp_path / "a.txt").write_text("一\n二\n", encoding="utf-8")
    (tmp_path / "b.txt").write_text("one\n", encoding="utf-8")
    (tmp_path / "bad.jsonl").write_text('{"src": "一", "target": "one"}\n', encoding="utf-8")
    out = ["--output_dir", str(tmp_path / "out"), *SMALL]
    model, int8 = trained / "translate_best.pth", tmp_path / "int8.pth"
    quantizer.main(["--model_path", str(model), "--output_path", str(int8)])
    mistakes = {
        "--src and --tgt belong together": lambda: parsed(["--src", "a.txt"]),
        "num_heads": lambda: parsed(["--d_model", "31"]),
        "takes ddp": lambda: parsed(["--parallel", "fsdp"]),
        "2 lines and": lambda: seq2seq_trainer.main(
            ["--src", str(tmp_path / "a.txt"), "--tgt", str(tmp_path / "b.txt"), *out]
        ),
        "record 1 of": lambda: seq2seq_trainer.main(["--pairs", str(tmp_path / "bad.jsonl"), *out]),
        "encoder–decoder; python -m inference.translate": lambda: load_model(model),
        "is not scored here": lambda: quantizer.main(["--model_path", str(model), "--text", "a.txt"]),
        "is quantized already": lambda: quantizer.main(["--model_path", str(int8)]),
        "either --text or --input": lambda: translate.main(["--model_path", str(model)]),
        "text 1 is empty": lambda: translate.main(["--text", " ", "--model_path", str(model)]),
        "cut it into sentences": lambda: translate.main(["--text", "字" * 90, "--model_path", str(model)]),
    }
    for sentence, mistake in mistakes.items():
        with pytest.raises(UserError, match=sentence):
            mistake()
