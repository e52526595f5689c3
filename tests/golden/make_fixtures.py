"""Makes the golden checkpoints and their expected values: what our engine is compared with, by code that is not ours.

The oracle of the backbone is PyTorch `transformers` Qwen2ForCausalLM (eager attention, float32): MiMo's backbone is
exactly Qwen2. The draft layer (MTP) is written here from the report (arXiv 2505.07608, figure 2) and Xiaomi's vLLM
loader: input_proj over [hidden ; embedding of the next token], one Qwen2 block, final_layernorm, the shared lm_head.
Every expected value is computed in float32 from the weights as stored, that is, after rounding to bfloat16.

Shapes: weights are [out, in]; logits [positions, vocabulary]; MTP slot s pairs the hidden state of position s with the
embedding of token s+1 and predicts token s+2, so a prompt of n tokens has n-1 slots; slot s stands at RoPE position s and
slot 0 is not masked. The hidden state is the residual before model.norm ("pre_norm") unless "post_norm" is said.

The quantisation rule (symmetric, blocks of 32 along the input of the WHOLE [out, in] matrix, before any slicing; all
arithmetic in float32, scales are float32; an input that is not a multiple of 32 is refused):

  int8   scale = float32(maxabs / 127)                q = clamp(floor(v + 0.5) + 128, 0, 255)   value = (q - 128) * scale
  int4   scale = m / -8, where m is the first         q = clamp(floor(v + 0.5) + 8, 0, 15)      value = (q - 8) * scale
         element of the largest magnitude, signed
  both   inv = float32(1 / scale), v = float32(w * inv); scale 0 gives q = 128 (int8) or 8 (int4) for the whole block

Quantised: q, k, v, o, gate, up and down projections, lm_head, the MTP block's and input_proj. Not quantised: the
embedding, norms, biases. Expected values of a quantised engine are those of the oracle run on the dequantised weights.

The MTP layers are trained for a few seconds to agree with most, not all, of the greedy continuation, so that a test of
speculation sees both accepted and rejected drafts.

  python make_fixtures.py            writes fixtures/<name>/; see README.md for what is in there
"""

import hashlib
import json
import math
import shutil
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from safetensors.torch import save_file
from transformers import Qwen2Config, Qwen2ForCausalLM

GREEDY_TOKENS = 256
MINIMUM_MARGIN = 4e-3  # smallest top-1 minus top-2 logit over the recorded continuation
BLOCK = 32
EPS = 1e-5
OUT = Path(__file__).parent / "fixtures"


@dataclass(frozen=True)
class Shape:
    name: str
    hidden: int
    heads: int
    kv_heads: int
    head_dim: int
    ffn: int
    layers: int
    vocabulary: int
    rope_theta: float
    tensor_parallel: tuple  # the world sizes this shape divides into
    mtp: bool = True
    shards: int = 1
    prompt_tokens: int = 48
    post_norm: bool = False  # also record MTP logits for the post-norm wiring
    quantised: bool = False


SHAPES = [
    Shape("one-to-one", 64, 2, 2, 16, 26, 2, 67, 10000.0, (1, 2), post_norm=True),
    Shape("two-to-one-sharded", 32, 8, 4, 16, 44, 2, 131, 640000.0, (1, 2, 4), shards=3, prompt_tokens=32),
    Shape("four-to-one-no-mtp", 32, 8, 2, 16, 90, 2, 257, 1000000.0, (1, 2), mtp=False, prompt_tokens=24),
    Shape("quantised", 32, 8, 4, 16, 128, 1, 131, 640000.0, (1, 2, 4), prompt_tokens=24, quantised=True),
]


def block_tensors(s: Shape, prefix: str, g: torch.Generator) -> dict:
    """One Qwen2 block's tensors. Spread wide enough that attention is peaked and the residual is not the embedding alone."""

    def matrix(out, inp, gain):
        return torch.randn(out, inp, generator=g) * (gain / math.sqrt(inp))

    def norm():
        return 1 + 0.2 * torch.randn(s.hidden, generator=g)

    q, kv = s.heads * s.head_dim, s.kv_heads * s.head_dim
    return {
        f"{prefix}.input_layernorm.weight": norm(),
        f"{prefix}.self_attn.q_proj.weight": matrix(q, s.hidden, 1.5),
        f"{prefix}.self_attn.q_proj.bias": 0.3 * torch.randn(q, generator=g),
        f"{prefix}.self_attn.k_proj.weight": matrix(kv, s.hidden, 1.5),
        f"{prefix}.self_attn.k_proj.bias": 0.3 * torch.randn(kv, generator=g),
        f"{prefix}.self_attn.v_proj.weight": matrix(kv, s.hidden, 1.5),
        f"{prefix}.self_attn.v_proj.bias": 0.3 * torch.randn(kv, generator=g),
        f"{prefix}.self_attn.o_proj.weight": matrix(s.hidden, q, 1.5),
        f"{prefix}.post_attention_layernorm.weight": norm(),
        f"{prefix}.mlp.gate_proj.weight": matrix(s.ffn, s.hidden, 1.5),
        f"{prefix}.mlp.up_proj.weight": matrix(s.ffn, s.hidden, 1.5),
        f"{prefix}.mlp.down_proj.weight": matrix(s.hidden, s.ffn, 1.5),
    }


def random_weights(s: Shape, seed: int) -> dict:
    g = torch.Generator().manual_seed(seed)
    w = {"model.embed_tokens.weight": torch.randn(s.vocabulary, s.hidden, generator=g)}
    for i in range(s.layers):
        w |= block_tensors(s, f"model.layers.{i}", g)
    w["model.norm.weight"] = 1 + 0.2 * torch.randn(s.hidden, generator=g)
    w["lm_head.weight"] = torch.randn(s.vocabulary, s.hidden, generator=g) * (3 / math.sqrt(s.hidden))
    if s.mtp:
        p = "model.mtp_layers.0"
        for name in ("token_layernorm", "hidden_layernorm", "final_layernorm"):
            w[f"{p}.{name}.weight"] = 1 + 0.2 * torch.randn(s.hidden, generator=g)
        w[f"{p}.input_proj.weight"] = torch.randn(s.hidden, 2 * s.hidden, generator=g) / math.sqrt(2 * s.hidden)
        w |= block_tensors(s, p, g)
    return {k: v.to(torch.bfloat16) for k, v in w.items()}


# --- the oracle -------------------------------------------------------------------------------------------------------


def qwen2(s: Shape, w: dict) -> Qwen2ForCausalLM:
    config = Qwen2Config(
        vocab_size=s.vocabulary,
        hidden_size=s.hidden,
        intermediate_size=s.ffn,
        num_hidden_layers=s.layers,
        num_attention_heads=s.heads,
        num_key_value_heads=s.kv_heads,
        head_dim=s.head_dim,
        max_position_embeddings=32768,
        rms_norm_eps=EPS,
        rope_parameters={"rope_type": "default", "rope_theta": s.rope_theta},
        tie_word_embeddings=False,
        use_sliding_window=False,
        attn_implementation="eager",
        dtype="float32",
    )
    model = Qwen2ForCausalLM(config).eval().float()
    backbone = {k: v.float() for k, v in w.items() if "mtp_layers" not in k}
    model.load_state_dict(backbone, strict=True)
    assert model.config._attn_implementation == "eager"
    expected = 1.0 / s.rope_theta ** (torch.arange(0, s.head_dim, 2, dtype=torch.float32) / s.head_dim)
    assert torch.allclose(model.model.rotary_emb.inv_freq, expected, rtol=1e-6)
    return model


@torch.no_grad()
def backbone(model: Qwen2ForCausalLM, ids: torch.Tensor):
    """ids [n] -> logits [n, vocabulary], hidden before model.norm [n, hidden], after it [n, hidden]."""
    seen = {}
    hook = model.model.norm.register_forward_hook(lambda _, a, out: seen.update(pre=a[0][0], post=out[0]))
    logits = model(ids[None]).logits[0]
    hook.remove()
    return logits, seen["pre"].clone(), seen["post"].clone()


@torch.no_grad()
def greedy(model: Qwen2ForCausalLM, prompt: torch.Tensor, count: int) -> list:
    ids, cache, feed = [], None, prompt[None]
    for _ in range(count):
        out = model(feed, past_key_values=cache, use_cache=True)
        cache = out.past_key_values
        ids.append(int(out.logits[0, -1].argmax()))
        feed = torch.tensor([[ids[-1]]])
    return ids


# --- the draft layer, independent of transformers ---------------------------------------------------------------------


def rms_norm(x, gain):
    return gain * (x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + EPS))


def rope(x, theta):
    """x [heads, n, head_dim]; half rotation: element i is paired with element i + head_dim/2."""
    heads, n, dim = x.shape
    half = dim // 2
    freq = 1.0 / theta ** (torch.arange(0, dim, 2, dtype=torch.float32) / dim)
    angle = torch.arange(n, dtype=torch.float32)[:, None] * freq[None]  # [n, half]
    cos, sin = angle.cos(), angle.sin()
    a, b = x[..., :half], x[..., half:]
    return torch.cat([a * cos - b * sin, b * cos + a * sin], dim=-1)


def mtp_forward(s: Shape, w: dict, hidden: torch.Tensor, next_ids: torch.Tensor) -> torch.Tensor:
    """hidden [n, hidden] of positions 0..n-1, next_ids [n] the tokens at positions 1..n -> logits [n, vocabulary]."""
    p = {k.removeprefix("model.mtp_layers.0."): v.float() for k, v in w.items() if "mtp_layers.0" in k}
    n = hidden.shape[0]
    a = rms_norm(hidden, p["hidden_layernorm.weight"])
    b = rms_norm(w["model.embed_tokens.weight"].float()[next_ids], p["token_layernorm.weight"])
    z = torch.cat([a, b], dim=-1) @ p["input_proj.weight"].T  # hidden half first

    x = rms_norm(z, p["input_layernorm.weight"])

    def heads(name, count):
        y = x @ p[f"self_attn.{name}_proj.weight"].T + p[f"self_attn.{name}_proj.bias"]
        return y.view(n, count, s.head_dim).transpose(0, 1)  # [count, n, head_dim]

    q = rope(heads("q", s.heads), s.rope_theta)
    k = rope(heads("k", s.kv_heads), s.rope_theta)
    v = heads("v", s.kv_heads)
    mask = torch.full((n, n), float("-inf")).triu(1)
    per_kv = s.heads // s.kv_heads
    attended = []
    for h in range(s.heads):
        scores = q[h] @ k[h // per_kv].T / math.sqrt(s.head_dim) + mask
        attended.append(torch.softmax(scores, dim=-1) @ v[h // per_kv])
    u = z + torch.cat(attended, dim=-1) @ p["self_attn.o_proj.weight"].T

    y = rms_norm(u, p["post_attention_layernorm.weight"])
    gated = F.silu(y @ p["mlp.gate_proj.weight"].T) * (y @ p["mlp.up_proj.weight"].T)
    out = u + gated @ p["mlp.down_proj.weight"].T
    return rms_norm(out, p["final_layernorm.weight"]) @ w["lm_head.weight"].float().T


def train_mtp(s: Shape, w: dict, hidden: torch.Tensor, ids: torch.Tensor, prompt_tokens: int) -> None:
    """Fits the draft layer to the sequence until about three quarters of the continuation's drafts agree."""
    names = [k for k in w if "mtp_layers" in k]
    live = dict(w)
    for k in names:
        live[k] = w[k].float().clone().requires_grad_()
    optimizer = torch.optim.Adam([live[k] for k in names], lr=4e-3)
    target = ids[2:]
    for _ in range(400):
        logits = mtp_forward(s, live, hidden[:-2], ids[1:-1])
        with torch.no_grad():
            agreed = (logits.argmax(-1) == target)[prompt_tokens - 2 :].float().mean()
        if agreed > 0.75:
            break
        F.cross_entropy(logits[prompt_tokens - 2 :], target[prompt_tokens - 2 :]).backward()
        optimizer.step()
        optimizer.zero_grad()
    for k in names:
        w[k] = live[k].detach().to(torch.bfloat16)


# --- quantisation -----------------------------------------------------------------------------------------------------


def is_quantised(name: str) -> bool:
    return name.endswith("_proj.weight") or name == "lm_head.weight"


def quantise(matrix: np.ndarray, bits: int):
    """matrix float32 [out, in] -> q uint8 [out, in] (one value a byte for int4 too), scales float32 [out, in/32]."""
    out, inp = matrix.shape
    if inp % BLOCK != 0:
        raise ValueError(f"input {inp} is not a multiple of {BLOCK}")
    w = matrix.astype(np.float32).reshape(out, inp // BLOCK, BLOCK)
    if bits == 8:
        scale = np.abs(w).max(-1) / np.float32(127)
        zero, top = 128, 255
    else:
        first = np.abs(w).argmax(-1)[..., None]  # argmax gives the first of equals
        scale = np.take_along_axis(w, first, -1)[..., 0] / np.float32(-8)
        zero, top = 8, 15
    assert scale.dtype == np.float32
    with np.errstate(divide="ignore"):
        inverse = np.where(scale == 0, np.float32(0), np.float32(1) / scale).astype(np.float32)
    v = (w * inverse[..., None]).astype(np.float32)
    q = np.clip(np.floor(v.astype(np.float64) + 0.5) + zero, 0, top).astype(np.uint8)
    return q.reshape(out, inp), scale


def dequantise(q: np.ndarray, scale: np.ndarray, bits: int) -> np.ndarray:
    out, inp = q.shape
    zero = 128 if bits == 8 else 8
    centred = q.reshape(out, inp // BLOCK, BLOCK).astype(np.float32) - np.float32(zero)
    return (centred * scale[..., None]).astype(np.float32).reshape(out, inp)


def quantised_weights(w: dict, bits: int):
    """The dequantised weights, and for each matrix the sha256 of its q bytes and of its scales (little-endian float32)."""
    result, digests = {}, {}
    for name, tensor in w.items():
        if not is_quantised(name):
            result[name] = tensor
            continue
        q, scale = quantise(tensor.float().numpy(), bits)
        result[name] = torch.from_numpy(dequantise(q, scale, bits))
        digests[name] = {
            "values": hashlib.sha256(q.tobytes()).hexdigest()[:16],
            "scales": hashlib.sha256(scale.astype("<f4").tobytes()).hexdigest()[:16],
        }
    return result, digests


def drift(reference: torch.Tensor, other: torch.Tensor) -> dict:
    p = torch.log_softmax(reference, -1)
    q = torch.log_softmax(other, -1)
    return {
        "maxAbs": float((reference - other).abs().max()),
        "rms": float((reference - other).pow(2).mean().sqrt()),
        "meanKl": float((p.exp() * (p - q)).sum(-1).mean()),
        "top1AgreementRatio": float((reference.argmax(-1) == other.argmax(-1)).float().mean()),
    }


# --- writing ----------------------------------------------------------------------------------------------------------


def config_json(s: Shape, eos: int, bos: int) -> dict:
    config = {
        "architectures": ["MiMoForCausalLM"],
        "attention_bias": True,
        "attention_dropout": 0.0,
        "bos_token_id": bos,
        "eos_token_id": eos,
        "head_dim": s.head_dim,
        "hidden_act": "silu",
        "hidden_size": s.hidden,
        "initializer_range": 0.02,
        "intermediate_size": s.ffn,
        "max_position_embeddings": 32768,
        "max_window_layers": s.layers,
        "model_type": "mimo",
        "num_attention_heads": s.heads,
        "num_hidden_layers": s.layers,
        "num_key_value_heads": s.kv_heads,
        "num_nextn_predict_layers": 1,
        "rms_norm_eps": EPS,
        "rope_theta": int(s.rope_theta),
        "sliding_window": 32768,
        "tie_word_embeddings": False,
        "tokenizer_class": ["Qwen2Tokenizer"],
        "torch_dtype": "bfloat16",
        "transformers_version": "4.40.1",
        "use_cache": True,
        "use_mrope": False,
        "use_sliding_window": False,
        "vocab_size": s.vocabulary,
    }
    if not s.mtp:
        del config["num_nextn_predict_layers"]
    return config


def write_weights(directory: Path, w: dict, shards: int) -> None:
    w = {k: v.contiguous() for k, v in w.items()}
    if shards == 1:
        save_file(w, directory / "model.safetensors", metadata={"format": "pt"})
        return
    names = list(w)
    per_shard = math.ceil(len(names) / shards)
    weight_map = {}
    for i in range(shards):
        file = f"model-{i + 1:05d}-of-{shards:05d}.safetensors"
        part = {k: w[k] for k in names[i * per_shard : (i + 1) * per_shard]}
        save_file(part, directory / file, metadata={"format": "pt"})
        weight_map |= {k: file for k in part}
    index = {
        "metadata": {"total_size": sum(v.numel() * 2 for v in w.values())},
        "weight_map": dict(sorted(weight_map.items())),
    }
    (directory / "model.safetensors.index.json").write_text(json.dumps(index, indent=1) + "\n")


def dump_json(value: dict) -> str:
    """Indented by key, with lists of numbers on one line."""
    parts = [f"  {json.dumps(k)}: {json.dumps(v)}" for k, v in value.items()]
    return "{\n" + ",\n".join(parts) + "\n}\n"


def margins(logits: torch.Tensor) -> torch.Tensor:
    top = logits.topk(2, dim=-1).values
    return top[:, 0] - top[:, 1]


def search_seed(s: Shape):
    """The first seed whose continuation is far from ties and does not fall into a short cycle."""
    for seed in range(1, 500):
        w = random_weights(s, seed)
        model = qwen2(s, w)
        g = torch.Generator().manual_seed(1000 + seed)
        prompt = torch.randint(0, s.vocabulary, (s.prompt_tokens,), generator=g)
        ids = greedy(model, prompt, GREEDY_TOKENS)
        whole = torch.cat([prompt, torch.tensor(ids)])
        logits, pre, post = backbone(model, whole)
        path = logits[s.prompt_tokens - 1 : -1]
        margin = float(margins(path).min())
        agree = path.argmax(-1).tolist() == ids  # with the cache = without it
        lively = len(set(ids[-64:])) >= 24
        print(f"  seed {seed}: margin {margin:.5f} distinct {len(set(ids))} last64 {len(set(ids[-64:]))}", flush=True)
        if agree and margin > MINIMUM_MARGIN and lively:
            return seed, w, prompt, ids, whole, logits, pre, post
    raise RuntimeError(f"no seed for {s.name}")


def make(s: Shape) -> None:
    print(s.name, flush=True)
    seed, w, prompt, ids, whole, logits, pre, post = search_seed(s)
    n = s.prompt_tokens
    unused = [t for t in range(s.vocabulary - 1, -1, -1) if t not in set(ids)]
    tensors = {"prompt_ids": prompt.to(torch.int32), "logits": logits[:n], "hidden_pre_norm": pre[:n]}
    facts = {
        "seed": seed,
        "tensorParallel": list(s.tensor_parallel),
        "promptIds": prompt.tolist(),
        "greedyIds": ids,
        "greedyMinMargin": float(margins(logits[n - 1 : -1]).min()),
        "greedyDistinct": len(set(ids)),
        "logitsStd": float(logits.std()),
    }
    if s.mtp:
        train_mtp(s, w, pre, whole, n)
        with torch.no_grad():
            draft = mtp_forward(s, w, pre[:-1], whole[1:])
            tensors["mtp_logits"] = draft[: n - 1]
            if s.post_norm:
                tensors["mtp_logits_post_norm"] = mtp_forward(s, w, post[: n - 1], whole[1:n])
        # Slot n-1+i is drafted when greedyIds[i] is chosen but not yet run, and guesses greedyIds[i+1].
        guesses = draft[n - 1 :].argmax(-1)[: GREEDY_TOKENS - 1]
        agreed = guesses == torch.tensor(ids[1:])
        facts["draftIds"] = guesses.tolist()
        facts["draftAgreementRatio"] = float(agreed.float().mean())
        facts["draftMinMargin"] = float(margins(draft[n - 1 :]).min())
    if s.quantised:
        facts["quantised"] = {}
        for bits in (8, 4):
            kind = f"int{bits}"
            qw, digests = quantised_weights(w, bits)
            q_logits, q_pre, _ = backbone(qwen2(s, qw), whole[:n])
            with torch.no_grad():
                q_draft = mtp_forward(s, qw, q_pre[:-1], whole[1:n])
            tensors[f"logits_{kind}"] = q_logits
            tensors[f"mtp_logits_{kind}"] = q_draft
            facts["quantised"][kind] = {
                "drift": drift(logits[:n], q_logits),
                "mtpDrift": drift(tensors["mtp_logits"], q_draft),
                "sha256": digests,
            }
    directory = OUT / s.name
    shutil.rmtree(directory, ignore_errors=True)
    directory.mkdir(parents=True)
    write_weights(directory, w, s.shards)
    # Neither id is ever produced by the recorded continuation, so it is the same with and without a stop at eos.
    (directory / "config.json").write_text(json.dumps(config_json(s, eos=unused[0], bos=unused[1]), indent=2) + "\n")
    save_file({k: v.contiguous() for k, v in tensors.items()}, directory / "expected.safetensors")
    (directory / "expected.json").write_text(dump_json(facts))
    size = sum(f.stat().st_size for f in directory.iterdir())
    brief = {k: v for k, v in facts.items() if k in ("seed", "greedyMinMargin", "greedyDistinct", "logitsStd", "draftAgreementRatio")}
    print(f"  {size} bytes", brief, {k: (v["drift"], v["mtpDrift"]) for k, v in facts.get("quantised", {}).items()}, flush=True)


if __name__ == "__main__":
    torch.manual_seed(0)
    torch.set_num_threads(1)
    for shape in SHAPES:
        make(shape)
