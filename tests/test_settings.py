"""support/settings.py: the command line, what is refused before anything is written, settings."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
from conftest import Capture, Patch, copy_folder, edit_json
from tiny_run import error_of, run_train

import train
from model import Transformer
from support import settings
from support.settings import QUICK_PERSONAS, check, choose_personas, parser, run_settings

UNKNOWN = "nobody-at-all/no-such-model"


@pytest.mark.parametrize("flags", [
    ["--gate-threshold", "often"], ["--from", "judge"], ["--model", UNKNOWN],
    ["--judge-model", UNKNOWN]], ids=" ".join)
def test_wrong_input(flags: list[str], command: list[str], tmp_path: Path, capfd: Capture) -> None:
    """A word for a number, a stage that is not there, or a model that nobody has would be a
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


def test_defaults() -> None:
    """--quick would ignore another folder or number beside it, or two models share an output."""
    paper, quick = parsed(), parsed("--quick", "--queries", "3")
    assert (paper.queries, paper.max_new_tokens, paper.epochs) == (50, 512, 10)
    assert (quick.queries, quick.max_new_tokens, quick.epochs) == (3, 64, 4)
    assert len(choose_personas(paper)) == 12
    assert sorted(choose_personas(quick)) == sorted(QUICK_PERSONAS)
    folder = Path(train.__file__).parent / "personas" / "short"
    assert len(choose_personas(parsed("--quick", "--personas", str(folder)))) == 12
    assert paper.out == Path("out/smollm2-135m-instruct")
    assert parsed("--model", "./my/Model/").out == Path("out/model")


def test_what_would_mix_rows_is_a_setting(net: Transformer, folder: Path, tmp_path: Path,
                                          monkeypatch: Patch) -> None:
    """Rows of two values of a flag, of two texts of a persona, of two versions of a prompt or a
    constant, of two chat templates or of two sets of stop tokens would be mixed in one run."""
    args, copy = parsed("--model", str(folder)), copy_folder(folder, tmp_path / "copy")

    def found(text: str = "Be brief.") -> dict:
        return run_settings(args, net, copy, {"p": text})

    def differ(after: dict) -> set[str]:
        return {name for name in before if before[name] != after[name]}

    before = found()
    assert set(vars(args)) - set(before) == {"out", "quick", "stop_after", "redo", "dry_run",
                                             "gpu_memory", "overwrite"}
    assert differ(found("Be long.")) == {"personas_sha256"}
    for constant, stage in (("QUERY_RULES", "queries"), ("VERDICT_RULES", "verdicts"),
                            ("GATE_RULES", "gate"), ("LORA_RULES", "lora"),
                            ("ANSWER_TEMPERATURE", "answers")):
        monkeypatch.setattr(settings, constant, "other")
        assert differ(found()) == {constant.lower()}
        assert constant == "QUERY_RULES" or constant.lower() in settings.SETTINGS[stage]
        before = found()
    for name in ("chat_template.jinja", "generation_config.json"):
        (copy / name).write_text("{}")
        assert differ(found()) == {"text_fingerprint"}
        before = found()


@pytest.mark.parametrize("name", ["letter", "likelihood", "auto"])
def test_answers_longer_than_the_judges_context(name: str, folder: Path, command: list[str],
                                                tmp_path: Path, capfd: Capture) -> None:
    """Answers that the judge could not read would be found out after hours: they are refused before
    stage 1 writes anything, whoever the judge is."""
    short = copy_folder(folder, tmp_path / "short")
    edit_json(short / "config.json", lambda c: c.update(max_position_embeddings=600))
    asked = [*command, "--judge", name, "--out", tmp_path / "out"]
    for flag in ("--model", "--judge-model"):
        assert run_train(*asked, flag, short, "--max-new-tokens", 300) == 2
        assert re.match(rf"error: {short}: --max-new-tokens is 300.* context of 600 tokens;",
                        error_of(capfd))
        assert not (tmp_path / "out").exists()
