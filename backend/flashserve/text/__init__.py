"""Text in and out: tokenizer, incremental detokenizer, stop strings, chat templates. No torch, no requests."""
