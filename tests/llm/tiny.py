"""A tiny random Llama with a tokenizer of its own, as a checkpoint in a folder: what tests of the command and of chat start from."""

from pathlib import Path

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

TEXT = """The capital of France is Paris. The capital of Italy is Rome, and that of Spain is Madrid.
A model reads a text token by token; each new token may look at all tokens before it, and at none behind.
Once upon a time there was a small model that knew three cities, two rivers and one mountain by name."""
TEMPLATE = (
    "{% for message in messages %}<|{{ message['role'] }}|>{{ message['content'] }}</s>{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>{% endif %}"
)
SPECIAL = ["<unk>", "<s>", "</s>", "<|system|>", "<|user|>", "<|assistant|>"]


def tiny_config(**changes) -> LlamaConfig:
    sizes = {"hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2, "vocab_size": 320}
    heads = {"num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 128}
    return LlamaConfig(**{**sizes, **heads, "unk_token_id": 0, "bos_token_id": 1, "eos_token_id": 2, **changes})


def tiny_model(seed=0, dtype=torch.float32, **changes) -> LlamaForCausalLM:
    """Weights of a spread that makes logits differ and attention look somewhere."""
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        model = LlamaForCausalLM(tiny_config(initializer_range=0.2, **changes))
    return model.to(dtype).eval()


def tiny_tokenizer() -> PreTrainedTokenizerFast:
    """Byte-level BPE: any text goes in and comes out whole; at most 320 ids."""
    tokenizer = Tokenizer(models.BPE(unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=320, special_tokens=SPECIAL, initial_alphabet=alphabet, show_progress=False
    )
    tokenizer.train_from_iterator(TEXT.splitlines(), trainer)
    named = {"unk_token": "<unk>", "bos_token": "<s>", "eos_token": "</s>"}
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, chat_template=TEMPLATE, model_max_length=128, **named)


def tiny_llama(folder: Path, model: LlamaForCausalLM | None = None, **how) -> Path:
    """Write config, weights and tokenizer; `how` goes to `save_pretrained`, e.g. `max_shard_size="100KB"`."""
    folder.mkdir(parents=True, exist_ok=True)
    (model if model is not None else tiny_model()).save_pretrained(folder, **how)
    tiny_tokenizer().save_pretrained(folder)
    return folder
