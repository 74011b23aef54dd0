"""Pages of docs/ that are made from what the program does: `python -m tests.pages` writes them, a test holds them current."""
