"""What a model writes, read as it comes: text, reasoning, tool calls."""
