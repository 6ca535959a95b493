"""The evaluator: sums over tokens that can be checked by hand, and scores that hold for Chinese as for English."""

import json
import math

import pytest
import torch

import evaluator
from alignment.reward_model import RewardModel
from byte_level_bpe import ByteLevelBPETokenizer
from checkpoint import save_checkpoint
from command_line import UserError
from data_loader import GPTPretrainDataset
from evaluation.answer_report import Question, answers_summary, grade, load_questions, report_answers
from evaluation.text_metrics import segment
from evaluator import GPTEvaluator, evaluate_reward
from gpt_model import GPTConfig, GPTModel
from inference.request import Generation
from inference.text_generation import generate_texts
from text.token_shards import tokenize_to_shards

TEXTS = ["hello world", "你好，世界。", "a", "The quick brown fox jumps over the lazy dog.", "二加三等于五。"]


@pytest.fixture(scope="module")
def tokenizer():
    return ByteLevelBPETokenizer(300)  # knows the bytes only: a token is a byte


@pytest.fixture(params=["gpt2", "modern"])
def model(request):
    torch.manual_seed(0)
    config = GPTConfig.for_architecture(
        request.param, vocab_size=300, d_model=32, n_layers=2, n_heads=2, max_seq_len=64
    )
    model = GPTModel.from_config(config)
    for parameter in model.parameters():  # with GPT-2's small weights every next token would be equally likely
        torch.nn.init.normal_(parameter, std=0.3)
    return model


def nats_by_hand(model, tokenizer, text):
    """−log p of each token of a text after `<s>`, with one forward pass for each token."""
    ids = tokenizer.encode(text)["input_ids"]
    model.eval()
    with torch.no_grad():
        return [
            -model(torch.tensor([ids[:end]]))["logits"][0, -1].log_softmax(-1)[ids[end]].item()
            for end in range(1, len(ids))
        ]


# -- perplexity --------------------------------------------------------------------------------------------------------


def test_perplexity_is_the_mean_over_tokens_by_hand(model, tokenizer):
    """Texts weigh by their tokens, not by batches or documents; bits per byte divide by the UTF-8 bytes."""
    nats = [value for text in TEXTS for value in nats_by_hand(model, tokenizer, text)]
    n_bytes = sum(len(text.encode()) for text in TEXTS)
    scores = GPTEvaluator(model, tokenizer).compute_perplexity(TEXTS, as_documents=True, batch_size=2)
    assert scores["tokens"] == len(nats)
    assert scores["bytes"] == n_bytes
    assert scores["loss"] == pytest.approx(sum(nats) / len(nats), rel=1e-5)
    assert scores["perplexity"] == pytest.approx(math.exp(sum(nats) / len(nats)), rel=1e-4)
    assert scores["bits_per_byte"] == pytest.approx(sum(nats) / math.log(2) / n_bytes, rel=1e-5)


def test_bits_per_byte_of_a_uniform_model(tokenizer):
    """A model that gives all 300 tokens the same chance needs log2(300) bits for each token, here a byte each."""
    model = GPTModel(vocab_size=300, d_model=32, n_layers=1, n_heads=2, max_seq_len=64)
    torch.nn.init.zeros_(model.token_embedding.weight)
    scores = GPTEvaluator(model, tokenizer).compute_perplexity(["hello 你好"], as_documents=True)
    assert scores["perplexity"] == pytest.approx(300, rel=1e-4)
    assert scores["bits_per_byte"] == pytest.approx(math.log2(300), rel=1e-5)
    assert scores["tokens"] == scores["bytes"] == 12


@pytest.mark.parametrize("batch_size", [1, 3, 100])
def test_perplexity_does_not_depend_on_the_batch_size(model, tokenizer, batch_size):
    """Other texts of the batch, and the padding they bring, change nothing."""
    evaluator = GPTEvaluator(model, tokenizer)
    texts = [*TEXTS, "x" * 150]
    for as_documents in (False, True):
        expected, scores = (
            evaluator.compute_perplexity(texts, as_documents=as_documents, batch_size=size) for size in (2, batch_size)
        )
        assert scores == pytest.approx(expected, rel=1e-5)


@pytest.mark.parametrize("copies", [1, 4, 6, 9])
def test_a_stream_is_scored_as_in_pretraining(model, tokenizer, tmp_path, copies):
    """`loss` and `bits_per_byte` are the trainer's `val_loss` and `val_bpb`, for texts shorter and longer than windows
    (by the data set and the loss that pretraining uses)."""
    texts = TEXTS * copies
    (tmp_path / "val.txt").write_text("\n".join(texts), encoding="utf-8")
    shards = tokenize_to_shards(tmp_path / "val.txt", tokenizer, tmp_path)
    data = GPTPretrainDataset(shards, 64)
    nats = n_tokens = 0
    model.eval()
    with torch.no_grad():
        for index in range(len(data)):
            batch = data.collate([data[index]])
            nats += model(**batch)["loss"].item() * data.count(batch)
            n_tokens += data.count(batch)
    scores = GPTEvaluator(model, tokenizer).compute_perplexity(tmp_path / "val", batch_size=2)
    assert scores["tokens"] == n_tokens == shards.n_tokens - 1
    assert scores["loss"] == pytest.approx(nats / n_tokens, rel=1e-5)
    assert scores["bits_per_byte"] == pytest.approx(nats / math.log(2) / shards.n_bytes, rel=1e-5)


@pytest.mark.parametrize("length", [63, 64, 65, 200])
@pytest.mark.parametrize("stride", [1, 24, 64])
def test_a_document_longer_than_the_context_is_scored_once_a_token(model, tokenizer, length, stride):
    """Each window scores what no earlier one has scored, as far back as the context reaches."""
    text = "".join(chr(97 + index * index % 23) for index in range(length))
    scores = GPTEvaluator(model, tokenizer).compute_perplexity(
        [text], as_documents=True, stride=stride, batch_size=4
    )
    assert scores["tokens"] == length

    ids = tokenizer.encode(text)["input_ids"]
    nats, begin, scored = 0.0, 0, 0
    model.eval()
    while scored < length:
        window = torch.tensor([ids[begin : begin + 64]])
        with torch.no_grad():
            log_p = model(window)["logits"][0].log_softmax(-1)
        for position in range(scored - begin, min(64, length - begin)):
            nats -= log_p[position, ids[begin + position + 1]].item()
            scored += 1
        begin += stride
    assert scores["loss"] == pytest.approx(nats / length, rel=1e-5)


def test_perplexity_of_a_file_equals_that_of_its_lines(model, tokenizer, tmp_path):
    """A path may lack its ending; every line is a document."""
    (tmp_path / "val.txt").write_text("\n".join(TEXTS) + "\n", encoding="utf-8")
    evaluator = GPTEvaluator(model, tokenizer)
    assert evaluator.compute_perplexity(tmp_path / "val") == evaluator.compute_perplexity(TEXTS)


def test_scoring_leaves_the_model_in_its_mode(model, tokenizer):
    model.train()
    GPTEvaluator(model, tokenizer).compute_perplexity(TEXTS)
    assert model.training


def test_nothing_to_score_and_broken_weights_are_named(model, tokenizer):
    with pytest.raises(UserError, match="no text to score"):
        GPTEvaluator(model, tokenizer).compute_perplexity([""])
    torch.nn.init.constant_(model.token_embedding.weight, math.nan)
    with pytest.raises(UserError, match="not a finite number"):
        GPTEvaluator(model, tokenizer).compute_perplexity(["a"])


def test_a_foreign_tokenizer_is_refused(tokenizer):
    with pytest.raises(UserError, match="the tokenizer has 260 tokens and the model 100"):
        GPTEvaluator(GPTModel(vocab_size=100, d_model=32, n_layers=1, n_heads=2), tokenizer)


# -- BLEU and ROUGE ----------------------------------------------------------------------------------------------------


def test_segments_are_characters_in_chinese_and_words_elsewhere():
    assert segment("GPT-2用了3.5天，it's done.") == ["GPT-2", "用", "了", "3.5", "天", ",", "it's", "done", "."]


@pytest.mark.parametrize("text", ["机器学习是人工智能的一个分支。", "Paris is the capital.", "水", "42", "1.5 . 2.5"])
def test_identical_texts_score_one(text):
    """Unspaced Chinese, and texts shorter than four words, included."""
    assert GPTEvaluator.compute_bleu([text], [text]) == pytest.approx(1.0)
    assert GPTEvaluator.compute_rouge([text], [text]) == pytest.approx({"rouge-1": 1, "rouge-2": 1, "rouge-l": 1})


def test_chinese_that_overlaps_by_characters_scores_between_zero_and_one():
    prediction, reference = ["法国的首都是里昂。"], ["法国的首都是巴黎。"]
    assert 0.4 < GPTEvaluator.compute_bleu(prediction, reference) < 0.9
    rouge = GPTEvaluator.compute_rouge(prediction, reference)
    assert rouge["rouge-1"] == pytest.approx(7 / 9)  # seven of nine characters
    assert rouge["rouge-2"] == pytest.approx(5 / 8)  # five of eight neighbours
    assert rouge["rouge-l"] == pytest.approx(7 / 9)


def test_repetition_earns_no_rouge():
    """Counts are clipped as in the paper: of "水水水水" one character matches, precision 1/4, recall 1."""
    assert GPTEvaluator.compute_rouge(["水水水水"], ["水"])["rouge-1"] == pytest.approx(0.4)


def test_of_several_references_the_best_one_counts():
    """Any of them may match: BLEU takes n-grams of all (by hand with one that matches whole), ROUGE the best."""
    references = [["It is Rome.", "The capital is Paris.", "Paris."]]
    assert GPTEvaluator.compute_bleu(["The capital is Paris."], references) == pytest.approx(1.0)
    best = {"rouge-1": 1, "rouge-2": 1, "rouge-l": 1}
    assert GPTEvaluator.compute_rouge(["Paris."], references) == pytest.approx(best)
    alone = GPTEvaluator.compute_bleu(["The city is Paris."], ["It is Rome."])
    assert GPTEvaluator.compute_bleu(["The city is Paris."], references) > alone


def test_empty_answers_score_zero_and_count():
    assert GPTEvaluator.compute_bleu(["", ""], ["巴黎", "Paris"]) == 0
    assert GPTEvaluator.compute_rouge([""], ["巴黎"]) == {"rouge-1": 0, "rouge-2": 0, "rouge-l": 0}
    assert GPTEvaluator.compute_rouge(["", "巴黎"], ["巴黎", "巴黎"])["rouge-1"] == pytest.approx(0.5)
    assert GPTEvaluator.compute_rouge(["...", " "], ["a.", "b"])["rouge-1"] == pytest.approx(0.2)


def test_long_answers_do_not_exhaust_the_recursion_of_the_rouge_library():
    long = "字词句" * 1000
    assert GPTEvaluator.compute_rouge([long], [long + "。"])["rouge-l"] == pytest.approx(1.0)
    assert GPTEvaluator.compute_rouge([long], ["句词字" * 1000])["rouge-l"] > 0


def test_every_prediction_needs_its_reference():
    with pytest.raises(ValueError, match="2 predictions cannot be compared with 1 references"):
        GPTEvaluator.compute_bleu(["a", "b"], ["a"])


# -- generation --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("chat", [True, False])
def test_answers_do_not_depend_on_their_neighbours(model, tokenizer, chat):
    """A greedy answer is the same alone and in a batch, for prompts up to and beyond the context, in their order."""
    prompts = ["b" * length for length in (5, 60, 1, 38, 500, 20, 44)]
    batched = generate_texts(model, tokenizer, prompts, chat=chat, max_gen_len=24, batch_size=4)
    alone = [generate_texts(model, tokenizer, [prompt], chat=chat, max_gen_len=24)[0] for prompt in prompts]
    assert batched == alone
    assert all(1 <= len(generation.token_ids) <= 24 for generation in batched)


def test_an_answer_ends_with_its_end_token(model, tokenizer):
    """Sampled answers of a small model: some end by `</s>`, which closes their ids and is no part of their text."""
    answers = generate_texts(
        model, tokenizer, ["a"] * 200, chat=False, max_gen_len=40, temperature=3.0, seed=1, batch_size=64
    )
    assert {answer.ended for answer in answers} == {True, False}
    for answer in answers:
        assert (answer.token_ids[-1] == tokenizer.eos_token_id) == answer.ended
        assert answer.token_ids.count(tokenizer.eos_token_id) == answer.ended
        assert answer.ended or len(answer.token_ids) == 40
        assert "</s>" not in answer.text


def test_sampling_repeats_with_its_seed(model, tokenizer):
    settings = {"chat": True, "temperature": 1.0, "max_gen_len": 12}
    first, again, other = (generate_texts(model, tokenizer, TEXTS, seed=seed, **settings) for seed in (1, 1, 2))
    assert first == again != other


def test_conversations_are_prompts_too(model, tokenizer):
    """A list of messages continues a conversation; a string is its one user's turn."""
    evaluator = GPTEvaluator(model, tokenizer)
    messages = [{"role": "user", "content": "你好"}]
    assert evaluator.generate_predictions([messages, "你好"], 8) == 2 * evaluator.generate_predictions(["你好"], 8)


def test_no_prompt_gives_no_answer(model, tokenizer):
    assert generate_texts(model, tokenizer, [], chat=True) == []


# -- answers -----------------------------------------------------------------------------------------------------------


def question(text, reference, **fields):
    return Question([{"role": "user", "content": text}], reference, fields)


def test_answers_are_graded_by_skill_language_and_kind():
    """Shares of exact answers in every grouping, and every answer with its grades."""
    questions = [
        question("2+3?", "5.", answer="5.", skill="addition", language="en", held_out="operands"),
        question("2+4?", "6.", answer="6.", skill="addition", language="en", held_out="phrasing"),
        question("二加三？", "五。", answer="五。", skill="addition", language="zh", held_out="operands"),
        question("法国首都？", "巴黎。", answer="巴黎。", skill="capital", language="zh", held_out="phrasing"),
    ]
    answers = [Generation("5.", True, [9, 2]), Generation("7.", True, [9, 2]), Generation("五。", True, [9, 9, 2])]
    report = report_answers(questions, [*answers, Generation("", False, [1] * 64)])
    assert report["scores"]["exact"] == 0.5
    assert report["scores"]["ended"] == 0.75
    assert report["scores"]["mean_tokens"] == (1 + 1 + 2 + 64) / 4
    assert {name: scores["exact"] for name, scores in report["by_skill"].items()} == {"addition": 2 / 3, "capital": 0}
    assert {name: scores["exact"] for name, scores in report["by_language"].items()} == {"en": 0.5, "zh": 0.5}
    assert {name: scores["exact"] for name, scores in report["by_held_out"].items()} == {"operands": 1, "phrasing": 0}
    assert report["by_skill_and_language"]["addition/zh"]["exact"] == 1
    assert [row["exact"] for row in report["predictions"]] == [True, False, True, False]


def test_a_courteous_closing_is_preferred_and_still_exact():
    asked = question("2+3?", "5.", answer="5.")
    plain, courteous = (grade(asked, Generation(text, True, [9, 2])) for text in ("5.", "5. I hope this helps."))
    assert plain["exact"] and not plain["preferred"]
    assert courteous["exact"] and courteous["preferred"]
    assert not grade(asked, Generation("5. I hope this helps.", False, [9]))["preferred"]


def test_records_without_an_answer_are_compared_with_their_response():
    """Data of one's own needs no extra field: white space may differ, and preference is not judged."""
    graded = grade(question("hi", "good  day\n"), Generation("good day", True, [9, 2]))
    assert graded["exact"] and "preferred" not in graded
    assert "preferred" not in report_answers([question("a", "b")], [Generation("b", True, [9, 2])])["scores"]


def test_references_are_scored_token_by_token(model, tokenizer):
    """Perplexity and next-token accuracy of reference answers, `</s>` included (by a forward pass for each)."""
    asked = [
        question("a?", "bc"),
        Question([{"role": "user", "content": "hi"}, {"role": "assistant", "content": "yes"},
                  {"role": "user", "content": "b"}], "d", {}),
        question("long", "x" * 80),
    ]  # fmt: skip
    scores = GPTEvaluator(model, tokenizer).score_references(asked, batch_size=2)
    assert scores[2] is None
    model.eval()
    for one, score in zip(asked[:2], scores[:2], strict=True):
        prompt = tokenizer.encode_chat(one.prompt, add_generation_prompt=True)["input_ids"]
        answer = [*tokenizer.encode(one.reference, add_special_tokens=False)["input_ids"], tokenizer.eos_token_id]
        nats = hits = 0
        for end in range(len(answer)):
            with torch.no_grad():
                log_p = model(torch.tensor([prompt + answer[:end]]))["logits"][0, -1].log_softmax(-1)
            nats, hits = nats - log_p[answer[end]].item(), hits + int(log_p.argmax() == answer[end])
        assert score == (pytest.approx(nats, rel=1e-4), hits, len(answer))
    report = report_answers(asked, [Generation("bc", True, [9, 9, 2])] * 3, scores)
    nats, tokens = scores[0].nats + scores[1].nats, scores[0].tokens + scores[1].tokens
    assert report["scores"]["reference_perplexity"] == pytest.approx(math.exp(nats / tokens))
    assert report["scores"]["references_scored"] == 2
    assert "1 of them longer than the context, left out" in answers_summary(report)


def test_several_right_answers_in_a_record(tmp_path):
    """Any of "references" is exact; what is no list of texts is named, and no question is no score."""
    record = {"instruction": "Capital?", "response": "Paris.", "references": ["It is Paris."]}
    (tmp_path / "test.json").write_text(json.dumps([record]), encoding="utf-8")
    asked = load_questions(tmp_path / "test.json")
    report = report_answers(asked, [Generation("It is Paris.", True, [9, 2])])
    assert report["scores"]["exact"] == report["scores"]["bleu"] == report["scores"]["rouge-l"] == 1
    (tmp_path / "test.json").write_text(json.dumps([{**record, "references": "It is Paris."}]), encoding="utf-8")
    with pytest.raises(UserError, match='"references" must be a list of texts'):
        load_questions(tmp_path / "test.json")
    with pytest.raises(UserError, match="no question"):
        report_answers([], [])


def test_questions_come_in_all_three_shapes(tmp_path):
    """The last answer is what is asked for; all that comes before it is the prompt."""
    records = [
        {"instruction": "Add.", "input": "2, 3", "response": "5", "skill": "addition"},
        {"instruction": "Add 1 and 1.", "output": "2"},
        {
            "conversations": [
                {"from": "human", "value": "hi"},
                {"from": "gpt", "value": "hello"},
                {"from": "human", "value": "who?"},
                {"from": "gpt", "value": "me"},
            ]
        },
    ]
    (tmp_path / "test.json").write_text(json.dumps(records), encoding="utf-8")
    questions = load_questions(tmp_path / "test.json")
    assert [asked.reference for asked in questions] == ["5", "2", "me"]
    assert questions[0].prompt == [{"role": "user", "content": "Add.\n2, 3"}]
    assert questions[0].fields["skill"] == "addition"
    assert [message["content"] for message in questions[2].prompt] == ["hi", "hello", "who?"]
    assert [asked.reference for asked in load_questions(tmp_path / "test.json", 2)] == ["5", "2"]


def test_a_malformed_record_is_named(tmp_path):
    (tmp_path / "test.json").write_text('[{"instruction": "a", "response": "b"}, {"instruction": "a"}]')
    with pytest.raises(UserError, match='record 2 of .*test.json: the field "response" is missing'):
        load_questions(tmp_path / "test.json")
    (tmp_path / "test.json").write_text('[{"messages": [{"role": "assistant", "content": "b"}]}]')
    with pytest.raises(UserError, match="record 1 of .* without a question"):
        load_questions(tmp_path / "test.json")


# -- preferences -------------------------------------------------------------------------------------------------------


def test_reward_accuracy_is_the_share_of_pairs_by_defect(model, tokenizer, tmp_path):
    """A pair is right when the chosen answer's reward, computed alone, is higher."""
    pairs = [
        {"instruction": f"{a}?", "chosen": f"{a}.", "rejected": f"{a}{a}", "defect": "rude" if a % 3 else "wrong"}
        for a in range(20)
    ]
    (tmp_path / "pairs.json").write_text(json.dumps(pairs), encoding="utf-8")
    reward_model = RewardModel(model).eval()

    def reward(pair, side):
        turns = [{"role": "user", "content": pair["instruction"]}, {"role": "assistant", "content": pair[side]}]
        ids = torch.tensor([tokenizer.encode_chat(turns)["input_ids"]])
        with torch.no_grad():
            return reward_model.rewards(ids, torch.ones_like(ids)).item()

    right = {defect: [] for defect in ("rude", "wrong")}
    for pair in pairs:
        right[pair["defect"]].append(reward(pair, "chosen") > reward(pair, "rejected"))
    report = evaluate_reward(reward_model, tokenizer, tmp_path / "pairs.json", batch_size=3)
    for defect, values in right.items():
        assert report["by_defect"][defect]["count"] == len(values)
        assert report["by_defect"][defect]["accuracy"] == pytest.approx(sum(values) / len(values))
    assert report["scores"]["accuracy"] == pytest.approx(sum(map(sum, right.values())) / 20)
    assert report["intervals"].keys() == {"loss", "accuracy", "margin"}
    assert all(low <= report["scores"][name] <= high for name, (low, high) in report["intervals"].items())


# -- the command line --------------------------------------------------------------------------------------------------


@pytest.fixture
def checkpoint(model, tokenizer, tmp_path):
    def save(stage):
        path = tmp_path / f"{stage}_best.pth"
        state = (RewardModel(model) if stage == "reward" else model).state_dict()
        save_checkpoint(path, model_state=state, config=model.config, tokenizer=tokenizer, stage=stage)
        return str(path)

    return save


def test_command_line_scores_answers_and_writes_a_report(checkpoint, tmp_path, capsys):
    """A table by skill, one line of summary, and a JSON file beside the checkpoint with every answer."""
    records = [
        {"instruction": f"{a}+1?", "response": str(a + 1), "answer": str(a + 1), "skill": "addition", "language": "en"}
        for a in range(5)
    ]
    (tmp_path / "test.json").write_text(json.dumps(records), encoding="utf-8")
    evaluator.main(["--model_path", checkpoint("sft"), "--test_data_path", str(tmp_path / "test.json")])
    output = capsys.readouterr().out
    assert output.splitlines()[0].startswith("skill")
    for words in ("5 questions, exact", "ROUGE-1 ", "ROUGE-2 ", "ROUGE-L ", "perplexity ", "next token right "):
        assert words in output.splitlines()[-1]
    report = json.loads((tmp_path / "sft_best_eval.json").read_text(encoding="utf-8"))
    assert report["stage"] == "sft"
    assert report["by_skill"]["addition"]["count"] == len(report["predictions"]) == 5
    assert not list(tmp_path.glob(".*.tmp"))


def test_command_line_scores_text_for_a_pretrained_checkpoint(checkpoint, model, tokenizer, tmp_path, capsys):
    """The checkpoint's stage decides; the report holds perplexity and a few continuations."""
    (tmp_path / "val.txt").write_text("\n".join(TEXTS), encoding="utf-8")
    path, output_path = checkpoint("pretrain"), tmp_path / "scores.json"
    evaluator.main(["--model_path", path, "--test_data_path", str(tmp_path / "val"), "--output_path", str(output_path)])
    report = json.loads(output_path.read_text(encoding="utf-8"))
    assert report["model_type"] == "pretrain"
    assert report["scores"]["bytes"] == sum(len(text.encode()) for text in TEXTS)
    assert len(report["predictions"]) == len(TEXTS)
    output = capsys.readouterr().out
    assert "bits per byte (one stream, as val_bpb in training); each document by itself: perplexity " in output
    as_documents = GPTEvaluator(model, tokenizer).compute_perplexity(TEXTS, as_documents=True)
    assert report["scores"]["document_loss"] == pytest.approx(as_documents["loss"], rel=1e-5)
    assert report["scores"]["document_loss"] != pytest.approx(report["scores"]["loss"], rel=1e-3)


def test_command_line_scores_preferences_for_a_reward_checkpoint(checkpoint, tmp_path, capsys):
    pair = {"instruction": "a?", "chosen": "b.", "rejected": "c", "defect": "wrong"}
    (tmp_path / "pairs.jsonl").write_text(json.dumps(pair), encoding="utf-8")
    evaluator.main(["--model_path", checkpoint("reward"), "--test_data_path", str(tmp_path / "pairs.jsonl")])
    report = json.loads((tmp_path / "reward_best_eval.json").read_text(encoding="utf-8"))
    assert report["model_type"] == "reward"
    assert report["by_defect"]["wrong"]["count"] == 1
    assert "1 pairs" in capsys.readouterr().out


@pytest.mark.parametrize("kind", ["sft", "pretrain"])
def test_an_interrupted_evaluation_goes_on(kind, checkpoint, tmp_path, monkeypatch, capsys):
    """Stopped in the middle and started again, it computes only the rest, and the result is the same."""
    path, data = checkpoint(kind), tmp_path / ("test.json" if kind == "sft" else "val.txt")
    records = [{"instruction": f"{a}+1?", "response": str(a + 1)} for a in range(5)]
    data.write_text(json.dumps(records) if kind == "sft" else "\n".join(TEXTS), encoding="utf-8")
    monkeypatch.setattr(evaluator, "PIECE", 2)
    name = "_answered" if kind == "sft" else "_score_windows"
    compute, calls = getattr(GPTEvaluator, name), []

    def interrupted(*arguments):
        calls.append(1)
        if len(calls) == 2:
            raise KeyboardInterrupt
        return compute(*arguments)

    monkeypatch.setattr(GPTEvaluator, name, interrupted)
    arguments = ["--model_path", path, "--test_data_path", str(data), "--max_gen_len", "4", "--temperature", "1"]
    output = tmp_path / "scores.json"
    with pytest.raises(KeyboardInterrupt):
        evaluator.main([*arguments, "--output_path", str(output)])
    assert not output.exists() and (tmp_path / "scores_unfinished.jsonl").is_file()
    evaluator.main([*arguments, "--output_path", str(output)])
    assert "going on with 1 finished pieces" in capsys.readouterr().out
    assert not (tmp_path / "scores_unfinished.jsonl").exists()
    assert len(calls) == (4 if kind == "sft" else 5)
    evaluator.main([*arguments, "--output_path", str(tmp_path / "whole.json")])
    one, other = (json.loads(file.read_text(encoding="utf-8")) for file in (output, tmp_path / "whole.json"))
    assert {**one, "seconds": 0} == {**other, "seconds": 0}
    page = output.with_suffix(".html").read_text(encoding="utf-8")
    assert "<script" not in page and "95 % interval" in page


def test_calibration_and_accuracy_by_hand(model, tokenizer):
    """Tokens in bins of the likeliest one's probability: how many there are, how often it is right."""
    bins = {}
    model.eval()
    for text in TEXTS:
        ids = tokenizer.encode(text)["input_ids"]
        with torch.no_grad():
            probabilities = model(torch.tensor([ids]))["logits"][0, :-1].softmax(dim=-1)
        for row, token in zip(probabilities, ids[1:], strict=True):
            bins.setdefault(int(row.max() * 15), []).append((int(row.argmax()) == token, float(row.max())))
    report = GPTEvaluator(model, tokenizer).score_texts(TEXTS, as_documents=True)
    cells = [bins[place] for place in sorted(bins)]
    for cell, (count, right, confidence) in zip(cells, report["calibration"], strict=True):
        assert count == len(cell)
        assert right == pytest.approx(sum(hit for hit, _ in cell) / count)
        assert confidence == pytest.approx(sum(share for _, share in cell) / count, rel=1e-4)
    total = sum(map(len, cells))
    gaps = sum(abs(sum(hit - share for hit, share in cell)) for cell in cells)
    assert report["scores"]["calibration_error"] == pytest.approx(gaps / total, rel=1e-3)
    assert report["scores"]["token_accuracy"] == pytest.approx(sum(hit for cell in cells for hit, _ in cell) / total)
    low, high = report["intervals"]["perplexity"]
    assert low < report["scores"]["perplexity"] < high
    by_hand = [nats_by_hand(model, tokenizer, text) for text in TEXTS]
    assert report["worst"][0]["loss"] == pytest.approx(max(sum(nats) / len(nats) for nats in by_hand), rel=1e-4)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--model_path", "missing.pth"], "missing.pth does not exist"),
        (["--max_samples", "0"], "--max_samples must be at least 1"),
        (["--temperature", "-1", "--batch_size", "0"], "--temperature .*--batch_size"),
        (["--model_typ", "sft"], "unrecognized arguments: --model_typ"),
        (["--model_type", "poem"], "invalid choice: 'poem'"),
    ],
)
def test_mistakes_are_named_before_any_work(arguments, message, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(UserError, match=message):
        evaluator.main(arguments)


def test_nothing_is_written_when_the_test_data_is_missing(checkpoint, tmp_path):
    path = checkpoint("sft")
    with pytest.raises(UserError, match="there is no data at .*nowhere"):
        evaluator.main(["--model_path", path, "--test_data_path", str(tmp_path / "nowhere")])
    assert not (tmp_path / "sft_best_eval.json").exists()
