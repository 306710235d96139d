"""How a model is stored on disk: readers and writers of every container, independent of the model."""
