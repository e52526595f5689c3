"""The peer of `npm run bench -- gpu`: the same shapes with random bf16 weights through PyTorch transformers (Qwen2, SDPA).

    python gpu_peer.py CONFIG_JSON CONTEXT_TOKENS BATCH,BATCH,...

Prints one JSON line a figure: decode as a loop of forward passes, as generate(), and as generate() with a static cache,
which transformers compiles (CUDA graphs); prefill in one pass. Medians, warm.
"""

import json
import statistics
import sys
import time

import torch
from transformers import Qwen2Config, Qwen2ForCausalLM
from transformers.cache_utils import DynamicCache

REPETITIONS = 20
GENERATED = 48


def clock(work):
    torch.cuda.synchronize()
    started = time.perf_counter()
    work()
    torch.cuda.synchronize()
    return time.perf_counter() - started


def report(**figures):
    print(json.dumps(figures), flush=True)


def decode_loop(model, context, batch):
    cache = DynamicCache()
    ids = torch.randint(0, model.config.vocab_size, (batch, context), device="cuda")
    token = model(ids, past_key_values=cache, logits_to_keep=1).logits[:, -1:].argmax(-1)
    seconds = []

    def step():
        nonlocal token
        token = model(token, past_key_values=cache).logits[:, -1:].argmax(-1)

    for _ in range(REPETITIONS + 3):
        seconds.append(clock(step))
    return 1000 * statistics.median(seconds[3:])


def generate(model, context, batch, **options):
    """Milliseconds a token: the difference of a long and a short completion."""
    ids = torch.randint(0, model.config.vocab_size, (batch, context), device="cuda")
    mask = torch.ones_like(ids)

    def complete(tokens):
        model.generate(
            ids, attention_mask=mask, max_new_tokens=tokens, min_new_tokens=tokens, do_sample=False, pad_token_id=0, **options
        )

    complete(4)
    complete(4 + GENERATED)
    short = min(clock(lambda: complete(4)) for _ in range(2))
    long = min(clock(lambda: complete(4 + GENERATED)) for _ in range(2))
    return 1000 * (long - short) / GENERATED


def main():
    given, context, batches = json.loads(sys.argv[1]), int(sys.argv[2]), [int(n) for n in sys.argv[3].split(",")]
    theta = given.pop("rope_theta")
    config = Qwen2Config(
        **given, rope_parameters={"rope_type": "default", "rope_theta": theta}, max_position_embeddings=8192, tie_word_embeddings=False
    )
    torch.set_default_dtype(torch.bfloat16)
    with torch.device("cuda"), torch.inference_mode():
        model = Qwen2ForCausalLM(config).eval()
    with torch.inference_mode():
        for batch in batches:
            ms = decode_loop(model, context, batch)
            report(step="decode loop", batch=batch, ms=ms, tokensPerSecond=1000 * batch / ms)
            ms = generate(model, context, batch)
            report(step="generate", batch=batch, ms=ms, tokensPerSecond=1000 * batch / ms)
        for prompt in (512, 4096):
            ids = torch.randint(0, config.vocab_size, (1, prompt), device="cuda")
            ms = 1000 * statistics.median(
                [clock(lambda: model(ids, past_key_values=DynamicCache(), logits_to_keep=1)) for _ in range(8)][3:]
            )
            report(step="prefill", promptTokens=prompt, ms=ms, tokensPerSecond=1000 * prompt / ms)
        for batch in batches[:1]:
            try:
                ms = generate(model, context, batch, cache_implementation="static")
                report(step="generate, static cache, compiled", batch=batch, ms=ms, tokensPerSecond=1000 * batch / ms)
            except Exception as error:  # a machine without a compiler
                report(step="generate, static cache, compiled", batch=batch, error=str(error)[:300])


main()
