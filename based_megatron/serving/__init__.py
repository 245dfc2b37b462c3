"""`based serve`: an HTTP server with the completions of OpenAI's interface."""
