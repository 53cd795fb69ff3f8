"""Draw docs/kl.png from the table "KL recovered" in docs/results.md (needs matplotlib)."""

import re
from pathlib import Path

from matplotlib import pyplot as plt

HERE = Path(__file__).parent
ROW = re.compile(r"\| ([\d,]+)[ ,:]([^|]*)\| ([\d.e-]+) .*?\| (0\.\d\d) \[(0\.\d\d), (0\.\d\d)\]")


def main() -> None:
    """One point a row: how many answers were trained on, and the share of the KL recovered."""
    text = (HERE / "results.md").read_text(encoding="utf-8").split("**KL recovered.**")[1]
    plt.figure(figsize=(9, 3.2))
    for i, (answers, how, rate, *figures) in enumerate(ROW.findall(text.split("\n\n")[1])):
        x, (y, low, high) = int(answers.replace(",", "")), map(float, figures)
        plt.errorbar(x + 6 * i, y, [[y - low], [high - y]], marker="o", capsize=3,
                     label=f"{answers} {how.strip()}, {rate}")
    plt.xlabel("answers trained on")
    plt.ylabel("held-out KL recovered")
    plt.ylim(0, 0.7)
    plt.legend(fontsize=6, loc="center left", bbox_to_anchor=(1, 0.5))
    plt.tight_layout()
    plt.savefig(HERE / "kl.png", dpi=120)


if __name__ == "__main__":
    main()
