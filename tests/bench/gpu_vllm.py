"""The peer of `npm run bench -- gpu --peer vllm`: the same checkpoint, shapes and sampling through vLLM, offline.

    python gpu_vllm.py MODEL_DIR DRAFTS(0|1) BATCH,... CONTEXTxBATCH,...

Prints one JSON line a figure. A figure is the difference of a long and a short completion of the same prompts: tokens a
second of decoding alone.
"""

import json
import sys
import time

model, drafts = sys.argv[1], int(sys.argv[2])
batches = [int(n) for n in sys.argv[3].split(",")]
longs = [tuple(map(int, case.split("x"))) for case in sys.argv[4].split(",") if case]


def report(**line):
    print(json.dumps(line), flush=True)


def main():
    begun = time.perf_counter()
    from vllm import LLM, SamplingParams

    options = dict(speculative_config={"method": "mtp", "num_speculative_tokens": 1}) if drafts else {}
    llm = LLM(
        model=model, skip_tokenizer_init=True, dtype="bfloat16", enable_prefix_caching=False, max_model_len=32768,
        max_num_seqs=256, gpu_memory_utilization=0.9, disable_log_stats=False, **options,
    )
    report(step="load", drafts=drafts, seconds=time.perf_counter() - begun)

    def complete(batch, length, tokens, temperature):
        prompts = [
            {"prompt_token_ids": [700 + ((i + 1 + id * 37) * 7919) % 150_000 for i in range(length)]} for id in range(batch)
        ]
        params = SamplingParams(
            temperature=temperature, top_p=1.0 if temperature == 0 else 0.95, max_tokens=tokens, ignore_eos=True, detokenize=False
        )
        begun = time.perf_counter()
        outs = llm.generate(prompts, [params] * batch, use_tqdm=False)
        seconds = time.perf_counter() - begun
        first = outs[0].outputs[0].token_ids
        # It counts: another text means that another model was computed.
        assert all(b == a + 1 for a, b in zip(first, first[1:])), first[:8]
        return seconds

    def case(batch, length, temperature, tokens, times):
        complete(batch, length, 4, temperature)
        short = min(complete(batch, length, 4, temperature) for _ in range(times))
        seconds = min(complete(batch, length, 4 + tokens, temperature) for _ in range(times))
        rate = batch * tokens / (seconds - short)
        report(step="decode", drafts=drafts, batch=batch, contextTokens=length, temperature=temperature,
               tokensPerSecond=rate, promptsPerSecond=batch * length / short)

    for batch in batches:
        for temperature in (0.6,) if drafts else (0, 0.6):
            case(batch, 512, temperature, 128, 2)
    for length, batch in longs:
        case(batch, length, 0.6, 64, 1)
    for metric in llm.get_metrics():
        if "spec_decode" in metric.name and hasattr(metric, "value"):
            report(step="metric", drafts=drafts, name=metric.name, value=float(metric.value))


if __name__ == "__main__":
    main()
