"""How a model is trained: loss, optimizers, and the step that joins them."""
