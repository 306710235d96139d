"""How a model lies on disk: readers and writers of every container, none of which knows the model."""
