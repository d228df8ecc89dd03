"""Who runs in the next step, and where their KV lives. Pure Python; never imports torch."""
