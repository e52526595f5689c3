"""Conversations as token ids, and the stream of training batches.

Owns the ChatML rendering used in training (equal to the checkpoint's template, which export.py
checks), the mask of learnt tokens and the grouping of conversations by length. The stream depends on
its seed alone.
"""

from __future__ import annotations

from collections.abc import Iterator
from random import Random

import torch
from tokenizers import Tokenizer
from torch import Tensor

from problems import Conversation, make_conversation
from tokenizer import DEFAULT_SYSTEM

LENGTHS = (48, 64, 80, 96, 112, 128, 160, 192, 256)
GENERATED_AT_ONCE = 1024


def render(conversation: Conversation, ask_only: bool = False) -> list[tuple[str, bool]]:
    """Pieces of text, each with whether the model is to learn it; ask_only ends before the last reply."""
    system = DEFAULT_SYSTEM if conversation.system is None else conversation.system
    pieces = [(f"<|im_start|>system\n{system}<|im_end|>\n", False)]
    for index, problem in enumerate(conversation.problems):
        pieces.append((f"<|im_start|>user\n{problem.question}<|im_end|>\n<|im_start|>assistant\n", False))
        if not (ask_only and index == len(conversation.problems) - 1):
            pieces += [(f"{problem.reply()}<|im_end|>", True), ("\n", False)]
    return pieces if ask_only else pieces[:-1]


def encode(tokenizer: Tokenizer, pieces: list[tuple[str, bool]]) -> tuple[list[int], list[bool]]:
    """Ids and the learnt mask. Pieces are cut at special tokens, where no merge can cross."""
    ids, learnt = [], []
    for (_, learn), encoding in zip(pieces, tokenizer.encode_batch_fast([text for text, _ in pieces])):
        ids += encoding.ids
        learnt += [learn] * len(encoding.ids)
    return ids, learnt


def batches(tokenizer: Tokenizer, seed: int, tokens: int) -> Iterator[tuple[Tensor, Tensor]]:
    """Endless (ids, learnt), both [rows, length], rows * length about `tokens`; a batch has one padded length."""
    random = Random(seed)
    waiting: dict[int, list[tuple[list[int], list[bool]]]] = {length: [] for length in LENGTHS}
    while True:
        for _ in range(GENERATED_AT_ONCE):
            ids, learnt = encode(tokenizer, render(make_conversation(random)))
            fits = next((length for length in LENGTHS if len(ids) <= length), None)
            if fits is None:
                continue
            waiting[fits].append((ids, learnt))
            if len(waiting[fits]) == tokens // fits:
                rows, waiting[fits] = waiting[fits], []
                # Right padding with id 0 is never learnt and, under causal attention, never seen.
                yield (
                    torch.tensor([ids + [0] * (fits - len(ids)) for ids, _ in rows]),
                    torch.tensor([learnt + [False] * (fits - len(learnt)) for _, learnt in rows]),
                )
