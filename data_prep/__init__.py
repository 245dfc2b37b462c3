"""`based prep`: makes tokenized webdataset shards with a manifest out of text."""
