"""Small random-weight language and image models, made in the test: LLaMA-, Qwen- and GPT-2-like, ViT and ResNet."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import torch
from tiny_models import WORDS, tokenizer
from torch import nn

CHAT = (
    "{% for m in messages %}{{ '[' + m['role'] + '] ' + m['content'] + ' [SEP] ' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '[assistant] ' }}{% endif %}"
)
_CAUSAL: dict[str, dict[str, Any]] = {
    "llama": {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4},
    "qwen2": {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4},
    "gpt2": {"n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 64},
}


def causal_checkpoint(folder: Path, architecture: str, seed: int = 0) -> Path:
    """Write a causal language model with a tokenizer that has a chat template."""
    from transformers import AutoConfig, AutoModelForCausalLM

    sizes: dict[str, Any] = dict(_CAUSAL[architecture])
    if architecture != "gpt2":
        sizes |= {
            "num_key_value_heads": 2,
            "max_position_embeddings": 64,
            "tie_word_embeddings": architecture == "qwen2",
        }
    config = AutoConfig.for_model(
        architecture,
        vocab_size=len(WORDS) + 5,
        initializer_range=0.2,
        bos_token_id=2,
        eos_token_id=3,
        pad_token_id=0,
        **sizes,
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = AutoModelForCausalLM.from_config(config)
    model.save_pretrained(folder)
    reader = tokenizer()
    reader.eos_token = "[SEP]"
    reader.chat_template = CHAT
    reader.save_pretrained(folder)
    return folder


def masked_checkpoint(folder: Path, seed: int = 0) -> Path:
    """Write a BERT with its masked language modelling head."""
    from tiny_models import config
    from transformers import AutoModelForMaskedLM

    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = AutoModelForMaskedLM.from_config(config("bert"))
    model.save_pretrained(folder)
    tokenizer().save_pretrained(folder)
    return folder


def odd_encoder(folder: Path, architecture: str, seed: int = 0) -> Path:
    """Write an encoder with a habit of its own.

    "deberta-v2" maps its relative positions by the query too, once for a batch; "xlnet" has its tokens first; and
    "longformer" changes its query in place.
    """
    from transformers import AutoConfig, AutoModel

    sizes: dict[str, Any] = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2}
    sizes |= {"num_attention_heads": 4, "max_position_embeddings": 64, "initializer_range": 0.2, "type_vocab_size": 0}
    if architecture == "deberta-v2":
        sizes |= {"relative_attention": True, "pos_att_type": ["p2c", "c2p"], "share_att_key": True}
        sizes |= {"position_buckets": 16, "norm_rel_ebd": "layer_norm"}
    elif architecture == "longformer":
        sizes |= {"attention_window": 8, "type_vocab_size": 1}
    else:
        sizes = {"d_model": 32, "n_layer": 2, "n_head": 4, "d_inner": 64}
    config = AutoConfig.for_model(architecture, vocab_size=len(WORDS) + 5, pad_token_id=0, **sizes)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = AutoModel.from_config(config)
    model.save_pretrained(folder)
    tokenizer().save_pretrained(folder)
    return folder


def image_checkpoint(folder: Path, architecture: str, seed: int = 0) -> Path:
    """Write a ViT or a ResNet for images of 32 by 32."""
    from transformers import AutoModel, ResNetConfig, ViTConfig

    if architecture == "vit":
        sizes = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 48}
        config: Any = ViTConfig(image_size=32, patch_size=8, initializer_range=0.2, **sizes)
    else:
        config = ResNetConfig(embedding_size=8, hidden_sizes=[8, 16], depths=[1, 2], layer_type="basic")
        config.image_size = 32
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = AutoModel.from_config(config)
        for name, value in model.named_buffers():  # batch statistics as a trained network has them
            if name.endswith("running_var"):
                value.uniform_(0.5, 2.0)
    model.save_pretrained(folder)
    return folder


def write_images(folder: Path, count: int, seed: int = 0) -> list[dict[str, object]]:
    """Write small random images and return their rows."""
    from PIL import Image

    draw = np.random.default_rng(seed)
    rows: list[dict[str, object]] = []
    for i in range(count):
        pixels = draw.integers(0, 256, (24 + i, 40, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(folder / f"{i}.png")
        rows.append({"id": f"i{i}", "image": f"{i}.png", "label": ("cat", "dog", "owl")[i % 3]})
    return rows


class GatedLstm(nn.Module):
    """An LSTM over word ids whose gates are linear layers, used once a word; the last word's state is classified."""

    def __init__(self, words: int, labels: int, size: int = 12, seed: int = 0) -> None:
        super().__init__()
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            self.embedding = nn.Embedding(words, size)
            self.input = nn.Linear(size, 4 * size)
            self.recurrent = nn.Linear(size, 4 * size)
            self.head = nn.Linear(size, labels)

    def forward(self, ids: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
        x = self.embedding(ids)
        h = c = torch.zeros_like(x[:, 0])
        for t in range(ids.shape[1]):
            i, f, g, o = (self.input(x[:, t]) + self.recurrent(h)).chunk(4, dim=1)
            new_c = f.sigmoid() * c + i.sigmoid() * g.tanh()
            keep = mask[:, t, None]
            h, c = keep * o.sigmoid() * new_c.tanh() + (1 - keep) * h, keep * new_c + (1 - keep) * c
        logits: torch.Tensor = self.head(h)
        return logits
