"""Writes and reads the checkpoint in MiMo-7B's Hugging Face layout.

Owns config.json, generation_config.json and model.safetensors (bf16, MiMo's tensor names), swaps a
finished folder into place, and, run as a program, checks one: the backbone against transformers'
Qwen2ForCausalLM and the template against the rendering used in training.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
from pathlib import Path
from random import Random

import torch
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer

from data import render
from model import Mimo, Shape
from problems import make_conversation
from tokenizer import write_tokenizer


def config_of(shape: Shape, tokenizer: Tokenizer) -> dict:
    """MiMo's own keys, with its odd tokenizer_class list, and this model's sizes."""
    return {
        "architectures": ["MiMoForCausalLM"],
        "attention_bias": True,
        "attention_dropout": 0.0,
        "bos_token_id": tokenizer.token_to_id("<|endoftext|>"),
        "eos_token_id": tokenizer.token_to_id("<|im_end|>"),
        "head_dim": shape.head_dim,
        "hidden_act": "silu",
        "hidden_size": shape.hidden,
        "initializer_range": 0.02,
        "intermediate_size": shape.ffn,
        "max_position_embeddings": shape.context,
        "max_window_layers": shape.layers,
        "model_type": "mimo",
        "num_attention_heads": shape.heads,
        "num_hidden_layers": shape.layers,
        "num_key_value_heads": shape.kv_heads,
        "num_nextn_predict_layers": 1,
        "rms_norm_eps": shape.norm_eps,
        "rope_theta": int(shape.rope_theta),
        "sliding_window": shape.context,
        "tie_word_embeddings": False,
        "tokenizer_class": ["Qwen2Tokenizer"],
        "torch_dtype": "bfloat16",
        "transformers_version": "4.40.1",
        "use_cache": True,
        "use_mrope": False,
        "use_sliding_window": False,
        "vocab_size": shape.vocab,
    }


def write_checkpoint(model: Mimo, tokenizer: Tokenizer, folder: Path) -> None:
    """Writes beside the folder first and renames file by file, so that a reader never meets half a file."""
    fresh = folder.with_name(folder.name + ".partial")
    shutil.rmtree(fresh, ignore_errors=True)
    write_tokenizer(tokenizer, fresh, model.s.context)
    config = config_of(model.s, tokenizer)
    (fresh / "config.json").write_text(json.dumps(config, indent=2) + "\n")
    generation = {
        "bos_token_id": config["bos_token_id"],
        "do_sample": False,
        "eos_token_id": config["eos_token_id"],
        "max_new_tokens": 512,
        "transformers_version": "4.37.0",
    }
    (fresh / "generation_config.json").write_text(json.dumps(generation, indent=2) + "\n")
    tensors = {name: tensor.detach().to("cpu", torch.bfloat16).contiguous() for name, tensor in model.state_dict().items()}
    save_file(tensors, fresh / "model.safetensors", metadata={"format": "pt"})
    folder.mkdir(parents=True, exist_ok=True)
    for path in sorted(fresh.iterdir()):
        path.chmod(0o644)
        os.replace(path, folder / path.name)
    fresh.rmdir()


def load_checkpoint(folder: Path) -> tuple[Mimo, Tokenizer]:
    """The model in fp32 over the stored bf16 weights, and its tokenizer."""
    config = json.loads((folder / "config.json").read_text())
    shape = Shape(
        vocab=config["vocab_size"], hidden=config["hidden_size"], layers=config["num_hidden_layers"], heads=config["num_attention_heads"],
        kv_heads=config["num_key_value_heads"], head_dim=config["head_dim"], ffn=config["intermediate_size"],
        rope_theta=config["rope_theta"], norm_eps=config["rms_norm_eps"], context=config["max_position_embeddings"],
    )  # fmt: skip
    model = Mimo(shape)
    model.load_state_dict({name: tensor.float() for name, tensor in load_file(folder / "model.safetensors").items()})
    return model, Tokenizer.from_file(str(folder / "tokenizer.json"))


def verify(folder: Path) -> None:
    """Raises unless transformers' Qwen2 gives the backbone's logits and the template renders what was trained on."""
    from transformers import AutoTokenizer, Qwen2Config, Qwen2ForCausalLM

    model, tokenizer = load_checkpoint(folder)
    config = json.loads((folder / "config.json").read_text())
    keys = ("vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads", "num_key_value_heads",
            "hidden_act", "max_position_embeddings", "rms_norm_eps", "tie_word_embeddings", "rope_theta", "head_dim")  # fmt: skip
    qwen = Qwen2ForCausalLM(Qwen2Config(**{key: config[key] for key in keys}))
    missing = qwen.load_state_dict({k: v for k, v in model.state_dict().items() if "mtp_layers" not in k}, strict=False)
    assert not missing.missing_keys and not missing.unexpected_keys, missing
    reader = AutoTokenizer.from_pretrained(folder, config=Qwen2Config())
    random, worst = Random(7), 0.0
    for _ in range(200):
        conversation = make_conversation(random)
        messages = [] if conversation.system is None else [{"role": "system", "content": conversation.system}]
        for problem in conversation.problems:
            messages += [{"role": "user", "content": problem.question}, {"role": "assistant", "content": problem.reply()}]
        text = "".join(piece for piece, _ in render(conversation))
        assert reader.apply_chat_template(messages, tokenize=False) == text + "\n", messages
        asked = "".join(piece for piece, _ in render(conversation, ask_only=True))
        assert reader.apply_chat_template(messages[:-1], tokenize=False, add_generation_prompt=True) == asked, messages
        ids = tokenizer.encode(text).ids
        assert reader(text)["input_ids"] == ids
        batch = torch.tensor([ids])
        with torch.no_grad():
            worst = max(worst, float((model.logits(model.hidden_states(batch)) - qwen(batch).logits).abs().max()))
    assert worst < 2e-3, worst
    size = (folder / "model.safetensors").stat().st_size
    print(json.dumps({"logitsDifferenceMax": worst, "modelBytes": size, "parameters": sum(p.numel() for p in model.parameters())}))


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--checkpoint", type=Path, default=Path(__file__).parent / "mimo-demo")
    verify(parser.parse_args().checkpoint)
