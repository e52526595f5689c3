"""Draws training.png from training-log.jsonl: both losses, and the held-out checks along the run.

Owns only the picture. Usage: python models/plot.py.
"""

from __future__ import annotations

import json
from pathlib import Path

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt

FOLDER = Path(__file__).parent


def main() -> None:
    records = [json.loads(line) for line in (FOLDER / "training-log.jsonl").read_text().splitlines()]
    steps = [record for record in records if record["kind"] == "step"]
    checks = [record for record in records if record["kind"] == "check"]
    checks += [{**record, "step": steps[-1]["step"]} for record in records if record["kind"] == "end" and record["weights"] == "fp32"]
    figure, (left, right) = plt.subplots(1, 2, figsize=(10, 3.6), layout="constrained")
    tokens = [record["tokens"] / 1e6 for record in steps]
    left.semilogy(tokens, [record["loss"] for record in steps], label="next token")
    left.semilogy(tokens, [record["mtpLoss"] for record in steps], label="MTP, next but one")
    left.set(xlabel="padded tokens, millions", ylabel="cross-entropy, nats", title="Training loss")
    left.legend()
    at = {record["step"]: record["tokens"] / 1e6 for record in steps}
    for key, label in (("exactRatio", "exact answers"), ("acceptedRatio", "drafts accepted, k=1")):
        right.plot([at[check["step"]] for check in checks], [check["all"][key] for check in checks], marker="o", label=label)
    right.set(xlabel="padded tokens, millions", ylim=(0, 1.02), title="Held-out problems, greedy")
    right.legend(loc="lower right")
    for axes in (left, right):
        axes.grid(alpha=0.3)
    figure.savefig(FOLDER / "training.png", dpi=120)


if __name__ == "__main__":
    main()
