"""The read side of prepared corpora: manifest, order, mixture, loader."""
