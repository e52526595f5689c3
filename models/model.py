"""The architecture in PyTorch: Qwen2's decoder block with MiMo's MTP layer on top.

Owns shapes, the forward pass for training and for cached decoding, and the fake int4 rounding that
training uses. Parameter names equal MiMo's tensor names, so a state dict is the checkpoint.
Source: Qwen2 technical report; MiMo-7B report (arXiv 2505.07608) section 2.2. As there: bias on q, k, v only, half-rotation RoPE, fp32 norms, untied head, MTP fed the
hidden state before model.norm, concatenated [hidden ; embedding], no zeroing of slot 0.
"""

from __future__ import annotations

import threading
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn


@dataclass(frozen=True)
class Shape:
    vocab: int = 640
    hidden: int = 128
    layers: int = 5
    heads: int = 8
    kv_heads: int = 2
    head_dim: int = 32
    ffn: int = 384
    rope_theta: float = 640000.0
    norm_eps: float = 1e-5
    context: int = 2048


INT4_BLOCK = 32


def round_int4(weight: Tensor) -> Tensor:
    """The weight as block-32 symmetric int4 would give it back, with a straight-through gradient."""
    blocks = weight.detach().unflatten(-1, (-1, INT4_BLOCK))  # [out, in / 32, 32]
    scale = blocks.abs().amax(-1, keepdim=True).clamp_min(1e-8) / 7  # [out, in / 32, 1]
    rounded = ((blocks / scale).round().clamp(-8, 7) * scale).flatten(-2)  # [out, in]
    return weight + (rounded - weight.detach())


rounding = threading.local()  # .int4 is set by the training thread that wants it


class Linear(nn.Linear):
    """A linear layer that can run as if its weight were stored in int4."""

    def forward(self, x: Tensor) -> Tensor:
        return F.linear(x, round_int4(self.weight) if getattr(rounding, "int4", False) else self.weight, self.bias)


class Norm(nn.Module):
    def __init__(self, size: int, eps: float):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(size))
        self.eps = eps

    def forward(self, x: Tensor) -> Tensor:
        y = F.rms_norm(x.float(), self.weight.shape, self.weight, self.eps)
        # One cast here spares a cast in each matrix that reads y.
        return y.to(torch.get_autocast_dtype(x.device.type)) if torch.is_autocast_enabled(x.device.type) else y


def rope_angles(shape: Shape, device: torch.device | str = "cpu") -> tuple[Tensor, Tensor]:
    """cos and sin for every position, each [context, head_dim], both halves of a head alike."""
    exponent = torch.arange(0, shape.head_dim, 2, device=device, dtype=torch.float32) / shape.head_dim  # [head_dim / 2]
    position = torch.arange(shape.context, device=device, dtype=torch.float32)  # [context]
    angle = torch.outer(position, shape.rope_theta**-exponent).repeat(1, 2)  # [context, head_dim]
    return angle.cos(), angle.sin()


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    left, right = x.chunk(2, dim=-1)
    return x * cos + torch.cat((-right, left), dim=-1) * sin


@dataclass
class Cache:
    """K and V of one layer, [batch, kvHeads, positions, headDim] each; rows fill at their own pace."""

    k: Tensor
    v: Tensor


class Attention(nn.Module):
    def __init__(self, s: Shape):
        super().__init__()
        self.s = s
        self.q_proj = Linear(s.hidden, s.heads * s.head_dim)
        self.k_proj = Linear(s.hidden, s.kv_heads * s.head_dim)
        self.v_proj = Linear(s.hidden, s.kv_heads * s.head_dim)
        self.o_proj = Linear(s.heads * s.head_dim, s.hidden, bias=False)

    def forward(self, x: Tensor, cos: Tensor, sin: Tensor, cache: Cache | None = None, at: Tensor | None = None) -> Tensor:
        """Causal over x itself, or, with a cache, of one token a row at positions `at` [batch]."""
        b, t, s = x.shape[0], x.shape[1], self.s
        q = self.q_proj(x).view(b, t, s.heads, s.head_dim).transpose(1, 2)  # [batch, heads, tokens, headDim]
        k = self.k_proj(x).view(b, t, s.kv_heads, s.head_dim).transpose(1, 2)  # [batch, kvHeads, tokens, headDim]
        v = self.v_proj(x).view(b, t, s.kv_heads, s.head_dim).transpose(1, 2)  # [batch, kvHeads, tokens, headDim]
        cos, sin = cos.to(q.dtype), sin.to(q.dtype)
        q, k = rotate(q, cos, sin), rotate(k, cos, sin)
        if cache is None:
            seen = torch.ones(t, t, dtype=torch.bool, device=x.device).tril()  # [tokens, tokens]
        elif at is None:
            cache.k[:, :, :t], cache.v[:, :, :t] = k, v
            seen = torch.ones(t, t, dtype=torch.bool, device=x.device).tril()  # [tokens, tokens]
        else:
            row = torch.arange(b, device=x.device)
            cache.k[row, :, at], cache.v[row, :, at] = k[:, :, 0], v[:, :, 0]
            k, v = cache.k, cache.v  # [batch, kvHeads, positions, headDim]
            seen = (torch.arange(k.shape[2], device=x.device) <= at[:, None])[:, None, None, None]  # [batch, 1, 1, 1, positions]
        # Written out: at these sizes it is faster on a CPU than the fused kernel, above all backwards.
        group = s.heads // s.kv_heads
        q = q.reshape(b, s.kv_heads, group * t, s.head_dim)  # [batch, kvHeads, group * tokens, headDim]
        score = (q @ k.transpose(2, 3)).unflatten(2, (group, t)).float() * s.head_dim**-0.5  # [batch, kvHeads, group, tokens, positions]
        weight = score.masked_fill(~seen, float("-inf")).softmax(-1).to(v.dtype)  # [batch, kvHeads, group, tokens, positions]
        out = (weight.flatten(2, 3) @ v).view(b, s.heads, t, s.head_dim)  # [batch, heads, tokens, headDim]
        return self.o_proj(out.transpose(1, 2).reshape(b, t, s.heads * s.head_dim))  # [batch, tokens, hidden]


class Mlp(nn.Module):
    def __init__(self, s: Shape):
        super().__init__()
        self.gate_proj = Linear(s.hidden, s.ffn, bias=False)
        self.up_proj = Linear(s.hidden, s.ffn, bias=False)
        self.down_proj = Linear(s.ffn, s.hidden, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.down_proj(F.silu(self.gate_proj(x)) * self.up_proj(x))  # [batch, tokens, hidden]


class Block(nn.Module):
    def __init__(self, s: Shape):
        super().__init__()
        self.input_layernorm = Norm(s.hidden, s.norm_eps)
        self.self_attn = Attention(s)
        self.post_attention_layernorm = Norm(s.hidden, s.norm_eps)
        self.mlp = Mlp(s)

    def forward(self, x: Tensor, cos: Tensor, sin: Tensor, cache: Cache | None = None, at: Tensor | None = None) -> Tensor:
        x = x + self.self_attn(self.input_layernorm(x), cos, sin, cache, at)  # [batch, tokens, hidden]
        return x + self.mlp(self.post_attention_layernorm(x))  # [batch, tokens, hidden]


class MtpBlock(Block):
    def __init__(self, s: Shape):
        super().__init__(s)
        self.token_layernorm = Norm(s.hidden, s.norm_eps)
        self.hidden_layernorm = Norm(s.hidden, s.norm_eps)
        self.input_proj = Linear(2 * s.hidden, s.hidden, bias=False)
        self.final_layernorm = Norm(s.hidden, s.norm_eps)

    def draft(self, hidden: Tensor, embedding: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        """Slot s gets h_s and the embedding of x_(s+1); its logits, after the head, guess x_(s+2)."""
        pair = torch.cat((self.hidden_layernorm(hidden), self.token_layernorm(embedding)), dim=-1)  # [batch, slots, 2 * hidden]
        return self.final_layernorm(self(self.input_proj(pair), cos, sin))  # [batch, slots, hidden]


class Backbone(nn.Module):
    def __init__(self, s: Shape):
        super().__init__()
        self.embed_tokens = nn.Embedding(s.vocab, s.hidden)
        self.layers = nn.ModuleList(Block(s) for _ in range(s.layers))
        self.norm = Norm(s.hidden, s.norm_eps)
        self.mtp_layers = nn.ModuleList([MtpBlock(s)])


class Mimo(nn.Module):
    def __init__(self, s: Shape):
        super().__init__()
        self.s = s
        self.model = Backbone(s)
        self.lm_head = Linear(s.hidden, s.vocab, bias=False)
        cos, sin = rope_angles(s)
        self.register_buffer("cos", cos, persistent=False)  # [context, head_dim]
        self.register_buffer("sin", sin, persistent=False)  # [context, head_dim]
        self.initialise()

    def initialise(self) -> None:
        """Normal weights of deviation 1/sqrt(in), output matrices scaled down by the depth, biases zero."""
        for name, p in self.named_parameters():
            if p.dim() == 2:
                deviation = 0.02 if "embed" in name or "lm_head" in name else p.shape[1] ** -0.5
                if "o_proj" in name or "down_proj" in name:
                    deviation /= (2 * self.s.layers) ** 0.5
                nn.init.normal_(p, std=deviation)
            elif name.endswith("bias"):
                nn.init.zeros_(p)

    def hidden_states(self, ids: Tensor) -> Tensor:
        """The residual stream after the last block, before model.norm."""
        cos, sin = self.cos[: ids.shape[1]], self.sin[: ids.shape[1]]  # [tokens, headDim]
        x = self.model.embed_tokens(ids)  # [batch, tokens, hidden]
        for block in self.model.layers:
            x = block(x, cos, sin)
        return x

    def logits(self, hidden: Tensor) -> Tensor:
        return self.lm_head(self.model.norm(hidden))  # [batch, tokens, vocab]

    def draft_states(self, hidden: Tensor, ids: Tensor) -> Tensor:
        """The MTP layer's normed output of slots 0 … tokens-2, from the hidden states of the same ids."""
        cos, sin = self.cos[: ids.shape[1] - 1], self.sin[: ids.shape[1] - 1]  # [slots, headDim]
        embedding = self.model.embed_tokens(ids[:, 1:])  # [batch, slots, hidden]
        return self.model.mtp_layers[0].draft(hidden[:, :-1], embedding, cos, sin)  # [batch, slots, hidden]

    def draft_logits(self, hidden: Tensor, ids: Tensor) -> Tensor:
        """Logits of slots 0 … tokens-2 for x_2 … x_tokens."""
        return self.lm_head(self.draft_states(hidden, ids))  # [batch, slots, vocab]

    def decode(self, ids: Tensor, caches: list[Cache], at: Tensor | None) -> Tensor:
        """Hidden states through the caches: of whole prompts (at None) or of one token a row at `at`."""
        if at is None:
            cos, sin = self.cos[: ids.shape[1]], self.sin[: ids.shape[1]]  # [tokens, headDim]
        else:
            cos, sin = self.cos[at][:, None, None], self.sin[at][:, None, None]  # [batch, 1, 1, headDim]
        x = self.model.embed_tokens(ids)  # [batch, tokens, hidden]
        for block, cache in zip(self.model.layers, caches):
            x = block(x, cos, sin, cache, at)
        return x

    def new_caches(self, batch: int, positions: int) -> list[Cache]:
        size = (batch, self.s.kv_heads, positions, self.s.head_dim)
        device = self.lm_head.weight.device
        return [Cache(torch.zeros(size, device=device), torch.zeros(size, device=device)) for _ in self.model.layers]
