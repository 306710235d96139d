"""The X-ray of a data set: what is in it, what a model would learn from it, and what should go first."""
