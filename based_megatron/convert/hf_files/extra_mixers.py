"""Mixers that other packages have added to this model, by their names in its config; an export has them here."""

EXTRA_MIXERS: dict = {}
