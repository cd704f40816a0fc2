"""A tiny, random checkpoint in BGE-M3's layout: XLM-R, its tokenizer, and the two linear heads."""

from pathlib import Path

import torch
from tokenizers import Tokenizer, models, pre_tokenizers, processors
from transformers import PreTrainedTokenizerFast, XLMRobertaConfig, XLMRobertaModel

SPECIAL = {"bos_token": "<s>", "pad_token": "<pad>", "eos_token": "</s>", "unk_token": "<unk>"}
SENTENCE = "the gate was opened by a dragon at noon while nobody came to see it fly over hills"
WORDS = SENTENCE.split()


def make_checkpoint(folder: Path) -> Path:
    """Writes it; positions for 32 tokens."""
    torch.manual_seed(0)
    vocabulary = {word: i for i, word in enumerate([*SPECIAL.values(), *dict.fromkeys(WORDS)])}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer.post_processor = processors.TemplateProcessing(
        single="<s> $A </s>", special_tokens=[("<s>", 0), ("</s>", 2)]
    )
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, cls_token="<s>", sep_token="</s>", **SPECIAL).save_pretrained(
        folder
    )
    config = XLMRobertaConfig(
        vocab_size=len(vocabulary),
        hidden_size=32,
        num_hidden_layers=2,
        num_attention_heads=4,
        intermediate_size=64,
        max_position_embeddings=34,
        pad_token_id=1,
        type_vocab_size=1,
    )
    XLMRobertaModel(config).save_pretrained(folder)
    sparse = torch.nn.Linear(32, 1)
    torch.nn.init.constant_(sparse.bias, 0.5)  # so that most tokens have a weight above 0
    torch.save(sparse.state_dict(), folder / "sparse_linear.pt")
    torch.save(torch.nn.Linear(32, 32).state_dict(), folder / "colbert_linear.pt")
    return folder
