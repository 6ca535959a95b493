"""The whole way, without walking it: when a stage is skipped, continued or begun anew; how the service and the set-up
say that they cannot start; and what the report is made of. The run itself is `run_training.sh --smoke`, in .ci/run."""

import json
import re
import shutil
import subprocess
import sys
from importlib import metadata
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.specifiers import SpecifierSet

from command_line import Interrupted, UserError, parse_config
from evaluation.report import write_report
from pipeline import (
    PipelineConfig,
    Stage,
    build_stages,
    check_records,
    free_port,
    run_stage,
    running_service,
    settle,
    settle_context,
)
from training.run_log import plot_metrics

ROOT = Path(__file__).resolve().parent.parent

# A stage for tests: notes its arguments, leaves a checkpoint, and makes its output of its input, unless told to stop.
WORKER = """
import sys
from pathlib import Path
source, output, checkpoints, log, behaviour = map(Path, sys.argv[1:6])
checkpoints.mkdir(exist_ok=True, parents=True)
with log.open("a") as file:
    file.write(f"{output.name} {' '.join(sys.argv[6:])} {len(list(checkpoints.iterdir()))}\\n")
(checkpoints / "step_1").touch()
if behaviour.is_file():
    sys.exit(int(behaviour.read_text()))
output.write_text(source.read_text().upper())
"""


class Workshop:
    """Two stages in a folder, the second made of what the first makes."""

    def __init__(self, folder):
        self.folder = folder
        (folder / "worker.py").write_text(WORKER)
        (folder / "text").write_text("some text")

    def stage(self, source, output, resumable=True, extra=()):
        checkpoints = self.folder / f"run_of_{output}" / "checkpoints"
        names = (self.folder / source, self.folder / output, checkpoints, self.folder / "log", self.folder / "stop")
        command = [str(self.folder / "worker.py"), *map(str, names), *extra]
        return Stage(output, f"making {output}", command, [names[0]], [names[1]], checkpoints if resumable else None)

    def run(self, **options):
        """Run both stages and return what ran: output, extra arguments, checkpoints found."""
        (self.folder / "log").write_text("")
        for source, output in (("text", "tokenizer"), ("tokenizer", "model")):
            run_stage(self.stage(source, output, **options), self.folder / "records")
        return (self.folder / "log").read_text().splitlines()


@pytest.fixture
def workshop(tmp_path):
    """A workshop in an empty folder."""
    return Workshop(tmp_path)


def test_finished_stages_are_skipped(workshop, capsys):
    """What is made and whose inputs are as they were is not made again, and the user is told."""
    assert workshop.run() == ["tokenizer --resume auto 0", "model --resume auto 0"]
    assert workshop.run() == []
    assert capsys.readouterr().out.count("done before") == 2


def test_changed_input_reruns_what_depends_on_it(workshop):
    """A change of the text reaches the last stage, through the first one's output; the old runs are set aside."""
    workshop.run()
    (workshop.folder / "text").write_text("other text")
    assert workshop.run() == ["tokenizer --resume auto 0", "model --resume auto 0"]
    assert (workshop.folder / "model").read_text() == "OTHER TEXT"
    for stage in ("tokenizer", "model"):
        assert (workshop.folder / f"run_of_{stage}" / "earlier" / "1" / "checkpoints" / "step_1").is_file()


def test_change_that_ends_at_a_stage_goes_no_further(workshop):
    """If a stage is made anew and comes out the same, what depends on it stays: content counts, not time."""
    workshop.run()
    (workshop.folder / "text").write_text("SOME TEXT")
    assert workshop.run() == ["tokenizer --resume auto 0"]


def test_same_content_with_another_time_is_no_change(workshop):
    """Touching a file, as `git checkout` does, reruns nothing."""
    workshop.run()
    (workshop.folder / "text").write_text("some text")
    assert workshop.run() == []


def test_missing_output_is_made_again(workshop):
    """A stage whose output was deleted runs again; the later one does not, as its input comes out the same."""
    workshop.run()
    (workshop.folder / "tokenizer").unlink()
    assert workshop.run() == ["tokenizer --resume auto 1"]


def test_changed_command_begins_anew(workshop):
    """Other options are another run: nothing of the old checkpoints is continued."""
    workshop.run()
    assert workshop.run(extra=["--lr", "1"])[0] == "tokenizer --lr 1 --resume auto 0"


def test_interrupted_stage_continues(workshop):
    """After exit status 130 the same command continues from the stage's checkpoint, and earlier stages are skipped."""
    stop = workshop.folder / "stop"
    run_stage(workshop.stage("text", "tokenizer"), workshop.folder / "records")
    stop.write_text("130")
    with pytest.raises(Interrupted, match="continues here"):
        workshop.run()
    stop.unlink()
    assert workshop.run() == ["model --resume auto 1"]


def test_changed_input_does_not_continue_an_interrupted_stage(workshop):
    """Checkpoints of other inputs are set aside before the stage starts."""
    (workshop.folder / "stop").write_text("130")
    with pytest.raises(Interrupted):
        workshop.run()
    (workshop.folder / "stop").unlink()
    (workshop.folder / "text").write_text("other text")
    assert workshop.run()[0] == "tokenizer --resume auto 0"


def test_failed_stage_is_named_and_tried_again(workshop):
    """A stage that fails stops the way with a sentence and exit status 2; mended, it runs again."""
    (workshop.folder / "stop").write_text("2")
    with pytest.raises(UserError, match="making tokenizer failed .* run the same command"):
        workshop.run(resumable=False)
    (workshop.folder / "stop").unlink()
    assert len(workshop.run(resumable=False)) == 2


# ----------------------------------------------------------------------------------------------------------- the plan


def plan(*arguments):
    """The settled settings and the stages of a command line."""
    config = parse_config(PipelineConfig, arguments, description="")
    settle(config)
    return config, {stage.name: stage for stage in build_stages(config)}


@pytest.fixture
def own_data(tmp_path, monkeypatch):
    """Text and records of a user, in the current folder, which is not the repository."""
    monkeypatch.chdir(tmp_path)
    Path("text.txt").write_text("A line.\n")
    files = {"sft_data": "chats.json", "sft_test": "questions.json", "pairwise_data": "pairs.json"}
    for name in files.values():
        Path(name).write_text("[]")
    return ["--train_data", "text", *(part for option, name in files.items() for part in (f"--{option}", name))]


def test_every_stage_reads_what_an_earlier_one_makes(own_data):
    """Each input is a data file or the output of an earlier stage, so that a change reaches everything it must."""
    _, stages = plan(*own_data)
    made = {Path("text.txt"), Path("chats.json"), Path("questions.json"), Path("pairs.json")}
    for stage in stages.values():
        assert set(stage.inputs) <= made, stage.name
        made |= set(stage.outputs)


def test_own_data_are_not_judged_by_the_samples(own_data):
    """With one's own text and preferences a share of them is set aside, where no held-out files are named."""
    config, stages = plan(*own_data)
    assert (config.val_data, config.pairwise_test) == ("", "")
    assert "--val_fraction" in stages["pretrain"].command and "--val_data_dir" not in stages["pretrain"].command
    assert "--val_pairwise_data" not in stages["reward"].command + stages["ppo"].command
    assert "evaluate-text" not in stages


def test_own_instructions_need_own_questions(own_data):
    """Questions about the sample world would say nothing about a model that never saw it."""
    with pytest.raises(UserError, match="--sft_test"):
        plan("--sft_data", "chats.json")


def test_numbers_beyond_their_bounds_are_refused():
    with pytest.raises(UserError, match="--num_threads must be at least 0, not -1; --port must be .* 65535, not"):
        parse_config(PipelineConfig, ["--num_threads", "-1", "--port", "70000"], description="")


def test_smoke_run_stays_out_of_the_models_folder(monkeypatch):
    """`--smoke` never overwrites a model that is worth something."""
    monkeypatch.chdir(ROOT)
    config, stages = plan("--smoke")
    assert (config.preset, config.models_dir) == ("smoke", "models/smoke")
    assert all(path.is_relative_to("models/smoke") for stage in stages.values() for path in stage.outputs)
    assert plan("--smoke", "--models_dir", "elsewhere")[0].models_dir == "elsewhere"


# ------------------------------------------------------------------------------------------- known before any training


@pytest.fixture
def own_records(tmp_path, monkeypatch, tokenizer):
    """A user's records, some too long for the preset's context, and the settings that name them."""
    monkeypatch.chdir(tmp_path)
    chats = [{"q": f"{k}?", "a": "法国的首都是巴黎。" * (1 if k < 12 else 30)} for k in range(16)]
    pairs = [{"q": f"{k}?", "good": "yes", "bad": "no"} for k in range(16)]
    for name, records in (("chats", chats), ("questions", chats[:4]), ("pairs", pairs)):
        Path(f"{name}.json").write_text(json.dumps(records))
    Path("text.txt").write_text("A line.\n")
    columns = "instruction=q,response=a,chosen=good,rejected=bad"
    return ["--train_data", "text", "--sft_data", "chats.json", "--sft_test", "questions.json",
            "--pairwise_data", "pairs.json", "--columns", columns]  # fmt: skip


def test_a_wrong_record_of_any_stage_shows_before_the_first_one(own_records):
    """Questions and preferences are read at the start, though they are needed at the end."""
    config, _ = plan(*own_records)
    check_records(config)
    for name, record in (("questions", {"q": "?"}), ("pairs", {"q": "?", "good": "x", "bad": ""})):
        path = Path(f"{name}.json")
        sound = path.read_text()
        path.write_text(json.dumps([*json.loads(sound), record]))
        with pytest.raises(UserError, match=rf"record \d+ of {name}.json"):
            check_records(config)
        path.write_text(sound)


def test_the_context_is_chosen_from_the_records(own_records, tokenizer, capsys):
    """Doubled until at most 5 % is lost, with as many tokens a step; and said."""
    config, _ = plan(*own_records)
    settle_context(config, tokenizer)
    said = capsys.readouterr().out
    assert config.max_seq_len == 512
    assert "context: 512 tokens in place of the preset's 128" in said
    assert all(f"{name}.json: " in said for name in ("chats", "pairs", "questions"))
    stages = {stage.name: stage.command for stage in build_stages(config)}
    command = " ".join(stages["pretrain"])
    assert command.endswith("--max_seq_len 512 --batch_size 8")
    for name in ("sft", "reward", "ppo", "evaluate-sft_best", "evaluate-ngram", "quantize-sft_best"):
        assert "--columns" in stages[name], name
    assert stages["quantize-ppo_best"][-4:-2] == ["--text", "questions.json"]


def test_a_context_that_was_asked_for_stays(own_records, tokenizer, capsys):
    config, _ = plan(*own_records, "--max_seq_len", "96")
    settle_context(config, tokenizer)
    assert config.max_seq_len == 96 and "warning: " in capsys.readouterr().out
    config, _ = plan(*own_records, "--max_seq_len", "16")
    with pytest.raises(UserError, match="leaves no room for a prompt|can be used"):
        settle_context(config, tokenizer)


def test_the_sample_data_is_sound_and_keeps_the_presets_context(monkeypatch):
    monkeypatch.chdir(ROOT)
    config, stages = plan()
    assert "--max_seq_len" not in stages["pretrain"].command
    check_records(config)


# ------------------------------------------------------------------------------------------------ service and set-up


def test_service_that_cannot_start_is_reported_with_its_log(tmp_path, monkeypatch):
    """One sentence names the log, and the log says in a sentence what is wrong."""
    monkeypatch.chdir(ROOT)
    log = tmp_path / "service.log"
    with (
        pytest.raises(UserError, match="the service did not start; .*service.log says why"),
        running_service(tmp_path / "no_model.pth", free_port(), log),
    ):
        pytest.fail("it must not start")
    assert "no_model.pth does not exist" in log.read_text()
    assert "Traceback" not in log.read_text()


def fake_python(folder, version):
    """An interpreter that says it is of another version, and cannot make environments."""
    path = folder / f"python{version[0]}.{version[1]}"
    path.write_text(
        f'#!/bin/sh\n[ "$1" = --version ] && echo Python {version[0]}.{version[1]} && exit\n[ "$1" = -c ] || exit 1\n'
        f"exec '{sys.executable}' -c \"import sys; sys.version_info = {version}; exec(sys.argv[1])\" \"$2\"\n"
    )
    path.chmod(0o755)
    return path


def set_up(folder, **environment):
    """Source setup_venv.sh in a folder, as run_training.sh does, with an empty PATH."""
    shutil.copy(ROOT / "setup_venv.sh", folder)
    script = "set -euo pipefail; source ./setup_venv.sh requirements.txt"
    command = [shutil.which("bash"), "-c", script]
    return subprocess.run(command, cwd=folder, env={"PATH": "", **environment}, capture_output=True, text=True)


@pytest.mark.parametrize("version", [(3, 9), (3, 15)])
def test_unsupported_python_is_refused_in_one_sentence(tmp_path, version):
    """A Python that PyTorch or the pinned packages do not support is named as the reason before anything is made."""
    result = set_up(tmp_path, PYTHON=str(fake_python(tmp_path, version)))
    assert result.returncode == 2
    assert result.stderr.strip() == (
        "error: Python 3.10 to 3.14 is needed; install one, or name it in the variable PYTHON"
    )
    assert not (tmp_path / ".venv").exists()


def pins_for(file, minor):
    """The lines of a requirements file that are for Python 3.`minor`, parsed."""
    lines = (re.sub(r"(^|\s+)#.*", "", line) for line in (ROOT / file).read_text(encoding="utf-8").splitlines())
    pins = [Requirement(line) for line in lines if line]
    return [pin for pin in pins if pin.marker is None or pin.marker.evaluate({"python_version": f"3.{minor}"})]


def test_every_promise_names_the_pythons_that_the_set_up_takes(tmp_path):
    """READMEs, Dockerfile, linter and pins with their markers agree with setup_venv.sh on the versions of Python."""
    results = {minor: set_up(tmp_path, PYTHON=str(fake_python(tmp_path, (3, minor)))) for minor in range(8, 18)}
    taken = [minor for minor, result in results.items() if "is needed" not in result.stderr]
    lowest, highest = f"3.{taken[0]}", f"3.{taken[-1]}"
    promises = {
        "README.md": f"Python {lowest} to {highest} is all",
        "README.zh-CN.md": f"Python {lowest} 至 {highest}",
        "docker/Dockerfile": f"Python {lowest}-{highest}",
        "requirements.txt": f"Python {lowest}–{highest}",
        "pyproject.toml": f'target-version = "py3{taken[0]}"',
        "setup_venv.sh": " ".join(f"python3.{minor}" for minor in reversed(taken)),
    }
    for file, promise in promises.items():
        assert promise in (ROOT / file).read_text(encoding="utf-8"), f"{file} does not say {promise}"

    installed = {package.name.lower(): package for package in metadata.distributions()}
    for file, only_for_some in [("requirements.txt", set()), ("requirements-dev.txt", {"trl", "schemathesis"})]:
        names = {minor: [pin.name for pin in pins_for(file, minor)] for minor in taken}
        for minor in taken:
            assert len(names[minor]) == len(set(names[minor])), f"{file} has a package twice for Python 3.{minor}"
            assert set().union(*names.values()) - set(names[minor]) <= only_for_some, f"{file} for Python 3.{minor}"
            for pin in pins_for(file, minor):
                package = installed.get(pin.name)
                if package and package.version in pin.specifier:  # not so where the pin is for another Python
                    supported = SpecifierSet(package.metadata.get("Requires-Python", ""))
                    assert supported.contains(f"3.{minor}.0"), f"{pin} does not support Python 3.{minor}"


def test_python_without_venv_names_the_package(tmp_path):
    """Debian's Python cannot make an environment by itself; the message says what to install."""
    (tmp_path / "rm").symlink_to(shutil.which("rm"))
    result = set_up(tmp_path, PYTHON=str(fake_python(tmp_path, (3, 10))), PATH=str(tmp_path))
    assert (result.returncode, result.stderr.count("\n")) == (2, 1)
    assert "python3-venv" in result.stderr


# --------------------------------------------------------------------------------------------------------- the report


def write(path, content):
    """A JSON file, with its folders."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(content), encoding="utf-8")


def evaluation(exact, preferred=None, prediction="4"):
    """What the evaluator leaves for two questions."""
    graded = {} if preferred is None else {"preferred": preferred, "polite": preferred, "complete": 1.0}
    scores = {"count": 2, "exact": exact, "ended": 1.0, "bleu": 0.5, "rouge-l": 0.5, "mean_tokens": 3.0, **graded}
    rows = [{"instruction": "2 + <b>2</b>?", "prediction": prediction, "exact": exact == 1.0}] * 2
    by = {} if preferred is None else {"by_skill": {"addition": scores}, "by_held_out": {"operands": scores}}
    return {"scores": scores, "predictions": rows, **by}


@pytest.fixture
def models(tmp_path):
    """A folder of models, without the models: what evaluations and training runs have left."""
    write(tmp_path / "ngram_eval.json", evaluation(0.1, 0.0))
    write(tmp_path / "pretrain/pretrain_best_eval.json", evaluation(0.0, 0.0))
    write(tmp_path / "sft/sft_best_eval.json", evaluation(0.9, 0.5, "<script>alert('x')</script> & co"))
    write(tmp_path / "rlhf/ppo_best_eval.json", evaluation(1.0, 0.75))
    write(tmp_path / "rlhf/ppo_best_int8_eval.json", evaluation(1.0, 0.75))
    records = [{"step": 1, "loss": 2.0, "lr": 0.1}, {"step": 2, "val_loss": 1.5, "val_bpb": 2.25}]
    metrics = tmp_path / "pretrain" / "metrics.jsonl"
    metrics.write_text("".join(json.dumps(record) + "\n" for record in records))
    plot_metrics(metrics, tmp_path / "pretrain" / "curves.png")
    return tmp_path


def test_report_has_its_parts(models):
    """Headline, scores, skills, prompts, service, curves and times, made of what the stages have left."""
    html = write_report(models, [{"question": "Q?", "answer": "A."}], [("pretraining", 61.5)]).read_text("utf-8")
    for heading in ("Scores on held-out questions", "By skill", "The same prompts", "Asked through the service"):
        assert f"<h2>{heading}</h2>" in html
    assert "answers 90.0% of the held-out questions exactly right (a 5-gram model 10.0%)" in html
    assert "PPO changes preferred answers by +25.0 points and exact answers by +10.0 points" in html
    assert "INT8 changes exact answers by +0.0 points" in html
    assert "2.2500 bits a byte" in html and "data:image/png;base64,iVBOR" in html
    assert '<td class="n">61.5' in html and "1 min 01 s" in html
    assert "none of which is in the training data" in html


def test_report_escapes_what_models_and_users_write(models):
    """An answer that looks like HTML is shown, not run."""
    html = write_report(models, [{"question": "<img src=x>", "answer": "<i>"}], []).read_text("utf-8")
    assert "<script>" not in html and "&lt;script&gt;" in html and "&amp; co" in html
    assert "<b>2</b>" not in html and "<img src=x>" not in html


def test_report_of_own_questions(models):
    """Records without an `answer` have no preferences and no skills; the report leaves those cells empty."""
    for name in ("ngram_eval", "pretrain/pretrain_best_eval", "sft/sft_best_eval", "rlhf/ppo_best_eval"):
        write(models / f"{name}.json", evaluation(0.5))
    html = write_report(models, [], []).read_text("utf-8")
    assert "PPO changes exact answers by +0.0 points" in html
    assert '<td class="n">–' in html


def test_report_of_nothing_is_still_a_page(tmp_path):
    """Before any stage has run there is nothing to show, and nothing fails."""
    assert "<h1>Your own GPT</h1>" in write_report(tmp_path, [], []).read_text("utf-8")
