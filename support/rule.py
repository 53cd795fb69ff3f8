"""What may stand in a judge's place in stage 3: a rule of the user's, or nobody.

For a context whose success can be checked (a valid tool call, a required notice, a format) a rule
beats any model. It is a file of Python with one function:

    def judge(query: str, persona: str, expert: str, base: str) -> str:
        return "expert"  # or "base", or "tie"

`persona` is the name of the context, `expert` the answer given with it and `base` the one without.
The file is run as code: use your own, or one that you have read.
"""

from pathlib import Path
from typing import Callable, Sequence

from support.hub import InputError, check_file
from support.personas import is_contrast

NOBODY = "none"
WINNERS = ("expert", "base", "tie")
FREE = {"prompts": 0, "tokens_read": 0, "tokens_written": 0, "flops": 0}  # no model is asked


def is_rule(name: str) -> bool:
    """Whether --judge names a file."""
    return name.endswith(".py")


def asks_no_model(name: str) -> bool:
    """Whether --judge names nobody or a file, so that verdicts cost nothing."""
    return name == NOBODY or is_rule(name)


class Rule:
    """Verdicts by the function `judge` of a file (see `judge.ModelJudge`).

    Raises:
        InputError: no such file, it does not run, or there is no such function in it.
    """

    name = "rule"

    def __init__(self, path: Path):
        self.path = path
        check_file(path)
        scope: dict = {"__name__": path.stem, "__file__": str(path)}
        try:
            exec(compile(path.read_bytes(), str(path), "exec"), scope)
        except (Exception, SystemExit) as error:
            raise InputError(f"{path}: {type(error).__name__}: {error}") from None
        self.judge: Callable = scope.get("judge")
        if not callable(self.judge):
            raise InputError(f"{path}: no function judge(query, persona, expert, base) in it")

    def __call__(self, query: str, persona: str, expert: str, base: str) -> str:
        """ "expert", "base" or "tie"; InputError for an exception and for anything else."""
        try:
            winner = self.judge(query, persona, expert, base)
        except (Exception, SystemExit) as error:
            raise InputError(f"{self.path}: judge() raised {type(error).__name__}: {error} on the "
                             f"query {query!r}") from None
        if not (isinstance(winner, str) and winner in WINNERS):
            raise InputError(f'{self.path}: judge() returned {winner!r:.60}, not "expert", "base" '
                             f'or "tie", on the query {query!r}')
        return winner

    def compare(self, asked: Sequence) -> tuple[list[tuple[str, list]], dict]:
        """[(winner, [winner, winner when swapped])] of each `judge.Comparison`; it costs nothing. A
        rule that compares answers turns round where the two are swapped."""
        results = []
        for c in asked:
            winner = self(c.query, c.persona, c.expert, c.base)
            swapped = self(c.query, c.persona, c.base, c.expert)
            results.append((winner, [winner, swapped]))
        return results, FREE


class NoJudge:
    """--judge none: every context's answer is distilled, but for contrast contexts, whose queries
    only show the gate where to stay closed."""

    name = NOBODY

    def compare(self, asked: Sequence) -> tuple[list[tuple[str, list]], dict]:
        """[(winner, [])] of each `judge.Comparison`; it costs nothing."""
        contrast = [is_contrast(c.persona) for c in asked]
        return [("base" if other else "expert", []) for other in contrast], FREE


def judge_in_place(name: str) -> Rule | NoJudge | None:
    """What --judge puts in the place of the model's own verdicts; None if they are to be had."""
    if name == NOBODY:
        return NoJudge()
    return Rule(Path(name)) if is_rule(name) else None
