"""support/settings.py: the command line, what is refused before anything is written, settings."""

from __future__ import annotations

import os
import re
import shutil
from pathlib import Path
from types import ModuleType

import pytest
from conftest import edit_json
from tiny_run import error_of, run_train

import judge
import queries
import train
from model import Transformer
from support import settings
from support.hub import InputError
from support.personas import Persona, load_personas
from support.settings import QUICK_PERSONAS, check, choose_personas, parser, run_settings
from tokenizer import Tokenizer

Capture = pytest.CaptureFixture[str]
UNKNOWN = "nobody-at-all/no-such-model"


@pytest.mark.parametrize("flags", [
    ["--gate-threshold", "often"], ["--from", "judge"], ["--votes", "2"], ["--model", UNKNOWN],
    ["--judge-model", UNKNOWN]], ids=" ".join)
def test_wrong_input_is_one_line(flags: list[str], command: list[str], tmp_path: Path,
                                 capfd: Capture) -> None:
    """A word for a number, a stage or flag that is not there, or a model that nobody has would be a
    traceback, or leave something behind. (All other wrong flags: test_hostile.py.)"""
    assert run_train(*command, "--out", tmp_path / "out", *flags) == 2
    out, error = capfd.readouterr()
    assert error.startswith("error: ") and error.count("\n") == 1 and out == ""
    assert not list(tmp_path.iterdir())


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


@pytest.mark.parametrize(("module", "name", "value", "setting", "stage"), [
    (queries, "QUERY_RULES", ("other",), "query_rules", "queries"),
    (judge, "VERDICT_RULES", ("other",), "verdict_rules", "verdicts"),
    (settings, "GATE_RULES", ("other",), "gate_rules", "gate"),
    (settings, "LORA_RULES", ("other",), "lora_rules", "lora"),
    (settings, "ANSWER_TEMPERATURE", 0.9, "answer_temperature", "answers")])
def test_a_changed_constant_is_another_setting(module: ModuleType, name: str, value: object,
                                               setting: str, stage: str, net: Transformer,
                                               folder: Path,
                                               monkeypatch: pytest.MonkeyPatch) -> None:
    """Rows of two versions of a prompt or a constant, or of a persona's text, would be mixed."""
    args, given = parsed("--model", str(folder)), [Persona("p", "Be brief.")]
    before = run_settings(args, net, folder, given, None)
    edited = run_settings(args, net, folder, [Persona("p", "Be long.")], None)
    assert {n for n in before if before[n] != edited[n]} == {"personas_sha256"}
    monkeypatch.setattr(settings, name, value)
    assert hasattr(module, name)
    after = run_settings(args, net, folder, given, None)
    assert {n for n in before if before[n] != after[n]} == {setting}
    assert settings.FIRST_STAGE.get(setting, "queries") == stage


def test_an_edited_template_is_another_setting(folder: Path, net: Transformer,
                                               tmp_path: Path) -> None:
    """Rows of two chat templates, or of two sets of stop tokens, would be mixed in one run."""
    args, copied = parsed("--model", str(folder)), Path(shutil.copytree(folder, tmp_path / "copy"))
    before = run_settings(args, net, copied, [Persona("p", "x")], None)
    for name in ("chat_template.jinja", "generation_config.json"):
        (copied / name).write_text("{}")
        after = run_settings(args, net, copied, [Persona("p", "x")], None)
        assert {n for n in before if before[n] != after[n]} == {"text_fingerprint"}
        before = after


def test_settings_reach_run_json(command: list[str], folder: Path, net: Transformer) -> None:
    """run.json without a setting could not tell two runs apart."""
    args = parsed(*command)
    assert set(vars(args)) - set(run_settings(args, net, folder, [Persona("p", "x")], None)) == {
        "out", "quick", "stop_after", "redo", "dry_run", "gpu_memory", "overwrite"}


# --------------------------------------------------------------------------------------------------
# What the judge could not read


@pytest.mark.parametrize("name", ["letter", "likelihood", "auto"])
def test_answers_longer_than_the_judges_context(name: str, folder: Path, command: list[str],
                                                tmp_path: Path, capfd: Capture) -> None:
    """Answers that the judge could not read would be found out after hours: they are refused before
    stage 1 writes anything, whoever the judge is, with the longest that would do."""
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
    """A file name that is not UTF-8, which no row can hold, would be a traceback."""
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
    """The paper's 512 tokens would be refused in SmolLM2's context with all twelve personas, or in
    one of 2,048."""
    texts = [p.text for p in load_personas(settings.HERE / "personas")]
    query = queries.longest_opening(smollm_tok) + queries.QUERY_TOKENS
    rooms = {name: settings.answer_room(smollm_tok, texts, name, 2048, query)
             for name in ("letter", "likelihood", "auto")}
    assert 512 <= rooms["auto"] == rooms["letter"] < rooms["likelihood"]
    assert settings.answer_room(smollm_tok, texts, "auto", 8192, query) > 2500
