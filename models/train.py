"""Trains the demonstration checkpoint and writes it with its log and plot.

Owns the optimiser, the schedule, the log and the end of a run. One command retrains:
`python models/train.py`. Everything random comes from --seed; the number of steps is fixed, so a
slower machine takes longer but ends at the same place. Muon (Jordan 2024; as in torch.optim) moves the
matrices of the blocks, AdamW the embedding, head, norms and biases. In the last part of a run every
second batch goes through int4-rounded weights, so that the engine's int4 profile keeps the accuracy.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import torch
import torch.nn.functional as F

from data import batches
from evaluate import evaluate, held_out_problems, round_weights
from model import Mimo, Shape, rounding
from tokenizer import build_tokenizer

MTP_WEIGHT = 0.3


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "mimo-demo")
    parser.add_argument("--log", type=Path, default=Path(__file__).parent / "training-log.jsonl")
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--steps", type=int, default=1850)
    parser.add_argument("--batches", type=int, default=2, help="batches a step")
    parser.add_argument("--tokens", type=int, default=2048, help="padded tokens a batch")
    parser.add_argument("--muon", type=float, default=2e-3, help="peak rate of the matrices")
    parser.add_argument("--adam", type=float, default=3e-3, help="peak rate of everything else")
    parser.add_argument("--warmup", type=int, default=40)
    parser.add_argument("--decay", type=float, default=0.7, help="last part of the steps, over which the rate falls to 0")
    parser.add_argument("--int4", type=float, default=0.3, help="last part of the steps with int4 rounding in every second batch")
    parser.add_argument("--hidden", type=int, default=Shape.hidden)
    parser.add_argument("--layers", type=int, default=Shape.layers)
    parser.add_argument("--ffn", type=int, default=Shape.ffn)
    parser.add_argument("--save-every", type=int, default=100)
    parser.add_argument("--watch", type=int, default=5, help="held-out problems a task at each save")
    parser.add_argument("--final", type=int, default=40, help="held-out problems a task at the end")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--state", type=Path, help="file that keeps the run's state at each save; a run that finds it goes on from there")
    parser.add_argument("--no-export", action="store_true", help="only train, evaluate and log")
    return parser.parse_args()


def rate_at(step: int, arguments: argparse.Namespace) -> float:
    """Factor on the peak rates: a linear rise, a level part, a linear fall to 0."""
    left = (arguments.steps - step) / (arguments.steps * arguments.decay)
    return min(1.0, (step + 1) / arguments.warmup, left)


def losses(model: Mimo, ids: torch.Tensor, learnt: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Mean cross-entropies of the learnt tokens: the next token, and the MTP layer's next but one."""
    with torch.autocast(ids.device.type, torch.bfloat16, cache_enabled=False):
        hidden = model.hidden_states(ids)  # [rows, length, hidden]
        slots = model.draft_states(hidden, ids)[:, :-1]  # [rows, length - 2, hidden]
        # The head runs only where something is learnt, about half of the positions.
        following = model.logits(hidden[:, :-1][learnt[:, 1:]])  # [learnt, vocab]
        drafts = model.lm_head(slots[learnt[:, 2:]])  # [learnt, vocab]
    first = F.cross_entropy(following.float(), ids[:, 1:][learnt[:, 1:]])
    second = F.cross_entropy(drafts.float(), ids[:, 2:][learnt[:, 2:]])
    return first, second


def main() -> None:
    arguments = parse_arguments()
    torch.set_num_threads(1)
    torch.manual_seed(arguments.seed)
    tokenizer = build_tokenizer()
    shape = Shape(hidden=arguments.hidden, layers=arguments.layers, ffn=arguments.ffn)
    model = Mimo(shape).to(arguments.device)
    matrices = [p for name, p in model.named_parameters() if p.dim() == 2 and "embed" not in name and "lm_head" not in name]
    parameters = list(model.parameters())
    others = [p for name, p in model.named_parameters() if not any(p is matrix for matrix in matrices)]
    # One thread a batch with single-threaded operations: on shared cores that is two to three times faster than
    # two threads an operation, which wait for each other at every small matrix (measured on 2 cores under load).
    pool = ThreadPoolExecutor(arguments.threads)
    muons = [
        torch.optim.Muon(matrices[part :: arguments.threads], lr=arguments.muon, weight_decay=0.1, momentum=0.95, adjust_lr_fn="match_rms_adamw")
        for part in range(arguments.threads)
    ]
    adam = torch.optim.AdamW(others, lr=arguments.adam, weight_decay=0.0, betas=(0.9, 0.98))
    stream = batches(tokenizer, arguments.seed, arguments.tokens)
    watched = held_out_problems(arguments.watch)

    arguments.log.parent.mkdir(parents=True, exist_ok=True)
    log = arguments.log.open("a" if arguments.state and arguments.state.exists() else "w")

    def write(record: dict) -> None:
        log.write(json.dumps(record) + "\n")
        log.flush()
        print(json.dumps(record), flush=True)

    def export() -> None:
        if not arguments.no_export:
            from export import write_checkpoint

            write_checkpoint(model, tokenizer, arguments.out)

    write({"kind": "start", "parameters": sum(p.numel() for p in model.parameters()), "torch": torch.__version__, "cores": os.cpu_count(),
           **{key: str(value) if isinstance(value, Path) else value for key, value in vars(arguments).items() if key not in ("out", "log", "state")}})  # fmt: skip
    def gradients(index: int, ids: torch.Tensor, learnt: torch.Tensor, int4: bool) -> tuple:
        """One batch's losses and gradients. Runs in a thread of its own, so the gradients are returned, not accumulated."""
        rounding.int4 = int4 and index % 2 == 1
        first, second = losses(model, ids, learnt)
        return first.detach(), second.detach(), torch.autograd.grad(first + MTP_WEIGHT * second, parameters)

    start, tokens, earlier, sums = 0, 0, 0.0, [0.0, 0.0, 0]
    optimisers = [*muons, adam]
    if arguments.state and arguments.state.exists():
        state = torch.load(arguments.state)
        start, tokens, earlier = state["step"], state["tokens"], state["seconds"]
        model.load_state_dict(state["model"])
        for optimiser, kept in zip(optimisers, state["optimisers"]):
            optimiser.load_state_dict(kept)
        for _ in range(start * arguments.batches):
            next(stream)
    began = time.monotonic() - earlier
    for step in range(start, arguments.steps):
        factor = rate_at(step, arguments)
        for optimiser, peak in [(muon, arguments.muon) for muon in muons] + [(adam, arguments.adam)]:
            for group in optimiser.param_groups:
                group["lr"] = peak * factor
        int4 = step >= arguments.steps * (1 - arguments.int4)
        work = []
        for index in range(arguments.batches):
            ids, learnt = (tensor.to(arguments.device) for tensor in next(stream))
            work.append(pool.submit(gradients, index, ids, learnt, int4))
            tokens += ids.numel()
        results = [future.result() for future in work]
        # Summed in the order of the batches: which thread ends first must not change the sum.
        for parameter, *parts in zip(parameters, *(result[2] for result in results)):
            parameter.grad = sum(parts[1:], parts[0]) / arguments.batches
        torch.nn.utils.clip_grad_norm_(parameters, 1.0)
        for future in [pool.submit(muon.step) for muon in muons]:
            future.result()
        adam.step()
        sums = [sums[0] + sum(r[0] for r in results), sums[1] + sum(r[1] for r in results), sums[2] + len(results)]
        last = step + 1 == arguments.steps
        if (step + 1) % 20 == 0 or last:
            write({"kind": "step", "step": step + 1, "tokens": tokens, "seconds": round(time.monotonic() - began, 1),
                   "cpuSeconds": round(time.process_time(), 1), "rate": round(factor, 4),
                   "loss": round(float(sums[0] / sums[2]), 5), "mtpLoss": round(float(sums[1] / sums[2]), 5)})  # fmt: skip
            sums = [0.0, 0.0, 0]
        if (step + 1) % (3 * arguments.save_every) == 0 and not last:
            write({"kind": "check", "step": step + 1, "seconds": round(time.monotonic() - began, 1), **evaluate(model, tokenizer, watched)})
            export()
        if (step + 1) % arguments.save_every == 0 and arguments.state:
            kept = {"step": step + 1, "tokens": tokens, "seconds": time.monotonic() - began,
                    "model": model.state_dict(), "optimisers": [optimiser.state_dict() for optimiser in optimisers]}  # fmt: skip
            torch.save(kept, arguments.state.with_suffix(".partial"))
            os.replace(arguments.state.with_suffix(".partial"), arguments.state)
    wall = round(time.monotonic() - began, 1)
    export()
    problems = held_out_problems(arguments.final)
    for name, candidate in (("fp32", model), ("int8", round_weights(model, 8)), ("int4", round_weights(model, 4))):
        write({"kind": "end", "weights": name, "seconds": wall, "tokens": tokens, **evaluate(candidate, tokenizer, problems)})


if __name__ == "__main__":
    main()
