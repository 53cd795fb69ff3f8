"""support/settings.py: the command line, what is refused before anything is written, settings."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from conftest import edit_json
from tiny_run import command, contents, error_of, personas, run_train

import bootstrap
import judge
import train
from model import load
from support import settings
from support.hub import InputError
from support.personas import Persona, load_personas
from support.settings import QUICK_PERSONAS, check, choose_personas, parser, run_settings
from tokenizer import Tokenizer

__all__ = ["command", "personas"]
Capture = pytest.CaptureFixture[str]
WRONG = {
    "no queries": ["--queries", "0"], "negative queries": ["--queries", "-3"],
    "lr is NaN": ["--lr", "nan"], "lr is infinite": ["--lr", "inf"], "lr is zero": ["--lr", "0"],
    "alpha is NaN": ["--alpha", "nan"], "temperature": ["--kd-temperature", "0"],
    "threshold": ["--gate-threshold", "1.5"], "dropout": ["--dropout", "1"],
    "rank": ["--rank", "0"], "epochs": ["--epochs", "0"], "batch": ["--batch-size", "0"],
    "tokens": ["--max-new-tokens", "0"], "max-len": ["--max-len", "0"],
    "gate layer": ["--gate-layer", "2"], "negative gate layer": ["--gate-layer", "-1"],
    "device": ["--device", "abacus"], "dtype": ["--dtype", "int8"],
    "no personas": ["--personas", "{tmp}/absent"], "empty folder": ["--personas", "{tmp}/none"],
    "empty persona": ["--personas", "{tmp}/empty"], "not UTF-8": ["--personas", "{tmp}/latin1"],
    "threshold is no number": ["--gate-threshold", "often"], "no such stage": ["--from", "judge"],
    "flag that is gone": ["--votes", "2"], "no integer": ["--queries", "three"],
    "unknown judge model": ["--judge-model", "nobody-at-all/no-such-model"],
    "unknown folder": ["--model", "./no/such/folder"],
    "not a checkpoint": ["--model", "{tmp}/none"],
    "unknown model": ["--model", "nobody-at-all/no-such-model"],
}


@pytest.mark.parametrize("what", WRONG)
def test_wrong_input_is_one_line(command: list[str], tmp_path: Path, what: str,
                                 capfd: Capture) -> None:
    """Status 2, exactly one line on stderr that is no traceback, and nothing created."""
    for name, data in (("none", None), ("empty", b"  \n"), ("latin1", b"h\xf6flich")):
        (tmp_path / name).mkdir()
        if data is not None:
            (tmp_path / name / "p.txt").write_bytes(data)
    arguments = [a.replace("{tmp}", str(tmp_path)) for a in WRONG[what]]
    before = sorted(tmp_path.rglob("*"))
    assert run_train(*command, "--out", tmp_path / "out", *arguments) == 2
    out, error = capfd.readouterr()
    assert error.startswith("error: ") and error.count("\n") == 1 and out == ""
    assert sorted(tmp_path.rglob("*")) == before


def test_exit_status_of_the_process(tmp_path: Path) -> None:
    """`python train.py --queries 0` as a user types it: status 2, one line on stderr."""
    done = subprocess.run([sys.executable, train.__file__, "--queries", "0", "--out", "out"],
                          capture_output=True, text=True, cwd=tmp_path, check=False)
    assert (done.returncode, done.stderr.count("\n"), done.stdout) == (2, 1, "")
    assert "--queries" in done.stderr and not list(tmp_path.iterdir())


@pytest.mark.parametrize("out", ["file", "file/below"])
def test_out_that_cannot_be_written(command: list[str], tmp_path: Path, out: str,
                                    capfd: Capture) -> None:
    """A file where the folder should be, or where its parent should: one line, the file kept."""
    (tmp_path / "file").write_text("mine")
    assert run_train(*command, "--out", tmp_path / out) == 2
    assert str(tmp_path) in error_of(capfd) and (tmp_path / "file").read_text() == "mine"


def parsed(*argv: str) -> object:
    """Checked arguments."""
    args = parser().parse_args(argv)
    check(args)
    return args


def test_quick_is_the_bundled_four_and_flags_win() -> None:
    """--quick with another folder of personas, or a number beside it, would be ignored."""
    paper, quick = parsed(), parsed("--quick", "--queries", "3")
    assert (paper.queries, paper.max_new_tokens, paper.epochs, paper.batch_size) == (
        50, 512, 10, 16)
    assert (quick.queries, quick.max_new_tokens, quick.epochs, quick.batch_size) == (3, 96, 6, 4)
    assert len(choose_personas(paper)) == 12
    assert sorted(p.name for p in choose_personas(quick)) == sorted(QUICK_PERSONAS)
    folder = Path(train.__file__).parent / "personas" / "short"
    assert len(choose_personas(parsed("--quick", "--personas", str(folder)))) == 12


def test_default_out_is_named_after_the_model() -> None:
    """Or two models would share a folder."""
    assert parsed().out == Path("out/smollm2-135m-instruct")
    assert parsed("--model", "./my/Model/").out == Path("out/model")


@pytest.mark.parametrize(("module", "name", "value", "setting"), [
    (bootstrap, "QUERY_RULES", ("other",), "query_rules"),
    (judge, "VERDICT_RULES", ("other",), "verdict_rules"),
    (settings, "GATE_RULES", ("other",), "gate_rules"),
    (settings, "LORA_RULES", ("other",), "lora_rules"),
    (settings, "ANSWER_TEMPERATURE", 0.9, "answer_temperature")])
def test_a_changed_constant_is_another_setting(module, name: str, value: object, setting: str,
                                               net, folder: Path,
                                               monkeypatch: pytest.MonkeyPatch) -> None:
    """Rows of two versions of a prompt or a constant must not be mixed unnoticed."""
    args, personas = parsed("--model", str(folder)), [Persona("p", "Be brief.")]
    before = run_settings(args, net, folder, personas, None)
    monkeypatch.setattr(settings, name, value)
    assert hasattr(module, name)
    after = run_settings(args, net, folder, personas, None)
    assert {n for n in before if before[n] != after[n]} == {setting}
    assert settings.FIRST_STAGE.get(setting, "queries") == {
        "query_rules": "queries", "verdict_rules": "verdicts", "gate_rules": "gate",
        "lora_rules": "lora", "answer_temperature": "answers"}[setting]


# --------------------------------------------------------------------------------------------------
# What the judge could not read


@pytest.mark.parametrize("name", ["letter", "likelihood", "auto"])
def test_answers_longer_than_the_judges_context(name: str, folder: Path, command: list[str],
                                                tmp_path: Path, capfd: Capture) -> None:
    """Answers that the judge could not read are refused before stage 1 writes anything, whoever the
    judge is, with the longest that would do."""
    short = Path(shutil.copytree(folder, tmp_path / "short"))
    edit_json(short / "config.json", lambda c: c.update(max_position_embeddings=600))
    asked = [*command, "--judge", name, "--out", tmp_path / "out"]
    for flags in (["--model", short], ["--judge-model", short]):
        assert run_train(*asked, *flags, "--max-new-tokens", 500) == 2
        error = error_of(capfd)
        assert error.startswith(f"error: {short}: --max-new-tokens is 500")
        assert not (tmp_path / "out").exists()
    room = int(re.search(r"room for answers of (\d+)", error)[1])
    args = parser().parse_args([str(a) for a in asked] + ["--judge-model", str(short)])
    given = load_personas(args.personas)
    args.max_new_tokens = room
    settings.check_judge(args, folder, given)
    args.max_new_tokens = room + 1
    with pytest.raises(InputError, match=f"room for answers of {room};"):
        settings.check_judge(args, folder, given)


def test_persona_whose_file_name_is_not_text(command: list[str], tmp_path: Path,
                                             capfd: Capture) -> None:
    """A file name that is not UTF-8 cannot be written to the rows: one line, no traceback."""
    (tmp_path / "personas").mkdir()
    path = os.fsencode(tmp_path / "personas") + b"/caf\xe9.txt"
    try:
        with open(path, "wb") as file:
            file.write(b"Be brief.")
    except OSError:
        pytest.skip("this file system has UTF-8 names only")
    assert run_train(*command, "--out", tmp_path / "out", "--personas", tmp_path / "personas") == 2
    assert "not printable" in error_of(capfd)


def test_room_of_the_default_settings(smollm_tok: Tokenizer) -> None:
    """The paper's 512 tokens fit SmolLM2's context with all twelve personas, and one of 2,048."""
    texts = [p.text for p in load_personas(settings.HERE / "personas")]
    query = bootstrap.longest_opening(smollm_tok) + bootstrap.QUERY_SAMPLING["max_new_tokens"]
    rooms = {name: settings.answer_room(smollm_tok, texts, name, 2048, query)
             for name in ("letter", "likelihood", "auto")}
    assert 512 <= rooms["auto"] == rooms["letter"] < rooms["likelihood"]
    assert settings.answer_room(smollm_tok, texts, "auto", 8192, query) > 2500


def test_settings_reach_run_json(command: list[str], folder: Path, tmp_path: Path) -> None:
    """run.json without a setting could not tell two runs apart."""
    (tmp_path / "out").mkdir()
    train_args = parser().parse_args([str(a) for a in command])
    check(train_args)
    assert set(vars(train_args)) - set(run_settings(
        train_args, load(folder), folder, [Persona("p", "x")], None)) == {
        "out", "quick", "stop_after", "redo", "dry_run", "gpu_memory", "overwrite"}
    assert contents(tmp_path / "out") == {}
