"""Retrieval: texts into passages, passages into FAISS indexes, questions and clues into ranked passages."""
