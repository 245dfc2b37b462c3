"""The files that ship inside a Hugging Face export. They need torch and transformers, and nothing else of ours."""
