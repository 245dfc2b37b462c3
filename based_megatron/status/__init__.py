"""The command `based status`: how a run is, from its files alone."""
