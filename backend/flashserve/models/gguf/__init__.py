"""GGUF files: llama.cpp's format of a whole model in one file, weights, configuration and tokenizer.

``header`` reads what a file says of itself and believes none of it unchecked, ``metadata`` gives its values with their
types, ``architectures`` makes them a configuration and names of tensors, ``tokenizer`` (with ``pre_tokenizers``) makes
them a tokenizer.json, ``weights`` gives the tensors (``dequantize`` has the formats), and ``files`` is all of it as
ModelFiles.
"""
