"""The memory model: texts into compressed KV memories, memories kept and served, clues recalled from them."""
