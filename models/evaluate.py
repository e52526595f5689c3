"""Exact-answer accuracy and draft acceptance of a model, by greedy decoding.

Owns the batched greedy loop with a KV cache and the k=1 acceptance count. Acceptance is counted as
the engine's loop would see it (worker/src/engines/mimo/engine.ts): draft y from slot (h_(n-1), x_n); if y is the
greedy x_(n+1) the loop moves on by two tokens, else by one. Greedy output does not depend on drafts,
so the walk is replayed over the finished sequence. Rounded weights stand for the engine's int8 and
int4 profiles (block 32, symmetric).
"""

from __future__ import annotations

import argparse
import copy
import json
from collections import defaultdict
from pathlib import Path
from random import Random

import torch
from tokenizers import Tokenizer

from data import encode, render
from model import Mimo
from problems import ARITHMETIC, MAKERS, Conversation, Problem, answer_of, make_problem

HELD_OUT_SEED = 20250512
END = "<|im_end|>"


def held_out_problems(per_task: int, tasks: tuple[str, ...] = tuple(MAKERS), seed: int = HELD_OUT_SEED) -> list[Problem]:
    """The same problems for the same arguments, none of whose keys is ever trained on, no question twice.

    Small talk is a fixed list with no held-out side, so half of the "chat" problems may have been trained on.
    """
    random = Random(seed)
    chosen: dict[str, Problem] = {}
    for task in tasks:
        wanted = len(chosen) + per_task
        while len(chosen) < wanted:
            problem = make_problem(random, task, held_out=task != "chat" or random.random() < 0.5)
            chosen.setdefault(problem.question, problem)
    return list(chosen.values())


@torch.no_grad()
def generate(model: Mimo, prompts: list[list[int]], end: int, most: int) -> list[list[int]]:
    """Greedy continuations, each up to and including `end` or cut after `most` tokens."""
    device = model.lm_head.weight.device
    length = torch.tensor([len(prompt) for prompt in prompts], device=device)  # [batch]
    ids = torch.tensor([prompt + [0] * (int(length.max()) - len(prompt)) for prompt in prompts], device=device)  # [batch, tokens]
    caches = model.new_caches(len(prompts), int(length.max()) + most)
    row = torch.arange(len(prompts), device=device)
    hidden = model.decode(ids, caches, None)[row, length - 1]  # [batch, hidden]
    out, done = [], torch.zeros(len(prompts), dtype=torch.bool, device=device)
    for step in range(most):
        token = model.logits(hidden).argmax(-1)  # [batch]
        out.append(token)
        done |= token == end
        if bool(done.all()):
            break
        hidden = model.decode(token[:, None], caches, length + step)[:, 0]  # [batch, hidden]
    replies = []
    for reply in torch.stack(out, 1).tolist():
        replies.append(reply[: reply.index(end) + 1] if end in reply else reply)
    return replies


@torch.no_grad()
def count_drafts(model: Mimo, prompt: list[int], reply: list[int]) -> tuple[int, int]:
    """(drafted, accepted) of the k=1 loop over one finished greedy sequence."""
    sequence = prompt + reply
    ids = torch.tensor([sequence], device=model.lm_head.weight.device)  # [1, tokens]
    guess = model.draft_logits(model.hidden_states(ids), ids)[0].argmax(-1).tolist()  # slot s guesses x_(s+2)
    drafted = accepted = 0
    n = len(prompt)  # x_n is chosen, x_(n+1) is what a draft would guess
    while n + 1 < len(sequence):
        hit = guess[n - 1] == sequence[n + 1]
        drafted, accepted = drafted + 1, accepted + hit
        n += 2 if hit else 1
    return drafted, accepted


def round_weights(model: Mimo, bits: int) -> Mimo:
    """A copy whose matrices (not the embedding) went through block-32 symmetric rounding."""
    model = copy.deepcopy(model)
    top = 2 ** (bits - 1) - 1
    with torch.no_grad():
        for name, p in model.named_parameters():
            if p.dim() == 2 and "embed_tokens" not in name:
                blocks = p.unflatten(-1, (-1, 32))  # [out, in / 32, 32]
                scale = blocks.abs().amax(-1, keepdim=True).clamp_min(1e-8) / top  # [out, in / 32, 1]
                p.copy_(((blocks / scale).round() * scale).flatten(-2))
    return model


def evaluate(model: Mimo, tokenizer: Tokenizer, problems: list[Problem], system: str | None = "", failures: list | None = None) -> dict:
    """Per task and overall: problems, exact answers, drafts and accepted drafts."""
    model.eval()
    prompts = [encode(tokenizer, render(Conversation(system, (problem,)), ask_only=True))[0] for problem in problems]
    replies = []
    for start in range(0, len(prompts), 128):
        replies += generate(model, prompts[start : start + 128], tokenizer.token_to_id(END), 200)
    counts: dict[str, list[int]] = defaultdict(lambda: [0, 0, 0, 0])
    for problem, prompt, reply in zip(problems, prompts, replies):
        text = tokenizer.decode(reply, skip_special_tokens=True)
        exact = answer_of(text) == problem.answer
        if not exact and failures is not None:
            failures.append({"task": problem.task, "question": problem.question, "answer": problem.answer, "reply": text})
        for task in (problem.task, "all"):
            for place, value in enumerate((1, exact, *count_drafts(model, prompt, reply))):
                counts[task][place] += value
    model.train()
    return {
        task: {"problems": n, "exactRatio": round(exact / n, 4), "acceptedRatio": round(accepted / max(1, drafted), 4)}
        for task, (n, exact, drafted, accepted) in counts.items()
    }


def write_held_out(path: Path, per_task: int = 40) -> None:
    """The arithmetic part of the held-out set as JSON lines, for benchmarks that only speak to a server."""
    problems = held_out_problems(per_task, ARITHMETIC)
    rows = [{"task": problem.task, "question": problem.question, "answer": problem.answer} for problem in problems]
    path.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--checkpoint", type=Path, default=Path(__file__).parent / "mimo-demo")
    parser.add_argument("--per-task", type=int, default=200)
    parser.add_argument("--failures", type=int, default=10, help="wrong replies to print")
    parser.add_argument("--write", type=Path, help="only write the held-out problems to this file")
    arguments = parser.parse_args()
    if arguments.write:
        write_held_out(arguments.write)
        return
    from export import load_checkpoint

    model, tokenizer = load_checkpoint(arguments.checkpoint)
    problems = held_out_problems(arguments.per_task)
    for name, candidate in (("fp32", model), ("int8", round_weights(model, 8)), ("int4", round_weights(model, 4))):
        failures: list = []
        print(json.dumps({"weights": name, **evaluate(candidate, tokenizer, problems, failures=failures)}))
        for failure in failures[: arguments.failures]:
            print("  ", json.dumps(failure, ensure_ascii=False))


if __name__ == "__main__":
    main()
