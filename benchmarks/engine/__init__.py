"""What does everything but the model cost: scheduling, messages, streams through Triton?"""
