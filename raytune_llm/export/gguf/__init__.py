"""A model as one GGUF file, which llama.cpp, Ollama and LM Studio read."""
