"""Small tokenizers of each kind, built in memory."""

from tokenizers import AddedToken, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers

CORPUS = [
    "def fibonacci(n):\n    return n if n < 2 else fibonacci(n - 1) + fibonacci(n - 2)\n",
    "The quick brown fox jumps over the lazy dog. Grüße, naïve café; 你好，世界! Привет 👋🏽 \U0001f468‍\U0001f469",
    "the the the and and hello hello world world ing ing tion tion",
]


def byte_level() -> Tokenizer:
    """Like GPT-2, Llama 3, Qwen, SmolLM: tokens are bytes, some of them parts of characters."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.train_from_iterator(
        CORPUS,
        trainers.BpeTrainer(
            vocab_size=400,
            initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
            special_tokens=["<|endoftext|>", "<|im_start|>", "<|im_end|>"],
            show_progress=False,
        ),
    )
    tokenizer.add_tokens([AddedToken("é à"), AddedToken("<tool>")])  # added, not special; one is not ASCII
    return tokenizer


def sentencepiece(strip: bool = True) -> Tokenizer:
    """Like Llama 2, Mistral, TinyLlama: "▁" for a space, bytes for what the vocabulary lacks, <s> in front.

    ``strip=False`` is Gemma's and newer Mistrals' decoder, which keeps a leading space.
    """
    vocab = {"<unk>": 0, "<s>": 1, "</s>": 2}
    for byte in range(256):
        vocab[f"<0x{byte:02X}>"] = len(vocab)
    for piece in (
        "▁",
        "▁the",
        "▁hello",
        "▁world",
        "▁a",
        "the",
        "ing",
        "ü",
        "▁▁",
        "好",
        *"abcdefghijklmnopqrstuvwxyz.!:",
    ):
        vocab[piece] = len(vocab)
    merges = [("▁", "a"), ("▁", "▁")]
    tokenizer = Tokenizer(models.BPE(vocab, merges, byte_fallback=True, unk_token="<unk>", fuse_unk=True))
    tokenizer.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    steps = [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()]
    tokenizer.decoder = decoders.Sequence([*steps, decoders.Strip(" ", 1, 0)] if strip else steps)
    tokenizer.add_special_tokens(["<unk>", "<s>", "</s>"])
    tokenizer.post_processor = processors.TemplateProcessing("<s> $A", special_tokens=[("<s>", 1)])
    return tokenizer


def metaspace() -> Tokenizer:
    """Like T5 and XLM-R: the first token of a text loses its "▁"."""
    vocab = {piece: i for i, piece in enumerate(["<unk>", "▁", "▁the", "▁hello", "ing", "a", "b", "▁b▁", "</s>"])}
    tokenizer = Tokenizer(models.WordLevel(vocab, unk_token="<unk>"))
    tokenizer.decoder = decoders.Metaspace()
    tokenizer.add_special_tokens(["</s>"])
    return tokenizer


def word_piece() -> Tokenizer:
    """Like BERT: a decoder that joins tokens by what stands next to them, so there is no incremental form."""
    vocab = {word: i for i, word in enumerate(["[UNK]", "hello", "world", "##ing", "##s", "play", "!", "[SEP]"])}
    tokenizer = Tokenizer(models.WordPiece(vocab, unk_token="[UNK]"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer.decoder = decoders.WordPiece(cleanup=False)
    tokenizer.add_special_tokens(["[SEP]"])
    return tokenizer
