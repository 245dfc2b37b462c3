"""The recall study: accuracy of multi-query associative recall over the size of the recurrent state, for many mixers."""
