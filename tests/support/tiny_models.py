"""Random-weight models of every family, small enough that a step costs about a millisecond.

The weights are larger than a trained model's and nothing is zero, so that every bias, norm and position matters to
the tokens, and the best token is far ahead of the second.
"""

from __future__ import annotations

import json
from itertools import product
from pathlib import Path
from typing import Any

VOCAB_SIZE = 512
EOS_TOKEN = "<|endoftext|>"
EOS_ID = 0
CONTEXT_LEN = 2048

_SIZES = {
    "vocab_size": VOCAB_SIZE,
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "max_position_embeddings": CONTEXT_LEN,
    "rope_theta": 10000.0,
    "tie_word_embeddings": False,
    "bos_token_id": None,
    "eos_token_id": EOS_ID,
    "initializer_range": 0.2,
}
_GEMMA3_SIZES = {
    **{key: value for key, value in _SIZES.items() if key != "rope_theta"},
    "tie_word_embeddings": True,
    "num_hidden_layers": 3,
    "layer_types": ["sliding_attention", "full_attention", "sliding_attention"],
    "sliding_window": 20,
    "query_pre_attn_scalar": 24,
    "rope_parameters": {
        "sliding_attention": {"rope_type": "default", "rope_theta": 100.0},
        "full_attention": {"rope_type": "linear", "rope_theta": 10000.0, "factor": 2.0},
    },
}
_GPT2_SIZES = {
    "vocab_size": VOCAB_SIZE,
    "n_embd": 64,
    "n_layer": 2,
    "n_head": 4,
    "n_positions": CONTEXT_LEN,
    "bos_token_id": EOS_ID,
    "eos_token_id": EOS_ID,
    "initializer_range": 0.2,
}

# family: (configuration class, model class, settings)
_FAMILIES: dict[str, tuple[str, str, dict[str, Any]]] = {
    "llama": ("LlamaConfig", "LlamaForCausalLM", _SIZES),
    "mistral": ("MistralConfig", "MistralForCausalLM", {**_SIZES, "sliding_window": 48}),
    "qwen2": ("Qwen2Config", "Qwen2ForCausalLM", {**_SIZES, "tie_word_embeddings": True}),
    "qwen3": ("Qwen3Config", "Qwen3ForCausalLM", _SIZES),
    "gemma3": ("Gemma3TextConfig", "Gemma3ForCausalLM", _GEMMA3_SIZES),
    "gpt2": ("GPT2Config", "GPT2LMHeadModel", _GPT2_SIZES),
}
FAMILIES = tuple(_FAMILIES)


def make_tiny_model(
    family: str,
    folder: str | Path,
    *,
    dtype: str = "float32",
    seed: int = 0,
    max_shard_size: str = "5GB",
    **overrides: Any,
) -> Path:
    """Write config.json, safetensors and a tokenizer to ``folder`` (made if need be) and return it.

    overrides: keys of the family's transformers config, such as ``num_hidden_layers`` or ``rope_scaling``.
    """
    import torch
    import transformers

    config_name, model_name, settings = _FAMILIES[family]
    config = getattr(transformers, config_name)(**{**settings, **overrides})
    torch.manual_seed(seed)
    model = getattr(transformers, model_name)(config)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.ndim == 1:
                center = 1.0 if "norm" in name or "ln_" in name else 0.0
                center = 0.0 if name.endswith("bias") else center
                parameter.copy_(center + 0.2 * torch.randn_like(parameter))
    model = model.to(getattr(torch, dtype))
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    _quietly(lambda: model.save_pretrained(folder, max_shard_size=max_shard_size))
    write_byte_level_tokenizer(folder, config.vocab_size)
    return folder


def write_byte_level_tokenizer(folder: Path, vocab_size: int = VOCAB_SIZE) -> None:
    """A byte-level BPE tokenizer whose every id stands for some text: 3 special tokens, 256 bytes, then merges.

    It takes any text and gives it back. Token 0 ends a text; the chat template is ChatML.
    """
    from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers

    specials = [EOS_TOKEN, "<|im_start|>", "<|im_end|>"]
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocab = {token: index for index, token in enumerate([*specials, *alphabet])}
    merges = []
    for left, right in _merge_pairs():
        if len(vocab) >= vocab_size:
            break
        if left + right not in vocab:
            vocab[left + right] = len(vocab)
            merges.append((left, right))
    tokenizer = Tokenizer(models.BPE(vocab=vocab, merges=merges))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens([AddedToken(token, special=True, normalized=False) for token in specials])
    tokenizer.save(str(folder / "tokenizer.json"))
    settings = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "eos_token": EOS_TOKEN,
        "model_max_length": CONTEXT_LEN,
        "chat_template": (
            "{% for message in messages %}<|im_start|>{{ message['role'] }}\n{{ message['content'] }}<|im_end|>\n"
            "{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
        ),
    }
    (folder / "tokenizer_config.json").write_text(json.dumps(settings, indent=2), encoding="utf-8")


def _merge_pairs() -> Any:
    """An endless enough supply of pairs of existing tokens: letters, then words of two and three pairs."""
    letters = "etaoinshrdlucmfwygpbvk"
    space = "Ġ"  # the byte-level alphabet's sign for a space
    yield from ((space, letter) for letter in letters)
    pairs = [a + b for a, b in product(letters, letters)]
    yield from ((pair[0], pair[1]) for pair in pairs)
    yield from ((a, b) for a, b in product(pairs, pairs))


def _quietly(action: Any) -> Any:
    """Run ``action`` without transformers' progress bars, which would drown the tests' output."""
    from transformers.utils import logging

    logging.disable_progress_bar()
    return action()
