"""Model-local functions: the places of a portable graph that a backend may replace with a kernel of its own."""
