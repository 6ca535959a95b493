"""Classification: figures as scikit-learn defines them, labels travel with the model, a filter blocks by label."""

import json

import pytest
import torch

import finetune
from alignment.classify import ClassifyConfig, LabelledDataset, classify, label_figures, parse_labelled
from checkpoint import save_checkpoint
from command_line import UserError
from gpt_model import GPTConfig, GPTModel
from inference.service.filters import Filters
from inference.service.text_classifier import TextClassifier, load_classifier, load_filter_classifier
from training.run_log import read_metrics

POLITE, RUDE = ["谢谢你", "please help", "what is it", "你好吗"], ["滚开", "you fool", "idiot", "笨蛋"]


def records(n=48):
    """Polite and rude texts of many lengths."""
    return [
        {
            "text": f"{(RUDE if k % 3 == 0 else POLITE)[k % 4]} {'ab' * (k % 7)}",
            "label": "rude" if k % 3 == 0 else "fine",
        }
        for k in range(n)
    ]


@pytest.fixture(scope="module")
def folder(tmp_path_factory, tokenizer):
    """A small model, records, and the classifier that is trained from them."""
    folder = tmp_path_factory.mktemp("classify")
    torch.manual_seed(0)
    sizes = dict(d_model=32, n_layers=2, n_heads=2, max_seq_len=64)
    config = GPTConfig.for_architecture("modern", vocab_size=len(tokenizer), **sizes)
    state = GPTModel.from_config(config).state_dict()
    save_checkpoint(folder / "sft.pth", model_state=state, config=config, tokenizer=tokenizer, stage="sft")
    (folder / "data.json").write_text(json.dumps(records()), encoding="utf-8")
    paths = f"--data_path {folder}/data.json --val_data_path {folder}/data.json --sft_model {folder}/sft.pth"
    how = "--batch_size 16 --epochs 10 --lr 3e-3 --device cpu --precision fp32 --num_threads 1"
    finetune.main(f"--mode classify {paths} --output_dir {folder} {how}".split())
    return folder


def test_it_learns_and_is_evaluated(folder):
    last = [record for record in read_metrics(folder / "metrics.jsonl") if "val_f1" in record][-1]
    assert last["val_accuracy"] > 0.95 and last["val_f1"] > 0.95
    assert {"val_loss", "val_precision/fine", "val_recall/rude"} <= last.keys()


def test_labels_travel_with_the_model(folder):
    """In the order of --labels, or of the alphabet; padding and other rows of a batch change nothing."""
    model, tokenizer, labels = load_classifier(folder / "classify_best.pth")
    assert labels == ["fine", "rude"]
    data = LabelledDataset([parse_labelled(record, "record") for record in records(7)], tokenizer, 64)
    data.labels = labels
    batch = data.collate(data.samples)
    with torch.no_grad():
        together = model.logits(batch["input_ids"], batch["attention_mask"])
        alone = [
            model.logits(torch.tensor([ids]), torch.ones(1, len(ids), dtype=torch.long)) for ids, _ in data.samples
        ]
    assert torch.allclose(together, torch.cat(alone), atol=1e-5)


def test_it_serves_as_a_filter(folder, tmp_path):
    path = folder / "classify_best.pth"
    (tmp_path / "words.txt").write_text("forbidden", encoding="utf-8")
    filters = Filters.load([tmp_path], load_filter_classifier(path, []))
    assert filters.check("谢谢你") is None
    assert filters.check("you fool").entry == "rude"
    assert filters.check("谢谢你 " * 40 + "you fool " * 20).entry == "rude", "a long text is judged in parts"
    guard = filters.stream()
    assert [guard.feed("you "), guard.feed("fool"), guard.finish()] == ["", "", ""]
    assert guard.finding.entry == "rude"
    guard = filters.stream()
    assert [guard.feed("谢谢"), guard.feed("你"), guard.finish()] == ["", "", "谢谢你"]
    with pytest.raises(UserError, match="knows the labels fine, rude, not spam"):
        load_filter_classifier(path, ["spam"])
    with pytest.raises(UserError, match="is a sft model"):
        load_filter_classifier(folder / "sft.pth", [])


def test_figures_by_hand():
    truth = torch.tensor([0, 0, 0, 1, 1, 2])
    given = torch.tensor([0, 0, 1, 1, 0, 1])
    figures = label_figures(truth, torch.nn.functional.one_hot(given, 3).float(), "abc")
    assert figures["accuracy"] == pytest.approx(3 / 6)
    assert (figures["precision/a"], figures["recall/a"]) == (pytest.approx(2 / 3), pytest.approx(2 / 3))
    assert (figures["precision/b"], figures["recall/b"]) == (pytest.approx(1 / 3), pytest.approx(1 / 2))
    assert (figures["precision/c"], figures["recall/c"]) == (0, 0)
    assert figures["f1"] == pytest.approx((2 / 3 + 0.4 + 0) / 3)


def test_the_loss_is_cross_entropy(random_model):
    model = TextClassifier(random_model("modern"), 3)
    ids, label = torch.randint(4, 64, (4, 8)), torch.tensor([0, 1, 2, 1])
    output = model(ids, torch.ones_like(ids), label)
    expected = -model.logits(ids, torch.ones_like(ids)).log_softmax(1)[range(4), label].mean()
    assert torch.allclose(output["loss"], expected)


@pytest.mark.parametrize(
    ("record", "complaint"),
    [
        ({"label": "a"}, "record 1 has no text"),
        ({"text": " ", "label": "a"}, "record 1 has no text"),
        ({"text": "a"}, "record 1 has the label None"),
        ({"text": "a", "label": True}, "the label True"),
    ],
)
def test_malformed_records_are_refused(record, complaint):
    with pytest.raises(UserError, match=complaint):
        parse_labelled(record, "record 1")
    assert parse_labelled({"text": "a", "label": 3}, "record 1") == ("a", "3")


@pytest.mark.parametrize(
    ("data", "labels", "complaint"),
    [
        ([{"text": f"a{k}", "label": "x"} for k in range(50)], [], "the label x alone"),
        (records(), ["fine", "other"], "the label rude, which --labels does not name"),
    ],
)
def test_labels_that_do_not_fit_are_refused(folder, tmp_path, data, labels, complaint):
    (tmp_path / "data.json").write_text(json.dumps(data), encoding="utf-8")
    paths = dict(data_path=f"{tmp_path}/data.json", sft_model=f"{folder}/sft.pth", output_dir=str(tmp_path / "out"))
    with pytest.raises(UserError, match=complaint):
        classify(ClassifyConfig(**paths, labels=labels, device="cpu", num_threads=1))
