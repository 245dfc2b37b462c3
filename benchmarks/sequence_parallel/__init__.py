"""Parts of a rank that shares a sequence, measured on one device; many ranks, modelled from them."""
