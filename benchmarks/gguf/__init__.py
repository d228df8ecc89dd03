"""How fast are GGUF files beside llama.cpp on this CPU?"""
