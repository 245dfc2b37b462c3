"""Where metrics and events are written. A sink only formats what it is given; another one is one file (docs/extending.md)."""
