"""From text to tokenized webdataset shards with a manifest: `based prep`."""
