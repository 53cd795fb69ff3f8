"""support/settings.py: the command line's defaults, and what is a setting. (Wrong flags:
test_hostile.py.)"""

from pathlib import Path

from conftest import Patch, copy_folder

import train
from model import Transformer
from support import settings
from support.settings import QUICK_PERSONAS, check, choose_personas, parser, run_settings

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
