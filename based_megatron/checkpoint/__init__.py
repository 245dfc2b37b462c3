"""One checkpoint of a run, whatever the layout that wrote it and the layout that reads it."""
