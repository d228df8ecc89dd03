"""What does continuous batching gain over one request at a time, and over static batches?"""
