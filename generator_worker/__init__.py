"""Generation: questions and numbered passages into answers with citations, by vLLM or a remote endpoint."""
