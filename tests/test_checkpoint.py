"""A checkpoint describes itself and is never half a file; a damaged or foreign one is refused in one sentence."""

import json
import os
import pickle
import random
import shutil
import signal
import subprocess
import sys
import time
import zipfile
from dataclasses import asdict, replace
from pathlib import Path

import pytest
import torch

import checkpoint
from byte_level_bpe import ByteLevelBPETokenizer
from checkpoint import (
    config_of,
    load_checkpoint,
    load_model,
    load_weights,
    require_disk_space,
    require_same_model,
    save_checkpoint,
)
from command_line import UserError

ROOT = Path(__file__).resolve().parent.parent


@pytest.fixture(scope="module")
def model(random_model, tokenizer):
    return random_model("modern", vocab_size=len(tokenizer), d_model=16, max_seq_len=16)


@pytest.fixture
def save(model, tokenizer):
    """A function (path, **what differs) that saves `model`."""

    def write(path, **different):
        content = dict(model_state=model.state_dict(), config=model.config, tokenizer=tokenizer, stage="pretrain")
        return save_checkpoint(path, **{**content, **different})

    return write


def same(first, second):
    """Whether two nested structures hold the same values, tensors compared bit by bit."""
    if torch.is_tensor(first) and torch.is_tensor(second):
        return first.dtype == second.dtype and torch.equal(first, second)
    if isinstance(first, dict) and isinstance(second, dict):
        return list(first) == list(second) and all(same(first[key], second[key]) for key in first)
    if isinstance(first, list | tuple) and isinstance(second, list | tuple):
        return len(first) == len(second) and all(map(same, first, second))
    return type(first) is type(second) and first == second


# -------------------------------------------------------------------------------------------------- what is in the file


def test_a_checkpoint_gives_back_what_was_saved(save, model, tokenizer, tmp_path):
    training_state = {"optimizer": {"state": {0: {"exp_avg": torch.randn(3)}}}, "random": [torch.get_rng_state()]}
    path = save(
        tmp_path / "deep" / "er" / "a.pth", step=7, metrics={"val_loss": 1.5}, training_state=training_state, note="x"
    )
    content = load_checkpoint(path)
    assert same(content["model"], dict(model.state_dict()))
    assert content["config"] == asdict(model.config)
    assert (content["stage"], content["step"], content["metrics"], content["note"]) == (
        "pretrain",
        7,
        {"val_loss": 1.5},
        "x",
    )
    assert same(content["training_state"], training_state)
    assert content["tokenizer"]["fingerprint"] == tokenizer.fingerprint
    assert content["versions"]["torch"] == str(torch.__version__)
    assert "command" in content
    assert "training_state" not in load_checkpoint(save(tmp_path / "b.pth"))


def test_the_format_is_what_torch_itself_opens_safely(save, tmp_path):
    """With weights_only=True and mmap=True; tied weights are stored once."""
    path = save(tmp_path / "a.pth")
    content = torch.load(path, weights_only=True, mmap=True)
    weights = content["model"]
    assert weights["lm_head.weight"].data_ptr() == weights["token_embedding.weight"].data_ptr()
    assert all(zipfile.ZipFile(path).getinfo(name).CRC for name in zipfile.ZipFile(path).namelist() if "/data/" in name)


def test_a_model_is_loaded_without_being_told_anything(architecture, random_model, tokenizer, tmp_path):
    """Sizes, architecture and tokenizer come from the file; it computes what it computed."""
    model = random_model(architecture, vocab_size=len(tokenizer), tie_embeddings=False)
    path = save_checkpoint(
        tmp_path / "a.pth", model_state=model.state_dict(), config=model.config, tokenizer=tokenizer, stage="sft"
    )
    loaded, its_tokenizer, content = load_model(str(path))
    ids = torch.tensor([its_tokenizer.encode("法国的首都是 Paris.")["input_ids"]])
    assert torch.equal(loaded(ids)["logits"], model(ids)["logits"])
    assert not loaded.training
    assert loaded.config == model.config
    assert its_tokenizer.fingerprint == tokenizer.fingerprint
    assert content["stage"] == "sft"


def test_a_loaded_model_survives_its_file(save, tmp_path):
    """The weights of a loaded model are its own: replacing or deleting the file changes nothing."""
    path = save(tmp_path / "a.pth")
    loaded, _, _ = load_model(path)
    before = {name: value.clone() for name, value in loaded.state_dict().items()}
    path.write_bytes(b"\0" * path.stat().st_size)
    assert same(dict(loaded.state_dict()), before)


# -------------------------------------------------------------------------------------------------------- damaged files


def test_a_flipped_byte_anywhere_is_noticed(save, tmp_path):
    """In weights, names, checksums and directories: either the file is refused, or what it says is unchanged (as in
    time stamps and filling bytes); it is never read as something else, and never a traceback."""
    path = save(tmp_path / "a.pth", step=3)
    good, expected = path.read_bytes(), load_checkpoint(path)
    expected = pickle.loads(pickle.dumps(expected))  # away from the file, which is about to change
    with zipfile.ZipFile(path) as archive:
        records = [(info.header_offset, info.filename, info.file_size) for info in archive.infolist()]
        directory = archive.start_dir
    generator = random.Random(0)
    offsets = set(range(directory, len(good), 4)) | {generator.randrange(len(good)) for _ in range(250)}
    for start, _, size in records:
        offsets |= set(range(start, start + 30)) if start < 2000 or start > directory - 2000 else {start, start + 8}
        offsets.add(min(start + 128 + size // 2, len(good) - 1))
    damaged, refused = tmp_path / "damaged.pth", 0
    for offset in sorted(offsets):
        bit = 1 << generator.randrange(8)
        damaged.write_bytes(good[:offset] + bytes([good[offset] ^ bit]) + good[offset + 1 :])
        try:
            assert same(load_checkpoint(damaged), expected), f"byte {offset}"
        except UserError as error:
            assert str(damaged) in str(error)
            refused += 1
        damaged.unlink()  # a file that is mapped into memory must not change under its reader
    assert len(offsets) > 500
    assert refused > 0.5 * len(offsets)


def test_every_flipped_bit_of_a_weight_is_refused(save, tmp_path):
    path = save(tmp_path / "a.pth")
    good = path.read_bytes()
    weight = torch.load(path, weights_only=True)["model"]["token_embedding.weight"].numpy().tobytes()
    start = good.index(weight)
    for offset in range(start, start + len(weight), len(weight) // 40):
        path.write_bytes(good[:offset] + bytes([good[offset] ^ 0x10]) + good[offset + 1 :])
        with pytest.raises(UserError, match=r"the checkpoint .*a\.pth is damaged; use another one"):
            load_checkpoint(path)


def test_a_truncated_file_is_refused_at_any_length(save, tmp_path):
    path = save(tmp_path / "a.pth")
    good = path.read_bytes()
    lengths = [0, 1, 4, 22, 30, 64, *range(100, len(good), len(good) // 50), *range(len(good) - 30, len(good))]
    for length in lengths:
        path.write_bytes(good[:length])
        with pytest.raises(UserError, match=r"the checkpoint .*a\.pth is damaged"):
            load_checkpoint(path)


@pytest.mark.parametrize("junk", [b"\0" * 100, b"PK\x03\x04", os.urandom(50)], ids=["zeros", "zip", "random"])
def test_a_file_with_something_in_front_or_behind_is_no_silent_success(junk, save, tmp_path):
    """Half of another file before it, or bytes after it: refused, or exactly what was saved."""
    path = save(tmp_path / "a.pth")
    good, expected = path.read_bytes(), pickle.loads(pickle.dumps(load_checkpoint(path)))
    for name, data in (("front.pth", junk + good), ("behind.pth", good + junk)):
        (tmp_path / name).write_bytes(data)
        try:
            assert same(load_checkpoint(tmp_path / name), expected)
        except UserError as error:
            assert name in str(error)


class Intruder:
    """A pickle that would run a command if it were trusted."""

    def __init__(self, path):
        self.path = str(path)

    def __reduce__(self):
        return os.system, (f"touch {self.path}",)


def foreign_files(folder):
    """Files of other origin, by name."""
    with zipfile.ZipFile(folder / "plain.zip", "w") as archive:
        archive.writestr("a.txt", "hello")
    (folder / "legacy.pkl").write_bytes(pickle.dumps({"model": [1, 2, 3]}))
    torch.save({"model": torch.ones(3)}, folder / "state.pth")
    torch.save({"model": torch.ones(3)}, folder / "old_format.pth", _use_new_zipfile_serialization=False)
    torch.save([1, 2], folder / "list.pth")
    torch.save({"format": "gpt-checkpoint/99"}, folder / "future.pth")
    torch.save({"format": torch.ones(2)}, folder / "tensor_format.pth")
    torch.save({"format": "gpt-checkpoint/1", "x": Intruder(folder / "intruded")}, folder / "intruder.pth")
    (folder / "text.pth").write_text("this is a text\n" * 100)
    (folder / "empty.pth").write_bytes(b"")
    return sorted(path.name for path in folder.iterdir())


def test_foreign_files_are_refused_and_never_executed(tmp_path):
    """Zip archives, pickles, state dicts of other projects, texts, newer formats, and one that means harm."""
    for name in foreign_files(tmp_path):
        with pytest.raises(UserError, match=f"{name} is (not a checkpoint of this project|damaged)"):
            load_checkpoint(tmp_path / name)
    assert not (tmp_path / "intruded").exists()


def test_a_missing_file_and_a_folder_are_named(tmp_path):
    with pytest.raises(UserError, match=r"the checkpoint .*gone\.pth does not exist"):
        load_checkpoint(tmp_path / "gone.pth")
    with pytest.raises(UserError, match="is a folder, not a file"):
        load_checkpoint(tmp_path)


# ------------------------------------------------------------------------------------------------- other kinds of model


def test_what_is_no_language_model_in_full_precision_says_what_to_give(save, tmp_path):
    with pytest.raises(UserError, match="is quantized .int8.; give the checkpoint it was made from"):
        load_model(save(tmp_path / "q.pth", quantization="int8"))
    with pytest.raises(UserError, match="is a reward model, which writes no text"):
        load_model(save(tmp_path / "r.pth", stage="reward"))


def test_weights_of_another_architecture_are_named(save, model, random_model, tokenizer, tmp_path):
    path = save(tmp_path / "a.pth", config=replace(model.config, n_layers=3))
    with pytest.raises(UserError, match=r"a\.pth holds another architecture than expected .*layers\.2"):
        load_model(path)
    other = random_model("modern", vocab_size=len(tokenizer), d_model=32)
    with pytest.raises(UserError, match="another architecture .*size mismatch for token_embedding.weight"):
        load_weights(other, load_checkpoint(path)["model"], path)


def test_settings_of_a_newer_version_are_named(save, tmp_path):
    content = load_checkpoint(save(tmp_path / "a.pth"))
    content["config"] = {**content["config"], "flux": 3}
    with pytest.raises(UserError, match=r"a\.pth needs a newer version of this project .unknown settings: flux."):
        config_of(content, tmp_path / "a.pth")


def test_another_architecture_or_tokenizer_is_refused_with_the_difference(save, model, tokenizer, corpus, tmp_path):
    """What continues from a checkpoint has to be the same; dropout may differ."""
    path = save(tmp_path / "a.pth")
    content = load_checkpoint(path)
    require_same_model(content, replace(model.config, dropout=0.3), tokenizer, path)
    with pytest.raises(
        UserError, match=r"another architecture .d_ff 64 there, 128 here, max_seq_len 16 there, 32 here."
    ):
        require_same_model(content, replace(model.config, d_ff=128, max_seq_len=32), tokenizer, path)
    other = ByteLevelBPETokenizer(vocab_size=300)
    other.train(corpus)
    with pytest.raises(UserError, match=r"a\.pth was trained with another tokenizer; use that one"):
        require_same_model(content, model.config, other, path)


# ------------------------------------------------------------------------------------------------------- while saving

SAVER = """
import itertools, os, sys, torch
from byte_level_bpe import ByteLevelBPETokenizer
from checkpoint import save_checkpoint
from gpt_model import GPTConfig
path, config, tokenizer = sys.argv[1], GPTConfig(64, 16, 1, 2), ByteLevelBPETokenizer.from_pretrained(sys.argv[2])
def save_for_ever():
    for step in itertools.count(1):
        state = {"weight": torch.full((1_500_000,), float(step)), "more": torch.full((300,), float(step))}
        save_checkpoint(path, model_state=state, config=config, tokenizer=tokenizer, stage="sft", step=step)
"""


def start_saver(end, tmp_path, tokenizer):
    """A process that runs SAVER and then `end`."""
    tokenizer.save(tmp_path / "tokenizer")
    command = [sys.executable, "-c", SAVER + end, str(tmp_path / "a.pth"), str(tmp_path / "tokenizer")]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    pipes = dict(stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    return subprocess.Popen(command, cwd=ROOT, env=environment, text=True, **pipes)


def test_kill_9_at_any_moment_leaves_a_whole_checkpoint(tokenizer, tmp_path):
    """Real processes that only save, killed at moments spread over their cycle; what is left belongs to one step."""
    fork = """
for line in sys.stdin:  # one import of torch for all victims
    child = os.fork() or save_for_ever()
    print(child, flush=True)
    os.waitpid(child, 0)
    print("gone", flush=True)
"""
    parent, path = start_saver(fork, tmp_path, tokenizer), tmp_path / "a.pth"
    generator, interrupted, victims = random.Random(0), 0, 0
    while victims < 8 or (not interrupted and victims < 100):  # on a busy machine, few kills come in time
        victims += 1
        path.unlink(missing_ok=True)
        parent.stdin.write("next\n")
        parent.stdin.flush()
        child = int(parent.stdout.readline())
        while not path.exists():
            time.sleep(0.002)
        time.sleep(generator.uniform(0, 0.05))
        os.kill(child, signal.SIGKILL)
        assert parent.stdout.readline() == "gone\n"
        content = load_checkpoint(path)
        assert content["model"]["weight"].eq(content["step"]).all()
        assert content["model"]["more"].eq(content["step"]).all()
        interrupted += any(tmp_path.glob(".a.pth.*.tmp"))
    parent.communicate()
    assert interrupted > 0  # at least one kill came in the middle of a write


def test_the_old_file_is_replaced_and_never_written_into(save, tmp_path):
    """Whoever has it open or mapped goes on reading the old one, to its end."""
    path = save(tmp_path / "a.pth", step=1)
    (tmp_path / "old.pth").hardlink_to(path)
    before, opened = path.read_bytes(), load_checkpoint(path)
    save(path, step=2, model_state={name: value + 1 for name, value in opened["model"].items()})
    assert (tmp_path / "old.pth").read_bytes() == before
    assert (opened["step"], load_checkpoint(path)["step"]) == (1, 2)


@pytest.mark.parametrize("limit", [0, 2_000_000])
def test_a_write_that_fails_keeps_the_old_checkpoint(limit, save, tokenizer, tmp_path):
    """At the first byte or in the middle; one sentence, no temporary file left."""
    path = save(tmp_path / "a.pth", step=41)
    before = path.read_bytes()
    limited = f"import resource\nresource.setrlimit(resource.RLIMIT_FSIZE, ({limit}, {limit}))\nsave_for_ever()"
    _, message = start_saver(limited, tmp_path, tokenizer).communicate()
    assert f"UserError: cannot save {path}: File too large; free some space" in message
    assert path.read_bytes() == before
    assert sorted(file.name for file in tmp_path.iterdir()) == ["a.pth", "tokenizer"]


@pytest.fixture
def small_disk(tmp_path):
    """A real file system of 1.5 MiB; needs root."""
    folder = tmp_path / "disk"
    folder.mkdir()
    mount = shutil.which("mount")
    if (
        not mount
        or subprocess.run([mount, "-t", "tmpfs", "-o", "size=1536k", "tmpfs", folder], capture_output=True).returncode
    ):
        pytest.skip("cannot mount a small disk here")
    yield folder
    subprocess.run([shutil.which("umount"), "-l", folder], check=True)


def test_a_full_disk_keeps_the_old_checkpoint_and_says_so(small_disk, save, model):
    path = save(small_disk / "a.pth", step=41)
    large = {**model.state_dict(), "extra": torch.ones(500_000)}
    with pytest.raises(UserError, match=r"cannot save .*a\.pth: the disk is full; free some space"):
        save(path, model_state=large, step=42)
    assert [file.name for file in small_disk.iterdir()] == ["a.pth"]
    assert load_checkpoint(path)["step"] == 41
    save(path, step=43)  # and there is room again for one that fits
    assert load_checkpoint(path)["step"] == 43
    with pytest.raises(UserError, match="has 1 MiB of free disk and this run needs about 9 MiB"):
        require_disk_space(small_disk / "models" / "run", 9 << 20)


def test_a_folder_that_cannot_be_made_is_one_sentence(save, tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match="cannot save .*: File exists; free some space or choose another --output_dir"):
        save(tmp_path / "file" / "a.pth")


def test_ctrl_c_while_saving_leaves_no_temporary_file(save, tmp_path, monkeypatch):
    path = save(tmp_path / "a.pth", step=1)

    def interrupted(content, file):
        file.write(b"half")
        raise KeyboardInterrupt

    monkeypatch.setattr(checkpoint.torch, "save", interrupted)
    with pytest.raises(KeyboardInterrupt):
        save(path, step=2)
    assert [file.name for file in tmp_path.iterdir()] == ["a.pth"]
    assert load_checkpoint(path)["step"] == 1


def test_the_tokenizer_inside_is_plain_json(save, tmp_path):
    """Anything that reads the checkpoint can write the tokenizer's folder."""
    files = load_checkpoint(save(tmp_path / "a.pth"))["tokenizer"]["files"]
    assert "vocab" in json.loads(files["tokenizer.json"])["model"]
