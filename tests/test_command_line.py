"""A documented dataclass becomes a command line; a user's mistake becomes one sentence and exit status 2."""

import errno
import importlib
import os
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar

import pytest

import finetune
from command_line import UserError, option, parse_config, replacing, require_file, run_main

ROOT = Path(__file__).resolve().parent.parent


@dataclass
class Config:
    """Settings of every kind that the scripts use."""

    presets: ClassVar[dict] = {"tiny": {"lr": 0.5, "size": 2}, "large": {"size": 99}}

    lr: float = option(1e-3, "peak learning rate", above=0)
    size: int = option(8, "width, about 2 %% of everything", at_least=1, at_most=99)
    name: str = option("run", "name of the run")
    fast: bool = option(False, "hurry")
    kind: str = option("a", "which kind", choices=("a", "b"))
    limit: int | None = option(None, "at most so many, or no limit")
    parts: list[int] = option(list, "sizes of parts")

    def validate(self) -> list[str]:
        return ["--size must be even with --kind b"] if self.kind == "b" and self.size % 2 else []


def parse(*argv):
    return parse_config(Config, argv, description="try it")


def test_without_arguments_the_defaults_hold():
    assert parse() == Config()
    assert parse().given == frozenset()


def test_every_kind_of_value_is_read():
    line = "--lr 2e-4 --size 16 --name x --fast true --kind b --limit 7 --parts 1 2 3"
    config = parse(*line.split())
    assert config == Config(lr=2e-4, size=16, name="x", fast=True, kind="b", limit=7, parts=[1, 2, 3])
    assert config.given == {"lr", "size", "name", "fast", "kind", "limit", "parts"}


def test_an_option_of_several_values_may_be_repeated():
    """As people write it: none of the values is lost."""
    assert parse("--parts", "1", "2", "--parts", "3").parts == parse("--parts", "1", "2", "3").parts == [1, 2, 3]
    assert parse().parts == []


@pytest.mark.parametrize(
    ("words", "expected"),
    [(["--fast"], True), (["--fast", "False"], False), (["--fast", "no"], False), (["--fast=1"], True), ([], False)],
)
def test_a_switch_may_stand_alone_or_have_a_word(words, expected):
    assert parse(*words).fast is expected


def test_a_preset_sets_several_options_and_explicit_ones_win():
    """Whatever their order; what was explicit can be told from what the preset brought."""
    assert (parse("--preset", "tiny").lr, parse("--preset", "tiny").size) == (0.5, 2)
    for line in ("--preset tiny --size 5", "--size 5 --preset tiny"):
        config = parse(*line.split())
        assert (config.lr, config.size, config.given) == (0.5, 5, {"size", "preset"})


def test_configurations_do_not_share_a_list():
    parse().parts.append(1)
    assert parse().parts == []


@pytest.mark.parametrize(
    ("line", "complaint"),
    [
        ("--sizes 3", "unrecognized arguments: --sizes 3"),
        ("--siz 3", "unrecognized arguments: --siz 3"),  # no guessing: a typing error is not an abbreviation
        ("stray", "unrecognized arguments: stray"),
        ("--size three", "argument --size: invalid int value: 'three'"),
        ("--size", "argument --size: expected one argument"),
        ("--lr fast", "argument --lr: invalid float value: 'fast'"),
        ("--fast maybe", "expected true or false, not 'maybe'"),
        ("--kind c", "argument --kind: invalid choice: 'c'"),
        ("--preset huge", "argument --preset: invalid choice: 'huge'"),
    ],
)
def test_a_wrong_option_is_named_and_help_is_pointed_to(line, complaint):
    with pytest.raises(UserError) as caught:
        parse(*line.split())
    assert complaint in str(caught.value)
    assert "--help` lists the options" in str(caught.value)


def test_all_mistakes_are_reported_at_once():
    """Numbers beyond their bounds, and what does not fit together."""
    with pytest.raises(UserError) as caught:
        parse("--size", "101", "--lr", "-1", "--kind", "b")
    assert str(caught.value).split("; ") == [
        "--lr must be above 0, not -1.0",
        "--size must be at least 1 and at most 99, not 101",
        "--size must be even with --kind b",
    ]


@pytest.mark.parametrize("number", ["0", "nan", "inf", "-inf"])
def test_a_number_with_a_bound_is_a_number(number):
    """No comparison with NaN is true, and infinity is above every bound."""
    with pytest.raises(UserError, match="--lr must be above 0, not"):
        parse(f"--lr={number}")


def test_an_inherited_default_can_be_changed_alone(capsys):
    """What `option` said of the field still holds, and can be said anew in part."""

    @dataclass
    class Heir(Config):
        lr: float = 0.25
        size: int = option(4, "height", at_least=2)
        kind: str = "b"

    assert parse_config(Heir, [], description="").lr == 0.25
    with pytest.raises(UserError, match="--lr must be above 0, not -1.0; --size must be at least 2, not 1"):
        parse_config(Heir, ["--lr", "-1", "--size", "1", "--kind", "a"], description="")
    with pytest.raises(UserError, match="--kind: invalid choice: 'c'"):
        parse_config(Heir, ["--kind", "c"], description="")
    with pytest.raises(SystemExit):
        parse_config(Heir, ["--help"], description="")
    text = " ".join(capsys.readouterr().out.split())
    assert "peak learning rate (above 0; default: 0.25)" in text
    assert "height (at least 2; default: 4)" in text


def test_an_unknown_bound_is_the_programmers_mistake():
    with pytest.raises(TypeError, match="atleast"):
        option(1, "number", atleast=3)


def test_help_shows_every_field_with_its_default(capsys):
    with pytest.raises(SystemExit) as exit_:
        parse("--help")
    text = " ".join(capsys.readouterr().out.split())
    assert exit_.value.code == 0
    assert "try it" in text
    assert "peak learning rate (above 0; default: 0.001)" in text
    assert "about 2 % of everything (at least 1 and at most 99; default: 8)" in text
    assert "--kind {a,b}" in text
    assert "--preset {tiny,large}" in text


@pytest.mark.parametrize("script", ["byte_level_bpe", "pretrain_trainer", "finetune", "evaluator"])
def test_the_help_of_every_script_can_be_printed(script, capsys):
    """A stray % in a help text, or two options of one name, would break it."""
    module = importlib.import_module(script)
    for mode in getattr(module, "MODES", [None]):
        with pytest.raises(SystemExit) as exit_:
            module.main([*(["--mode", mode] if mode else []), "--help"])
        assert exit_.value.code == 0
        assert "usage:" in capsys.readouterr().out


def test_preferences_may_be_called_data(monkeypatch):
    """`--data_path` names the data of every mode; twice is once too often."""
    runs_of: list = []
    modes = {mode: (config, runs_of.append, text) for mode, (config, _, text) in finetune.MODES.items()}
    monkeypatch.setattr(finetune, "MODES", modes)
    for mode in ("rlhf", "reward", "dpo", "kto"):
        finetune.main(["--mode", mode, "--data_path=mine.json", "--val_data_path", "held_out.json"])
        assert (runs_of[-1].pairwise_data, runs_of[-1].val_pairwise_data) == ("mine.json", "held_out.json")
    finetune.main(["--mode", "sft", "--data_path", "mine.json"])
    assert runs_of[-1].data_path == "mine.json"
    with pytest.raises(UserError, match="--data_path and --pairwise_data are two names of one thing"):
        finetune.main(["--mode", "dpo", "--data_path", "a.json", "--pairwise_data", "b.json"])


# ------------------------------------------------------------------------------------------------------- exit statuses


SCRIPT = """
import os, signal
from command_line import Interrupted, UserError, run_main
def main():
    {}
run_main(main)
"""


def run_script(statement):
    """What a script that ends as every script of the project does leaves behind."""
    return subprocess.run([sys.executable, "-c", SCRIPT.format(statement)], cwd=ROOT, capture_output=True, text=True)


def test_success_is_0():
    done = run_script("print('made it')")
    assert (done.returncode, done.stdout, done.stderr) == (0, "made it\n", "")


def test_a_users_mistake_is_one_sentence_and_2():
    done = run_script("raise UserError('the file x is missing; make it')")
    assert (done.returncode, done.stderr) == (2, "error: the file x is missing; make it\n")


def test_a_mistake_of_ours_keeps_its_traceback():
    done = run_script("1 / 0")
    assert done.returncode == 1
    assert "ZeroDivisionError" in done.stderr


@pytest.mark.parametrize("statement", ["os.kill(os.getpid(), signal.SIGINT)", "raise Interrupted('saved at step 3')"])
def test_an_interruption_is_130_without_a_traceback(statement):
    done = run_script(statement)
    assert done.returncode == 130
    assert done.stderr in ("interrupted\n", "saved at step 3\n")


def test_run_main_inside_a_process_leaves_by_system_exit():
    with pytest.raises(SystemExit) as exit_:
        run_main(lambda: None)
    assert exit_.value.code == 0


def test_require_file(tmp_path):
    path = tmp_path / "there.txt"
    path.write_text("")
    assert require_file(str(path), "the data") == path
    with pytest.raises(UserError, match=r"the data .*gone\.txt does not exist; check the path"):
        require_file(tmp_path / "gone.txt", "the data")
    with pytest.raises(UserError, match="the data .* is a folder, not a file; make one"):
        require_file(tmp_path, "the data", "make one")


# --------------------------------------------------------------------------------------------------- replacing a file


def test_a_file_is_replaced_in_one_move_when_it_is_whole(tmp_path):
    """Its folder is made, its mode is that of any new file, and until the end the old content is what is read."""
    path = tmp_path / "new" / "a.json"
    for content in (b"first", b"second"):
        with replacing(path) as file:
            file.write(content)
            file.flush()
            assert path.read_bytes() == b"first" if content == b"second" else not path.exists()
        assert path.read_bytes() == content
    (tmp_path / "plain").write_bytes(b"")
    assert path.stat().st_mode == (tmp_path / "plain").stat().st_mode
    assert list(path.parent.iterdir()) == [path]


@pytest.mark.parametrize("mistake", [KeyboardInterrupt, ValueError, OSError])
def test_what_goes_wrong_while_writing_leaves_the_old_file_and_no_other(mistake, tmp_path):
    path = tmp_path / "a.json"
    path.write_bytes(b"old")
    with pytest.raises(mistake), replacing(str(path)) as file:
        file.write(b"half")
        raise mistake
    assert path.read_bytes() == b"old"
    assert list(tmp_path.iterdir()) == [path]


def test_a_file_that_cannot_take_its_place_is_not_left_behind(tmp_path):
    (tmp_path / "a.json").mkdir()
    with pytest.raises(IsADirectoryError), replacing(tmp_path / "a.json") as file:
        file.write(b"new")
    assert [path.name for path in tmp_path.iterdir()] == ["a.json"]


def test_with_a_remedy_a_file_that_cannot_be_written_is_a_sentence(tmp_path):
    """Whether its folder cannot be made or the disk fails; other mistakes stay what they are."""
    (tmp_path / "file").write_bytes(b"")
    path = tmp_path / "file" / "a.json"
    unmade = rf"{path} cannot be written \((Not a directory|File exists)\); go elsewhere"
    with pytest.raises(UserError, match=unmade), replacing(path, "go elsewhere"):
        pass
    full = r"a.json cannot be written \(No space left on device\); go elsewhere"
    with pytest.raises(UserError, match=full), replacing(tmp_path / "a.json", "go elsewhere"):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
    with pytest.raises(ValueError), replacing(tmp_path / "a.json", "go elsewhere"):
        raise ValueError
    assert [path.name for path in tmp_path.iterdir()] == ["file"]


def test_two_who_write_the_same_file_do_not_disturb_each_other(tmp_path):
    """The one that is done last wins."""
    path = tmp_path / "a.json"
    with replacing(path) as first:
        first.write(b"first")
        with replacing(path) as second:
            second.write(b"second")
        assert path.read_bytes() == b"second"
    assert path.read_bytes() == b"first"
    assert list(tmp_path.iterdir()) == [path]
