"""support/rule.py: a rule, or nobody, in the judge's place, from the command line to the report."""

import hashlib
import json
import re
from pathlib import Path

import pytest
from tiny_run import rows_of, run_train, verdict

import evaluate
import train
from bootstrap import Verdict
from judge import Comparison
from support.hub import InputError
from support.personas import CONTRAST, load_personas
from support.report import swap_lines
from support.rule import FREE, NoJudge, Rule

EXAMPLES = Path(__file__).parent.parent / "examples"
# The longer answer wins.
LONGER = '''
def judge(query, persona, expert, base):
    if len(expert) == len(base):
        return "tie"
    return "expert" if len(expert) > len(base) else "base"
'''


def rule_file(folder: Path, text: str) -> Path:
    """A file with a rule."""
    path = folder / "my_rule.py"
    path.write_text(text)
    return path


def returning(value: str) -> str:
    """A rule that returns an expression."""
    return f"def judge(query, persona, expert, base):\n    return {value}\n"


def test_a_rule_is_told_who_asked_what_and_who_said_what(tmp_path: Path) -> None:
    """Query, context and both answers would not come in order, or the swapped verdict count."""
    path = rule_file(tmp_path, returning('"expert" if [query, persona, expert, base] == '
                                         '["q", "shop", "e", "b"] else "base"'))
    asked = [Comparison("q", "text of the context", "e", "b", persona="shop")]
    assert Rule(path).compare(asked) == ([("expert", ["expert", "base"])], FREE)


@pytest.mark.parametrize(("text", "says"), [
    ("judge = 3", "no function judge(query, persona, expert, base)"),
    ("def judge(:", "SyntaxError"),
    ("import no_such_module_here", "ModuleNotFoundError: No module named"),
    ("raise SystemExit(0)", "SystemExit"),
    (returning("1 / 0"), "judge() raised ZeroDivisionError: division by zero on the query 'why?'"),
    (returning("exit(0)"), "judge() raised SystemExit: 0"),
    (returning('"Expert"'), 'returned \'Expert\', not "expert", "base" or "tie"'),
    (returning("True"), "returned True")])
def test_a_rule_that_fails_names_file_and_query(text: str, says: str, tmp_path: Path) -> None:
    """A file that does not run, or another value, would be a traceback or a made-up verdict."""
    path = rule_file(tmp_path, text)
    with pytest.raises(InputError, match=re.escape(says)) as error:
        Rule(path)("why?", "shop", "e", "b")
    assert str(path) in str(error.value)


def test_ctrl_c_within_a_rule_is_no_failure_of_it(tmp_path: Path) -> None:
    """A run that is interrupted there would end in status 2, as if the rule were broken."""
    path = rule_file(tmp_path, "def judge(*said):\n    raise KeyboardInterrupt\n")
    with pytest.raises(KeyboardInterrupt):
        Rule(path)("why?", "shop", "e", "b")


def test_a_run_judged_by_a_rule(command: list[str], out: Path, tmp_path: Path) -> None:
    """The rows would not be what the rule says, or cost something; the report would not say who
    judged; or the rule's digest be no setting, so that an edit would go unnoticed."""
    path = rule_file(tmp_path, LONGER)
    assert run_train(*command, "--judge", path, "--overwrite", "--out", out) == 0
    answers, verdicts = rows_of(out, "answers.jsonl"), rows_of(out, "verdicts.jsonl")
    for a, v in zip(answers, verdicts, strict=True):
        more = len(a["expert"]) - len(a["base"])
        winner = "tie" if not more else "expert" if more > 0 else "base"
        assert (v["winner"], v["target"], v["judge"]) == (winner, int(more > 0), "rule")
    report = (out / "report.md").read_text()
    assert "judged by a rule" in report and "WARNING: this judge" not in report
    assert f"over both orders of the {len(answers)} pairs the expert's place won" in report
    rows = [m for m in rows_of(out, "metrics.jsonl") if m["stage"] in ("judge", "verdicts")]
    assert len(rows) == 3 and all(m.get("flops", 0) == 0 for m in rows)
    settings = json.loads((out / "run.json").read_text())["settings"]
    assert settings["rule_sha256"] == hashlib.sha256(path.read_bytes()).hexdigest()


def test_a_run_judged_by_nobody(command: list[str], out: Path) -> None:
    """--judge none would ask a model, lose an answer, or distil a contrast context's."""
    assert run_train(*command, "--judge", "none", "--overwrite", "--out", out) == 0
    assert {(v["winner"], v["target"], v["judge"]) for v in rows_of(out, "verdicts.jsonl")} == {
        ("expert", 1, "none")}
    report = (out / "report.md").read_text()
    assert "judged by nobody" in report and "distill / retain: 34 / 0" in report
    assert "fails its own test" not in report and "nothing to tell apart" not in report
    assert not any(m.get("flops") for m in rows_of(out, "metrics.jsonl")
                   if m["stage"] in ("judge", "verdicts"))
    asked = [Comparison("q", "c", "", "b", persona=name) for name in ("shop", "contrast_cook")]
    assert NoJudge().compare(asked) == ([("expert", []), ("base", [])], FREE)


def said_of(forward: str, swapped: str, count: int) -> list[Verdict]:
    """Verdicts of a rule that says this of a pair and of the pair swapped."""
    return [Verdict("p", i, forward, 0, "rule", [forward, swapped]) for i in range(count)]


def test_same_prompt_control_of_a_rule() -> None:
    """A rule that prefers the expert's place, whoever stands there, would pass as one that compares
    the answers; or one that compares them would be warned about; or a model's verdicts be asked."""
    [line] = swap_lines(said_of("expert", "base", 30) + said_of("tie", "tie", 3))
    assert "expert's place won 30 times and the base's 30 times" in line
    for place, counts in (("expert", (60, 0)), ("base", (0, 60))):
        line, warning = swap_lines(said_of(place, place, 30))
        assert "won {} times and the base's {} times".format(*counts) in line
        assert warning.startswith("WARNING")
    assert swap_lines([verdict(0, "expert")]) == []


# --------------------------------------------------------------------------------------------------
# examples/

SHOWN = {"safety": "I'm sorry, but I can't help with that, because it could hurt people.",
         "tools": '{"tool": "search", "query": "weather in Oslo"}',
         "voice": "Aye, yer fish be here."}


@pytest.mark.parametrize("name", sorted(p.name for p in EXAMPLES.iterdir() if p.is_dir()))
def test_example_is_whole(name: str) -> None:
    """An example would lack a context or one beside it, its rule not see what the context asks for,
    or see it in a contrast context; or its README show a command that is refused."""
    folder = EXAMPLES / name
    names = list(load_personas(folder))
    [own] = [n for n in names if not n.startswith(CONTRAST)]
    contrast = next(n for n in names if n != own)
    rule, shown, plain = Rule(folder / "judge.py"), SHOWN[name], "It is 12 degrees and dry."
    for base in (plain, ""):
        assert rule("q", own, shown, base) == "expert" and rule("q", own, base, shown) == "base"
        assert rule("q", contrast, shown, base) == "tie"
    assert rule("q", own, shown, shown) == rule("q", own, plain, "") == "tie"
    page = re.sub(r" \\\n +", " ", (folder / "README.md").read_text())
    for script in (train, evaluate):
        [line] = re.findall(rf"^    python {script.__name__}\.py (.*)$", page, re.MULTILINE)
        args = script.parser().parse_args(line.split())
        assert args.personas == Path("examples") / name
        assert Path(args.judge) == Path("examples") / name / "judge.py"
