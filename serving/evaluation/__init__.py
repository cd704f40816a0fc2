"""Quality, measured: questions with known answers put to a server, method by method, scored and compared."""
