"""Small random-weight checkpoints of several architectures, with a small tokenizer, made in the test."""

from __future__ import annotations

from pathlib import Path

import torch
from tokenizers import Tokenizer, models, pre_tokenizers, processors
from transformers import (
    AutoModel,
    BertConfig,
    DistilBertConfig,
    ElectraConfig,
    PretrainedConfig,
    PreTrainedTokenizerFast,
    RobertaConfig,
)

WORDS = [
    *("the", "a", "film", "plot", "actor", "was", "is", "good", "bad", "great", "dull", "funny"),
    *("slow", "moving", "and", "but", "not", "very", "it", "loud", "quiet", "1", "2", "3"),
]
_SIZES = {
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "max_position_embeddings": 64,
    "initializer_range": 0.2,
}
ARCHITECTURES = ("bert", "roberta", "electra", "distilbert")


def tokenizer(max_length: int = 60) -> PreTrainedTokenizerFast:
    special = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"]
    core = Tokenizer(models.WordLevel({w: i for i, w in enumerate(special + WORDS)}, unk_token="[UNK]"))
    core.pre_tokenizer = pre_tokenizers.Whitespace()
    core.post_processor = processors.TemplateProcessing(
        single="[CLS] $A [SEP]", pair="[CLS] $A [SEP] $B [SEP]", special_tokens=[("[CLS]", 2), ("[SEP]", 3)]
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=core,
        pad_token="[PAD]",
        unk_token="[UNK]",
        cls_token="[CLS]",
        sep_token="[SEP]",
        mask_token="[MASK]",
        model_max_length=max_length,
        model_input_names=["input_ids", "attention_mask"],
    )


def config(architecture: str) -> PretrainedConfig:
    vocabulary = len(WORDS) + 5
    if architecture == "bert":
        return BertConfig(vocab_size=vocabulary, **_SIZES)
    if architecture == "roberta":
        return RobertaConfig(vocab_size=vocabulary, pad_token_id=0, type_vocab_size=1, **_SIZES)
    if architecture == "electra":
        return ElectraConfig(vocab_size=vocabulary, embedding_size=16, **_SIZES)
    if architecture == "distilbert":
        return DistilBertConfig(
            vocab_size=vocabulary, dim=32, hidden_dim=64, n_layers=2, n_heads=4, initializer_range=0.2
        )
    raise ValueError(architecture)


def checkpoint(folder: Path, architecture: str = "bert", seed: int = 0) -> Path:
    """Write a checkpoint and return its folder."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = AutoModel.from_config(config(architecture))
    model.save_pretrained(folder)
    tokenizer().save_pretrained(folder)
    return folder


def sentences(count: int, seed: int = 0) -> list[str]:
    """Random sentences of 2 to 20 known words."""
    draw = torch.Generator().manual_seed(seed)
    out = []
    for _ in range(count):
        length = int(torch.randint(2, 21, (1,), generator=draw))
        out.append(" ".join(WORDS[int(i)] for i in torch.randint(0, len(WORDS), (length,), generator=draw)))
    return out
