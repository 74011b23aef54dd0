"""`export.format=ollama`: a GGUF file, and a Modelfile whose template is checked against the chat template."""
