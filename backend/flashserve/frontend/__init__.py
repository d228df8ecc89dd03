"""The Triton adapter: requests in, responses out. Runs in the stub process and never imports torch."""
